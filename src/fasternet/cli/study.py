"""``fasternet study``: what the paper claims of PConv, measured on networks and pictures at hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasternet.cli._common import note, shorten_spinning, track
from fasternet.cli._measured import split
from fasternet.cli._study import (
    RESNET18,
    RESNET50,
    Checkpoint,
    Data,
    Device,
    InputSize,
    Json,
    Model,
    NumImages,
    Output,
    Resume,
    Seeds,
    check_folder,
    check_pictures,
    draw_pictures,
    load_network,
    name_data,
    open_study,
    run_study,
)

if TYPE_CHECKING:
    from fasternet.records import Record

study = typer.Typer(help="Studies: approximation, redundancy, salience, ablation.", no_args_is_help=True)

Layers = Annotated[str | None, typer.Option("--layer", help="Modules of the network, separated by commas.")]
OptionalData = Annotated[str | None, typer.Option("--data", help="Folder of pictures that the numbers are taken over.")]


@study.command("approximation")
def approximation(
    data: Data,
    model: Model = None,
    checkpoint: Checkpoint = None,
    layers: Layers = None,
    operators: Annotated[str | None, typer.Option(help="Separated by commas. [default: all]")] = None,
    target: Annotated[str, typer.Option(help="What is met: the map before (conv) or after BN (norm).")] = "conv",
    normalize: Annotated[str, typer.Option(help="Of the maps: none, layer (one scale) or channel.")] = "layer",
    seeds: Seeds = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="At most. [default: the study's]")] = None,
    num_images: NumImages = 3000,
    input_size: InputSize = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load pictures.")] = 2,
    device: Device = None,
    output: Output = None,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Approximate regular convolutions of a trained network by PConv + PWConv and others, as in Table 2.

    The maps before and after the first 3x3 convolution with stride 1 of each stage are the data.

    Example: fasternet study approximation --data flowers --seeds 3
    """
    shorten_spinning()
    from fasternet.analysis.approximation import check_options, measure_approximation

    folder, names = open_study("approximation", output, resume=resume), _split_layers(layers)
    pictures = draw_pictures(data, num_images)
    check_options(len(pictures), split(operators), target=target, normalize=normalize)
    check_pictures(pictures)
    options: dict[str, Any] = {} if epochs is None else {"epochs": epochs}

    def measure(known: list[Record]) -> Iterator[Record]:
        return measure_approximation(
            load_network(model, RESNET50, checkpoint, data, device),
            pictures,
            data=name_data(data),
            layers=names,
            operators=split(operators),
            target=target,  # type: ignore[arg-type]
            normalize=normalize,  # type: ignore[arg-type]
            seeds=range(seeds),
            input_size=input_size,
            num_workers=workers,
            known=known,
            track=track,
            say=note,
            **options,
        )

    run_study(folder, ["table2"], measure, as_json=json)


@study.command("redundancy")
def redundancy(
    picture: Annotated[Path, typer.Argument(help="The picture whose maps are drawn.")],
    model: Model = None,
    checkpoint: Checkpoint = None,
    layers: Layers = None,
    data: OptionalData = None,
    num_images: NumImages = 256,
    input_size: InputSize = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load pictures.")] = 0,
    device: Device = None,
    output: Output = None,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Draw the maps of a network's layers for a picture, as in Figure 3, and measure how redundant they are.

    Example: fasternet study redundancy photo.jpg --model ResNet50 --data photos
    """
    shorten_spinning()
    from fasternet.analysis.redundancy import measure_redundancy

    folder, names = open_study("redundancy", output, resume=resume), _split_layers(layers)
    pictures = [picture] if data is None else draw_pictures(data, num_images)
    check_pictures([picture])

    def measure(known: list[Record]) -> Iterator[Record]:
        return measure_redundancy(
            load_network(model, RESNET50, checkpoint, data, device),
            pictures,
            folder,
            data=picture.name if data is None else name_data(data),
            layers=names,
            picture=picture,
            input_size=input_size,
            num_workers=workers,
            known=known,
            track=track,
        )

    run_study(folder, ["fig3"], measure, as_json=json)


@study.command("salience")
def salience(
    model: Model = None,
    checkpoint: Checkpoint = None,
    data: OptionalData = None,
    output: Output = None,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Find the position of each 3x3 filter with the largest norm, as in Figure 6; and the fields of Figure 5.

    Example: fasternet study salience --checkpoint outputs/my-run
    """
    shorten_spinning()
    from fasternet.analysis.salience import measure_receptive_field, measure_salience

    folder = open_study("salience", output, resume=resume)
    if data is not None:
        check_folder(data)

    def measure(known: list[Record]) -> Iterator[Record]:
        reference = load_network(model, RESNET18, checkpoint, data)
        done = [(record.suite, record.subject, record.condition) for record in known]
        for record in itertools.chain(measure_salience(reference), measure_receptive_field()):
            if (record.suite, record.subject, record.condition) not in done:
                yield record

    run_study(folder, ["fig6", "fig5"], measure, as_json=json)


@study.command("ablation")
def ablation(
    data: Annotated[str, typer.Option(help="Folder of pictures with a folder per class.")],
    size: Annotated[str, typer.Option(help="small (width 16, 64 px) or full (T0, 224 px).")] = "small",
    variants: Annotated[str | None, typer.Option(help="Separated by commas. [default: all]")] = None,
    seeds: Seeds = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each run. [default: by the size]")] = None,
    num_train: Annotated[int | None, typer.Option(min=1, help="Training pictures. [default: by the size]")] = None,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Measure the latencies too, also of full.")
    ] = True,
    device: Device = None,
    output: Output = None,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Train and time the variants of Table 5, and those that the paper leaves out, on a small set of pictures.

    Example: fasternet study ablation --data cifar10 --seeds 3
    """
    shorten_spinning()
    from fasternet.analysis.ablation import measure_ablation
    from fasternet.analysis.ablation_latency import measure_ablation_latency
    from fasternet.data.datasets import create_datasets

    folder = open_study("ablation", output, resume=resume)
    num_classes = len(create_datasets(data).class_names)
    shared: dict[str, Any] = {"variants": split(variants), "track": track}
    training: dict[str, Any] = {"size": size, "epochs": epochs, "num_train": num_train, "seeds": range(seeds)}
    training["device"] = device

    def measure(known: list[Record]) -> Iterator[Record]:
        yield from measure_ablation(data, data=name_data(data), known=known, say=note, **training, **shared)
        # Latencies need no training: those of T0 say more, and come along.
        for timed in dict.fromkeys((size, "full")) if latency else ():
            note(f"latencies at size {timed}")
            yield from measure_ablation_latency(size=timed, num_classes=num_classes, known=known, **shared)

    run_study(folder, ["ablation"], measure, as_json=json)


def _split_layers(layers: str | None) -> list[str] | None:
    names = split(layers)
    if names is not None and not all(names):
        raise ValueError(f"--layer must be names of modules, separated by commas, got {layers!r}")
    return names
