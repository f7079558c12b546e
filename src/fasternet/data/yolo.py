"""Reads YOLO's layout: images/{train,val}, labels/{train,val}/*.txt with boxes or polygons, names in data.yaml."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fasternet.data.coco_objects import measure_polygon
from fasternet.data.datasets import VALIDATION_FOLDERS
from fasternet.data.foreign import (
    NO_AREA,
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
from fasternet.data.images import ImageError, holds_image

TEST_SPLIT = "folders left out: neither for training nor for validation"
SAME_SPLIT = "validation left out: its folder is that of the training pictures"

NAMES_FILE = "classes.txt"
ROUNDING = 1e-3  # what a value may be beyond 0 to 1 by
# Where pictures are if data.yaml does not say it.
USUAL = {
    "train": ("images/train", "train/images", "images/train2017"),
    "val": (
        *(part for name in VALIDATION_FOLDERS[:-1] for part in (f"images/{name}", f"{name}/images")),
        "images/val2017",
    ),
    "test": ("images/test", "test/images", "images/test2017"),
}


def read_yolo(root: Path, notes: Notes, watch: Watch) -> tuple[tuple[str, ...], dict[str, list[ForeignPicture]]]:
    """Read the class names, and the pictures of each split, ``train`` and, where there is one, ``val``.

    Args:
        root: The folder that holds images and labels.
        notes: What is left out or changed is added here.
        watch: Passes the pictures of a split on.

    Raises:
        ValueError: A file cannot be trusted; the sentence names it and the line.
        FileNotFoundError: There are no pictures, labels or class names.
    """
    settings = _read_settings(root)
    names = _read_names(root, settings)
    splits = {}
    for split, folder in _find_folders(root, settings, notes).items():
        label_folder = find_label_folder(root, folder)
        if not label_folder.is_dir():
            raise FileNotFoundError(f"no folder of labels at {label_folder}, for the pictures of {folder}")
        pictures, labels = find_pictures(folder), find_labels(label_folder, ".txt")
        if orphans := [f"{key}.txt" for key in labels if key not in pictures and f"{key}.txt" != NAMES_FILE]:
            notes.setdefault(NO_PICTURE, []).extend(orphans)
        found = (_read_picture(key, path, labels.get(key), names, notes) for key, path in pictures.items())
        splits[split] = [picture for picture in watch(found, len(pictures)) if picture is not None]
    return names, splits


def find_label_folder(root: Path, folder: Path) -> Path:
    """Return the folder of labels of a folder of pictures: the last ``images`` of its path is ``labels``."""
    parts = list(folder.relative_to(root).parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return root.joinpath(*parts)


def _read_settings(root: Path) -> dict[str, Any]:
    """Return what data.yaml, or else the only YAML file, says."""
    files = sorted([*root.glob("*.yaml"), *root.glob("*.yml")])
    chosen = [path for path in files if path.stem == "data"] or files
    if not chosen:
        return {}
    if len(chosen) > 1:
        raise ValueError(
            f"folder {root} holds several YAML files and no data.yaml: {', '.join(p.name for p in chosen)}"
        )
    try:
        settings = yaml.safe_load(read_text(chosen[0]))
    except yaml.YAMLError as error:
        raise ValueError(f"{chosen[0]} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{chosen[0]} must hold names: a list of class names")
    if "kpt_shape" in settings:
        raise ValueError(f"{chosen[0]} is of poses, as its kpt_shape says; boxes or polygons can be imported")
    return settings | {"file": chosen[0]}


def _read_names(root: Path, settings: dict[str, Any]) -> tuple[str, ...]:
    """Return the names by class number."""
    if "names" in settings:
        source, names = settings["file"], settings["names"]
        if isinstance(names, dict):
            if sorted(names, key=str) != sorted(range(len(names)), key=str):
                raise ValueError(f"{source}: names must be numbered from 0 to {len(names) - 1}, got {list(names)}")
            names = [names[number] for number in range(len(names))]
        if not isinstance(names, list) or not all(isinstance(name, str | int | float) for name in names):
            raise ValueError(f"{source}: names must be a list of texts, or such texts numbered from 0")
        names = [str(name).strip() for name in names]
    else:
        files = [root / NAMES_FILE, root / "labels" / NAMES_FILE, root / "labels" / "train" / NAMES_FILE]
        if (source := next((path for path in files if path.is_file()), None)) is None:
            raise FileNotFoundError(f"no class names in {root}: looked for names in data.yaml, and for {NAMES_FILE}")
        names = [line.strip() for line in read_text(source).rstrip().split("\n")]
    if not names or not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{source}: class names must differ, and none be empty, got {', '.join(names) or 'none'}")
    return tuple(names)


def _find_folders(root: Path, settings: dict[str, Any], notes: Notes) -> dict[str, Path]:
    """Return the folders of pictures: those that data.yaml names, else the usual ones; a test folder is noted."""
    folders = {split: _name_folder(root, settings, split) for split in ("train", "val") if settings.get(split)}
    for split, parts in USUAL.items():
        if split not in folders and (folder := next((root / part for part in parts if (root / part).is_dir()), None)):
            folders[split] = folder
    if (test := folders.pop("test", None)) and test not in folders.values():
        notes[TEST_SPLIT] = [str(test.relative_to(root))]
    if not folders and (root / "images").is_dir() and holds_image(root / "images"):
        return {"train": root / "images"}
    if "train" not in folders:
        looked = ", ".join([*USUAL["train"], "images"])
        raise FileNotFoundError(f"no folder of training pictures in {root}: looked for {looked}")
    if folders.get("val") == folders["train"]:
        notes[SAME_SPLIT] = [str(folders.pop("val").relative_to(root))]
    return folders


def _name_folder(root: Path, settings: dict[str, Any], split: str) -> Path:
    """Return the folder that data.yaml names; Roboflow starts such paths with ``../``, and means its own folder."""
    value, top = settings[split], root.absolute()
    if isinstance(value, str):
        folder = top / value.removeprefix("../")  # an absolute path stays one
        if ".." not in Path(value.removeprefix("../")).parts and folder.is_relative_to(top) and folder.is_dir():
            return root / folder.relative_to(top)
    told = f"{settings['file']}: {split} is {reprlib.repr(value)}, which is no folder in {root}"
    raise ValueError(f"{told}: name one, or delete the line for the usual ones")


def _read_picture(
    key: str, path: Path, label: Path | None, names: Sequence[str], notes: Notes
) -> ForeignPicture | None:
    try:
        (width, height), _ = read_sizes(path)
    except ImageError as error:
        note_unreadable(notes, error)
        return None
    objects = []
    if label is None:
        notes.setdefault(NO_LABEL, []).append(path.name)
    else:
        for number, line in enumerate(read_text(label).splitlines(), 1):
            if line.strip():
                owner = f"{label}, line {number}"
                found = _read_object(line.split(), names, (width, height), owner, notes)
                objects += [] if found is None else [found]
    return ForeignPicture(path, f"{key}{path.suffix}", width, height, tuple(objects))


def _read_object(
    words: Sequence[str], names: Sequence[str], size: tuple[int, int], owner: str, notes: Notes
) -> ForeignObject | None:
    """Read a line: class, centre, width and height; or class and the points of a polygon."""
    try:
        label, *values = map(float, words)
    except ValueError:
        raise ValueError(f"{owner}: {' '.join(words)[:60]!r} is no row of numbers") from None
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise ValueError(f"{owner}: {len(words)} numbers; a box has 5, a polygon 1 and 2 for each of 3 points or more")
    if not math.isfinite(label) or label not in range(len(names)):
        raise ValueError(f"{owner}: class {words[0]} is not one of 0 to {len(names) - 1}")
    for word, value in zip(words[1:], values, strict=True):
        if not -ROUNDING <= value <= 1 + ROUNDING:
            raise ValueError(f"{owner}: {word} is outside 0 to 1; coordinates are shares of the picture's sides")
    name, (width, height) = names[int(label)], size
    if len(values) == 4:
        x, y, w, h = (value * side for value, side in zip(values, (width, height) * 2, strict=True))
        box = clip_box((x - w / 2, y - h / 2, x + w / 2, y + h / 2), width, height, notes, owner)
        return None if box is None else ForeignObject(name, box)
    xs, ys = (
        [min(max(value, 0), 1) * side for value in part]
        for part, side in ((values[::2], width), (values[1::2], height))
    )
    box = clip_box((min(xs), min(ys), max(xs), max(ys)), width, height, notes, owner)
    if box is None:
        return None
    polygon = [value for point in zip(xs, ys, strict=True) for value in point]
    if measure_polygon(polygon) == 0:
        notes.setdefault(NO_AREA, []).append(owner)
        return None
    return ForeignObject(name, box, [polygon])
