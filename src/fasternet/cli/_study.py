"""What the studies share: the folder of one, going on with it, the network that it looks at, its page."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fasternet.cli._common import note, print_json, track

if TYPE_CHECKING:
    from fasternet.analysis.reference import Reference
    from fasternet.records import Record

RESNET50, RESNET18 = "resnet50.tv_in1k", "resnet18.tv_in1k"  # torchvision's, as in the paper

Model = Annotated[
    str | None,
    typer.Option(
        help="FasterNet, a rival's name, or one of timm's, with its published weights. [default: torchvision's "
        "ResNet50, for salience its ResNet18; out of reach, a ResNet18 trained on --data]"
    ),
]
Checkpoint = Annotated[Path | None, typer.Option(help="A trained network instead: a model folder or a run folder.")]
Data = Annotated[str, typer.Option(help="Folder of pictures; with a folder per class a network can be trained on it.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of the study. [default: outputs/STUDY-TIME]")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the study in --output.")]
Seeds = Annotated[int, typer.Option(min=1, help="How many seeds.")]
NumImages = Annotated[int, typer.Option(min=1, help="Pictures, drawn by lot.")]
InputSize = Annotated[int | None, typer.Option(min=32, help="Side of the pictures. [default: the network's own]")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. [default: CUDA where there is one]")]
Json = Annotated[bool, typer.Option("--json", help="Print the records as one JSON document.")]


def open_study(name: str, output: Path | None, *, resume: bool) -> Path:
    """Return the folder of a study, by default a new one with the time in its name.

    Raises:
        FileExistsError: It holds a study, and ``resume`` was not asked for.
        FileNotFoundError: There is nothing to go on with.
    """
    from datetime import datetime

    if resume and output is None:
        raise typer.BadParameter("say which study with --output", param_hint="--resume")
    folder = output or Path("outputs", f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    begun = (folder / "log.jsonl").is_file()
    if begun and not resume:
        raise FileExistsError(f"{folder} holds a study already; choose another output, or go on with --resume")
    if resume and not begun:
        raise FileNotFoundError(f"no study to go on with in {folder}: it has no log.jsonl")
    return folder


def load_network(
    model: str | None, default: str, checkpoint: Path | None, data: str | None, device: str | None = "cpu"
) -> Reference:
    """Load the network of a study.

    Args:
        model: What was asked for; its weights are downloaded, or it fails.
        default: What is taken where nothing was asked for; where its weights are out of reach, one is trained on the
            pictures once, on the whole data set where they are a part of one.
        checkpoint: A trained network, in place of both.
        data: The pictures.
        device: Where it computes.
    """
    from fasternet.analysis.reference import load_reference
    from fasternet.cli._training import show_progress
    from fasternet.train.device import select_device
    from fasternet.train.loop import Hooks

    target = select_device(device)
    own = None if model is not None or data is None else _find_data_set(data)
    with show_progress() as progress:
        reference = load_reference(
            model or default,
            checkpoint=checkpoint,
            data=None if own is None else str(own),
            folder=None if own is None else _name_run(own),
            hooks=Hooks(progress=progress, say=note),
        )
    reference.model.to(target)
    return reference


def _name_run(data: Path) -> Path:
    """Return the run folder of the network that is trained on a data set: one for each path."""
    from fasternet.analysis.reference import TRAINED_NETWORK

    key = hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:6]
    return Path("outputs", f"reference-{TRAINED_NETWORK}-{data.resolve().name}-{key}")


def _find_data_set(data: str) -> Path:
    return Path(data).resolve().parent if _is_part(data) else Path(data)


def _is_part(data: str) -> bool:
    return Path(data).resolve().name in ("train", "val", "test")


def name_data(data: str) -> str:
    """Return the name of a folder of pictures; of a part of a data set, with the set's."""
    folder = Path(data).resolve()
    return f"{folder.parent.name}/{folder.name}" if _is_part(data) else folder.name


def check_folder(data: str) -> None:
    """Look whether there are pictures to take.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if not Path(data).is_dir():
        raise FileNotFoundError(f"--data must be a folder of pictures, and there is none at {data}")


def draw_pictures(data: str, num_images: int) -> list[Path]:
    """Return pictures of a folder, drawn by lot: the same ones each time.

    Raises:
        FileNotFoundError: There is no such folder, or no picture in it.
    """
    import random

    from fasternet.data.images import find_images

    check_folder(data)
    paths = find_images([Path(data)])
    return sorted(random.Random(0).sample(paths, min(num_images, len(paths))))


def check_pictures(paths: Sequence[Path]) -> None:
    """Read every picture once, before hours of work depend on them.

    Raises:
        ImageError: One cannot be read; it is the first such one.
    """
    from fasternet.data.images import load_image

    for path in track(paths, len(paths), "checking pictures"):
        load_image(path)


def run_study(
    folder: Path, items: Sequence[str], measure: Callable[[list[Record]], Iterable[Record]], *, as_json: bool
) -> None:
    """Write the records as they come, then the page; print the result, and the page's path last.

    Args:
        folder: Of the study.
        items: What the page shows, by the names of ``report.page.ITEMS``.
        measure: Takes the records that are there already, loads the network, and yields new records.
        as_json: Print the records in place of the tables.

    Raises:
        InterruptedError: The study was interrupted; the message says how to go on.
    """
    from fasternet.benchmark.results import save_results
    from fasternet.records import load_records
    from fasternet.report.page import create_report, render_item

    log = folder / "log.jsonl"
    known = load_records(log) if log.is_file() else []
    try:
        for _ in save_results(log, measure(known)):
            pass
    except KeyboardInterrupt:
        folder.mkdir(parents=True, exist_ok=True)
        log.touch()  # before the first record too, there is a study to go on with
        raise InterruptedError(f"stopped; go on with: {_find_way_on(sys.argv[1:], folder)}") from None
    page = create_report([log], folder / "report.html", items=items)
    if as_json:
        print_json([dataclasses.asdict(record) for record in load_records(log)])
        note(str(page))
        return
    for item in items:
        print(render_item(item, [log]))
    print(page)


def _find_way_on(words: Sequence[str], folder: Path) -> str:
    """Return the command line that goes on with a study; ``reproduce`` does so by itself."""
    if words[:1] == ["study"]:
        given = [] if {"-o", "--output"} & set(words) else ["--output", str(folder)]
        words = [*(word for word in words if word != "--resume"), *given, "--resume"]
    return shlex.join(["fasternet", *words])
