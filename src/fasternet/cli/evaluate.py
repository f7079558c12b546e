"""``fasternet eval``: how many pictures a network recognises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasternet.cli._common import print_json, print_table, track

if TYPE_CHECKING:
    from fasternet.models.checkpoint import Checkpoint
    from fasternet.train.evaluate import Evaluation


def evaluate(
    name: Annotated[str | None, typer.Argument(help="Network; needed for files that do not say which.")] = None,
    *,
    data: Annotated[str, typer.Option(help="Folder of pictures, or digits; its validation pictures count.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Run folder, model folder or weights file. [default: the published weights]")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="Optimise for inference with this engine first. [default: as trained]")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that load pictures.")] = 2,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. [default: CUDA where there is one]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Evaluate a network: top-1 and top-5 in percent, loss, and each class.

    The shorter side of a picture is resized to the input size divided by the crop ratio (248 for 224), bicubic, and
    its centre is cropped.

    Example: fasternet eval --data digits --checkpoint outputs/run
    """
    from fasternet.predict import load_weights

    weights = load_weights(name, checkpoint)
    result = _evaluate(weights, data, engine, batch_size, num_workers, device)
    preprocessing = weights.preprocessing
    document = {
        "model": weights.name,
        "data": data,
        "engine": engine,
        "input_size": preprocessing.input_size,
        "crop_ratio": preprocessing.crop_ratio,
        **result.values(),
    }
    if json:
        print_json(document)
    else:
        _print_tables(document)


def _evaluate(
    weights: Checkpoint, data: str, engine: str | None, batch_size: int, num_workers: int, device: str | None
) -> Evaluation:
    from fasternet.data.datasets import create_validation_dataset
    from fasternet.data.loaders import create_loader
    from fasternet.data.transforms import create_transform
    from fasternet.deploy import optimize_for_inference
    from fasternet.train.device import select_device
    from fasternet.train.evaluate import evaluate

    target = select_device(device)
    dataset = create_validation_dataset(data)
    _check_classes(weights, dataset.class_names, data)
    dataset.transform = create_transform(weights.preprocessing, training=False)
    model = weights.model.to(target).eval()
    network = model if engine is None else optimize_for_inference(model, batch_size=batch_size, engine=engine)
    loader = create_loader(dataset, batch_size, training=False, num_workers=num_workers)
    batches = track(loader, len(loader), "evaluating")
    return evaluate(lambda images: network(images.to(target)), batches, class_names=dataset.class_names)


def _check_classes(weights: Checkpoint, class_names: Sequence[str], data: str) -> None:
    """Raise where the network was trained on other classes than the data has."""
    num_classes = weights.model.config.num_classes
    if num_classes != len(class_names):
        raise ValueError(f"the checkpoint has {num_classes} classes, data {data} has {len(class_names)}")
    if weights.class_names is not None and weights.class_names != tuple(class_names):
        pairs = zip(weights.class_names, class_names, strict=True)
        number, (trained, found) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(
            f"the checkpoint was trained on other classes than data {data} has: "
            f"class {number} is {trained!r} there and {found!r} here"
        )


def _print_tables(document: dict[str, Any]) -> None:
    print_table(
        ("class", "pictures", "top-1 %"),
        [(row["name"], row["num_images"], row["top1"]) for row in document["per_class"]],
    )
    columns = ("model", "data", "input size", "crop ratio", "pictures", "top-1 %", "top-5 %", "loss")
    fields = ("model", "data", "input_size", "crop_ratio", "num_images", "top1", "top5", "loss")
    print_table(columns, [[document[field] for field in fields]])
