"""Table 4: Mask R-CNN on each backbone, the paper's costs, latency and AP beside what was counted and measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fasternet.paper import load_table
from fasternet.records import Machine, Record
from fasternet.report.compare import Timing, divide, interval_cell, printed, read_timing, scaled, speed_cell
from fasternet.report.markup import Cell, Column, Html, figure, table
from fasternet.report.networks import Footnotes
from fasternet.report.provenance import describe_setting, number, provenance
from fasternet.report.sources import Source, comparable, group, newest, select

SUITE = "detection"
PARTS = ("backbone", "neck", "heads", "post-processing", "whole")
PUBLISHED_SIZE = (800, 1280)
APS = {"box_ap": "box", "box_ap50": "box 50", "box_ap75": "box 75"}
APS |= {"mask_ap": "mask", "mask_ap50": "mask 50", "mask_ap75": "mask 75"}
HERE = (
    "Here: random weights, BN folded, every backbone in the same engine; neck, heads and post-processing run in "
    "PyTorch. Heads: those of the RPN, of boxes and of masks. Post-processing: boxes, non-maximum suppression, masks "
    "laid into the picture. The whole is these parts on fixed regions, 1000 for the box head and 100 for the mask "
    "head, whatever is found; resizing and normalising the picture are not in it."
)
FORMS = (
    "In eager PyTorch a FasterNet runs in this package’s exact form for inference (in place, matrix products), the "
    "others, and a FasterNet named :split_cat, in the memory format that suits them better."
)
PAPER = (
    "Paper: latency on a GPU (2080Ti), with an in-place partial convolution: compare ratios, not milliseconds. What it "
    "covers, in which engine and at which size it does not say: its 1280 × 800 px are those of the multiply-adds. AP "
    "is quoted from the paper, not measured."
)
COUNTED = "Parameters are counted without BN; multiply-adds with 1000 proposals and 100 masks, as the paper does."

Row = Mapping[str, str]  # of the paper's table; of a backbone that it lacks, its name alone


class Found(NamedTuple):
    """What was measured on one machine under equal conditions, at one size.

    Attributes:
        size: Height and width.
        latencies: By backbone and part.
        ratios: By backbone and part.
        costs: By backbone.
    """

    size: tuple[object, object]
    latencies: Mapping[tuple[str, str], Record]
    ratios: Mapping[tuple[str, str], Record]
    costs: Mapping[str, Record]


def show_table4(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Table 4 for every machine, setting and size of the picture."""
    settings = group(select(sources, "latency", SUITE), lambda record: (comparable(record), _read_size(record)))
    content = []
    for index, ((setting, size), members) in enumerate(settings.items(), start=1):
        ratios = (r for r in select(sources, "ratio", SUITE) if (comparable(r), _read_size(r)) == (setting, size))
        costs = (record for record in select(sources, "cost", SUITE) if _read_size(record) == size)
        found = Found(
            size,
            newest(members, _read_part),
            newest((ratio for ratio in ratios if ratio.subject != ratio.condition.get("baseline")), _read_part),
            newest(costs, lambda record: record.subject),
        )
        content.append(_table4(f"table-4-{index}", found, machines))
    return content


def _read_size(record: Record) -> tuple[object, object]:
    return record.condition.get("height"), record.condition.get("width")


def _read_part(record: Record) -> tuple[str, str]:
    return record.subject, str(record.condition.get("part"))


def _list_rows(found: Found) -> tuple[list[Row], list[int]]:
    """Return the blocks of the paper in which something was measured, then other backbones; and where blocks begin."""
    measured = dict.fromkeys(name for name, _ in found.latencies)
    blocks: list[list[Row]] = [[]]
    for row in load_table("table4_coco"):
        blocks[-1].append(row)
        if row["backbone"].startswith("FasterNet"):  # the last of its block
            blocks.append([])
    known = {row["backbone"] for block in blocks for row in block}
    blocks[-1] = [{"backbone": name} for name in measured if name not in known]
    shown = [block for block in blocks if any(row["backbone"] in measured for row in block)]
    rows = [row for block in shown for row in block]
    return rows, [place for place, row in enumerate(rows) if place and any(block[0] is row for block in shown)]


