"""Operators: Table 1, the operator half of Table 9, the data of Figure 1; the paper's numbers beside the measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

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
    "dwconv3x3_2x": "DWConv 3×3 (2 C wide)",
    "dwconv3x3_4x": "DWConv 3×3 (4 C wide)",
    "dwconv3x3_6x": "DWConv 3×3 (6 C wide)",
    "pconv3x3_r1/4": "PConv 3×3, r = 1/4",
    "tconv3x3_r1/4": "T-shaped conv, r = 1/4",
    "pwconv": "PWConv",
    "dwconv3x3+pwconv": "DWConv 3×3 + PWConv",
    "pconv3x3_r1/4+pwconv": "PConv 3×3 + PWConv",
}
PCONV, DWCONV, CONV = "pconv3x3_r1/4", "dwconv3x3", "conv3x3"
DWCONVS = (DWCONV, *(f"{DWCONV}_{width}x" for width in (2, 4, 6)))
REPLACEMENTS = {f"{PCONV}+pwconv": "2–7", "tconv3x3_r1/4": None}  # of a regular convolution; what the authors claim
FIGURE1 = (CONV, DWCONV, "gconv3x3_16groups", PCONV)
FORWARD = "forward"
# What the paper calls slicing writes in place, without the clone that keeps the shortcut of a block intact.
FORMS = ("split_cat", "slicing", "in_place")

Shape = tuple[int, int, int]
Key = tuple[str, Shape]
Paper = Mapping[Key, Mapping[str, str]]
Timings = Mapping[tuple[str, str, Shape], Timing]


class Measured(NamedTuple):
    """Operators that were measured under equal conditions, and the paper's beside them.

    Attributes:
        label: The conditions, in words.
        latest: The newest latency record of each.
        ratios: All ratios of their times.
        quantity: What is told of them; it names no column of the paper's where that measured something else.
        paper: The paper's rows, none of backward.
    """

    label: str
    latest: Mapping[Key, Record]
    ratios: Sequence[Record]
    quantity: Quantity
    paper: Paper


def show_operators(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Table 1 and the ratios that the paper and its authors claim, for each set of conditions."""
    content = []
    for index, measured in enumerate(list_sets(sources, machines), start=1):
        small = provenance(list(measured.latest.values()), machines)
        content.append(_table1(f"table-1-{index}", measured, small))
        if measured.ratios:
            small = provenance(measured.ratios, machines)
            content += [*_pconv(f"pconv-{index}", measured, small), *_conv(f"conv-{index}", measured, small)]
    return content


