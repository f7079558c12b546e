import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasternet.data.datasets import create_dataset, create_datasets, create_validation_dataset
from fasternet.data.images import ImageError, decode_image


def create_tree(root: Path, **num_images: int) -> Path:
    """Make folders of one-colour pictures; ``train__cat=3`` makes three in train/cat, darker by class."""
    for folder, count in num_images.items():
        path = root / folder.replace("__", "/")
        path.mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (6, 5), (index, len(folder), 0)).save(path / f"{index}.png")
    return root


def list_samples(dataset) -> list[tuple[str, int]]:
    return [(path.as_posix(), label) for path, label in zip(dataset.paths, dataset.labels, strict=True)]


def test_digits_are_all_there_split_by_class_without_overlap() -> None:
    datasets = create_datasets("digits")
    train, validation = datasets.train, datasets.validation
    assert datasets.class_names == train.class_names == validation.class_names == tuple("0123456789")
    assert len(train) + len(validation) == len({*train.paths, *validation.paths}) == 1797
    shares = np.bincount(validation.labels) / (np.bincount(train.labels) + np.bincount(validation.labels))
    assert np.abs(shares - 0.2).max() < 0.003
    assert datasets.preprocessing_defaults.input_size == 32
    assert datasets.preprocessing_defaults.crop_ratio == 1


def test_digits_are_scikit_learns_pictures() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    validation = create_datasets("digits").validation
    for index in (0, 100, 358):
        image, label = validation[index]
        number = int(validation.paths[index].name)
        assert (image.mode, image.size, label) == ("RGB", (32, 32), digits.target[number])
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX))[..., 0] / 255 * 16
        assert np.abs(small - digits.images[number]).mean() < 1.5


def test_digits_without_scikit_learn_name_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-learn: pip install 'fasternet\[quickstart\]'$"):
        create_datasets("digits")


@pytest.mark.parametrize(
    ("train", "name"),
    [("train", name) for name in ("val", "valid", "validation", "test", "dev", "Test")]
    + [("training", "testing"), ("Train", "Val"), ("TRAINING", "Test")],
)
def test_train_folder_with_a_validation_folder_is_taken_as_it_is(tmp_path: Path, train: str, name: str) -> None:
    create_tree(tmp_path, **{f"{train}__b": 3, f"{train}__a": 1, f"{name}__a": 1, f"{name}__b": 2})
    datasets = create_datasets(tmp_path)
    assert datasets.class_names == ("a", "b")
    assert list_samples(datasets.train) == [("a/0.png", 0), ("b/0.png", 1), ("b/1.png", 1), ("b/2.png", 1)]
    assert list_samples(datasets.validation) == [("a/0.png", 0), ("b/0.png", 1), ("b/1.png", 1)]
    assert datasets.train.root == tmp_path / train
    assert datasets.train[3][0].getpixel((0, 0)) == (2, len(f"{train}__b"), 0)
    assert len(create_validation_dataset(tmp_path)) == 3


@pytest.mark.parametrize(
    ("names", "chosen"),
    [(("dev", "test"), "test"), (("Val", "test"), "test"), (("test", "val"), "val"), (("dev", "testing"), "testing")],
)
def test_plain_names_of_the_validation_folder_come_first(tmp_path: Path, names: tuple[str, ...], chosen: str) -> None:
    create_tree(tmp_path, **{f"{split}__{name}": 1 for split in ("train", *names) for name in "ab"})
    assert create_datasets(tmp_path).validation.root == tmp_path / chosen
    assert create_validation_dataset(tmp_path).root == tmp_path / chosen


def test_folder_of_classes_is_split_by_class(tmp_path: Path) -> None:
    create_tree(tmp_path, a=20, b=2, c=7)
    datasets = create_datasets(str(tmp_path))
    assert np.bincount(datasets.validation.labels).tolist() == [4, 1, 1]
    everything = list_samples(datasets.train) + list_samples(datasets.validation)
    assert sorted(everything) == sorted(list_samples(create_dataset(tmp_path)))


