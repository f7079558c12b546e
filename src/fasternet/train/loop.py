"""The training loop: epochs, steps, and what interrupts them (Section 4.2, Table 6)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasternet.data.loaders import explain_dead_worker
from fasternet.train.device import select_device, select_precision
from fasternet.train.distributed import World, broadcast, gather, join_world, sum_over
from fasternet.train.optim import set_lr, set_training
from fasternet.train.recipe import BaseRecipe
from fasternet.train.run import (
    Run,
    Say,
    create_run,
    discard_failed_start,
    explain_failed_write,
    has_state,
    read_condition,
    restore_run,
    resume_run,
    save_epoch,
    save_run_state,
    save_summary,
    start_run,
)
from fasternet.train.state import seed_everything
from fasternet.train.task import Task
from fasternet.train.watch import Watch, check_watchers, open_watchers

GPU_READ_STEPS = 10  # losses are read in groups, as each reading makes a GPU wait
NUM_NAMES = 8  # of pictures in a message
ROLLBACK_FACTOR = 0.5
DIVERGENCE_FACTOR = 1000  # times the loss of the first step, and of 1 where that is less
EVALUATION_RISK = 0.1  # share of the time between two states that may be lost by a kill during evaluation


R = TypeVar("R", bound=BaseRecipe)


class NotFiniteError(ValueError):
    """A loss or a weight became infinite or NaN."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands, for whoever shows it.

    Attributes:
        epoch: The current epoch, counted from 1.
        num_epochs: Epochs in all.
        step: Steps of this epoch that are done.
        num_steps: Steps of an epoch.
        train_loss: Mean loss of this epoch so far.
        images_per_second: Training pictures of all processes a second, since this epoch began or was resumed.
        values: The values of the epoch's record once it is written, else None.
    """

    epoch: int
    num_epochs: int
    step: int
    num_steps: int
    train_loss: float
    images_per_second: float = 0.0
    values: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a run tells to the outside, and asks it; only the main process tells.

    Attributes:
        progress: Called every few steps and after each epoch.
        say: Called with a sentence about anything out of the ordinary.
        stop: Asked every few steps: True saves the state and ends the run, in all processes.
        save_minutes: Time between two states within an epoch.
        watchers: Names for ``open_watchers``: ``tensorboard``, ``wandb``.
    """

    progress: Callable[[Progress], object] = lambda _: None
    say: Say = lambda _: None
    stop: Callable[[], bool] = lambda: False
    save_minutes: float = 10.0
    watchers: Sequence[str] = ()


def train_task(
    create: Callable[[R, torch.device, World, bool], Task],
    output: Path,
    *,
    recipe: R,
    resume: bool = False,
    begins_with: object = None,
    device: str | None = None,
    hooks: Hooks | None = None,
) -> Path:
    """Train any task; under ``torchrun``, with all its processes.

    Args:
        create: Makes the task from the recipe with its precision chosen, the device, the processes, and whether the run
            begins anew: one that goes on brings its own weights.
        output: The run folder; without ``resume`` it has to be new or empty. All processes have to see it.
        recipe: How to train.
        resume: Go on with the run in ``output``. On a CPU it ends bitwise as if it had never stopped.
        begins_with: The weights that the run begins with, if any: a run that goes on takes none.
        device: ``cpu``, ``cuda`` ..., by default CUDA where there is a device.
        hooks: What the run tells and asks while it goes on.

    Returns:
        ``output``.

    Raises:
        FileExistsError: ``output`` holds something, and ``resume`` was not asked for.
        FileNotFoundError: There is no run to resume, or no data.
        InterruptedError: ``hooks.stop`` asked for it; the state is saved.
        ValueError: An argument is wrong, the run to resume is another one, or the loss is not finite.
        OSError: The run folder cannot be written (its last checkpoint is intact), or a loader's process died.
    """
    check_watchers(hooks.watchers if hooks else ())
    if resume and begins_with:
        raise ValueError("resume goes on from the run's own state: leave checkpoint and pretrained out")
    target = select_device(device)
    recipe = dataclasses.replace(recipe, precision=select_precision(recipe.precision, target))
    with explain_dead_worker(), join_world(target) as world:  # a second process may die while the first is explained
        # torchrun counts restarts on the machine alone whose processes failed.
        restarted = any(gather(world, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))
        # Nobody begins before the folder has been looked at.
        resume = broadcast(world, world.is_main and check_output(output, resume=resume, restarted=restarted))
        fit(create(recipe, target, world, not resume), output, recipe=recipe, resume=resume, hooks=hooks)
    return output


