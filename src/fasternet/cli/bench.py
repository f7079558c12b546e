"""``fasternet bench``: operators (Table 1), networks (Table 3), deployed forms (Table 9); training, and its faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasternet.cli._common import note, print_json, print_table, shorten_spinning, track

if TYPE_CHECKING:
    from fasternet.records import Record

bench = typer.Typer(help="Measure on this machine, beside the paper's numbers.", no_args_is_help=True)

BatchSize = Annotated[int, typer.Option(help="Pictures per call: 1 for latency, 32 for throughput.", min=1)]
Threads = Annotated[int, typer.Option(help="Threads on the CPU.", min=1)]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Quick = Annotated[bool, typer.Option("--quick", help="A first answer: fewer blocks, fewer networks.")]
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
    _finish("operators", records, out, as_json, _read_paper("operators", device, batch_size))


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
    _finish("networks", records, out, as_json, _read_paper("networks", device, batch_size))


@bench.command("deploy")
def bench_deploy(
    networks: Annotated[str | None, typer.Option(help="Names, separated by commas. [default: T0 to S]")] = None,
    batch_size: BatchSize = 1,
    threads: Threads = 1,
    input_size: Annotated[int, typer.Option(help="Side of the pictures.", min=32)] = 224,
    device: Device = "cpu",
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Compare FasterNet as this package deploys it with the published forms: differences first, then times.

    Example: fasternet bench deploy --networks fasternet_t0,fasternet_t1 --batch-size 32
    """
    from fasternet.benchmark.deploy import measure_deploy

    records = measure_deploy(
        _split(networks),
        batch_size=batch_size,
        threads=threads,
        input_size=input_size,
        device=device,
        quick=quick,
        track=track,
    )
    _finish("deploy", records, out, as_json, {})


@bench.command("training")
def bench_training(
    data: Annotated[str, typer.Option(help="Folder of pictures, hf:NAME, or digits.")],
    name: Annotated[str, typer.Argument(help="Network: fasternet_t0 ..., or one of timm's.")] = "fasternet_t0",
    recipe: Annotated[str, typer.Option(help="paper, finetune, small or digits.")] = "small",
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe; repeatable.")
    ] = None,
    device: Device = "cpu",
    threads: Threads = 1,
    timm_script: Annotated[Path | None, typer.Option(help="timm's train.py, to be run beside, for an epoch.")] = None,
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure training: the data alone, the step alone, both, and a plain loop over timm's parts beside them.

    Example: fasternet bench training fasternet_t0 --data digits --quick
    """
    shorten_spinning()
    from fasternet.benchmark.training import measure_training
    from fasternet.report.speed import tell_limit
    from fasternet.train.recipe import parse_overrides
    from fasternet.train.recipes import find_recipe

    records = measure_training(
        name,
        data,
        recipe=parse_overrides(find_recipe(recipe, name), changes or ()),
        device=device,
        threads=threads,
        timm_script=timm_script,
        quick=quick,
        track=track,
    )
    path, written = _save("training-speed", records, out)
    if as_json:
        print_json([dataclasses.asdict(record) for record in written])
    else:
        latencies = [record for record in written if record.kind == "latency"]
        _print_speeds(latencies)
        if limit := tell_limit(latencies):
            print(limit + "\n")
        _print_ratios([record for record in written if record.kind == "ratio"], {})
    _note_end(path, written)


@bench.command("faults")
def bench_faults(
    num_kills: Annotated[int, typer.Option(help="Kills at random moments, alone and in a group of two.", min=3)] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="Each of the other faults once.")] = False,
    seed: Annotated[int, typer.Option(help="Of the moments.", min=0)] = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Kill, stop and damage running trainings, resume them, and compare how they end with one left alone.

    Example: fasternet bench faults --num-kills 3 --quick
    """
    from fasternet.benchmark.faults import measure_faults

    path, written = _save("faults", measure_faults(num_kills=num_kills, quick=quick, seed=seed, track=track), out)
    if as_json:
        print_json([dataclasses.asdict(record) for record in written])
    else:
        fields = ("injected", "recovered", "bitwise_equal", "remark")
        rows = [(record.subject, *(record.values[name] for name in fields)) for record in written]
        print_table(("fault", "injected", "recovered", "bitwise equal", "remark"), rows, title="Faults injected")
    _note_end(path, written)


