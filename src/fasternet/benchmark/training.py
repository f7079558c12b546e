"""Speed of training: the data alone, the step alone, both; beside a plain loop over timm's parts, and its script.

What is timed is a stretch: an epoch of the training loop itself over a few batches. It begins with no picture loaded
and ends with none left over, so that no candidate's loader works while another one is timed.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasternet.benchmark.plain_loop import PlainLoop
from fasternet.benchmark.results import check_arguments, describe_failure
from fasternet.data.datasets import ImageDataset
from fasternet.environment import create_record, describe_machine, set_threads
from fasternet.measured import create_ratio_records, describe_latency
from fasternet.models import convert
from fasternet.models.fasternet import FasterNet
from fasternet.records import Record
from fasternet.rivals.network import is_fasternet, resolve_network
from fasternet.timing import Measurement, Track, measure, silent
from fasternet.train.classification import Classification, create_classification
from fasternet.train.device import select_precision
from fasternet.train.loop import Hooks, train_epoch
from fasternet.train.recipe import Recipe
from fasternet.train.run import create_run

SUITE = "training-speed"
NUM_STEPS, NUM_QUICK_STEPS = 12, 6
STEPS_PER_WORKER = 4  # each keeps two batches ready: a shorter stretch would time the filling of the queue
NUM_BLOCKS, NUM_QUICK_BLOCKS = 32, 8
NUM_FIXED_BATCHES = 4
MAX_DIFFERENCE = 1e-5
NUM_COMPARED_STEPS = 2
SCRIPT_TIMEOUT_S = 3600

# What the plain loop does not do, and the value that turns it off.
_OFF = {
    "accumulate": 1,
    "layer_decay": None,
    "mixup": 0.0,
    "cutmix": 0.0,
    "drop_path_rate": 0.0,
    "freeze": 0,
    "batch_norm": "train",
    "teacher": None,
    "compile": False,
    "grad_checkpointing": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch(Classification):
    """A classification whose epoch is what ``source`` gives, and that is not judged.

    Attributes:
        source: Returns the batches of an epoch by its number.
    """

    source: Callable[[int], Iterator[tuple[Tensor, Tensor]]]

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yield what the source gives."""
        return self.source(epoch)

    def evaluate(self, model: torch.nn.Module) -> Mapping[str, Any]:
        """Judge nothing."""
        return {}


