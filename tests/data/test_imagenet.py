import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.real_labels import RealLabelsImagenet

from fasternet.data.datasets import ImageDataset
from fasternet.data.imagenet import EvaluationData, is_imagenet, open_evaluation_data

TENCH, GOLDFISH, SHARK = "n01440764", "n01443537", "n01484850"  # the outputs 0, 1 and 2


def save(root: Path, names: Iterable[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(root / name, "JPEG")
    return root


def name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}.JPEG"


def open_imagenet(root: Path, labels: object = None) -> EvaluationData:
    return open_evaluation_data(
        str(root), class_names=None, num_classes=1000, labels=None if labels is None else str(labels)
    )


def list_labels(data: EvaluationData) -> dict[str, int]:
    return {path.name: label for path, label in zip(data.dataset.paths, data.dataset.labels, strict=True)}


@pytest.fixture(scope="module")
def info() -> dict[str, list[str]]:
    """Synsets of ImageNet-1k, -A and -R as timm lists them, the indices too."""
    import timm.data

    folder = Path(timm.data.__file__).parent / "_info"
    names = ("imagenet_synsets", "imagenet_a_synsets", "imagenet_a_indices", "imagenet_r_synsets", "imagenet_r_indices")
    return {name: (folder / f"{name}.txt").read_text().split() for name in names}


def test_synset_folders_are_the_outputs_of_their_synsets(tmp_path: Path) -> None:
    save(tmp_path / "val", [f"{SHARK}/b.JPEG", f"{TENCH}/a.JPEG", f"{TENCH}/c.JPEG"])
    save(tmp_path / "train", [f"{TENCH}/x.JPEG"])
    data = open_imagenet(tmp_path)
    assert list_labels(data) == {"b.JPEG": 2, "a.JPEG": 0, "c.JPEG": 0}
    assert data.class_names[0].startswith(f"{TENCH} tench")
    assert len(set(data.class_names)) == 1000
    assert data.remarks == ("pictures of 2 of the 1000 classes; the network chooses among all",)


def test_all_1000_folders_need_no_remark(tmp_path: Path, info: dict[str, list[str]]) -> None:
    data = open_imagenet(save(tmp_path, [f"{synset}/{synset}.JPEG" for synset in info["imagenet_synsets"]]))
    assert list_labels(data) == {f"{synset}.JPEG": n for n, synset in enumerate(info["imagenet_synsets"])}
    assert (data.outputs, data.remarks) == (None, ())


@pytest.mark.parametrize("letter", ["a", "r"])
def test_imagenet_a_and_r_choose_among_their_200_classes(
    tmp_path: Path, info: dict[str, list[str]], letter: str
) -> None:
    synsets, indices = info[f"imagenet_{letter}_synsets"], info[f"imagenet_{letter}_indices"]
    data = open_imagenet(save(tmp_path, [f"{synset}/{synset}.jpg" for synset in synsets]))
    assert list(map(str, data.outputs or ())) == indices
    assert list_labels(data) == {f"{synset}.jpg": number for number, synset in enumerate(synsets)}
    assert [words.split()[0] for words in data.class_names] == synsets
    logits = torch.arange(1000.0)[None]
    assert data.select_logits(logits)[0].tolist() == [float(index) for index in indices]
    assert data.remarks[0].startswith(f"ImageNet-{letter.upper()}: ")


def test_folders_of_words_are_the_outputs_of_their_words(tmp_path: Path) -> None:
    data = open_imagenet(save(tmp_path, ["Afghan_hound/a.jpg", "tench, Tinca tinca/b.jpg", "maillot/c.jpg"]))
    assert list_labels(data) == {"a.jpg": 160, "b.jpg": 0, "c.jpg": 638}
    assert data.remarks == ("pictures of 3 of the 1000 classes; the network chooses among all",)


def test_data_of_1000_classes_is_ordered_by_their_names_or_says_that_it_is_not(
    tmp_path: Path, info: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As shards and data sets of the hub bring them."""

    def open_named(names: Sequence[str]) -> EvaluationData:
        dataset = ImageDataset(tmp_path, [Path("a"), Path("b")], [1, 999], names)
        monkeypatch.setattr("fasternet.data.imagenet.create_validation_dataset", lambda data: dataset)
        return open_evaluation_data("hf:some", class_names=None, num_classes=1000)

    words = ImageNetInfo().label_descriptions()
    assert words.count("crane") == 2
    for names in (words, info["imagenet_synsets"], ["crane2" if n == 517 else word for n, word in enumerate(words)]):
        data = open_named(names)
        assert (data.dataset.labels, data.remarks) == ([1, 999], ())
        assert data.class_names[1] == f"{GOLDFISH} goldfish, Carassius auratus"
    assert open_named(info["imagenet_synsets"][::-1]).dataset.labels == [998, 0]
    assert open_named(sorted(map(str, range(1000)))).dataset.labels == [1, 999]
    assert open_named(sorted(map(str, range(1000)))[::-1]).dataset.labels == [998, 0]
    assert open_named(info["imagenet_a_synsets"] * 5).dataset.labels[0] == int(info["imagenet_a_indices"][1])
    with pytest.raises(ValueError, match="hf:some/crane may be several of ImageNet's classes"):
        open_named(sorted(words))
    data = open_named([f"class {number}" for number in range(1000)])
    assert data.dataset.labels == [1, 999]
    assert data.remarks[0].startswith("no class of hf:some is named as one of ImageNet's")
    with pytest.raises(ValueError, match="the checkpoint has 1000 classes, data hf:some has 10"):
        open_named([str(number) for number in range(10)])


def test_numbered_folders_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    data = open_imagenet(save(tmp_path, [f"{number}/{number}.jpeg" for number in (0, 2, 10, 999)]))
    assert list_labels(data) == {"0.jpeg": 0, "2.jpeg": 2, "10.jpeg": 10, "999.jpeg": 999}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("val.txt", "{1} 2\n{2} 0\n"),
        ("val.txt", "val/{1} n01484850\nval/{2} n01440764"),
        ("val.csv", "{1},n01484850\n{2},n01440764\n"),
        ("words.csv", "{1},great_white_shark\n{2},tench\n"),
        ("words.csv", "{1},n01484850 great white shark\n{2},n01440764 tench\n"),
        ("two.csv", "ImageId,PredictionString\n{s1},n01484850 -1 2 3 4 n01443537 5 6 7 8\n{s2},n01440764 1 2 3 4\n"),
        ("LOC.csv", "ImageId,PredictionString\n{s1},n01484850 1 2 3 4 n01484850 5 6 7 8 \n{s2},n01440764 1 2 3 4 \n"),
        ("synsets.txt", "n01484850\nn01440764\n"),
    ],
)
def test_flat_folder_takes_its_labels_from_a_file(tmp_path: Path, file: str, text: str) -> None:
    root = save(tmp_path / "val", [name(1), name(2)])
    stems = {"s1": Path(name(1)).stem, "s2": Path(name(2)).stem}
    (tmp_path / file).write_text(text.format("", name(1), name(2), **stems))
    assert list_labels(open_imagenet(root, tmp_path / file)) == {name(1): 2, name(2): 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("490\n361\n", "numbers alone: the devkit's ILSVRC ids"),
        (f"{name(1)} 3\n", f"does not name {name(2)} \\(1 of 2 pictures\\)"),
        (f"{name(1)} 1000\n", "line 1: index 1000 is beyond 999; classes are counted from 0"),
        (f"{name(1)} n99999999\n", "line 1: 'n99999999' is neither a class of the network nor the index of one"),
        (f"{name(1)} crane\n", r"line 1: 'crane' is the name of 2 classes: give the index, one of \[134, 517\]"),
        ("\udcff", "damaged, or no text"),
    ],
)
def test_label_file_that_is_not_understood_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    root = save(tmp_path / "val", [name(1), name(2)])
    (tmp_path / "labels.txt").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        open_imagenet(root, tmp_path / "labels.txt")


def test_real_counts_any_label_and_passes_over_pictures_without_one(tmp_path: Path) -> None:
    """timm's own reader of the same file is the reference."""
    expected = RealLabelsImagenet(range(50_000)).real_labels
    without = next(number for number in range(1, 1000) if not expected[name(number)])
    single = next(number for number in range(1, 1000) if len(expected[name(number)]) == 1)
    several = next(number for number in range(1, 1000) if len(expected[name(number)]) > 1)
    data = open_imagenet(save(tmp_path, [name(single), name(without), name(several)]), "real")
    assert data.right is not None
    assert {path.name for path in data.dataset.paths} == {name(single), name(several)}
    batches = [(torch.zeros(2), torch.tensor(data.dataset.labels))]
    ((_, right),) = data.label(batches)
    for path, row in zip(data.dataset.paths, right, strict=True):
        assert sorted(row.nonzero().flatten().tolist()) == sorted(expected[path.name])
    assert "1 pictures without a label do not count" in data.remarks[0]


def test_real_takes_a_file_and_refuses_what_is_none(tmp_path: Path) -> None:
    root, file = save(tmp_path / "val", [name(2)]), tmp_path / "real.json"
    file.write_text(json.dumps([[], [3, 5]]))
    data = open_imagenet(root, file)
    assert data.right is not None
    assert data.right[0].nonzero().flatten().tolist() == [3, 5]
    for content in ("[[0], [1000]]", "{}", "[1]"):
        file.write_text(content)
        with pytest.raises(ValueError, match="must hold a list of indices, 0 to 999, for each picture"):
            open_imagenet(root, file)
    save(root, ["photo.JPEG"])
    with pytest.raises(ValueError, match=r"photo\.JPEG has no ReaL label"):
        open_imagenet(root, "real")


def test_folders_that_are_not_imagenets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cat is not one of ImageNet's 1000 classes \(1 such folders\)"):
        open_imagenet(save(tmp_path / "w", ["cat/a.jpg", "tench/a.jpg"]))
    with pytest.raises(ValueError, match=r"crane may be several .* name it by its synset, n02012849 or n03126707"):
        open_imagenet(save(tmp_path / "x", ["crane/a.jpg", "tench/a.jpg"]))
    own = [str(number) for number in range(1000)]
    with pytest.raises(ValueError, match="labels real are of ImageNet's 1000 classes, and the network was trained on"):
        open_evaluation_data(str(tmp_path / "w"), class_names=own, num_classes=1000, labels="real")
    with pytest.raises(ValueError, match=r"n00000001 is not one of ImageNet's 1000 classes"):
        open_imagenet(save(tmp_path / "a", ["n00000001/a.jpg", f"{TENCH}/a.jpg"]))
    with pytest.raises(ValueError, match="1000 is no number of a class: they run from 0 to 999"):
        open_imagenet(save(tmp_path / "b", ["0/a.jpg", "1000/a.jpg"]))
    with pytest.raises(ValueError, match="holds no folder per class: name a file with the labels"):
        open_imagenet(save(tmp_path / "c", ["a.jpg"]))
    with pytest.raises(ValueError, match=r"the checkpoint has 1000 classes, data .* has 2"):
        open_imagenet(save(tmp_path / "d", ["cat/a.jpg", "dog/a.jpg", "cat/b.jpg", "dog/b.jpg"]))
    with pytest.raises(FileNotFoundError, match="no data folder at"):
        open_imagenet(tmp_path / "none", "real")
    with pytest.raises(FileNotFoundError, match="no label file at"):
        open_imagenet(tmp_path / "c", tmp_path / "none.txt")


def test_networks_of_imagenet_are_known_by_their_classes(info: dict[str, list[str]]) -> None:
    assert is_imagenet(None, 1000)
    assert is_imagenet(info["imagenet_synsets"], 1000)
    assert not is_imagenet(None, 10)
    assert not is_imagenet([str(number) for number in range(1000)], 1000)
    assert not is_imagenet(info["imagenet_synsets"][::-1], 1000)
