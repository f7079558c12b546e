"""Pictures with objects in COCO's format: finds annotation files, reads and splits them, writes them for evaluation."""

from __future__ import annotations

import dataclasses
import json
import random
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from fasternet.data.coco_objects import BOX_FOR_CROWD, Instance, decode_mask, parse_instance, take_integer
from fasternet.data.datasets import VALIDATION_FOLDERS
from fasternet.data.images import MAX_PIXELS

__all__ = [
    "CocoData",
    "CocoImage",
    "Instance",
    "decode_mask",
    "find_coco",
    "list_missing",
    "load_coco",
    "read_coco",
    "split_coco",
    "to_document",
]

KEYS = ("images", "annotations", "categories")
NUM_SAMPLES = 16  # pictures that are looked for in each folder where they may be


@dataclasses.dataclass(frozen=True)
class CocoImage:
    """A picture with its objects.

    Attributes:
        id: In the annotation file.
        path: Its file.
        width: In pixels, as annotated.
        height: In pixels, as annotated.
        instances: Its objects, crowds too.
    """

    id: int
    path: Path
    width: int
    height: int
    instances: tuple[Instance, ...]


@dataclasses.dataclass(frozen=True)
class CocoData:
    """What an annotation file says, less what is useless.

    Attributes:
        source: The annotation file.
        class_names: One for each category, in the order of ``category_ids``.
        category_ids: In ascending order.
        images: The pictures, in the order of the file.
        skipped: What was left out or changed, in words, and how often.
        has_masks: Each object and crowd has a segmentation; else none is to be used.
    """

    source: Path
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: tuple[CocoImage, ...]
    skipped: Mapping[str, int]
    has_masks: bool

    def __len__(self) -> int:
        return len(self.images)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the pictures' files."""
        return tuple(image.path.name for image in self.images)


def load_coco(annotations: Path, images: Path | None = None, *, masks: bool = True) -> CocoData:
    """Read an annotation file and make sure that its pictures are there; they are not opened.

    Objects that are useless (a box of zero area or wholly outside, a polygon of two points) are left out and
    counted, boxes are clipped at the border. Where some objects have masks, pictures with an object that has none are
    left out, as it would be learned as background; a crowd without a mask gets that of its box.

    Args:
        annotations: The JSON file.
        images: The folder that ``file_name`` starts from; None: it is looked for beside the file.
        masks: Read the masks; without, the boxes of all objects, ``has_masks`` False.

    Raises:
        ValueError: The file cannot be trusted: no JSON, a missing key, an unknown or repeated id, no finite number, a
            picture outside of the folder. Or each picture would be left out.
        FileNotFoundError: The file, the folder or a picture is missing.
        ModuleNotFoundError: faster-coco-eval, which compressed masks need, is not installed.
    """
    data = read_coco(annotations, images, masks=masks)
    if missing := list_missing(data):
        raise FileNotFoundError(
            f"annotation file {annotations}: {len(missing):,} of {len(data):,} pictures are missing, "
            f"the first is {missing[0]}"
        )
    return data


def read_coco(annotations: Path, images: Path | None = None, *, masks: bool = True) -> CocoData:
    """Read an annotation file as ``load_coco`` does, whether or not the pictures are there."""
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f"no folder of pictures at {images}")
    try:
        document = _read_document(annotations)
        categories = _read_categories(document["categories"])
        entries = _read_images(document["images"])
        counts: Counter[str] = Counter()
        objects = _read_annotations(document["annotations"], categories, entries, counts, masks=masks)
        has_masks = any(one.segmentation for found in objects.values() for one in found if not one.crowd)
        if has_masks:
            objects = _take_masked(objects, counts)
    except ValueError as error:
        raise ValueError(f"annotation file {annotations}: {error}") from None
    folder = images or _find_images(annotations, [entry["file_name"] for entry in entries.values()])
    return CocoData(
        annotations,
        tuple(categories.values()),
        tuple(categories),
        tuple(
            CocoImage(key, folder / entry["file_name"], entry["width"], entry["height"], tuple(objects[key]))
            for key, entry in entries.items()
            if key in objects
        ),
        {reason: count for reason, count in sorted(counts.items()) if count},
        has_masks,
    )


def list_missing(data: CocoData) -> list[Path]:
    """Return the pictures that are not there; each folder is read once, as a data set may have a million files."""
    present = {folder: _list_names(folder) for folder in {image.path.parent for image in data.images}}
    return [image.path for image in data.images if image.path.name not in present[image.path.parent]]


