"""``fasternet pick``: which network, engine and precision meet a latency budget on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasternet.cli._common import note, print_json, print_table, refuse_auto, shorten_spinning, track

if TYPE_CHECKING:
    from fasternet.benchmark.pick import Choice

NUM_NEAREST = 3


def pick(
    budget_ms: Annotated[float, typer.Option(help="Milliseconds that a call may take.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    engine: Annotated[
        str | None, typer.Option(help="eager, compile, onnxruntime, openvino or cpu. [default: whichever is fastest]")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16, or int8, which has a speed and no accuracy. [default: no int8]")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures per call.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="Threads on the CPU.", min=1)] = 1,
    min_top1: Annotated[float | None, typer.Option(help="Published ImageNet top-1 in percent, at least.")] = None,
    top: Annotated[int, typer.Option(help="Rows.", min=1)] = 5,
    every: Annotated[bool, typer.Option("--all", help="Each engine of a network, not its fastest alone.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Measure, whatever the records hold.")] = False,
    records: Annotated[
        list[Path] | None,
        typer.Option(help="Record file or folder; repeatable. [default: ./results, else FASTERNET_RESULTS]"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Measure fewer networks, in fewer blocks.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Measure the first row afresh: is the promise kept?")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Rank the networks whose typical call fits a latency budget on this machine, the most accurate first.

    Reads this machine's records; where there are none under these conditions, it measures. Accuracies are quoted.

    Example: fasternet pick --budget-ms 20 --min-top1 75
    """
    shorten_spinning()
    refuse_auto([engine] if engine else None)
    from fasternet.benchmark.pick import filter_accurate, find_nearest, load_choices, rank
    from fasternet.benchmark.results import check_arguments

    check_arguments(batch_size=batch_size, device=device)
    if budget_ms <= 0:
        raise ValueError(f"budget_ms must be more than 0, not {budget_ms:g}")
    setting: dict[str, Any] = {"device": device, "batch_size": batch_size, "threads": threads}
    _check_engine(engine, precision, device)
    if measure and records:
        raise ValueError("give measure or records, not both")
    files = [] if measure else _find_files(records)
    choices = load_choices(files, **setting, engine=engine, precision=precision)
    if not choices:
        if records:
            named = ", ".join(map(str, records))
            raise ValueError(f"records {named} hold no latency of this machine under {_describe(setting)}")
        choices = _measure(setting, engine, precision, quick)
    elif engine is None:
        note(f"{len(choices)} latencies of this machine on record; --measure takes them afresh")
    if not choices:
        raise ValueError(f"nothing could be measured under {_describe(setting)}")
    if not filter_accurate(choices, min_top1):
        highest = max((c.top1 for c in choices if c.top1 is not None), default=None)
        known = "none is published" if highest is None else f"the highest is {highest:g}"
        raise ValueError(f"min_top1 {min_top1:g} is met by none of the {len(choices)} on record: {known}")
    fitting = rank(choices, budget_ms, min_top1=min_top1, every=every)
    if not fitting:
        nearest = find_nearest(choices, min_top1=min_top1)[:NUM_NEAREST]
        _tell_missed(nearest, budget_ms, setting, as_json)
    _answer(fitting, top, budget_ms, setting, _check(fitting[0], quick) if check else None, as_json)


def _find_files(records: list[Path] | None) -> list[Path]:
    from fasternet.benchmark.pick import find_record_files

    return find_record_files(records or ())


def _check_engine(engine: str | None, precision: str | None, device: str) -> None:
    """Refuse names that no engine and no precision has, before anything is read or measured."""
    from fasternet.deploy import explain_engine

    explain_engine(engine or "eager", precision or "fp32", device.partition(":")[0])


def _measure(setting: dict[str, Any], engine: str | None, precision: str | None, quick: bool) -> list[Choice]:
    """Measure in the engines that are ready, as ``bench networks`` does, and keep the records."""
    from fasternet.benchmark.networks import measure_networks
    from fasternet.benchmark.pick import find_choices
    from fasternet.cli._measured import list_fast_engines, note_end, save

    precision_ = precision or "fp32"
    device = setting["device"]
    engines = [engine] if engine else list_fast_engines(device)
    note(
        f"measuring under {_describe(setting)}, {precision_}, in {', '.join(engines)}"
        + ("" if quick else ": up to an hour; --quick gives a first answer")
    )
    run = measure_networks(engines=engines, precisions=[precision_], quick=quick, track=track, say=note, **setting)
    path, written = save("networks", run, None)
    note_end(path, written)
    return find_choices(written, setting, engine=engine, precision=precision)


def _check(choice: Choice, quick: bool) -> Choice:
    """Build and measure a choice afresh.

    Raises:
        ValueError: It could not be measured.
    """
    from fasternet.benchmark.networks import measure_networks
    from fasternet.benchmark.pick import find_choices
    from fasternet.cli._measured import note_end, save

    setting: dict[str, Any] = {name: getattr(choice, name) for name in ("device", "batch_size", "threads")}
    wanted: dict[str, Any] = {"engines": [choice.engine], "precisions": [choice.precision], "quick": quick}
    path, written = save("networks", measure_networks([choice.network], track=track, **setting, **wanted), None)
    note_end(path, written)
    fresh = find_choices(written, setting, engine=choice.engine, precision=choice.precision)
    if not fresh:
        errors = [record.values["error"] for record in written if "error" in record.values]
        raise ValueError(f"{choice.network} in {choice.engine} could not be measured afresh: {'; '.join(errors)}")
    return fresh[0]


