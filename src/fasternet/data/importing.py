"""Turns data sets with objects in other layouts, Pascal VOC's and YOLO's, into COCO's: annotation files and pictures.

All is read and checked before anything is written; the output folder appears when it is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from fasternet.data import voc, yolo
from fasternet.data.coco_objects import measure_polygon
from fasternet.data.foreign import ForeignObject, ForeignPicture, Notes, Watch
from fasternet.models.checkpoint import write_atomically

Format = Literal["voc", "yolo"]

NO_MASK = "objects without a mask: training with masks leaves their pictures out, as --masks does here"
MASKLESS = "pictures left out: an object has no mask"
TWICE = "pictures in both splits: the evaluation is not fair"

DECIMALS = 3  # of coordinates, in pixels


@dataclasses.dataclass(frozen=True)
class Imported:
    """What was imported.

    Attributes:
        output: The folder.
        format: What it was.
        class_names: In the order of the category ids, which start at 1.
        splits: Of each split ``pictures``, ``objects`` and ``masks``: how many.
        notes: What was left out or changed, in words, and the files or lines.
    """

    output: Path
    format: Format
    class_names: tuple[str, ...]
    splits: Mapping[str, Mapping[str, int]]
    notes: Mapping[str, Sequence[str]]


def import_data(
    source: Path | str,
    output: Path | str,
    *,
    format: Format | None = None,
    copy: bool = False,
    masks: bool = False,
    watch: Watch = lambda pictures, total: pictures,
) -> Imported:
    """Write a data set in COCO's layout: ``annotations/instances_train.json``, pictures in ``train``; so for ``val``.

    Args:
        source: The folder; it is left as it is.
        output: A folder that does not exist yet, or is empty.
        format: ``"voc"`` or ``"yolo"``; None: what the folders in it look like.
        copy: Copy the pictures; else they are linked: hard links, or where the disk is another one symbolic links.
        masks: Leave pictures out that have an object without a mask.
        watch: Called with the pictures of a split as they are read and their number; returns them.

    Returns:
        What was written, and what was left out.

    Raises:
        FileExistsError: ``output`` holds something.
        FileNotFoundError: The source, its pictures, labels or class names are missing.
        ValueError: The format is not clear, or a file cannot be trusted: the sentence names it.
        OSError: The disk is full or not writable.
    """
    source, output = Path(source), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output {output} holds something already: name a new folder")
    format = detect_format(source) if format is None else format
    notes: Notes = {}
    if format == "voc":
        splits = voc.read_voc(source, notes, watch)
        names = tuple(sorted({found.class_name for found in _list_objects(splits)}))
    elif format == "yolo":
        names, splits = yolo.read_yolo(source, notes, watch)
    else:
        raise ValueError(f"format {format!r} is not one of {', '.join(get_args(Format))}")
    splits = _settle(splits, notes, masks=masks)
    if not splits.get("train") or not any(True for _ in _list_objects(splits)):
        raise ValueError(f"{source} has no {'object' if splits.get('train') else 'training picture'} to import")
    _write(output, names, splits, copy=copy)
    return Imported(output, format, names, {split: _count(found) for split, found in splits.items()}, notes)


def detect_format(source: Path) -> Format:
    """Tell the format of a folder by what is in it.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It looks like neither, or like both.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no folder of data at {source}")
    found: list[Format] = []
    if (source / "JPEGImages").is_dir() and (source / "Annotations").is_dir():
        found.append("voc")
    if (source / "labels").is_dir() or (source / "train" / "labels").is_dir():
        found.append("yolo")
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{source} looks like {' and '.join(found)}: name the format")
    if (source / "annotations").is_dir() or any(source.glob("*.json")):
        raise ValueError(f"{source} seems to be in COCO's format already, which needs no import")
    raise ValueError(
        f"the format of {source} is not clear: voc has the folders JPEGImages and Annotations, yolo images and labels"
    )


def _settle(
    splits: Mapping[str, list[ForeignPicture]], notes: Notes, *, masks: bool
) -> dict[str, list[ForeignPicture]]:
    """Say which objects have no mask where others have one, or leave their pictures out; drop empty splits."""
    train = {picture.path for picture in splits["train"]}
    if shared := [picture.name for picture in splits.get("val", ()) if picture.path in train]:
        notes[TWICE] = shared
    if masks or any(found.segmentation for found in _list_objects(splits)):
        maskless = {picture.path: _count_maskless(picture) for pictures in splits.values() for picture in pictures}
        bare = [f"{path.name}" for path, count in maskless.items() for _ in range(count)]
        if masks:
            bare = [path.name for path, count in maskless.items() if count]
            splits = {split: [p for p in found if not maskless[p.path]] for split, found in splits.items()}
        if bare:
            notes[MASKLESS if masks else NO_MASK] = bare
    return {split: found for split, found in splits.items() if found}


def _count_maskless(picture: ForeignPicture) -> int:
    return sum(found.segmentation is None for found in picture.objects)


def _list_objects(splits: Mapping[str, Sequence[ForeignPicture]]) -> list[ForeignObject]:
    return [found for pictures in splits.values() for picture in pictures for found in picture.objects]


def _count(pictures: Sequence[ForeignPicture]) -> dict[str, int]:
    objects = _list_objects({"": pictures})
    masked = sum(found.segmentation is not None for found in objects)
    return {"pictures": len(pictures), "objects": len(objects), "masks": masked}


def _write(output: Path, names: Sequence[str], splits: Mapping[str, Sequence[ForeignPicture]], *, copy: bool) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    # Hidden until it is complete: a run that is killed leaves nothing that looks like a data set.
    partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        for split, pictures in splits.items():
            for picture in pictures:
                target = partial / split / picture.name
                target.parent.mkdir(parents=True, exist_ok=True)
                _place(picture.path.resolve(), target, copy=copy)
        (partial / "annotations").mkdir()
        for split, pictures in splits.items():
            _save_document(partial / "annotations" / f"instances_{split}.json", _describe(names, pictures))
        partial.chmod(0o755)
        partial.replace(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _save_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON; it appears when it is complete."""
    text = json.dumps(document, allow_nan=False)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _place(source: Path, target: Path, *, copy: bool) -> None:
    if copy:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        target.symlink_to(source)


def _describe(names: Sequence[str], pictures: Sequence[ForeignPicture]) -> dict[str, Any]:
    """Return COCO's document of a split."""
    numbers = {name: number for number, name in enumerate(names, 1)}
    annotations: list[dict[str, Any]] = []
    for image_id, picture in enumerate(pictures, 1):
        for found in picture.objects:
            entry = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": numbers[found.class_name],
                **_describe_shape(found),
                "iscrowd": 0,
            }
            annotations.append(entry)
    return {
        "info": {},
        "images": [
            {"id": number, "file_name": picture.name, "width": picture.width, "height": picture.height}
            for number, picture in enumerate(pictures, 1)
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }


def _describe_shape(found: ForeignObject) -> dict[str, Any]:
    x0, y0, x1, y1 = found.box
    box = {"bbox": [round(value, DECIMALS) for value in (x0, y0, x1 - x0, y1 - y0)]}
    if found.segmentation is None:
        return box | {"area": round((x1 - x0) * (y1 - y0), DECIMALS)}
    if isinstance(found.segmentation, dict):
        return box | {"area": sum(found.segmentation["counts"][1::2]), "segmentation": found.segmentation}
    area = sum(map(measure_polygon, found.segmentation))
    polygons = [[round(value, DECIMALS) for value in polygon] for polygon in found.segmentation]
    return box | {"area": round(area, DECIMALS), "segmentation": polygons}
