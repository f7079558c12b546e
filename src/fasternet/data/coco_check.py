"""Looks at a data set in COCO's format before a long run: at every object, and at every picture by opening it."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fasternet.data.coco import CocoData, find_coco, list_missing, read_coco
from fasternet.data.coco_dataset import CocoDataset, ImageSizeError
from fasternet.data.images import ImageError
from fasternet.data.loaders import explain_dead_worker
from fasternet.environment import describe_machine

SMALL, MEDIUM = 32**2, 96**2  # pixels: COCO's bounds of an object's area
KINDS = ("missing", "unreadable", "wrong size", "grey", "ambiguous")  # what opening a picture may tell


@dataclasses.dataclass(frozen=True)
class CocoSplit:
    """What is in an annotation file and its pictures.

    Attributes:
        data: What the file says, less what is useless; its ``skipped`` counts that.
        missing: Pictures that are not there.
        unreadable: A sentence for each picture that cannot be read.
        wrong_size: A sentence for each picture of another size than annotated.
        grey: Pictures without colours.
        ambiguous: Pictures that their EXIF data turn without changing width and height: whether the annotations are of
            the picture as stored or upright, which is what training takes, nobody can tell.
    """

    data: CocoData
    missing: tuple[str, ...]
    unreadable: tuple[str, ...]
    wrong_size: tuple[str, ...]
    grey: tuple[str, ...]
    ambiguous: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """Return all of it, for JSON."""
        instances = [instance for image in self.data.images for instance in image.instances]
        objects = [instance for instance in instances if not instance.crowd]
        labels = Counter(instance.label for instance in objects)
        sizes = Counter(_name_size(instance.area) for instance in objects)
        return {
            "annotations": self.data.source.name,
            "num_images": len(self.data),
            "num_images_without_objects": sum(not image.instances for image in self.data.images),
            "num_objects": len(objects),
            "num_crowds": len(instances) - len(objects),
            "has_masks": self.data.has_masks,
            "classes": {name: labels[label] for label, name in enumerate(self.data.class_names)},
            "sizes": {name: sizes[name] for name in ("small", "medium", "large")},
            "skipped": dict(self.data.skipped),
            "missing": list(self.missing),
            "unreadable": list(self.unreadable),
            "wrong_size": list(self.wrong_size),
            "grey": list(self.grey),
            "ambiguous": list(self.ambiguous),
        }


@dataclasses.dataclass(frozen=True)
class CocoCheck:
    """What is in a data set in COCO's format.

    Attributes:
        name: Of the folder or the file.
        splits: What ``train`` and ``validation`` hold; a split whose file is refused is not among them.
        errors: A sentence for each thing that training would trip over.
    """

    name: str
    splits: Mapping[str, CocoSplit]
    errors: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """Return all of it, for JSON."""
        splits = {name: split.values() for name, split in self.splits.items()}
        return {"name": self.name, "splits": splits, "errors": list(self.errors)}


def check_coco(
    path: Path,
    *,
    num_workers: int = 0,
    watch: Callable[[Iterable[Any], int], Iterable[Any]] = lambda results, total: results,
) -> CocoCheck:
    """Look at a data set in COCO's format.

    Args:
        path: What ``find_coco`` takes.
        num_workers: Processes that open pictures, at most one per processor core; 0 opens them in this one.
        watch: Wraps the iteration over the pictures of a split, whose number it is told: a progress bar.

    Raises:
        FileNotFoundError: There is no annotation file.
        ValueError: It is not clear which files are meant.
        OSError: A process that opens pictures died.
        ModuleNotFoundError: faster-coco-eval, which compressed masks need, is not installed.
    """
    splits: dict[str, CocoSplit] = {}
    errors: list[str] = []
    for name, source in zip(("train", "validation"), find_coco(path), strict=True):
        if source is None:
            continue
        try:
            data = read_coco(source)
        except ValueError as error:
            errors.append(str(error))
            continue
        split = splits[name] = _check_split(data, num_workers, watch)
        errors += [f"picture {missing} is missing" for missing in split.missing]
        errors += [*split.unreadable, *split.wrong_size]
    if len(splits) == 2:
        errors += _compare(splits["train"].data, splits["validation"].data)
    return CocoCheck(path.name, splits, tuple(errors))


class _Opened(Dataset[list[tuple[str, str]]]):
    """What opening a picture tells: of each of ``KINDS`` that it is, a name or sentence."""

    def __init__(self, data: CocoData) -> None:
        self.dataset = CocoDataset(data, masks=False)
        self.missing = set(list_missing(data))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> list[tuple[str, str]]:
        path = self.dataset.data.images[index].path
        name = self.dataset.paths[index].as_posix()
        if path in self.missing:
            return [("missing", name)]
        try:
            pixels = np.asarray(self.dataset.load(index))
        except ImageSizeError as error:
            return [("wrong size", str(error))]
        except ImageError as error:
            return [("unreadable", str(error))]
        is_grey = (pixels[..., :1] == pixels[..., 1:]).all()  # some grey pictures are stored as RGB
        return [(kind, name) for kind, holds in (("grey", is_grey), ("ambiguous", _is_ambiguous(path))) if holds]


def _is_ambiguous(path: Path) -> bool:
    """Whether a picture is turned or mirrored by its EXIF data, and its sides do not show it."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            orientation = image.getexif().get(0x0112, 1)
            return orientation in (2, 3, 4) or (orientation in (5, 6, 7, 8) and image.width == image.height)
    except Exception:  # broken EXIF data, which are ignored everywhere
        return False


def _check_split(data: CocoData, num_workers: int, watch: Callable[[Iterable[Any], int], Iterable[Any]]) -> CocoSplit:
    loader = DataLoader(_Opened(data), batch_size=None, num_workers=min(num_workers, describe_machine().cores))
    with explain_dead_worker():
        found = [finding for findings in watch(loader, len(data)) for finding in findings]
    return CocoSplit(data, *(tuple(text for found_kind, text in found if found_kind == kind) for kind in KINDS))


def _compare(train: CocoData, validation: CocoData) -> list[str]:
    """Return what is wrong between the two splits."""
    errors = []
    if (train.category_ids, train.class_names) != (validation.category_ids, validation.class_names):
        errors.append(f"{train.source} and {validation.source} must have the same categories, with the same ids")
    files = {_identify(image.path) for image in train.images}
    if both := [image.path for image in validation.images if _identify(image.path) in files]:
        errors.append(f"{len(both):,} validation pictures are training pictures too, the first is {both[0]}")
    return errors


def _identify(path: Path) -> object:
    """Return device and inode of a file, which links share; of one that is missing, where it would be."""
    try:
        found = path.stat()
    except OSError:
        return path.resolve()
    return found.st_dev, found.st_ino


def _name_size(area: float) -> str:
    return "small" if area < SMALL else "medium" if area < MEDIUM else "large"
