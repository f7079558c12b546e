import errno
import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasternet.data import packing
from fasternet.data.datasets import create_datasets, create_validation_dataset
from fasternet.data.packing import Packed, pack_shards


def test_shards_hold_the_bytes_labels_and_names_of_the_source(tmp_path: Path, shards: Path) -> None:
    source, packed = create_datasets(tmp_path / "tree"), create_datasets(shards)
    assert packed.class_names == packed.train.class_names == ("a", "b")
    assert packed.preprocessing_defaults == source.preprocessing_defaults
    assert (len(packed.train), len(packed.validation)) == (40, 6)
    assert packed.validation.paths == source.validation.paths
    assert packed.validation.labels == source.validation.labels
    assert [packed.validation.read(i) for i in range(6)] == [source.validation.read(i) for i in range(6)]
    members = {}
    for path in sorted(shards.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    assert len(members) == 80
    for index, (path, label) in enumerate(zip(source.train.paths, source.train.labels, strict=True)):
        assert members[path.as_posix()] == source.train.read(index)
        assert members[path.with_suffix(".cls").as_posix()] == str(label).encode()
    order = [name for name in members if name.endswith(".png")]
    assert order != sorted(order)


def test_equal_seeds_give_equal_shards_that_match_their_hashes(tmp_path: Path, shards: Path) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        pack_shards(tmp_path / "tree", tmp_path / name, images_per_shard=6, seed=seed)
    contents, again, other = (
        json.loads((tmp_path / n / "shards.json").read_text()) for n in ("shards", "again", "other")
    )
    assert contents == again
    assert contents["train"] != other["train"]
    assert contents["validation"] == other["validation"]
    for shard in contents["train"] + contents["validation"]:
        assert hashlib.sha256((shards / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
    assert [shard["num_images"] for shard in contents["train"]] == [6] * 6 + [4]


@pytest.mark.filterwarnings("ignore")
def test_webdataset_reads_our_shards(shards: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    dataset = webdataset.WebDataset(str(shards / "val-000000.tar"), shardshuffle=False).decode("pil")
    samples = list(dataset.to_tuple("__key__", "png", "cls"))
    assert [key for key, _, _ in samples] == [f"{'ab'[i % 2]}/{i:02}" for i in (0, 2, 4, 1, 3, 5)]
    assert [(image.getpixel((0, 0)), label) for _, image, label in samples[:4]] == [
        ((0, 1, 0), 0), ((2, 1, 0), 0), ((4, 1, 0), 0), ((1, 1, 0), 1)
    ]  # fmt: skip


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.multiprocess)])
def test_unreadable_pictures_are_named_and_left_out(create_tree, tmp_path: Path, num_workers: int) -> None:
    tree = create_tree(tmp_path / "tree")
    for name in ("train/a/04.png", "val/b/03.png"):
        (tree / name).write_text("text")
    (tree / "train/b/07.png").write_bytes(b"")
    done = []
    packed = pack_shards(tree, tmp_path / "out", num_workers=num_workers, progress=lambda *counts: done.append(counts))
    sentences = {
        f"cannot read {tree}/train/a/04.png: it is no picture of a known format",
        f"cannot read {tree}/val/b/03.png: it is no picture of a known format",
        f"cannot read {tree}/train/b/07.png: the file is empty",
    }
    assert set(packed.unreadable) == sentences
    assert packed == Packed(tmp_path / "out", 38, 5, 2, packed.unreadable)
    assert json.loads((tmp_path / "out/shards.json").read_text())["unreadable"] == list(packed.unreadable)
    assert done == [(number, 46) for number in range(1, 47)]
    assert len(create_datasets(tmp_path / "out").train) == 38


def test_digits_and_their_preprocessing_are_packed(tmp_path: Path) -> None:
    packed = pack_shards("digits", tmp_path / "digits.shards")
    source, copy = create_datasets("digits"), create_datasets(tmp_path / "digits.shards")
    assert (packed.num_train, packed.num_shards) == (len(source.train), 3)
    assert copy.preprocessing_defaults == source.preprocessing_defaults
    assert [path.stem for path in copy.validation.paths] == [path.name for path in source.validation.paths]
    assert np.array_equal(copy.validation.load(7), source.validation.load(7))


def test_names_that_webdataset_would_mix_up_stay_apart(create_tree, tmp_path: Path) -> None:
    tree = create_tree(tmp_path / "tree", 2, 2)
    for name in ("x.y.png", "x_y.png", "x_y.BMP", "ü.png"):
        Image.new("RGB", (3, 3)).save(tree / "val" / "a" / name)
    pack_shards(tree, tmp_path / "out")
    names = [path.as_posix() for path in create_validation_dataset(tmp_path / "out").paths]
    assert names == ["a/00.png", "a/x_y.png", "a/x_y-2.bmp", "a/x_y-3.png", "a/ü.png", "b/01.png"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_packing_leaves_nothing(create_tree, tmp_path: Path, monkeypatch, error: BaseException) -> None:
    tree = create_tree(tmp_path / "tree")
    add, calls = packing._add, []

    def fail(*args) -> None:
        calls.append(args)
        if len(calls) == 30:
            raise error
        add(*args)

    monkeypatch.setattr(packing, "_add", fail)
    with pytest.raises(type(error)):
        pack_shards(tree, tmp_path / "out", images_per_shard=3)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_remains_of_a_killed_packing_are_replaced_but_nothing_else_is(create_tree, tmp_path: Path) -> None:
    tree, partial = create_tree(tmp_path / "tree"), tmp_path / "out.partial"
    partial.mkdir()
    (partial / "train-000099.tar").write_text("half")
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out\.partial is in the way; shards are written there"):
        pack_shards(tree, tmp_path / "out")
    (partial / "notes.txt").unlink()
    pack_shards(tree, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "shards.json", "train-000000.tar", "val-000000.tar"
    ]  # fmt: skip
    assert not partial.exists()


def test_packing_refuses_what_it_cannot_do_in_one_sentence(tmp_path: Path, shards: Path) -> None:
    tree = tmp_path / "tree"
    with pytest.raises(FileExistsError, match=r"output .*/shards exists already; give a new or empty folder"):
        pack_shards(tree, shards)
    with pytest.raises(ValueError, match=r"data .*/shards is packed already"):
        pack_shards(shards, tmp_path / "out")
    with pytest.raises(ValueError, match="images_per_shard=0 must be at least 1"):
        pack_shards(tree, tmp_path / "out", images_per_shard=0)
    for path in (tree / "val").rglob("*.png"):
        path.write_text("text")
    with pytest.raises(ValueError, match=r"none of the 6 val pictures of data .* can be read"):
        pack_shards(tree, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The stream
