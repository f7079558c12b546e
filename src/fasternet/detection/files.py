"""Finds the objects in many pictures: a drawing of each, and one COCO document; in bounded memory, resumed.

While it runs, ``detections.json.part`` grows in the output folder: a line of settings, then one per picture that is
drawn. In the end it becomes ``detections.json``, from which it is made again where pictures are added.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from PIL import Image

from fasternet.data.coco_objects import import_masks
from fasternet.data.images import ImageError, list_images, load_image
from fasternet.detection.draw import draw_detections
from fasternet.detection.predictor import DetectionPredictor, Detections, check_threshold
from fasternet.detection.results import to_results
from fasternet.models.checkpoint import write_atomically
from fasternet.timing import Track, silent

DOCUMENT = "detections.json"
PART = f"{DOCUMENT}.part"
JPEG_SIDE = 65500  # pixels, at most


@dataclasses.dataclass(frozen=True)
class FolderPrediction:
    """What ``predict_to_folder`` made.

    Attributes:
        document: The COCO document.
        num_images: Pictures in it, those of resumed runs too.
        num_detections: Objects in them.
        errors: A sentence for each picture that could not be read.
    """

    document: Path
    num_images: int
    num_detections: int
    errors: tuple[str, ...]


def predict_to_folder(
    predictor: DetectionPredictor,
    images: Iterable[Path | str],
    output: Path,
    *,
    score_threshold: float = 0.5,
    resume: bool = False,
    on_error: Callable[[ImageError], object] | None = None,
    track: Track = silent,
) -> FolderPrediction:
    """Draw what is found in pictures, and write it down as COCO does.

    Args:
        predictor: What finds objects.
        images: Picture files, drawn into ``output`` itself, and folders, whose structure is kept below it. A PNG file
            is drawn into a PNG file, any other into a JPEG file; of two of one name the second gets a number.
        output: A folder that is empty or not there yet. In the end its ``detections.json`` has ``info``
            (``score_threshold``, and ``weights``, their fingerprint), ``images`` (``file_name`` as given, and
            ``drawing``, relative to ``output``), ``categories``, and ``annotations``: COCO's, with a ``score``, masks
            as compressed run lengths.
        score_threshold: Weaker detections are left out; so are those below the detector's own threshold.
        resume: Go on where a run with the same settings stopped; to one that is done, pictures are added that are new
            or could not be read before.
        on_error: Called with the error of each picture that cannot be read; the others are predicted.
        track: Shows progress.

    Raises:
        FileNotFoundError: A folder of ``images`` holds no picture.
        FileExistsError: ``output`` holds something, and ``resume`` is off; or it is a file.
        ValueError: ``score_threshold`` is not from 0 to 1, or the run that is resumed had other settings.
        ModuleNotFoundError: There are masks, and faster-coco-eval is not installed.
    """
    check_threshold(score_threshold)
    pictures = _list_pictures(images, output)
    _check_output(output, resume)
    document, part = output / DOCUMENT, output / PART
    settings = {
        "score_threshold": score_threshold,
        "weights": predictor.fingerprint,
        "categories": [
            {"id": number, "name": name}
            for number, name in zip(predictor.category_ids, predictor.class_names, strict=True)
        ],
    }
    output.mkdir(parents=True, exist_ok=True)
    if document.exists() and not part.exists():
        _reopen(document, part, settings)
    errors: list[str] = []
    with part.open("a+b") as file:
        done, num_detections = _resume_part(file, settings)
        num_images = len(done)
        used = {name.casefold() for name in done.values()}
        for path, relative in track(pictures.items(), len(pictures), "detecting"):
            if path in done:
                continue
            try:
                image = load_image(Path(path))
            except ImageError as error:
                errors.append(str(error))
                if on_error is not None:
                    on_error(error)
                continue
            found = predictor.predict_image(image, score_threshold=score_threshold)
            name = _choose_name(relative, image, used)
            _draw(image, found, output / name)
            num_images, num_detections = num_images + 1, num_detections + len(found)
            _append(file, _describe(path, name, num_images, found, predictor.category_ids))
            del image, found  # before the next picture is read: each may take gigabytes
    write_atomically(document, lambda path: _compose(part, path))
    part.unlink()
    return FolderPrediction(document, num_images, num_detections, tuple(errors))


def _list_pictures(images: Iterable[Path | str], output: Path) -> dict[str, Path]:
    """Return where each picture belongs in the output folder; drawings of an earlier run are passed over."""
    pictures: dict[str, Path] = {}
    for given in map(Path, images):
        for path in list_images([given]):
            if output.resolve() not in path.resolve().parents:
                pictures[path.as_posix()] = path.relative_to(given) if given.is_dir() else Path(path.name)
    return pictures


def _check_output(output: Path, resume: bool) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output {output} is a file; it must be a folder")
    if resume or not output.exists() or next(output.iterdir(), None) is None:
        return
    raise FileExistsError(f"output {output} is not empty: name a new folder, or resume to go on with this one")


def _reopen(document: Path, part: Path, settings: dict[str, Any]) -> None:
    """Make the part of a run that is done again from its document, which stays until there is more."""
    try:
        content = json.loads(document.read_bytes())
        begun = {**content["info"], "categories": content["categories"]}
        lines = {image["id"]: {"image": image, "annotations": []} for image in content["images"]}
        for annotation in content["annotations"]:
            del annotation["id"]
            lines[annotation["image_id"]]["annotations"].append(annotation)
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{document} is damaged, or of another program: name a new output folder") from None
    _check_settings(document, begun, settings)
    text = "".join(json.dumps(line) + "\n" for line in (begun, *lines.values()))
    write_atomically(part, lambda temporary: temporary.write_text(text))


def _check_settings(file: Path | str, begun: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if begun.get(name) != value:
            raise ValueError(f"{file} was begun with other {name.replace('_', ' ')}: name a new output folder")


def _resume_part(file: BinaryIO, settings: dict[str, Any]) -> tuple[dict[str, str], int]:
    """Return the drawings of the pictures that a part has, by their paths, and how many objects are in them.

    What was half written is cut off.
    """
    file.seek(0)
    drawings: dict[str, str] = {}
    end = num_detections = 0
    for number, line in enumerate(file):
        if not line.endswith(b"\n"):
            break
        try:
            content = json.loads(line)
        except ValueError:
            raise ValueError(f"{file.name} is damaged in line {number + 1}: name a new output folder") from None
        if number == 0:
            _check_settings(file.name, content, settings)
        else:
            drawings[content["image"]["file_name"]] = content["image"]["drawing"]
            num_detections += len(content["annotations"])
        end += len(line)
    file.truncate(end)
    if end == 0:
        _append(file, settings)
    return drawings, num_detections


def _append(file: BinaryIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
    file.flush()


def _choose_name(relative: Path, image: Image.Image, used: set[str]) -> str:
    """Add a name to those that are used, which some file systems do not tell from one in capitals."""
    suffix = ".png" if relative.suffix.lower() == ".png" or max(image.size) > JPEG_SIDE else ".jpg"
    stems = itertools.chain([relative.stem], (f"{relative.stem}_{number}" for number in itertools.count(2)))
    names = (relative.with_name(stem + suffix).as_posix() for stem in stems)
    name = next(name for name in names if name.casefold() not in used)
    used.add(name.casefold())
    return name


def _draw(image: Image.Image, found: Detections, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing = draw_detections(image, found)
    write_atomically(path, lambda temporary: drawing.save(temporary, quality=92, subsampling=0))


def _describe(path: str, drawing: str, image_id: int, found: Detections, category_ids: Sequence[int]) -> dict[str, Any]:
    """Return a picture and its objects as COCO has them."""
    height, width = found.size
    image = {"id": image_id, "file_name": path, "width": width, "height": height, "drawing": drawing}
    annotations = to_results(found.found, image_id, found.size, category_ids, pasted=False)
    for annotation in annotations:
        if "segmentation" in annotation:
            area = float(import_masks().area(annotation["segmentation"]))
        else:
            area = annotation["bbox"][2] * annotation["bbox"][3]
        annotation.update(area=area, iscrowd=0)
    return {"image": image, "annotations": annotations}


def _compose(part: Path, path: Path) -> None:
    """Write the document, a picture in memory at a time; annotations are numbered from 1."""
    with path.open("w", encoding="ascii") as file:
        settings = next(_read(part))
        images = (line["image"] for line in itertools.islice(_read(part), 1, None))
        annotations = itertools.chain.from_iterable(
            line["annotations"] for line in itertools.islice(_read(part), 1, None)
        )
        info = {name: value for name, value in settings.items() if name != "categories"}
        file.write(f'{{"info": {json.dumps(info)},\n"images": [')
        _write_list(file, images)
        file.write(f'],\n"categories": {json.dumps(settings["categories"])},\n"annotations": [')
        _write_list(file, ({"id": number, **annotation} for number, annotation in enumerate(annotations, 1)))
        file.write("]}\n")


def _write_list(file: TextIO, items: Iterable[dict[str, Any]]) -> None:
    for number, item in enumerate(items):
        file.write((",\n" if number else "\n") + json.dumps(item))


def _read(part: Path) -> Iterator[Any]:
    with part.open("rb") as file:
        yield from map(json.loads, file)
