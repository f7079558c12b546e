"""Table 5 on small data: what each part of the design is worth, in top-1 over seeds and in time, beside the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fasternet.paper import load_table
from fasternet.records import Machine, Record
from fasternet.report.compare import Timing, interval_cell, printed, read_timing, scaled, speed_cell
from fasternet.report.markup import SPACED, Cell, Column, Html, figure, join, table, tag
from fasternet.report.provenance import count, describe_machine, describe_setting, number, provenance, unique
from fasternet.report.seeds import (
    Mean,
    by_seed,
    find_difference,
    find_mean,
    group_alike,
    judge_difference,
    mean_cell,
    signed_cell,
    span_cell,
)
from fasternet.report.sources import Source, group, newest, select

BASE = "base"
SUITE = "ablation"
# Variants that Table 5 has too: its row, and the row of the paper's choice.
PAPER = {
    "r=1/8": ("T0* r=1/8", "T0 r=1/4"),
    "r=1/2": ("T0* r=1/2", "T0 r=1/4"),
    "LN": ("T0 LN", "T0 BN"),
    "ReLU": ("T0 ReLU", "T0 GELU"),
}
EXPLAINED = (
    "Every variant is the base but for what ‘differs’ says, trained alike from scratch. The difference to the base is "
    "taken seed by seed; its interval is Student’s t over the seeds, and better or worse takes an interval without 0. "
    "With so many variants about one in twenty would be called different by chance alone. A small network on small "
    "pictures, trained for short, tells about that: not about ImageNet.",
    "Paper v1: the difference of top-1 in Table 5 to its choice, of T0 on ImageNet with its full recipe, one run each, "
    "and so without an interval.",
)
TIMES = (
    "Times are medians, and ratios that of the variant over that of the base, below 1 faster; at the base stands what "
    "the base measured against itself, the error of the run."
)
SIZES = {"full": "T0"}  # how sizes of the base are called
SHOWN = {"small": ("small", "full")}  # sizes whose times stand with the accuracy of one


class Timed(NamedTuple):
    """Of what network and under which conditions times may stand in one column."""

    size: str
    input_size: object
    setting: str

    def __str__(self) -> str:
        return f"{_name_size(self.size, self.input_size)}: {self.setting}"


@dataclass(frozen=True)
class Variant:
    """One row: a variant, what it reached over the seeds, and how long it takes.

    Attributes:
        name: Its label.
        records: Of its seeds; none where only its speed was measured.
        top1: Mean over the seeds, in per cent.
        difference: To the base, paired by seed; None for the base.
        ratios: Records of its time relative to the base's; of the base, the A/A control.
        latencies: Records of its time.
    """

    name: str
    records: tuple[Record, ...]
    top1: Mean | None
    difference: Mean | None
    ratios: Mapping[Timed, Record]
    latencies: Mapping[Timed, Record]

    def find_timing(self, timed: Timed) -> Timing | None:
        """Return its time relative to the base's."""
        return read_timing(self.ratios[timed]) if timed in self.ratios else None

    def tell(self, name: str) -> Any:
        """Return a value that all its records share."""
        records = (*self.records, *self.latencies.values())
        return next((record.values[name] for record in records if name in record.values), None)


