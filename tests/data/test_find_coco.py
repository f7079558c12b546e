"""Which annotation files of a folder are found: the training part, the validation part, or neither."""

from pathlib import Path

import pytest

from fasternet.data.coco import find_coco


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ["annotations/instances_train2017.json", "annotations/instances_val2017.json", "annotations/captions.json"],
            2,
        ),
        (["annotations/instances_train2017.json"], 1),
        (["trainval.json"], 1),
        (["train.json", "val.json", "test.json"], 2),
        (["trainval.json", "test.json"], 2),
        (["train/_annotations.coco.json", "valid/_annotations.coco.json", "test/_annotations.coco.json"], 2),
        (["train/a.json", "test/a.json"], 2),
        (["train/a.json"], 1),
    ],
)
def test_annotation_files_are_found(files: list[str], expected: int, tmp_path: Path) -> None:
    for file in files:
        touch(tmp_path / file)
    found = [tmp_path / file for file in files[:expected]]
    assert find_coco(tmp_path) == (found[0], found[1] if expected == 2 else None)
    assert find_coco(found[0]) == (found[0], None)


def test_what_macos_puts_beside_files_is_passed_over(tmp_path: Path) -> None:
    for file in ("train/._a.json", "train/a.json", "val/._a.json", "val/a.json"):
        touch(tmp_path / file)
    assert find_coco(tmp_path) == (tmp_path / "train/a.json", tmp_path / "val/a.json")


@pytest.mark.parametrize(
    "files", [["a.json", "b.json"], ["train1.json", "train2.json"], ["train/a.json", "train/b.json"]]
)
def test_several_annotation_files_are_listed(files: list[str], tmp_path: Path) -> None:
    for file in files:
        touch(tmp_path / file)
    with pytest.raises(ValueError, match=rf"is not clear \({', '.join(files)}\): name one$"):
        find_coco(tmp_path)


def test_a_folder_without_annotations_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^no annotation file in folder .*train/\*\.json$"):
        find_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^no annotation file or folder at "):
        find_coco(tmp_path / "absent")
