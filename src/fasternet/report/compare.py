"""What measured and printed speeds have in common: the quantity, its cells, and times relative to one network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fasternet.records import Machine, Record
from fasternet.report.markup import Cell, join, tag
from fasternet.report.provenance import number

UNSTABLE = tag("a", "†", href="#unstable", class_="mark", title="unstable: spread over 10 % of the median")


class Quantity(NamedTuple):
    """A speed that tables show.

    Attributes:
        value: Its name in records.
        label: Its heading.
        form: Its format.
        device: CPU, GPU or ARM.
        paper: The column of Tables 1 and 3 that holds the same, if any does.
        remeasured: The column of what the authors measured again.
        conditions: Those of the paper.
    """

    value: str
    label: str
    form: str
    device: str
    paper: str = ""
    remeasured: str = ""
    conditions: str = ""


# By the device and whether the batch is a single picture.
QUANTITIES = {
    ("CPU", True): Quantity(
        "latency_ms", "CPU latency, ms", ".2f", "CPU", "cpu_latency_ms", "cpu_latency_ms",
        "i9-9900X, one thread, batch 1, fp32",
    ),
    ("CPU", False): Quantity("images_per_second", "CPU throughput, images/s", ",.1f", "CPU"),
    ("ARM", True): Quantity(
        "latency_ms", "ARM latency, ms", ".2f", "ARM", "arm_latency_ms", "arm_latency_ms",
        "Cortex-A72, one thread, batch 1, fp32",
    ),
    ("ARM", False): Quantity("images_per_second", "ARM throughput, images/s", ",.1f", "ARM"),
    ("GPU", True): Quantity("latency_ms", "GPU latency, ms", ".3f", "GPU"),
    ("GPU", False): Quantity(
        "images_per_second", "GPU throughput, images/s", ",.0f", "GPU", "gpu_throughput_images_per_second",
        "gpu_images_per_second", "2080Ti, batch 32, fp32",
    ),
}  # fmt: skip
ARM = ("aarch64", "arm64", "armv7l")
PAPER_BATCH = {"CPU": 1, "ARM": 1, "GPU": 32}


class Timing(NamedTuple):
    """The time of one thing as a multiple of another's, with its interval."""

    value: float
    low: float
    high: float


def find_device(record: Record, machines: Mapping[str, Machine]) -> str:
    """Return on what a record was measured, as the paper tells devices apart: GPU, CPU or ARM."""
    if not str(record.condition.get("device", "cpu")).startswith("cpu"):
        return "GPU"
    machine = machines.get(record.machine)
    return "ARM" if machine and machine.architecture in ARM else "CPU"


def select_quantity(record: Record, machines: Mapping[str, Machine]) -> Quantity:
    """Return what to show under the conditions of a record: latency for single pictures, throughput for batches.

    It names columns of the paper's only under the paper's conditions: one thread, and the device's batch.
    """
    device, batch = find_device(record, machines), record.condition.get("batch_size", 1)
    quantity = QUANTITIES[device, batch == 1]
    is_paper = batch == PAPER_BATCH[device] and (device == "GPU" or record.condition.get("threads", 1) == 1)
    return quantity if is_paper else quantity._replace(paper="", remeasured="", conditions="")


def read_timing(ratio: Record) -> Timing | None:
    """Return the ratio of times that a record holds."""
    values = [number(ratio, name) for name in ("ratio", "low", "high")]
    if ratio.condition.get("metric", "latency_ms") != "latency_ms":
        return None
    known = [value for value in values if value is not None and value > 0]
    return Timing(*known) if len(known) == len(values) else None


def scaled(record: Record | None, name: str, unit: float) -> float | None:
    """Return a value in another unit; None where there is none."""
    value = None if record is None else number(record, name)
    return None if value is None else value / unit


def speed_cell(record: Record | None, name: str, form: str, unit: float = 1) -> Cell | None:
    """Return a speed as a cell, marked where it is unstable; where measuring failed, the reason."""
    if record is None:
        return None
    if error := record.values.get("error"):
        return Cell(str(error))
    if (value := scaled(record, name, unit)) is None:
        return None
    return Cell(join([format(value, form), UNSTABLE if record.values.get("unstable") else None]), value)


def interval_cell(timing: Timing | None, form: str = ".2f") -> Cell | None:
    """Return an interval as a cell."""
    return Cell(f"{timing.low:{form}}–{timing.high:{form}}", timing.low) if timing else None


def printed(row: Mapping[str, str], name: str) -> float | None:
    """Return a number of the paper's; None where the table has none (OOM)."""
    try:
        return float(row.get(name, ""))
    except ValueError:
        return None


def divide(above: float | None, below: float | None) -> float | None:
    """Return a quotient; None where a part of it is missing."""
    return above / below if above is not None and below else None
