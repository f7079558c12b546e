"""Speed of training: the data alone, the step alone, both, and which one limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fasternet.records import Machine, Record
from fasternet.report.compare import Timing, interval_cell, scaled, speed_cell
from fasternet.report.markup import Column, Html, figure, table
from fasternet.report.networks import Footnotes, Row, list_rows
from fasternet.report.provenance import describe_condition, describe_setting, number, provenance, shared_condition
from fasternet.report.settings import Pair, Setting, list_settings
from fasternet.report.sources import Source, comparable, group, newest, select

SUITE = "training-speed"
PARTS = ("data", "step", "both")
MARGIN = 0.95  # both together at this share of the slower one: the slower one is what limits


def show_training_speed(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make a table for each machine and setting; ratios to other loops stand with all ratios."""
    latest = newest(
        select(sources, "latency", SUITE), lambda r: (r.subject, r.machine, describe_condition(r.condition))
    )
    settings = group(latest.values(), comparable)
    return [_table(f"training-speed-{i}", rows, machines) for i, rows in enumerate(settings.values(), start=1)]


def _table(key: str, records: Sequence[Record], machines: Mapping[str, Machine]) -> Html:
    shared = shared_condition(records)

    def differing(record: Record) -> str | None:
        return describe_condition({k: v for k, v in record.condition.items() if k not in shared}) or None

    columns: list[Column[Record]] = [
        Column("Subject", lambda record: record.subject),
        Column("images/s", lambda record: speed_cell(record, "images_per_second", ",.0f"), ""),
        Column("median", lambda record: speed_cell(record, "latency_ms", ",.2f"), "", "Step, ms"),
        Column("min", lambda record: scaled(record, "latency_ms_min", 1), ",.2f", "Step, ms"),
        Column("p90", lambda record: scaled(record, "latency_ms_p90", 1), ",.2f", "Step, ms"),
        Column("under", differing),
    ]
    title = f"Speed of training, {describe_setting(records[0])}"
    return figure(key, title, table(key, columns, records), tell_limit(records), provenance(records, machines))


def show_steps(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make a table of the training steps of networks for each machine and setting."""
    settings = enumerate(list_settings(sources, machines, "steps"), start=1)
    return [_table_steps(f"training-steps-{index}", found, machines) for index, found in settings]


def _table_steps(key: str, found: Setting, machines: Mapping[str, Machine]) -> Html:
    way, notes = found.ways[0], Footnotes(key)  # eager PyTorch alone

    def record(row: Row) -> Record | None:
        return found.find(row.name, row.size, way)

    def timing(row: Row) -> Timing | None:
        pair = Pair(row.name, row.size, way, row.reference or "", way)
        return found.timings.get(pair) if row.name != row.reference else None

    columns: list[Column[Row]] = [
        Column("Network", lambda row: row.name),
        Column("batch", lambda _: found.records[0].condition.get("batch_size"), ".0f"),
        Column("px", lambda row: row.size, ".0f"),
        Column("ms a step", lambda row: notes.mark(record(row)) or speed_cell(record(row), "latency_ms", ",.1f"), ""),
        Column("images/s", lambda row: scaled(record(row), "images_per_second", 1), ",.1f"),
        Column("ratio", lambda row: known.value if (known := timing(row)) else None, ".2f", "Time"),
        Column("95 % interval", lambda row: interval_cell(timing(row)), "", "Time"),
        Column("to", lambda row: row.reference if timing(row) else None, None, "Time"),
    ]
    content = table(key, columns, [row for row in list_rows(found) if record(row)])
    note = "A step: forward, cross-entropy, backward, SGD, with random pictures. The ratio is to the FasterNet named."
    return figure(key, f"Training steps ({found.label})", content, notes.show(), note, found.source(machines))


def tell_limit(records: Sequence[Record]) -> str | None:
    """Say whether data or step limits, from the speeds of ``NAME:data``, ``NAME:step`` and ``NAME:both``."""
    speeds: dict[str, dict[str, float]] = {}
    for record in records:
        name, _, part = record.subject.rpartition(":")
        if speed := number(record, "images_per_second"):
            speeds.setdefault(name, {})[part] = speed
    return " ".join(_tell(name, found) for name, found in speeds.items() if set(PARTS) <= set(found)) or None


def _tell(name: str, speeds: Mapping[str, float]) -> str:
    data, step, both = (speeds[part] for part in PARTS)
    share = both / min(data, step)
    slower = "the data limits" if data < step else "the step limits"
    told = f"{name}: " if name else ""
    told += f"{slower}, with {min(data, step):,.0f} images/s alone against {max(data, step):,.0f}; "
    told += f"both together reach {both:,.0f}, {100 * share:.0f} % of the slower one."
    return told if share >= MARGIN else f"{told} The two hinder one another."
