"""Table 5 on small data: what each part of the design is worth, in top-1 over seeds and in time, beside the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasternet.paper import load_table
from fasternet.records import Machine, Record
from fasternet.report.compare import Timing, interval_cell, printed, read_timing, scaled
from fasternet.report.markup import Cell, Column, Html, figure, table, tag
from fasternet.report.provenance import count, describe_setting, number, provenance, unique
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
    "Time is that of the variant over that of the base, below 1 faster. Paper v1: the difference of top-1 in Table 5 "
    "to its choice, of T0 on ImageNet with its full recipe, one run each, and so without an interval.",
)


@dataclass(frozen=True)
class Variant:
    """One row: a variant, what it reached over the seeds, and how long it takes.

    Attributes:
        name: Its label.
        records: Of its seeds; none where only its speed was measured.
        top1: Mean over the seeds, in per cent.
        difference: To the base, paired by seed; None for the base.
        ratios: Records of its time relative to the base's, by setting.
    """

    name: str
    records: tuple[Record, ...]
    top1: Mean | None
    difference: Mean | None
    ratios: Mapping[str, Record]

    def find_timing(self, setting: str) -> Timing | None:
        """Return its time relative to the base's."""
        return read_timing(self.ratios[setting]) if setting in self.ratios else None

    def tell(self, name: str) -> Any:
        """Return a value that all its seeds share."""
        return next((record.values[name] for record in self.records if name in record.values), None)


def show_ablation(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the table of the ablation for every set of conditions; speeds without accuracy have one of their own."""
    studies = group_alike(r for r in select(sources, "study", SUITE) if number(r, "top1") is not None)
    ratios = [r for r in select(sources, "ratio", SUITE) if r.condition.get("baseline") == BASE and read_timing(r)]
    told = {str(records[0].condition.get("size")) for records in studies}
    alone = group((r for r in ratios if str(r.condition.get("size")) not in told), lambda r: r.condition.get("size"))
    shown: list[tuple[list[Record], list[Record]]] = [(records, ratios) for records in studies]
    shown += [([], members) for members in alone.values()]
    return [_show(f"ablation-{i}", *members, machines) for i, members in enumerate(shown, start=1)]


def list_variants(records: Sequence[Record], ratios: Sequence[Record]) -> list[Variant]:
    """Return the variants in the order in which they were recorded, with the times of networks of their size."""
    sizes = {str(record.condition.get("size")) for record in records or ratios}
    fitting = [ratio for ratio in ratios if str(ratio.condition.get("size")) in sizes]
    times = newest(fitting, lambda ratio: (ratio.subject, describe_setting(ratio)))
    base = by_seed((record for record in records if record.subject == BASE), "top1")
    rows = []
    for name in unique(record.subject for record in records or fitting):
        own = tuple(record for record in records if record.subject == name)
        top1 = by_seed(own, "top1")
        difference = None if name == BASE else find_difference(top1, base)
        timed = {setting: ratio for (subject, setting), ratio in times.items() if subject == name != BASE}
        rows.append(Variant(name, own, find_mean(top1.values()), difference, timed))
    return rows


def _show(key: str, records: Sequence[Record], ratios: Sequence[Record], machines: Mapping[str, Machine]) -> Html:
    rows = list_variants(records, ratios)
    used = [*records, *(ratio for row in rows for ratio in row.ratios.values())]
    settings = unique(setting for row in rows for setting in row.ratios)
    groups = [row.tell("group") for row in rows]
    breaks = [i for i in range(1, len(rows)) if groups[i] != groups[i - 1]]
    size = used[0].condition.get("size")
    title = f"Table 5 on small data. What the parts of the design are worth ({size} size"
    title += f", {records[0].condition.get('data')})" if records else ", time alone)"
    small = (provenance(members, machines) for members in (records, used[len(records) :]) if members)
    content = table(key, _list_columns(settings), rows, breaks=breaks)
    return figure(key, title, content, _tell_conditions(records), *EXPLAINED, *small)


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


def _list_columns(settings: Sequence[str]) -> list[Column[Variant]]:
    def paper(row: Variant) -> Cell | None:
        table5 = {own["variant"]: own for own in load_table("table5_ablation")}
        own, other = (printed(table5[name], "top1") for name in PAPER.get(row.name, ("T0 BN", "T0 BN")))
        return signed_cell(own - other, "+.1f") if row.name in PAPER and own is not None and other else None

    def verdict(row: Variant) -> str | None:
        return judge_difference(row.difference, below="worse", above="better") if row.difference else None

    def differs(row: Variant) -> Cell | None:
        style = "display: block; white-space: normal; width: 13rem"
        return Cell(tag("span", told, style=style), told) if (told := row.tell("differs")) else None

    def cost(row: Variant, name: str) -> float | None:
        return scaled(row.records[0], name, 1e6) if row.records else None

    here, difference = "Top-1 here, %", "Difference to the base, points"
    return [
        Column("Variant", lambda row: row.name),
        Column("differs", differs),
        Column("varied", lambda row: row.tell("group")),
        Column("mean ± 95 %", lambda row: mean_cell(row.top1, ".2f"), "", here),
        Column("mean", lambda row: signed_cell(row.difference.value, "+.2f") if row.difference else None, "",
               difference),
        Column("95 % interval", lambda row: span_cell(row.difference, "+.2f"), "", difference),
        Column("verdict", verdict, None, difference),
        Column("T0, ImageNet", paper, "", "Paper v1"),
        *(column for setting in settings for column in _list_time_columns(setting)),
        Column("multiply-adds, M", lambda row: cost(row, "macs"), ",.2f", "Costs"),
        Column("parameters, M", lambda row: cost(row, "num_params"), ",.3f", "Costs"),
    ]  # fmt: skip


def _list_time_columns(setting: str) -> list[Column[Variant]]:
    def ratio(row: Variant) -> float | None:
        return 1.0 if row.name == BASE else timing.value if (timing := row.find_timing(setting)) else None

    def verdict(row: Variant) -> object:
        return row.ratios[setting].values.get("verdict") if setting in row.ratios else None

    title = f"Time ({setting})"
    return [
        Column("ratio", ratio, ".2f", title),
        Column("95 % interval", lambda row: interval_cell(row.find_timing(setting)), "", title),
        Column("verdict", verdict, None, title),
    ]
