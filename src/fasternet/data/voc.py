"""Reads Pascal VOC's layout: JPEGImages, Annotations/*.xml, ImageSets/Main/*.txt, SegmentationObject/*.png."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fasternet.data.coco_objects import Box
from fasternet.data.foreign import (
    NO_LABEL,
    NO_PICTURE,
    ForeignObject,
    ForeignPicture,
    Notes,
    Watch,
    clip_box,
    find_labels,
    find_pictures,
    note_unreadable,
    read_sizes,
    read_text,
)
from fasternet.data.images import ImageError

UNLISTED = "pictures left out: no list of training or validation pictures names them"
DIFFICULT = "objects marked as difficult: kept as any other"
NO_OBJECT = "instance masks left out: they fit no object's box"
CLASSES_ALONE = "class masks left out: without SegmentationObject they do not tell objects apart"

VOID = 255  # a pixel of no object, in masks
MIN_OVERLAP = 0.25  # of a mask's box with an object's; masks lack their border, which is void

Mask = NDArray[np.uint8]


class _Builder(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a DOCTYPE, which may expand without end; annotations need none")


def read_voc(root: Path, notes: Notes, watch: Watch) -> dict[str, list[ForeignPicture]]:
    """Read the pictures of each split, ``train`` and, where there is a list for it, ``val``.

    Args:
        root: The folder that holds JPEGImages and Annotations.
        notes: What is left out or changed is added here.
        watch: Passes the pictures of a split on.

    Raises:
        ValueError: A list, an annotation or a mask cannot be trusted; the sentence names file and line or object.
        FileNotFoundError: There are no pictures, or a list names one that is not there.
    """
    pictures = find_pictures(root / "JPEGImages")
    labels = find_labels(root / "Annotations", ".xml")
    masks = find_labels(root / "SegmentationObject", ".png")
    if orphans := [path.name for key, path in labels.items() if key not in pictures]:
        notes.setdefault(NO_PICTURE, []).extend(orphans)
    if not masks and (unused := find_labels(root / "SegmentationClass", ".png")):
        notes.setdefault(CLASSES_ALONE, []).extend(path.name for path in unused.values())
    splits = {}
    lists = _read_lists(root, pictures)
    listed = {key for keys in lists.values() for key in keys}
    if unlisted := [path.name for key, path in pictures.items() if key not in listed]:
        notes.setdefault(UNLISTED, []).extend(unlisted)
    for split, keys in lists.items():
        found = (_read_picture(key, pictures[key], labels.get(key), masks.get(key), notes) for key in keys)
        splits[split] = [picture for picture in watch(found, len(keys)) if picture is not None]
    return splits


def _read_lists(root: Path, pictures: Mapping[str, Path]) -> dict[str, list[str]]:
    """Return the pictures that are named for training and validation; without lists, all for training."""
    lists = root / "ImageSets" / "Main"
    names = {"train": "train.txt", "val": "val.txt"}
    if not (lists / "train.txt").is_file():
        names = {"train": "trainval.txt"}
    if not (lists / names["train"]).is_file():
        return {"train": list(pictures)}
    files = {split: lists / name for split, name in names.items()}
    return {split: _read_list(path, pictures) for split, path in files.items() if path.is_file()}


def _read_list(path: Path, pictures: Mapping[str, Path]) -> list[str]:
    keys: dict[str, None] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not (key := line.strip()):
            continue
        if key not in pictures:
            key = key.split()[0]  # lists of a class have a second column
        if key not in pictures:
            raise FileNotFoundError(f"{path}, line {number}: there is no picture {key} in JPEGImages")
        keys[key] = None
    return list(keys)


def _read_picture(
    key: str, path: Path, label: Path | None, mask_file: Path | None, notes: Notes
) -> ForeignPicture | None:
    try:
        upright, stored = read_sizes(path)
    except ImageError as error:
        note_unreadable(notes, error)
        return None
    objects: list[ForeignObject | None] = []
    size = upright
    if label is None:
        notes.setdefault(NO_LABEL, []).append(path.name)
    else:
        root = _read_xml(label)
        # Annotations count the pixels as stored or upright, as the tool had it.
        size = _read_size(root, label) or upright
        if size not in (upright, stored):
            raise ValueError(f"{label}: its size is {size[0]}x{size[1]}, and {path.name} has {stored[0]}x{stored[1]}")
        nodes = enumerate(root.findall("object"), 1)
        objects = [_read_object(node, f"{label}: object {number}", size, notes) for number, node in nodes]
    if mask_file is not None:
        objects = _add_masks(objects, _read_masks(mask_file, size), mask_file, notes)
    name = f"{key}{path.suffix}"
    return ForeignPicture(path, name, *size, tuple(found for found in objects if found is not None))


def _read_xml(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_Builder()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _read_size(root: ElementTree.Element, path: Path) -> tuple[int, int] | None:
    """Return width and height as annotated; None where they are left out or 0."""
    texts = [root.findtext(f"size/{side}", "0") for side in ("width", "height")]
    try:
        width, height = (int(float(text)) for text in texts)
    except (ValueError, OverflowError):
        raise ValueError(f"{path}: its size is {' x '.join(texts)}; both must be whole numbers") from None
    return (width, height) if width and height else None


def _read_object(node: ElementTree.Element, owner: str, size: tuple[int, int], notes: Notes) -> ForeignObject | None:
    if not (name := (node.findtext("name") or "").strip()):
        raise ValueError(f"{owner} has no name")
    corners = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        text = node.findtext(f"bndbox/{tag}")
        try:
            corners.append(float(text or ""))
        except ValueError:
            corners.append(math.nan)
        if not math.isfinite(corners[-1]):
            raise ValueError(f"{owner} ({name}) has {tag} {text!r}; it must be a number")
    if (node.findtext("difficult") or "0").strip() == "1":
        notes.setdefault(DIFFICULT, []).append(owner)
    # VOC counts pixels from 1, and both ends belong to the box.
    box = clip_box((corners[0] - 1, corners[1] - 1, corners[2], corners[3]), *size, notes, owner)
    return None if box is None else ForeignObject(name, box)


def _read_masks(path: Path, size: tuple[int, int]) -> dict[int, Mask]:
    """Return the mask of each instance, (H, W), by its number."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(
                    f"its mode is {image.mode}; instances are numbers in a palette (P) or grey (L) picture"
                )
            numbers = np.asarray(image)
    except Exception as error:  # whatever decoders fail with
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"instance mask {path} cannot be read: {reason}") from None
    if numbers.shape != size[::-1]:
        raise ValueError(
            f"instance mask {path} has {numbers.shape[1]}x{numbers.shape[0]} pixels, not {size[0]}x{size[1]}"
        )
    return {int(n): (numbers == n).astype(np.uint8) for n in np.unique(numbers) if n not in (0, VOID)}


