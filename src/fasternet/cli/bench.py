"""``fasternet bench``: measure operators (Table 1) and networks (Table 3) on this machine, beside the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fasternet.cli._common import note, print_json, print_table, track

if TYPE_CHECKING:
    from fasternet.records import Record

bench = typer.Typer(help="Measure on this machine, beside the paper's numbers.", no_args_is_help=True)

BatchSize = Annotated[int, typer.Option(help="Pictures per call: 1 for latency, 32 for throughput.", min=1)]
Threads = Annotated[int, typer.Option(help="Threads on the CPU.", min=1)]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Quick = Annotated[bool, typer.Option("--quick", help="A first answer in about a minute.")]
Out = Annotated[Path | None, typer.Option(help="Records file. [default: results/<machine>/<date>-<suite>.jsonl]")]
Json = Annotated[bool, typer.Option("--json", help="Print the records as one JSON document.")]


@bench.command("operators")
def bench_operators(
    operators: Annotated[str | None, typer.Option(help="Names, separated by commas. [default: Table 1]")] = None,
    batch_size: BatchSize = 1,
    threads: Threads = 1,
    device: Device = "cpu",
    memory_format: Annotated[str, typer.Option(help="contiguous or channels_last.")] = "contiguous",
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure ten stacked layers of each operator on the four shapes of Table 1.

    Example: fasternet bench operators --quick
    """
    from fasternet.benchmark.operators import measure_operators

    records = measure_operators(
        _split(operators),
        batch_size=batch_size,
        threads=threads,
        device=device,
        memory_format=memory_format,
        quick=quick,
        track=track,
    )
    _finish("operators", records, out, as_json, _read_paper_operators(device, batch_size))


@bench.command("networks")
def bench_networks(
    networks: Annotated[str | None, typer.Option(help="Names, separated by commas. [default: Table 3]")] = None,
    batch_size: BatchSize = 1,
    threads: Threads = 1,
    input_size: Annotated[
        int | None, typer.Option(help="Side of the pictures. [default: each network's own]", min=1)
    ] = None,
    device: Device = "cpu",
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure FasterNet and its rivals, BN folded in all of them, each in its better memory format.

    Example: fasternet bench networks --networks "FasterNet-T0,MobileNetV2,MobileViT-XXS"
    """
    from fasternet.benchmark.networks import measure_networks

    records = measure_networks(
        _split(networks),
        batch_size=batch_size,
        threads=threads,
        input_size=input_size,
        device=device,
        quick=quick,
        track=track,
    )
    _finish("networks", records, out, as_json, _read_paper_networks(device, batch_size))


def _split(names: str | None) -> list[str] | None:
    return None if names is None else [name.strip() for name in names.split(",")]


def _finish(
    suite: str, records: Iterable[Record], out: Path | None, as_json: bool, paper_ms: Mapping[str, float]
) -> None:
    """Write the records as they come, then print them, then say where they are."""
    from fasternet.benchmark.results import find_results_file, save_results

    path = out or find_results_file(suite)
    written = list(save_results(path, records))
    if as_json:
        print_json([dataclasses.asdict(record) for record in written])
    else:
        _print_latencies([record for record in written if record.kind == "latency"], paper_ms)
        _print_ratios([record for record in written if record.kind == "ratio"], paper_ms)
    note(str(path))


def _print_latencies(records: Sequence[Record], paper_ms: Mapping[str, float]) -> None:
    columns = ("", "GMACs", "paper ms", "ms", "min ms", "p90 ms", "GMACs/s", "of peak %", "images/s", "remark")
    rows = []
    for record in records:
        values = record.values

        def scaled(name: str, unit: float, values: Mapping[str, float] = values) -> float | None:
            return None if values.get(name) is None else values[name] / unit

        remark = values.get("error") or ("unstable" if values["unstable"] else "")
        numbers = (("latency_ms", 1), ("latency_ms_min", 1), ("latency_ms_p90", 1), ("macs_per_second", 1e9))
        rows.append(
            (
                _name(record),
                scaled("macs", 1e9),
                paper_ms.get(_name(record)),
                *(scaled(name, unit) for name, unit in numbers),
                scaled("peak_share", 0.01),
                scaled("images_per_second", 1),
                remark,
            )
        )
    print_table(columns, rows, title="Paper (version v1) and measured here")


def _print_ratios(records: Sequence[Record], paper_ms: Mapping[str, float]) -> None:
    columns = ("", "against", "paper ratio", "ratio", "95 % interval", "A/A spread %", "it is")
    rows = []
    for record in records:
        name, other = _name(record), _name(record, record.condition["baseline"])
        printed = paper_ms[name] / paper_ms[other] if name in paper_ms and other in paper_ms else None
        values = record.values
        interval = f"{values['low']:.3f} to {values['high']:.3f}"
        is_control = record.subject == record.condition["baseline"]
        rows.append(
            (
                name,
                "itself (A/A control)" if is_control else record.condition["baseline"],
                None if is_control else printed,
                values["ratio"],
                interval,
                100 * values["a_a_spread"],
                values["verdict"],
            )
        )
    print_table(columns, rows, title="Time, as a multiple of the other's")


def _name(record: Record, subject: str | None = None) -> str:
    """Return the key of a row: the subject, for an operator with its shape."""
    shape = [record.condition[key] for key in ("channels", "height", "width") if key in record.condition]
    return " ".join([subject or record.subject, "x".join(map(str, shape))]).strip()


def _read_paper_networks(device: str, batch_size: int) -> dict[str, float]:
    return _read_paper("table3_imagenet", lambda row: row["network"], device, batch_size)


def _read_paper_operators(device: str, batch_size: int) -> dict[str, float]:
    def name(row: Mapping[str, str]) -> str:
        return f"{row['operator']} {row['channels']}x{row['height']}x{row['width']}"

    return _read_paper("table1_operators", name, device, batch_size)


def _read_paper(table: str, name: Callable[[Mapping[str, str]], str], device: str, batch_size: int) -> dict[str, float]:
    """Return the paper's ms per call by row; nothing for conditions that it did not measure."""
    from fasternet.paper import load_table

    rows = load_table(table)
    if device == "cpu" and batch_size == 1:
        return {name(row): float(row["cpu_latency_ms"]) for row in rows}
    if device != "cpu" and batch_size == 32:
        return {name(row): 32e3 / float(row["gpu_throughput_images_per_second"]) for row in rows}
    return {}
