"""Every measured ratio, with its interval, its verdict and the error of the run that it stands against."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fasternet.records import Machine, Record
from fasternet.report.compare import Timing, interval_cell, read_timing, scaled
from fasternet.report.markup import Cell, Column, Html, figure, table, tag
from fasternet.report.operators import describe_operator
from fasternet.report.provenance import describe_condition, number, provenance, shared_condition
from fasternet.report.settings import INT8, read_way
from fasternet.report.sources import Source, comparable, newest, select

PLOT_WIDTH, PLOT_HEIGHT = 132, 30  # CSS pixels
MAX_OPEN_ROWS = 60
DISTINGUISHING = (
    *("baseline", "part", "input_size", "channels", "height", "width"),
    *("size", "model", "select", "operator", "match", "init"),  # of the ablation and of surgery
)


def is_control(ratio: Record) -> bool:
    """Whether a ratio is that of a thing to itself, which tells the error of its run."""
    return ratio.subject == ratio.condition.get("baseline") and read_way(ratio) == read_way(ratio, "baseline_")


def list_ratios(sources: Sequence[Source]) -> list[tuple[Record, Timing]]:
    """Return the newest of every ratio of times; the A/A controls stay out, each ratio tells their spread."""
    ratios = [r for r in select(sources, "ratio") if read_timing(r) and not is_control(r)]

    def identify(ratio: Record) -> tuple[object, ...]:
        condition = ratio.condition
        told = (condition.get("passes", "forward"), bool(condition.get("best_engines")))
        known = (ratio.suite, ratio.subject, comparable(ratio), read_way(ratio, "baseline_"))
        return (*known, *told, *(str(condition.get(name)) for name in DISTINGUISHING))

    latest = newest(ratios, identify)
    return [(record, timing) for record in latest.values() if (timing := read_timing(record))]


def show_ratios(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the table of all ratios, suite by suite."""
    suites: dict[str, list[tuple[Record, Timing]]] = {}
    for record, timing in list_ratios(sources):
        suites.setdefault(record.suite, []).append((record, timing))
    tables = [_table(f"ratios-{i}", *item, machines) for i, item in enumerate(suites.items(), start=1)]
    return [*tables, *_show_controls(sources, machines)]


def _show_controls(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the table of the A/A controls: what each run measured of a thing against itself, and what it warned of."""
    ratios = ((record, read_timing(record)) for record in select(sources, "ratio") if is_control(record))
    rows = [(record, timing) for record, timing in ratios if timing]
    if not rows:
        return []
    columns: list[Column[tuple[Record, Timing]]] = [
        Column("Suite", lambda row: row[0].suite),
        Column("subject, against itself", lambda row: row[0].subject),
        Column("under", lambda row: describe_condition(row[0].condition)),
        Column("date", lambda row: row[0].created[:10]),
        Column("ratio", lambda row: row[1].value, ".3f", "Time"),
        Column("95 % interval", lambda row: interval_cell(row[1], ".3f"), "", "Time"),
        Column("rounds", lambda row: number(row[0], "num_blocks"), ".0f"),
        Column("warnings", lambda row: "; ".join(map(str, row[0].values.get("warnings") or ())) or None),
    ]
    content = table("controls", columns, rows)
    if len(rows) > MAX_OPEN_ROWS:
        content = tag("details", tag("summary", f"All {len(rows):,} controls"), content)
    note = "Every run measures one subject twice: a ratio far from 1 is the run’s own error."
    small = provenance([record for record, _ in rows], machines)
    return [figure("controls", "Controls", content, note, small)]


def _table(key: str, suite: str, rows: Sequence[tuple[Record, Timing]], machines: Mapping[str, Machine]) -> Html:
    records = [record for record, _ in rows]
    shared = shared_condition(records)
    span = max(1.1, *(max(timing.high, 1 / timing.low) for _, timing in rows))

    def name(subject: object, ratio: Record, place: int) -> str:
        """Name one side of a ratio, with its engine and precision where they are not the other's."""
        told = describe_operator(str(subject)) if suite == "operators" else str(subject)
        ways = read_way(ratio), read_way(ratio, "baseline_")
        return told if ways[0] == ways[1] and ways[0].precision != INT8 else f"{told} ({ways[place]})"

    def differing(row: tuple[Record, Timing]) -> str | None:
        return describe_condition({k: v for k, v in row[0].condition.items() if k not in shared}) or None

    columns: list[Column[tuple[Record, Timing]]] = [
        Column("Subject", lambda row: name(row[0].subject, row[0], 0)),
        Column("against", lambda row: name(row[0].condition.get("baseline"), row[0], 1)),
        Column("ratio", lambda row: row[1].value, ".3f", "Time"),
        Column("95 % interval", lambda row: interval_cell(row[1], ".3f"), "", "Time"),
        Column("less ← 1 → more", lambda row: Cell(_draw(*row, span), row[1].value), None, "Time"),
        Column("verdict", lambda row: row[0].values.get("verdict")),
        Column("A/A spread, %", lambda row: scaled(row[0], "a_a_spread", 0.01), ".1f"),
        Column("under", differing),
    ]
    note = "Time is the subject’s median over the other’s: below 1 the subject is faster."
    content = table(key, columns, rows)
    if len(rows) > MAX_OPEN_ROWS:
        content = tag("details", tag("summary", f"All {len(rows):,} ratios"), content)
    return figure(key, f"Ratios of time, {suite}", content, note, provenance(records, machines))


def _draw(record: Record, timing: Timing, span: float) -> Html:
    """Draw an interval on a logarithmic axis with 1 in the middle."""

    def x(value: float) -> str:
        return f"{PLOT_WIDTH / 2 + (PLOT_WIDTH / 2 - 5) * math.log(value) / math.log(span):.1f}"

    middle = PLOT_HEIGHT / 2
    return tag(
        "svg",
        tag("line", class_="one", x1=x(1), x2=x(1), y1=0, y2=PLOT_HEIGHT),
        tag("line", x1=x(timing.low), x2=x(timing.high), y1=middle, y2=middle),
        tag("circle", cx=x(timing.value), cy=middle, r=3),
        viewBox=f"0 0 {PLOT_WIDTH} {PLOT_HEIGHT}",
        width=PLOT_WIDTH,
        height=PLOT_HEIGHT,
        class_=f"interval {record.values.get('verdict')}",
        aria_hidden="true",
    )