def _answer(
    fitting: Sequence[Choice], top: int, budget_ms: float, setting: dict[str, Any], fresh: Choice | None, as_json: bool
) -> None:
    """Print the ranking, and what a fresh measurement says of its first row; exit status 1 where that broke."""
    from fasternet.benchmark.pick import describe_python, describe_shell, overlap

    shown = fitting[:top]
    held = fresh is None or fresh.high_ms <= budget_ms
    if as_json:
        fields = {"fits": [_to_json(choice) for choice in shown]}
        first_two = overlap(*shown[:2]) if len(shown) > 1 else None
        checked = {"check": None if fresh is None else {**_to_json(fresh), "held": held}}
        print_json({**_describe_question(budget_ms, setting), **fields, "first_two_overlap": first_two, **checked})
    else:
        title = f"Within {budget_ms:g} ms on this machine, {_describe(setting)}: {len(fitting)}, most accurate first"
        columns = ("", "network", "engine", "precision", "ms", "95 % interval", "top-1 %", "published in", "params M")
        rows = [(n, *_cells(c)) for n, c in enumerate(shown, start=1)]
        print_table((*columns, "p90 ms", "remark"), rows, title=title)
        if len(shown) > 1:
            print(_compare(*shown[:2]))
        print("Published top-1 is quoted, not measured; the library's own weights may differ from the paper's.\n")
        for number, choice in enumerate(shown, start=1):
            print(f"{number}  {describe_python(choice)}")
            if shell := describe_shell(choice):
                print(f"   {shell}")
        if fresh:
            verdict = "the promise is kept" if held else "the promise is broken"
            print(f"\nMeasured afresh, {fresh.network}: {_show_interval(fresh)}, budget {budget_ms:g} ms: {verdict}")
    if fresh and not held:
        over = f"{_show_interval(fresh)} reaches beyond {budget_ms:g} ms"
        raise ValueError(f"measured afresh, {fresh.network} in {fresh.engine} misses the budget: {over}")


def _tell_missed(nearest: Sequence[Choice], budget_ms: float, setting: dict[str, Any], as_json: bool) -> None:
    """Print what misses the budget least, and fail."""
    if as_json:
        missed = [{**_to_json(choice), "times_budget": choice.high_ms / budget_ms} for choice in nearest]
        print_json({**_describe_question(budget_ms, setting), "fits": [], "nearest": missed})
    else:
        columns = ("nearest", "engine", "precision", "ms", "95 % interval", "top-1 %", "over by ms", "times the budget")
        rows = [(*_cells(c)[:6], c.high_ms - budget_ms, round(c.high_ms / budget_ms, 2)) for c in nearest]
        print_table(columns, rows, title=f"Nothing fits {budget_ms:g} ms on this machine, {_describe(setting)}")
    best = nearest[0]
    raise ValueError(
        f"nothing fits {budget_ms:g} ms: the nearest is {best.network} in {best.engine}, whose {best.high_ms:.3g} ms "
        f"are {best.high_ms / budget_ms:.2f} times the budget"
    )


def _compare(first: Choice, second: Choice) -> str:
    from fasternet.benchmark.pick import overlap

    if overlap(first, second):
        return "In speed the first two are not distinguishable: their intervals overlap."
    faster, slower = sorted((first, second), key=lambda choice: choice.latency_ms)
    times = slower.latency_ms / faster.latency_ms
    return f"Of the first two, {faster.network} is faster, {times:.2f} times, and their intervals do not overlap."


def _cells(choice: Choice) -> tuple[object, ...]:
    top1 = "-" if choice.top1 is None else f"{choice.top1:g}"
    top1 = top1 if choice.precision == "fp32" or choice.top1 is None else f"fp32: {top1}"
    params = None if choice.num_params is None else choice.num_params / 1e6
    interval = f"{choice.low_ms:.2f} to {choice.high_ms:.2f}"
    names = (choice.network, choice.engine, choice.precision, choice.latency_ms, interval, top1, choice.source)
    return (*names, params, choice.p90_ms, choice.remark)


def _show_interval(choice: Choice) -> str:
    return f"{choice.latency_ms:.2f} ms ({choice.low_ms:.2f} to {choice.high_ms:.2f})"


def _describe(setting: dict[str, Any]) -> str:
    return f"{setting['device']}, batch {setting['batch_size']}, threads {setting['threads']}"


def _describe_question(budget_ms: float, setting: dict[str, Any]) -> dict[str, Any]:
    from fasternet.environment import describe_machine

    return {"machine": describe_machine().id, "budget_ms": budget_ms, **setting}


def _to_json(choice: Choice) -> dict[str, Any]:
    from fasternet.benchmark.pick import describe_python, describe_shell

    lines = {"python": describe_python(choice), "shell": describe_shell(choice)}
    return {**dataclasses.asdict(choice), "remark": choice.remark, **lines}