def find_coco(data: Path) -> tuple[Path, Path | None]:
    """Find the annotation files of a data set.

    Args:
        data: An annotation file; or a folder with ``annotations/instances_train*.json`` and ``instances_val*.json``
            in it, with ``train/*.json`` and ``val/*.json`` (or ``valid``, ``validation``, ``test``), or with one
            JSON file.

    Returns:
        The training and the validation annotations, the latter None where they are in no file of their own.

    Raises:
        FileNotFoundError: There is no such file or folder, or no annotation file in it.
        ValueError: It is not clear which files are meant; the sentence lists them.
    """
    if data.is_file():
        return data, None
    if not data.is_dir():
        raise FileNotFoundError(f"no annotation file or folder at {data}")
    if files := _list_annotations(data / "annotations"):
        return _choose(data, files)
    train = _list_annotations(data / "train")
    if not train and (files := _list_annotations(data)):
        return _choose(data, files)
    if not train:
        raise FileNotFoundError(
            f"no annotation file in folder {data}: looked for annotations/*.json, *.json and train/*.json"
        )
    validation = next((found for name in VALIDATION_FOLDERS if (found := _list_annotations(data / name))), [])
    if len(train) > 1 or len(validation) > 1:
        raise ValueError(_explain_choice(data, [*train, *validation]))
    return train[0], next(iter(validation), None)


