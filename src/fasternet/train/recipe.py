"""A recipe: every number that a training run depends on, as checked data on disk (the fields of Tables 6 and 7)."""

from __future__ import annotations

import abc
import dataclasses
import difflib
import functools
import math
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from fasternet.models.checkpoint import write_atomically
from fasternet.train.fields import describe_type, has_type, parse_value

R = TypeVar("R", bound="BaseRecipe")
Bounds = Mapping[str, tuple[float, float]]
TINY = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseRecipe(abc.ABC):
    """What every run depends on, whatever it trains; the loop reads nothing else.

    Attributes:
        epochs: Passes over the training pictures.
        batch_size: Pictures of one step of the optimizer, over all processes and parts; even where they are mixed.
        accumulate: Parts that each process computes a step in, one after the other, to save memory.
        lr: Learning rate at its peak.
        lr_batch_size: Batch that ``lr`` is meant for: the rate grows and falls with ``batch_size``. None: it does not.
        layer_decay: Factor of the rate from each layer to the one below it, for fine-tuning; None: one rate for all.
        weight_decay: AdamW's, on every parameter as in the published training.
        clip_grad: Largest norm of the gradient, or None.
        ema_decay: Decay a step of the moving average of the weights, which is evaluated and saved; None: no average.
        freeze: Stages, from the first, that stay as they are, the embedding with them.
        batch_norm: Its statistics are those of a part (``train``), of all processes' parts (``sync``: GPUs), or the
            stored ones, which then stay (``frozen``).
        flip: Mirror half of the training pictures.
        precision: ``fp32``, ``bf16``, ``fp16`` (autocast), or ``auto``: bf16 where the device has it, fp16 on other
            GPUs.
        channels_last: Keep activations in NHWC order.
        compile: Let torch.compile make the network's kernels.
        grad_checkpointing: Compute activations again in the backward pass instead of keeping them.
        num_workers: Processes that load pictures, at most one a core; the result does not depend on it.
        max_unreadable: Training pictures that cannot be read, over the whole run, before it stops.
        rollbacks: How often a loss that is not finite sends the run back to its last state, at half the rate.
        seed: Of the weights, the order, the augmentation and the mixing.
    """

    epochs: int
    batch_size: int
    accumulate: int = 1
    lr: float
    lr_batch_size: int | None = None
    layer_decay: float | None = None
    weight_decay: float
    clip_grad: float | None = 1.0
    ema_decay: float | None = None
    freeze: int = 0
    batch_norm: Literal["train", "sync", "frozen"] = "train"
    flip: bool
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: bool = True
    compile: bool = False
    grad_checkpointing: bool = False
    num_workers: int = 0
    max_unreadable: int = 10
    rollbacks: int = 0
    seed: int = 0

    BOUNDS: ClassVar[Bounds] = MappingProxyType(
        {
            "epochs": (1, math.inf),
            "batch_size": (1, math.inf),
            "accumulate": (1, math.inf),
            "lr": (TINY, 100.0),
            "lr_batch_size": (1, math.inf),
            "layer_decay": (TINY, 1.0),
            "weight_decay": (0.0, 100.0),
            "clip_grad": (TINY, 1e6),
            "ema_decay": (0.0, 1.0),
            "freeze": (0, 4),
            "num_workers": (0, 1024),
            "max_unreadable": (0, math.inf),
            "rollbacks": (0, 100),
            "seed": (0, 2**63 - 1),
        }
    )

    def __post_init__(self) -> None:
        for name, hint in find_hints(type(self)).items():
            if not has_type(getattr(self, name), hint):
                raise ValueError(f"recipe field {name}={getattr(self, name)!r} must be {describe_type(hint)}")
        for name, (low, high) in self.BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                allowed = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise ValueError(f"recipe field {name}={value} must be {allowed}")

    @property
    def effective_lr(self) -> float:
        """Peak of the learning rate at this batch size."""
        return self.lr * self.batch_size / (self.lr_batch_size or self.batch_size)

    def describe_shortfalls(self, num_steps: int) -> list[str]:
        """Return a sentence for each part of the recipe that is never reached: the peak of the rate.

        Args:
            num_steps: Steps of an epoch.
        """
        positions = range(num_steps - 1, -1, -max(1, num_steps // 100))
        highest = max(self.compute_lr(e, s / num_steps, num_steps) for e in range(self.epochs) for s in positions)
        if highest > 0.9 * self.effective_lr:  # a warm-up by steps ends a little below a peak of the cosine
            return []
        return [f"with this warm-up and epochs={self.epochs} the rate reaches {highest:.3g} at most"]

    @abc.abstractmethod
    def compute_lr(self, epoch: int, done: float = 0.0, num_steps: int = 1) -> float:
        """Return the learning rate.

        Args:
            epoch: Counted from 0.
            done: Share of this epoch's steps that lie behind.
            num_steps: Steps of an epoch.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """How a classifier is trained; the run folder's ``recipe.yaml`` holds exactly these fields and those of its base.

    Attributes:
        min_lr: Learning rate at the end of the cosine.
        warmup_lr: Learning rate that the linear warm-up starts from.
        warmup_epochs: Length of the warm-up.
        lr_schedule: The rate changes every ``step``, or every ``epoch`` as in the paper.
        label_smoothing: Share of the target that is spread over all classes.
        mixup: Alpha of mixup; 0 turns it off.
        cutmix: Alpha of cutmix; 0 turns it off. With both on, a batch gets either with equal chance.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        teacher: Network to distil: a model or run folder, or a name of timm's for its published weights; or None.
        distillation: Learn the teacher's probabilities (``soft``) or its decision (``hard``), as DeiT does.
        distillation_alpha: Weight of the teacher's part of the loss.
        distillation_tau: Temperature of ``soft``.
        input_size: Side of the pictures that the network sees, in pixels.
        train_scale: Their side in training until the last ``full_size_epochs``, as a share of ``input_size``; 32 pixels
            at least.
        full_size_epochs: Epochs at the end that train at ``input_size``.
        crop_ratio: In evaluation the central share of the resized picture that is kept.
        random_resized_crop: Smallest and largest area of the random crop in training.
        rand_augment: RandAugment as timm spells it, for example ``rand-m3-mstd0.5-inc1``, or None.
        skip_unreadable: Leave validation pictures that cannot be read out, and name them; else the first is an error.
    """

    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_epochs: int
    lr_schedule: Literal["step", "epoch"] = "step"
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    drop_path_rate: float = 0.0
    teacher: str | None = None
    distillation: Literal["soft", "hard"] = "soft"
    distillation_alpha: float = 0.5
    distillation_tau: float = 1.0
    input_size: int
    train_scale: float = 1.0
    full_size_epochs: int = 0
    crop_ratio: float = 0.9
    random_resized_crop: tuple[float, float]
    rand_augment: str | None = None
    skip_unreadable: bool = False

    BOUNDS: ClassVar[Bounds] = MappingProxyType(
        {
            **BaseRecipe.BOUNDS,
            "batch_size": (2, math.inf),
            "min_lr": (0.0, 100.0),
            "warmup_lr": (0.0, 100.0),
            "warmup_epochs": (0, math.inf),
            "label_smoothing": (0.0, 0.99),
            "mixup": (0.0, 100.0),
            "cutmix": (0.0, 100.0),
            "drop_path_rate": (0.0, 0.99),
            "distillation_alpha": (0.0, 1.0),
            "distillation_tau": (TINY, 100.0),
            "input_size": (1, 16384),
            "train_scale": (TINY, 1.0),
            "full_size_epochs": (0, math.inf),
            "crop_ratio": (0.05, 1.0),
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        smallest, largest = self.random_resized_crop
        if not 0 < smallest <= largest <= 1:
            raise ValueError(f"recipe field random_resized_crop={smallest},{largest} must rise within (0, 1]")
        if self.batch_size % 2 and (self.mixup or self.cutmix):
            raise ValueError(f"recipe field batch_size={self.batch_size} must be even for mixup and cutmix")
        if self.rand_augment is not None and not re.match(r"rand-m(\d|10)(-|$)", self.rand_augment):
            raise ValueError(
                f"recipe field rand_augment={self.rand_augment} must begin with rand-m and a whole number from 0 to 10"
            )

    def size_of(self, epoch: int) -> int:
        """Return the side of the training pictures of an epoch, counted from 0."""
        late = epoch >= self.epochs - self.full_size_epochs
        return self.input_size if late else max(round(self.input_size * self.train_scale), min(self.input_size, 32))

    def describe_shortfalls(self, num_steps: int) -> list[str]:
        """Return a sentence for each part of the recipe that is never reached: the peak, the smaller pictures."""
        sentences = super().describe_shortfalls(num_steps)
        size = self.size_of(self.epochs - self.full_size_epochs - 1)
        if self.full_size_epochs >= self.epochs and size < self.input_size:
            sentences.append(f"full_size_epochs={self.full_size_epochs} is the whole run: no epoch trains at {size} px")
        return sentences

    def compute_lr(self, epoch: int, done: float = 0.0, num_steps: int = 1) -> float:
        """Return the rate of Table 6: a linear warm-up, then half a cosine; of an ``epoch`` schedule, an epoch's."""
        del num_steps  # lengths are in epochs
        peak = self.effective_lr
        if self.lr_schedule == "epoch":  # the published one: the last warm-up epoch already runs at the peak
            position, ramp = float(epoch), max(self.warmup_epochs - 1, 0)
        else:
            position, ramp = epoch + done, self.warmup_epochs
        if position < ramp:
            return self.warmup_lr + (peak - self.warmup_lr) * position / ramp
        length = max(self.epochs - self.warmup_epochs, 1)
        position = min(max(position - self.warmup_epochs, 0.0), length)
        return self.min_lr + (peak - self.min_lr) * (1 + math.cos(math.pi * position / length)) / 2


@functools.cache
def find_hints(kind: type[BaseRecipe]) -> Mapping[str, Any]:
    """Return the fields of a kind of recipe with their annotations."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def parse_overrides(recipe: R, overrides: Iterable[str]) -> R:
    """Change fields of a recipe from text.

    Args:
        recipe: The recipe to start from; it stays as it is.
        overrides: Each ``field=value``; ``none`` where the field allows it, two numbers as ``0.3,1``.

    Raises:
        ValueError: A field does not exist (near names are offered), its value has another type or range, or it is given
            twice with different values.
    """
    changes: dict[str, Any] = {}
    hints = find_hints(type(recipe))
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"recipe change {override!r} must read field=value")
        if name not in hints:
            raise ValueError(_unknown_field(name, hints))
        try:
            value = parse_value(text, hints[name])
        except ValueError as error:
            raise ValueError(f"recipe field {name}={text} {error}") from None
        if changes.setdefault(name, value) != value:
            raise ValueError(f"recipe field {name} is given twice, as {changes[name]} and as {value}: leave one out")
    return dataclasses.replace(recipe, **changes)


def save_recipe(path: Path, recipe: BaseRecipe) -> None:
    """Write a recipe as YAML, atomically."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(recipe).items()
    }
    text = yaml.safe_dump(fields, sort_keys=False)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_recipe(path: Path, kind: type[R]) -> R:
    """Read what ``save_recipe`` wrote.

    Args:
        path: The file.
        kind: What it holds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a recipe; the message names the field.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no fields")
        if unknown := [name for name in content if name not in (hints := find_hints(kind))]:
            raise ValueError(_unknown_field(str(unknown[0]), hints))
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        return kind(**fields)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a recipe: {' '.join(str(error).split())}") from None


def _unknown_field(name: str, hints: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, hints, n=3)
    return f"recipe has no field {name!r}; " + (
        f"did you mean {' or '.join(near)}?" if near else f"its fields are {', '.join(hints)}"
    )
