import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasternet.data.datasets import create_datasets, create_validation_dataset
from fasternet.data.images import ImageError
from fasternet.data.packing import pack_shards

datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def create_split(num_images: int, **columns):
    """Make rows of one-colour pictures of two classes."""
    images = [{"bytes": encode(Image.new("RGB", (4, 3), (i, 0, 0))), "path": None} for i in range(num_images)]
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    values = {"picture": images, "kind": [i % 2 for i in range(num_images)], **columns}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def save(folder: Path, **splits) -> str:
    datasets.DatasetDict(splits).save_to_disk(folder)
    return f"hf:{folder}"


@pytest.mark.parametrize("name", ["validation", "test"])
def test_splits_and_columns_are_found_by_their_kinds(tmp_path: Path, name: str) -> None:
    data = save(tmp_path / "set", train=create_split(6), **{name: create_split(4)})
    opened = create_datasets(data)
    assert opened.class_names == opened.train.class_names == ("cat", "dog")
    assert (len(opened.train), opened.validation.labels) == (6, [0, 1, 0, 1])
    assert opened.validation.paths[3] == Path(name, "00000003")
    image, label = pickle.loads(pickle.dumps(opened.train))[5]
    assert (image.mode, image.getpixel((0, 0)), label) == ("RGB", (5, 0, 0), 1)
    assert create_validation_dataset(data).paths == opened.validation.paths


def test_without_validation_split_a_fifth_of_each_class_is_split_off(tmp_path: Path) -> None:
    create_split(20).save_to_disk(tmp_path / "set")
    opened = create_datasets(f"hf:{tmp_path / 'set'}")
    assert np.bincount(opened.validation.labels).tolist() == [2, 2]
    assert not {*opened.train.paths} & {*opened.validation.paths}
    for dataset in (opened.train, opened.validation):
        for index, path in enumerate(dataset.paths):
            assert dataset.load(index).getpixel((0, 0)) == (int(path.name), 0, 0)


def test_pictures_follow_the_rules_of_files(tmp_path: Path) -> None:
    upright = Image.new("RGB", (4, 2), (9, 9, 9))
    exif = upright.getexif()
    exif[0x0112] = 6
    contents = [
        encode(Image.fromarray(np.full((2, 2), 0x80FF, np.uint16))),
        encode(Image.new("RGBA", (2, 2), (255, 0, 0, 0))),
        encode(upright, "JPEG", exif=exif),
        b"text",
    ]
    split = create_split(4, picture=[{"bytes": content, "path": None} for content in contents])
    train = create_datasets(save(tmp_path / "set", train=split, test=split)).train
    assert train.load(0).getpixel((0, 0)) == (128, 128, 128)
    assert train.load(1).getpixel((0, 0)) == (255, 255, 255)
    assert train.load(2).size == (2, 4)
    assert train.read(2) == contents[2]
    with pytest.raises(ImageError, match=r"^cannot read hf:.*/set/train/00000003: it is no picture of a known format$"):
        train.load(3)


def test_packed_hub_set_keeps_its_bytes(tmp_path: Path) -> None:
    split = create_split(
        3, picture=[{"bytes": encode(Image.new("L", (2, 2)), k), "path": None} for k in ("PNG", "JPEG", "JPEG2000")]
    )
    data = save(tmp_path / "set", train=split, test=split)
    pack_shards(data, tmp_path / "shards")
    packed, source = create_validation_dataset(tmp_path / "shards"), create_validation_dataset(data)
    assert [path.suffix for path in packed.paths] == [".png", ".jpeg", ".jp2"]
    assert [packed.read(i) for i in range(3)] == [source.read(i) for i in range(3)]


def test_missing_parts_are_one_sentence(tmp_path: Path) -> None:
    rows = create_split(4)
    cases = {
        "no split train; it has test": {"test": rows},
        r"split train of hf:.* must have one column of pictures \(datasets\.Image\), but has none among kind$": {
            "train": rows.remove_columns("picture")
        },
        r"must have one column of labels \(datasets\.ClassLabel\), but has none among picture, kind$": {
            "train": rows.cast_column("kind", datasets.Value("int64"))
        },
        r"one column of labels .* but has 2 \(kind, more\)$": {
            "train": rows.add_column("more", [0] * 4).cast_column("more", datasets.ClassLabel(names=["x"]))
        },
        "row 0 and 3 more of split train of hf:.* has no label$": {"train": create_split(4, kind=[-1] * 4)},
        "splits train and test of hf:.* must have the same classes": {
            "train": rows, "test": rows.cast_column("kind", datasets.ClassLabel(names=["dog", "cat"]))
        },
    }  # fmt: skip
    for number, (message, splits) in enumerate(cases.items()):
        data = save(tmp_path / str(number), **splits)
        with pytest.raises(ValueError, match=message) as caught:
            create_datasets(data)
        assert "\n" not in str(caught.value)


def test_folder_that_is_no_data_set_and_unreachable_hub_are_one_sentence(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=f"^cannot open hf:{tmp_path}: [^\n]*$"):
        create_datasets(f"hf:{tmp_path}")

    def fail(name: str) -> None:
        raise ConnectionError("Couldn't reach the hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError, match=r"^cannot open hf:some/where: Couldn't reach the hub$"):
        create_datasets("hf:some/where")


def test_without_the_package_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"^hf:x needs the package datasets: pip install 'fasternet\[hf\]'$"):
        create_datasets("hf:x")
