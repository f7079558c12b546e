"""``fasternet quickstart``: the whole path on built-in real data, and a report to look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fasternet.cli._common import note, shorten_spinning, track

if TYPE_CHECKING:
    from fasternet.records import Record

MODEL = "fasternet_t0"
REQUIRED_TOP1 = 98.5


def quickstart(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write. [default: outputs/quickstart-TIME]")
    ] = None,
) -> None:
    """Train a FasterNet on handwritten digits, evaluate, optimise, benchmark, and write report.html.

    Takes a few minutes on two cores and needs no network.
    Example: fasternet quickstart
    """
    shorten_spinning()
    from datetime import datetime

    from fasternet.benchmark.networks import measure_networks
    from fasternet.benchmark.operators import measure_operators
    from fasternet.benchmark.results import save_results
    from fasternet.report import create_report

    _check_extras()
    output = output or Path("outputs", f"quickstart-{datetime.now():%Y%m%d-%H%M%S}")
    run, records = output / "digits", output / "benchmark.jsonl"
    note("1/5  train on the digits (scikit-learn's, 1,797 real scans)")
    top1 = _train(run)
    note(f"     top-1 {top1:.2f} % on the validation part")
    note("2/5  optimise for inference, and compare every prediction")
    for record in save_results(records, _optimize(run)):
        values = record.values
        note(
            f"     {values['changed_predictions']} of {values['num_images']} predictions changed, "
            f"largest difference {values['max_relative_difference']:.1e}"
        )
    note("3/5  measure the operators of Table 1")
    _drain(save_results(records, measure_operators(quick=True, track=track)))
    note("4/5  measure FasterNet and its rivals")
    _drain(save_results(records, measure_networks(quick=True, track=track)))
    note("5/5  write the report")
    page = create_report([run, records], output / "report.html")
    if top1 < REQUIRED_TOP1:
        raise ValueError(f"top-1 is {top1:.2f} %, and {REQUIRED_TOP1} % was expected: see {page}")
    print(page)


def _check_extras() -> None:
    """Raise at once what would be missing minutes later."""
    from importlib.util import find_spec

    if missing := [package for package in ("sklearn", "matplotlib") if find_spec(package) is None]:
        raise ModuleNotFoundError(f"quickstart needs {', '.join(missing)}: pip install 'fasternet[quickstart]'")


def _train(run: Path) -> float:
    """Train with the recipe for the digits and return the best checkpoint's top-1."""
    from fasternet.cli._training import show_progress
    from fasternet.records import load_records
    from fasternet.train.classification import train
    from fasternet.train.loop import Hooks
    from fasternet.train.recipes import find_recipe

    with show_progress() as progress:
        train(MODEL, "digits", run, recipe=find_recipe("digits"), hooks=Hooks(progress=progress))
    return float(next(r.values["top1"] for r in load_records(run / "log.jsonl") if r.kind == "evaluation"))


def _optimize(run: Path) -> Iterator[Record]:
    """Compare the trained network with its optimised form on every digit that it was not trained on."""
    import torch

    from fasternet.data.datasets import create_validation_dataset
    from fasternet.data.transforms import create_transform
    from fasternet.deploy import compare_outputs, optimize_for_inference
    from fasternet.environment import create_record
    from fasternet.models import load_checkpoint

    checkpoint = load_checkpoint(run)
    dataset = create_validation_dataset("digits")
    dataset.transform = create_transform(checkpoint.preprocessing, training=False)
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    difference = compare_outputs(optimize_for_inference(checkpoint.model), checkpoint.model, images)
    condition = {"data": "digits", "baseline": MODEL, "precision": "fp32", "engine": "eager"}
    yield create_record("deploy", "difference", f"{MODEL}:optimized", condition=condition, values=difference)


def _drain(records: Iterator[Record]) -> None:
    for _ in records:
        pass
