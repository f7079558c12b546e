"""Pictures with labels: scikit-learn's digits, folders of pictures per class, packed shards, Hugging Face data sets."""

from __future__ import annotations

import copy
import dataclasses
import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from fasternet.data.images import IMAGE_SUFFIXES, find_images, load_image
from fasternet.models.checkpoint import Preprocessing

if TYPE_CHECKING:
    from fasternet.data.shards import ShardStream

TRAINING_NAMES = ("train", "training")  # of folders; capitals do not count
VALIDATION_FOLDERS = ("val", "valid", "validation", "test")  # of other layouts, and splits of the hub
VALIDATION_NAMES = (*VALIDATION_FOLDERS, "testing", "dev")
PLAIN_NAMES = ("train", *VALIDATION_FOLDERS)  # each is a split by itself; the others come in pairs
SPLIT_WORDS = ("train", "val", "test", "dev", "split", "fold")  # in the name of a split
VALIDATION_SHARE = 0.2
SHARDS_FILE = "shards.json"


class ImageDataset(Dataset[tuple[Any, int]]):
    """Pictures of known classes, read when they are asked for.

    Attributes:
        root: The folder that ``paths`` start from.
        paths: One for each picture, relative to ``root``; the digits have no files, theirs are mere names.
        labels: One for each picture, an index into ``class_names``.
        class_names: The classes, in the order of the network's outputs.
        transform: Applied to each picture by ``dataset[index]``; None leaves it a PIL image.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[Path],
        labels: Sequence[int],
        class_names: Sequence[str],
        *,
        images: Sequence[Any] | None = None,
    ) -> None:
        self.root = root
        self.paths = list(paths)
        self.labels = list(labels)
        self.class_names = tuple(class_names)
        self.transform: Callable[[Image.Image], Any] | None = None
        self._images = images

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.load(index)
        return (self.transform(image) if self.transform else image), self.labels[index]

    def load(self, index: int) -> Image.Image:
        """Return a picture as it is, RGB, without the transform."""
        return self._images[index] if self._images else load_image(self.root / self.paths[index])

    def read(self, index: int) -> bytes:
        """Return the bytes of a picture's file; those of a digit are a PNG."""
        if not self._images:
            return (self.root / self.paths[index]).read_bytes()
        file = io.BytesIO()
        self._images[index].save(file, "PNG")
        return file.getvalue()

    def select(self, indices: Sequence[int]) -> ImageDataset:
        """Return a data set of these pictures, in this order, with the same classes and no transform."""
        chosen = copy.copy(self)
        chosen.paths = [self.paths[index] for index in indices]
        chosen.labels = [self.labels[index] for index in indices]
        chosen.transform = None
        # What a subclass needs to find a picture, for example its place in a file, is its ``_images`` too.
        chosen._images = [self._images[index] for index in indices] if self._images else None
        return chosen


@dataclasses.dataclass(frozen=True)
class Datasets:
    """What a network learns from, and what it is judged by.

    Attributes:
        train: The training pictures; of packed shards a stream, which gives them in its own order.
        validation: The validation pictures; none of them is a training picture.
        class_names: The classes of both.
        preprocessing_defaults: Input size and normalisation that suit the pictures.
    """

    train: ImageDataset | ShardStream
    validation: ImageDataset
    class_names: tuple[str, ...]
    preprocessing_defaults: Preprocessing


