"""One object of a COCO annotation file: its box and its mask, checked as they are read.

What makes a file untrustworthy is a ValueError; an object that is merely useless is left out and counted.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

Box = tuple[float, float, float, float]

# What is counted, in the words that a user reads.
NEGATIVE = "objects left out: box of negative width or height"
EMPTY_BOX = "objects left out: box of zero area"
OUTSIDE = "objects left out: box wholly outside the picture"
EMPTY_MASK = "objects left out: mask of zero area"
NO_POLYGON = "objects left out: polygons with fewer than three points alone"
BOX_FOR_CROWD = "crowds without a mask: their box stands for it"
SHORT_POLYGON = "polygons left out: fewer than three points"
CLIPPED = "boxes clipped: they cross the picture's border"

MIN_SIDE = 0.1  # pixels: a thinner box has no area in float32 once it is moved about in a large picture
MARGIN = 0.5  # pixels: what a box may cross the border by before it is said; tools round
FAR = 10  # times a picture's longer side: drawing a polygon takes memory in proportion to its sides


@dataclasses.dataclass(frozen=True)
class Instance:
    """An object in a picture.

    Attributes:
        id: Of the annotation.
        label: Index into the class names.
        box: x0, y0, x1, y1 in pixels, within the picture.
        segmentation: Polygons (x, y, x, y ...), or a run-length encoding in either of COCO's forms, or None.
        crowd: The region holds many objects, which are not told apart.
        area: In pixels, as annotated; else that of the mask or the box.
    """

    id: int
    label: int
    box: Box
    segmentation: list[list[float]] | dict[str, Any] | None
    crowd: bool
    area: float


def decode_mask(segmentation: list[list[float]] | Mapping[str, Any], height: int, width: int) -> Tensor:
    """Draw a mask.

    Args:
        segmentation: Polygons, or ``{"size": [h, w], "counts": ...}`` with counts as a list or as a string.
        height: Of the picture.
        width: Of the picture.

    Returns:
        (H, W), uint8, 1 where the object is.

    Raises:
        ValueError: The run-length encoding is damaged, or of another size.
        ModuleNotFoundError: faster-coco-eval is not installed.
    """
    drawing = import_masks()
    if isinstance(segmentation, Mapping):
        _check_runs(segmentation, height, width)
        encoded = dict(segmentation)
        if isinstance(encoded["counts"], list):
            encoded = drawing.frPyObjects(encoded, height, width)
    else:
        encoded = drawing.merge(drawing.frPyObjects(segmentation, height, width))
    try:
        return torch.from_numpy(np.ascontiguousarray(drawing.decode(encoded)))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"a damaged run-length encoding: {str(error).rstrip('.')}") from None


def import_masks() -> Any:
    """Return the functions of faster-coco-eval on masks.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        from faster_coco_eval.core import mask
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "COCO's masks and scores need faster-coco-eval: pip install 'fasternet[detection]'"
        ) from None
    return mask


def parse_instance(
    entry: Mapping[str, Any],
    labels: Mapping[int, int],
    sizes: Mapping[int, tuple[int, int]],
    counts: Counter[str],
    *,
    masks: bool,
) -> tuple[int, Instance] | None:
    """Read an entry of a file's annotations.

    Args:
        entry: As the file has it.
        labels: Index of each category id.
        sizes: Height and width of each picture id.
        counts: What is left out or changed is added here.
        masks: Read the segmentation.

    Returns:
        The picture's id and the object; None where it is left out.

    Raises:
        ValueError: The entry cannot be trusted; the sentence starts with its id.
    """
    name = f"annotation {take_integer(entry, 'id', 'an annotation')}"
    image_id = take_integer(entry, "image_id", name)
    category_id = take_integer(entry, "category_id", name)
    if image_id not in sizes:
        raise ValueError(f"{name} is of picture {image_id}, which is not among the images")
    if category_id not in labels:
        raise ValueError(f"{name} is of category {category_id}, which is not among the categories")
    if (crowd := entry.get("iscrowd", 0)) not in (0, 1):
        raise ValueError(f"{name} has iscrowd {reprlib.repr(crowd)}; it must be 0 or 1")
    height, width = sizes[image_id]
    try:
        box = _parse_box(entry, height, width, counts)
        segmentation = _parse_segmentation(entry.get("segmentation"), height, width, counts) if masks else None
        area = _parse_area(entry.get("area"))
        mask_area = None if segmentation is None else _measure(segmentation, height, width)
    except ValueError as error:
        raise ValueError(f"{name} has {error}") from None
    if box is None:
        return None
    if mask_area == 0:
        counts[NO_POLYGON if segmentation == [] else EMPTY_MASK] += 1
        return None
    if area is None:
        area = mask_area or (box[2] - box[0]) * (box[3] - box[1])
    return image_id, Instance(int(entry["id"]), labels[category_id], box, segmentation, bool(crowd), area)


