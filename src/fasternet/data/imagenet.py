"""Labels to judge a network by: ImageNet-1k as it comes, its sister sets, flat folders with a label file.

ImageNet's classes are the outputs of a network in the order of their synsets (n01440764 is output 0). Which folders and
which labels mean what is read from the files that timm brings along. Legend: N = pictures, K = classes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from fasternet.data.datasets import (
    VALIDATION_NAMES,
    ImageDataset,
    create_validation_dataset,
    find_split,
    is_sharded,
    list_folders,
)
from fasternet.data.images import find_images
from fasternet.data.labels import Classes, find_classes, index_classes, read_labels

REAL = "real"
SUBSETS = {"ImageNet-A": "imagenet_a_synsets.txt", "ImageNet-R": "imagenet_r_synsets.txt"}
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
        data: What ``create_validation_dataset`` takes. For a network of ImageNet's classes also data whose classes are
            named by synsets (any of the 1000; exactly those of ImageNet-A or -R: the network chooses among these
            200), by numbers (ImageNet-V2) or by words that are unique. Of such folders, or of those in their
            ``val``, all pictures count.
        class_names: The classes that the network was trained on, or None where nobody named them.
        num_classes: How many it has.
        labels: A file that names the class of each picture of a flat folder, or ``real``, for the reassessed labels
            of ImageNet's validation pictures, of which some have several and some have none.

    Raises:
        FileNotFoundError: There is no such folder or label file.
        ValueError: The labels are not understood, or the network was trained on other classes.
    """
    imagenet = is_imagenet(class_names, num_classes)
    names = name_classes(class_names) if imagenet else class_names or [str(number) for number in range(num_classes)]
    is_local = Path(data).is_dir() and data != "digits" and not is_sharded(data)
    root = _find_pictures(Path(data), labelled=labels is not None) if is_local else Path(data)
    if labels is not None:
        if not is_local:
            if not Path(data).exists():
                raise FileNotFoundError(f"no data folder at {data}")
            raise ValueError(f"labels {labels} name the pictures of a folder, and data {data} is none")
        return _open_labelled(root, labels, names, imagenet=imagenet)
    folders = [path.name for path in list_folders(root)] if is_local else []
    if is_local and not folders and any(path.is_file() for path in root.iterdir()):
        raise ValueError(f"data folder {root} holds no folder per class: name a file with the labels (labels)")
    if imagenet and folders and (outputs := _find_outputs(folders, names, str(root))):
        return _judge_outputs(_open_folders(root, folders), outputs, names)
    dataset = create_validation_dataset(data)
    found = dataset.class_names
    if imagenet and (len(found) == num_classes or not _are_numbers(found)):
        outputs = _find_outputs(found, names, data)
        if outputs is not None:
            return _judge_outputs(dataset, outputs, names)
    _check_classes(dataset.class_names, class_names, num_classes, data)
    remark = f"no class of {data} is named as one of ImageNet's: they are taken for the network's in their order"
    return EvaluationData(dataset, dataset.class_names, remarks=(remark,) if imagenet else ())


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


def _find_pictures(root: Path, *, labelled: bool) -> Path:
    """Return the folder of the validation pictures; with labels in a file it may be flat, whatever lies beside it."""
    return find_split(root, VALIDATION_NAMES, flat=labelled) or root


def _are_numbers(names: Sequence[str]) -> bool:
    return all(name.isdecimal() for name in names)


def _find_outputs(found: Sequence[str], names: Sequence[str], where: str) -> list[int] | None:
    """Return the outputs of classes that bear numbers, synsets or words of ImageNet's; None where none of them does.

    Words that are not unique, or unknown, are no obstacle where all others stand in ImageNet's order.
    """
    if _are_numbers(found):
        if beyond := [name for name in found if int(name) >= len(names)]:
            raise ValueError(f"{where}/{beyond[0]} is no number of a class: they run from 0 to {len(names) - 1}")
        return [int(name) for name in found]
    classes = _index_imagenet(tuple(names))
    known = [find_classes(classes, name) for name in found]
    if not any(known):
        return None
    if len(found) == len(names) and all(number in some for number, some in enumerate(known) if some):
        return list(range(len(names)))
    if unknown := [name for name, some in zip(found, known, strict=True) if not some]:
        raise ValueError(f"{where}/{unknown[0]} is not one of ImageNet's 1000 classes ({len(unknown)} such folders)")
    for name, some in zip(found, known, strict=True):
        if len(some) > 1:
            synsets = " or ".join(_synsets()[number] for number in some)
            raise ValueError(f"{where}/{name} may be several of ImageNet's classes: name it by its synset, {synsets}")
    return [some[0] for some in known]


@functools.cache
def _index_imagenet(names: tuple[str, ...]) -> Classes:
    words = [description.partition(",")[0] for description in _descriptions()]
    return index_classes(names, _synsets(), _descriptions(), words)


def _judge_outputs(dataset: ImageDataset, outputs: Sequence[int], names: Sequence[str]) -> EvaluationData:
    """Label pictures by the outputs of their classes; the sets of 200 classes are judged among these."""
    for title, file in SUBSETS.items():
        if sorted(outputs) == [_synsets().index(synset) for synset in _read_info(file).split()]:
            dataset.class_names = tuple(names[output] for output in outputs)
            remark = f"{title}: the network chooses among the 200 classes of the set"
            return EvaluationData(dataset, dataset.class_names, tuple(outputs), remarks=(remark,))
    dataset.labels = [outputs[label] for label in dataset.labels]
    dataset.class_names = tuple(names)
    few = f"pictures of {len(set(outputs))} of the {len(names)} classes; the network chooses among all"
    return EvaluationData(dataset, dataset.class_names, remarks=() if len(set(outputs)) == len(names) else (few,))


def _open_folders(root: Path, folders: Sequence[str]) -> ImageDataset:
    found = [find_images([root / folder]) for folder in folders]
    paths = [path.relative_to(root) for members in found for path in members]
    labels = [label for label, members in enumerate(found) for _ in members]
    return ImageDataset(root, paths, labels, folders)


def _open_labelled(root: Path, labels: str, names: Sequence[str], *, imagenet: bool) -> EvaluationData:
    """Open all pictures below a folder with the labels of a file, or with ReaL."""
    is_real = labels == REAL or Path(labels).suffix == ".json"
    if is_real and not imagenet:
        raise ValueError(f"labels {labels} are of ImageNet's 1000 classes, and the network was trained on others")
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
    classes = _index_imagenet(tuple(names)) if imagenet else index_classes(names)
    found, remarks = read_labels(file, text, paths, classes, len(names))
    dataset = ImageDataset(root, paths, found, names)
    return EvaluationData(dataset, dataset.class_names, remarks=remarks)


def _open_real(root: Path, table: object, names: Sequence[str]) -> EvaluationData:
    """Open ImageNet's validation pictures with the labels of ReaL, a list of indices for each picture, by number."""
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
