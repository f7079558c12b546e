"""``fasternet bench``: operators (Table 1), networks (Table 3), detection (Table 4), engines, training and more."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fasternet.cli._common import note, print_json, print_table, refuse_auto, shorten_spinning, track
from fasternet.cli._measured import (
    finish,
    list_fast_engines,
    note_end,
    print_ratios,
    print_speeds,
    read_paper,
    save,
    split,
)

if TYPE_CHECKING:
    from fasternet.records import Record

bench = typer.Typer(help="Measure on this machine, beside the paper's numbers.", no_args_is_help=True)

BatchSize = Annotated[int, typer.Option(help="Pictures per call: 1 for latency, 32 for throughput.", min=1)]
Threads = Annotated[int, typer.Option(help="Threads on the CPU.", min=1)]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Engines = Annotated[
    str | None,
    typer.Option(
        help="eager, compile, onnxruntime, openvino, cpu; separated by commas. [default: eager and what is installed]"
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help="A first answer: fewer blocks, fewer networks.")]
Out = Annotated[Path | None, typer.Option(help="Records file. [default: results/<machine>/<date>-<suite>.jsonl]")]
Json = Annotated[bool, typer.Option("--json", help="Print the records as one JSON document.")]


@bench.command("operators")
def bench_operators(
    operators: Annotated[
        str | None, typer.Option(help="Names, separated by commas. [default: Table 1 and more]")
    ] = None,
    passes: Annotated[str, typer.Option(help="forward, or forward+backward.")] = "forward",
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
        split(operators),
        passes=cast(Any, passes),
        batch_size=batch_size,
        threads=threads,
        device=device,
        memory_format=memory_format,
        quick=quick,
        track=track,
    )
    as_paper = passes == "forward" and threads == 1
    paper_ms = read_paper("operators", device, batch_size) if as_paper else {}
    finish("operators", records, out, as_json, paper_ms)


@bench.command("networks")
def bench_networks(
    networks: Annotated[str | None, typer.Option(help="Names, separated by commas. [default: Table 3]")] = None,
    batch_size: BatchSize = 1,
    threads: Threads = 1,
    input_size: Annotated[
        int | None, typer.Option(help="Side of the pictures. [default: each network's own]", min=1)
    ] = None,
    device: Device = "cpu",
    engines: Engines = None,
    precisions: Annotated[str, typer.Option(help="fp32, bf16, int8; separated by commas.")] = "fp32",
    quick: Quick = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out the groups that this machine's records hold already.")
    ] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure FasterNet and its rivals, BN folded in all, in plain PyTorch and in the engines that are installed.

    Example: fasternet bench networks --networks "FasterNet-T0,MobileNetV2,MobileViT-XXS" --engines eager,openvino
    """
    shorten_spinning()
    refuse_auto(split(engines))
    from fasternet.benchmark.networks import measure_networks

    path, known = _find_known("networks", out, resume)
    records = measure_networks(
        split(networks),
        engines=split(engines) or list_fast_engines(device),
        precisions=split(precisions) or (),
        batch_size=batch_size,
        threads=threads,
        input_size=input_size,
        device=device,
        quick=quick,
        track=track,
        known=known,
        say=note,
    )
    as_paper = threads == 1 and input_size is None
    finish("networks", records, path, as_json, read_paper("networks", device, batch_size) if as_paper else {})


