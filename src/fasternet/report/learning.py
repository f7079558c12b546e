"""Learning: top-1 of runs that differ in nothing but their seed, as a mean with its spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasternet.records import Machine, Record
from fasternet.report.compare import scaled
from fasternet.report.markup import Cell, Column, Html, figure, table, tag
from fasternet.report.provenance import number, provenance, unique
from fasternet.report.seeds import UNLIKE
from fasternet.report.sources import Source, select

PLOT_WIDTH, PLOT_HEIGHT = 132, 22  # CSS pixels
MIN_DEVIATION_RUNS = 3
TOLD = ("select", "match")  # of an operation of surgery, beside its kind


@dataclass(frozen=True)
class Learned:
    """What one network learned from one data set by one recipe.

    Attributes:
        sources: The runs.
        runs: Their records of kind ``run``.
        evaluations: That of the best checkpoint of each run, in the same order.
        epochs: Those of all runs.
        top1: Percentage of each run.
    """

    sources: tuple[Source, ...]
    runs: tuple[Record, ...]
    evaluations: tuple[Record, ...]
    epochs: tuple[Record, ...]
    top1: tuple[float, ...]

    @property
    def condition(self) -> dict[str, Any]:
        """Data and recipe."""
        return {name: value for name, value in self.runs[0].condition.items() if name not in UNLIKE}

    @property
    def seeds(self) -> list[str]:
        """The seeds, each once."""
        return unique(str(run.condition.get("seed")) for run in self.runs)

    @property
    def images_per_second(self) -> float | None:
        """The median over all epochs."""
        speeds = [speed for epoch in self.epochs if (speed := number(epoch, "images_per_second")) is not None]
        return statistics.median(speeds) if speeds else None


def find_learned(sources: Sequence[Source]) -> list[Learned]:
    """Group the finished runs by machine, network, data and recipe, whatever their seeds."""
    groups: dict[str, list[tuple[Record, Record, Source]]] = {}
    met = set()
    for source in sources:
        runs, evaluations = select([source], "run"), select([source], "evaluation", "train")
        if not runs or not evaluations or number(evaluations[-1], "top1") is None:
            continue
        run, key = runs[-1], _key(runs[-1])
        if (origin := (key, run.condition.get("seed"), run.created)) in met:
            continue  # the same run, from its folder and from a file that it was merged into
        met.add(origin)
        groups.setdefault(key, []).append((run, evaluations[-1], source))
    return [
        Learned(
            tuple(source for _, _, source in rows),
            tuple(run for run, _, _ in rows),
            tuple(evaluation for _, evaluation, _ in rows),
            tuple(epoch for _, _, source in rows for epoch in select([source], "epoch")),
            tuple(top1 for _, evaluation, _ in rows if (top1 := number(evaluation, "top1")) is not None),
        )
        for rows in groups.values()
    ]


def _key(run: Record) -> str:
    condition = {name: value for name, value in run.condition.items() if name not in UNLIKE}
    return json.dumps([run.machine, run.subject, condition], sort_keys=True, default=str)


def show_learning(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the table of all finished runs, a row for runs that differ in their seed alone; of one run, nothing."""
    found = find_learned(sources)
    data = unique(str(row.condition.get("data")) for row in found)
    rows = sorted(found, key=lambda row: data.index(str(row.condition.get("data"))))
    runs = [run for row in rows for run in row.runs]
    if len(runs) < 2:
        return []
    told = _differing(rows)
    low, high = min(min(row.top1) for row in rows), max(max(row.top1) for row in rows)

    def deviation(row: Learned) -> float | None:
        return statistics.stdev(row.top1) if len(row.top1) >= MIN_DEVIATION_RUNS else None

    def spread(row: Learned) -> Cell | None:
        return Cell(f"{min(row.top1):.2f}–{max(row.top1):.2f}", min(row.top1)) if len(row.top1) > 1 else None

    def pictures(row: Learned) -> float | None:
        return number(row.evaluations[0], "num_images")

    def under(row: Learned) -> Cell | None:
        style = "display: block; white-space: normal; min-width: 12rem"
        return Cell(tag("span", text, style=style), text) if (text := _describe(row, told)) else None

    columns: list[Column[Learned]] = [
        Column("Network", lambda row: row.runs[0].subject),
        Column("data", lambda row: row.condition.get("data")),
        Column("pictures", pictures, ",.0f"),
        Column("epochs", lambda row: row.condition.get("epochs"), ",.0f"),
        Column("seeds", lambda row: len(row.seeds), ",.0f"),
        Column("mean", lambda row: statistics.fmean(row.top1), ".2f", "Top-1, %"),
        Column("least–most", spread, "", "Top-1, %"),
        Column("standard deviation", deviation, ".2f", "Top-1, %"),
        Column(f"{low:.1f} to {high:.1f}", lambda row: Cell(_draw(row, low, high), max(row.top1)), None, "Top-1, %"),
        Column("images/s", lambda row: row.images_per_second, ",.0f"),
        Column("parameters, M", lambda row: scaled(row.runs[0], "num_params", 1e6), ".2f"),
        Column("under", under),
    ]
    note = (
        "A row holds the runs of one network, data set, recipe and machine; they differ in their seed. Top-1 is that "
        "of each run’s best checkpoint, which the same pictures chose: that flatters all alike. A standard deviation "
        f"takes {MIN_DEVIATION_RUNS} runs. Images/s is the median epoch of training."
    )
    breaks = {i for i in range(1, len(rows)) if rows[i].condition.get("data") != rows[i - 1].condition.get("data")}
    content = table("learning", columns, rows, breaks=breaks)
    return [figure("learning", "What was learned", content, note, provenance(runs, machines))]


def _differing(rows: Sequence[Learned]) -> list[str]:
    """Return the conditions that tell rows apart and have no column of their own."""
    names = unique(name for row in rows for name in row.condition)
    values = {name: {json.dumps(row.condition.get(name), default=str) for row in rows} for name in names}
    return [name for name in names if len(values[name]) > 1 and name not in ("data", "epochs")]


def _describe(row: Learned, names: Sequence[str]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_plain(row.condition.get(name))}" for name in names)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        if "kind" in value and "select" in value:  # an operation of surgery
            return ", ".join((_plain(value["kind"]), *(f"{k} {_plain(value[k])}" for k in TOLD if k in value)))
        return ", ".join(f"{name.replace('_', ' ')} {_plain(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list):
        return (" then " if any(isinstance(inner, dict) for inner in value) else "–").join(map(_plain, value))
    return "none" if value is None else str(value)


def _draw(row: Learned, low: float, high: float) -> Html:
    """Draw the runs as dots, on an axis that all rows share, and their mean as a line."""

    def x(value: float) -> str:
        share = (value - low) / (high - low) if high > low else 0.5
        return f"{5 + (PLOT_WIDTH - 10) * share:.1f}"

    mean = x(statistics.fmean(row.top1))
    return tag(
        "svg",
        tag("line", x1=mean, x2=mean, y1=3, y2=PLOT_HEIGHT - 3),
        *(tag("circle", cx=x(value), cy=PLOT_HEIGHT / 2, r=3.5, fill_opacity=0.7, stroke="none") for value in row.top1),
        viewBox=f"0 0 {PLOT_WIDTH} {PLOT_HEIGHT}",
        width=PLOT_WIDTH,
        height=PLOT_HEIGHT,
        class_="interval faster",
        aria_hidden="true",
    )