def check_output(output: Path, *, resume: bool, restarted: bool = False) -> bool:
    """Return whether the run in the folder has a state to go on from; raise unless a run can start or go on in it.

    Args:
        output: The run folder.
        resume: Go on with the run that is there.
        restarted: Go on if there is one: ``torchrun`` started this command anew.
    """
    begun = (output / "recipe.yaml").is_file()
    if resume and not begun:
        raise FileNotFoundError(f"no run to resume in {output}: it has no recipe.yaml")
    if begun and (resume or restarted):
        if has_state(output):
            return True
        if resume and read_condition(output).get("initial_weights"):
            raise FileNotFoundError(f"the run in {output} was stopped before its first state: delete it and start anew")
    elif output.exists() and not (output.is_dir() and all(path.name.startswith(".") for path in output.iterdir())):
        raise FileExistsError(f"{output} exists already; choose another output, or resume the run in it")
    return False


def describe_plan(recipe: BaseRecipe, world: World, num_steps: int) -> str:
    """Return what a recipe comes to: the batch, the rate, the epochs, and what of it is never reached."""
    parts = world.size * recipe.accumulate
    cut = f" = {world.size} processes x {recipe.accumulate} parts x {recipe.batch_size // parts}" if parts > 1 else ""
    scaled = recipe.lr_batch_size not in (None, recipe.batch_size)
    source = f" ({recipe.lr:g} for a batch of {recipe.lr_batch_size})" if scaled else ""
    plan = (
        f"batch {recipe.batch_size}{cut}, rate {recipe.effective_lr:g}{source}, "
        f"{recipe.epochs} epochs of {num_steps} steps, {recipe.precision}"
    )
    return "; ".join([plan, *recipe.describe_shortfalls(num_steps)])


def fit(task: Task, output: Path, *, recipe: BaseRecipe, resume: bool = False, hooks: Hooks | None = None) -> None:
    """Train to the end of the recipe, from the start or from the last state; see ``train_task``."""
    hooks = hooks if hooks and task.world.is_main else Hooks(stop=hooks.stop if hooks else Hooks.stop)
    hooks.say(describe_plan(recipe, task.world, task.num_steps))
    run = create_run(task, recipe, output)
    with discard_failed_start(run):
        if resume:
            resume_run(run, hooks.say)
            if run.step and (warning := task.describe_resume(run.step)):
                hooks.say(warning)
        else:
            start_run(run)
        with _watch(run, hooks.watchers) as watch:
            while run.epoch < recipe.epochs:
                try:
                    values = train_epoch(run, hooks)
                except NotFiniteError as error:
                    if run.num_rollbacks == recipe.rollbacks:
                        raise
                    _roll_back(run, error, hooks.say)
                    continue
                save_epoch(run, values)
                with explain_failed_write(run, run.epoch):
                    watch(run.epoch, values)
                _report(run, hooks, values["train_loss"], values["images_per_second"], values)
                if any(gather(task.world, hooks.stop())):
                    raise InterruptedError(f"stopped after epoch {run.epoch} of {recipe.epochs}; the state is saved")
    broadcast(task.world, None)  # nobody reads the best checkpoint before it is written
    save_summary(run, task.summarise(output))


def _watch(run: Run, names: Sequence[str]) -> contextlib.AbstractContextManager[Watch]:
    if not run.world.is_main:
        return contextlib.nullcontext(lambda epoch, values: None)
    condition = {**run.task.condition, **dataclasses.asdict(run.recipe)}
    return open_watchers(names, run.output, subject=run.task.name, condition=condition)


