"""``fasternet predict``: what is on a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fasternet.cli._common import note, print_json, print_table, track

if TYPE_CHECKING:
    from fasternet.predict import Prediction


def predict(
    images: Annotated[list[Path], typer.Argument(help="Picture files, and folders of pictures.")],
    model: Annotated[
        str | None,
        typer.Option(help="Network; without a checkpoint its published weights are used, fasternet_t0's by default."),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Run folder, model folder or weights file.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes to print for each picture.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that go through the network at once.")] = 16,
    engine: Annotated[str, typer.Option(help="What runs the network.")] = "eager",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Predict the class of pictures: the likeliest classes with their probabilities.

    A picture that cannot be read is named on standard error; the others are predicted, and the exit status is 1.

    Example: fasternet predict photo.jpg --checkpoint outputs/run
    """
    from fasternet.data.images import ImageError, find_images
    from fasternet.predict import Predictor, load_weights

    paths = find_images(images)
    weights = load_weights(model or (None if checkpoint else "fasternet_t0"), checkpoint)
    predictor = Predictor.from_checkpoint(weights, engine=engine, batch_size=min(batch_size, len(paths)))
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
