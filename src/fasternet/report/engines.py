"""The CPU engine: its time beside every other way to run the same network here, and where that time goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fasternet.records import Machine, Record
from fasternet.report.compare import Timing, interval_cell, read_timing, scaled, speed_cell
from fasternet.report.markup import Cell, Column, Html, figure, table, tag
from fasternet.report.networks import Footnotes
from fasternet.report.provenance import describe_condition, number, provenance
from fasternet.report.settings import ENGINES, read_way
from fasternet.report.sources import Source, group, newest, select

SUITE = "engines"
OWN = "cpu"
FORMS = {
    **{"": "this package’s form", "split_cat": "split_cat", "slicing": "clone, then write"},
    **{"inplace": "in place (not exact)", "max_autotune": "max-autotune"},
}
SHARED = ("device", "threads", "batch_size", "isa")
NOTE = (
    "All of a network’s rows ran interleaved in one process, BN folded. A ratio is the CPU engine’s time over that of "
    "the row, in the same precision: below 1 the CPU engine is faster. ‘Times as fast’ is its inverse, in the CPU "
    "engine’s own row over the best rival, which the target is for. ‘In place’ overwrites the shortcut, as the paper’s "
    "speeds were measured: not the trained function, and a mark to beat all the same."
)
REGISTERS = "‘% of registers’: of the multiply-adds a second that these cores do when everything is in registers."


class Row(NamedTuple):
    """A network in one precision, run by one engine in one form."""

    network: str
    precision: str
    engine: str
    form: str


def show_engines(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the tables of every machine and set of conditions."""
    ratios = group((r for r in select(sources, "ratio", SUITE) if read_timing(r)), _equal)
    stages = group(select(sources, "stage", SUITE), _equal)
    content = []
    for index, (setup, members) in enumerate(group(select(sources, "latency", SUITE), _equal).items(), start=1):
        label = describe_condition({name: members[0].condition.get(name) for name in SHARED})
        content.append(_show_rivals(f"cpu-engine-{index}", label, members, ratios.get(setup, []), machines))
        if setup in stages:
            content.append(_show_stages(f"cpu-engine-parts-{index}", label, stages[setup], machines))
    return content


def _equal(record: Record) -> tuple[str, ...]:
    return (record.machine, *(str(record.condition.get(name)) for name in SHARED))


def _read(record: Record, prefix: str = "") -> Row:
    """Return the row of a record, or with ``baseline_`` that of what its ratio is against."""
    subject = record.condition["baseline"] if prefix else record.subject
    network, _, form = str(subject).partition(":")
    way = read_way(record, prefix)
    return Row(network, way.precision, way.engine, form)


