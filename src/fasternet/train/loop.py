"""The training loop: epochs, log, checkpoints, resuming (Section 4.2, Table 6).

A run folder holds ``recipe.yaml``, ``log.jsonl`` (records), ``best/`` and ``last/`` (model folders),
``last/state.pt`` and ``pictures/``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasternet.environment import create_record
from fasternet.records import Record, append_records, load_records
from fasternet.train.classification import create_classification
from fasternet.train.device import select_device, select_precision
from fasternet.train.optim import compute_lr, create_optimizer
from fasternet.train.recipes import Recipe, save_recipe
from fasternet.train.state import load_state, save_state, seed_everything
from fasternet.train.task import Task

GPU_READ_STEPS = 10  # losses are read in groups, as each reading makes a GPU wait


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands, for whoever shows it.

    Attributes:
        epoch: The current epoch, counted from 1.
        num_epochs: Epochs in all.
        step: Steps of this epoch that are done.
        num_steps: Steps of an epoch.
        train_loss: Mean loss of this epoch so far.
        values: The values of the epoch's record once it is written, else None.
    """

    epoch: int
    num_epochs: int
    step: int
    num_steps: int
    train_loss: float
    values: Mapping[str, Any] | None = None


def train(
    model_name: str,
    data: str,
    output: Path,
    *,
    recipe: Recipe,
    resume: bool = False,
    model_options: Mapping[str, Any] | None = None,
    device: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Train a network to classify pictures.

    Args:
        model_name: One of ``list_models()``.
        data: ``digits`` or the root of an ImageFolder tree.
        output: The run folder; without ``resume`` it has to be new or empty.
        recipe: How to train.
        resume: Go on with the run in ``output``. On a CPU it ends bitwise as if it had never stopped.
        model_options: Further arguments of ``create_model``.
        device: ``cpu``, ``cuda`` ..., by default CUDA where there is a device.
        progress: Called every few steps and after each epoch.

    Returns:
        ``output``.

    Raises:
        FileExistsError: ``output`` holds something, and ``resume`` was not asked for.
        FileNotFoundError: There is no run to resume, or no data.
        ValueError: An argument is wrong, the run to resume is another one, or the loss is not finite.
        OSError: The run folder cannot be written; its last checkpoint is intact.
    """
    target = select_device(device)
    recipe = dataclasses.replace(recipe, precision=select_precision(recipe.precision, target))
    check_output(output, resume=resume)
    task = create_classification(model_name, data, recipe=recipe, model_options=model_options or {}, device=target)
    fit(task, output, recipe=recipe, resume=resume, progress=progress)
    return output


def check_output(output: Path, *, resume: bool) -> None:
    """Raise unless a run can start in the folder or, with ``resume``, go on in it."""
    if resume and not (output / "recipe.yaml").is_file():
        raise FileNotFoundError(f"no run to resume in {output}: it has no recipe.yaml")
    if not resume and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} exists already; choose another output, or resume the run in it")


def fit(
    task: Task,
    output: Path,
    *,
    recipe: Recipe,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Train to the end of the recipe, from the start or from the last checkpoint; see ``train``."""
    optimizer = create_optimizer(task.model, recipe)
    num_done, best = _resume(task, optimizer, recipe, output) if resume else _start(task, recipe, output)
    for epoch in range(num_done, recipe.epochs):
        started = time.perf_counter()
        values = _train_epoch(task, optimizer, recipe, epoch, progress)
        task.model.eval()
        with _autocast(task, recipe):
            values |= task.evaluate(task.model)
        values["seconds"] = time.perf_counter() - started
        with _explain_failed_write(output, epoch):
            best = _save_epoch(task, optimizer, output, epoch + 1, values, best)
        if progress:
            steps = task.num_steps
            progress(Progress(epoch + 1, recipe.epochs, steps, steps, values["train_loss"], values))
    with _explain_failed_write(output, recipe.epochs):
        append_records(output / "log.jsonl", task.summarise(output))


def _start(task: Task, recipe: Recipe, output: Path) -> tuple[int, float]:
    append_records(output / "log.jsonl", [_describe_run(task, recipe)])
    save_recipe(output / "recipe.yaml", recipe)  # from here on the run can be resumed
    return 0, -math.inf


def _resume(task: Task, optimizer: torch.optim.Optimizer, recipe: Recipe, output: Path) -> tuple[int, float]:
    """Load the last checkpoint, and cut from the log what was written after it."""
    log, path = output / "log.jsonl", output / "last" / "state.pt"
    records = load_records(log)
    if not records or records[0].kind != "run":
        raise ValueError(f"{log} does not begin with the record of a run: it cannot be resumed")
    _check_same_run(records[0], _describe_run(task, recipe), output)
    num_done, best = 0, -math.inf
    if path.is_file():
        state = load_state(path)
        task.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        num_done, best = state["epoch"], state["best"]
    temporary = output / "log.jsonl.tmp"
    temporary.unlink(missing_ok=True)
    append_records(temporary, [records[0], *(r for r in records if r.condition.get("epoch", math.inf) <= num_done)])
    temporary.replace(log)
    return num_done, best


def _describe_run(task: Task, recipe: Recipe) -> Record:
    condition = {**task.condition, **dataclasses.asdict(recipe)}
    return create_record("train", "run", task.name, condition=condition, values=task.values)


def _check_same_run(old: Record, new: Record, output: Path) -> None:
    """Raise where a run to resume differs from what was asked for in anything that changes its result."""
    facts = [{"model": r.subject, **r.condition, **r.values} for r in (old, new)]
    was, wanted = json.loads(json.dumps(facts))  # as they look once they have been written
    names = [name for name in wanted if name not in ("device", "num_workers") and was.get(name) != wanted[name]]
    if names:
        differences = ", ".join(f"{name}={was.get(name)}, not {wanted[name]}" for name in names)
        raise ValueError(f"the run in {output} has {differences}; it can only be resumed as it was started")


def _train_epoch(
    task: Task,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    epoch: int,
    progress: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    """Train for an epoch, counted from 0, and return its share of the epoch's record."""
    task.model.train()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    read_steps = 1 if task.device.type == "cpu" else GPU_READ_STEPS
    unread: list[Tensor] = []
    total_loss, num_images, started = 0.0, 0, time.perf_counter()
    for step, batch in enumerate(task.batches(epoch)):
        lr = compute_lr(recipe, epoch, step / task.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        seed_everything(recipe.seed, epoch, step)
        with _autocast(task, recipe):
            loss = task.loss(task.model, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(parameters, recipe.clip_grad)
        optimizer.step()
        unread.append(loss.detach())
        num_images += len(batch[0])
        if len(unread) == read_steps or step + 1 == task.num_steps:
            losses = torch.stack(unread).tolist()
            unread.clear()
            _check_finite(losses, recipe, epoch, step + 1)
            total_loss += sum(losses)
            if progress:
                progress(Progress(epoch + 1, recipe.epochs, step + 1, task.num_steps, total_loss / (step + 1)))
    seconds = time.perf_counter() - started
    return {"train_loss": total_loss / (step + 1), "lr": lr, "images_per_second": num_images / seconds}


def _check_finite(losses: list[float], recipe: Recipe, epoch: int, num_steps: int) -> None:
    """Raise where one of the losses is not finite; they are the last ones of ``num_steps`` steps."""
    wrong = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    if not wrong:
        return
    remedies = [f"lr={recipe.lr / 4:g}"]
    remedies += ["clip_grad=1"] if recipe.clip_grad is None or recipe.clip_grad > 1 else []
    remedies += ["precision=fp32"] if recipe.precision != "fp32" else []
    raise ValueError(
        f"the loss became {losses[wrong[0]]} in step {num_steps - len(losses) + wrong[0] + 1} of epoch {epoch + 1}; "
        f"train anew with {' or '.join(remedies)}; the last checkpoint is that of epoch {epoch}"
    )


def _save_epoch(
    task: Task,
    optimizer: torch.optim.Optimizer,
    output: Path,
    num_done: int,
    values: Mapping[str, Any],
    best: float,
) -> float:
    """Write log and checkpoints, the resume state last: whatever is cut off before it is done again."""
    record = create_record("train", "epoch", task.name, condition={"epoch": num_done}, values=values)
    append_records(output / "log.jsonl", [record])
    if values[task.metric] >= best:  # of equal epochs the later one, whose loss is lower as a rule
        best = values[task.metric]
        task.save(output / "best", task.model)
    task.save(output / "last", task.model)
    state = {"model": task.model.state_dict(), "optimizer": optimizer.state_dict()}
    save_state(output / "last" / "state.pt", {**state, "epoch": num_done, "best": best})
    return best


@contextlib.contextmanager
def _explain_failed_write(output: Path, num_done: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = f"the checkpoint of epoch {num_done} is intact" if num_done else "no epoch has been saved"
        raise OSError(f"cannot write to {output}: {error.strerror or error}; {kept}: make room and resume") from error


def _autocast(task: Task, recipe: Recipe) -> torch.autocast:
    return torch.autocast(task.device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
