import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from fasternet.cli.data import data
from fasternet.records import load_records
from fasternet.report.data import show_data
from fasternet.report.sources import load_sources


def run(*arguments: object) -> Result:
    return CliRunner().invoke(data, [*map(str, arguments), "--num-workers", "0"])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes in two splits; nothing is wrong."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "<bee>"):
            folder = tmp_path / "zoo" / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "zoo"


def test_check_of_a_sound_folder_ends_with_0(tree: Path) -> None:
    result = run("check", tree)
    assert result.exit_code == 0, result.exception
    assert "zoo: 8 pictures, 2 classes; training would trip over 0 of 0 findings" in result.stdout
    assert "largest by smallest class" in result.stdout


def test_check_ends_with_1_where_training_would_trip(tree: Path) -> None:
    (tree / "train" / "ant" / "bad.jpg").write_text("text")
    result = run("check", tree)
    assert result.exit_code == 1
    assert "train/ant/bad.jpg" in result.stdout
    assert "it is no picture of a known format" in result.stdout
    assert "training would trip over 1 of 1 findings" in result.stdout


def test_check_reports_a_tree_without_a_picture_in_its_place(tree: Path) -> None:
    for split in ("train", "val"):
        for picture in (tree / split).glob("*/*.png"):
            picture.rename(tree / split / f"{picture.parent.name}{picture.name}")
    result = run("check", tree, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["kinds"]["structure"]["count"] == document["num_errors"] == 1
    assert document["findings"][1]["remark"] == "beside the folders of the classes"


def test_check_ends_with_0_where_pictures_are_merely_odd_or_twice(tree: Path) -> None:
    (tree / "val" / "ant" / "copy.png").write_bytes((tree / "train" / "ant" / "0.png").read_bytes())
    Image.new("L", (4, 4)).save(tree / "train" / "ant" / "dot.png")
    result = run("check", tree)
    assert result.exit_code == 0
    assert "one picture in several splits: the evaluation is no longer fair: 1" in result.stdout
    assert "train/ant/0.png  val/ant/copy.png" in result.stdout


def test_check_prints_one_json_document(tree: Path) -> None:
    document = json.loads(run("check", tree, "--json").stdout)
    assert document["splits"] == {split: {"<bee>": 2, "ant": 2} for split in ("train", "val")}
    assert (document["num_images"], document["num_errors"], document["findings"]) == (8, 0, [])


def test_check_writes_records_and_a_page(tree: Path, tmp_path: Path) -> None:
    (tree / "train" / "ant" / "bad.jpg").write_text("text")
    output = tmp_path / "check"
    result = run("check", tree, "-o", output)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == str(output / "check.html")
    assert (output / "check.html").is_file()
    assert len(load_records(output / "check.jsonl")) == 10
    page = "".join(show_data(load_sources([output]), {}))
    assert page.count("data:image/jpeg;base64,") == 8  # four of each class
    assert page.count('class="missing"') == page.count('class="wrong"') == 1
    assert "unreadable: it is no picture of a known format" in page
    assert "Class &lt;bee&gt;" in page
    assert "<bee>" not in page
    again = run("check", tree, "-o", output)
    assert isinstance(again.exception, FileExistsError)


def test_pack_makes_shards_and_names_what_it_left_out(tree: Path, tmp_path: Path) -> None:
    (tree / "train" / "ant" / "bad.jpg").write_text("text")
    result = run("pack", tree, tmp_path / "shards", "--images-per-shard", 3)
    assert result.exit_code == 0, result.exception
    assert result.stdout.splitlines()[-1] == str(tmp_path / "shards")
    assert "left out, as they cannot be read: 1" in result.stderr
    assert (tmp_path / "shards" / "shards.json").is_file()


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Two pictures to train and one to validate, a box in each, and one box without area."""
    root = tmp_path / "yolo"
    for split, numbers in (("train", (0, 1)), ("val", (2,))):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for number in numbers:
            Image.new("RGB", (40, 30), "green").save(root / "images" / split / f"{number}.png")
            (root / "labels" / split / f"{number}.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    (root / "labels" / "train" / "1.txt").write_text("1 0.5 0.5 0.5 0.5\n0 0.5 0.5 0 0.5\n")
    (root / "data.yaml").write_text("names: [ant, bee]\n")
    return root


def import_(*arguments: object) -> Result:
    return CliRunner().invoke(data, ["import", *map(str, arguments)])


def test_import_makes_coco_that_check_takes(yolo: Path, tmp_path: Path) -> None:
    output = tmp_path / "coco"
    result = import_(yolo, "-o", output)
    assert result.exit_code == 0, result.exception
    assert result.stdout.splitlines()[-2:] == ["2 classes: ant, bee", str(output)]
    assert f"no area within the picture: 1\n  {yolo / 'labels' / 'train' / '1.txt'}, line 2" in result.stderr
    result = run("check", output)
    assert result.exit_code == 0, result.exception
    assert "coco: training would trip over 0 findings" in result.stdout
    document = json.loads(run("check", output / "annotations" / "instances_val.json", "--json").stdout)
    assert (document["splits"]["train"]["num_objects"], document["errors"]) == (1, [])
    again = import_(yolo, "-o", output)
    assert isinstance(again.exception, FileExistsError)


def test_import_takes_its_options(yolo: Path, tmp_path: Path) -> None:
    wrong = import_(yolo, "-o", tmp_path / "a", "--format", "voc")
    assert "no folder of pictures at" in str(wrong.exception)
    assert import_(yolo, "-o", tmp_path / "a", "--format", "csv").exit_code == 2
    maskless = import_(yolo, "-o", tmp_path / "a", "--masks")
    assert "has no training picture to import" in str(maskless.exception)
    (yolo / "labels" / "train" / "0.txt").write_text("0 0.1 0.1 0.9 0.1 0.5 0.9\n")
    result = import_(yolo, "-o", tmp_path / "a", "--masks", "--copy", "--format", "yolo")
    assert result.exit_code == 0, result.exception
    assert [path.name for path in (tmp_path / "a" / "train").iterdir()] == ["0.png"]
    assert not (tmp_path / "a" / "train" / "0.png").samefile(yolo / "images" / "train" / "0.png")
    assert "pictures left out: an object has no mask: 2" in result.stderr


def test_check_of_coco_ends_with_1_where_training_would_trip(yolo: Path, tmp_path: Path) -> None:
    output = tmp_path / "coco"
    import_(yolo, "-o", output, "--copy")
    (output / "train" / "0.png").write_text("text")
    (output / "val" / "2.png").unlink()
    result = run("check", output)
    assert result.exit_code == 1
    assert "0.png: it is no picture of a known format" in result.stdout
    assert "2.png is missing" in result.stdout
    assert "coco: training would trip over 2 findings" in result.stdout
    (output / "annotations" / "instances_val.json").write_text("{")
    document = json.loads(run("check", output, "--json").stdout)
    assert len(document["errors"]) == 2
    refused = run("check", output, "-o", tmp_path / "page")
    assert "a page is made of folders of classes; --json prints all of" in str(refused.exception)


def test_check_takes_a_json_file_beside_classes_for_what_it_is(tree: Path) -> None:
    (tree / "names.json").write_text('{"ant": "Formicidae"}')
    result = run("check", tree)
    assert result.exit_code == 0, result.exception
    assert "zoo: 8 pictures, 2 classes" in result.stdout
