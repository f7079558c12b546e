"""Sweeps: how latency grows with the input's side, the batch and the threads, beside the ideal line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fasternet.records import Machine, Record
from fasternet.report.compare import divide, speed_cell
from fasternet.report.markup import Cell, Column, Html, figure, join, table, tag
from fasternet.report.networks import Footnotes
from fasternet.report.plots import draw_plane
from fasternet.report.points import Line, Point, list_legend, tell_points
from fasternet.report.provenance import describe_condition, number, provenance
from fasternet.report.settings import Way, read_way
from fasternet.report.sources import Source, group, newest, select


class Sweep(NamedTuple):
    """What is swept.

    Attributes:
        label: Its name with its unit.
        power: Ideally latency grows with this power of it.
        ideal: That in words.
    """

    label: str
    power: int
    ideal: str


SWEEPS = {
    "input_size": Sweep("Input’s side, px", 2, "in proportion to the pixels"),
    "batch_size": Sweep("Batch, pictures", 1, "in proportion to the batch"),
    "threads": Sweep("Threads", -1, "inversely to the threads"),
}
EQUAL = ("device", "threads", "batch_size", "input_size")


class Row(NamedTuple):
    """One network in one engine and precision, by swept value."""

    name: str
    way: Way
    records: Mapping[float, Record]


def show_sweeps(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make a plot and a table for every sweep under equal conditions."""
    swept = [r for r in select(sources, "latency", "sweeps") if r.condition.get("sweep") in SWEEPS and _read_value(r)]
    content = []
    for index, members in enumerate(group(swept, _equal).values(), start=1):
        content.append(_show_sweep(f"sweep-{index}", members, machines))
    return content


def _equal(record: Record) -> tuple[str, ...]:
    return (record.machine, *(f"{name} {value}" for name, value in _fixed(record).items()))


def _fixed(record: Record) -> dict[str, object]:
    """Return the conditions that a sweep keeps; networks of different input sizes share one unless it is swept."""
    sweep = record.condition["sweep"]
    kept = {name: record.condition.get(name) for name in EQUAL if name not in (sweep, "input_size")}
    return {"sweep": sweep, **kept}


def _read_value(record: Record) -> float | None:
    value = record.condition.get(str(record.condition["sweep"]))
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _show_sweep(key: str, members: Sequence[Record], machines: Mapping[str, Machine]) -> Html:
    records = list(newest(members, lambda r: (r.subject, read_way(r), _read_value(r))).values())
    sweep, rows = SWEEPS[members[0].condition["sweep"]], _list_rows(records)
    points, lines = _list_points(rows, sweep.power)
    notes, parts = Footnotes(key), []
    if points:
        drawing = draw_plane(
            points, lines, key=key, title="Latency, ms", x_label=sweep.label,
            alt=f"Latency over {sweep.label}; the table below holds the numbers",
        )  # fmt: skip
        entries = {"fasternet": "FasterNet", "rival": "other networks", "ideal": f"ideal: {sweep.ideal}"}
        parts = [list_legend(points, entries), drawing]
    under = describe_condition({name: value for name, value in _fixed(members[0]).items() if name != "sweep"})
    title = f"Latency over {sweep.label.partition(',')[0].lower()} ({under})"
    note = f"Ideally latency changes {sweep.ideal}; ‘of ideal’: that growth from the first to the last value, "
    note += "divided by the measured one."
    body = join([*parts, _table(key, rows, sweep, notes)])
    reading = tell_points("the table") if points else None
    return figure(key, title, body, notes.show(), note, reading, provenance(records, machines))


def _list_rows(records: Sequence[Record]) -> list[Row]:
    rows = group(records, lambda record: (record.subject, read_way(record)))
    return [Row(name, way, {_read_value(r) or 0: r for r in members}) for (name, way), members in rows.items()]


def _list_measured(row: Row) -> list[tuple[float, float]]:
    found = ((value, number(record, "latency_ms")) for value, record in sorted(row.records.items()))
    return [(value, latency) for value, latency in found if latency and latency > 0]


def _list_points(rows: Sequence[Row], power: int) -> tuple[list[Point], list[Line]]:
    """Return the points of a plot, the lines through them and the ideal ones from the first point of each."""
    points, lines = [], []
    for row in rows:
        if not (corners := _list_measured(row)):
            continue
        engine = str(row.way)
        points += [Point(row.name, x, y, engine=engine, named=(x, y) == corners[-1]) for x, y in corners]
        lines.append(Line(tuple(corners), row.name.startswith("FasterNet"), engine=engine))
        (first, latency), (last, _) = corners[0], corners[-1]
        ideal = ((first, latency), (last, latency * (last / first) ** power))
        lines.append(Line(ideal, dashed=True, engine=engine))
    return points, lines


def _table(key: str, rows: Sequence[Row], sweep: Sweep, notes: Footnotes) -> Html:
    values = sorted({value for row in rows for value in row.records})

    def at(value: float) -> Callable[[Row], Cell | None]:
        def cell(row: Row) -> Cell | None:
            record = row.records.get(value)
            return notes.mark(record) or speed_cell(record, "latency_ms", ".2f")

        return cell

    def share(row: Row) -> float | None:
        measured = _list_measured(row)
        if len(measured) < 2:
            return None
        (first, start), (last, end) = measured[0], measured[-1]
        return divide((last / first) ** sweep.power, end / start)

    columns: list[Column[Row]] = [
        Column("Network", lambda row: row.name),
        Column("engine, precision", lambda row: Cell(tag("span", row.way, data_engine=row.way), str(row.way))),
        *(
            Column(f"{value:g}", at(value), ".2f", f"Latency, ms, at {sweep.label[0].lower()}{sweep.label[1:]}")
            for value in values
        ),
        Column("of ideal", share, ".2f"),
    ]
    return table(key, columns, rows)