def measure_training(
    name: str = "fasternet_t0",
    data: str = "digits",
    *,
    recipe: Recipe,
    device: str = "cpu",
    threads: int = 1,
    timm_script: Path | None = None,
    quick: bool = False,
    seed: int = 0,
    track: Track = silent,
) -> Iterator[Record]:
    """Measure how fast a network is trained, and what limits it.

    Args:
        name: A FasterNet, or one of timm's networks by its name or the paper's.
        data: See ``create_datasets``; packed shards have no pictures that could be picked.
        recipe: How to train; the rate stays at its peak.
        device: ``cpu`` or ``cuda``.
        threads: On the CPU, of the step; the processes that load pictures come on top.
        timm_script: timm's ``train.py``, to be run for an epoch after all else.
        quick: Shorter stretches, and fewer of them.
        seed: Of the pictures picked and the order within rounds.
        track: Shows progress.

    Yields:
        The latencies of a step with its images a second: ``NAME:data``, ``NAME:step``, ``NAME:both`` and
        ``plain:NAME:both``; the A/A control; the ratio of the two loops; and the script's speed as it prints it. A
        plain loop that does not learn the same has an ``error`` and is not timed.

    Raises:
        ValueError: An argument is not one of what is allowed.
        FileNotFoundError: There is no such script, or no data.
    """
    check_arguments(batch_size=recipe.batch_size, device=device)
    if obstacle := find_obstacle(recipe):
        raise ValueError(obstacle)
    builder = _find_builder(name)
    if timm_script is not None and not timm_script.is_file():
        raise FileNotFoundError(f"timm_script {timm_script} is no file")
    recipe = _hold_rate(dataclasses.replace(recipe, precision=select_precision(recipe.precision, torch.device(device))))
    with set_threads(threads, pinned=False) as moment, tempfile.TemporaryDirectory() as folder:
        task = create_classification(name, data, recipe=recipe, model_options={}, device=torch.device(device))
        num_workers = min(recipe.num_workers, describe_machine().cores)
        wanted = max(NUM_QUICK_STEPS if quick else NUM_STEPS, STEPS_PER_WORKER * num_workers)
        train = _select(task, wanted, seed)
        datasets, num_steps = dataclasses.replace(task.datasets, train=train), len(train) // recipe.batch_size
        task = dataclasses.replace(task, datasets=datasets, loaders={}, num_steps=num_steps)
        condition = _describe(task, threads, num_workers)
        pictures = _lay_out(train, Path(folder, "pictures"))
        options: dict[str, Any] = {
            "num_classes": len(task.datasets.class_names),
            "preprocessing": task.preprocessing,
            "num_workers": num_workers,
            "device": task.device,
        }
        plain = PlainLoop(builder, pictures, recipe, **options)
        batches = list(itertools.islice(task.batches(0), NUM_FIXED_BATCHES))
        try:
            fault = _find_difference(task, PlainLoop(builder, pictures, _in_fp32(recipe), **options), batches[0])
        except RuntimeError as error:
            fault = describe_failure(error)
        calls = {f"{task.name}:{part}": call for part, call in _create_calls(task, batches).items()}
        both, rival = f"{task.name}:both", f"plain:{task.name}:both"
        if fault:
            yield create_record(SUITE, "latency", rival, condition=condition, values={"error": fault})
        else:
            calls[rival] = plain.train_epoch
        measured = measure(
            {key: torch.inference_mode(mode=False)(call) for key, call in calls.items()},
            baseline=both if fault else rival,
            num_blocks=NUM_QUICK_BLOCKS if quick else NUM_BLOCKS,
            warmup_s=0.1 if quick else 0.3,
            seed=seed,
            device=device,
            track=track,
        )
        yield from _create_records(_per_step(measured, task.num_steps), condition, moment, None if fault else both)
        if timm_script is not None:
            source = train.root if train.root.is_dir() else pictures  # all training pictures, where they are files
            yield _run_script(timm_script, builder, task, condition, source.resolve(), Path(folder))


def find_obstacle(recipe: Recipe) -> str | None:
    """Return why a recipe cannot be compared with the plain loop, or None."""
    on = [name for name, off in _OFF.items() if getattr(recipe, name) != off]
    told = ", ".join(f"{name}={getattr(recipe, name)}" for name in on)
    off = " ".join(f"--set {name}={str(_OFF[name]).lower()}" for name in on)
    return f"the plain loop has no {told}: turn off what it lacks, {off}" if on else None


def _find_builder(name: str) -> str:
    """Return timm's name of a network.

    Raises:
        ValueError: timm does not have it.
    """
    if is_fasternet(name):
        return name.partition(".")[0]
    rival = resolve_network(name)
    if rival.source != "timm":
        raise ValueError(f"network {name!r} is {rival.source}'s: the plain loop takes those that timm has")
    return rival.builder


def _hold_rate(recipe: Recipe) -> Recipe:
    """Return a recipe whose rate and size of pictures stay what they are at the first epoch after the warm-up."""
    size = recipe.size_of(0)
    return dataclasses.replace(
        recipe, warmup_epochs=0, min_lr=recipe.effective_lr, input_size=size, train_scale=1.0, full_size_epochs=0
    )


def _in_fp32(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, precision="fp32")


