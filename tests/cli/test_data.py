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