@bench.command("engines")
def bench_engines(
    networks: Annotated[str | None, typer.Option(help="FasterNets, separated by commas. [default: T0 to L]")] = None,
    precisions: Annotated[
        str | None, typer.Option(help="fp32, bf16; separated by commas. [default: what the engine has here]")
    ] = None,
    batch_size: BatchSize = 1,
    threads: Threads = 1,
    isa: Annotated[
        str | None,
        typer.Option(help="Hold everything to portable, avx2, avx512, avx512_bf16 or amx. [default: the processor's]"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="T0 alone, without torch.compile, in fewer blocks.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out the networks that this machine's records hold already.")
    ] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure the CPU engine against every other way to run a FasterNet on this processor, and where its time goes.

    Example: fasternet bench engines --networks "FasterNet-T0,FasterNet-T1" --isa avx2
    """
    from fasternet.benchmark.restrict import is_restricted, list_variables

    if isa and not is_restricted(variables := list_variables(isa)):
        # The libraries read these when they are loaded, and some are loaded by now.
        again = [sys.executable, "-m", "fasternet", *sys.argv[1:]]
        raise typer.Exit(subprocess.run(again, env={**os.environ, **variables}, check=False).returncode)
    from fasternet.benchmark.engines import measure_engines

    path, known = _find_known("engines", out, resume)
    records = measure_engines(
        split(networks),
        precisions=split(precisions),
        batch_size=batch_size,
        threads=threads,
        isa=isa,
        quick=quick,
        track=track,
        known=known,
        say=note,
    )
    finish("engines", records, path, as_json, {})


@bench.command("detection")
def bench_detection(
    networks: Annotated[
        str | None,
        typer.Option(help="Backbones, FasterNet-S:split_cat in its published form, by commas. [default: Table 4]"),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="Of the backbones: eager, compile, onnxruntime, openvino, cpu (FasterNets alone).")
    ] = "eager",
    precision: Annotated[str, typer.Option(help="Of the backbones: fp32 or bf16.")] = "fp32",
    size: Annotated[str, typer.Option(help="Height by width of the picture, multiples of 32.")] = "800x1280",
    threads: Threads = 1,
    device: Device = "cpu",
    quick: Quick = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out the groups that this machine's records hold already.")
    ] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure Mask R-CNN on FasterNet and its rivals: backbone, neck, heads and post-processing, and all of it.

    Example: fasternet bench detection --networks "FasterNet-S,ResNet50" --size 320x512 --quick
    """
    shorten_spinning()
    refuse_auto([engine])
    from fasternet.cli._detection import measure, parse_size, print_detectors

    path, known = _find_known("detection", out, resume)
    records = measure(
        split(networks),
        engine=engine,
        precision=precision,
        size=parse_size(size),
        threads=threads,
        device=device,
        quick=quick,
        known=known,
    )
    path, written = save("detection", records, path)
    if as_json:
        print_json([dataclasses.asdict(record) for record in written])
    elif written:
        print_detectors(written)
    note_end(path, written)


def _find_known(suite: str, out: Path | None, resume: bool) -> tuple[Path, list[Record]]:
    """Return where a suite's records go, and what a run that resumes need not measure again."""
    from fasternet.benchmark.results import find_results_file
    from fasternet.records import load_records

    path = out or find_results_file(suite)
    earlier = [path] if out else sorted(path.parent.glob(f"*-{suite}.jsonl"))
    return path, [record for file in earlier if resume and file.is_file() for record in load_records(file)]


@bench.command("sweeps")
def bench_sweeps(
    sweeps: Annotated[str, typer.Option(help="What to sweep: input_size, batch_size, threads.")] = (
        "input_size,batch_size,threads"
    ),
    networks: Annotated[str | None, typer.Option(help="Names, separated by commas. [default: three networks]")] = None,
    device: Device = "cpu",
    engines: Engines = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or int8.")] = "fp32",
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure how latency grows with the size of the picture and of the batch, and shrinks with threads.

    Example: fasternet bench sweeps --sweeps input_size --networks "FasterNet-T0,MobileNetV2" --quick
    """
    shorten_spinning()
    refuse_auto(split(engines))
    from fasternet.benchmark.sweeps import NETWORKS, measure_sweeps

    records = measure_sweeps(
        split(sweeps) or (),
        networks=split(networks) or NETWORKS,
        engines=split(engines) or list_fast_engines(device),
        precision=precision,
        device=device,
        quick=quick,
        track=track,
        say=note,
    )
    finish("sweeps", records, out, as_json, {})


@bench.command("steps")
def bench_steps(
    networks: Annotated[str | None, typer.Option(help="Names, separated by commas. [default: six small ones]")] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures per step.", min=2)] = 32,
    threads: Threads = 1,
    input_size: Annotated[
        int | None, typer.Option(help="Side of the pictures. [default: each network's own]", min=1)
    ] = None,
    device: Device = "cpu",
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure a training step: forward, backward, SGD, in plain PyTorch.

    Example: fasternet bench steps --networks "FasterNet-T0,MobileNetV2" --batch-size 16 --quick
    """
    from fasternet.benchmark.steps import NETWORKS, measure_steps

    records = measure_steps(
        split(networks) or NETWORKS,
        batch_size=batch_size,
        threads=threads,
        input_size=input_size,
        device=device,
        quick=quick,
        track=track,
    )
    finish("steps", records, out, as_json, {})


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
        split(networks),
        batch_size=batch_size,
        threads=threads,
        input_size=input_size,
        device=device,
        quick=quick,
        track=track,
    )
    finish("deploy", records, out, as_json, {})


@bench.command("training")
def bench_training(
    data: Annotated[str, typer.Option(help="Folder of pictures, hf:NAME, or digits.")],
    name: Annotated[str, typer.Argument(help="Network: fasternet_t0 ..., or one of timm's.")] = "fasternet_t0",
    recipe: Annotated[
        str,
        typer.Option(help="small, digits; finetune or paper, less what the plain loop lacks (mixup=0, cutmix=0 ...)."),
    ] = "small",
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
    path, written = save("training-speed", records, out)
    if as_json:
        print_json([dataclasses.asdict(record) for record in written])
    else:
        latencies = [record for record in written if record.kind == "latency"]
        print_speeds(latencies)
        if limit := tell_limit(latencies):
            print(limit + "\n")
        print_ratios([record for record in written if record.kind == "ratio"], {})
    note_end(path, written)


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

    path, written = save("faults", measure_faults(num_kills=num_kills, quick=quick, seed=seed, track=track), out)
    if as_json:
        print_json([dataclasses.asdict(record) for record in written])
    else:
        fields = ("injected", "recovered", "bitwise_equal", "remark")
        rows = [(record.subject, *(record.values[name] for name in fields)) for record in written]
        print_table(("fault", "injected", "recovered", "bitwise equal", "remark"), rows, title="Faults injected")
    note_end(path, written)
