"""Labels to judge a network by: ImageNet-1k as it comes, its sister sets, flat folders with a label file.

ImageNet's classes are the outputs of a network in the order of their synsets (n01440764 is output 0). Which folders and
which labels mean what is read from the files that timm brings along. Legend: N = pictures, K = classes.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from fasternet.data.datasets import VALIDATION_FOLDERS, ImageDataset, create_validation_dataset, is_sharded
from fasternet.data.images import find_images

REAL = "real"
SUBSETS = {"ImageNet-A": "imagenet_a_synsets.txt", "ImageNet-R": "imagenet_r_synsets.txt"}
_SYNSET = re.compile(r"n\d{8}")
_INDICES = frozenset(range(1000))
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclasses.dataclass(frozen=True)
class EvaluationData:
    """Pictures, and what a network is to say of them.

    Attributes:
        dataset: The pictures; their labels are indices into ``class_names``, or rows of ``right``.
        class_names: The K classes that count.
        outputs: The network's outputs for these classes, where it has more of them; None where they are its own.
        right: Where a picture may have several right labels, booleans (N, K).
        remarks: What the reader of the result has to know of the labels, in sentences.
    """

    dataset: ImageDataset
    class_names: tuple[str, ...]
    outputs: tuple[int, ...] | None = None
    right: Tensor | None = None
    remarks: tuple[str, ...] = ()

    def select_logits(self, logits: Tensor) -> Tensor:
        """Return the logits (N, K) of the classes that count."""
        return logits if self.outputs is None else logits[:, list(self.outputs)]

    def label(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of a loader with the labels that ``train.evaluate`` takes."""
        for images, labels in batches:
            yield images, labels if self.right is None else self.right[labels]


def open_evaluation_data(
    data: str, *, class_names: Sequence[str] | None, num_classes: int, labels: str | None = None
) -> EvaluationData:
    """Open the pictures that a network is judged by, with labels in the order of its outputs.

    Args:
        data: What ``create_validation_dataset`` takes. For a network of ImageNet's classes also a folder, or its
            ``val``, whose folders are named by synsets (any of the 1000; exactly those of ImageNet-A or -R: the
            network chooses among these 200) or by numbers (ImageNet-V2), of which all pictures count.
        class_names: The classes that the network was trained on, or None where nobody named them.
        num_classes: How many it has.
        labels: A file that names the class of each picture of a flat folder, or ``real``, for the reassessed labels
            of ImageNet's validation pictures, of which some have several and some have none.

    Raises:
        FileNotFoundError: There is no such folder or label file.
        ValueError: The labels are not understood, or the network was trained on other classes.
    """
    names = name_classes(class_names) if is_imagenet(class_names, num_classes) else class_names
    is_local = Path(data).is_dir() and data != "digits" and not is_sharded(data)
    root = _find_pictures(Path(data)) if is_local else Path(data)
    if labels is not None:
        if not is_local:
            if not Path(data).exists():
                raise FileNotFoundError(f"no data folder at {data}")
            raise ValueError(f"labels {labels} name the pictures of a folder, and data {data} is none")
        return _open_labelled(root, labels, names or [str(number) for number in range(num_classes)])
    folders = _list_folders(root) if is_local else []
    if is_local and not folders and any(path.is_file() for path in root.iterdir()):
        raise ValueError(f"data folder {root} holds no folder per class: name a file with the labels (labels)")
    if names is not None and is_imagenet(class_names, num_classes) and folders:
        if all(_SYNSET.fullmatch(name) for name in folders):
            return _open_synsets(root, folders, names)
        if all(name.isdecimal() for name in folders):
            return _open_numbers(root, folders, names)
    dataset = create_validation_dataset(data)
    _check_classes(dataset.class_names, class_names, num_classes, data)
    return EvaluationData(dataset, dataset.class_names)


def is_imagenet(class_names: Sequence[str] | None, num_classes: int) -> bool:
    """Tell whether a network's outputs are ImageNet's 1000 classes, in their order."""
    if class_names is None:
        return num_classes == len(_synsets())
    return tuple(class_names) in (_synsets(), _descriptions())


