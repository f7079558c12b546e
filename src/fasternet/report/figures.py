"""Figures 1, 2, 7 and 8: operators and networks in a plane, measured ones filled, the paper's hollow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fasternet.paper import load_accuracy, load_table
from fasternet.records import Machine, Record
from fasternet.report.compare import Quantity, printed, scaled
from fasternet.report.markup import Html, figure, join, tag
from fasternet.report.networks import is_variant, tell_sources
from fasternet.report.operators import FIGURE1, Key, Measured, describe_operator, list_sets
from fasternet.report.plots import draw_networks, draw_plane
from fasternet.report.points import Line, Point, assign_markers, list_legend, tell_points
from fasternet.report.provenance import number, provenance, unique
from fasternet.report.settings import Setting, has_published_size, is_speed_only, list_settings, read_way
from fasternet.report.sources import Source

FIGURE2 = {"a": "FLOPS, G multiply-adds per second", "b": "Latency, ms"}
# Device, the column of Table 3 and its unit, in the paper's order, with what has to be at hand to measure it.
TRADE_OFFS = {
    "GPU": ("gpu_throughput_images_per_second", "GPU throughput, images/s", "a GPU"),
    "CPU": ("cpu_latency_ms", "CPU latency, ms", "a CPU"),
    "ARM": ("arm_latency_ms", "ARM latency, ms", "an ARM machine"),
}
LIMIT, LIMIT_NETWORK = 2.0, "FasterNet-S"  # Figure 7 shows what is at most this many times slower than it


class Panel(NamedTuple):
    """One panel of Figures 7 and 8, and the records behind it; without any it shows the paper's points alone."""

    title: str
    points: list[Point]
    records: list[Record]
    rising: bool
    missing: str | None = None


