"""``fasternet eval``: how many pictures a network recognises."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasternet.cli._common import note, note_choice, print_json, print_table, track

if TYPE_CHECKING:
    from torch import Tensor

    from fasternet.data.imagenet import EvaluationData
    from fasternet.models.checkpoint import Checkpoint, Preprocessing
    from fasternet.train.distributed import World
    from fasternet.train.evaluate import Evaluation

MAX_CLASSES = 100  # that are printed one by one
NUM_WORST = 20
NUM_NAMED = 10  # unreadable pictures


def evaluate(
    name: Annotated[str | None, typer.Argument(help="Network; needed for files that do not say which.")] = None,
    *,
    data: Annotated[
        str, typer.Option(help="Folder of pictures, packed shards, hf:NAME or digits; its validation pictures count.")
    ],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Run folder, model folder or weights file. [default: the published weights]")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="File of 'NAME LABEL' lines for a flat folder, or real: ImageNet's reassessed labels."),
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Pixels of the crop. [default: the checkpoint's]")] = None,
    crop: Annotated[
        float | None, typer.Option(help="Crop divided by the resized shorter side. [default: the checkpoint's]")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Optimise first, with eager, compile, onnxruntime, openvino, cpu or auto. [default: as trained]"
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the engine: fp32, bf16 or int8 (for its speed alone).")] = "fp32",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once, in each process.")] = 32,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that load pictures.")] = 2,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. [default: CUDA where there is one]")] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out pictures that cannot be read, and name them.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Evaluate a network: top-1 and top-5 in percent, loss, calibration, and each class.

    The paper's protocol: the shorter side of a picture is resized to 248, bicubic, and the centre of 224 is cropped.
    A checkpoint may ask for another one, and so may --size and --crop; the output says which it was.

    Example: fasternet eval --data digits --checkpoint outputs/run
    """
    from fasternet.data.imagenet import open_evaluation_data
    from fasternet.deploy import SPEED_ONLY
    from fasternet.predict import load_weights
    from fasternet.train.device import select_device
    from fasternet.train.distributed import join_world

    if engine is None and precision != "fp32":
        raise ValueError(f"precision={precision} needs an engine: without one the network is evaluated as trained")
    weights = load_weights(name, checkpoint)
    preprocessing = _override(weights.preprocessing, size, crop)
    pictures = open_evaluation_data(
        data, class_names=weights.class_names, num_classes=weights.num_classes, labels=labels
    )
    target = select_device(device)
    with join_world(target) as world:
        result, unreadable, ran = _evaluate(
            weights,
            pictures,
            preprocessing,
            world,
            {
                "engine": engine,
                "precision": precision,
                "batch_size": batch_size,
                "num_workers": num_workers,
                "device": target,
            },
            skip_unreadable,
        )
    if not world.is_main:
        return
    document = {
        "model": weights.name,
        "data": data,
        "labels": labels,
        "engine": ran,
        "precision": precision,
        "input_size": preprocessing.input_size,
        "crop_ratio": preprocessing.crop_ratio,
        "protocol": describe_protocol(preprocessing),
        "remarks": [*pictures.remarks, *([f"precision int8: {SPEED_ONLY}"] if precision == "int8" else [])],
        "num_unreadable": len(unreadable),
        "unreadable": unreadable,
        **result.values(),
    }
    if json:
        print_json(document)
    else:
        _print_tables(document)


def describe_protocol(preprocessing: Preprocessing) -> str:
    """Return what evaluation does to a picture, in words."""
    size, ratio = preprocessing.input_size, preprocessing.crop_ratio
    resized = math.floor(size / ratio)
    words = f"shorter side to {resized} ({preprocessing.interpolation}), centre crop of {size}, ratio {ratio:g}"
    is_paper = (size, ratio, preprocessing.interpolation) == (224, 0.9, "bicubic")
    return f"{words}: the paper's protocol" if is_paper else words


def _override(preprocessing: Preprocessing, size: int | None, crop: float | None) -> Preprocessing:
    if crop is not None and not 0.05 <= crop <= 1:
        raise ValueError(f"crop={crop:g} must be between 0.05 and 1: the crop divided by the resized shorter side")
    return dataclasses.replace(
        preprocessing, input_size=size or preprocessing.input_size, crop_ratio=crop or preprocessing.crop_ratio
    )


def _evaluate(
    weights: Checkpoint,
    pictures: EvaluationData,
    preprocessing: Preprocessing,
    world: World,
    options: dict[str, Any],
    skip_unreadable: bool,
) -> tuple[Evaluation, list[str], str | None]:
    """Evaluate this process's share; return the result and the errors of all processes, and the engine that ran."""
    from fasternet.data.loaders import create_loader
    from fasternet.data.transforms import create_transform
    from fasternet.predict import create_inference_model
    from fasternet.train.distributed import gather
    from fasternet.train.evaluate import evaluate

    errors: list[str] = []
    dataset, batch_size = pictures.dataset, options["batch_size"]
    dataset.transform = create_transform(preprocessing, training=False)
    network: Callable[[Tensor], Tensor]
    ran: str | None = None
    if options["engine"] is None:
        network = weights.model.to(options["device"]).eval()
    else:
        network = runtime = create_inference_model(
            dataclasses.replace(weights, preprocessing=preprocessing),
            batch_size=batch_size,
            engine=options["engine"],
            precision=options["precision"],
            device=options["device"],
        )
        ran = runtime.engine
        if world.is_main:
            note_choice(runtime)
    loader = create_loader(
        dataset,
        batch_size,
        num_workers=options["num_workers"],
        rank=world.rank,
        world_size=world.size,
        on_error=(lambda error: errors.append(str(error))) if skip_unreadable else None,
    )
    batches = track(loader, len(loader), "evaluating") if world.is_main else loader
    result = evaluate(
        lambda images: pictures.select_logits(network(images.to(options["device"]))),
        pictures.label(batches),
        class_names=pictures.class_names,
        world=world,
    )
    return result, sorted(error for share in gather(world, errors) for error in share), ran


def _print_tables(document: dict[str, Any]) -> None:
    rows: Sequence[dict[str, Any]] = document["per_class"]
    if len(rows) > MAX_CLASSES:
        typer.echo(f"the {NUM_WORST} worst of {len(rows)} classes (--json lists all)")
        rows = sorted((row for row in rows if row["num_images"]), key=lambda row: row["top1"])[:NUM_WORST]
    print_table(("class", "pictures", "top-1 %"), [(row["name"], row["num_images"], row["top1"]) for row in rows])
    columns = ("model", "data", "pictures", "top-1 %", "top-5 %", "loss", "ECE")
    fields = ("model", "data", "num_images", "top1", "top5", "loss", "ece")
    shown = [pair for pair in zip(columns, fields, strict=True) if pair[1] != "top5" or len(document["per_class"]) > 5]
    print_table([column for column, _ in shown], [[document[field] for _, field in shown]])
    typer.echo("\n".join([document["protocol"], *document["remarks"]]))
    if errors := document["unreadable"]:
        more = [f"... and {len(errors) - NUM_NAMED} more"] if len(errors) > NUM_NAMED else []
        note("\n".join([f"left out, as they cannot be read: {len(errors)}", *errors[:NUM_NAMED], *more]))