def show_ablation(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the ablation for every set of conditions; times without accuracy of their machine have a table of theirs."""
    studies = group_alike(r for r in select(sources, "study", SUITE) if number(r, "top1") is not None)
    ratios = [r for r in select(sources, "ratio", SUITE) if r.condition.get("baseline") == BASE and read_timing(r)]
    times = [*ratios, *select(sources, "latency", SUITE)]
    shown = [(records, [time for time in times if _fits(time, records[0])]) for records in studies]
    used = {id(time) for _, members in shown for time in members}
    alone = group((r for r in times if id(r) not in used), lambda r: (r.machine, str(r.condition.get("size"))))
    shown += [([], members) for members in alone.values()]
    return [_show(f"ablation-{i}", *members, machines) for i, members in enumerate(shown, start=1)]


def _fits(time: Record, study: Record) -> bool:
    """Whether a time stands with an accuracy: both of one machine, and of a size that is shown with it."""
    size = str(study.condition.get("size"))
    return time.machine == study.machine and str(time.condition.get("size")) in SHOWN.get(size, (size,))


def list_variants(records: Sequence[Record], times: Sequence[Record]) -> list[Variant]:
    """Return the variants in the order in which they were recorded, with their times, latencies and ratios."""

    def identify(record: Record) -> tuple[str, str, Timed]:
        condition = record.condition
        timed = Timed(str(condition.get("size")), condition.get("input_size"), describe_setting(record))
        return record.kind, record.subject, timed

    latest = newest(times, identify)
    base = by_seed((record for record in records if record.subject == BASE), "top1")
    rows = []
    for name in unique(record.subject for record in records or times):
        own = tuple(record for record in records if record.subject == name)
        top1 = by_seed(own, "top1")
        difference = None if name == BASE else find_difference(top1, base)
        ratios, latencies = (
            {timed: record for (of, subject, timed), record in latest.items() if (of, subject) == (kind, name)}
            for kind in ("ratio", "latency")
        )
        rows.append(Variant(name, own, find_mean(top1.values()), difference, ratios, latencies))
    return rows


def _show(key: str, records: Sequence[Record], times: Sequence[Record], machines: Mapping[str, Machine]) -> Html:
    rows = list_variants(records, times)
    used = [record for row in rows for record in (*row.latencies.values(), *row.ratios.values())]
    timed = list(dict.fromkeys(key for row in rows for key in (*row.latencies, *row.ratios)))
    groups = [row.tell("group") for row in rows]
    breaks = [i for i in range(1, len(rows)) if groups[i] != groups[i - 1]]
    condition = (records or times)[0].condition
    title = "Table 5 on small data. What the parts of the design are worth: "
    title += _name_size(condition.get("size"), condition.get("input_size"))
    title += (
        f", {condition.get('data')}" if records else f", time alone, {describe_machine(times[0].machine, machines)}"
    )
    content = [table(key, _list_columns(), rows, breaks=breaks)] if records else []
    if timed:
        columns = [*_list_names(described=not records), *(c for each in timed for c in _list_time_columns(each))]
        content.append(tag("div", table(key, columns, rows, breaks=breaks), style=SPACED))
    sizes = dict.fromkeys((str(r.condition.get("size")), r.condition.get("input_size")) for r in (*records, *times))
    columns = [*_list_names(described=False), *(column for size in sizes for column in _list_cost_columns(*size))]
    content.append(tag("div", table(key, columns, rows, breaks=breaks), style=SPACED))
    notes = [_tell_conditions(records), *EXPLAINED] if records else []
    notes += [_tell_times(records, timed, rows)] if timed else []
    small = (provenance(members, machines) for members in (records, used) if members)
    return figure(key, title, join(content), *notes, *small)


def _name_size(size: object, input_size: object) -> str:
    """Name a size of the base and of its pictures: ``small, 64 px``."""
    return f"{SIZES.get(str(size), size)}, {input_size} px"


def _tell_times(records: Sequence[Record], timed: Sequence[Timed], rows: Sequence[Variant]) -> str:
    """Say of which networks times are, how far the base was from itself, and what the runs warned of."""
    own = {str(record.condition.get("size")) for record in records}
    others = unique(_name_size(each.size, each.input_size) for each in timed if each.size not in own)
    told = (
        f" Accuracy is that of the {' '.join(own)} size alone; the same changes were timed in {', '.join(others)} too."
    )
    ratios = [ratio for row in rows for ratio in row.ratios.values()]
    spreads = [spread for ratio in ratios if (spread := scaled(ratio, "a_a_spread", 0.01)) is not None]
    ends = " to ".join(unique(f"{spread:.1f}" for spread in (min(spreads), max(spreads)))) if spreads else ""
    error = f" A/A spread, the base against itself: {ends} %." if ends else ""
    warnings = unique(str(warning) for ratio in ratios for warning in ratio.values.get("warnings") or ())
    warned = f" Warnings of the runs: {'; '.join(warnings)}." if warnings else ""
    return f"{TIMES}{told if records and others else ''}{error}{warned}"


def _tell_conditions(records: Sequence[Record]) -> Html | None:
    """Say how many seeds, epochs and pictures the numbers rest on: never as many as the paper's."""
    if not records:
        return None
    condition = records[0].condition
    seeds = {len(by_seed((r for r in records if r.subject == name), "top1")) for name in {r.subject for r in records}}
    few = f" (of some variants {min(seeds)})" if len(seeds) > 1 else ""
    sizes = [condition.get(f"num_{part}") for part in ("train", "validation")]
    train, validation = (f"{size:,}" if isinstance(size, int) else "?" for size in sizes)
    told = f"{count(max(seeds), 'seed')}{few}, {condition.get('epochs')} epochs of {train} pictures of "
    told += f"{condition.get('data')} at {condition.get('input_size')} px, judged on {validation}, not ImageNet."
    return tag("strong", told)


def _list_names(*, described: bool) -> list[Column[Variant]]:
    def differs(row: Variant) -> Cell | None:
        style = "display: block; white-space: normal; width: 13rem"
        return Cell(tag("span", told, style=style), told) if (told := row.tell("differs")) else None

    names: list[Column[Variant]] = [Column("Variant", lambda row: row.name)]
    return [*names, Column("differs", differs), Column("varied", lambda row: row.tell("group"))] if described else names


def _list_columns() -> list[Column[Variant]]:
    def paper(row: Variant) -> Cell | None:
        table5 = {own["variant"]: own for own in load_table("table5_ablation")}
        own, other = (printed(table5[name], "top1") for name in PAPER.get(row.name, ("T0 BN", "T0 BN")))
        return signed_cell(own - other, "+.1f") if row.name in PAPER and own is not None and other else None

    def verdict(row: Variant) -> str | None:
        return judge_difference(row.difference, below="worse", above="better") if row.difference else None

    here, difference = "Top-1 here, %", "Difference to the base, points"
    return [
        *_list_names(described=True),
        Column("mean ± 95 %", lambda row: mean_cell(row.top1, ".2f"), "", here),
        Column("mean", lambda row: signed_cell(row.difference.value, "+.2f") if row.difference else None, "",
               difference),
        Column("95 % interval", lambda row: span_cell(row.difference, "+.2f"), "", difference),
        Column("verdict", verdict, None, difference),
        Column("T0, ImageNet", paper, "", "Paper v1"),
    ]  # fmt: skip


def _list_cost_columns(size: str, input_size: object) -> list[Column[Variant]]:
    def cost(row: Variant, name: str) -> float | None:
        own = (r for r in (*row.records, *row.latencies.values()) if str(r.condition.get("size")) == size)
        return scaled(next(own, None), name, 1e6)

    costs = f"Costs, {_name_size(size, input_size)}"
    return [
        Column("multiply-adds, M", lambda row: cost(row, "macs"), ",.2f", costs),
        Column("parameters, M", lambda row: cost(row, "num_params"), ",.3f", costs),
    ]


def _list_time_columns(timed: Timed) -> list[Column[Variant]]:
    def ratio(row: Variant) -> float | None:
        return timing.value if (timing := row.find_timing(timed)) else None

    def verdict(row: Variant) -> object:
        if timed not in row.ratios:
            return None
        return "control" if row.name == BASE else row.ratios[timed].values.get("verdict")

    def unfolded(row: Variant) -> str | None:
        record = row.latencies.get(timed)
        left = number(record, "num_batch_norms_left") if record else None
        return f"{left:.0f} BN" if left else None

    title = str(timed)
    return [
        Column("ms", lambda row: speed_cell(row.latencies.get(timed), "latency_ms", ".2f"), "", title),
        Column("ratio", ratio, ".2f", title),
        Column("95 % interval", lambda row: interval_cell(row.find_timing(timed)), "", title),
        Column("verdict", verdict, None, title),
        Column("cannot be folded", unfolded, None, title),
    ]