def _split(names: str | None) -> list[str] | None:
    return None if names is None else [name.strip() for name in names.split(",")]


def _finish(
    suite: str, records: Iterable[Record], out: Path | None, as_json: bool, paper_ms: Mapping[str, float]
) -> None:
    """Write the records as they come, then print them, then say where they are."""
    path, written = _save(suite, records, out)
    if as_json:
        print_json([dataclasses.asdict(record) for record in written])
    else:
        _print_differences([record for record in written if record.kind == "difference"])
        _print_latencies([record for record in written if record.kind == "latency"], paper_ms)
        _print_ratios([record for record in written if record.kind == "ratio"], paper_ms)
    _note_end(path, written)


def _save(suite: str, records: Iterable[Record], out: Path | None) -> tuple[Path, list[Record]]:
    """Write the records as they come; return where, and all of them."""
    from fasternet.benchmark.results import find_results_file, save_results

    path = out or find_results_file(suite)
    return path, list(save_results(path, records))


def _note_end(path: Path, written: Sequence[Record]) -> None:
    if num_unstable := sum(record.values.get("unstable", False) for record in written):
        note(f"unstable: {num_unstable}; run again when nothing else runs, records are added and never replaced")
    note(str(path))


def _print_differences(records: Sequence[Record]) -> None:
    if not records:
        return
    columns = ("", "against", "max relative difference", "allowed", "changed predictions", "pictures")
    fields = ("max_relative_difference", "limit", "changed_predictions", "num_images")
    rows = [(r.subject, r.condition["baseline"], *(r.values[name] for name in fields)) for r in records]
    print_table(columns, rows, title="Exactness")


def _print_speeds(records: Sequence[Record]) -> None:
    fields = ("images_per_second", "latency_ms", "latency_ms_min")
    rows = []
    for record in records:
        values: Mapping[str, Any] = record.values
        remark = values.get("error") or values.get("remark") or ("unstable" if values["unstable"] else "")
        rows.append((record.subject, *(values.get(field) for field in fields), remark))
    print_table(("", "images/s", "ms a step", "min ms", "remark"), rows, title="Training: the parts, and other loops")


def _print_latencies(records: Sequence[Record], paper_ms: Mapping[str, float]) -> None:
    columns = ("", "GMACs", "paper ms", "ms", "min ms", "p90 ms", "GMACs/s", "of peak %", "images/s", "remark")
    rows = []
    for record in records:
        values: Mapping[str, Any] = record.values
        units = {
            **{"latency_ms": 1, "latency_ms_min": 1, "latency_ms_p90": 1},
            **{"macs_per_second": 1e9, "peak_share": 0.01, "images_per_second": 1},
        }
        scaled = [None if values.get(name) is None else values[name] / unit for name, unit in units.items()]
        macs = values["macs"] / 1e9 if "macs" in values else None
        remark = values.get("error") or values.get("remark") or ("unstable" if values["unstable"] else "")
        rows.append((_label(record), macs, paper_ms.get(_label(record)), *scaled, remark))
    print_table(columns, rows, title="Time of one call: the paper (version v1) and measured here")


def _print_ratios(records: Sequence[Record], paper_ms: Mapping[str, float]) -> None:
    columns = ("", "against", "paper ratio", "ratio", "95 % interval", "A/A spread %", "verdict")
    rows = []
    for record in records:
        values, other = record.values, record.condition["baseline"]
        is_control = record.subject == other
        above, below = (paper_ms.get(label) for label in (_label(record), _label(record, other)))
        paper_ratio = above / below if above and below and not is_control else None
        against = "itself (A/A control)" if is_control else other
        interval = f"{values['low']:.3f} to {values['high']:.3f}"
        spread = 100 * values["a_a_spread"]
        rows.append((_label(record), against, paper_ratio, values["ratio"], interval, spread, values["verdict"]))
    print_table(columns, rows, title="Times as multiples of another's: above 1 is slower")


def _label(record: Record, subject: str | None = None) -> str:
    """Return the name of a row: the subject; of an operator also its shape."""
    shape = [str(record.condition[key]) for key in ("channels", "height", "width") if key in record.condition]
    return " ".join(filter(None, (subject or record.subject, "x".join(shape))))


def _read_paper(suite: str, device: str, batch_size: int) -> dict[str, float]:
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
