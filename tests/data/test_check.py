import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasternet.data.check import KINDS, Check, check_data, save_check
from fasternet.records import load_records


def paint(seed: int, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes in two splits, with one of everything that is wrong or odd."""
    root = tmp_path_factory.mktemp("data") / "zoo"
    for number, folder in enumerate(("train/ant", "train/bee", "val/ant", "val/bee")):
        (root / folder).mkdir(parents=True)
        for place in range(3):
            paint(10 * number + place).save(root / folder / f"{place}.png")
    train = root / "train" / "ant"
    (train / "empty.jpg").write_bytes(b"")
    (train / "cut.png").write_bytes((train / "0.png").read_bytes()[:2000])
    paint(100, (8, 8)).save(train / "small.png")
    paint(101, (300, 40)).save(train / "long.png")
    paint(102, mode="L").save(train / "grey.png")
    paint(103, mode="CMYK").save(train / "cmyk.jpg")
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(train / "deep.png")
    paint(104, mode="RGBA").save(train / "glass.png")
    paint(105).save(train / "film.gif", save_all=True, append_images=[paint(106)])
    exif = Image.Exif()
    exif[0x0112] = 6
    paint(107).save(train / "turned.jpg", exif=exif)
    paint(108).save(train / "liar.jpg", "PNG")
    (train / "notes.txt").write_text("text")
    (train / ".hidden.png").write_text("text")
    paint(0).save(train / "twin of 0.bmp")  # the same pixels in another format
    paint(1).save(root / "val" / "ant" / "leak.png")
    paint(10).save(root / "train" / "ant" / "conflict.png")
    return root


@pytest.fixture(scope="module")
def found(tree: Path) -> Check:
    return check_data(tree)


def test_check_counts_classes_by_split(found: Check) -> None:
    assert found.counts == {"train": {"ant": 16, "bee": 3}, "val": {"ant": 4, "bee": 3}}
    values = found.values()
    assert (values["num_images"], values["num_classes"]) == (26, 2)
    assert values["imbalance"] == {"train": pytest.approx(16 / 3), "val": pytest.approx(4 / 3)}
    assert sum(found.formats.values()) == sum(found.modes.values()) == sum(values["sides"].values()) == 24
    assert values["sides"] == {"1 to 31": 1, "32 to 63": 22, "64 to 127": 1}


@pytest.mark.parametrize(
    ("kind", "paths", "remark"),
    [
        ("unreadable", ["train/ant/empty.jpg"], "the file is empty"),
        ("unreadable", ["train/ant/cut.png"], "truncated"),
        ("small", ["train/ant/small.png"], "8 x 8"),
        ("long", ["train/ant/long.png"], "300 x 40"),
        ("grey", ["train/ant/grey.png"], "L"),
        ("grey", ["train/ant/deep.png"], "I;16"),
        ("16 bits", ["train/ant/deep.png"], "I;16"),
        ("cmyk", ["train/ant/cmyk.jpg"], ""),
        ("transparent", ["train/ant/glass.png"], "RGBA"),
        ("animated", ["train/ant/film.gif"], "2 frames"),
        ("turned", ["train/ant/turned.jpg"], "orientation 6"),
        ("suffix", ["train/ant/liar.jpg"], "holds PNG"),
        ("passed over", ["train/ant/notes.txt"], ".txt"),
        ("duplicate", ["train/ant/0.png", "train/ant/twin of 0.bmp"], "2 times"),
        ("across splits", ["train/ant/1.png", "val/ant/leak.png"], "train, val"),
        ("across classes", ["train/ant/conflict.png", "train/bee/0.png"], "ant, bee"),
    ],
)
def test_check_finds_each_kind_once(found: Check, kind: str, paths: list[str], remark: str) -> None:
    (finding,) = [f for f in found.findings if f.kind == kind and list(f.paths) == paths]
    assert remark in finding.remark


def test_check_finds_nothing_else(found: Check) -> None:
    assert len(found.findings) == 16
    assert {finding.kind for finding in found.findings} == set(KINDS) - {"structure"}
    assert [finding.kind for finding in found.errors] == ["unreadable", "unreadable"]


def test_check_by_processes_finds_the_same(tree: Path, found: Check) -> None:
    assert check_data(tree, num_workers=2) == found


def test_folder_that_training_refuses_is_an_error(tmp_path: Path) -> None:
    for folder in ("train/ant", "train/bee", "val/ant", "val/wasp"):
        (tmp_path / "zoo" / folder).mkdir(parents=True)
        paint(len(folder) + ord(folder[-1])).save(tmp_path / "zoo" / folder / "0.png")
    found = check_data(tmp_path / "zoo")
    assert [finding.kind for finding in found.errors] == ["structure"]
    assert found.errors[0].remark.startswith("zoo/train and zoo/val must hold the same classes")
    assert found.counts["val"] == {"ant": 1, "wasp": 1}


@pytest.mark.parametrize(
    ("folders", "remark", "counts"),
    [
        (
            ("seg_train/ant", "seg_train/bee", "seg_test/ant", "seg_test/bee"),
            "zoo looks like splits, not classes",
            {"seg_train": 2, "seg_test": 2},
        ),
        (("train", "val"), "zoo/train must hold a folder of pictures per class, but holds none", {}),
    ],
)
def test_tree_that_is_misnamed_is_reported(
    tmp_path: Path, folders: tuple[str, ...], remark: str, counts: dict[str, int]
) -> None:
    for number, folder in enumerate(folders):
        (tmp_path / "zoo" / folder).mkdir(parents=True)
        paint(number).save(tmp_path / "zoo" / folder / "0.png")
    found = check_data(tmp_path / "zoo")
    assert [finding.kind for finding in found.errors] == ["structure"]
    assert remark in found.errors[0].remark
    assert found.counts.get("all", {}) == counts


def test_splits_in_capitals_are_splits(tmp_path: Path) -> None:
    for number, folder in enumerate(("Training/ant", "Training/bee", "Testing/ant", "Testing/bee")):
        (tmp_path / folder).mkdir(parents=True)
        paint(number).save(tmp_path / folder / "0.png")
    found = check_data(tmp_path)
    assert found.counts == {"Training": {"ant": 1, "bee": 1}, "Testing": {"ant": 1, "bee": 1}}
    assert not found.findings


def test_pipes_and_loops_are_named(tmp_path: Path) -> None:
    for number, folder in enumerate(("ant", "bee")):
        (tmp_path / folder).mkdir()
        for place in range(2):
            paint(10 * number + place).save(tmp_path / folder / f"{place}.png")
    os.mkfifo(tmp_path / "ant" / "pipe.png")
    (tmp_path / "bee" / "pipe.png").symlink_to("../ant/pipe.png")
    (tmp_path / "ant" / "loop").symlink_to(".")
    (tmp_path / "above").symlink_to("..")
    found = check_data(tmp_path)
    assert [(f.kind, f.remark, f.paths) for f in found.findings] == [
        ("passed over", "a link to a folder above it", ("above",)),
        ("passed over", "a link to a folder above it", ("ant/loop",)),
        ("passed over", "no regular file", ("ant/pipe.png",)),
        ("passed over", "no regular file", ("bee/pipe.png",)),
    ]
    assert found.counts == {"all": {"ant": 2, "bee": 2}}


def test_folder_without_splits_has_one(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(2):
            paint(number, mode="RGB").save(tmp_path / name / f"{number}.png")
    found = check_data(tmp_path)
    assert found.counts == {"all": {"ant": 2, "bee": 2}}
    assert [(f.kind, f.paths) for f in found.findings] == [
        ("across classes", ("ant/0.png", "bee/0.png")),
        ("across classes", ("ant/1.png", "bee/1.png")),
    ]
    assert not found.errors


def test_check_refuses_what_is_no_folder_of_pictures(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data folder at"):
        check_data(tmp_path / "none")
    with pytest.raises(ValueError, match="must hold a folder of pictures per class, but holds none"):
        check_data(tmp_path)
    (tmp_path / "shards.json").write_text("{}")
    with pytest.raises(ValueError, match="packed shards are checked before they are packed"):
        check_data(tmp_path)


def test_saved_check_has_thumbnails_of_findings_and_classes(tree: Path, found: Check, tmp_path: Path) -> None:
    file = save_check(found, tree, tmp_path / "check")
    summary, *pictures = load_records(file)
    assert {(r.suite, r.kind) for r in (summary, *pictures)} == {("data", "data_check")}
    assert summary.values == json.loads(json.dumps(found.values()))
    by_path = {record.subject: record for record in pictures}
    assert len(by_path) == len(pictures)
    shown = {path for f in found.findings if f.kind != "passed over" for path in f.paths}
    shown |= {path for paths in found.examples.values() for path in paths}
    assert set(by_path) == shown
    assert by_path["train/ant/empty.jpg"].attachments == {}
    assert by_path["train/ant/empty.jpg"].values["is_error"]
    with Image.open(file.parent / by_path["train/ant/long.png"].attachments["picture"]) as thumbnail:
        assert thumbnail.size == (160, 21)
    assert str(tree.parent) not in file.read_text().replace(json.dumps(summary.command), "")
    with pytest.raises(FileExistsError, match="holds something already"):
        save_check(found, tree, tmp_path / "check")
