"""A run while it goes on, and the folder it leaves: state, checkpoints, log.

The folder holds ``recipe.yaml``, ``log.jsonl`` (records), ``log.csv``, ``best/`` and ``last/`` (model folders),
``last/state.pt``, the state before it, and ``pictures/``. The main process alone writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fasternet.environment import create_record, describe_machine
from fasternet.models.checkpoint import remove_parts
from fasternet.records import Record, append_records, load_records, save_machine
from fasternet.rivals.network import read_options
from fasternet.train.distributed import World, broadcast
from fasternet.train.optim import create_optimizer
from fasternet.train.recipe import BaseRecipe, save_recipe
from fasternet.train.state import load_last_state, save_state
from fasternet.train.task import Task

Say = Callable[[str], object]

# What may differ when a run is resumed: where it computes, what stops it and what judges it; its weights come from the
# state.
FREE_CONDITIONS = (
    *("device", "processes", "initial_weights", "num_workers", "max_unreadable", "rollbacks"),
    "skip_unreadable",  # with it, the number of validation pictures too
)


@dataclasses.dataclass(kw_only=True)
class Run:
    """Everything that changes while a run goes on.

    Attributes:
        task: What is trained.
        recipe: How.
        output: The run folder.
        model: The task's network as it is called in training: compiled, and connected with that of other processes.
        average: The moving average of its weights, or None.
        optimizer: AdamW.
        scaler: Of the loss, for fp16.
        epoch: Epochs that are done.
        step: Steps of the current epoch that are done.
        loss_sum: Of their losses.
        seconds: What they took, before a resume too.
        first_loss: Of the run's first step; infinite once it has been said that the run diverged.
        best: Highest metric so far.
        lr_factor: Share of the recipe's rate that is left after rollbacks.
        num_rollbacks: How many there were.
        unreadable: Errors of training pictures so far, each once.
    """

    task: Task
    recipe: BaseRecipe
    output: Path
    model: nn.Module
    average: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    first_loss: float | None = None
    best: float = -math.inf
    lr_factor: float = 1.0
    num_rollbacks: int = 0
    unreadable: list[str] = dataclasses.field(default_factory=list)

    @property
    def world(self) -> World:
        """The processes of the run."""
        return self.task.world

    @property
    def trained(self) -> nn.Module:
        """The network that is evaluated and saved: the average where there is one."""
        return self.task.model if self.average is None else self.average.module


_COUNTERS = (
    *("epoch", "step", "loss_sum", "best", "lr_factor", "num_rollbacks", "unreadable"),
    *("seconds", "first_loss"),  # which older states do not hold
)


def create_run(task: Task, recipe: BaseRecipe, output: Path) -> Run:
    """Prepare a run that has not begun."""
    average = None
    if recipe.ema_decay is not None:
        average = ModelEmaV3(task.model, decay=recipe.ema_decay, use_warmup=True)
    if recipe.compile:
        task.model.compile()
    model = task.model
    if task.world.size > 1:
        model = DistributedDataParallel(model, device_ids=[task.device] if task.device.type == "cuda" else None)
    return Run(
        task=task,
        recipe=recipe,
        output=output,
        model=model,
        average=average,
        optimizer=create_optimizer(task.model, recipe),
        scaler=torch.amp.GradScaler(task.device.type, enabled=recipe.precision == "fp16"),
    )


def start_run(run: Run) -> None:
    """Write what a run folder begins with; from its recipe on, the run can be resumed."""
    if run.world.is_main:
        run.output.mkdir(parents=True, exist_ok=True)
        remove_parts(run.output)
        save_recipe(run.output / "recipe.yaml", run.recipe)
        _rewrite_log(run.output, [_describe_run(run)])
        save_machine(run.output / "machines", describe_machine())
        save_run_state(run)


@contextlib.contextmanager
def discard_failed_start(run: Run) -> Iterator[None]:
    """Leave no run folder behind where something turns out to be wrong before the first step is done."""
    existed = run.output.is_dir() and any(run.output.iterdir())
    try:
        yield
    except ValueError:
        if run.world.is_main and not existed and run.epoch == run.step == 0:
            shutil.rmtree(run.output, ignore_errors=True)
        raise


def has_state(output: Path) -> bool:
    """Whether a run folder holds a state to go on from."""
    return any((output / "last").glob("state*.pt"))


def read_condition(output: Path) -> Mapping[str, Any]:
    """Return what the log of a run folder says of its data, network and recipe; nothing where there is no log."""
    log = output / "log.jsonl"
    records = load_records(log) if log.is_file() else []
    return records[0].condition if records else {}


def find_options(
    name: str, given: Mapping[str, Any] | None, checkpoint: Path | None, *, run: Path | None, key: str
) -> dict[str, Any]:
    """Return what a network is built with: what is given, above what its weights bring along.

    Args:
        name: The network.
        given: By the user; of a run to resume, ``resume_run`` refuses what differs.
        checkpoint: The weights that a new run begins with.
        run: The folder of a run to resume.
        key: Under which its log has the options.
    """
    if run is not None:
        return {**read_options(name, run / "last"), **read_condition(run).get(key, {}), **(given or {})}
    return {**(read_options(name, checkpoint) if checkpoint else {}), **(given or {})}


def resume_run(run: Run, say: Say) -> None:
    """Load the last state, and cut from the log what was written after it.

    Raises:
        ValueError: The folder holds another run, or no state that is whole.
    """
    records: list[Record] = []
    if run.world.is_main:
        log = run.output / "log.jsonl"
        records = load_records(log)
        if not records or records[0].kind != "run":
            raise ValueError(f"{log} does not begin with the record of a run: it cannot be resumed")
        _check_same_run(records[0], _describe_run(run), run.output)
        remove_parts(run.output)
        save_recipe(run.output / "recipe.yaml", run.recipe)
    restore_run(run, say)
    if run.world.is_main:
        kept = [r for r in records[1:] if r.condition.get("epoch", math.inf) <= run.epoch]
        _rewrite_log(run.output, [records[0], *kept])


def restore_run(run: Run, say: Say) -> None:
    """Bring a run back to its last state, in every process."""
    path = run.output / "last" / "state.pt"
    state = broadcast(run.world, load_last_state(path, say) if run.world.is_main else None)
    if state is None:
        raise ValueError(f"there is no state at {path}: the run cannot go on")
    run.task.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.average is not None:
        run.average.module.load_state_dict(state["average"])
    if state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    for name in _COUNTERS:
        setattr(run, name, state.get(name, getattr(run, name)))


def save_run_state(run: Run) -> None:
    """Write the state of the run as it is."""
    state: dict[str, Any] = {"model": run.task.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    state["average"] = None if run.average is None else run.average.module.state_dict()
    state["scaler"] = run.scaler.state_dict()
    save_state(run.output / "last" / "state.pt", {**state, **{name: getattr(run, name) for name in _COUNTERS}})


def save_epoch(run: Run, values: Mapping[str, Any]) -> None:
    """Write the log and checkpoints of an epoch that has ended, the state last: what is cut off is done again."""
    task, output = run.task, run.output
    is_best = values[task.metric] >= run.best  # of equal epochs the later one, whose loss is lower as a rule
    run.best = max(run.best, values[task.metric])
    run.epoch, run.step, run.loss_sum, run.seconds = run.epoch + 1, 0, 0.0, 0.0
    if not run.world.is_main:
        return
    with explain_failed_write(run, run.epoch - 1):
        record = create_record("train", "epoch", task.name, condition={"epoch": run.epoch}, values=values)
        append_records(output / "log.jsonl", [record])
        if is_best:
            task.save(output / "best", run.trained, values)
        task.save(output / "last", run.trained, values)
        save_run_state(run)


def save_summary(run: Run, records: list[Record]) -> None:
    """Write the records that end a log."""
    if run.world.is_main:
        with explain_failed_write(run, run.recipe.epochs):
            append_records(run.output / "log.jsonl", records)


@contextlib.contextmanager
def explain_failed_write(run: Run, num_done: int) -> Iterator[None]:
    """Say in one sentence that the folder cannot be written, and what is kept.

    Raises:
        OSError: It cannot.
    """
    try:
        yield
    except OSError as error:
        kept = f"the checkpoint of epoch {num_done} is intact" if num_done else "no epoch has been saved"
        raise OSError(
            f"cannot write to {run.output}: {error.strerror or error}; {kept}: make room and resume"
        ) from error


def _rewrite_log(output: Path, records: list[Record]) -> None:
    temporary = output / "log.jsonl.tmp"
    temporary.unlink(missing_ok=True)
    append_records(temporary, records)
    temporary.replace(output / "log.jsonl")


def _describe_run(run: Run) -> Record:
    condition = {**run.task.condition, "processes": run.world.size, **dataclasses.asdict(run.recipe)}
    return create_record("train", "run", run.task.name, condition=condition, values=run.task.values)


def _check_same_run(old: Record, new: Record, output: Path) -> None:
    """Raise where a run to resume differs from what was asked for in anything that changes its result."""
    facts = [{"model": r.subject, **r.condition, **r.values} for r in (old, new)]
    was, wanted = json.loads(json.dumps(facts))  # as they look once they have been written
    free = (*FREE_CONDITIONS, "num_validation") if wanted.get("skip_unreadable") else FREE_CONDITIONS
    names = [name for name in wanted if name not in free and was.get(name) != wanted[name]]
    if names:
        differences = ", ".join(f"{name}={was.get(name)}, not {wanted[name]}" for name in names)
        raise ValueError(f"the run in {output} has {differences}; it can only be resumed as it was started")
