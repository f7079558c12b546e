"""What the measuring commands share: records are written as they come, then printed beside the paper's numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasternet.cli._common import note, print_json, print_table

if TYPE_CHECKING:
    from fasternet.records import Record


def split(names: str | None) -> list[str] | None:
    """Return the names of a list that is separated by commas."""
    return None if names is None else [name.strip() for name in names.split(",")]


def list_fast_engines(device: str) -> list[str]:
    """Return eager PyTorch and what else is ready; on a CPU compiling has to be asked for, as it takes minutes."""
    from fasternet.deploy import explain_engine

    engines, kind = (("onnxruntime", "openvino", "cpu"), "cpu") if device == "cpu" else (("compile",), "cuda")
    return ["eager", *(engine for engine in engines if explain_engine(engine, "fp32", kind) is None)]


def finish(
    suite: str,
    records: Iterable[Record],
    out: Path | None,
    as_json: bool,
    paper_ms: Mapping[str, float],
) -> None:
    """Write the records as they come, then print them, then say where they are."""
    path, written = save(suite, records, out)
    if as_json:
        print_json([dataclasses.asdict(record) for record in written])
    else:
        _print_differences([record for record in written if record.kind == "difference"])
        _print_latencies([record for record in written if record.kind == "latency"], paper_ms)
        print_ratios([record for record in written if record.kind == "ratio"], paper_ms)
        _print_stages([record for record in written if record.kind == "stage"])
    note_end(path, written)


def save(suite: str, records: Iterable[Record], out: Path | None) -> tuple[Path, list[Record]]:
    """Write the records as they come; return where, and all of them."""
    from fasternet.benchmark.results import find_results_file, save_results

    path = out or find_results_file(suite)
    return path, list(save_results(path, records))


def note_end(path: Path, written: Sequence[Record]) -> None:
    """Say what to think of the records, and where they are."""
    for warning in dict.fromkeys(text for record in written for text in record.values.get("warnings", ())):
        note(f"warning: {warning}")
    if num_unstable := sum(record.values.get("unstable", False) for record in written):
        note(f"unstable: {num_unstable}; run again when nothing else runs, records are added and never replaced")
    if written:
        note(str(path))


def _print_differences(records: Sequence[Record]) -> None:
    if not records:
        return
    columns = ("", "against", "max relative difference", "allowed", "changed predictions", "pictures")
    fields = ("max_relative_difference", "limit", "changed_predictions", "num_images")
    rows = [(r.subject, r.condition["baseline"], *(r.values[name] for name in fields)) for r in records]
    print_table(columns, rows, title="Exactness")


def print_speeds(records: Sequence[Record]) -> None:
    """Print what ``bench training`` measured."""
    fields = ("images_per_second", "latency_ms", "latency_ms_min")
    rows = []
    for record in records:
        values: Mapping[str, Any] = record.values
        remark = values.get("error") or values.get("remark") or ("unstable" if values["unstable"] else "")
        rows.append((record.subject, *(values.get(field) for field in fields), remark))
    print_table(("", "images/s", "ms a step", "min ms", "remark"), rows, title="Training: the parts, and other loops")


def _print_latencies(records: Sequence[Record], paper_ms: Mapping[str, float]) -> None:
    fields = {
        **{"latency_ms": ("ms", 1), "latency_ms_min": ("min ms", 1), "latency_ms_p90": ("p90 ms", 1)},
        **{"macs_per_second": ("GMACs/s", 1e9), "peak_share": ("of peak %", 0.01)},
        **{"register_peak_share": ("of registers %", 0.01), "images_per_second": ("images/s", 1)},
    }
    if not any("register_peak_share" in record.values for record in records):
        del fields["register_peak_share"]
    columns = ("", "GMACs", "paper ms", *(label for label, _ in fields.values()), "remark")
    rows = []
    for record in records:
        values: Mapping[str, Any] = record.values
        scaled = [None if values.get(name) is None else values[name] / unit for name, (_, unit) in fields.items()]
        macs = values["macs"] / 1e9 if "macs" in values else None
        remark = values.get("error") or values.get("remark") or ("unstable" if values["unstable"] else "")
        remark = remark or ("speed only" if values.get("speed_only") else "")
        paper = paper_ms.get(_label(record)) if record.condition.get("precision", "fp32") == "fp32" else None
        rows.append((_describe(record), macs, paper, *scaled, remark))
    print_table(columns, rows, title="Time of one call: the paper (version v1) and measured here")


def print_ratios(records: Sequence[Record], paper_ms: Mapping[str, float]) -> None:
    """Print ratios of times, and the paper's where it has both."""
    columns = ("", "against", "paper ratio", "ratio", "95 % interval", "A/A spread %", "verdict")
    rows = []
    for record in records:
        values, condition, other = record.values, record.condition, record.condition["baseline"]
        own, theirs = _describe(record), _describe(record, other)
        above, below = (paper_ms.get(label) for label in (_label(record), _label(record, other)))
        paper_ratio = above / below if above and below and record.subject != other else None
        against = "itself (A/A control)" if own == theirs else theirs
        own += " (fastest engine of each)" if condition.get("best_engines") else ""
        against += ", the best rival" if condition.get("best_rival") else ""
        interval = f"{values['low']:.3f} to {values['high']:.3f}"
        spread = 100 * values["a_a_spread"]
        rows.append((own, against, paper_ratio, values["ratio"], interval, spread, values["verdict"]))
    print_table(columns, rows, title="Times as multiples of another's: above 1 is slower")


