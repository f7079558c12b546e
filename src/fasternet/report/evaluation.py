"""Evaluation: the confusion matrix, how far confidence can be trusted, accuracy class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fasternet.records import Machine, Record
from fasternet.report.markup import Column, Html, figure, join, table, tag
from fasternet.report.matrix import draw_matrix
from fasternet.report.plots import Bin, draw_calibration
from fasternet.report.provenance import number, provenance

MAX_SURE_CLASSES = 5  # up to which the right one is always among the best five
MAX_OPEN_CLASSES = 20
MAX_CONFUSIONS = 20


class Confusion(NamedTuple):
    """Pictures of one class that were taken for another."""

    truth: str
    label: str
    pictures: int
    share: float | None


def show_evaluation(key: str, title: str, record: Record, machines: Mapping[str, Machine]) -> Html:
    """Make the figure of one evaluation; its tables need no colours to be read."""
    classes = [c for c in record.values.get("per_class") or [] if isinstance(c, dict)]
    names = [str(c.get("name")) for c in classes]
    matrix, bins = _read_matrix(record, len(names)), _read_bins(record)
    panels = []
    if matrix:
        panels.append(tag("div", draw_matrix(f"{key}-title", matrix, names), class_="panel"))
    if bins:
        panels.append(tag("div", draw_calibration(bins, key=f"{key}-bins", alt=_tell_bins(record)), class_="panel"))
    content = [tag("div", *panels, class_="panels")] if panels else []
    content += _show_confusions(key, record, matrix, classes)
    content += _show_classes(key, classes)
    notes = []
    if matrix:
        notes.append(
            "A row of the matrix is a class: blue what was recognised, orange what it was taken for; the stronger the "
            "colour, the larger the share of the row."
        )
    if bins:
        notes.append(
            "Calibration groups pictures by confidence; the larger a dot, the more of them. On the dashed line a "
            "network is right as often as it says. ECE is the mean distance from it."
        )
    told = " ".join(notes) or None
    return figure(key, f"{title}: {_tell(record)}", join(content), told, provenance([record], machines))


def _tell(record: Record) -> str:
    top1, top5, loss, ece, pictures = (number(record, name) for name in ("top1", "top5", "loss", "ece", "num_images"))
    if 0 < len(record.values.get("per_class") or []) <= MAX_SURE_CLASSES:
        top5 = None
    figures = (
        ("top-1", top1, ".2f", " %"),
        ("top-5", top5, ".2f", " %"),
        ("loss", loss, ".4f", ""),
        ("ECE", None if ece is None else 100 * ece, ".1f", " %"),
    )
    told = [f"{name} {value:{form}}{unit}" for name, value, form, unit in figures if value is not None]
    return ", ".join(told) + (f", {pictures:,} pictures" if pictures is not None else "")


def _read_matrix(record: Record, num_classes: int) -> list[list[int]] | None:
    """Return the counts, truths in rows and predictions in columns, where the record holds all of them."""
    rows = record.values.get("confusion")
    if not isinstance(rows, list) or not num_classes or len(rows) != num_classes:
        return None
    square = all(isinstance(row, list) and len(row) == num_classes for row in rows)
    return rows if square and all(_is_count(cell) for row in rows for cell in row) else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _list_confusions(
    record: Record, matrix: Sequence[Sequence[int]] | None, classes: Sequence[Mapping[str, Any]]
) -> list[Confusion]:
    """Return the most frequent confusions, of the matrix or as the record of many classes lists them."""
    names = [str(c.get("name")) for c in classes]
    sizes = {name: c.get("num_images") for name, c in zip(names, classes, strict=True)}
    if matrix:
        found = [
            (names[truth], names[label], count)
            for truth, row in enumerate(matrix)
            for label, count in enumerate(row)
            if truth != label and count
        ]
    else:
        listed = record.values.get("confusion") or []
        found = [
            (str(entry[0]), str(entry[1]), entry[2])
            for entry in (listed if isinstance(listed, list) else [])
            if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str) and _is_count(entry[2])
        ]
    found.sort(key=lambda confusion: -confusion[2])
    return [
        Confusion(truth, label, count, 100 * count / size if _is_count(size := sizes.get(truth)) and size else None)
        for truth, label, count in found[:MAX_CONFUSIONS]
    ]


def _show_confusions(
    key: str, record: Record, matrix: Sequence[Sequence[int]] | None, classes: Sequence[Mapping[str, Any]]
) -> list[Html]:
    confusions = _list_confusions(record, matrix, classes)
    if not confusions:
        return []
    columns: list[Column[Confusion]] = [
        Column("Truth", lambda row: row.truth),
        Column("taken for", lambda row: row.label),
        Column("pictures", lambda row: row.pictures, ",.0f"),
        Column("of the class, %", lambda row: row.share, ".1f"),
    ]
    content = table(key, columns, confusions)
    return [tag("details", tag("summary", "Most frequent confusions"), content, open=None if matrix else "")]


def _show_classes(key: str, classes: Sequence[dict[str, Any]]) -> list[Html]:
    columns: list[Column[dict[str, Any]]] = [
        Column("Class", lambda row: row.get("name")),
        Column("pictures", lambda row: row.get("num_images"), ",.0f"),
        Column("top-1, %", lambda row: row.get("top1"), ".1f"),
    ]
    if not classes:
        return []
    content = table(key, columns, classes)
    if len(classes) > MAX_OPEN_CLASSES:
        content = tag("details", tag("summary", f"All {len(classes)} classes"), content)
    return [content]


def _read_bins(record: Record) -> list[Bin]:
    """Return the bins that hold pictures, confidence and accuracy as percentages."""
    listed = record.values.get("calibration")
    bins = [row for row in listed if isinstance(row, list) and len(row) == 3] if isinstance(listed, list) else []
    return [
        Bin(row[0], 100 * row[1], 100 * row[2])
        for row in bins
        if _is_count(row[0]) and row[0] and all(isinstance(value, int | float) for value in row[1:])
    ]


def _tell_bins(record: Record) -> str:
    bins = _read_bins(record)
    return "Accuracy by confidence: " + ", ".join(f"{b.accuracy:.0f} % at {b.confidence:.0f} %" for b in bins)