def _table4(key: str, found: Found, machines: Mapping[str, Machine]) -> Html:
    rows, breaks = _list_rows(found)
    notes = Footnotes(key)
    columns: list[Column[Row]] = [
        Column("Backbone", lambda row: row["backbone"]),
        Column("paper v1", lambda row: printed(row, "params_m"), ".1f", "Parameters, M"),
        Column("here", _cost(found, "num_params_without_batch_norm", 1e6), ".1f", "Parameters, M"),
    ]
    is_published = found.size == PUBLISHED_SIZE
    if is_published:
        columns.append(Column("paper v1", lambda row: printed(row, "macs_g_1280x800"), ".0f", "Multiply-adds, G"))
    columns.append(Column("here", _cost(found, "macs", 1e9), ".1f", "Multiply-adds, G"))
    if is_published:
        columns.append(Column("paper v1", lambda row: printed(row, "gpu_latency_ms"), ".1f", "GPU latency, ms"))
    columns += [Column(part, _latency(found, part, notes), "", "Here, ms") for part in PARTS]
    columns += _ratio_columns(found, rows)
    columns += [Column(label, _quote(name), ".1f", "AP on COCO, %, paper v1") for name, label in APS.items()]
    records = list(found.latencies.values())
    height, width = found.size
    setting = describe_setting(records[0])
    title = f"Table 4. Mask R-CNN, the paper’s numbers and those measured here ({setting}, {width} × {height} px)"
    content = table(key, columns, rows, breaks=breaks)
    small = provenance(records, machines)
    here = f"{HERE} {FORMS}" if records[0].condition.get("engine") == "eager" else HERE
    return figure(key, title, content, notes.show(), PAPER, here, COUNTED + _tell_attention(found), small)


def _cost(found: Found, name: str, unit: float) -> Callable[[Row], float | None]:
    return lambda row: scaled(found.costs.get(row["backbone"]), name, unit)


def _quote(name: str) -> Callable[[Row], float | None]:
    return lambda row: printed(row, name)


def _latency(found: Found, part: str, notes: Footnotes) -> Callable[[Row], Cell | None]:
    def show(row: Row) -> Cell | None:
        record = found.latencies.get((row["backbone"], part))
        return notes.mark(record) or speed_cell(record, "latency_ms", ",.0f" if part == "whole" else ",.1f")

    return show


def _ratio_columns(found: Found, rows: Sequence[Row]) -> list[Column[Row]]:
    """Return times relative to the FasterNet that was measured in the same run, and what the paper printed of both."""
    paper = {row["backbone"]: row for row in rows}

    def reference(row: Row) -> str | None:
        ratio = found.ratios.get((row["backbone"], "whole"))
        return str(ratio.condition.get("baseline")) if ratio else None

    def paper_ratio(row: Row) -> float | None:
        other = paper.get(reference(row) or "", {})
        return divide(printed(row, "gpu_latency_ms"), printed(other, "gpu_latency_ms"))

    def timing(row: Row, part: str) -> Timing | None:
        ratio = found.ratios.get((row["backbone"], part))
        return read_timing(ratio) if ratio else None

    def value(part: str) -> Callable[[Row], float | None]:
        return lambda row: known.value if (known := timing(row, part)) else None

    heading = "Time relative to"
    columns: list[Column[Row]] = [
        Column("FasterNet", reference, None, heading),
    ]
    if found.size == PUBLISHED_SIZE:
        columns.append(Column("paper v1, GPU", paper_ratio, ".2f", heading))
    for part in ("whole", "backbone"):
        columns.append(Column(f"{part}, here", value(part), ".2f", heading))
        columns.append(Column("95 % interval", lambda row, p=part: interval_cell(timing(row, p)), "", heading))  # type: ignore[misc]
    return columns


def _tell_attention(found: Found) -> str:
    """Say which multiply-adds the paper's numbers leave out."""
    attention = {name: number(record, "attention_macs") for name, record in found.costs.items()}
    told = ", ".join(f"{name} {macs / 1e9:.3g} G" for name, macs in attention.items() if macs)
    return f" The matrix products of attention count here and not there: {told}." if told else ""
