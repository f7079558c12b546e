"""``fasternet predict``: what is on a picture, or on a million."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fasternet.cli._common import note, note_choice, print_json, print_table, track

if TYPE_CHECKING:
    from fasternet.models.checkpoint import Checkpoint
    from fasternet.predict import Prediction, Predictor
    from fasternet.train.distributed import World


LONGEST_WAIT = timedelta(days=7)  # of a process that is done for one that is not


def predict(
    images: Annotated[
        list[str], typer.Argument(help="Picture files, and folders of pictures; with --output also packed shards.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Network; without a checkpoint its published weights are used, fasternet_t0's by default."),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Run folder, model folder or weights file.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes to print for each picture.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that go through the network at once.")] = 16,
    engine: Annotated[
        str,
        typer.Option(
            help="What runs the network: eager, compile, onnxruntime, openvino, cpu or auto; see fasternet env."
        ),
    ] = "eager",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or int8 (for its speed alone).")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. [default: CUDA where there is one]")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write a line per picture to this .jsonl or .csv file instead of printing.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run with this output stopped.")] = False,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that load pictures, with --output.")] = 2,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Predict the class of pictures: the likeliest classes with their probabilities.

    A picture that cannot be read is named on standard error; the others are predicted, and the exit status is 1. With
    --output its line holds the error, and the status is 0; torchrun shares the pictures out to several processes.

    Example: fasternet predict photo.jpg --checkpoint outputs/run
    """
    from fasternet.data.images import find_images
    from fasternet.deploy import SPEED_ONLY
    from fasternet.predict import Predictor, load_weights
    from fasternet.train.device import select_device
    from fasternet.train.distributed import join_world

    if output is None and resume:
        raise ValueError("resume needs output, the file to go on with")
    target = select_device(device)
    with join_world(timeout=LONGEST_WAIT) as world:
        if output is None and world.size > 1:
            raise ValueError(f"{world.size} processes cannot print: give output")
        paths = find_images(map(Path, images)) if output is None else []
        weights = load_weights(model or (None if checkpoint else "fasternet_t0"), checkpoint)
        size = min(batch_size, len(paths)) if paths else batch_size
        predictor = Predictor.from_checkpoint(
            weights, engine=engine, precision=precision, batch_size=size, device=target
        )
        if predictor.runtime is not None and world.is_main:
            note_choice(predictor.runtime)
        if precision == "int8" and world.is_main:
            note(f"precision int8: {SPEED_ONLY}")
        if output is None:
            _print_predictions(weights, predictor, paths, top_k, json)
        else:
            _write_predictions(predictor, images, output, top_k, num_workers, resume, world, json)


def _print_predictions(
    weights: Checkpoint, predictor: Predictor, paths: Sequence[Path], top_k: int, json: bool
) -> None:
    from fasternet.data.images import ImageError

    errors: list[ImageError] = []
    stream = predictor.stream(paths, top_k=top_k, on_error=errors.append)
    predictions = list(track(stream, len(paths), "predicting"))
    if json:
        print_json({"model": weights.name, "predictions": _describe(predictions), "errors": [*map(str, errors)]})
    elif predictions:
        print_table(("picture", "label", "probability"), _list_rows(predictions))
    for error in errors:
        note(f"error: {error}")
    if errors:
        raise typer.Exit(1)


def _write_predictions(
    predictor: Predictor,
    images: Sequence[str],
    output: Path,
    top_k: int,
    num_workers: int,
    resume: bool,
    world: World,
    json: bool,
) -> None:
    from fasternet.predict import predict_to_file

    start, done = time.monotonic(), 0

    def report(num_images: int) -> None:
        nonlocal done
        done += num_images
        if sys.stderr.isatty() and world.is_main:
            speed = done / (time.monotonic() - start)
            sys.stderr.write(f"\r{done:,} pictures of this process, {speed:,.0f} a second ")

    try:
        predicted, unreadable = predict_to_file(
            predictor,
            images,
            output,
            top_k=top_k,
            num_workers=num_workers,
            resume=resume,
            world=world,
            on_batch=report,
        )
    except KeyboardInterrupt:
        raise InterruptedError(f"stopped after {done:,} pictures; --resume goes on there") from None
    if not world.is_main:
        return
    note(f"{predicted:,} pictures predicted, {unreadable:,} of them could not be read")
    if json:
        print_json({"output": str(output), "num_images": predicted, "num_unreadable": unreadable})
    else:
        typer.echo(output)


def _describe(predictions: Sequence[Prediction]) -> list[dict[str, object]]:
    return [
        {
            "path": str(prediction.path),
            "top": [{"label": label, "probability": probability} for label, probability in prediction.top],
        }
        for prediction in predictions
    ]


def _list_rows(predictions: Sequence[Prediction]) -> Iterator[tuple[str, str, float]]:
    """Yield a row per class; a picture is named in its first."""
    for prediction in predictions:
        for number, (label, probability) in enumerate(prediction.top):
            yield "" if number else str(prediction.path), label, round(probability, 4)