def show_figure1(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Figure 1, FLOPs and FLOPS of Conv, GConv, DWConv and PConv forward, for every setting."""
    content = []
    for index, found in enumerate(list_sets(sources, machines), start=1):
        records = {key: record for key, record in found.latest.items() if key[0] in FIGURE1 and _locate(record, "a")}
        if not records or not found.paper:
            continue
        points, lines = _list_operator_points(records, found)
        key = f"figure-1-{index}"
        drawing = draw_plane(
            points, lines, key=key, title=FIGURE2["a"], x_label="FLOPs of ten layers, G multiply-adds",
            alt="FLOPS of four operators over their FLOPs; Table 1 holds the numbers",
        )  # fmt: skip
        entries = {"fasternet": "PConv, measured here", "rival": "other operators, measured here"}
        legend = list_legend(points, entries)
        note = "PConv has fewer FLOPs than what it lies left of, and higher FLOPS than what it lies above."
        title = f"Figure 1. FLOPs and FLOPS of the operators of Table 1 ({found.label})"
        small = provenance(list(records.values()), machines)
        content.append(figure(key, title, join([legend, drawing]), note, tell_points("Table 1"), small))
    return content


def _list_operator_points(records: Mapping[Key, Record], found: Measured) -> tuple[list[Point], list[Line]]:
    """Return measured and printed points, and for each operator the line through its shapes, widest map first."""
    points, lines = [], []
    column = f"{found.quantity.device.lower()}_gmacs_per_second"
    for operator in FIGURE1:
        shapes = [shape for name, shape in found.paper if name == operator]
        names = {shape: f"{describe_operator(operator)}, C {shape[0]}" for shape in shapes}
        rows = [(shape, found.paper[operator, shape]) for shape in shapes if found.quantity.paper]
        paper = [
            Point(names[shape], float(row["macs_millions_10_layers"]) / 1e3, float(row[column]), measured=False)
            for shape, row in rows
        ]
        located = ((shape, _locate(records[operator, shape], "a")) for shape in shapes if (operator, shape) in records)
        own = [dataclasses.replace(point, name=names[shape]) for shape, point in located if point]
        for members in filter(None, (paper, own)):
            corners, first = tuple((p.x, p.y) for p in members), members[0]
            lines.append(Line(corners, first.is_highlighted and first.measured, not first.measured, first.filter))
            points += members
    return points, lines


def show_figure2(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Figure 2, (a) FLOPS and (b) latency under varied FLOPs, for every setting with all its engines."""
    content = []
    for index, found in enumerate(list_settings(sources, machines), start=1):
        records = [record for record in found.records if _locate(record, "a") or _locate(record, "b")]
        if not records:
            continue
        measured = {panel: [p for record in records if (p := _locate(record, panel))] for panel in FIGURE2}
        points = {panel: [*_list_paper_points(panel, found.quantity), *own] for panel, own in measured.items()}
        shown = [point for members in points.values() for point in members]
        key, panels, markers = f"figure-2-{index}", [], assign_markers(shown)
        for panel, title in FIGURE2.items():
            names = ", ".join(unique(point.name for point in measured[panel]))
            drawing = draw_networks(
                points[panel], key=f"{key}{panel}", title=f"({panel}) {title}", x_label="FLOPs, G multiply-adds",
                alt=f"{title}, over FLOPs, of {names}; Table 3 holds the numbers", markers=markers,
            )  # fmt: skip
            panels.append(tag("div", drawing, class_="panel"))
        title = f"Figure 2. (a) FLOPS and (b) latency under varied FLOPs ({found.label})"
        body = join([list_legend(shown), tag("div", *panels, class_="panels")])
        content.append(figure(key, title, body, tell_points("Table 3"), provenance(records, machines)))
    return content


def _locate(record: Record, panel: str) -> Point | None:
    """Return where a network stands in a panel; the forms of a FasterNet would cover one another and stay out."""
    macs, y = number(record, "macs"), scaled(record, *(("macs_per_second", 1e9) if panel == "a" else ("latency_ms", 1)))
    if not macs or not y or min(macs, y) <= 0 or ":" in record.subject or is_variant(record.subject):
        return None
    return Point(record.subject, macs / 1e9, y, engine=str(read_way(record)))


def _list_paper_points(panel: str, quantity: Quantity) -> list[Point]:
    if not quantity.paper or _is_rate(quantity.paper):
        return []
    rows = [(r["network"], float(r["macs_g"]), printed(r, quantity.paper)) for r in load_table("table3_imagenet")]
    return [
        Point(name, macs, latency if panel == "b" else 1e3 * macs / latency, measured=False)
        for name, macs, latency in rows
        if latency
    ]


def show_figure7(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Figure 7, accuracy over throughput and latency, within a range of latency."""
    panels = _list_panels(sources, machines)
    free = unique(
        f"{point.filter} ({panel.title.partition(',')[0]})"
        for panel in panels for point in panel.points if point.filter not in _find_limits(panel)
    )  # fmt: skip
    note = f"Shown: networks that take at most {LIMIT:g} times as long as {LIMIT_NETWORK} of the same panel and engine"
    note += f"; all of {', '.join(free)}, where that is not at hand." if free else "."
    return _show_trade_offs("7", [_limit(panel) for panel in panels], machines, note)


def show_figure8(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Figure 8: Figure 7 without a limit."""
    return _show_trade_offs("8", _list_panels(sources, machines), machines)


def _show_trade_offs(
    name: str, panels: Sequence[Panel], machines: Mapping[str, Machine], limit: str | None = None
) -> list[Html]:
    records = [record for panel in panels for record in panel.records]
    if not records:
        return []
    points = [point for panel in panels for point in panel.points]
    drawings, markers = [], assign_markers(points)
    for letter, panel in zip("abcdefghijklmnopqrstuvwxyz", panels, strict=False):
        drawing = draw_networks(
            panel.points, key=f"figure-{name}-{letter}", title=f"({letter}) Published top-1, %", x_label=panel.title,
            y_scale="linear", alt=f"Published top-1 over {panel.title}; Table 3 holds the numbers", markers=markers,
        )  # fmt: skip
        reason = tag("p", panel.missing, class_="note") if panel.missing else None
        drawings.append(tag("div", drawing, reason, class_="panel"))
    kind = "within a range of latency" if limit else "all networks"
    title = f"Figure {name}. Accuracy-throughput and accuracy-latency trade-offs, {kind}"
    body = join([list_legend(points), tag("div", *drawings, class_="panels")])
    accuracies = tell_sources(unique(point.name for point in points))
    only = "What is measured for speed only (int8) is left out." if any(map(is_speed_only, records)) else None
    small = provenance(records, machines)
    return [figure(f"figure-{name}", title, body, limit, accuracies, only, tell_points("Table 3"), small)]


def _list_panels(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Panel]:
    """Return a panel for every setting, in the paper's order of devices; a device without records has the paper's."""
    settings = [found for found in list_settings(sources, machines) if any(map(_is_timed, found.records))]
    measured = {found.records[0].machine for found in settings}
    panels = []
    for device, (column, title, needs) in TRADE_OFFS.items():
        own = [found for found in settings if found.quantity.device == device]
        panels += [_create_panel(device, found, column, len(measured) > 1) for found in own]
        if not own:
            missing = f"Not run: needs {needs}. Hollow points are the paper’s."
            points = _list_trade_off_points(column)
            panels.append(Panel(f"{title}, the paper’s", points, [], _is_rate(column), missing))
    return panels


def _create_panel(device: str, found: Setting, column: str, several: bool) -> Panel:
    accuracies, quantity = load_accuracy(), found.quantity
    unit = quantity.label.partition(" ")[2]
    records = [record for record in found.records if _is_timed(record) and record.subject in accuracies]
    measured = [
        Point(record.subject, float(record.values[quantity.value]), accuracies[record.subject].top1,
              engine=str(read_way(record)))
        for record in records if not is_speed_only(record)
    ]  # fmt: skip
    paper = _list_trade_off_points(column) if quantity.paper == column else []
    where = f"; {found.records[0].machine}" if several else ""
    return Panel(f"{device} {unit} ({found.label}{where})", [*paper, *measured], records, _is_rate(quantity.value))


def _is_timed(record: Record) -> bool:
    timed = all(number(record, name) for name in ("latency_ms", "images_per_second"))
    return timed and ":" not in record.subject and has_published_size(record)


def _is_rate(name: str) -> bool:
    return name.endswith("images_per_second")


def _list_trade_off_points(column: str) -> list[Point]:
    rows = ((row["network"], printed(row, column), float(row["top1"])) for row in load_table("table3_imagenet"))
    return [Point(name, speed, top1, measured=False) for name, speed, top1 in rows if speed]


def _limit(panel: Panel) -> Panel:
    """Leave out what is much slower than a middle-sized FasterNet; all stays where that was not measured."""
    limits = _find_limits(panel)

    def is_near(point: Point) -> bool:
        if not (own := limits.get(point.filter)):
            return True
        return point.x >= own / LIMIT if panel.rising else point.x <= own * LIMIT

    return panel._replace(points=[point for point in panel.points if is_near(point)])


def _find_limits(panel: Panel) -> dict[str, float]:
    """Return the speed of that FasterNet, by engine."""
    return {point.filter: point.x for point in panel.points if point.name == LIMIT_NETWORK}
