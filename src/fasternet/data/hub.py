"""Hugging Face data sets as pictures with labels: by their name on the hub, or from the folder they were saved to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from fasternet.data.datasets import VALIDATION_FOLDERS, Datasets, ImageDataset, split_dataset
from fasternet.data.images import ImageError, decode_image
from fasternet.models.checkpoint import Preprocessing


class HubDataset(ImageDataset):
    """One split of a Hugging Face data set: its rows are read from the disk when they are asked for."""

    def __init__(self, name: str, split: str, rows: Any) -> None:
        import datasets

        image = _find_column(name, split, rows, datasets.Image, "pictures")
        label = _find_column(name, split, rows, datasets.ClassLabel, "labels")
        labels = list(rows.select_columns([label])[:][label])
        class_names = rows.features[label].names
        unlabelled = [row for row, value in enumerate(labels) if value is None or value < 0]
        if unlabelled:
            more = f" and {len(unlabelled) - 1} more" if len(unlabelled) > 1 else ""
            raise ValueError(f"row {unlabelled[0]}{more} of split {split} of hf:{name} has no label")
        paths = [Path(split, f"{row:08}") for row in range(len(labels))]
        super().__init__(Path(f"hf:{name}"), paths, labels, class_names, images=range(len(labels)))
        # Undecoded: the rules for modes, transparency and orientation are those of picture files.
        self._rows = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        self._column = image

    def load(self, index: int) -> Image.Image:
        """Return a picture as it is, RGB, without the transform."""
        return decode_image(self.read(index), self.root / self.paths[index])

    def read(self, index: int) -> bytes:
        """Return the bytes of a picture's file."""
        assert self._images is not None
        picture = self._rows[self._images[index]][self._column]
        if picture is None:
            raise ImageError(f"cannot read {self.root / self.paths[index]}: the row holds no picture")
        content: bytes | None = picture["bytes"]
        try:
            return Path(picture["path"]).read_bytes() if content is None else content
        except OSError as error:
            raise ImageError(f"cannot read {self.root / self.paths[index]}: {error}") from None


def create_hub_datasets(name: str, *, seed: int = 0) -> Datasets:
    """Open a Hugging Face data set.

    Args:
        name: Its name on the hub, or a folder that ``save_to_disk`` wrote. The split ``train`` is for training; of
            ``val``, ``valid``, ``validation`` and ``test`` the first one is for validation; without any, a fifth of
            each class is.
        seed: Decides that split.

    Raises:
        ModuleNotFoundError: The package ``datasets`` is not installed.
        FileNotFoundError: There is no such data set.
        ValueError: It has no column of pictures or no column of classes, or not one only.
        ConnectionError: The hub cannot be reached.
    """
    splits = _load_splits(name)
    if "train" not in splits:
        raise ValueError(f"hf:{name} has no split train; it has {', '.join(splits)}")
    train = HubDataset(name, "train", splits["train"])
    found = next((split for split in VALIDATION_FOLDERS if split in splits), None)
    if found is None:
        return split_dataset(train, seed, Preprocessing())
    validation = HubDataset(name, found, splits[found])
    if train.class_names != validation.class_names:
        raise ValueError(f"the splits train and {found} of hf:{name} must have the same classes, but differ")
    return Datasets(train, validation, train.class_names, Preprocessing())


def _load_splits(name: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError:
        raise ModuleNotFoundError(f"hf:{name} needs the package datasets: pip install 'fasternet[hf]'") from None
    try:
        loaded = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
    except Exception as error:  # each of the many layers below has its own errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = next((kind for kind in (FileNotFoundError, ConnectionError) if isinstance(error, kind)), ValueError)
        raise kind(f"cannot open hf:{name}: {reason}") from None
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _find_column(name: str, split: str, rows: Any, feature: type, what: str) -> str:
    found: list[str] = [column for column, kind in rows.features.items() if isinstance(kind, feature)]
    if len(found) != 1:
        has = f"{len(found)} ({', '.join(found)})" if found else f"none among {', '.join(rows.features)}"
        raise ValueError(
            f"split {split} of hf:{name} must have one column of {what} (datasets.{feature.__name__}), but has {has}"
        )
    return found[0]
