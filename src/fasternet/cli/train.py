"""``fasternet train``: a network from pictures."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasternet.cli._common import note, shorten_spinning

if TYPE_CHECKING:
    from fasternet.train.loop import Progress
    from fasternet.train.recipes import Recipe


def train(
    name: Annotated[str, typer.Argument(help="Network, for example fasternet_t0.")],
    data: Annotated[
        str, typer.Option(help="Folder of pictures (train and val, or one folder per class), or digits (built in).")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder. [default: outputs/NAME-DATA-TIME]")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="small or digits. [default: by the data]")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe; repeatable.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Short for --set epochs=...")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Short for --set batch_size=...")] = None,
    lr: Annotated[float | None, typer.Option(help="Short for --set lr=...")] = None,
    input_size: Annotated[int | None, typer.Option(help="Short for --set input_size=...")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=...")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. [default: CUDA where there is one]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output, with its recipe.")] = False,
) -> None:
    """Train a network on pictures; the last line printed is the run folder.

    Example: fasternet train fasternet_t0 --data digits
    """
    shorten_spinning()
    from fasternet.train import loop

    if resume and output is None:
        raise typer.BadParameter("say which run with --output", param_hint="--resume")
    shortcuts = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "input_size": input_size, "seed": seed}
    changes = [*(changes or []), *(f"{k}={v}" for k, v in shortcuts.items() if v is not None)]
    folder = output or _default_output(name, data)
    chosen = _choose_recipe(recipe, changes, data, folder if resume else None)
    try:
        with show_progress() as progress, _stop_between_steps(progress) as watched:
            loop.train(name, data, folder, recipe=chosen, resume=resume, device=device, progress=watched)
    except KeyboardInterrupt:
        raise InterruptedError(_explain_interrupt(name, data, folder)) from None
    _print_result(folder)


@contextlib.contextmanager
def show_progress() -> Iterator[Callable[[Progress], None]]:
    """Give the ``progress`` argument of ``train``: a line an epoch on standard error, on a terminal a bar as well."""
    if not sys.stderr.isatty():
        yield lambda state: note(_describe_epoch(state)) if state.values else None
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def update(state: Progress) -> None:
            done = (state.epoch - 1) * state.num_steps + state.step
            text = f"epoch {state.epoch}/{state.num_epochs}  loss {state.train_loss:.3f}"
            bar.update(task, completed=done, total=state.num_epochs * state.num_steps, description=text)
            if state.values:
                bar.console.print(_describe_epoch(state), highlight=False)

        yield update


@contextlib.contextmanager
def _stop_between_steps(progress: Callable[[Progress], None]) -> Iterator[Callable[[Progress], None]]:
    """Let Ctrl-C wait for the next report of progress, where nothing is half done; a second one does not wait.

    An interrupt in the middle of starting a loader's processes is lost in Python, and the processes die of it.
    """
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    def watch(state: Progress) -> None:
        progress(state)
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield watch
    finally:
        signal.signal(signal.SIGINT, before)


def _describe_epoch(state: Progress) -> str:
    values: Mapping[str, Any] = state.values or {}
    return (
        f"epoch {state.epoch}/{state.num_epochs}  loss {values['train_loss']:.3f}  "
        f"validation loss {values['validation_loss']:.3f}  top-1 {values['top1']:.2f} %  "
        f"{values['images_per_second']:.0f} images/s"
    )


def _choose_recipe(name: str | None, changes: list[str], data: str, run: Path | None) -> Recipe:
    """Return the recipe of the run to resume or, unless one is named, the one that suits the data; then change it."""
    from fasternet.train import recipes

    if name is None and run is not None and (run / "recipe.yaml").is_file():
        recipe = recipes.load_recipe(run / "recipe.yaml")
    else:
        recipe = recipes.find_recipe(name or ("digits" if data == "digits" else "small"))
    return recipes.parse_overrides(recipe, changes)


def _default_output(name: str, data: str) -> Path:
    from datetime import datetime

    return Path("outputs", f"{name}-{Path(data).resolve().name}-{datetime.now():%Y%m%d-%H%M%S}")


def _explain_interrupt(name: str, data: str, folder: Path) -> str:
    if not (folder / "recipe.yaml").is_file():
        return "stopped before the first epoch began"
    command = ["fasternet", "train", name, "--data", data, "--output", str(folder), "--resume"]
    return f"stopped; go on with: {shlex.join(command)}"


def _print_result(folder: Path) -> None:
    from fasternet.records import load_records

    values = next(r.values for r in load_records(folder / "log.jsonl") if r.kind == "evaluation")
    print(
        f"best checkpoint: top-1 {values['top1']:.2f} %, top-5 {values['top5']:.2f} %, loss {values['loss']:.3f} "
        f"on {values['num_images']} pictures"
    )
    print(folder)
