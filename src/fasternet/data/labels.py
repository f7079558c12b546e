"""Label files: lines of a picture's name and its class, for a folder of pictures without folders of classes."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

# With words behind it, or as in Kaggle's PredictionString with the corners of boxes.
_SYNSET = re.compile(r"(n\d{8})\s")
_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "classname", "category", "target", "synset", "wnid")

Classes = Mapping[str, Sequence[int]]


def index_classes(*names: Sequence[str]) -> Classes:
    """Return the classes that bear a name, by it; where lists of names differ, the earlier list counts."""
    table: dict[str, list[int]] = {}
    for words in (*names, *([_fold(word) for word in list_] for list_ in names)):
        level: dict[str, list[int]] = {}
        for number, word in enumerate(words):
            level.setdefault(word, []).append(number)
        table = level | table
    return table


def find_classes(classes: Classes, name: str) -> Sequence[int]:
    """Return the classes that a name may mean: as it is, else without regard to capitals and underscores."""
    return classes.get(name) or classes.get(_fold(name)) or ()


def read_labels(
    file: Path, text: str, paths: Sequence[Path], classes: Classes, num_classes: int
) -> tuple[list[int], tuple[str, ...]]:
    """Read lines of 'NAME LABEL' or 'NAME,LABEL', or of ImageNet's synsets, one each.

    Args:
        file: What errors call the text.
        text: The lines. Tabs, semicolons and commas separate as well. A head tells which of several columns is the
            label.
        paths: The pictures, relative to their folder.
        classes: Of ``index_classes``. A label that is a name of a class is taken as that, any other as an index.
        num_classes: How many classes there are.

    Returns:
        The label of each picture, and remarks in sentences.

    Raises:
        ValueError: A line is not understood, a name may mean several pictures or classes, or a picture has no label.
    """
    rows = _split_rows(file, text)
    file_names = {path.name for path in paths}
    names = file_names | {path.stem for path in paths}
    table: dict[str, int] = {}
    renumbered: set[str] = set()
    column, num_columns = 1, 2  # of the label, and at most
    for line, row in rows:
        where = f"label file {file} line {line}"
        name = PurePosixPath(row[0])
        if len(row) == 2 and name.name not in names and PurePosixPath(row[1]).name in file_names:
            raise ValueError(f"{where} names picture {row[1]} last: the picture comes first, then its label")
        if line == rows[0][0] and len(row) > 1 and name.name not in names:
            head = [cell.lower() for cell in row[1:]]
            if known := [number for number, cell in enumerate(head, start=1) if cell in _LABEL_COLUMNS]:
                column, num_columns = known[0], len(row)
            continue
        if not column < len(row) <= num_columns or not row[0] or not row[column]:
            raise ValueError(
                f"{where} must be a picture's name and its label, but has {len(row)} columns: {row}; two are wanted, "
                "or a head that names one of them 'label'"
            )
        word = row[column]
        label = _parse_label(word, classes, where, num_classes)
        if table.setdefault(str(name), label) != label:
            raise ValueError(
                f"{where} says that {name} is of class {label}, a line before it of class {table[str(name)]}"
            )
        if word.isdecimal() and int(word) != label:
            renumbered.add(word)
    found, num_used = _match(file, paths, table)
    remarks = []
    if renumbered:
        remarks.append(f"labels such as {min(renumbered)} are taken as names of classes, not as indices")
    if num_used < len(table):
        remarks.append(f"the label file names {len(table) - num_used} more pictures, which are not in the folder")
    return found, tuple(remarks)


def _fold(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def _split_rows(file: Path, text: str) -> list[tuple[int, list[str]]]:
    """Return the rows that are not blank, each with the number of its line."""
    lines = text.splitlines()
    filled = [line for line in lines if line.strip()]
    first = filled[0] if filled else ""
    marks = [mark for mark in "\t;," if mark in first and (mark == "," or all(mark in line for line in filled))]
    separator = min(marks, key=first.index, default=None)
    try:
        cells = csv.reader(lines, delimiter=separator) if separator else (line.rsplit(maxsplit=1) for line in lines)
        stripped = [(line, [cell.strip() for cell in row]) for line, row in enumerate(cells, start=1)]
    except csv.Error:
        raise ValueError(f"label file {file} is damaged, or no text") from None
    rows = [(line, row[: 1 + max(n for n, cell in enumerate(row) if cell)]) for line, row in stripped if any(row)]
    if any(len(row) > 1 for _, row in rows):
        return rows
    if rows and all(row[0].isdecimal() for _, row in rows):
        raise ValueError(
            f"label file {file} holds numbers alone: the devkit's ILSVRC ids are not the order of the network's "
            "outputs; take a file with a picture's name and its index from 0, or its synset, on each line"
        )
    return [(line, [f"ILSVRC2012_val_{number:08}", *row]) for number, (line, row) in enumerate(rows, start=1)]


def _parse_label(word: str, classes: Classes, where: str, num_classes: int) -> int:
    synset = _SYNSET.match(word)
    if found := find_classes(classes, word) or (find_classes(classes, synset[1]) if synset else ()):
        if len(found) > 1:
            raise ValueError(f"{where}: {word!r} is the name of {len(found)} classes: give the index, one of {found}")
        return found[0]
    if not word.isdecimal():
        raise ValueError(f"{where}: {word!r} is neither a class of the network nor the index of one")
    if int(word) >= num_classes:
        raise ValueError(f"{where}: index {word} is beyond {num_classes - 1}; classes are counted from 0")
    return int(word)


def _match(file: Path, paths: Sequence[Path], table: Mapping[str, int]) -> tuple[list[int], int]:
    """Return the label of each picture, and how many of the table's names were needed.

    A picture is looked up by its path, then by its name alone, each with and without suffix; the names in the
    table may have more folders in front.
    """
    depths = {1, *(len(path.parts) for path in paths)}
    tails: dict[str, list[str]] = {}
    for name in table:
        parts = PurePosixPath(name).parts
        for depth in depths & set(range(1, len(parts) + 1)):
            tails.setdefault("/".join(parts[-depth:]), []).append(name)
    owners: dict[str, Path] = {}
    labels: list[int] = []
    absent: list[Path] = []
    for path in paths:
        keys = (path.as_posix(), path.with_suffix("").as_posix(), path.name, path.stem)
        key = next((key for key in keys if key in tails), None)
        if key is None:
            absent.append(path)
            continue
        names = [key] if key in table else tails[key]
        if len({table[name] for name in names}) > 1:
            raise ValueError(f"label file {file} names {names[0]} and {names[1]}; either may be picture {path}")
        if (owner := owners.setdefault(names[0], path)) != path:
            raise ValueError(
                f"label file {file} does not tell pictures {owner} and {path} apart: give each a line with its folder "
                "or suffix"
            )
        labels.append(table[names[0]])
    if absent:
        raise ValueError(f"label file {file} does not name {absent[0]} ({len(absent)} of {len(paths)} pictures)")
    return labels, len(owners)
