"""VOC and YOLO into COCO's layout: seeded objects come back as they were drawn, and broken files are named."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fasternet.data import importing
from fasternet.data import voc as voc_format
from fasternet.data import yolo as yolo_format
from fasternet.data.coco import find_coco, load_coco
from fasternet.data.importing import import_data

NAMES = ("ant", "bee", "cow")
SIZES = ((60, 40), (33, 57), (64, 64), (50, 50))  # width, height


def draw_boxes(seed, num_pictures=4):
    """Return of each picture its objects: class and integer box x0, y0, x1, y1, side by side."""
    generator = np.random.default_rng(seed)
    pictures = []
    for width, height in SIZES[:num_pictures]:
        objects = []
        for column in range(3):
            left = column * (width // 3)
            x0 = left + int(generator.integers(0, 3))
            y0 = int(generator.integers(0, height // 2))
            box = (x0, y0, left + width // 3 - 1, y0 + int(generator.integers(9, height // 2)))
            objects.append((NAMES[generator.integers(3)], box))
        pictures.append(objects)
    return pictures


def save_picture(path, size, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "green").save(path, **options)


def write_xml(path, size, objects, extra=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(
        f"<object><name>{name}</name>{extra}<bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, (x0, y0, x1, y1) in objects
    )
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    path.write_text(f"<annotation>{size}{body}</annotation>")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Three pictures to train and one to validate; nothing is wrong."""
    root = tmp_path / "VOC"
    for number, objects in enumerate(draw_boxes(0)):
        save_picture(root / "JPEGImages" / f"{number}.jpg", SIZES[number])
        write_xml(root / "Annotations" / f"{number}.xml", SIZES[number], objects)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n2\n\n1\n")
    (lists / "val.txt").write_text("3\n")
    return root