def name_classes(class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names given, or ImageNet's: synset and words, as the words alone are not unique."""
    if class_names is not None:
        return tuple(class_names)
    return tuple(f"{synset} {words}" for synset, words in zip(_synsets(), _descriptions(), strict=True))


@functools.cache
def _synsets() -> tuple[str, ...]:
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


@functools.cache
def _descriptions() -> tuple[str, ...]:
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_descriptions())


def _read_info(name: str) -> str:
    return (resources.files("timm.data") / "_info" / name).read_text(encoding="utf-8")


def _find_pictures(root: Path) -> Path:
    return next((root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()), root)


def _list_folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _open_synsets(root: Path, folders: Sequence[str], names: Sequence[str]) -> EvaluationData:
    outputs = {synset: number for number, synset in enumerate(_synsets())}
    if unknown := [name for name in folders if name not in outputs]:
        raise ValueError(f"{root / unknown[0]} is not one of ImageNet's 1000 classes ({len(unknown)} such folders)")
    for title, file in SUBSETS.items():
        if set(folders) == set(_read_info(file).split()):
            kept = tuple(outputs[name] for name in folders)
            dataset = _open_folders(root, folders, range(len(folders)), [names[output] for output in kept])
            remark = f"{title}: the network chooses among the 200 classes of the set"
            return EvaluationData(dataset, dataset.class_names, kept, remarks=(remark,))
    return _open_part(root, folders, [outputs[name] for name in folders], names)


def _open_numbers(root: Path, folders: Sequence[str], names: Sequence[str]) -> EvaluationData:
    """Open folders that are named by their classes' numbers: '10' comes after '9'."""
    if beyond := [name for name in folders if int(name) >= len(names)]:
        raise ValueError(f"{root / beyond[0]} is no number of a class: they run from 0 to {len(names) - 1}")
    folders = sorted(folders, key=int)
    return _open_part(root, folders, [int(name) for name in folders], names)


def _open_part(root: Path, folders: Sequence[str], labels: Sequence[int], names: Sequence[str]) -> EvaluationData:
    dataset = _open_folders(root, folders, labels, names)
    few = f"pictures of {len(folders)} of the {len(names)} classes; the network chooses among all"
    return EvaluationData(dataset, dataset.class_names, remarks=() if len(folders) == len(names) else (few,))


def _open_folders(root: Path, folders: Sequence[str], labels: Sequence[int], names: Sequence[str]) -> ImageDataset:
    found = [find_images([root / folder]) for folder in folders]
    paths = [path.relative_to(root) for members in found for path in members]
    all_labels = [label for label, members in zip(labels, found, strict=True) for _ in members]
    return ImageDataset(root, paths, all_labels, names)


def _open_labelled(root: Path, labels: str, names: Sequence[str]) -> EvaluationData:
    """Open all pictures below a folder with the labels of a file, or with ReaL."""
    if labels == REAL and not Path(labels).exists():
        return _open_real(root, json.loads(_read_info("imagenet_real_labels.json")), names)
    file = Path(labels)
    if not file.is_file():
        raise FileNotFoundError(f"no label file at {file}")
    try:
        text = file.read_text(encoding="utf-8-sig")
        table = json.loads(text) if file.suffix == ".json" else None
    except ValueError:
        raise ValueError(f"label file {file} is damaged, or no text") from None
    if file.suffix == ".json":
        return _open_real(root, table, names)
    paths = [path.relative_to(root) for path in find_images([root])]
    labels_by_name = _parse_labels(file, text, {key for path in paths for key in (path.name, path.stem)}, names)
    found = [labels_by_name.get(path.name, labels_by_name.get(path.stem)) for path in paths]
    if absent := [path for path, label in zip(paths, found, strict=True) if label is None]:
        raise ValueError(f"label file {file} does not name {absent[0]} ({len(absent)} of {len(paths)} pictures)")
    dataset = ImageDataset(root, paths, [label for label in found if label is not None], names)
    missing = len(labels_by_name) - len(paths)
    remark = f"the label file names {missing} more pictures, which are not in the folder"
    return EvaluationData(dataset, dataset.class_names, remarks=(remark,) if missing > 0 else ())


