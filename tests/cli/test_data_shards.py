"""``fasternet data check`` and ``index`` of packed shards."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from fasternet.cli.data import data
from fasternet.data.packing import pack_shards


def run(*arguments: object) -> Result:
    return CliRunner().invoke(data, [*map(str, arguments)])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards for training, one for validation, of two pictures each."""
    for number in range(6):
        path = tmp_path / "tree" / ("val" if number > 3 else "train") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    return pack_shards(tmp_path / "tree", tmp_path / "shards", images_per_shard=2).output


def test_check_compares_the_hashes_of_shards(shards: Path) -> None:
    result = run("check", shards)
    assert (result.exit_code, result.stdout) == (
        0, f"{shards}: 3 shards, of which 0 are not as shards.json describes them\n"
    )  # fmt: skip
    path = shards / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    os.truncate(shards / "val-000000.tar", 100)
    result = run("check", f"{shards}/", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (document["num_shards"], document["num_images"]) == (3, 6)
    assert document["errors"][0].endswith(
        "train-000001.tar is not the one that shards.json describes: its SHA-256 differs"
    )
    assert "val-000000.tar is not the one that shards.json describes: it has 100 bytes" in document["errors"][1]
    assert "train-000001.tar" in run("check", shards).stdout
    assert "a page is made of folders of classes" in str(run("check", shards, "-o", "page").exception)


def test_index_lists_shards_anew(shards: Path, tmp_path: Path) -> None:
    (shards / "shards.json").unlink()
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    result = run("index", shards, "--classes", tmp_path / "names.txt")
    assert result.exit_code == 0, result.exception
    assert result.stdout.splitlines()[-1] == str(shards)
    assert json.loads((shards / "shards.json").read_text())["class_names"] == ["ant", "bee"]
    assert run("check", shards).exit_code == 0