def split_coco(data: CocoData, share: float, seed: int) -> tuple[CocoData, CocoData]:
    """Split pictures, with their objects, into training and validation pictures.

    Args:
        data: What to split.
        share: Of the pictures that become validation pictures, to the nearest; at least one on either side.
        seed: Decides which, together with the pictures' ids; nothing else does.

    Raises:
        ValueError: The share is not between 0 and 1, or there are fewer than two pictures.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share} of validation pictures must be above 0 and below 1")
    if len(data) < 2:
        raise ValueError(f"annotation file {data.source} has one picture; a split takes at least two")
    ids = sorted(image.id for image in data.images)
    num_validation = min(max(1, round(share * len(ids))), len(ids) - 1)
    chosen = set(random.Random(str(seed)).sample(ids, num_validation))
    parts = [tuple(image for image in data.images if (image.id in chosen) == held) for held in (False, True)]
    train, validation = (dataclasses.replace(data, images=images) for images in parts)
    return train, validation


def to_document(data: CocoData) -> dict[str, Any]:
    """Return the ground truth as COCO's document, crowds too; objects are numbered anew.

    COCO's evaluation takes an object of id 0 for one that nothing was matched to.
    """
    annotations: list[dict[str, Any]] = []
    for image in data.images:
        for instance in image.instances:
            x0, y0, x1, y1 = instance.box
            entry = {
                "id": len(annotations) + 1,
                "image_id": image.id,
                "category_id": data.category_ids[instance.label],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": instance.area,
                "iscrowd": int(instance.crowd),
            }
            annotations.append(entry | ({"segmentation": instance.segmentation} if data.has_masks else {}))
    return {
        "info": {},
        "images": [
            {"id": image.id, "file_name": image.path.name, "width": image.width, "height": image.height}
            for image in data.images
        ],
        "annotations": annotations,
        "categories": [
            {"id": key, "name": name} for key, name in zip(data.category_ids, data.class_names, strict=True)
        ],
    }


def _read_document(path: Path) -> dict[str, list[Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no annotation file at {path}")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no complete JSON ({error})") from None
    if not isinstance(document, dict):
        raise ValueError(f"it holds a {type(document).__name__}; it must be an object with {', '.join(KEYS)}")
    if absent := [key for key in KEYS if key not in document]:
        raise ValueError(f"it has no {' and no '.join(absent)}; it must be an object with {', '.join(KEYS)}")
    for key in KEYS:
        if not isinstance(document[key], list):
            raise ValueError(f"its {key} are {reprlib.repr(document[key])}; they must be a list")
        if not document[key] and key != "annotations":
            raise ValueError(f"it has no {key}: the list is empty")
    return document


def _read_categories(entries: Sequence[Any]) -> dict[int, str]:
    """Return the name of each category by its id, in the order of the ids."""
    names: dict[int, str] = {}
    for entry in entries:
        key = take_integer(entry, "id", "a category")
        _check_text(entry, "name", f"category {key}")
        _add(names, key, entry["name"], "category")
    _check_unique([(name, f"category {key}") for key, name in names.items()], "name")
    return dict(sorted(names.items()))


def _read_images(entries: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """Return file name, width and height of each picture by its id."""
    images: dict[int, dict[str, Any]] = {}
    for entry in entries:
        key = take_integer(entry, "id", "a picture")
        _check_text(entry, "file_name", f"picture {key}")
        width, height = (take_integer(entry, side, f"picture {key}") for side in ("width", "height"))
        if width < 1 or height < 1:
            raise ValueError(f"picture {key} has {width}x{height} pixels; both sides must be at least 1")
        if width * height > MAX_PIXELS:
            raise ValueError(
                f"picture {key} has {width}x{height} pixels; {MAX_PIXELS / 1e6:.0f} megapixels can be read"
            )
        # Tools on Windows write their own separators.
        name = entry["file_name"].replace("\\", "/")
        # A file from elsewhere could carry other pictures of this machine into a report.
        if PureWindowsPath(name).root or ".." in PurePosixPath(name).parts or "\0" in name:
            raise ValueError(
                f"picture {key} has file_name {reprlib.repr(name)}; it must be a path below the folder of pictures"
            )
        _add(images, key, {"file_name": name, "width": width, "height": height}, "picture")
    _check_unique([(entry["file_name"], f"picture {key}") for key, entry in images.items()], "file_name")
    return images


def _read_annotations(
    entries: Sequence[Any],
    categories: Mapping[int, str],
    images: Mapping[int, Mapping[str, Any]],
    counts: Counter[str],
    *,
    masks: bool,
) -> dict[int, list[Instance]]:
    """Return the objects of each picture by its id."""
    labels = {key: label for label, key in enumerate(categories)}
    sizes = {key: (entry["height"], entry["width"]) for key, entry in images.items()}
    objects: dict[int, list[Instance]] = {key: [] for key in images}
    seen: dict[int, None] = {}
    for entry in entries:
        found = parse_instance(entry, labels, sizes, counts, masks=masks)
        _add(seen, int(entry["id"]), None, "annotation")
        if found is not None:
            image_id, instance = found
            objects[image_id].append(instance)
    return objects


def _take_masked(objects: Mapping[int, list[Instance]], counts: Counter[str]) -> dict[int, list[Instance]]:
    """Leave out pictures with an object that has no mask; give crowds without one that of their box."""
    maskless = {key: sum(not (one.segmentation or one.crowd) for one in found) for key, found in objects.items()}
    taken: dict[int, list[Instance]] = {}
    for key, found in objects.items():
        if not maskless[key]:
            counts[BOX_FOR_CROWD] += sum(one.segmentation is None for one in found)
            taken[key] = [one if one.segmentation else _outline(one) for one in found]
    number = sum(maskless.values())
    if not taken:
        raise ValueError(f"each picture has objects without a mask, {number:,} in all: only boxes can be learned")
    if number:
        counts[f"pictures left out, as {number:,} objects in them have no mask"] = len(objects) - len(taken)
    return taken


def _outline(instance: Instance) -> Instance:
    x0, y0, x1, y1 = instance.box
    return dataclasses.replace(instance, segmentation=[[x0, y0, x1, y0, x1, y1, x0, y1]])


def _add(found: dict[int, Any], key: int, value: Any, kind: str) -> None:
    if key in found:
        raise ValueError(f"{kind} {key} is there twice; ids must be unique")
    found[key] = value


def _check_text(entry: Mapping[str, Any], key: str, owner: str) -> None:
    if key not in entry:
        raise ValueError(f"{owner} has no {key}")
    if not isinstance(entry[key], str) or not entry[key].strip():
        raise ValueError(f"{owner} has {key} {reprlib.repr(entry[key])}; it must be a text")


def _check_unique(named: Iterable[tuple[str, str]], key: str) -> None:
    owners: dict[str, str] = {}
    for name, owner in named:
        if name in owners:
            raise ValueError(f"{owners[name]} and {owner} have the same {key}, {name!r}; it must be unique")
        owners[name] = owner


def _find_images(annotations: Path, names: Sequence[str]) -> Path:
    """Return the folder beside an annotation file that holds most of some pictures: its own, images, train2017 ..."""
    split = annotations.stem.removeprefix("instances_")
    parent = annotations.parent
    above = parent.parent if parent.name else parent / ".."
    beside = [folder / part for folder in (parent, above) for part in ("", "images", split, f"images/{split}")]
    samples = names[:: max(1, len(names) // NUM_SAMPLES)]
    return max(beside, key=lambda folder: sum((folder / name).is_file() for name in samples))


def _list_names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError:
        return set()


def _list_annotations(folder: Path) -> list[Path]:
    """Return the annotation files of a folder, less what macOS puts beside each file of another disk."""
    found = sorted(folder.glob("instances_*.json")) or sorted(folder.glob("*.json"))
    return [path for path in found if not path.name.startswith("._")]


def _choose(data: Path, files: Sequence[Path]) -> tuple[Path, Path | None]:
    """Tell training from validation annotations by their names; trainval is training."""
    if len(files) == 1:
        return files[0], None
    train = [file for file in files if "train" in file.stem]
    others = [file for file in files if file not in train]
    # "val" is the first of these names and in two more: it is preferred to "test".
    validation = next((found for name in VALIDATION_FOLDERS if (found := [f for f in others if name in f.stem])), [])
    if len(train) != 1 or len(validation) != 1:
        raise ValueError(_explain_choice(data, files))
    return train[0], validation[0]


def _explain_choice(data: Path, files: Sequence[Path]) -> str:
    listed = ", ".join(file.relative_to(data).as_posix() for file in files)
    return f"data folder {data} holds several annotation files, and which to take is not clear ({listed}): name one"