def show_table9_operators(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the operator half of Table 9, split_cat against slicing, for each set of conditions."""
    sets = enumerate(list_sets(sources, machines), start=1)
    return [html for index, measured in sets for html in _table9(f"table-9-operators-{index}", measured, machines)]


def list_sets(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Measured]:
    """Return what was measured, a set for each machine, setting and passes, in order of first appearance."""

    def conditions(record: Record) -> tuple[str, ...]:
        return (*comparable(record), read_passes(record))

    rows = {(row["operator"], read_shape(row)): row for row in load_table("table1_operators")}
    sets = []
    for condition, members in group(select(sources, "latency", "operators"), conditions).items():
        ratios = [ratio for ratio in select(sources, "ratio", "operators") if conditions(ratio) == condition]
        quantity, label, paper = select_quantity(members[0], machines), describe_setting(members[0]), rows
        if (passes := read_passes(members[0])) != FORWARD:
            quantity, paper = quantity._replace(paper=""), {}
            label = label if passes in label else f"{label}, {passes}"
        sets.append(Measured(label, newest(members, _key), ratios, quantity, paper))
    return sets


def _table1(key: str, measured: Measured, small: Html) -> Html:
    latest, quantity, paper = measured.latest, measured.quantity, measured.paper
    order = {name: place for place, name in enumerate(NAMES)}
    keys = sorted(latest, key=lambda key: (order.get(_split(key[0])[0], len(order)), key[0], -key[1][1]))

    def from_paper(column: str) -> Callable[[Key], float | None]:
        return lambda key: printed(paper.get((_split(key[0])[0], key[1]), {}), column)

    def here(column: str, unit: float = 1) -> Callable[[Key], float | None]:
        return lambda key: scaled(latest[key], column, unit)

    def speed(key: Key) -> Cell | None:
        return speed_cell(latest[key], quantity.value, quantity.form)

    rate = _name_rate(quantity)
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
        Column("accesses, M", here("memory_accesses", 1e6), ",.4g", "Memory"),
        Column("FLOPs a byte", here("arithmetic_intensity"), ".3g", "Memory"),
        Column("% of roofline", here("roofline_share", 0.01), ".0f", "Memory"),
    ]
    content = table(key, columns, keys, breaks=[i for i in range(1, len(keys)) if keys[i][0] != keys[i - 1][0]])
    title = f"Table 1. Operators, the paper’s numbers and those measured here ({measured.label})"
    conditions = f"Paper: {quantity.conditions}, 10 stacked layers; PConv in place." if quantity.paper else None
    return figure(key, title, content, conditions, small)


def _pconv(key: str, measured: Measured, small: Html) -> list[Html]:
    """Compare PConv with DWConv of the same width, and of the widths that replace a regular convolution."""
    records, timings = list(measured.latest.values()), read_timings(measured.ratios)
    passes = read_passes(records[0])
    rates = {
        (rival, shape): rate
        for rival in DWCONVS
        for shape, rate in compare_flops(records, measured.ratios, rival, passes=passes).items()
    }
    if not rates:
        return []

    def from_paper(row: Key) -> float | None:
        rate = _name_rate(measured.quantity)
        return divide(*(printed(measured.paper.get((name, row[1]), {}), rate) for name in (PCONV, row[0])))

    def time(row: Key) -> Timing | None:
        return timings.get((PCONV, *row))

    columns: list[Column[Key]] = [
        Column("PConv against", lambda row: describe_operator(row[0])),
        *_shape_columns(),
        Column("paper v1", from_paper, ".2f", "FLOPS of PConv : DWConv"),
        Column("here", lambda row: rates[row].value, ".2f", "FLOPS of PConv : DWConv"),
        Column("95 % interval", lambda row: interval_cell(rates[row]), "", "FLOPS of PConv : DWConv"),
        Column("here", lambda row: getattr(time(row), "value", None), ".2f", "Time of PConv : DWConv"),
        Column("95 % interval", lambda row: interval_cell(time(row)), "", "Time of PConv : DWConv"),
    ]
    title = f"Table 1, continued. PConv relative to DWConv ({measured.label})"
    note = (
        "FLOPS from the measured ratio of times. Of two layers of the same width PConv has more multiply-adds. "
        "A DWConv that replaces a regular convolution is widened (Section 3.1; six times in inverted residual blocks)."
    )
    rows = list(rates)
    breaks = [i for i in range(1, len(rows)) if rows[i][0] != rows[i - 1][0]]
    return [figure(key, title, table(key, columns, rows, breaks=breaks), note, small)]


def _conv(key: str, measured: Measured, small: Html) -> list[Html]:
    """Compare a regular convolution with what takes its place."""
    timings = read_timings(measured.ratios)
    macs = {row: number(record, "macs") for row, record in measured.latest.items()}
    rows = [
        (name, shape) for name in REPLACEMENTS for shape in _list_shapes(measured) if (CONV, name, shape) in timings
    ]
    if not rows:
        return []
    claims = REPLACEMENTS if measured.paper else {}
    columns: list[Column[Key]] = [
        Column("Conv 3×3 against", lambda row: describe_operator(row[0])),
        *_shape_columns(),
        Column("here", lambda row: divide(macs.get((CONV, row[1])), macs.get(row)), ".2f", "FLOPs"),
        Column("authors’ claim", lambda row: claims.get(row[0]), "", "Time"),
        Column("here", lambda row: timings[CONV, *row].value, ".2f", "Time"),
        Column("95 % interval", lambda row: interval_cell(timings[CONV, *row]), "", "Time"),
    ]
    title = f"Section 3.3. A regular convolution relative to what takes its place ({measured.label})"
    breaks = [i for i in range(1, len(rows)) if rows[i][0] != rows[i - 1][0]]
    return [figure(key, title, table(key, columns, rows, breaks=breaks), small)]


def _table9(key: str, measured: Measured, machines: Mapping[str, Machine]) -> list[Html]:
    quantity, timings = measured.quantity, read_timings(measured.ratios)
    # The plain name last, so that it wins over its own form's: ratios are taken against it.
    found = sorted(measured.latest.items(), key=lambda item: ":" not in item[0][0])
    names = {(_read_form(record), shape): name for (name, shape), record in found}
    shapes = [
        shape for shape in _list_shapes(measured) if ("split_cat", shape) in names and ("slicing", shape) in names
    ]
    if not shapes:
        return []
    rows = {read_shape(row): row for row in load_table("table9_forward_choice") if row["network"] == "PConv x10"}
    # as Table 1 names its columns: cpu_latency_ms, gpu_throughput_images_per_second
    device, unit = quantity.device.lower(), "ms" if quantity.value == "latency_ms" else "images_per_second"

    def from_paper(shape: Shape, form: str) -> float | None:
        return printed(rows.get(shape, {}), f"{device}_{form}_{unit}") if quantity.paper else None

    def speed(form: str) -> Callable[[Shape], Cell | None]:
        return lambda shape: speed_cell(
            measured.latest.get((names.get((form, shape), ""), shape)), quantity.value, quantity.form
        )

    def time(shape: Shape, form: str) -> Timing | None:
        return timings.get((names["split_cat", shape], names.get((form, shape), ""), shape))

    def paper_time(shape: Shape) -> float | None:
        pair = [from_paper(shape, form) for form in ("split_cat", "slicing")]
        return divide(*(pair if unit == "ms" else reversed(pair)))

    speeds, times = quantity.label, "Time of split_cat relative to"
    columns: list[Column[Shape]] = [
        Column("C", lambda shape: shape[0], ".0f"),
        Column("H × W", lambda shape: f"{shape[1]} × {shape[2]}", ""),
        Column("split_cat, paper v1", lambda shape: from_paper(shape, "split_cat"), quantity.form, speeds),
        Column("split_cat, here", speed("split_cat"), quantity.form, speeds),
        Column("slicing, paper v1", lambda shape: from_paper(shape, "slicing"), quantity.form, speeds),
        Column("slicing, here", speed("slicing"), quantity.form, speeds),
        Column("in place, here", speed("in_place"), quantity.form, speeds),
        Column("slicing, paper v1", paper_time, ".2f", times),
        Column("slicing, here", lambda shape: getattr(time(shape, "slicing"), "value", None), ".2f", times),
        Column("95 % interval", lambda shape: interval_cell(time(shape, "slicing")), "", times),
        Column("in place, here", lambda shape: getattr(time(shape, "in_place"), "value", None), ".2f", times),
        Column("95 % interval", lambda shape: interval_cell(time(shape, "in_place")), "", times),
    ]
    title = f"Table 9, upper half. Ten PConv layers: split_cat against slicing ({measured.label})"
    note = "The paper’s slicing writes in place. Here slicing clones its input first, so that a shortcut stays intact."
    small = provenance(
        [measured.latest[names[form, s], s] for form in FORMS for s in shapes if (form, s) in names], machines
    )
    return [figure(key, title, table(key, columns, shapes), note, small)]


def compare_flops(
    records: Iterable[Record], ratios: Iterable[Record], rival: str = DWCONV, *, passes: str = FORWARD
) -> dict[Shape, Timing]:
    """Return the FLOPS of PConv as a multiple of those of DWConv, by shape, from a measured ratio of times.

    Args:
        records: Latencies, of one machine and one setting.
        ratios: Of their times.
        rival: DWConv, or a wider one.
        passes: Records of other passes are left out.
    """
    macs = {_key(record): number(record, "macs") for record in records if read_passes(record) == passes}
    rates = {}
    for (above, below, shape), timing in read_timings(r for r in ratios if read_passes(r) == passes).items():
        work = divide(macs.get((PCONV, shape)), macs.get((rival, shape)))
        if work and (above, below) == (rival, PCONV):
            rates[shape] = Timing(*(work * value for value in timing))
    return dict(sorted(rates.items()))


def read_timings(ratios: Iterable[Record]) -> Timings:
    """Return times as multiples of another's, by both operators and the shape, whichever was the baseline."""
    latest = newest(
        ratios, lambda ratio: (ratio.subject, str(ratio.condition.get("baseline")), read_shape(ratio.condition))
    )
    timings = {names: timing for names, ratio in latest.items() if (timing := read_timing(ratio))}
    inverse = {
        (below, above, shape): Timing(1 / timing.value, 1 / timing.high, 1 / timing.low)
        for (above, below, shape), timing in timings.items()
    }
    return inverse | timings


def describe_operator(name: str) -> str:
    """Return an operator's name as it is printed, with the form of PConv where it has one."""
    operator, form = _split(name)
    return NAMES.get(operator, operator) + (f", {form}" if form else "")


def _shape_columns() -> list[Column[Key]]:
    return [
        Column("C", lambda row: row[1][0], ".0f"),
        Column("H × W", lambda row: f"{row[1][1]} × {row[1][2]}", ""),
    ]


def _list_shapes(measured: Measured) -> list[Shape]:
    return sorted({shape for _, shape in measured.latest})


def _split(name: str) -> tuple[str, str]:
    operator, _, form = name.partition(":")
    return operator, form


def _read_form(record: Record) -> str | None:
    """Return which form of PConv a record is about: by its name, or as it was chosen."""
    operator, form = _split(record.subject)
    return str(form or record.values.get("impl", "")) if operator == PCONV else None


def read_passes(record: Record) -> str:
    """Return which passes were timed; records from before there were several are of forward."""
    return str(record.condition.get("passes", FORWARD))


def _name_rate(quantity: Quantity) -> str:
    return f"{quantity.device.lower()}_gmacs_per_second" if quantity.paper else ""


def _key(record: Record) -> Key:
    return record.subject, read_shape(record.condition)


def read_shape(row: Mapping[str, object]) -> Shape:
    """Return channels, height and width of a condition, or of a row of the paper's."""
    channels, height, width = (int(str(row.get(name, 0))) for name in ("channels", "height", "width"))
    return channels, height, width
