"""Packs a data set into shards: tar files in the WebDataset layout, with the bytes of the pictures as they were."""

from __future__ import annotations

import dataclasses
import io
import itertools
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fasternet.data.datasets import SHARDS_FILE, ImageDataset, create_datasets
from fasternet.data.images import IMAGE_SUFFIXES, ImageError, decode_image
from fasternet.data.shard_files import LABEL_SUFFIX, Contents, Shard, save_contents
from fasternet.environment import describe_machine
from fasternet.models.download import hash_file

Progress = Callable[[int, int], object]


@dataclasses.dataclass(frozen=True)
class Packed:
    """What was packed.

    Attributes:
        output: The folder of the shards.
        num_train: Training pictures in them.
        num_validation: Validation pictures in them.
        num_shards: How many shards there are.
        unreadable: One sentence for each picture that could not be read, and was left out.
    """

    output: Path
    num_train: int
    num_validation: int
    num_shards: int
    unreadable: tuple[str, ...]


def pack_shards(
    source: str | Path,
    output: Path | str,
    *,
    images_per_shard: int = 1000,
    seed: int = 0,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> Packed:
    """Pack a data set into shards; training pictures in random order, validation pictures in theirs.

    The folder appears when it is complete; until then all is written beside it, into ``OUTPUT.partial``.

    Args:
        source: What ``create_datasets`` opens, but no shards.
        output: A folder that does not exist yet, or is empty.
        images_per_shard: Pictures of a shard; the last one of a split may hold fewer.
        seed: Decides the order, and the split where the source has none.
        num_workers: Processes that read the pictures, at most one per processor core; 0 reads in this one.
        progress: Called with the numbers of pictures done and in all.

    Returns:
        What was packed, and which pictures could not be read: they are left out.

    Raises:
        FileExistsError: ``output`` holds something.
        ValueError: The source is packed already, or holds no readable picture of a split.
        OSError: The disk is full or not writable.
    """
    output = Path(output)
    if images_per_shard < 1 or num_workers < 0:
        raise ValueError(
            f"images_per_shard={images_per_shard} must be at least 1, num_workers={num_workers} at least 0"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output {output} exists already; give a new or empty folder")
    datasets = create_datasets(source, seed=seed)
    train, validation = datasets.train, datasets.validation
    if not isinstance(train, ImageDataset):
        raise ValueError(f"data {source} is packed already")
    partial = _create_partial(output)
    unreadable: list[str] = []
    num_all = len(train) + len(validation)
    done = itertools.count(1)
    advance = (lambda: progress(next(done), num_all)) if progress else (lambda: None)
    try:
        splits = []
        for name, dataset in (("train", train), ("val", validation)):
            order = range(len(dataset))
            indices = random.Random(seed).sample(order, len(order)) if name == "train" else order
            pictures = _watch(_read_all(dataset, indices, num_workers), unreadable, advance)
            splits.append(tuple(_write_shards(partial, name, pictures, images_per_shard)))
            if not splits[-1]:
                raise ValueError(f"none of the {len(order)} {name} pictures of data {source} can be read")
        contents = Contents(datasets.class_names, datasets.preprocessing_defaults, *splits)
        save_contents(partial, contents, unreadable=unreadable)
        partial.replace(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    num_train, num_validation = (sum(shard.num_images for shard in shards) for shards in splits)
    return Packed(output, num_train, num_validation, sum(map(len, splits)), tuple(unreadable))


def _create_partial(output: Path) -> Path:
    """Make the folder that is written into; what a killed run left there is removed, anything else never."""
    partial = output.with_name(output.name + ".partial")
    if partial.exists():
        if not partial.is_dir() or not all(_is_ours(path) for path in partial.iterdir()):
            raise FileExistsError(f"{partial} is in the way; shards are written there until they are complete")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def _is_ours(path: Path) -> bool:
    return path.name == SHARDS_FILE or path.match("train-*.tar") or path.match("val-*.tar")


class _Readable(Dataset[Any]):
    """Reads a picture's bytes and tries to decode them; gives (index, bytes, sentence about what is wrong)."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, bytes, str | None]:
        path = self.dataset.root / self.dataset.paths[index]
        try:
            content = self.dataset.read(index)
            decode_image(content, path)
        except ImageError as error:
            return index, b"", str(error)
        except OSError as error:
            return index, b"", f"cannot read {path}: {error.strerror or error}"
        return index, content, None


def _read_all(
    dataset: ImageDataset, indices: Sequence[int], num_workers: int
) -> Iterator[tuple[Path, int, bytes, str | None]]:
    loader = DataLoader[Any](
        _Readable(dataset),
        sampler=indices,
        batch_size=None,
        num_workers=min(num_workers, describe_machine().cores),
        collate_fn=_keep,
    )
    for index, content, problem in loader:
        yield dataset.paths[index], dataset.labels[index], content, problem


def _keep(sample: Any) -> Any:
    return sample


def _watch(
    pictures: Iterator[tuple[Path, int, bytes, str | None]], unreadable: list[str], advance: Callable[[], object]
) -> Iterator[tuple[str, int, bytes]]:
    """Yield member name, label and bytes of each readable picture; note the others."""
    keys: set[str] = set()
    for path, label, content, problem in pictures:
        if problem is None:
            yield _name_member(path, content, keys), label, content
        else:
            unreadable.append(problem)
        advance()


def _name_member(path: Path, content: bytes, keys: set[str]) -> str:
    """Return the name of a picture in a tar file: its own, where WebDataset, which ends a key at a dot, allows it."""
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        suffix = _find_suffix(content)
    name = path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name
    key = plain = path.with_name(name.replace(".", "_")).as_posix()
    for number in itertools.count(2):
        if key not in keys:
            break
        key = f"{plain}-{number}"
    keys.add(key)
    return key + suffix


def _find_suffix(content: bytes) -> str:
    with Image.open(io.BytesIO(content)) as image:
        suffixes = [suffix for suffix, name in Image.registered_extensions().items() if name == image.format]
        usual = f".{image.format}".lower()
    return usual if usual in suffixes else suffixes[0]


def _write_shards(
    folder: Path, split: str, pictures: Iterator[tuple[str, int, bytes]], images_per_shard: int
) -> Iterator[Shard]:
    for number in itertools.count():
        first = next(pictures, None)
        if first is None:
            return
        path = folder / f"{split}-{number:06}.tar"
        num_images = 0
        with tarfile.open(path, "w") as tar:
            for name, label, content in itertools.chain([first], itertools.islice(pictures, images_per_shard - 1)):
                _add(tar, str(Path(name).with_suffix(LABEL_SUFFIX)), str(label).encode())
                _add(tar, name, content)
                num_images += 1
        yield Shard(path.name, num_images, hash_file(path), path.stat().st_size)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # of no time and nobody: equal pictures give equal shards
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