def take_integer(entry: Any, key: str, owner: str) -> int:
    """Return a whole number of an entry.

    Raises:
        ValueError: The entry is no object, or has no such number; the sentence starts with the owner.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"{owner} is {reprlib.repr(entry)}; it must be an object with an id")
    if key not in entry:
        raise ValueError(f"{owner} has no {key}")
    value = entry[key]
    if not (isinstance(value, float) and value.is_integer()) and type(value) is not int:
        raise ValueError(f"{owner} has {key} {reprlib.repr(value)}; it must be a whole number")
    return int(value)


def _parse_box(entry: Mapping[str, Any], height: int, width: int, counts: Counter[str]) -> Box | None:
    if "bbox" not in entry:
        raise ValueError("no bbox")
    values = entry["bbox"]
    if not _are_numbers(values) or len(values) != 4:
        raise ValueError(f"bbox {reprlib.repr(values)}; it must be four finite numbers: x, y, width, height")
    x, y, w, h = map(float, values)
    clipped = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if w < 0 or h < 0:
        counts[NEGATIVE] += 1
    elif w < MIN_SIDE or h < MIN_SIDE:
        counts[EMPTY_BOX] += 1
    elif clipped[2] - clipped[0] < MIN_SIDE or clipped[3] - clipped[1] < MIN_SIDE:
        counts[OUTSIDE] += 1
    else:
        if max(-x, -y, x + w - width, y + h - height) > MARGIN:
            counts[CLIPPED] += 1
        return clipped
    return None


def _parse_segmentation(
    value: Any, height: int, width: int, counts: Counter[str]
) -> list[list[float]] | dict[str, Any] | None:
    """Return a mask that can be drawn, None where there is none; an empty list: its polygons were all left out."""
    if not value or value == [[]]:
        return None
    if isinstance(value, dict):
        _check_runs(value, height, width)
        return {"size": [height, width], "counts": value["counts"]}
    if not isinstance(value, list):
        raise ValueError(f"segmentation {reprlib.repr(value)}; it must be polygons or a run-length encoding")
    polygons: list[list[float]] = []
    for polygon in value:
        if not _are_numbers(polygon):
            raise ValueError(f"a polygon {reprlib.repr(polygon)}; it must be finite numbers: x, y, x, y ...")
        if len(polygon) % 2:
            raise ValueError(f"a polygon of {len(polygon)} numbers; they must be pairs: x, y, x, y ...")
        if polygon and max(max(polygon), -min(polygon)) > FAR * max(height, width):
            worst = max(polygon, key=abs)
            raise ValueError(f"a polygon that reaches {worst:g}, far outside its picture of {width}x{height} pixels")
        if len(polygon) < 6:
            counts[SHORT_POLYGON] += 1
        else:
            polygons.append(polygon)
    return polygons


def _check_runs(value: Mapping[str, Any], height: int, width: int) -> None:
    """Refuse a run-length encoding of another size, or whose list of counts is damaged."""
    if value.get("size") != [height, width]:
        raise ValueError(
            f"a run-length encoding of size {reprlib.repr(value.get('size'))}; it must be that of its picture, "
            f"[{height}, {width}]"
        )
    runs = value.get("counts")
    if isinstance(runs, str):
        return  # decoding checks it
    whole = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
    if not whole or sum(cast(list[int], runs)) != height * width:
        raise ValueError(
            f"a damaged run-length encoding: its counts must be whole numbers that add up to {height * width} pixels"
        )


def _parse_area(value: Any) -> float | None:
    if value is not None and (not _are_numbers([value]) or value < 0):
        raise ValueError(f"area {reprlib.repr(value)}; it must be a finite number of at least 0")
    return None if value is None else float(value)


def _are_numbers(values: Any) -> bool:
    """Tell whether it is a list of finite numbers, at the speed of a sum: a file may hold a hundred million."""
    try:
        return isinstance(values, list) and math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _measure(segmentation: Sequence[Sequence[float]] | Mapping[str, Any], height: int, width: int) -> float:
    """Return the area of a mask: of polygons that of their outlines, of runs their pixels."""
    if isinstance(segmentation, Mapping):
        runs = segmentation["counts"]
        return float(sum(runs[1::2]) if isinstance(runs, list) else decode_mask(segmentation, height, width).sum())
    return sum(map(measure_polygon, segmentation))


def measure_polygon(polygon: Sequence[float]) -> float:
    """Return the area within an outline x, y, x, y ... in pixels."""
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise([*points, points[0]]))) / 2