def test_split_follows_the_seed_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    create_tree(tmp_path, a=30, b=30)
    first, again, other = (list_samples(create_datasets(tmp_path, seed=seed).validation) for seed in (0, 0, 1))
    assert first == again != other
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((p, d[::-1], f[::-1]) for p, d, f in walk(*a, **k)))
    assert list_samples(create_datasets(tmp_path).validation) == first
    create_tree(tmp_path, aa=5)
    more = create_datasets(tmp_path).validation
    assert {path for path, _ in first} < {path.as_posix() for path in more.paths}


def test_dataset_survives_pickling_and_applies_its_transform(tmp_path: Path) -> None:
    dataset = create_dataset(create_tree(tmp_path, a=1, b=1))
    dataset.transform = np.asarray
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[1][0].shape == (5, 6, 3)
    assert copy.load(1).size == (6, 5)


def test_read_gives_the_bytes_of_the_file_and_a_png_of_a_digit(tmp_path: Path) -> None:
    dataset = create_dataset(create_tree(tmp_path, a=1, b=1))
    assert dataset.read(1) == (tmp_path / "b/0.png").read_bytes()
    digits = create_datasets("digits").validation.select([5, 3])
    assert np.array_equal(decode_image(digits.read(1), "digit"), digits.load(1))


def test_selected_pictures_keep_names_and_labels_but_no_transform(tmp_path: Path) -> None:
    dataset = create_dataset(create_tree(tmp_path, a=2, b=2))
    dataset.transform = np.asarray
    chosen = dataset.select([3, 0])
    assert list_samples(chosen) == [("b/1.png", 1), ("a/0.png", 0)]
    assert chosen[0][0].getpixel((0, 0)) == (1, 1, 0)
    assert (dataset.transform, chosen.class_names) == (np.asarray, ("a", "b"))


def test_bytes_that_are_no_picture_are_named() -> None:
    for content, reason in ((b"", "the file is empty"), (b"text", "it is no picture of a known format")):
        with pytest.raises(ImageError, match=f"^cannot read shard/x: {reason}$"):
            decode_image(content, "shard/x")


def test_hidden_folders_leftovers_and_links_to_above_are_no_classes(tmp_path: Path) -> None:
    create_tree(tmp_path, a=1, b=1)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "a" / "loop").symlink_to(".")
    dataset = create_dataset(tmp_path)
    assert dataset.class_names == ("a", "b")
    assert list_samples(dataset) == [("a/0.png", 0), ("b/0.png", 1)]


@pytest.mark.parametrize(
    "names", [("bus", "car", "train"), ("control", "test"), ("Test", "Training", "other"), ("Testing", "Training")]
)
def test_classes_named_like_splits_are_classes_where_they_hold_pictures(tmp_path: Path, names: tuple[str, ...]) -> None:
    create_tree(tmp_path, **dict.fromkeys(names, 2))
    assert create_datasets(tmp_path).class_names == names
    assert create_validation_dataset(tmp_path).class_names == names


def test_classes_may_hold_folders_of_their_own(tmp_path: Path) -> None:
    create_tree(tmp_path / "one", a__images=2, b__images=2)
    create_tree(tmp_path / "mixed", a=1, a__x=1, a__y=1, b__x=1, b__y=1)
    create_tree(tmp_path / "other", a__x=1, a__y=1, b__y=1, b__z=1)
    create_tree(tmp_path / "equal", a__left=1, a__right=1, b__left=1, b__right=1)
    create_tree(tmp_path / "deep", a__train__good=1, a__test__good=1, b__train__good=1, b__test__good=1)
    for name in ("one", "mixed", "other", "equal", "deep"):
        assert create_dataset(tmp_path / name).class_names == ("a", "b")


@pytest.mark.parametrize("names", [("dev", "prod", "staging"), ("Train", "bus"), ("Test", "Val"), ("car", "training")])
def test_folders_named_like_splits_without_a_pair_are_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    create_tree(tmp_path, **{f"{name}__images": 2 for name in names})
    assert create_datasets(tmp_path).class_names == tuple(sorted(names))
    assert create_validation_dataset(tmp_path).class_names == tuple(sorted(names))


