"""What the training commands share: progress, stopping between steps, shortcuts to recipe fields, the run folder."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fasternet.cli._common import is_main_process, note

if TYPE_CHECKING:
    from fasternet.train.loop import Hooks, Progress

LINE_SECONDS = 60.0  # between two lines within an epoch where standard error is no terminal

METRICS = {
    "validation_loss": ("validation loss", ".3f", ""),
    "top1": ("top-1", ".2f", " %"),
    "box_ap": ("box AP", ".3f", ""),
    "box_ap50": ("box AP50", ".3f", ""),
    "mask_ap": ("mask AP", ".3f", ""),
    "mask_ap50": ("mask AP50", ".3f", ""),
}


def choose_output(output: Path | None, name: str, data: str, *, resume: bool) -> Path:
    """Return the run folder, by default a new one with the time in its name."""
    if output is None and (resume or "RANK" in os.environ):
        raise typer.BadParameter("say which run with --output", param_hint="--resume" if resume else "torchrun")
    return output or _default_output(name, data)


def list_changes(changes: Sequence[str] | None, shortcuts: Mapping[str, Any], *, amp: bool | None) -> list[str]:
    """Return the changes of a recipe as text: those given with ``--set``, then the shortcuts that were given."""
    given = {**shortcuts, "precision": None if amp is None else "auto" if amp else "fp32"}
    return [*(changes or []), *(f"{name}={str(v).lower()}" for name, v in given.items() if v is not None)]


def list_options(options: Mapping[str, Any]) -> list[str]:
    """Return the words of the options that were given."""
    return [word for name, value in options.items() if value is not None for word in (name, str(value))]


def run_training(
    train: Callable[[Hooks], object],
    command: Sequence[str],
    folder: Path,
    *,
    save_minutes: float,
    watchers: Sequence[str] | None,
) -> None:
    """Train with progress on standard error; an interrupt says how to go on.

    Args:
        train: Takes the hooks.
        command: The command line that started it, without what resumes it.
        folder: The run folder.
        save_minutes: Time between two states within an epoch.
        watchers: See ``Hooks``.
    """
    from fasternet.train.loop import Hooks

    given = {"--save-minutes": None if save_minutes == Hooks.save_minutes else save_minutes}
    command = [*command, *list_options(given), *(word for name in watchers or () for word in ("--watch", name))]
    try:
        with show_progress() as progress, stop_between_steps() as stop:
            train(Hooks(progress=progress, say=note, stop=stop, save_minutes=save_minutes, watchers=watchers or ()))
    except (InterruptedError, KeyboardInterrupt) as error:
        if not is_main_process():
            raise typer.Exit(1) from None
        raise InterruptedError(_explain_interrupt(str(error), command, folder)) from None


@contextlib.contextmanager
def show_progress() -> Iterator[Callable[[Progress], None]]:
    """Give the ``progress`` argument of ``train``: a line an epoch on standard error, on a terminal a bar as well.

    Where it is no terminal, a long epoch has a line a minute.
    """
    if not sys.stderr.isatty():
        yield print_progress()
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
            done, total = _count_steps(state)
            speed = f"{state.images_per_second:.0f} images/s"
            text = f"epoch {state.epoch}/{state.num_epochs}  loss {state.train_loss:.3f}  {speed}"
            bar.update(task, completed=done, total=total, description=text)
            if state.values:
                bar.console.print(_describe_epoch(state), highlight=False)

        yield update


def print_progress(clock: Callable[[], float] = time.monotonic) -> Callable[[Progress], None]:
    """Return a function that prints a line an epoch, and one a minute within an epoch.

    Args:
        clock: Tells the seconds.
    """
    first: tuple[float, int] | None = None  # time and steps at the first report
    last = 0.0

    def update(state: Progress) -> None:
        nonlocal first, last
        now, (done, total) = clock(), _count_steps(state)
        if first is None:
            first, last = (now, done), now
        if state.values:
            note(_describe_epoch(state))
        elif now - last >= LINE_SECONDS and done > first[1]:
            left = (total - done) * (now - first[0]) / (done - first[1])
            note(_describe_step(state, left))
        else:
            return
        last = now

    return update


@contextlib.contextmanager
def stop_between_steps() -> Iterator[Callable[[], bool]]:
    """Give the ``stop`` hook: Ctrl-C and SIGTERM wait for the next step, save and stop; a second Ctrl-C does not wait.

    ``torchrun`` hands on what it is sent, so that one signal to all processes reaches this one twice; it and SLURM
    kill what has not ended in time. So a second SIGTERM, and under ``torchrun`` a second Ctrl-C, changes nothing.
    An interrupt in the middle of starting a loader's processes is lost in Python, and the processes die of it.
    """
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        asked = True
        if number == signal.SIGINT and "RANK" not in os.environ:
            signal.signal(number, before[signal.SIGINT])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        if not asked:  # else the command ends now, and a second SIGTERM must not cut off what it says
            for number, handler in before.items():
                signal.signal(number, handler)


def _count_steps(state: Progress) -> tuple[int, int]:
    """Return the steps of the run that are done, and all of them."""
    return (state.epoch - 1) * state.num_steps + state.step, state.num_epochs * state.num_steps


def _describe_step(state: Progress, left: float) -> str:
    place = f"epoch {state.epoch}/{state.num_epochs}  step {state.step}/{state.num_steps}"
    speed = f"{state.images_per_second:.0f} images/s"
    return "  ".join((place, f"loss {state.train_loss:.3f}", speed, f"{_describe_time(left)} left"))


def _describe_epoch(state: Progress) -> str:
    values: Mapping[str, Any] = state.values or {}
    left = (state.num_epochs - state.epoch) * values["seconds"]
    metrics = (
        f"{label} {values[name]:{digits}}{unit}"
        for name, (label, digits, unit) in METRICS.items()
        if values.get(name) is not None
    )
    parts = (f"epoch {state.epoch}/{state.num_epochs}", f"loss {values['train_loss']:.3f}", *metrics)
    return "  ".join((*parts, f"{values['images_per_second']:.0f} images/s", f"{_describe_time(left)} left"))


def _describe_time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _default_output(name: str, data: str) -> Path:
    from datetime import datetime

    return Path("outputs", f"{name}-{Path(data).resolve().name}-{datetime.now():%Y%m%d-%H%M%S}")


def _explain_interrupt(saved: str, command: Sequence[str], folder: Path) -> str:
    """Return what happened and how to go on; ``saved`` is empty where the stop did not wait for a state."""
    if not (folder / "recipe.yaml").is_file():
        return "stopped before the first epoch began"
    if "RANK" in os.environ:
        return f"{saved or 'stopped at once'}; go on with the same torchrun command and --resume"
    line = shlex.join([*command, "--output", str(folder), "--resume"])
    return f"{saved or 'stopped at once'}; go on with: {line}"