def train_epoch(run: Run, hooks: Hooks) -> dict[str, Any]:
    """Train to the end of an epoch, evaluate, and return the epoch's record.

    Raises:
        NotFiniteError: A loss or a weight is infinite or NaN.
        InterruptedError: A stop was asked for; the state is saved.
    """
    task, recipe = run.task, run.recipe
    run.model.train()
    set_training(task.model, recipe)
    started = saved = time.perf_counter()
    began = started - run.seconds
    parts = iter(task.batches(run.epoch, run.step))
    read_steps = 1 if task.device.type == "cpu" else GPU_READ_STEPS
    losses: list[Tensor] = []
    num_images, speed, lr = 0, 0.0, 0.0
    for step in range(run.step, task.num_steps):
        lr = run.lr_factor * recipe.compute_lr(run.epoch, step / task.num_steps, task.num_steps)
        set_lr(run.optimizer, lr)
        loss, images = _take_step(run, step, parts)
        losses.append(loss)
        num_images += images * run.world.size
        if len(losses) < read_steps and step + 1 < task.num_steps:
            continue
        stopped = _read_losses(run, losses, lr, hooks)
        now = time.perf_counter()
        run.seconds, speed = now - began, num_images / (now - started)
        _report(run, hooks, run.loss_sum / run.step, speed)
        if stopped or now - saved > 60 * hooks.save_minutes:
            _save_within_epoch(run, stopped)
            saved = now
    if not lr:  # resumed after the last step
        lr = run.lr_factor * recipe.compute_lr(run.epoch, 1 - 1 / task.num_steps, task.num_steps)
    values: dict[str, Any] = {"train_loss": run.loss_sum / task.num_steps, "lr": lr, "images_per_second": speed}
    if run.unreadable:
        values["unreadable"] = list(run.unreadable)
    if time.perf_counter() - saved > 60 * hooks.save_minutes * EVALUATION_RISK:
        _save_within_epoch(run, stopped=False)
    values |= _evaluate(run)
    return {**values, "seconds": time.perf_counter() - began}


