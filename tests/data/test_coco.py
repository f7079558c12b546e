import copy
import json
import os
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from fasternet.data.coco import decode_mask, find_coco, load_coco, split_coco, to_document
from fasternet.data.coco_objects import (
    BOX_FOR_CROWD,
    CLIPPED,
    EMPTY_BOX,
    EMPTY_MASK,
    NEGATIVE,
    NO_POLYGON,
    OUTSIDE,
    SHORT_POLYGON,
)

SQUARE = [[2, 1, 6, 1, 6, 5, 2, 5]]
NAN, INFINITE = float("nan"), float("inf")


def create_document() -> dict:
    """Return two pictures of 10x8 pixels, three categories with gaps, two objects and a crowd."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 10, "height": 8},
            {"id": 0, "file_name": "b.png", "width": 10, "height": 8},
        ],
        "annotations": [
            {"id": 0, "image_id": 7, "category_id": 90, "bbox": [2, 1, 4, 4], "segmentation": SQUARE, "area": 16},
            {"id": 5, "image_id": 7, "category_id": 0, "bbox": [1, 1, 8, 6], "segmentation": SQUARE, "iscrowd": 0},
            {
                "id": 6,
                "image_id": 7,
                "category_id": 3,
                "bbox": [0, 0, 2, 8],
                "segmentation": {"size": [8, 10], "counts": [0, 16, 64]},
                "iscrowd": 1,
                "area": 16,
            },
        ],
        "categories": [{"id": 90, "name": "fig"}, {"id": 0, "name": "date"}, {"id": 3, "name": "nut"}],
    }


def write(folder: Path, document: dict, name: str = "file.json") -> Path:
    for entry in document["images"] if isinstance(document.get("images"), list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str) and entry["file_name"].strip():
            path = folder / entry["file_name"].replace("\\", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10, 8)).save(path)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(document))
    return folder / name


def test_labels_follow_the_category_ids_and_crowds_and_empty_pictures_stay(tmp_path: Path) -> None:
    data = load_coco(write(tmp_path, create_document()))
    assert (data.class_names, data.category_ids) == (("date", "nut", "fig"), (0, 3, 90))
    assert len(data) == 2
    assert data.names == ("a.png", "b.png")
    assert data.has_masks
    assert data.skipped == {}
    first, second = data.images
    assert (first.id, first.path, first.width, first.height) == (7, tmp_path / "a.png", 10, 8)
    assert [(i.label, i.box, i.crowd) for i in first.instances] == [
        (2, (2, 1, 6, 5), False),
        (0, (1, 1, 9, 7), False),
        (1, (0, 0, 2, 8), True),
    ]
    assert first.instances[1].area == 16  # that of the mask, as it is not annotated
    assert second.instances == ()


def edit(path: str, value: object):
    """Return a function that puts a value at a place like ``annotations/0/bbox``; ... deletes it."""

    def apply(document: dict) -> None:
        *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        place = document
        for key in keys:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value

    return apply


def repeat(key: str, **changes: object):
    return lambda document: document[key].append(document[key][0] | changes)


# What breaks the file, and what the sentence says after the file's name.
REFUSED = {
    "no images": (edit("images", ...), "it has no images; it must be an object with images, annotations, categ"),
    "no annotations": (edit("annotations", ...), "it has no annotations; "),
    "no categories": (edit("categories", ...), "it has no categories; "),
    "images no list": (edit("images", {"a": 1}), "its images are {'a': 1}; they must be a list"),
    "no pictures": (edit("images", []), "it has no images: the list is empty"),
    "empty categories": (edit("categories", []), "it has no categories: the list is empty"),
    "picture without id": (edit("images/0/id", ...), "a picture has no id"),
    "picture no object": (edit("images/0", 3), "a picture is 3; it must be an object with an id"),
    "picture without file_name": (edit("images/0/file_name", ...), "picture 7 has no file_name"),
    "picture without name": (edit("images/0/file_name", " "), "picture 7 has file_name ' '; it must be a text"),
    "picture elsewhere": (edit("images/0/file_name", "/etc/b.png"), "picture 7 has file_name '/etc/b.png'; it must b"),
    "picture above": (edit("images/0/file_name", "x\\..\\..\\b.png"), "picture 7 has file_name 'x/../../b.png'; it m"),
    "picture NUL": (edit("images/0/file_name", "a\0.png"), "picture 7 has file_name 'a\\x00.png'; it must be a path"),
    "picture without height": (edit("images/0/height", ...), "picture 7 has no height"),
    "picture of no size": (edit("images/0/width", 0), "picture 7 has 0x8 pixels; both sides must be at least 1"),
    "picture of text size": (edit("images/0/width", "10"), "picture 7 has width '10'; it must be a whole number"),
    "picture too large": (edit("images/0/width", 10**9), "picture 7 has 1000000000x8 pixels; 179 megapixels"),
    "picture twice": (repeat("images", file_name="c.png"), "picture 7 is there twice; ids must be unique"),
    "file twice": (repeat("images", id=8), "picture 7 and picture 8 have the same file_name, 'a.png'; it must"),
    "category twice": (repeat("categories", name="x"), "category 90 is there twice; ids must be unique"),
    "name twice": (repeat("categories", id=91), "category 90 and category 91 have the same name, 'fig'; it must"),
    "category without name": (edit("categories/0/name", ...), "category 90 has no name"),
    "category of text id": (edit("categories/0/id", "fig"), "a category has id 'fig'; it must be a whole number"),
    "annotation twice": (repeat("annotations"), "annotation 0 is there twice; ids must be unique"),
    "annotation without id": (edit("annotations/1/id", ...), "an annotation has no id"),
    "annotation no object": (edit("annotations/1", [5]), "an annotation is [5]; it must be an object with an id"),
    "no image_id": (edit("annotations/1/image_id", ...), "annotation 5 has no image_id"),
    "no category_id": (edit("annotations/1/category_id", ...), "annotation 5 has no category_id"),
    "category_id of half": (edit("annotations/1/category_id", 1.5), "annotation 5 has category_id 1.5; it must be"),
    "category_id infinite": (edit("annotations/1/category_id", INFINITE), "annotation 5 has category_id inf; it mus"),
    "unknown picture": (edit("annotations/1/image_id", 8), "annotation 5 is of picture 8, which is not among the im"),
    "unknown category": (edit("annotations/1/category_id", 1), "annotation 5 is of category 1, which is not among t"),
    "iscrowd of 2": (edit("annotations/1/iscrowd", 2), "annotation 5 has iscrowd 2; it must be 0 or 1"),
    "no bbox": (edit("annotations/1/bbox", ...), "annotation 5 has no bbox"),
    "bbox of three": (edit("annotations/1/bbox", [1, 2, 3]), "annotation 5 has bbox [1, 2, 3]; it must be four fin"),
    "bbox of text": (edit("annotations/1/bbox", ["1", 2, 3, 4]), "annotation 5 has bbox ['1', 2, 3, 4]; it must be"),
    "bbox NaN": (edit("annotations/1/bbox/2", NAN), "annotation 5 has bbox [1, 1, nan, 6]; it must be four finite"),
    "bbox infinite": (edit("annotations/1/bbox/0", -INFINITE), "annotation 5 has bbox [-inf, 1, 8, 6]; it must be"),
    "bbox of 400 digits": (edit("annotations/1/bbox/0", 10**400), "annotation 5 has bbox [10"),
    "area NaN": (edit("annotations/1/area", NAN), "annotation 5 has area nan; it must be a finite number of at lea"),
    "area negative": (edit("annotations/1/area", -1), "annotation 5 has area -1; it must be a finite number of at"),
    "area of text": (edit("annotations/1/area", "16"), "annotation 5 has area '16'; it must be a finite number"),
    "polygon NaN": (edit("annotations/1/segmentation", [[1, 1, 2, NAN, 3, 3]]), "annotation 5 has a polygon [1, 1, 2"),
    "polygon of text": (edit("annotations/1/segmentation", [["a"] * 6]), "annotation 5 has a polygon ['a', 'a', 'a'"),
    "polygon flat": (edit("annotations/1/segmentation", SQUARE[0]), "annotation 5 has a polygon 2; it must be finit"),
    "polygon odd": (edit("annotations/1/segmentation", [[1] * 7]), "annotation 5 has a polygon of 7 numbers; they "),
    "polygon far": (
        edit("annotations/1/segmentation", [[1, 1, 9e8, 1, 2, 2]]),
        "annotation 5 has a polygon that reaches 9e+08, far outside its picture of 10x8 pixels",
    ),
    "mask of text": (edit("annotations/1/segmentation", "abc"), "annotation 5 has segmentation 'abc'; it must be po"),
    "runs of another size": (
        edit("annotations/2/segmentation/size", [10, 8]),
        "annotation 6 has a run-length encoding of size [10, 8]; it must be that of its picture, [8, 10]",
    ),
    "runs without size": (edit("annotations/2/segmentation/size", ...), "annotation 6 has a run-length encoding of s"),
    "runs without counts": (edit("annotations/2/segmentation/counts", ...), "annotation 6 has a damaged run-length"),
    "runs too short": (
        edit("annotations/2/segmentation/counts", [0, 16]),
        "annotation 6 has a damaged run-length encoding: its counts must be whole numbers that add up to 80 pixels",
    ),
    "runs negative": (edit("annotations/2/segmentation/counts", [-1, 81]), "annotation 6 has a damaged run-length e"),
    "runs of text": (edit("annotations/2/segmentation/counts", ["0", 80]), "annotation 6 has a damaged run-length e"),
    "string damaged": (edit("annotations/2/segmentation/counts", "zzzz"), "annotation 6 has a damaged run-length enc"),
    "string too short": (edit("annotations/2/segmentation/counts", "5"), "annotation 6 has a damaged run-length enco"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_trusted_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    change, expected = REFUSED[name]
    document = copy.deepcopy(create_document())
    path = write(tmp_path, document)
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"^annotation file ") as caught:
        load_coco(path)
    message = str(caught.value)
    assert message.startswith(f"annotation file {path}: {expected}")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "it is no complete JSON (Expecting value"),
        (b"no json", "it is no complete JSON (Expecting value"),
        (json.dumps(create_document()).encode()[:200], "it is no complete JSON ("),
        (b"\xff\xd8\xff\xe0 a picture", "it is no complete JSON ("),
        (b"[" * 100_000, "it is no complete JSON ("),
        (b"[]", "it holds a list; it must be an object with images, annotations, categories"),
    ],
)
def test_what_is_no_annotation_file_is_refused_in_one_sentence(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^annotation file ") as caught:
        load_coco(path)
    assert str(caught.value).startswith(f"annotation file {path}: {expected}")


# What the object becomes, and what is counted.
COUNTED = {
    "negative width": ({"bbox": [6, 1, -4, 4]}, None, {NEGATIVE: 1}),
    "no width": ({"bbox": [2, 1, 0, 4]}, None, {EMPTY_BOX: 1}),
    "outside": ({"bbox": [10, 1, 4, 4]}, None, {OUTSIDE: 1}),
    "across the border": ({"bbox": [-3, 1, 20, 4]}, (0, 1, 10, 5), {CLIPPED: 1}),
    "within rounding": ({"bbox": [2, 1, 8.01, 4]}, (2, 1, 10, 5), {}),
    "two points": ({"segmentation": [[1, 1, 2, 2]]}, None, {SHORT_POLYGON: 1, NO_POLYGON: 1}),
    "two points of one part": ({"segmentation": [[1, 1, 2, 2], *SQUARE]}, (1, 1, 9, 7), {SHORT_POLYGON: 1}),
    "a line": ({"segmentation": [[1, 1, 2, 2, 3, 3]]}, None, {EMPTY_MASK: 1}),
    "runs of nothing": ({"segmentation": {"size": [8, 10], "counts": [80]}}, None, {EMPTY_MASK: 1}),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_useless_object_is_left_out_and_counted(name: str, tmp_path: Path) -> None:
    changes, box, counts = COUNTED[name]
    document = copy.deepcopy(create_document())
    document["annotations"][1] |= changes
    data = load_coco(write(tmp_path, document))
    assert data.skipped == counts
    assert [i.box for i in data.images[0].instances if i.id == 5] == ([] if box is None else [box])
    assert [i.id for i in data.images[0].instances if i.id != 5] == [0, 6]


@pytest.mark.parametrize("mask", [[], None, [[]]])
def test_a_picture_with_an_object_without_a_mask_is_left_out(mask, tmp_path: Path) -> None:
    document = create_document()
    document["annotations"][1]["segmentation"] = mask
    document["annotations"].append({"id": 7, "image_id": 0, "category_id": 0, "bbox": [2, 1, 4, 4]})
    document["images"].append({"id": 8, "file_name": "c.png", "width": 10, "height": 8})
    data = load_coco(write(tmp_path, document))
    assert (data.has_masks, data.names) == (True, ("c.png",))
    assert data.skipped == {"pictures left out, as 2 objects in them have no mask": 2}
    del document["images"][2]
    with pytest.raises(ValueError, match=r"each picture has objects without a mask, 2 in all: only boxes can be lea"):
        load_coco(write(tmp_path, document))
    assert len(load_coco(tmp_path / "file.json", masks=False)) == 2


def test_a_crowd_without_a_mask_stays_with_that_of_its_box(tmp_path: Path) -> None:
    document = create_document()
    del document["annotations"][2]["segmentation"]
    data = load_coco(write(tmp_path, document))
    assert (len(data), data.skipped) == (2, {BOX_FOR_CROWD: 1})
    crowd = to_document(data)["annotations"][2]
    assert (crowd["iscrowd"], crowd["segmentation"]) == (1, [[0, 0, 2, 0, 2, 8, 0, 8]])


def test_without_masks_the_boxes_of_all_objects_are_read(tmp_path: Path) -> None:
    document = create_document()
    del document["annotations"][0]["segmentation"]
    document["annotations"][1]["segmentation"] = "damaged"
    data = load_coco(write(tmp_path, document), masks=False)
    assert not data.has_masks
    assert [(i.segmentation, i.area) for i in data.images[0].instances] == [(None, 16), (None, 48), (None, 16)]
    for annotation in document["annotations"]:
        annotation.pop("segmentation", None)
    data = load_coco(write(tmp_path, document))
    assert (data.has_masks, len(data.images[0].instances), data.skipped) == (False, 3, {})


def test_missing_files_and_pictures_are_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path, create_document())
    with pytest.raises(FileNotFoundError, match=f"^no annotation file at {tmp_path}/absent.json$"):
        load_coco(tmp_path / "absent.json")
    with pytest.raises(FileNotFoundError, match=f"^no folder of pictures at {tmp_path}/absent$"):
        load_coco(path, tmp_path / "absent")
    (tmp_path / "b.png").unlink()
    sentence = f"^annotation file {path}: 1 of 2 pictures are missing, the first is {tmp_path}/b.png$"
    with pytest.raises(FileNotFoundError, match=sentence):
        load_coco(path)


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/a.json", "images"),
        ("trainval.json", "images"),
        ("train/_annotations.coco.json", "train"),
    ],
)
def test_pictures_are_found_beside_the_file(file: str, folder: str, tmp_path: Path, monkeypatch) -> None:
    document = create_document()
    path = write(tmp_path, document, file)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for entry in document["images"]:
        (tmp_path / entry["file_name"]).rename(tmp_path / folder / entry["file_name"])
    assert load_coco(path).images[0].path == tmp_path / folder / "a.png"
    monkeypatch.chdir(path.parent)
    assert load_coco(Path(path.name)).images[0].path.resolve() == tmp_path / folder / "a.png"


def test_separators_of_windows_are_understood(tmp_path: Path) -> None:
    document = create_document()
    document["images"][0]["file_name"] = "JPEGImages\\a.png"
    assert load_coco(write(tmp_path, document)).images[0].path == tmp_path / "JPEGImages" / "a.png"


def test_a_split_is_by_picture_and_follows_from_seed_and_ids(tmp_path: Path) -> None:
    document = create_document()
    document["images"] = [{"id": i, "file_name": f"{i}.png", "width": 10, "height": 8} for i in range(18)]
    data = load_coco(write(tmp_path, document))
    random.Random(0).shuffle(document["images"])
    shuffled = load_coco(write(tmp_path, document))
    train, validation = split_coco(data, 0.2, 0)
    assert (len(train), len(validation)) == (14, 4)
    assert sorted(i.id for i in [*train.images, *validation.images]) == [*range(18)]
    assert {i.id for i in split_coco(shuffled, 0.2, 0)[1].images} == {i.id for i in validation.images}
    assert {i.id for i in split_coco(data, 0.2, 1)[1].images} != {i.id for i in validation.images}
    assert [len(part) for part in split_coco(data, 0.999, 0)] == [1, 17]
    with pytest.raises(ValueError, match=r"^share=1 of validation pictures must be above 0 and below 1$"):
        split_coco(data, 1, 0)
    with pytest.raises(ValueError, match=r"has one picture; a split takes at least two$"):
        split_coco(split_coco(data, 0.001, 0)[1], 0.5, 0)


def test_masks_of_every_form_are_drawn() -> None:
    square = torch.zeros(8, 10, dtype=torch.uint8)
    square[1:5, 2:6] = 1
    runs, start, value = [], 0, 0
    flat = square.T.flatten().tolist()  # COCO counts column by column
    for i, pixel in enumerate([*flat, 2]):
        if pixel != value:
            runs.append(i - start)
            start, value = i, 1 - value
    assert torch.equal(decode_mask(SQUARE, 8, 10), square)
    assert torch.equal(decode_mask({"size": [8, 10], "counts": runs}, 8, 10), square)
    mask = pytest.importorskip("pycocotools.mask", reason="pycocotools is the reference")
    string = mask.frPyObjects({"size": [8, 10], "counts": runs}, 8, 10)["counts"].decode()
    assert torch.equal(decode_mask({"size": [8, 10], "counts": string}, 8, 10), square)
    two = [[0, 0, 1, 0, 1, 8, 0, 8], [-5, 6, 15, 6, 15, 20, -5, 20]]  # parts, one of them across the border
    expected = torch.zeros(8, 10, dtype=torch.uint8)
    expected[:, 0] = expected[6:] = 1
    assert torch.equal(decode_mask(two, 8, 10), expected)
    with pytest.raises(ValueError, match=r"^a run-length encoding of size \[8, 10\]; it must be that of its picture"):
        decode_mask({"size": [8, 10], "counts": runs}, 10, 8)


def test_a_missing_extra_is_one_sentence(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval.core", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"masks and scores need faster-coco-eval: pip install 'fasternet\[detection\]'$"
    ):
        decode_mask(SQUARE, 8, 10)


def test_the_document_holds_what_was_read_and_no_object_of_id_0(tmp_path: Path) -> None:
    data = load_coco(write(tmp_path, create_document()))
    document = to_document(data)
    assert [entry["id"] for entry in document["annotations"]] == [1, 2, 3]
    (tmp_path / "again").mkdir()
    again = load_coco(write(tmp_path / "again", document))
    assert (again.class_names, again.category_ids) == (data.class_names, data.category_ids)
    for one, other in zip(again.images, data.images, strict=True):
        assert (one.id, one.width, one.height) == (other.id, other.width, other.height)
        fields = [[(i.label, i.box, i.segmentation, i.crowd, i.area) for i in x.instances] for x in (one, other)]
        assert fields[0] == fields[1]


@pytest.mark.parametrize(
    ("name", "pictures", "objects", "crowds", "classes", "used", "empty"),
    [("coco128", 128, 939, 10, 80, 71, 2), ("fruits_nuts", 18, 165, 0, 3, 3, 0)],
)
def test_real_annotations_are_read(name, pictures, objects, crowds, classes, used, empty) -> None:
    folder = os.environ.get("FASTERNET_DATA")
    if not folder:
        pytest.skip("FASTERNET_DATA does not name a folder of real pictures")
    source, validation = find_coco(Path(folder) / name)
    data = load_coco(source)
    instances = [instance for image in data.images for instance in image.instances]
    assert validation is None
    assert data.has_masks
    assert data.skipped == {}
    assert (len(data), len(instances), len(data.class_names)) == (pictures, objects, classes)
    assert sum(instance.crowd for instance in instances) == crowds
    assert len({instance.label for instance in instances}) == used
    assert sum(not image.instances for image in data.images) == empty
    written = {a["id"]: a for a in json.loads(source.read_text())["annotations"]}
    for instance in instances:
        entry = written[instance.id]
        x, y, w, h = entry["bbox"]
        assert instance.box == pytest.approx((x, y, x + w, y + h), abs=0.02)
        assert data.category_ids[instance.label] == entry["category_id"]
        assert instance.segmentation == entry["segmentation"]