def create_datasets(data: str | Path, *, seed: int = 0) -> Datasets:
    """Open a data set for training and validation.

    Args:
        data: ``digits`` (built in; a folder of that name is ``./digits``), or a folder: with ``train`` and
            one of ``val``, ``valid``, ``validation``, ``test``, ``dev`` in it (``training`` and ``testing`` too, in
            capitals or not), each a folder of pictures per class; or with the folders of the classes, and then
            a fifth of each class becomes validation pictures; or of packed shards, also by its ``http(s)://``
            address; or ``hf:`` and the name of a Hugging Face data set or the folder it was saved to.
        seed: Decides that split, together with the names of the files; nothing else does.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The folder is no such tree; the message names what is wrong and where.
        OSError: What lies at an address cannot be fetched; a ConnectionError where there is no connection.
        ModuleNotFoundError: The data set needs a package that is not installed.
    """
    if str(data) == "digits":
        return split_dataset(_load_digits(), seed, Preprocessing(input_size=32, crop_ratio=1.0))
    if str(data).startswith("hf:"):
        from fasternet.data.hub import create_hub_datasets

        return create_hub_datasets(str(data).removeprefix("hf:"), seed=seed)
    if is_sharded(data):
        from fasternet.data.shards import create_shard_datasets

        return create_shard_datasets(data)
    root = _check_folder(Path(data))
    train_folder, validation_folder = find_split(root, TRAINING_NAMES), find_split(root, VALIDATION_NAMES)
    if train_folder is None and validation_folder is None:
        return split_dataset(create_dataset(root), seed, Preprocessing())
    if train_folder is None or validation_folder is None:
        present, absent = (train_folder, "val") if train_folder else (validation_folder, "train")
        assert present is not None
        raise ValueError(
            f"data folder {root} holds {present.name} but no {absent}; to have a fifth of {present} "
            "split off for validation, name that folder"
        )
    train, validation = create_dataset(train_folder), create_dataset(validation_folder)
    if train.class_names != validation.class_names:
        raise ValueError(_explain_class_difference(train, validation))
    return Datasets(train, validation, train.class_names, Preprocessing())


def create_validation_dataset(data: str | Path, *, seed: int = 0) -> ImageDataset:
    """Open the validation pictures of a data set alone; its ``train`` folder may be absent.

    Args:
        data: See ``create_datasets``.
        seed: See ``create_datasets``.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The folder holds no validation pictures.
    """
    is_folder = str(data) != "digits" and not str(data).startswith("hf:") and not is_sharded(data)
    if is_folder and (folder := find_split(_check_folder(Path(data)), VALIDATION_NAMES)):
        return create_dataset(folder)
    return create_datasets(data, seed=seed).validation


def create_dataset(folder: Path) -> ImageDataset:
    """Open all pictures of a folder that holds one folder per class, sorted by name.

    Raises:
        FileNotFoundError: There is no such folder, or a class has no pictures.
        ValueError: The folder does not hold two classes or more, or they are splits by another name.
    """
    folders = list_folders(_check_folder(folder))
    if len(folders) < 2:
        found = f"holds one only, {folders[0].name}" if folders else "holds none"
        found += "; of shards, `fasternet data index` makes a data set" if any(folder.glob("*.tar")) else ""
        raise ValueError(f"data folder {folder} must hold a folder of pictures per class, but {found}")
    if repeated := _find_repeated(folders):
        raise ValueError(
            f"data folder {folder} looks like splits, not classes: {_name_some([path.name for path in folders])} hold "
            f"the same folders ({_name_some(repeated)}) and no pictures; name the splits train and val, or put the "
            "pictures of each class directly into its folder"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_folder in enumerate(folders):
        found_paths = find_images([class_folder])
        paths += [path.relative_to(folder) for path in found_paths]
        labels += [label] * len(found_paths)
    return ImageDataset(folder, paths, labels, [path.name for path in folders])


def list_folders(folder: Path) -> list[Path]:
    """List the folders in a folder by name, without hidden ones, links to a folder above and macOS's leftovers."""
    here = folder.resolve()
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_dir()
        and not path.name.startswith(".")
        and path.name != "__MACOSX"
        and not here.is_relative_to(path.resolve())
    ]


def list_splits(root: Path, *, flat: bool = False) -> list[Path]:
    """List the folders that are splits by their names, training first; none where they are classes.

    Names other than the plain ones count where there is a training and a validation folder. All are classes where none
    of them holds folders, unless their names are plain and no other folder lies beside them.

    Args:
        root: The folder that holds them.
        flat: They may hold their pictures directly, as with labels in a file.
    """
    folders = list_folders(root)
    names = (*TRAINING_NAMES, *VALIDATION_NAMES)
    splits = [path for path in folders if path.name.lower() in names]
    if len({path.name.lower() in TRAINING_NAMES for path in splits}) < 2:
        splits = [path for path in splits if path.name in PLAIN_NAMES]
    is_plain = all(path.name in PLAIN_NAMES for path in folders)
    if not (flat or is_plain or any(list_folders(path) for path in splits)):
        return []
    return sorted(splits, key=lambda path: names.index(path.name.lower()))


