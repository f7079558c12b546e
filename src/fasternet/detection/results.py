"""Detections as COCO's results file has them: plain data, masks as run lengths, whatever the size of the picture.

Shapes: K detections of a picture, (H, W) its size in pixels, (m, m) a mask as the network makes it.
"""

from __future__ import annotations

import itertools
import json
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fasternet.data.coco import CocoData
from fasternet.data.coco_objects import import_masks
from fasternet.detection.detector import MASK_SIZE
from fasternet.detection.layers import paste_mask
from fasternet.models.checkpoint import write_atomically

STRIP_PIXELS = 2**22  # of a mask that are in memory at a time
MASK_THRESHOLD = 0.5


def to_results(
    prediction: Mapping[str, Tensor],
    image_id: int,
    size: tuple[int, int],
    category_ids: Sequence[int],
    *,
    pasted: bool | None = None,
) -> list[dict[str, Any]]:
    """Write the detections in a picture as COCO does.

    Args:
        prediction: ``boxes`` (K, 4), ``labels`` (K,) from 1 on, ``scores`` (K,) and perhaps ``masks``, probabilities:
            (K, 1, m, m) as the network makes them, or (K, 1, H, W) in the picture.
        image_id: Number of the picture.
        size: Its height and width.
        category_ids: Numbers of the classes, from label 1 on.
        pasted: Masks are in the picture; None: where they have its size, unless that is the network's, 28 x 28.

    Returns:
        Plain data: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height), ``score`` and perhaps
        ``segmentation`` (compressed run lengths).

    Raises:
        ValueError: There are other classes, or not all is finite.
        ModuleNotFoundError: There are masks, and faster-coco-eval is not installed.
    """
    boxes, scores, labels = (prediction[name].detach().cpu() for name in ("boxes", "scores", "labels"))
    masks = prediction["masks"].detach().cpu() if "masks" in prediction else None
    if not all(part.isfinite().all() for part in (boxes, scores, masks) if part is not None):
        raise ValueError("the detections are not finite: the weights of the network are damaged or training diverged")
    if len(unknown := labels[(labels < 1) | (labels > len(category_ids))]):
        raise ValueError(f"the detector has a class {int(unknown[0])}, the data have {len(category_ids)}")
    if pasted is None and masks is not None:
        pasted = masks.shape[-2:] == size != (2 * MASK_SIZE, 2 * MASK_SIZE)
    results: list[dict[str, Any]] = []
    for i, ((x0, y0, x1, y1), score, label) in enumerate(
        zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
    ):
        result = {
            "image_id": image_id,
            "category_id": category_ids[label - 1],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        if masks is not None:
            mask = masks[i, 0].float()
            strips = _cut(mask) if pasted else _paste(mask, boxes[i].float(), *size)
            result["segmentation"] = _encode(strips, *size)
        results.append(result)
    return results


def _cut(mask: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    step = max(1, STRIP_PIXELS // mask.shape[0])
    for left in range(0, mask.shape[1], step):
        yield mask[:, left : left + step] >= MASK_THRESHOLD, 0, left


def _paste(mask: Tensor, box: Tensor, height: int, width: int) -> Iterator[tuple[Tensor, int, int]]:
    """Lay a mask (m, m) into a picture, some columns at a time: booleans (h, w), first row and column."""
    step = max(1, STRIP_PIXELS // height)
    for start in range(0, width, step):
        shifted = box - box.new_tensor([start, 0, start, 0])
        part, top, left = paste_mask(mask, shifted, height, min(step, width - start))
        yield part >= MASK_THRESHOLD, top, start + left


def _encode(parts: Iterable[tuple[Tensor, int, int]], height: int, width: int) -> dict[str, Any]:
    """Return the run lengths of a mask of which parts (h, w), their first rows and columns are given.

    COCO counts pixels down the columns. Each column of a part begins and ends runs of its own; where a run goes on in
    the next column (from the last row to the first), an end and a beginning coincide, and both are left out.
    """
    borders = []
    for part, top, left in parts:
        padded = F.pad(part, (0, 0, 1, 1))  # (h + 2, w)
        rows, columns = (padded[1:] != padded[:-1]).nonzero(as_tuple=True)
        borders.append((left + columns) * height + top + rows)
    places, repeats = torch.unique(torch.cat(borders), return_counts=True)
    ends = [0, *places[repeats == 1].tolist(), height * width]
    counts = [end - start for start, end in itertools.pairwise(ends)]
    if counts[-1] == 0:
        del counts[-1]
    return _compress(counts, height, width)


def _compress(counts: list[int], height: int, width: int) -> dict[str, Any]:
    rle = import_masks().frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode()}


def save_results(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write detections as COCO's results file, a JSON list; an interrupted write leaves the old file.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(list(results), allow_nan=False) + "\n"))


def load_results(path: Path, data: CocoData) -> list[dict[str, Any]]:
    """Read a results file of any program.

    Args:
        path: A JSON list of ``image_id``, ``category_id``, ``score``, and ``bbox`` (x, y, width, height) or
            ``segmentation`` (run lengths) or both.
        data: The pictures and classes that it is about.

    Returns:
        What ``to_results`` returns, all pictures in one list; a box that is missing is that around the mask.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or about other pictures or classes.
        ModuleNotFoundError: There are masks, and faster-coco-eval is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no results file {path}")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, list):
        raise ValueError(f"{path} must be a list of detections, as COCO's results are, got {type(document).__name__}")
    sizes = {image.id: (image.height, image.width) for image in data.images}
    results = []
    for number, found in enumerate(document):
        try:
            results.append(_read_result(found, sizes, data.category_ids))
        except ValueError as error:
            raise ValueError(f"{path}, detection {number}: {error}") from None
    return results


def _read_result(found: Any, sizes: Mapping[int, tuple[int, int]], category_ids: Sequence[int]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"must be an object with image_id, category_id, score and bbox, got {reprlib.repr(found)}")
    missing = [name for name in ("image_id", "category_id", "score") if name not in found]
    if missing or not {"bbox", "segmentation"} & found.keys():
        raise ValueError(f"{', '.join(missing) or 'bbox or segmentation'} is missing")
    image_id, category_id, score = found["image_id"], found["category_id"], found["score"]
    if not isinstance(image_id, int) or image_id not in sizes:
        raise ValueError(f"image_id {reprlib.repr(image_id)} is none of the {len(sizes)} pictures")
    if not isinstance(category_id, int) or category_id not in category_ids:
        raise ValueError(f"category_id {reprlib.repr(category_id)} is none of {', '.join(map(str, category_ids))}")
    if not _is_finite(score):
        raise ValueError(f"score must be a finite number, got {reprlib.repr(score)}")
    result = {"image_id": image_id, "category_id": category_id, "bbox": found.get("bbox"), "score": score}
    if "segmentation" in found:
        result["segmentation"] = _read_mask(found["segmentation"], sizes[image_id])
    if "bbox" not in found:
        result["bbox"] = import_masks().toBbox(result["segmentation"]).tolist()
    box = result["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)) or min(box[2:]) < 0:
        raise ValueError(f"bbox must be x, y, width and height, finite and no size below 0, got {reprlib.repr(box)}")
    return result


def _read_mask(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Return compressed run lengths of (compressed or plain) ones, when they fill a picture of this size."""
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("counts"), str | list):
        raise ValueError("segmentation must be run lengths, an object with size and counts")
    if segmentation.get("size") != [*size]:
        raise ValueError(f"segmentation is of size {reprlib.repr(segmentation.get('size'))}, its picture of {[*size]}")
    counts = segmentation["counts"]
    if isinstance(counts, str):
        try:
            counts = import_masks()._mask.toUncompressedRLE([{"size": [*size], "counts": counts}])[0]["counts"]
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"segmentation cannot be decoded: {error}") from None
    if not all(isinstance(count, int) and count >= 0 for count in counts) or sum(counts) != math.prod(size):
        raise ValueError(f"segmentation must count all {math.prod(size)} pixels of its picture once")
    return _compress(counts, *size)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
