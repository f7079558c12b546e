"""Networks: Figure 2 and Table 3, the paper's numbers beside the measured ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from fasternet.report.markup import Column, Html, figure, join, table, tag
from fasternet.report.plots import Point, draw_networks
from fasternet.report.provenance import describe_setting, number, provenance
from fasternet.report.sources import Source, comparable, group, newest, select

PANELS = {"a": "FLOPS, G multiply-adds per second", "b": "Latency, ms"}
PAPER_SIZES = "224 px (MobileViT and EdgeNeXt 256 px)"
AUTHORS = "‘authors’: measured again by them in April 2023, after they had mended the shortcut."
PAPER_POINTS = "the paper, version v1: another CPU (i9-9900X), other software"


class Row(NamedTuple):
    """A row of Table 3: a network that was measured, or one that the paper has beside it.

    Attributes:
        name: The paper's name, with ``:split_cat`` and the like for a form of a FasterNet.
        group: The group of the paper's table, 0 for a network that it does not have.
        record: What was measured, or None.
        reference: The network that its time is told relative to.
        timing: The measured ratio of times.
    """

    name: str
    group: int
    record: Record | None
    reference: str | None
    timing: Timing | None


def show_networks(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Figure 2 and Table 3 for every set of networks that was measured under equal conditions."""
    content = []
    sets = group(select(sources, "latency", "networks"), comparable)
    for index, (condition, members) in enumerate(sets.items(), start=1):
        records = list(newest(members, lambda record: (record.subject, record.condition.get("input_size"))).values())
        ratios = [ratio for ratio in select(sources, "ratio", "networks") if comparable(ratio) == condition]
        quantity, label = select_quantity(members[0]), describe_setting(members[0])
        small = provenance(records, machines)
        if any(_locate(record, panel) for record in records for panel in PANELS):
            content.append(_figure2(f"figure-2-{index}", label, records, quantity, small))
        rows = list_rows(records, ratios, with_paper=bool(quantity.paper))
        content.append(_table3(f"table-3-{index}", label, rows, quantity, small))
    return content


def _figure2(key: str, label: str, records: Sequence[Record], quantity: Quantity, small: Html) -> Html:
    panels = []
    for panel, title in PANELS.items():
        points = [*_list_paper_points(panel, quantity), *filter(None, (_locate(record, panel) for record in records))]
        names = ", ".join(point.name for point in points if point.measured)
        drawing = draw_networks(
            points,
            key=f"{key}{panel}",
            title=f"({panel}) {title}",
            x_label="FLOPs, G multiply-adds",
            alt=f"{title}, over FLOPs, of {names}; Table 3 holds the numbers",
        )
        panels.append(tag("div", drawing, class_="panel"))
    entries = {"fasternet": "FasterNet, measured here", "rival": "other networks, measured here"}
    if quantity.paper == "cpu_latency_ms":
        entries["paper"] = PAPER_POINTS
    legend = tag("ul", *(tag("li", text, class_=name) for name, text in entries.items()), class_="legend")
    title = f"Figure 2. (a) FLOPS and (b) latency under varied FLOPs ({label})"
    return figure(key, title, join([legend, tag("div", *panels, class_="panels")]), small)


def _locate(record: Record, panel: str) -> Point | None:
    """Return where a network stands in a panel; the forms of a FasterNet would cover one another and stay out."""
    macs, y = number(record, "macs"), scaled(record, *(("macs_per_second", 1e9) if panel == "a" else ("latency_ms", 1)))
    return (
        Point(record.subject, macs / 1e9, y) if macs and y and min(macs, y) > 0 and ":" not in record.subject else None
    )


def _list_paper_points(panel: str, quantity: Quantity) -> list[Point]:
    if quantity.paper != "cpu_latency_ms":
        return []
    rows = [(r["network"], float(r["macs_g"]), float(r["cpu_latency_ms"])) for r in load_table("table3_imagenet")]
    return [
        Point(name, macs, latency if panel == "b" else 1e3 * macs / latency, measured=False)
        for name, macs, latency in rows
    ]


