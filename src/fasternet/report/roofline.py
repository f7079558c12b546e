"""Rooflines: how fast operators are, over how many multiply-adds each does a byte, under what the machine allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fasternet.records import Machine, Record
from fasternet.report.markup import Html, figure, join
from fasternet.report.operators import Measured, describe_operator, list_sets
from fasternet.report.plots import draw_plane
from fasternet.report.points import Line, Point, list_legend, tell_points
from fasternet.report.provenance import number, provenance
from fasternet.report.sources import Source, select

GEMM = "matrix product"


class Roof(NamedTuple):
    """What a machine allows.

    Attributes:
        gemm: The fastest matrix product, G multiply-adds a second.
        size: The side of its matrices.
        copies: Bandwidth in GB/s by the copied buffer in MiB.
    """

    gemm: float
    size: float
    copies: Mapping[float, float]


def show_rooflines(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Draw the operators of each set of conditions under the roof of their machine, where the records tell of both."""
    peaks = select(sources, "machine_peak", "operators")
    content = []
    for index, measured in enumerate(list_sets(sources, machines), start=1):
        points = list_points(measured)
        if points and (roof := read_roof(next(iter(measured.latest.values())), peaks)):
            content.append(_show(f"roofline-{index}", measured, points, roof, machines))
    return content


def list_points(measured: Measured) -> list[Point]:
    """Return where operators stand, the largest maps first; the forms of PConv would cover one another and stay out."""
    found = sorted(measured.latest.items(), key=lambda item: (-item[0][1][1], item[0][1]))
    return [
        Point(
            describe_operator(name).replace(" 3×3", "").partition(",")[0],
            x,
            y / 1e9,
            engine=" × ".join(map(str, shape)),
        )
        for (name, shape), record in found
        if ":" not in name
        and (x := number(record, "arithmetic_intensity"))
        and (y := number(record, "macs_per_second"))
    ]


def read_roof(record: Record, peaks: Sequence[Record]) -> Roof | None:
    """Return the highest peaks of a record's machine, device, threads and precision: other load only lowers them."""
    own = [
        peak
        for peak in peaks
        if peak.machine == record.machine
        and all(peak.condition.get(name) == record.condition.get(name) for name in ("device", "threads", "precision"))
    ]
    gemms = [
        (rate / 1e9, float(size))
        for peak in own
        if peak.subject == "gemm" and (rate := number(peak, "macs_per_second"))
        if isinstance(size := peak.condition.get("size"), int | float)
    ]
    copies: dict[float, float] = {}
    for peak in own:
        rate, mib = number(peak, "bytes_per_second"), peak.condition.get("mib")
        if peak.subject == "copy" and rate and isinstance(mib, int | float):
            copies[mib] = max(rate / 1e9, copies.get(mib, 0))
    return Roof(*max(gemms), dict(sorted(copies.items()))) if gemms and copies else None


def _show(key: str, measured: Measured, points: Sequence[Point], roof: Roof, machines: Mapping[str, Machine]) -> Html:
    # a product of two matrices of side n reads and writes 3 n² numbers of 4 bytes for n³ multiply-adds
    points = [*points, Point(GEMM, roof.size / 12, roof.gemm, engine=GEMM)]
    low, high = min(point.x for point in points) / 10, max(point.x for point in points) * 10
    lines = [
        Line(((low, low * rate), (roof.gemm / rate, roof.gemm), (high, roof.gemm))) for rate in roof.copies.values()
    ]
    drawing = draw_plane(
        points,
        lines,
        key=key,
        title="FLOPS, G multiply-adds per second",
        x_label="FLOPs a byte read or written",
        alt="FLOPS of operators over FLOPs a byte, under lines of what the machine allows; Table 1 holds the numbers",
    )
    legend = list_legend(points, {"fasternet": "PConv", "rival": "other operators"})
    bandwidths = ", ".join(f"{mib:g} MiB at {rate:.3g} GB/s" for mib, rate in roof.copies.items())
    note = (
        f"Lines: the fastest matrix product, {roof.gemm:.3g} G/s, and copying buffers of {bandwidths}; what fits no "
        "cache is the slowest. Bytes are those of Eq. 2 to 5. An operator far below its line is limited by neither."
    )
    title = f"Operators under the roofline ({measured.label})"
    small = provenance(list(measured.latest.values()), machines)
    return figure(key, title, join([legend, drawing]), note, tell_points("Table 1"), small)