def find_split(root: Path, names: Sequence[str], *, flat: bool = False) -> Path | None:
    """Return the first folder of ``list_splits`` that bears one of the names, a plain one before others.

    Raises:
        ValueError: Two folders differ by capitals alone.
    """
    found = [path for path in list_splits(root, flat=flat) if path.name.lower() in names]
    if len({path.name.lower() for path in found}) < len(found):
        raise ValueError(f"data folder {root} holds {_name_some([path.name for path in found])}: rename all but one")
    return min(found, key=lambda path: path.name not in PLAIN_NAMES, default=None)


def is_sharded(data: str | Path) -> bool:
    """Tell whether ``data`` is a folder of packed shards, or an address."""
    return str(data).startswith(("http://", "https://")) or Path(data, SHARDS_FILE).is_file()


def split_dataset(dataset: ImageDataset, seed: int, preprocessing: Preprocessing) -> Datasets:
    """Move a fifth of each class, at least one picture, to the validation pictures.

    Raises:
        ValueError: A class has one picture only, or none.
    """
    members: list[list[int]] = [[] for _ in dataset.class_names]
    for index, label in enumerate(dataset.labels):
        members[label].append(index)
    train, validation = [], []
    for name, indices in zip(dataset.class_names, members, strict=True):
        if len(indices) < 2:
            count = "one picture" if indices else "no picture"
            raise ValueError(f"class {name} of data folder {dataset.root} has {count}; a split takes at least two")
        # Seeded by the class's name too: a class added later leaves the others as they were.
        random.Random(f"{seed} {name}").shuffle(indices)
        num_validation = max(1, round(VALIDATION_SHARE * len(indices)))
        validation += indices[:num_validation]
        train += indices[num_validation:]
    return Datasets(
        dataset.select(sorted(train)), dataset.select(sorted(validation)), dataset.class_names, preprocessing
    )


def _check_folder(folder: Path) -> Path:
    if not folder.exists():
        raise FileNotFoundError(f"no data folder at {folder}")
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} is a file")
    return folder


def _find_repeated(folders: Sequence[Path]) -> list[str]:
    """Return the two folders or more, beside no picture, that all folders named like splits have in common."""
    if not all(any(word in path.name.lower() for word in SPLIT_WORDS) for path in folders):
        return []
    common: set[str] | None = None
    for folder in folders:
        own = set()
        for path in folder.iterdir():
            if path.name.lower().endswith(IMAGE_SUFFIXES) and not path.is_dir():
                return []
            if path.is_dir() and not path.name.startswith("."):
                own.add(path.name)
        common = own if common is None else common & own
        if len(common) < 2:
            return []
    return sorted(common or ())


def _name_some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _load_digits() -> ImageDataset:
    """Return scikit-learn's 1797 handwritten digits (8 x 8, grey from 0 to 16) as RGB pictures of 32 x 32."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ModuleNotFoundError(
            "the built-in digits need scikit-learn: pip install 'fasternet[quickstart]'"
        ) from None
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8)
    small = [Image.fromarray(array).convert("RGB") for array in pixels]
    images = [image.resize((32, 32), Image.Resampling.BICUBIC) for image in small]
    labels = [int(label) for label in digits.target]
    paths = [Path(str(label), f"{index:04}") for index, label in enumerate(labels)]
    names = [str(name) for name in digits.target_names]
    return ImageDataset(Path("digits"), paths, labels, names, images=images)


def _explain_class_difference(train: ImageDataset, validation: ImageDataset) -> str:
    parts = []
    for one, other in ((train, validation), (validation, train)):
        if names := sorted(set(one.class_names) - set(other.class_names)):
            parts.append(f"{one.root} alone has {_name_some(names)}")
    return f"{train.root} and {validation.root} must hold the same classes: {'; '.join(parts)}"