def write_masks(root, pictures, order=(1, 2, 3)):
    """Draw ellipses, a void border around each, and return the masks of each picture by object."""
    masks = []
    for number, objects in enumerate(pictures):
        canvas = Image.new("P", SIZES[number])
        canvas.putpalette(bytes(i for i in range(256) for _ in "RGB"))
        draw = ImageDraw.Draw(canvas)
        for value, (_, (x0, y0, x1, y1)) in zip(order, objects, strict=True):
            draw.ellipse((x0, y0, x1 - 1, y1 - 1), fill=value, outline=255)
        (root / "SegmentationObject").mkdir(exist_ok=True)
        canvas.save(root / "SegmentationObject" / f"{number}.png")
        masks.append([np.asarray(canvas) == value for value in order])
    return masks


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Three pictures to train and one to validate, boxes; nothing is wrong."""
    root = tmp_path / "yolo"
    for number, objects in enumerate(draw_boxes(1)):
        split, (width, height) = "val" if number == 3 else "train", SIZES[number]
        save_picture(root / "images" / split / f"{number}.png", SIZES[number])
        lines = [
            f"{NAMES.index(name)} {(x0 + x1) / 2 / width:.6f} {(y0 + y1) / 2 / height:.6f} "
            f"{(x1 - x0) / width:.6f} {(y1 - y0) / height:.6f}"
            for name, (x0, y0, x1, y1) in objects
        ]
        (root / "labels" / split).mkdir(parents=True, exist_ok=True)
        (root / "labels" / split / f"{number}.txt").write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text("path: elsewhere\ntrain: images/train\nval: images/val\nnames: [ant, bee, cow]\n")
    return root


def read_splits(output):
    """Return the objects (class, box) of each picture by split and name, straight from the JSON."""
    found = {}
    for file in sorted((output / "annotations").iterdir()):
        document = json.loads(file.read_text())
        names = {entry["id"]: entry["name"] for entry in document["categories"]}
        split = found[file.stem.removeprefix("instances_")] = {}
        for image in document["images"]:
            with Image.open(output / file.stem.removeprefix("instances_") / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
            split[image["file_name"]] = [
                (names[entry["category_id"]], entry["bbox"])
                for entry in document["annotations"]
                if entry["image_id"] == image["id"]
            ]
    return found


def expect(pictures, numbers, suffix):
    return {
        f"{number}{suffix}": [(name, [x0, y0, x1 - x0, y1 - y0]) for name, (x0, y0, x1, y1) in pictures[number]]
        for number in numbers
    }


def test_voc_boxes_come_back_as_they_were_drawn(voc, tmp_path):
    found = import_data(voc, tmp_path / "coco")
    pictures = draw_boxes(0)
    assert read_splits(found.output) == {
        "train": expect(pictures, (0, 2, 1), ".jpg"),
        "val": expect(pictures, (3,), ".jpg"),
    }
    assert (found.format, found.notes) == ("voc", {})
    assert found.class_names == tuple(sorted({name for objects in pictures for name, _ in objects}))
    assert found.splits["train"] == {"pictures": 3, "objects": 9, "masks": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["VOC", "coco"]


def test_what_is_written_is_read_for_training(voc, tmp_path):
    train, validation = find_coco(import_data(voc, tmp_path / "coco").output)
    data = load_coco(train)
    assert (len(data), data.has_masks, data.skipped) == (3, False, {})
    boxes = [instance.box for instance in data.images[1].instances]
    assert boxes == [tuple(map(float, box)) for _, box in draw_boxes(0)[2]]
    assert load_coco(validation).class_names == data.class_names


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_voc_masks_come_back_pixel_by_pixel(voc, tmp_path, order):
    coco = pytest.importorskip("pycocotools.coco")
    masks = write_masks(voc, draw_boxes(0), order)
    found = import_data(voc, tmp_path / "coco")
    assert (found.splits["train"]["masks"], found.splits["val"]["masks"], found.notes) == (9, 3, {})
    truth = coco.COCO(found.output / "annotations" / "instances_train.json")
    for image_id, number in enumerate((0, 2, 1), 1):
        entries = truth.loadAnns(truth.getAnnIds(image_id))
        for entry, mask in zip(entries, masks[number], strict=True):
            assert np.array_equal(truth.annToMask(entry), mask)
            assert entry["area"] == mask.sum()


def test_voc_pictures_without_masks_are_said_or_left_out(voc, tmp_path):
    write_masks(voc, draw_boxes(0))
    (voc / "SegmentationObject" / "1.png").unlink()
    found = import_data(voc, tmp_path / "all")
    assert found.splits["train"] == {"pictures": 3, "objects": 9, "masks": 6}
    assert found.notes == {importing.NO_MASK: ["1.jpg"] * 3}
    assert load_coco(found.output / "annotations" / "instances_train.json").names == ("0.jpg", "2.jpg")
    found = import_data(voc, tmp_path / "masked", masks=True)
    assert found.splits["train"] == {"pictures": 2, "objects": 6, "masks": 6}
    assert found.notes == {importing.MASKLESS: ["1.jpg"]}


def test_voc_oddities_are_counted(voc, tmp_path):
    write_xml(voc / "Annotations" / "0.xml", (60, 40), [("ant", (5, 5, 70, 30)), ("ant", (7, 7, 7, 20))])
    write_xml(voc / "Annotations" / "1.xml", (0, 0), [("bee", (0, 0, 33, 57))], "<difficult>1</difficult>")
    write_xml(voc / "Annotations" / "gone.xml", (9, 9), [("bee", (0, 0, 9, 9))])
    (voc / "Annotations" / "2.xml").unlink()
    (voc / "JPEGImages" / "3.jpg").write_bytes(b"no picture")
    found = import_data(voc, tmp_path / "coco")
    assert read_splits(found.output) == {
        "train": {"0.jpg": [("ant", [5, 5, 55, 25])], "2.jpg": [], "1.jpg": [("bee", [0, 0, 33, 57])]}
    }
    assert {remark.split(":")[0]: len(files) for remark, files in found.notes.items()} == {
        "boxes clipped": 1,
        "labels left out": 1,
        "objects left out": 1,
        "objects marked as difficult": 1,
        "pictures left out": 1,
        "pictures without a label": 1,
    }


def test_voc_without_lists_is_all_for_training_and_the_trainval_list_is_taken(voc, tmp_path):
    lists = voc / "ImageSets" / "Main"
    for name in ("train.txt", "val.txt"):
        (lists / name).unlink()
    assert {split: values["pictures"] for split, values in import_data(voc, tmp_path / "a").splits.items()} == {
        "train": 4
    }
    (lists / "trainval.txt").write_text("1  1\n3 -1\n")
    found = import_data(voc, tmp_path / "b")
    assert list(read_splits(found.output)["train"]) == ["1.jpg", "3.jpg"]
    assert found.notes == {voc_format.UNLISTED: ["0.jpg", "2.jpg"]}


def test_picture_in_both_splits_is_said(voc, tmp_path):
    (voc / "ImageSets" / "Main" / "val.txt").write_text("0\n3\n")
    assert import_data(voc, tmp_path / "coco").notes == {importing.TWICE: ["0.jpg"]}


def test_size_may_be_that_of_the_picture_as_stored_or_upright(voc, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save_picture(voc / "JPEGImages" / "0.jpg", (60, 40), exif=exif)
    import_data(voc, tmp_path / "stored")
    write_xml(voc / "Annotations" / "0.xml", (40, 60), [("ant", (1, 1, 30, 50))])
    document = json.loads((import_data(voc, tmp_path / "up").output / "annotations/instances_train.json").read_text())
    assert (document["images"][0]["width"], document["images"][0]["height"]) == (40, 60)
    assert document["annotations"][0]["bbox"] == [1, 1, 29, 49]


def test_yolo_boxes_come_back_as_they_were_drawn(yolo, tmp_path):
    found = import_data(yolo, tmp_path / "coco")
    pictures = draw_boxes(1)
    expected = {"train": expect(pictures, (0, 1, 2), ".png"), "val": expect(pictures, (3,), ".png")}
    splits = read_splits(found.output)
    assert splits.keys() == expected.keys()
    for split, images in expected.items():
        assert list(splits[split]) == list(images)
        for name, objects in images.items():
            assert [label for label, _ in splits[split][name]] == [label for label, _ in objects]
            # Six decimals of a side of 64 pixels.
            assert np.allclose([box for _, box in splits[split][name]], [box for _, box in objects], atol=2e-3)
    assert (found.format, found.class_names, found.notes) == ("yolo", NAMES, {})


def test_yolo_polygons_become_masks(yolo, tmp_path):
    points = np.random.default_rng(2).uniform(0.1, 0.9, (5, 2))
    angles = np.arctan2(*(points - points.mean(0)).T)
    points = points[np.argsort(angles)]
    (yolo / "labels" / "val" / "3.txt").write_text("1 " + " ".join(f"{value:.8f}" for value in points.flatten()))
    found = import_data(yolo, tmp_path / "coco")
    (entry,) = json.loads((found.output / "annotations" / "instances_val.json").read_text())["annotations"]
    pixels = points * 50
    assert np.allclose(entry["segmentation"], [pixels.flatten()], atol=1e-3)
    assert np.allclose(entry["bbox"], [*pixels.min(0), *(pixels.max(0) - pixels.min(0))], atol=2e-3)
    fine = Image.new("1", (2000, 2000))
    ImageDraw.Draw(fine).polygon([tuple(point) for point in points * 2000], fill=1)
    assert entry["area"] == pytest.approx(np.asarray(fine).mean() * 50 * 50, rel=5e-3)
    assert load_coco(found.output / "annotations" / "instances_val.json").has_masks
    assert found.notes == {importing.NO_MASK: [name for name in ("0.png", "1.png", "2.png") for _ in range(3)]}


def test_yolo_oddities_are_counted(yolo, tmp_path):
    labels = yolo / "labels" / "train"
    (labels / "0.txt").write_text("0 0.5 0.5 1.0005 1\n\n1 0.5 0.5 0 0.5\n2 0 0 0.5 0.5\n1 0.1 0.1 0.2 0.2 0.3 0.3\n")
    (labels / "1.txt").unlink()
    (labels / "2.txt").write_text("")
    (labels / "gone.txt").write_text("0 0.5 0.5 1 1\n")
    (labels / "classes.txt").write_text("x\n")
    found = import_data(yolo, tmp_path / "coco")
    assert read_splits(found.output)["train"] == {
        "0.png": [("ant", [0, 0, 60, 40]), ("cow", [0, 0, 15, 10])],
        "1.png": [],
        "2.png": [],
    }
    assert {remark.split(":")[0]: len(files) for remark, files in found.notes.items()} == {
        "boxes clipped": 1,
        "labels left out": 1,
        "objects left out": 2,
        "pictures without a label": 1,
    }


@pytest.mark.parametrize("names", ["names:\n  0: ant\n  1: bee\n  2: cow\n", "nc: 3\nnames: [ant, bee, cow]\n", None])
def test_yolo_names_have_several_forms(yolo, tmp_path, names):
    (yolo / "data.yaml").unlink()
    (yolo / ("classes.txt" if names is None else "zoo.yml")).write_text(names or "ant\nbee\ncow\n")
    assert import_data(yolo, tmp_path / "coco").class_names == NAMES


@pytest.mark.parametrize(
    ("moves", "splits"),
    [
        (
            {"images/train": "train/images", "labels/train": "train/labels", "images/val": "valid/images"},
            ["train", "val"],
        ),
        ({"images/train": "images/train2017", "labels/train": "labels/train2017"}, ["train", "val"]),
        (
            {"images/train": "images2", "images/val": "gone", "images2": "images/a", "labels/train": "labels/a"},
            ["train"],
        ),
    ],
    ids=["roboflow", "coco128", "flat"],
)
def test_yolo_folders_stand_in_several_ways(yolo, tmp_path, moves, splits):
    if "images/val" in moves and moves["images/val"] == "valid/images":
        moves = {**moves, "labels/val": "valid/labels"}
    for old, new in moves.items():
        (yolo / new).parent.mkdir(exist_ok=True)
        (yolo / old).rename(yolo / new)
    (yolo / "data.yaml").write_text("names: [ant, bee, cow]\ntrain:\n")
    found = import_data(yolo, tmp_path / "coco")
    assert list(found.splits) == splits
    assert (found.splits["train"]["pictures"], found.splits["train"]["objects"]) == (3, 9)


def test_yolo_validation_in_the_training_folder_is_left_out(yolo, tmp_path):
    (yolo / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [ant, bee, cow]\n")
    found = import_data(yolo, tmp_path / "coco")
    assert list(found.splits) == ["train"]
    assert list(found.notes.values()) == [["images/train"]]


def test_yolo_folders_that_data_yaml_names_are_taken_or_refused(yolo, tmp_path):
    def name(text):
        (yolo / "data.yaml").write_text(f"{text}\nnames: [ant, bee, cow]\n")

    (yolo / "images" / "train").rename(yolo / "images" / "most")
    (yolo / "labels" / "train").rename(yolo / "labels" / "most")
    for number, value in enumerate(("../images/most", "./images/most", yolo / "images" / "most")):
        name(f"train: {value}\nval: images/val")
        assert list(import_data(yolo, tmp_path / str(number)).splits) == ["train", "val"]
    refused = ("train: [images/most]", "train: most.txt", f"train: {tmp_path}", "train: ../../x", "train: images/gone")
    for text in (*refused, "train: images/most\nval: ../valid/images"):
        name(text)
        with pytest.raises(ValueError, match=r"data.yaml: (train|val) is .*, which is no folder in .*: name one"):
            import_data(yolo, tmp_path / "coco")


def test_yolo_test_folder_is_noted(yolo, tmp_path):
    save_picture(yolo / "images" / "test" / "9.png", (9, 9))
    assert import_data(yolo, tmp_path / "coco").notes == {yolo_format.TEST_SPLIT: ["images/test"]}


def test_huge_mask_is_one_sentence(voc, tmp_path):
    (voc / "SegmentationObject").mkdir()
    (voc / "SegmentationObject" / "0.png").write_bytes(b"P5 100000 100000 255\n")  # Pillow's error is of its own kind
    with pytest.raises(ValueError, match=r"instance mask .*0.png cannot be read: Image size \(10000000000 pixels\)"):
        import_data(voc, tmp_path / "coco")


def test_pictures_are_linked_or_copied(yolo, tmp_path, monkeypatch):
    source = yolo / "images" / "train" / "0.png"
    linked = import_data(yolo, tmp_path / "linked").output / "train" / "0.png"
    assert linked.samefile(source)
    copied = import_data(yolo, tmp_path / "copied", copy=True).output / "train" / "0.png"
    assert not copied.samefile(source)
    assert copied.read_bytes() == source.read_bytes()

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    elsewhere = import_data(yolo, tmp_path / "elsewhere").output / "train" / "0.png"
    assert elsewhere.is_symlink()
    assert elsewhere.samefile(source)


def test_output_stays_away_until_it_is_complete(yolo, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importing, "write_atomically", fail)
    with pytest.raises(OSError, match="No space left"):
        import_data(yolo, tmp_path / "coco")
    assert [path.name for path in tmp_path.iterdir()] == ["yolo"]
    monkeypatch.undo()
    (tmp_path / "coco").mkdir()
    output = import_data(yolo, tmp_path / "coco").output
    assert output.stat().st_mode & 0o777 == 0o755
    with pytest.raises(FileExistsError, match="holds something already: name a new folder"):
        import_data(yolo, output)


XML = "<annotation><size><width>60</width><height>40</height></size>{}</annotation>"
BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>9</ymax></bndbox>"


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("Annotations/0.xml", "<annotation><size>", "0.xml cannot be read: no element found: line 1, column 18"),
        ("Annotations/0.xml", b"<a>\xff</a>", "0.xml cannot be read: not well-formed"),
        (
            "Annotations/0.xml",
            '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]>' + XML.format("&c;"),
            "0.xml cannot be read: it has a DOCTYPE",
        ),
        ("Annotations/0.xml", XML.format("<object><name>ant</name></object>"), "object 1 .ant. has xmin None"),
        ("Annotations/0.xml", XML.format(f"<object>{BOX.format(9)}</object>"), "0.xml: object 1 has no name"),
        (
            "Annotations/0.xml",
            XML.format(f"<object><name>ant</name>{BOX.format('nan')}</object>"),
            r"0.xml: object 1 \(ant\) has xmax 'nan'; it must be a number",
        ),
        ("Annotations/0.xml", XML.format("").replace("60", "61"), "0.xml: its size is 61x40, and 0.jpg has 60x40"),
        ("Annotations/0.xml", XML.format("").replace("60", "wide"), "0.xml: its size is wide x 40"),
        ("ImageSets/Main/train.txt", "0\n1\n7\n", "train.txt, line 3: there is no picture 7 in JPEGImages"),
        ("ImageSets/Main/train.txt", b"\xff", "train.txt is no text in UTF-8"),
        ("SegmentationObject/0.png", (59, 40), "0.png has 59x40 pixels, not 60x40"),
        ("SegmentationObject/0.png", b"png", "instance mask .*0.png cannot be read"),
        ("JPEGImages/0.png", b"png", "would share a label: their names must differ"),
        ("labels/0.txt", "", "looks like voc and yolo: name the format"),
    ],
)
def test_broken_voc_is_one_sentence(voc, tmp_path, file, content, sentence):
    path = voc / file
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, tuple):
        Image.new("L", content).save(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        import_data(voc, tmp_path / "coco")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "coco").exists()


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("labels/train/1.txt", "0 .5 .5 .1 .1\n3 .5 .5 .1 .1", "1.txt, line 2: class 3 is not one of 0 to 2"),
        ("labels/train/1.txt", "-1 .5 .5 .1 .1", "1.txt, line 1: class -1 is not one of 0 to 2"),
        ("labels/train/1.txt", "0.5 .5 .5 .1 .1", "1.txt, line 1: class 0.5 is not one of 0 to 2"),
        ("labels/train/1.txt", "nan .5 .5 .1 .1", "1.txt, line 1: class nan is not one of 0 to 2"),
        ("labels/train/1.txt", "0 .5 .5 1.01 .1", "1.txt, line 1: 1.01 is outside 0 to 1"),
        ("labels/train/1.txt", "0 .5 nan .1 .1", "1.txt, line 1: nan is outside 0 to 1"),
        ("labels/train/1.txt", "0 .5 .5 .1", "1.txt, line 1: 4 numbers; a box has 5"),
        ("labels/train/1.txt", "0 .5 .5 .1 .1 .9", "1.txt, line 1: 6 numbers; a box has 5"),
        ("labels/train/1.txt", "0 .5 .5 .1 .1 .9 .9 .9", "1.txt, line 1: 8 numbers; a box has 5"),
        ("labels/train/1.txt", "ant .5 .5 .1 .1", "1.txt, line 1: 'ant .5 .5 .1 .1' is no row of numbers"),
        ("labels/train/1.txt", b"\xff\xfe", "1.txt is no text in UTF-8"),
        ("data.yaml", "names: [a, b, a]", "data.yaml: class names must differ"),
        ("data.yaml", "names: {0: a, 2: b}", r"data.yaml: names must be numbered from 0 to 1, got \[0, 2\]"),
        ("data.yaml", "names: 3", "data.yaml: names must be a list of texts"),
        ("data.yaml", "names: [[a], b]", "data.yaml: names must be a list of texts"),
        ("data.yaml", "names: [a", "data.yaml is no YAML"),
        ("data.yaml", "- a", "data.yaml must hold names"),
        ("data.yaml", "names: [ant, bee, cow]\nkpt_shape: [17, 3]", "data.yaml is of poses, as its kpt_shape says"),
        ("data.yaml", "nc: 3", "no class names in .*: looked for names in data.yaml, and for classes.txt"),
    ],
)
def test_broken_yolo_is_one_sentence(yolo, tmp_path, file, content, sentence):
    (yolo / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        import_data(yolo, tmp_path / "coco")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "coco").exists()


def test_other_folders_are_refused_in_a_sentence(yolo, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of data at"):
        import_data(tmp_path / "nothing", tmp_path / "coco")
    with pytest.raises(ValueError, match="is not clear: voc has the folders JPEGImages and Annotations"):
        import_data(tmp_path, tmp_path / "coco")
    with pytest.raises(ValueError, match="format 'xml' is not one of voc, yolo"):
        import_data(yolo, tmp_path / "coco", format="xml")
    with pytest.raises(FileNotFoundError, match=r"no folder of pictures at .*JPEGImages"):
        import_data(yolo, tmp_path / "coco", format="voc")
    output = import_data(yolo, tmp_path / "coco").output
    with pytest.raises(ValueError, match="seems to be in COCO's format already, which needs no import"):
        import_data(output, tmp_path / "again")
    for label in (yolo / "labels").rglob("*.txt"):
        label.write_text("")
    with pytest.raises(ValueError, match="has no object to import"):
        import_data(yolo, tmp_path / "empty")
    (yolo / "labels" / "val" / "3.txt").unlink()
    (yolo / "labels" / "val").rmdir()
    with pytest.raises(FileNotFoundError, match=r"no folder of labels at .*labels/val, for the pictures of"):
        import_data(yolo, tmp_path / "empty")
