"""What ``bench detection`` and ``reproduce table4`` share: detectors composed with their measuring, and a table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fasternet.cli._common import note, print_table, track

if TYPE_CHECKING:
    from fasternet.benchmark.detection import Methods
    from fasternet.records import Record


def parse_size(text: str) -> tuple[int, int]:
    """Read height and width, "800x1280".

    Raises:
        ValueError: It is something else.
    """
    if not re.fullmatch(r"\d{1,5}x\d{1,5}", text):
        raise ValueError(f"size {text!r} must be height by width in pixels, as in 800x1280")
    height, width = map(int, text.split("x"))
    return height, width


def measure(
    names: Sequence[str] | None,
    *,
    engine: str = "eager",
    precision: str = "fp32",
    threads: int = 1,
    **options: Any,
) -> Iterator[Record]:
    """Measure Mask R-CNN on backbones; see ``measure_detection``."""
    from fasternet.benchmark.detection import measure_detection

    methods = compose_methods(engine, precision, threads)
    return measure_detection(
        names, methods=methods, engine=engine, precision=precision, threads=threads, track=track, say=note, **options
    )


def compose_methods(engine: str, precision: str, threads: int) -> Methods:
    """Return Mask R-CNN for the classes of COCO, as this package builds, deploys and counts it."""
    from fasternet.benchmark.detection import Methods
    from fasternet.detection.costs import NUM_COCO_CLASSES, count_detector, name_backbone
    from fasternet.detection.detector import create_mask_rcnn
    from fasternet.detection.optimize import optimize_detector
    from fasternet.detection.parts import list_parts

    def create(name: str) -> Any:
        return create_mask_rcnn(name_backbone(name), num_classes=NUM_COCO_CLASSES).eval()

    def optimize(detector: Any) -> Any:
        own_threads = None if engine == "eager" else threads
        return optimize_detector(detector, engine=engine, precision=precision, threads=own_threads)

    def count_costs(detector: Any, size: tuple[int, int]) -> dict[str, Any]:
        costs = count_detector(detector, size)
        return {**vars(costs), "part_macs": dict(costs.part_macs), "macs": costs.macs}

    return Methods(create, count_costs, optimize, list_parts)  # type: ignore[arg-type]


def print_detectors(records: Sequence[Record]) -> None:
    """Print a line for each backbone: the time of each part, and of the whole beside the paper's at its size."""
    from fasternet.benchmark.detection import PARTS, SIZE
    from fasternet.paper import load_table

    setting = next((r.condition for r in records if r.kind == "latency"), {})
    size = (setting.get("height"), setting.get("width"))
    paper_ms = {row["backbone"]: float(row["gpu_latency_ms"]) for row in load_table("table4_coco") if size == SIZE}
    latencies = {(r.subject, r.condition.get("part")): r.values for r in records if r.kind == "latency"}
    ratios = {
        r.subject: r
        for r in records
        if r.kind == "ratio" and r.condition["part"] == "whole" and r.subject != r.condition["baseline"]
    }
    rows = []
    for name in dict.fromkeys(name for name, _ in latencies):
        found = [latencies.get((name, part), {}) for part in PARTS]
        fault = next((values["error"] for values in found if "error" in values), "")
        remark = fault or ("unstable" if any(values.get("unstable") for values in found) else "")
        compared: tuple[object, ...] = (None, None, "", "")
        if ratio := ratios.get(name):
            other, values = ratio.condition["baseline"], ratio.values
            paper = paper_ms[name] / paper_ms[other] if {name, other} <= set(paper_ms) else None
            compared = (paper, values["ratio"], f"{values['low']:.3f} to {values['high']:.3f}", other)
        rows.append((name, *(values.get("latency_ms") for values in found), *compared, remark))
    columns = ("ms of", *PARTS, "paper v1 (GPU)", "ratio", "95 % interval", "to", "remark")
    print_table(columns, rows, title=_describe(setting))


def _describe(setting: Mapping[str, Any]) -> str:
    names = ("height", "width", "device", "engine", "precision", "threads")
    height, width, device, engine, precision, threads = (setting.get(name) for name in names)
    where = f"{device}, {engine} {precision}, {threads} thread{'' if threads == 1 else 's'}"
    return (
        f"Mask R-CNN, part by part, {height}x{width}, {where}; ratios of the whole: above 1 is slower; "
        "paper v1: its GPU latencies, whose size, engine and parts it does not state"
    )
