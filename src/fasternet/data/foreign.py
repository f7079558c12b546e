"""What the readers of other layouts than COCO's share: pictures with objects, and notes on what was left out."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from fasternet.data.coco_objects import CLIPPED, MARGIN, MIN_SIDE, Box
from fasternet.data.images import ImageError, list_images, load_image

NO_AREA = "objects left out: no area within the picture"
NO_LABEL = "pictures without a label: they have no objects"
NO_PICTURE = "labels left out: there is no picture of that name"
UNREADABLE = "pictures left out: they cannot be read"

Notes = dict[str, list[str]]  # what was left out or changed, in words; the files, one entry each time
Watch = Callable[[Iterable[Any], int], Iterable[Any]]  # passes items on, and may show progress


@dataclasses.dataclass(frozen=True)
class ForeignObject:
    """An object: its class, its box (x0, y0, x1, y1 in pixels), and its mask as COCO writes it, or None."""

    class_name: str
    box: Box
    segmentation: list[list[float]] | dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class ForeignPicture:
    """A picture: its file, its path below the folder of its split, its sides in pixels, its objects."""

    path: Path
    name: str
    width: int
    height: int
    objects: tuple[ForeignObject, ...]


def find_pictures(folder: Path) -> dict[str, Path]:
    """Return the pictures in and below a folder by their path without the suffix, sorted.

    Raises:
        FileNotFoundError: There is no such folder, or no picture in it.
        ValueError: Two differ in the suffix only: their label would be the same.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of pictures at {folder}")
    found: dict[str, Path] = {}
    for path in list_images([folder]):
        first = found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
        if first is not path:
            raise ValueError(f"pictures {first} and {path.name} would share a label: their names must differ")
    return found


def find_labels(folder: Path, suffix: str) -> dict[str, Path]:
    """Return the files with a suffix in and below a folder by their path without it."""
    paths = sorted(path for path in folder.rglob(f"*{suffix}") if not path.name.startswith("."))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})") from None


def read_sizes(path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return width and height of a picture as it stands upright, and as it is stored; pixels are not decoded.

    Raises:
        ImageError: It cannot be read.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in range(5, 9)
            return (image.size[::-1] if turned else image.size), image.size
    except Exception:  # whatever decoders fail with
        size = load_image(path).size  # its sentence; or the header alone is odd
        return size, size


def note_unreadable(notes: Notes, error: ImageError) -> None:
    """Note a picture that cannot be read."""
    notes.setdefault(UNREADABLE, []).append(str(error).removeprefix("cannot read "))


def clip_box(box: Box, width: int, height: int, notes: Notes, owner: str) -> Box | None:
    """Return what of a box is within its picture, None where that has no area; either is noted."""
    x0, y0, x1, y1 = box
    clipped = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    if clipped[2] - clipped[0] < MIN_SIDE or clipped[3] - clipped[1] < MIN_SIDE:
        notes.setdefault(NO_AREA, []).append(owner)
        return None
    if max(-x0, -y0, x1 - width, y1 - height) > MARGIN:
        notes.setdefault(CLIPPED, []).append(owner)
    return clipped