def list_rows(records: Sequence[Record], ratios: Sequence[Record], *, with_paper: bool) -> list[Row]:
    """Return the rows of Table 3 in the paper's order; networks that the paper does not have follow.

    Args:
        records: Latencies, one a network.
        ratios: Each network's to others; the one to the FasterNet of its group in the paper is told.
        with_paper: Complete the paper's groups in which something was measured.
    """
    paper = load_table("table3_imagenet")
    groups = {row["network"]: int(row["group"]) for row in paper}
    owners = {int(row["group"]): row["network"] for row in paper if row["network"].startswith("FasterNet")}
    known = {
        (ratio.subject, ratio.condition.get("input_size"), ratio.condition.get("baseline")): timing
        for ratio in sorted(ratios, key=lambda ratio: ratio.created)
        if (timing := read_timing(ratio))
    }

    def create_row(name: str, record: Record | None) -> Row:
        place = groups.get(name.partition(":")[0], 0)
        size = record.condition.get("input_size") if record else None
        own = {str(other): timing for (subject, px, other), timing in known.items() if (subject, px) == (name, size)}
        found = {other: timing for other, timing in own.items() if other != name}
        reference = owners.get(place)
        if record and found and reference not in found and reference != name:
            reference = next(iter(found))
        return Row(name, place, record, reference, found.get(reference or ""))

    rows = [create_row(record.subject, record) for record in records]
    if with_paper:
        seen, touched = {row.name for row in rows}, {row.group for row in rows}
        rows += [create_row(name, None) for name, place in groups.items() if place in touched and name not in seen]
    order = {name: place for place, name in enumerate(groups)}
    return sorted(rows, key=lambda row: order.get(row.name.partition(":")[0], len(order)))


def _table3(key: str, label: str, rows: Sequence[Row], quantity: Quantity, small: Html) -> Html:
    paper = {row["network"]: row for row in load_table("table3_imagenet")}
    again = {row["network"]: row for row in load_table("table3_imagenet_remeasured")}

    def from_paper(column: str) -> Callable[[Row], float | None]:
        return lambda row: printed(paper.get(row.name, {}), column)

    def here(column: str, unit: float = 1) -> Callable[[Row], float | None]:
        return lambda row: scaled(row.record, column, unit)

    def paper_time(row: Row) -> float | None:
        own, other = (printed(paper.get(name, {}), quantity.paper) for name in (row.name, row.reference or ""))
        return divide(own, other) if quantity.value == "latency_ms" else divide(other, own)

    def time(row: Row) -> float | None:
        return row.timing.value if row.timing else 1.0 if row.record and row.name == row.reference else None

    speed, spread = quantity.label, quantity.label if quantity.value == "latency_ms" else "Latency, ms"
    columns: list[Column[Row]] = [
        Column("Network", lambda row: row.name),
        Column("px", lambda row: row.record and row.record.condition.get("input_size"), ".0f"),
        Column("paper", from_paper("params_m"), ".1f", "Parameters, M"),
        Column("here", here("num_params", 1e6), ".1f", "Parameters, M"),
        Column("paper", from_paper("macs_g"), ".2f", "FLOPs, G"),
        Column("here", here("macs", 1e9), ".2f", "FLOPs, G"),
        Column("paper", from_paper("top1"), ".1f", "Top-1, %"),
        Column("paper v1", from_paper(quantity.paper), quantity.form, speed),
        Column("authors", lambda row: printed(again.get(row.name, {}), quantity.remeasured), quantity.form, speed),
        Column("here", lambda row: speed_cell(row.record, quantity.value, quantity.form), quantity.form, speed),
        Column("min", here("latency_ms_min"), ".2f", spread),
        Column("p90", here("latency_ms_p90"), ".2f", spread),
        Column("paper v1", paper_time, ".2f", "Ratio of times"),
        Column("here", time, ".2f", "Ratio of times"),
        Column("95 % interval", lambda row: interval_cell(row.timing), "", "Ratio of times"),
        Column("to", lambda row: row.reference, None, "Ratio of times"),
    ]
    content = table(key, columns, rows, breaks=[i for i in range(1, len(rows)) if rows[i].group != rows[i - 1].group])
    title = f"Table 3. Networks, the paper’s numbers and those measured here ({label})"
    conditions = f"Paper: {quantity.conditions}, {PAPER_SIZES}. {AUTHORS}" if quantity.paper else None
    return figure(key, title, content, conditions, small)
