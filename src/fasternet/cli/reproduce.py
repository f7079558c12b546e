"""``fasternet reproduce``: one table or figure of the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasternet.cli._common import note, print_json, print_table, track
from fasternet.cli._items import describe_items
from fasternet.cli._study import Checkpoint

if TYPE_CHECKING:
    from fasternet.records import Record
    from fasternet.train.table6 import Comparison

reproduce = typer.Typer(help="Tables and figures of the paper.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quick = Annotated[bool, typer.Option("--quick", help="A first answer: fewer blocks, fewer networks.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
BatchSize = Annotated[
    int | None, typer.Option(help="Pictures per call. [default: the paper's, 1 on a CPU and 32 on a GPU]", min=1)
]
Records = Annotated[
    list[Path] | None, typer.Option(help="Use these records and measure nothing; repeatable, files or folders.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the page.")]
Pictures = Annotated[
    str | None, typer.Option("--data", help="Folder of pictures; with a folder per class a network is trained on them.")
]
OUTPUT = Path("outputs/reproduce")

# What is measured: the item, its suites, and what its help says.
MEASURED = {
    "table1": (("operators",), "Measure the operators of Table 1, ten stacked layers on four shapes."),
    "table3": (("networks",), "Measure the networks of Table 3 in eager PyTorch and the runtimes that are ready."),
    "table9": (("forms", "deploy"), "Measure the forms of PConv of Table 9, alone and in FasterNet."),
    "fig1": (("operators",), "Draw Figure 1: the speed of operators over their multiply-adds."),
    "fig2": (("networks",), "Draw Figure 2: speed and latency of networks over their multiply-adds."),
    "fig7": (("networks",), "Draw Figure 7: published top-1 over measured speed, within a range of latency."),
    "fig8": (("networks",), "Draw Figure 8: published top-1 over measured speed, all networks."),
}


@reproduce.command("list")
def list_(json: Json = False) -> None:
    """List all tables and figures: the command, what each needs, and whether it can run on this machine.

    Example: fasternet reproduce list
    """
    import platform

    import torch

    items = describe_items(has_cuda=torch.cuda.is_available(), architecture=platform.machine())
    if json:
        print_json(items)
        return
    rows = [(i["paper"], i["what"], i["command"], ", ".join(i["needs"]), i["runs_here"]) for i in items]
    print_table(("paper", "what", "command", "needs", "runs here"), rows)


@reproduce.command("table4")
def table4(
    size: Annotated[str, typer.Option(help="Height by width of the picture, multiples of 32.")] = "800x1280",
    device: Device = "cpu",
    quick: Quick = False,
    records: Records = None,
    output: Output = OUTPUT,
) -> None:
    """Measure Mask R-CNN on the backbones of Table 4, part by part, in eager PyTorch; AP is quoted from the paper.

    Example: fasternet reproduce table4 --quick --size 320x512
    """
    from fasternet.cli._detection import measure, parse_size

    runs = [] if records else [("detection", measure(None, size=parse_size(size), device=device, quick=quick))]
    _show_item("table4", runs, records, output)


@reproduce.command("table2")
def table2(
    data: Pictures = None, checkpoint: Checkpoint = None, records: Records = None, output: Output = OUTPUT
) -> None:
    """Approximate regular convolutions by PConv + PWConv and others: ``study approximation`` with its defaults.

    Example: fasternet reproduce table2 --data flowers
    """
    from fasternet.cli.study import approximation

    if not records and data is None:
        raise ValueError("table2 needs pictures: name a folder with --data")
    _show_study("table2", approximation, records, output, data=data, checkpoint=checkpoint)


@reproduce.command("fig3")
def fig3(
    picture: Annotated[Path | None, typer.Argument(help="The picture whose maps are drawn.")] = None,
    data: Pictures = None,
    checkpoint: Checkpoint = None,
    records: Records = None,
    output: Output = OUTPUT,
) -> None:
    """Draw the maps of a trained network for a picture, and measure their redundancy: ``study redundancy``.

    Example: fasternet reproduce fig3 photo.jpg --data flowers
    """
    from fasternet.cli.study import redundancy

    if not records and picture is None:
        raise ValueError("fig3 needs a picture: name its file")
    _show_study("fig3", redundancy, records, output, picture=picture, data=data, checkpoint=checkpoint)


@reproduce.command("fig5")
def fig5(records: Records = None, output: Output = OUTPUT) -> None:
    """Draw the effective receptive fields of PConv + PWConv, the T-shaped and the regular convolution.

    Example: fasternet reproduce fig5
    """
    from fasternet.analysis.salience import measure_receptive_field

    _show_item("fig5", [] if records else [("receptive_field", measure_receptive_field())], records, output)


@reproduce.command("fig6")
def fig6(
    data: Pictures = None, checkpoint: Checkpoint = None, records: Records = None, output: Output = OUTPUT
) -> None:
    """Draw where the largest norm of each 3x3 filter of a trained network lies: ``study salience``.

    Example: fasternet reproduce fig6 --checkpoint outputs/my-run
    """
    from fasternet.cli.study import salience

    _show_study("fig6", salience, records, output, data=data, checkpoint=checkpoint)


@reproduce.command("table5")
def table5(
    data: Pictures = None,
    device: Device = "cpu",
    batch_size: BatchSize = None,
    quick: Quick = False,
    records: Records = None,
    output: Output = OUTPUT,
) -> None:
    """Measure the variants of Table 5; with pictures, train small networks of them first: ``study ablation``.

    Example: fasternet reproduce table5 --quick
    """
    files = list(records or ())
    if data is not None and not records:
        from fasternet.cli.study import ablation

        folder = output / "ablation"
        ablation(data, output=folder, resume=(folder / "log.jsonl").is_file())
        files.append(folder / "log.jsonl")
    conditions = {"device": device, "batch_size": batch_size or (1 if device == "cpu" else 32), "quick": quick}
    _show_item("table5", [] if records else [("networks", _measure_ablation(conditions))], files, output)


def _show_study(
    name: str, study: Callable[..., None], records: list[Path] | None, output: Path, **arguments: object
) -> None:
    """Run a study in its folder, from where it stopped if it was; or show records of one."""
    if records:
        _show_item(name, [], records, output)
        return
    folder = output / name
    study(**arguments, output=folder, resume=(folder / "log.jsonl").is_file())


@reproduce.command("table6")
def table6(json: Json = False) -> None:
    """Print the recipes beside Table 6; a cell that differs shows both values. Nothing is trained.

    Example: fasternet reproduce table6
    """
    from fasternet.train.table6 import compare_with_table6

    _show_recipes(compare_with_table6(), 6, "ImageNet", json)


@reproduce.command("table7")
def table7(json: Json = False) -> None:
    """Print the recipes of detection beside Table 7; a cell that differs shows both values. Nothing is trained.

    Example: fasternet reproduce table7
    """
    from fasternet.train.table7 import compare_with_table7

    _show_recipes(compare_with_table7(), 7, "COCO", json)


def _show_recipes(cells: Sequence[Comparison], number: int, data: str, json: bool) -> None:
    if json:
        print_json([dataclasses.asdict(cell) for cell in cells])
        return
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    rows = []
    for start in range(0, len(cells), len(variants)):
        row = cells[start : start + len(variants)]
        values = [_show(c.ours) if c.ours == c.paper else f"{_show(c.ours)} (paper {_show(c.paper)})" for c in row]
        rows.append((row[0].setting.replace("_", " "), *values, row[0].source))
    print_table(("setting", *variants, "source"), rows, title=f"Recipe 'paper' of each variant, beside Table {number}")
    num_equal = sum(cell.ours == cell.paper for cell in cells)
    print(f"{num_equal} of {len(cells)} cells equal the paper's; training on {data} has not been run here")


@reproduce.command("table8")
def table8(records: Records = None, output: Output = OUTPUT) -> None:
    """Count the parameters and multiply-adds of the variants, and hold them against Table 8 to the printed digit.

    Example: fasternet reproduce table8
    """
    differing: list[str] = []
    _show_item("table8", [("networks", _count_variants(differing))], records, output)
    if differing:
        raise ValueError(f"not as Table 8 prints it: {'; '.join(differing)}")
    if not records:
        note("parameters and multiply-adds of all variants equal Table 8 to the printed digit")


@reproduce.command("fig4")
def fig4(records: Records = None, output: Output = OUTPUT) -> None:
    """Draw Figure 4, the architecture, with its sizes; nothing is measured.

    Example: fasternet reproduce fig4
    """
    _show_item("fig4", [("networks", _count_variants([]))], records, output)


def _add_command(name: str, suites: Iterable[str], summary: str) -> None:
    def command(
        device: Device = "cpu",
        batch_size: BatchSize = None,
        quick: Quick = False,
        records: Records = None,
        output: Output = OUTPUT,
    ) -> None:
        conditions = {"device": device, "batch_size": batch_size or (1 if device == "cpu" else 32), "quick": quick}
        runs = [] if records else [(SUITES[suite][0], SUITES[suite][1](conditions)) for suite in suites]
        _show_item(name, runs, records, output)

    command.__doc__ = f"{summary}\n\nExample: fasternet reproduce {name} --quick"
    reproduce.command(name)(command)


def _measure_operators(conditions: dict[str, Any]) -> Iterator[Record]:
    from fasternet.benchmark.operators import measure_operators

    return measure_operators(track=track, **conditions)


def _measure_forms(conditions: dict[str, Any]) -> Iterator[Record]:
    """Measure PConv alone, as chosen and in each form of Table 9."""
    from fasternet.benchmark.operators import IN_PLACE, PCONV, measure_operators
    from fasternet.ops import list_impls

    forms = [PCONV, *(f"{PCONV}:{impl}" for impl in list_impls()), IN_PLACE]
    return measure_operators(forms, track=track, **conditions)


def _measure_networks(conditions: dict[str, Any]) -> Iterator[Record]:
    from fasternet.benchmark.networks import measure_networks
    from fasternet.cli._measured import list_fast_engines

    return measure_networks(engines=list_fast_engines(conditions["device"]), track=track, say=note, **conditions)


def _measure_ablation(conditions: dict[str, Any]) -> Iterator[Record]:
    """Measure the variants of Table 5 and the two FasterNets that are their defaults."""
    from fasternet.benchmark.networks import measure_networks
    from fasternet.benchmark.prepare import ABLATIONS
    from fasternet.cli._measured import list_fast_engines

    networks, engines = ("FasterNet-T0", "FasterNet-T2", *ABLATIONS), list_fast_engines(conditions["device"])
    return measure_networks(networks, engines=engines, track=track, say=note, **conditions)


def _measure_deploy(conditions: dict[str, Any]) -> Iterator[Record]:
    from fasternet.benchmark.deploy import measure_deploy

    return measure_deploy(track=track, **conditions)


# Where the records go, and what measures them.
SUITES: dict[str, tuple[str, Callable[[dict[str, Any]], Iterator[Record]]]] = {
    "operators": ("operators", _measure_operators),
    "forms": ("operators", _measure_forms),
    "networks": ("networks", _measure_networks),
    "deploy": ("deploy", _measure_deploy),
}
for _name, (_suites, _summary) in MEASURED.items():
    _add_command(_name, _suites, _summary)


def _show_item(
    name: str, runs: Iterable[tuple[str, Iterable[Record]]], records: list[Path] | None, output: Path
) -> None:
    """Measure unless there are records, write the page, print it as Markdown, and its path last."""
    from fasternet.cli._measured import note_end, save
    from fasternet.report.page import create_report, render_item

    files = list(records or ())
    for suite, run in runs:
        path, written = save(suite, run, None)
        note_end(path, written)
        files.append(path)
    page = create_report(files, output / f"{name}.html", items=[name])
    print(render_item(name, files))
    print(page)


def _count_variants(differing: list[str]) -> Iterator[Record]:
    """Count each variant; what Table 8 prints otherwise is added to ``differing``.

    The paper counts parameters without batch normalisation, which is folded for inference.
    """
    import torch

    from fasternet.complexity import count_costs
    from fasternet.environment import create_record
    from fasternet.models import create_model
    from fasternet.paper import load_table

    for row in load_table("table8_architecture"):
        with torch.device("meta"):
            model = create_model(f"fasternet_{row['variant'].lower()}")
        costs = count_costs(model)
        counted = {
            "params_m": f"{costs.num_params_without_batch_norm / 1e6:.1f}",
            "macs_g_224": f"{costs.macs / 1e9:.2f}",
        }
        for column, value in counted.items():
            if value != row[column]:
                differing.append(f"{row['variant']} {column} {value}, printed {row[column]}")
        values = {"num_params": costs.num_params, "macs": costs.macs, "memory_accesses": costs.memory_accesses}
        condition = {"input_size": 224, "batch_size": 1}
        yield create_record("networks", "cost", f"FasterNet-{row['variant']}", condition=condition, values=values)


def _show(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"