def _take_step(run: Run, step: int, parts: Iterator[Any]) -> tuple[Tensor, int]:
    """Take a step of the optimizer; return this process's mean loss and its number of pictures."""
    task, recipe = run.task, run.recipe
    total, num_images = torch.zeros((), device=task.device), 0
    run.optimizer.zero_grad()
    for number in range(recipe.accumulate):
        batch = next(parts)
        num_images += len(batch[0])
        seed_everything(recipe.seed, run.epoch, step, run.world.rank * recipe.accumulate + number)
        with _keep_gradients(run.model, number + 1 < recipe.accumulate):
            with autocast(task, recipe):
                loss = task.loss(run.model, batch) / recipe.accumulate
            run.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    if recipe.clip_grad is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(task.model.parameters(), recipe.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.average is not None:
        run.average.update(task.model, step=run.epoch * task.num_steps + step)
    return total, num_images


def _read_losses(run: Run, losses: list[Tensor], lr: float, hooks: Hooks) -> bool:
    """Add up the losses since the last reading, over all processes; return whether any of them is to stop."""
    task, size = run.task, run.world.size
    news = torch.tensor([float(hooks.stop()), float(len(task.unreadable))], device=task.device)
    *sums, num_stops, num_unreadable = sum_over(run.world, torch.cat([torch.stack(losses), news])).tolist()
    if num_unreadable:
        _note_unreadable(run, hooks.say)
    means = [value / size for value in sums]
    for number, mean in enumerate(means):
        if not math.isfinite(mean):
            raise NotFiniteError(_explain_not_finite(run, mean, run.step + number, lr))
    run.loss_sum += sum(means)
    run.step += len(losses)
    losses.clear()
    _note_divergence(run, means[0], hooks.say)
    return bool(num_stops)


def _note_divergence(run: Run, loss: float, say: Say) -> None:
    """Say once where the mean loss is far above that of the first step, though it is finite."""
    run.first_loss = loss if run.first_loss is None else run.first_loss
    mean = run.loss_sum / run.step
    if mean > DIVERGENCE_FACTOR * max(1.0, run.first_loss):
        remedy = f"train anew with lr={run.recipe.lr / 4:g}"
        say(f"the run diverges: a loss of {run.first_loss:.3g} became {mean:.3g} in epoch {run.epoch + 1}; {remedy}")
        run.first_loss = math.inf


def _note_unreadable(run: Run, say: Say) -> None:
    """Name the pictures that could not be read; raise where there are too many."""
    for errors in gather(run.world, [str(error) for error in run.task.unreadable]):
        for error in errors:
            if error not in run.unreadable:
                run.unreadable.append(error)
                say(f"{error}; another picture takes its place ({len(run.unreadable)} of {run.recipe.max_unreadable})")
    run.task.unreadable.clear()
    if len(run.unreadable) > run.recipe.max_unreadable:
        raise ValueError(
            f"{len(run.unreadable)} training pictures cannot be read, more than max_unreadable="
            f"{run.recipe.max_unreadable}; the last: {run.unreadable[-1]}"
        )


def _save_within_epoch(run: Run, stopped: bool) -> None:
    # A step may have broken the weights without showing in its own loss: such a state must not replace a good one.
    if run.world.is_main and _is_finite(run.task.model):
        with explain_failed_write(run, run.epoch):
            save_run_state(run)
    if stopped:
        raise InterruptedError(
            f"stopped in epoch {run.epoch + 1} after step {run.step} of {run.task.num_steps}; the state is saved"
        )


def _evaluate(run: Run) -> Mapping[str, Any]:
    if not _is_finite(run.task.model):
        raise NotFiniteError(f"the weights are not finite at the end of epoch {run.epoch + 1}{_advise(run)}")
    network = run.trained.eval()
    if run.world.size > 1:
        for buffer in network.buffers():  # each process has moved its BN statistics by its own pictures
            dist.broadcast(buffer, src=0)
    with autocast(run.task, run.recipe):
        return run.task.evaluate(network)


def _roll_back(run: Run, error: NotFiniteError, say: Say) -> None:
    factor, num_rollbacks = run.lr_factor * ROLLBACK_FACTOR, run.num_rollbacks + 1
    restore_run(run, say)
    run.lr_factor, run.num_rollbacks = factor, num_rollbacks
    say(f"{error}; back to epoch {run.epoch + 1}, step {run.step}, at {factor:g} of the rate")


def _explain_not_finite(run: Run, loss: float, step: int, lr: float) -> str:
    names = [name for share in gather(run.world, run.task.names(run.epoch, step)) for name in share]
    more = f" and {len(names) - NUM_NAMES} more" if len(names) > NUM_NAMES else ""
    pictures = f", pictures {', '.join(names[:NUM_NAMES])}{more}" if names else ""
    return f"the loss became {loss} in step {step + 1} of epoch {run.epoch + 1} at rate {lr:g}{pictures}{_advise(run)}"


def _advise(run: Run) -> str:
    recipe = run.recipe
    remedies = [f"lr={recipe.lr / 4:g}"]
    remedies += ["clip_grad=1"] if recipe.clip_grad is None or recipe.clip_grad > 1 else []
    remedies += ["precision=fp32"] if recipe.precision != "fp32" else []
    remedies += [] if recipe.rollbacks else ["rollbacks=3"]
    return f"; train anew with {' or '.join(remedies)}; the last checkpoint is that of epoch {run.epoch}"


def _is_finite(model: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def _report(run: Run, hooks: Hooks, train_loss: float, speed: float, values: Mapping[str, Any] | None = None) -> None:
    epoch, step = (run.epoch, run.task.num_steps) if values else (run.epoch + 1, run.step)
    hooks.progress(Progress(epoch, run.recipe.epochs, step, run.task.num_steps, train_loss, speed, values))


def _keep_gradients(model: nn.Module, keep: bool) -> contextlib.AbstractContextManager[None]:
    """Let a part of a step add its gradients up without sending them to the other processes yet."""
    if keep and isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def autocast(task: Task, recipe: BaseRecipe) -> torch.autocast:
    """Return the context in which the recipe's precision holds."""
    dtype = torch.float16 if recipe.precision == "fp16" else torch.bfloat16
    return torch.autocast(task.device.type, dtype, enabled=recipe.precision != "fp32")