def _add_masks(
    objects: Sequence[ForeignObject | None], masks: Mapping[int, Mask], path: Path, notes: Notes
) -> list[ForeignObject | None]:
    """Give each object the mask whose box overlaps its own most; of such that do alike, the one with its number."""
    pairs = []
    for number, mask in masks.items():
        for place, found in enumerate(objects):
            if found is not None and (overlap := _overlap(_find_box(mask), found.box)) >= MIN_OVERLAP:
                pairs.append((-round(overlap, 1), number != place + 1, place, number))
    taken: dict[int, int] = {}
    for *_, place, number in sorted(pairs):
        if place not in taken and number not in taken.values():
            taken[place] = number
    if len(taken) < len(masks):
        notes.setdefault(NO_OBJECT, []).extend([path.name] * (len(masks) - len(taken)))
    return [
        ForeignObject(found.class_name, found.box, encode_mask(masks[taken[place]]))
        if found is not None and place in taken
        else found
        for place, found in enumerate(objects)
    ]


def encode_mask(mask: Mask) -> dict[str, Any]:
    """Return a mask (H, W) as COCO's run lengths, which go down the columns and start with the background."""
    pixels = np.pad(mask.T.reshape(-1), (1, 0))
    ends = np.flatnonzero(pixels[1:] != pixels[:-1])
    return {"size": list(mask.shape), "counts": np.diff([0, *ends.tolist(), mask.size]).tolist()}


def _find_box(mask: Mask) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _overlap(a: Box, b: Box) -> float:
    """Return the intersection of two boxes over their union."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)) - shared)