def test_unreadable_picture_is_named_when_it_is_reached(tmp_path: Path) -> None:
    dataset = create_dataset(create_tree(tmp_path, a=1, b=1))
    (tmp_path / "b/0.png").write_text("text")
    with pytest.raises(ImageError, match=r"b/0\.png: it is no picture of a known format$"):
        dataset[1]


def test_validation_dataset_needs_no_train_folder(tmp_path: Path) -> None:
    create_tree(tmp_path / "split", a=5, b=5)
    create_tree(tmp_path / "val_only", val__a=1, val__b=1)
    expected = list_samples(create_datasets(tmp_path / "split", seed=3).validation)
    assert list_samples(create_validation_dataset(tmp_path / "split", seed=3)) == expected
    assert list_samples(create_validation_dataset(tmp_path / "val_only")) == [("a/0.png", 0), ("b/0.png", 1)]
    assert len(create_validation_dataset("digits")) == len(create_datasets("digits").validation)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, r"{root} must hold a folder of pictures per class, but holds none$"),
        ({"a": 3}, r"{root} must hold a folder of pictures per class, but holds one only, a$"),
        ({"a": 2, "b": 0}, r"no pictures in folder {root}/b; looked for"),
        ({"a": 2, "b": 1}, r"class b of data folder {root} has one picture; a split takes at least two$"),
        ({"train__a": 1, "train__b": 1}, r"{root} holds train but no val; .* {root}/train split off"),
        ({"test__a": 1, "test__b": 1}, r"{root} holds test but no train; .* {root}/test split off"),
        (
            {"train__a": 1, "train__b": 1, "val__b": 1, "val__c": 1},
            r"{root}/train and {root}/val must hold the same classes: "
            r"{root}/train alone has a; {root}/val alone has c$",
        ),
        ({"train__a": 1, "train__b": 1, "val__a": 1, "val__b": 0}, r"no pictures in folder {root}/val/b;"),
        ({"Train__a": 1, "Train__b": 1}, r"{root} must hold a folder of pictures per class, .* one only, Train$"),
        ({"train__a": 1, "dev__a": 1}, r"{root}/train must hold .* holds one only, a$"),
        ({"train": 2, "val": 2}, r"{root}/train must hold a folder of pictures per class, but holds none$"),
        ({"train__a": 1, "bus__a": 1, "bus__b": 1}, r"{root} holds train but no val;"),
        (
            {"Val__a": 1, "val__a": 1, "train__a": 1},
            r"{root} holds Val, val: rename all but one$",
        ),
        (
            {"Fold1__a": 1, "Fold1__b": 1, "fold2__a": 1, "fold2__b": 1, "fold2__c": 1},
            r"{root} looks like splits, not classes: Fold1, fold2 hold the same folders \(a, b\) and no pictures; "
            r"name the splits train and val, or put the pictures of each class directly into its folder$",
        ),
    ],
)
def test_wrong_folder_is_one_sentence(tmp_path: Path, tree: dict[str, int], message: str) -> None:
    create_tree(tmp_path, **tree)
    with pytest.raises((ValueError, FileNotFoundError), match=message.format(root=tmp_path)) as caught:
        create_datasets(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_file_in_its_place_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"^no data folder at {tmp_path}/absent$"):
        create_datasets(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"^data folder {tmp_path}/file is a file$"):
        create_validation_dataset(tmp_path / "file")


def test_real_pictures_load() -> None:
    folder = os.environ.get("FASTERNET_DATA")
    if not folder:
        pytest.skip("FASTERNET_DATA does not name a folder of real pictures")
    datasets = create_datasets(Path(folder) / "flowers")
    assert len(datasets.class_names) > 1
    assert not {*datasets.train.paths} & {*datasets.validation.paths}
    assert datasets.validation[0][0].mode == "RGB"
