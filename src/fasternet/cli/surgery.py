"""``fasternet surgery``: PConv in somebody else's network, with what it costs before and after."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasternet.cli._common import note, print_json, shorten_spinning, track

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fasternet.models import Checkpoint
    from fasternet.models.surgery import SurgeryReport
    from fasternet.records import Record


def surgery(
    name: Annotated[
        str,
        typer.Argument(help="A rival's name, one of timm's, or FILE.py:FUNCTION, which returns a network of your own."),
    ],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Its trained weights: a model folder, a run folder or a file.")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Its published weights.")] = False,
    select: Annotated[
        str, typer.Option(help="regular, depthwise, all, or a regular expression that names of convolutions match.")
    ] = "regular",
    kind: Annotated[
        str, typer.Option(help="pconv (PConv + PWConv), or pconv_alone before a pointwise convolution.")
    ] = "pconv",
    match: Annotated[str, typer.Option(help="Widen to equal macs or params, or none.")] = "none",
    init: Annotated[
        str, typer.Option(help="approximate (in closed form, from the weights) or random.")
    ] = "approximate",
    partial_ratio: Annotated[float, typer.Option(help="r, the share of the channels that is convolved.")] = 0.25,
    data: Annotated[
        str | None, typer.Option(help="Folder of pictures: approximate on their maps, not on the weights alone.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Pictures of --data that are used, drawn by lot.")] = 256,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Of a network without weights. [default: 1000]")
    ] = None,
    input_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the pictures. [default: the network's own]")
    ] = None,
    input_channels: Annotated[int, typer.Option(min=1, help="Channels of the input of FILE.py:FUNCTION.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of the latencies.")] = 1,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Measure before and after.")] = True,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the new network here, as a model folder.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Add the record to this file (*.jsonl).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Replace convolutions of a network by PConv + PWConv; print what was replaced, why others were not, and the costs.

    The folder of --output is taken by ``train --checkpoint``, ``eval`` and ``predict`` like any other.

    Example: fasternet surgery resnet18 --input-size 64 --no-latency
    """
    shorten_spinning()
    import dataclasses

    from fasternet.cli._study import name_data
    from fasternet.models.surgery import replace_convs

    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already; choose another output")
    if num_classes is not None and (checkpoint is not None or pretrained or ".py:" in name):
        raise ValueError(f"num_classes={num_classes} is for a network without weights: {name} brings its classes")
    if own := re.fullmatch(r"(.+\.py):(\w+)", name):
        if checkpoint is not None or pretrained or output is not None or data is not None:
            raise ValueError(f"{name} comes as it is: use replace_convs in Python for weights, pictures and saving")
        original = _run_file(Path(own[1]), own[2])
    else:
        original = _load(name, checkpoint, pretrained, num_classes or 1000)
    size = input_size or original.preprocessing.input_size
    preprocessing = dataclasses.replace(original.preprocessing, input_size=size)
    shape = (1, input_channels if own else 3, size, size)
    images = None if data is None else _load_images(data, num_images, preprocessing)
    arguments: dict[str, Any] = {"kind": kind, "match": match, "init": init, "partial_ratio": partial_ratio}
    model, report = replace_convs(
        original.model,
        select,
        **arguments,
        images=images,
        input_shape=shape,
        measure=latency,
        threads=threads,
        prepare=lambda network: _fold(network, shape),
        track=track,
    )
    weights = "published" if pretrained else checkpoint.resolve().name if checkpoint else "random"
    condition = {"model": original.name, "weights": weights, "init": init, "input_size": size, "threads": threads}
    if data is not None and images is not None:
        condition |= {"data": name_data(data), "num_images": len(images)}
    record = create_surgery_record(condition, report)
    if out is not None:
        from fasternet.benchmark.results import save_results

        list(save_results(out, [record]))
    if json:
        print_json(dataclasses.asdict(record))
    else:
        print(report)
    if output is not None:
        _save(output, dataclasses.replace(original, preprocessing=preprocessing), model, report)
        (note if json else print)(str(output))


def _load(name: str, checkpoint: Path | None, pretrained: bool, num_classes: int) -> Checkpoint:
    from fasternet.models import Checkpoint
    from fasternet.rivals import create_network, is_fasternet, load_network, load_rival, resolve_network

    if is_fasternet(name):
        raise ValueError(f"{name} is built on PConv already; name another network")
    if checkpoint is not None and pretrained:
        raise ValueError("give --checkpoint or --pretrained, not both")
    if checkpoint is not None and checkpoint.is_dir():
        found = load_network(checkpoint)
        if found.name != resolve_network(name).name:
            raise ValueError(f"{checkpoint} holds {found.name}, and {name} was asked for")
        return found
    if checkpoint is not None or pretrained:
        return load_rival(name, checkpoint)
    from fasternet.models.checkpoint import Preprocessing

    rival = resolve_network(name)
    return Checkpoint(
        name=rival.name,
        model=create_network(name, num_classes=num_classes).eval(),
        class_names=None,
        preprocessing=Preprocessing(input_size=rival.input_size),
    )


def _run_file(path: Path, function: str) -> Checkpoint:
    """Return the network that a function of a Python file makes."""
    import runpy

    from torch import nn

    from fasternet.models import Checkpoint
    from fasternet.models.checkpoint import Preprocessing

    if not path.is_file():
        raise FileNotFoundError(f"no Python file at {path}")
    try:
        create = runpy.run_path(str(path)).get(function)
        model = create() if callable(create) else None
    except Exception as error:  # whatever a user's file may raise
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{function} of {path} made no network: {cause}") from None
    if not callable(create):
        raise ValueError(f"{path} has no function {function}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"{function} of {path} must return a torch.nn.Module, not {type(model).__name__}")
    return Checkpoint(name=type(model).__name__, model=model.eval(), class_names=None, preprocessing=Preprocessing())


def _load_images(data: str, num_images: int, preprocessing: Any) -> Tensor:
    """Return pictures (N, 3, S, S), normalised."""
    import torch

    from fasternet.analysis.reference import load_pictures
    from fasternet.cli._study import draw_pictures

    return torch.cat(list(load_pictures(draw_pictures(data, num_images), preprocessing, batch_size=64)))


def _fold(network: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    import torch

    from fasternet.deploy import fold_batch_norm

    return fold_batch_norm(network, torch.zeros(shape))


def create_surgery_record(condition: Mapping[str, Any], report: SurgeryReport) -> Record:
    """Return the record of an operation.

    Args:
        condition: ``model``, ``weights``, ``init``, ``input_size`` and ``threads``; of pictures ``data`` and
            ``num_images``.
        report: Of ``replace_convs``; its options complete the condition.
    """
    import dataclasses

    from fasternet.environment import create_record

    values = dataclasses.asdict(report)
    options = values.pop("options")
    options = {"operator": options.pop("kind"), **options, "batch_size": options.pop("input_shape")[0]}
    return create_record("surgery", "study", condition["model"], condition={**condition, **options}, values=values)


def _save(folder: Path, original: Checkpoint, model: nn.Module, report: SurgeryReport) -> None:
    from fasternet.rivals import save_network

    model.num_classes = original.num_classes  # type: ignore[assignment]
    options: Mapping[str, Any] = getattr(original.model, "build_options", {})
    operations = [*options.get("surgery", ()), dict(report.options)]
    model.build_options = {**options, "surgery": operations}  # type: ignore[assignment]
    save_network(
        folder,
        model,
        name=original.name,
        class_names=original.class_names,
        preprocessing=original.preprocessing,
        facts={name: original.facts[name] for name in ("license", "data", "recipe") if name in original.facts},
    )