def _show_rivals(
    key: str, label: str, latencies: Sequence[Record], ratios: Sequence[Record], machines: Mapping[str, Machine]
) -> Html:
    latest = newest(latencies, _read)
    order = list(dict.fromkeys((row.network, row.precision) for row in latest))
    rows = sorted(latest, key=lambda row: (order.index((row.network, row.precision)), row.engine != OWN))
    pairs = newest(
        (r for r in ratios if not r.condition.get("best_rival")), lambda r: (_read(r), _read(r, "baseline_"))
    )
    best = newest((r for r in ratios if r.condition.get("best_rival")), _read)
    fastest = {_read(ratio, "baseline_") for ratio in best.values()}
    notes = Footnotes(key)

    def ratio(row: Row, precision: str | None = None) -> Record | None:
        return pairs.get((Row(row.network, precision or row.precision, OWN, ""), row)) if row.engine != OWN else None

    def timing(row: Row) -> Timing | None:
        return read_timing(found) if (found := ratio(row)) else None

    def name(row: Row) -> object:
        told = f"{ENGINES.get(row.engine, row.engine)}{_describe_form(row)}"
        return tag("strong", told) if row.engine == OWN else f"{told} – the best rival" if row in fastest else told

    def judged(row: Row) -> Mapping[str, object]:
        return found.values if row.engine == OWN and (found := best.get(row)) else {}

    def times(row: Row) -> float | None:
        found = number(best[row], "times_as_fast") if judged(row) else None
        known = timing(row)
        return found if row.engine == OWN else 1 / known.value if known else None

    def target(row: Row) -> str | None:
        known = judged(row)
        if "target_reason" not in known:
            return None
        wanted = known["target"]
        told = "" if wanted is None else f" ({'not slower' if wanted == 1 else f'{wanted:g}'})"
        inexact = "" if best[row].condition.get("baseline_exact", True) else ", against what is not exact"
        return f"{known['target_reason']}{told}{inexact}"

    def in_bf16(row: Row) -> float | None:
        found = ratio(row, "bf16") if row.precision == "fp32" else None
        return known.value if found and (known := read_timing(found)) else None

    columns: list[Column[Row]] = [
        Column("Network", lambda row: row.network),
        Column("precision", lambda row: row.precision),
        Column("run by", name),
        Column("median", lambda r: notes.mark(latest[r]) or speed_cell(latest[r], "latency_ms", ".2f"), ".2f", "ms"),
        Column("min", lambda row: scaled(latest[row], "latency_ms_min", 1), ".2f", "ms"),
        Column("images/s", lambda row: number(latest[row], "images_per_second"), ",.1f"),
        Column("ratio", lambda row: known.value if (known := timing(row)) else None, ".3f", "CPU engine to it"),
        Column("95 % interval", lambda row: interval_cell(timing(row), ".3f"), "", "CPU engine to it"),
        Column("times as fast", times, ".2f", "CPU engine to it"),
        Column("verdict", lambda row: str(r.values.get("verdict")) if (r := ratio(row)) else None, None,
               "CPU engine to it"),
        Column("in bf16: ratio", in_bf16, ".3f", "CPU engine to it"),
        Column("target", target, None),
        Column("% of GEMM", lambda row: scaled(latest[row], "peak_share", 0.01), ".0f"),
        Column("% of registers", lambda row: scaled(latest[row], "register_peak_share", 0.01), ".0f"),
    ]  # fmt: skip
    breaks = [i for i in range(1, len(rows)) if rows[i][:2] != rows[i - 1][:2]]
    title = f"The CPU engine and its rivals ({label})"
    content = table(key, columns, rows, breaks=breaks)
    return figure(key, title, content, notes.show(), NOTE, REGISTERS, provenance(list(latest.values()), machines))


def _describe_form(row: Row) -> str:
    """Return what to say of the form, where there is a choice."""
    if row.engine == "eager" or row.form:
        return f", {FORMS.get(row.form, row.form)}"
    return ""


def _show_stages(key: str, label: str, records: Sequence[Record], machines: Mapping[str, Machine]) -> Html:
    found = newest(records, lambda r: (r.subject, read_way(r).precision, r.condition.get("stage")))
    rows = list(found.values())

    def value(name: str, unit: float) -> Callable[[Record], float | None]:
        return lambda record: scaled(record, name, unit)

    def name(record: Record) -> Cell:
        return Cell(str(record.condition.get("stage")))

    columns: list[Column[Record]] = [
        Column("Network", lambda record: record.subject),
        Column("precision", lambda record: read_way(record).precision),
        Column("part", name),
        Column("instructions", lambda record: record.values.get("isa")),
        Column("layers", lambda record: number(record, "num_layers"), ".0f"),
        Column("ms", value("latency_ms", 1), ".3f"),
        Column("% of the time", value("share", 0.01), ".1f"),
        Column("G multiply-adds", value("macs", 1e9), ".4f"),
        Column("G multiply-adds/s", value("macs_per_second", 1e9), ".1f"),
        Column("% of registers", value("register_peak_share", 0.01), ".0f"),
    ]
    breaks = [
        i for i in range(1, len(rows)) if _read(rows[i])[:2] != _read(rows[i - 1])[:2]
    ]  # fmt: skip
    title = f"The CPU engine, part by part ({label})"
    return figure(key, title, table(key, columns, rows, breaks=breaks), REGISTERS, provenance(rows, machines))
