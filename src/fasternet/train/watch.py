"""What follows a run while it goes: ``log.csv`` always, TensorBoard and Weights & Biases by name.

All of them are drawn from the epoch records of ``log.jsonl``, so they are right after a run was resumed, too.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fasternet.models.checkpoint import write_atomically
from fasternet.records import Record, load_records

Watch = Callable[[int, Mapping[str, Any]], None]


def check_watchers(names: Sequence[str]) -> None:
    """Raise unless every watcher is known and installed.

    Raises:
        ValueError: A name is unknown.
        ModuleNotFoundError: What it needs is not installed.
    """
    for name in names:
        if name not in WATCHERS:
            raise ValueError(f"watcher {name!r} is not one of {', '.join(WATCHERS)}; log.jsonl and log.csv come always")
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"the watcher {name} is not installed: pip install 'fasternet[{name}]'")


@contextlib.contextmanager
def open_watchers(names: Sequence[str], output: Path, *, subject: str, condition: Mapping[str, Any]) -> Iterator[Watch]:
    """Follow a run: to be opened once its log holds what is done, and closed with the run.

    Args:
        names: Any of ``tensorboard`` (event files in the folder ``tensorboard``) and ``wandb`` (which goes by its own
            environment: ``WANDB_MODE=offline`` needs no account).
        output: The run folder; of a resumed run, its log cut back to the epoch that it resumes from.
        subject: The network's name.
        condition: The recipe and what else describes the run.

    Yields:
        ``watch(epoch, values)``, to be called after the record of an epoch, counted from 1, is in the log.

    Raises:
        ValueError: A name is unknown.
        ModuleNotFoundError: What it needs is not installed.
        OSError: Weights & Biases cannot start, or the folder cannot be written.
    """
    check_watchers(names)
    with contextlib.ExitStack() as stack:
        done = load_epochs(output)
        watches = [stack.enter_context(WATCHERS[name](output, subject, condition, done)) for name in unique(names)]
        write_csv(output)

        def watch(epoch: int, values: Mapping[str, Any]) -> None:
            write_csv(output)
            for follow in watches:
                follow(epoch, select_numbers(values))

        yield watch


def write_csv(output: Path) -> None:
    """Write ``log.csv``, atomically: a row for each epoch that the log of a run folder holds."""
    rows = [{"epoch": r.condition["epoch"], **select_numbers(r.values)} for r in load_epochs(output)]
    names = unique([name for row in rows for name in row]) or ["epoch"]

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(output / "log.csv", write)


def load_epochs(output: Path) -> list[Record]:
    """Return the last record of every epoch in the log of a run folder, in order."""
    log = output / "log.jsonl"
    records = load_records(log) if log.is_file() else []
    epochs = {r.condition["epoch"]: r for r in records if r.kind == "epoch"}
    return [epochs[epoch] for epoch in sorted(epochs)]


def select_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values that a curve can be drawn of."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def unique(names: Sequence[str]) -> list[str]:
    """Return each name once, in order."""
    return list(dict.fromkeys(names))


@contextlib.contextmanager
def _open_tensorboard(
    output: Path, subject: str, condition: Mapping[str, Any], done: Sequence[Record]
) -> Iterator[Watch]:
    from torch.utils.tensorboard import SummaryWriter

    # What an earlier process wrote may end anywhere: it is purged, and written anew from the log.
    writer = SummaryWriter(str(output / "tensorboard"), purge_step=1)

    def write(epoch: int, values: Mapping[str, Any], created: float | None = None) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, epoch, walltime=created)

    def watch(epoch: int, values: Mapping[str, Any]) -> None:
        write(epoch, values)
        writer.flush()

    try:
        facts = "\n".join(f"    {name}: {value}" for name, value in {"network": subject, **condition}.items())
        writer.add_text("run", facts, 1)
        for record in done:
            write(record.condition["epoch"], select_numbers(record.values), _seconds(record.created))
        writer.flush()
        yield watch
    finally:
        writer.close()


@contextlib.contextmanager
def _open_wandb(output: Path, subject: str, condition: Mapping[str, Any], done: Sequence[Record]) -> Iterator[Watch]:
    import wandb

    path = output / "wandb-id.txt"  # by it a resumed run finds its curves again
    if not path.is_file():
        write_atomically(path, lambda part: part.write_text(secrets.token_hex(8) + "\n", encoding="utf-8"))
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fasternet"),
            name=output.resolve().name,
            id=path.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(output),
            config=json.loads(json.dumps({"network": subject, **condition}, default=str)),
        )
    except wandb.Error as error:
        raise OSError(
            f"Weights & Biases cannot start: {' '.join(str(error).split())} (WANDB_MODE=offline needs no account)"
        ) from None
    failed = True
    try:
        for record in done:
            if record.condition["epoch"] >= run.step:  # those before are there already
                run.log(select_numbers(record.values), step=record.condition["epoch"])
        yield lambda epoch, values: run.log(dict(values), step=epoch)
        failed = False
    finally:
        run.finish(exit_code=int(failed))


def _seconds(created: str) -> float | None:
    try:
        return datetime.fromisoformat(created).timestamp()
    except ValueError:
        return None


WATCHERS: dict[str, Callable[..., contextlib.AbstractContextManager[Watch]]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
}
