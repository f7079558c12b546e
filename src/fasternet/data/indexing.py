"""Lists the shards of others, tar files in the WebDataset layout, so that they can be trained on and evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fasternet.data.datasets import SHARDS_FILE, VALIDATION_FOLDERS
from fasternet.data.images import SHARD_SUFFIX
from fasternet.data.packing import Packed, Progress
from fasternet.data.shard_files import (
    LABEL_SUFFIX,
    SHARD_NAME,
    Contents,
    Shard,
    list_members,
    number_label,
    open_shard,
    save_contents,
)
from fasternet.models.checkpoint import Preprocessing
from fasternet.models.download import hash_file


def index_shards(folder: Path | str, *, classes: Path | None = None, progress: Progress | None = None) -> Packed:
    """Write ``shards.json`` over tar files that another tool packed; all of them is read, and they stay as they are.

    Args:
        folder: Holds ``train*.tar``, and ``val*.tar`` or ``test*.tar``. The label of a picture is the text of
            ``KEY.cls``, or in ``KEY.json`` one of ``LABEL_KEYS``: the number of a class, or its name.
        classes: A text file with the name of a class per line, in the order of the numbers. None: the names are
            those that the labels give, sorted, or the numbers from 0 to the largest label.
        progress: Called with the numbers of shards done and in all.

    Returns:
        What was found.

    Raises:
        FileNotFoundError: There is no such folder or file, or no shard of a split.
        FileExistsError: There is a ``shards.json`` already.
        ValueError: A shard is damaged or its name strange, a picture has no label or one that is none of the classes,
            or numbers and names are mixed.
    """
    folder = Path(folder)
    if (folder / SHARDS_FILE).exists():
        raise FileExistsError(f"{folder / SHARDS_FILE} exists already: the shards are listed")
    class_names = _read_names(classes) if classes else ()
    paths = [_find_shards(folder, ("train",)), _find_shards(folder, VALIDATION_FOLDERS)]
    num_shards = sum(map(len, paths))
    train: list[Shard] = []
    validation: list[Shard] = []
    labels: set[int | str] = set()
    for split, found in zip((train, validation), paths, strict=True):
        for path in found:
            shard, its_labels = _read_shard(path, class_names)
            split.append(shard)
            labels |= its_labels
            if progress:
                progress(len(train) + len(validation), num_shards)
    contents = Contents(class_names or _name_classes(labels), Preprocessing(), tuple(train), tuple(validation))
    save_contents(folder, contents)
    num_train, num_validation = (sum(shard.num_images for shard in split) for split in (train, validation))
    return Packed(folder, num_train, num_validation, num_shards, ())


def _find_shards(folder: Path, prefixes: Sequence[str]) -> list[Path]:
    """Return the shards whose names begin with the first of the prefixes that there are shards for."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of shards at {folder}")
    for prefix in prefixes:
        if paths := sorted(folder.glob(f"{prefix}*{SHARD_SUFFIX}")):
            return paths
    wanted = " or ".join(f"{prefix}*{SHARD_SUFFIX}" for prefix in prefixes)
    raise FileNotFoundError(f"no shards {wanted} in folder {folder}; rename those that are meant")


def _read_names(path: Path) -> tuple[str, ...]:
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if len(set(names)) < max(2, len(names)):
        raise ValueError(f"classes {path} must hold the names of two classes or more, one per line and each once")
    return names


def _read_shard(path: Path, class_names: Sequence[str]) -> tuple[Shard, set[int | str]]:
    """Return a shard, and the labels in it; where there are class names, each must be one of these."""
    if not SHARD_NAME.fullmatch(path.name):
        raise ValueError(f"shard {path} must have a name of letters, digits, dots, hyphens and underscores")
    unread = Shard(path.name, -1, "")
    labels: set[int | str] = set()
    with open_shard(str(path.parent), unread) as file:
        members = list_members(file, unread, str(path))
        for member in members:
            if member.label is None:
                raise ValueError(f"{path}/{member.name} has no label: no KEY{LABEL_SUFFIX} or KEY.json beside it tells")
            labels.add(number_label(str(path), member, class_names) if class_names else member.label)
        if not members:
            raise ValueError(f"shard {path} holds no pictures")
    return Shard(path.name, len(members), hash_file(path), path.stat().st_size), labels


def _name_classes(labels: set[int | str]) -> tuple[str, ...]:
    numbers = sorted(label for label in labels if isinstance(label, int))
    names = sorted(label for label in labels if isinstance(label, str))
    if numbers and names:
        raise ValueError(f"labels are numbers and names, such as {numbers[0]} and {names[0]}: give classes, all names")
    return tuple(names or map(str, range(numbers[-1] + 1)))