def _parse_labels(file: Path, text: str, pictures: set[str], names: Sequence[str]) -> dict[str, int]:
    """Read lines of 'NAME LABEL' or 'NAME,LABEL' (further words are boxes), or of ImageNet's synsets, one each."""
    separator = "," if "," in text.partition("\n")[0] else None
    rows = (
        list(csv.reader(text.splitlines()))
        if separator
        else [line.rsplit(maxsplit=1) for line in text.splitlines() if line.strip()]
    )
    if rows and all(len(row) == 1 for row in rows):
        if all(row[0].isdecimal() for row in rows):
            raise ValueError(
                f"label file {file} holds numbers alone: the devkit's ILSVRC ids are not the order of the network's "
                "outputs; take a file with a picture's name and its index from 0, or its synset, on each line"
            )
        rows = [[f"ILSVRC2012_val_{number:08}", row[0]] for number, row in enumerate(rows, start=1)]
    numbers = {name: number for number, name in enumerate(names)}
    if len(names) == len(_synsets()):
        numbers |= {synset: number for number, synset in enumerate(_synsets())}
    table: dict[str, int] = {}
    for line, row in enumerate(rows, start=1):
        name = Path(row[0]).name if row else ""
        if line == 1 and separator and name not in pictures:
            continue  # the head of a table
        if len(row) < 2 or not row[1].strip():
            raise ValueError(f"label file {file} line {line} must be a picture's name and its label")
        table[name] = _parse_label(row[1].strip(), numbers, f"label file {file} line {line}", len(names))
    return table


def _parse_label(word: str, numbers: Mapping[str, int], where: str, num_classes: int) -> int:
    for label in (word, word.split()[0]):
        if label in numbers:
            return numbers[label]
    if not word.isdecimal():
        raise ValueError(f"{where}: {word!r} is neither a class of the network nor the index of one")
    if int(word) >= num_classes:
        raise ValueError(f"{where}: index {word} is beyond {num_classes - 1}; classes are counted from 0")
    return int(word)


def _open_real(root: Path, table: object, names: Sequence[str]) -> EvaluationData:
    """Open ImageNet's validation pictures with the labels of ReaL, a list of indices for each picture, by number."""
    if len(names) != len(_synsets()):
        raise ValueError(f"the ReaL labels are of ImageNet's 1000 classes, and the network has {len(names)}")
    if not isinstance(table, list) or not all(isinstance(row, list) and set(row) <= _INDICES for row in table):
        raise ValueError("a label file in JSON must hold a list of indices, 0 to 999, for each picture, as ReaL's does")
    paths, rows, num_left = [], [], 0
    for path in find_images([root]):
        match = _VALIDATION_NAME.search(path.stem)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(table):
            raise ValueError(f"{path} has no ReaL label: pictures must be named as ILSVRC2012_val_00000001.JPEG")
        if row := table[number - 1]:
            paths.append(path.relative_to(root))
            rows.append(row)
        else:
            num_left += 1
    right = torch.zeros(len(rows), len(names), dtype=torch.bool)
    for place, row in enumerate(rows):
        right[place, row] = True
    remarks = (f"ReaL: any label of a picture is right; {num_left} pictures without a label do not count",)
    return EvaluationData(ImageDataset(root, paths, range(len(paths)), names), tuple(names), None, right, remarks)


def _check_classes(found: Sequence[str], trained: Sequence[str] | None, num_classes: int, data: str) -> None:
    """Raise where the network was trained on other classes than the data has."""
    if num_classes != len(found):
        raise ValueError(f"the checkpoint has {num_classes} classes, data {data} has {len(found)}")
    if trained is not None and tuple(trained) != tuple(found):
        pairs = zip(trained, found, strict=True)
        number, (before, here) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(
            f"the checkpoint was trained on other classes than data {data} has: "
            f"class {number} is {before!r} there and {here!r} here"
        )