def _select(task: Classification, num_steps: int, seed: int) -> ImageDataset:
    """Return training pictures for so many steps at most, drawn by lot."""
    train, batch_size = task.datasets.train, task.recipe.batch_size
    if not isinstance(train, ImageDataset):
        raise ValueError(f"data={task.condition['data']} are packed shards: measure with the folder they were made of")
    if len(train) < batch_size:
        raise ValueError(f"batch_size={batch_size} is more than the {len(train)} training pictures")
    num_steps = min(num_steps, len(train) // batch_size)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    return train.select(sorted(order[: num_steps * batch_size]))


def _lay_out(dataset: ImageDataset, folder: Path) -> Path:
    """Write pictures as they are into a folder per class, for those who read nothing else; classes keep their order."""
    for label in range(len(dataset.class_names)):
        (folder / f"{label:05}").mkdir(parents=True)
    for index, (path, label) in enumerate(zip(dataset.paths, dataset.labels, strict=True)):
        (folder / f"{label:05}" / f"{index:07}{path.suffix or '.png'}").write_bytes(dataset.read(index))
    return folder


def _describe(task: Classification, threads: int, num_workers: int) -> dict[str, Any]:
    recipe = task.recipe
    fields = ("input_size", "batch_size", "precision", "channels_last", "ema_decay", "random_resized_crop")
    chosen = {name: getattr(recipe, name) for name in (*fields, "rand_augment")}
    more = {"device": task.device.type, "threads": threads, "num_workers": num_workers, "num_steps": task.num_steps}
    return {"data": task.condition["data"], **chosen, **more}


def _create_calls(task: Classification, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Callable[[], object]]:
    """Return what is timed, by part."""
    epochs = itertools.count()

    def load() -> None:
        for _ in task.batches(next(epochs)):
            pass

    def repeat(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(itertools.cycle(batches), task.num_steps)

    return {"data": load, "step": _create_training(task, repeat), "both": _create_training(task, task.batches)}


def _create_training(
    task: Classification, source: Callable[[int], Iterator[Any]], num_steps: int | None = None
) -> Callable[[], float]:
    """Return a function that trains a copy of the task's network for an epoch, and returns the mean loss."""
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    changes = {"model": copy.deepcopy(task.model), "num_steps": num_steps or task.num_steps}
    run = create_run(Stretch(**{**fields, **changes}, source=source), task.recipe, Path())

    def train() -> float:
        values = train_epoch(run, Hooks(save_minutes=math.inf))
        run.epoch, run.step, run.loss_sum = run.epoch + 1, 0, 0.0
        return float(values["train_loss"])

    return train


def _find_difference(task: Classification, plain: PlainLoop, batch: tuple[Tensor, Tensor]) -> str | None:
    """Let both loops learn the same batch from the same weights, in fp32.

    Returns:
        None, or how far apart the losses are: the first one shows the network and the loss, the next the step.
    """
    model = task.model
    state = convert.to_format(model, "timm") if isinstance(model, FasterNet) else model.state_dict()
    plain.model.load_state_dict(state)
    task = dataclasses.replace(task, recipe=_in_fp32(task.recipe))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        train = _create_training(task, lambda epoch: iter([batch]), num_steps=1)
        for number in range(1, NUM_COMPARED_STEPS + 1):
            own, other = train(), plain.train_epoch([(task.move(batch[0]), batch[1])])
            # A first step of AdamW is the sign of the gradient: where that is near 0, rounding decides.
            limit = MAX_DIFFERENCE if number == 1 else 100 * MAX_DIFFERENCE
            if not abs(own - other) <= limit * abs(other):
                return f"wrong: loss {own:.6f} against {other:.6f} in step {number} from the same weights"
    return None


def _per_step(measured: Measurement, num_steps: int) -> Measurement:
    samples = {name: [ms / num_steps for ms in found] for name, found in measured.samples_ms.items()}
    return dataclasses.replace(measured, samples_ms=samples, control_ms=[ms / num_steps for ms in measured.control_ms])


def _create_records(
    measured: Measurement, condition: Mapping[str, Any], moment: Mapping[str, Any], compared: str | None
) -> Iterator[Record]:
    for name, samples in measured.samples_ms.items():
        values = describe_latency(measured, name)
        values |= {"images_per_second": 1e3 * condition["batch_size"] / values["latency_ms"], **moment}
        yield create_record(SUITE, "latency", name, condition=condition, values=values, samples={"latency_ms": samples})
    pairs = [(measured.baseline, measured.baseline)] + ([(compared, measured.baseline)] if compared else [])
    yield from create_ratio_records(SUITE, measured, pairs, dict.fromkeys(measured.samples_ms, condition))


def _run_script(
    script: Path, builder: str, task: Classification, condition: Mapping[str, Any], source: Path, folder: Path
) -> Record:
    """Run timm's ``train.py`` for an epoch, and record the mean speed that it prints last."""
    command = [sys.executable, str(script), *_create_options(builder, task, condition, source), "--output", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(condition["threads"])}
    subject = f"{script.name}:{task.name}:both"
    condition = {**condition, "num_steps": None, "interleaved": False}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SCRIPT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return _fail(subject, condition, f"failed: no end after {SCRIPT_TIMEOUT_S} s")
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    speeds = [float(found[1]) for line in lines if (found := re.search(r"Train:.*\(\s*[\d.]+s,\s*([\d.]+)/s\)", line))]
    if done.returncode or not speeds:
        return _fail(subject, condition, f"failed: {(lines or ['it printed nothing'])[-1][-200:]}")
    latency_ms = 1e3 * condition["batch_size"] / speeds[-1]
    values = {"images_per_second": speeds[-1], "latency_ms": latency_ms, "unstable": False}
    remark = "not interleaved: its own process, its start counted"
    samples = {"latency_ms": [latency_ms]}
    return create_record(
        SUITE, "latency", subject, condition=condition, values={**values, "remark": remark}, samples=samples
    )


def _fail(subject: str, condition: Mapping[str, Any], error: str) -> Record:
    return create_record(SUITE, "latency", subject, condition=condition, values={"error": error})


def _create_options(builder: str, task: Classification, condition: Mapping[str, Any], source: Path) -> list[str]:
    """Return the recipe in the words of timm's script."""
    recipe, how = task.recipe, task.preprocessing
    options: dict[str, Any] = {
        **{"--train-split": source.name, "--val-split": source.name, "--model": builder, "--epochs": 1},
        **{"--num-classes": len(task.datasets.class_names), "--batch-size": recipe.batch_size, "--opt": "adamw"},
        **{"--input-size": (3, how.input_size, how.input_size), "--mean": how.mean, "--std": how.std},
        **{"--lr": recipe.effective_lr, "--weight-decay": recipe.weight_decay, "--sched": "none"},
        **{"--smoothing": recipe.label_smoothing, "--scale": recipe.random_resized_crop, "--color-jitter": 0},
        **{"--hflip": 0.5 if recipe.flip else 0, "--train-interpolation": how.interpolation},
        **{"--workers": condition["num_workers"], "--device": task.device.type},
    }
    options |= {"--drop-path": 0} if is_fasternet(builder) else {}
    options |= {} if recipe.clip_grad is None else {"--clip-grad": recipe.clip_grad}
    options |= {} if recipe.rand_augment is None else {"--aa": recipe.rand_augment}
    words = [str(source.parent)]
    for name, value in options.items():
        words += [name, *map(str, value if isinstance(value, tuple | list) else [value])]
    words += ["--channels-last"] if recipe.channels_last else []
    if recipe.ema_decay is not None:
        words += ["--model-ema", "--model-ema-warmup", "--model-ema-decay", str(recipe.ema_decay)]
    if recipe.precision != "fp32":
        words += ["--amp", "--amp-dtype", {"bf16": "bfloat16", "fp16": "float16"}[recipe.precision]]
    return words