def _print_stages(records: Sequence[Record]) -> None:
    """Print where the time of the CPU engine goes."""
    if not records:
        return
    units = {"latency_ms": 1, "share": 0.01, "macs": 1e9, "macs_per_second": 1e9, "register_peak_share": 0.01}
    rows: list[tuple[object, ...]] = []
    for record in records:
        scaled = [None if record.values.get(name) is None else record.values[name] / units[name] for name in units]
        rows.append((_describe(record), record.condition["stage"], record.values["isa"], *scaled))
    columns = ("", "part", "instructions", "ms", "of the time %", "GMACs", "GMACs/s", "of registers %")
    print_table(columns, rows, title="The CPU engine, part by part")


def _label(record: Record, subject: str | None = None) -> str:
    """Return the name of a row: the subject; of an operator also its shape, in a sweep the value."""
    shape = [str(record.condition[key]) for key in ("channels", "height", "width") if key in record.condition]
    swept = record.condition.get("sweep")
    value = f"{swept} {record.condition[swept]}" if swept else ""
    return " ".join(filter(None, (subject or record.subject, "x".join(shape), value)))


def _describe(record: Record, baseline: str | None = None) -> str:
    """Return the name of a row, or of what its ratio is against, with an engine and a precision that are not usual."""
    prefix = "" if baseline is None else "baseline_"
    setup = (record.condition.get(prefix + "engine"), record.condition.get(prefix + "precision"))
    return " ".join([_label(record, baseline), *(word for word in setup if word not in (None, "eager", "fp32"))])


def read_paper(suite: str, device: str, batch_size: int) -> dict[str, float]:
    """Return the paper's ms per call by row; nothing under conditions that it did not measure."""
    from fasternet.paper import load_table

    if suite == "networks":
        rows = {row["network"]: row for row in load_table("table3_imagenet")}
    else:
        shape = "{operator} {channels}x{height}x{width}"
        rows = {shape.format_map(row): row for row in load_table("table1_operators")}
    if device == "cpu" and batch_size == 1:
        return {label: float(row["cpu_latency_ms"]) for label, row in rows.items()}
    if device != "cpu" and batch_size == 32:
        return {label: 32e3 / float(row["gpu_throughput_images_per_second"]) for label, row in rows.items()}
    return {}
