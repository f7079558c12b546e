"""Shards of other tools: labels from .cls or .json, numbers or names, listed as our own."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from fasternet.data.datasets import create_datasets
from fasternet.data.indexing import index_shards
from fasternet.data.packing import Packed
from fasternet.data.shards import ShardLoader

NUMBERS = [{"cls": "2"}, {"cls": "0\n"}, {"json": '{"label": 2}'}, {"json": '{"cls": "1"}'}]
NAMES = [{"cls": "cat"}, {"cls": "ant"}, {"json": '{"class_name": "cat"}'}, {"json": '{"caption": 1, "label": "bee"}'}]


def write_shard(path: Path, labels: list[dict[str, str]]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(labels):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(picture, "PNG")
            for suffix, content in [("png", picture.getvalue()), *((s, text.encode()) for s, text in members.items())]:
                info = tarfile.TarInfo(f"{number:04}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_shards(folder: Path, labels: list[dict[str, str]]) -> Path:
    folder.mkdir()
    for name in ("train-0000.tar", "train_1.tar", "val-0000.tar", "test-0000.tar"):
        write_shard(folder / name, labels)
    return folder


def read_labels(folder: Path) -> tuple[list[int], list[int]]:
    """Return the labels of the pictures in order, as training and as validation sees them."""
    datasets = create_datasets(folder)
    datasets.train.transform = lambda image: image.getpixel((0, 0))[0]
    (parts,) = ShardLoader(datasets.train, 8).batches(0)
    pairs = sorted(zip(*(part.tolist() for part in parts), strict=True))
    return [label for _, label in pairs[::2]], datasets.validation.labels


@pytest.mark.parametrize(
    ("labels", "class_names", "expected"),
    [(NUMBERS, ("0", "1", "2"), [2, 0, 2, 1]), (NAMES, ("ant", "bee", "cat"), [2, 0, 2, 1])],
)
def test_shards_of_others_are_data_sets_once_they_are_listed(tmp_path: Path, labels, class_names, expected) -> None:
    folder, done = write_shards(tmp_path / "foreign", labels), []
    assert index_shards(folder, progress=lambda *counts: done.append(counts)) == Packed(folder, 8, 4, 3, ())
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert create_datasets(folder).class_names == class_names
    assert read_labels(folder) == (expected, expected)
    contents = json.loads((folder / "shards.json").read_text())
    assert [shard["name"] for shard in contents["train"]] == ["train-0000.tar", "train_1.tar"]
    with pytest.raises(FileExistsError, match=r"shards\.json exists already: the shards are listed"):
        index_shards(folder)


@pytest.mark.parametrize(("labels", "expected"), [(NUMBERS, [2, 0, 2, 1]), (NAMES, [0, 2, 0, 1])])
def test_classes_of_a_file_give_the_order(tmp_path: Path, labels, expected) -> None:
    folder = write_shards(tmp_path / "foreign", labels)
    (tmp_path / "names.txt").write_text("cat\nbee\n\nant\ndog\n")
    index_shards(folder, classes=tmp_path / "names.txt")
    assert create_datasets(folder).class_names == ("cat", "bee", "ant", "dog")
    assert read_labels(folder) == (expected, expected)


@pytest.mark.parametrize("label", [{}, {"cls": ""}, {"json": "[3]"}, {"json": "{"}, {"json": '{"label": true}'}])
def test_picture_without_a_label_is_one_sentence(tmp_path: Path, label) -> None:
    folder = write_shards(tmp_path / "foreign", [label])
    with pytest.raises(ValueError, match=r"foreign/train-0000\.tar/0000\.png has no label: no KEY\.cls or KEY\.json"):
        index_shards(folder)
    assert not (folder / "shards.json").exists()


def test_what_cannot_be_listed_is_one_sentence(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "foreign", [NUMBERS[0], NAMES[0]])
    with pytest.raises(ValueError, match="labels are numbers and names, such as 2 and cat: give classes"):
        index_shards(folder)
    (tmp_path / "names.txt").write_text("cat\nbee\n")
    with pytest.raises(ValueError, match="has the label 2; it must be one of 0 to 1, or its name"):
        index_shards(folder, classes=tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("cat\ncat\n")
    with pytest.raises(ValueError, match=r"names\.txt must hold the names of two classes or more"):
        index_shards(folder, classes=tmp_path / "names.txt")
    (folder / "train-0000.tar").rename(folder / "train 0.tar")
    with pytest.raises(ValueError, match=r"train 0\.tar must have a name of letters, digits"):
        index_shards(folder)
    (folder / "train 0.tar").write_text("text")
    (folder / "train 0.tar").rename(folder / "train-0.tar")
    with pytest.raises(ValueError, match=r"train-0\.tar is damaged or truncated"):
        index_shards(folder)
    write_shard(folder / "train-0.tar", [])
    with pytest.raises(ValueError, match=r"train-0\.tar holds no pictures"):
        index_shards(folder)
    for path in [*folder.glob("val*"), *folder.glob("test*")]:
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no shards val\*\.tar or .*test\*\.tar in folder .*foreign; rename"):
        index_shards(folder)
    with pytest.raises(FileNotFoundError, match="no folder of shards at"):
        index_shards(tmp_path / "absent")
