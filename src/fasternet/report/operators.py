"""Operators: Table 1, and the FLOPS of PConv against those of DWConv, the paper's numbers beside the measured ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from fasternet.paper import load_table
from fasternet.records import Machine, Record
from fasternet.report.compare import (
    Quantity,
    Timing,
    divide,
    interval_cell,
    printed,
    read_timing,
    scaled,
    select_quantity,
    speed_cell,
)
from fasternet.report.markup import Cell, Column, Html, figure, table
from fasternet.report.provenance import describe_setting, number, provenance
from fasternet.report.sources import Source, comparable, group, newest, select

NAMES = {
    "conv3x3": "Conv 3×3",
    "gconv3x3_16groups": "GConv 3×3, 16 groups",
    "dwconv3x3": "DWConv 3×3",
    "pconv3x3_r1/4": "PConv 3×3, r = 1/4",
    "tconv3x3_r1/4": "T-shaped conv, r = 1/4",
    "pwconv": "PWConv",
}
PCONV, DWCONV = "pconv3x3_r1/4", "dwconv3x3"

Shape = tuple[int, int, int]
Key = tuple[str, Shape]
Paper = Mapping[Key, Mapping[str, str]]


def show_operators(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Table 1, and PConv against DWConv, for every set of operators that was measured under equal conditions."""
    paper = {(row["operator"], _read_shape(row)): row for row in load_table("table1_operators")}
    content = []
    sets = group(select(sources, "latency", "operators"), comparable)
    for index, (condition, members) in enumerate(sets.items(), start=1):
        measured = newest(members, _key)
        ratios = [ratio for ratio in select(sources, "ratio", "operators") if comparable(ratio) == condition]
        quantity, label = select_quantity(members[0]), describe_setting(members[0])
        small = provenance(list(measured.values()), machines)
        content.append(_table1(f"table-1-{index}", label, measured, paper, quantity, small))
        if rates := compare_flops(list(measured.values()), ratios):
            content.append(_pconv(f"pconv-{index}", label, rates, paper, quantity, provenance(ratios, machines)))
    return content


def _table1(
    key: str, label: str, measured: Mapping[Key, Record], paper: Paper, quantity: Quantity, small: Html
) -> Html:
    order = {name: place for place, name in enumerate(NAMES)}
    keys = sorted(measured, key=lambda key: (order.get(_split(key[0])[0], len(order)), key[0], -key[1][1]))

    def from_paper(column: str) -> Callable[[Key], float | None]:
        return lambda key: printed(paper.get((_split(key[0])[0], key[1]), {}), column)

    def here(column: str, unit: float = 1) -> Callable[[Key], float | None]:
        return lambda key: scaled(measured[key], column, unit)

    def speed(key: Key) -> Cell | None:
        return speed_cell(measured[key], quantity.value, quantity.form)

    rate = _name_rate(quantity) if quantity.paper else ""
    spread = quantity.label if quantity.value == "latency_ms" else "Latency, ms"
    columns: list[Column[Key]] = [
        Column("Operator", lambda key: describe_operator(key[0])),
        Column("C", lambda key: key[1][0], ".0f"),
        Column("H × W", lambda key: f"{key[1][1]} × {key[1][2]}", ""),
        Column("paper", from_paper("macs_millions_10_layers"), ",.4g", "FLOPs, M"),
        Column("here", here("macs", 1e6), ",.4g", "FLOPs, M"),
        Column("paper v1", from_paper(quantity.paper), quantity.form, quantity.label),
        Column("here", speed, quantity.form, quantity.label),
        Column("min", here("latency_ms_min"), ".2f", spread),
        Column("p90", here("latency_ms_p90"), ".2f", spread),
        Column("paper v1", from_paper(rate), ".2f", "FLOPS, G/s"),
        Column("here", here("macs_per_second", 1e9), ".2f", "FLOPS, G/s"),
        Column("% of peak", here("peak_share", 0.01), ".0f", "FLOPS, G/s"),
    ]
    content = table(key, columns, keys, breaks=[i for i in range(1, len(keys)) if keys[i][0] != keys[i - 1][0]])
    title = f"Table 1. Operators, the paper’s numbers and those measured here ({label})"
    conditions = f"Paper: {quantity.conditions}, 10 stacked layers; PConv in place." if quantity.paper else None
    return figure(key, title, content, conditions, small)


def _pconv(key: str, label: str, rates: Mapping[Shape, Timing], paper: Paper, quantity: Quantity, small: Html) -> Html:
    def from_paper(shape: Shape) -> float | None:
        above, below = (printed(paper.get((name, shape), {}), _name_rate(quantity)) for name in (PCONV, DWCONV))
        return divide(above, below) if quantity.paper else None

    columns: list[Column[Shape]] = [
        Column("C", lambda shape: shape[0], ".0f"),
        Column("H × W", lambda shape: f"{shape[1]} × {shape[2]}", ""),
        Column("paper v1", from_paper, ".2f", "FLOPS of PConv : DWConv"),
        Column("here", lambda shape: rates[shape].value, ".2f", "FLOPS of PConv : DWConv"),
        Column("95 % interval", lambda shape: interval_cell(rates[shape]), "", "FLOPS of PConv : DWConv"),
    ]
    title = f"Table 1, continued. The FLOPS of PConv relative to those of DWConv ({label})"
    note = "From the measured ratio of times. Of the two, PConv has more multiply-adds in a layer of the same width."
    return figure(key, title, table(key, columns, list(rates)), note, small)


def compare_flops(records: Iterable[Record], ratios: Iterable[Record]) -> dict[Shape, Timing]:
    """Return the FLOPS of PConv as a multiple of those of DWConv, by shape, from a measured ratio of times."""
    macs = {_key(record): number(record, "macs") for record in records}
    rates = {}
    for ratio in ratios:
        names, shape = (ratio.subject, ratio.condition.get("baseline")), _read_shape(ratio.condition)
        timing = read_timing(ratio)
        work = divide(macs.get((PCONV, shape)), macs.get((DWCONV, shape)))
        if timing and work and names == (PCONV, DWCONV):
            rates[shape] = Timing(work / timing.value, work / timing.high, work / timing.low)
        elif timing and work and names == (DWCONV, PCONV):
            rates[shape] = Timing(*(work * value for value in timing))
    return dict(sorted(rates.items()))


def describe_operator(name: str) -> str:
    """Return an operator's name as it is printed, with the form of PConv where it has one."""
    operator, form = _split(name)
    return NAMES.get(operator, operator) + (f", {form}" if form else "")


def _split(name: str) -> tuple[str, str]:
    operator, _, form = name.partition(":")
    return operator, form


def _name_rate(quantity: Quantity) -> str:
    return f"{quantity.device.lower()}_gmacs_per_second"


def _key(record: Record) -> Key:
    return record.subject, _read_shape(record.condition)


def _read_shape(row: Mapping[str, object]) -> Shape:
    channels, height, width = (int(str(row.get(name, 0))) for name in ("channels", "height", "width"))
    return channels, height, width
