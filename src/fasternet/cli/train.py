"""``fasternet train``: a network from pictures."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasternet.cli._common import is_main_process, note, shorten_spinning

if TYPE_CHECKING:
    from fasternet.train.loop import Progress
    from fasternet.train.recipe import Recipe


def train(
    name: Annotated[str, typer.Argument(help="Network: fasternet_t0 ..., a rival's name, or one of timm's.")],
    data: Annotated[str, typer.Option(help="Folder of pictures, folder or address of shards, hf:NAME, or digits.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder. [default: outputs/NAME-DATA-TIME]")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="paper, finetune, small or digits. [default: by the data]")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe; repeatable.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Short for --set epochs=...")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Short for --set batch_size=...")] = None,
    lr: Annotated[float | None, typer.Option(help="Short for --set lr=...")] = None,
    input_size: Annotated[int | None, typer.Option(help="Short for --set input_size=...")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=...")] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="Short for --set compile=true.")] = None,
    amp: Annotated[bool | None, typer.Option("--amp/--no-amp", help="Short for --set precision=auto, or fp32.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights to start from: a model folder, a run folder or a file.")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from the published weights.")] = False,
    width: Annotated[int | None, typer.Option(help="Channels of the first stage, of a FasterNet.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. [default: CUDA where there is one]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output, with its recipe.")] = False,
    save_minutes: Annotated[float, typer.Option(min=0, help="Time between two states within an epoch.")] = 10.0,
    watchers: Annotated[
        list[str] | None, typer.Option("--watch", help="tensorboard or wandb; repeatable. log.csv comes always.")
    ] = None,
) -> None:
    """Train a network on pictures, under torchrun with all its processes; the last line printed is the run folder.

    Example: fasternet train fasternet_t0 --data digits
    """
    shorten_spinning()
    from fasternet.train import loop

    if output is None and (resume or "RANK" in os.environ):
        raise typer.BadParameter("say which run with --output", param_hint="--resume" if resume else "torchrun")
    shortcuts = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "input_size": input_size, "seed": seed}
    precision = None if amp is None else "auto" if amp else "fp32"
    shortcuts_all = {**shortcuts, "compile": compile, "precision": precision}
    changes = [*(changes or []), *(f"{k}={str(v).lower()}" for k, v in shortcuts_all.items() if v is not None)]
    folder = output or _default_output(name, data)
    chosen = _choose_recipe(
        recipe, changes, name, data, folder if resume else None, checkpoint is not None or pretrained
    )
    try:
        with show_progress() as progress, stop_between_steps() as stop:
            loop.train(
                name,
                data,
                folder,
                recipe=chosen,
                resume=resume,
                checkpoint=checkpoint,
                pretrained=pretrained,
                model_options=None if width is None else {"width": width},
                device=device,
                hooks=loop.Hooks(
                    progress=progress, say=note, stop=stop, save_minutes=save_minutes, watchers=watchers or ()
                ),
            )
    except (InterruptedError, KeyboardInterrupt) as error:
        if not is_main_process():
            raise typer.Exit(1) from None
        options = {"--width": width, "--device": device}
        raise InterruptedError(_explain_interrupt(str(error), name, data, folder, options)) from None
    if is_main_process():
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
            speed = f"{state.images_per_second:.0f} images/s"
            text = f"epoch {state.epoch}/{state.num_epochs}  loss {state.train_loss:.3f}  {speed}"
            bar.update(task, completed=done, total=state.num_epochs * state.num_steps, description=text)
            if state.values:
                bar.console.print(_describe_epoch(state), highlight=False)

        yield update


@contextlib.contextmanager
def stop_between_steps() -> Iterator[Callable[[], bool]]:
    """Give the ``stop`` hook: Ctrl-C and SIGTERM wait for the next step, save and stop; a second one does not wait.

    An interrupt in the middle of starting a loader's processes is lost in Python, and the processes die of it.
    """
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe_epoch(state: Progress) -> str:
    values: Mapping[str, Any] = state.values or {}
    left = (state.num_epochs - state.epoch) * values["seconds"]
    return (
        f"epoch {state.epoch}/{state.num_epochs}  loss {values['train_loss']:.3f}  "
        f"validation loss {values['validation_loss']:.3f}  top-1 {values['top1']:.2f} %  "
        f"{values['images_per_second']:.0f} images/s  {_describe_time(left)} left"
    )


def _describe_time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _choose_recipe(
    name: str | None, changes: list[str], model: str, data: str, run: Path | None, from_weights: bool
) -> Recipe:
    """Return the recipe of the run to resume or, unless one is named, the one that suits the data; then change it."""
    from fasternet.train.recipe import load_recipe, parse_overrides
    from fasternet.train.recipes import find_recipe

    if name is None and run is not None and (run / "recipe.yaml").is_file():
        recipe = load_recipe(run / "recipe.yaml")
    else:
        by_data = "digits" if data == "digits" else "finetune" if from_weights else "small"
        recipe = find_recipe(name or by_data, model)
    return parse_overrides(recipe, changes)


def _default_output(name: str, data: str) -> Path:
    from datetime import datetime

    return Path("outputs", f"{name}-{Path(data).resolve().name}-{datetime.now():%Y%m%d-%H%M%S}")


def _explain_interrupt(saved: str, name: str, data: str, folder: Path, options: Mapping[str, Any]) -> str:
    """Return what happened and how to go on; ``saved`` is empty where the stop did not wait for a state."""
    if not (folder / "recipe.yaml").is_file():
        return "stopped before the first epoch began"
    if "RANK" in os.environ:
        return f"{saved or 'stopped at once'}; go on with the same torchrun command and --resume"
    given = [word for option, value in options.items() if value is not None for word in (option, str(value))]
    command = ["fasternet", "train", name, "--data", data, *given, "--output", str(folder), "--resume"]
    return f"{saved or 'stopped at once'}; go on with: {shlex.join(command)}"


def _print_result(folder: Path) -> None:
    from fasternet.records import load_records

    values = next(r.values for r in load_records(folder / "log.jsonl") if r.kind == "evaluation")
    print(
        f"best checkpoint: top-1 {values['top1']:.2f} %, top-5 {values['top5']:.2f} %, loss {values['loss']:.3f} "
        f"on {values['num_images']} pictures"
    )
    print(folder)
