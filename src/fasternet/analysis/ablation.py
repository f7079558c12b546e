"""The ablation of Table 5 on small data: every variant trained alike, seed by seed.

All variants of a seed see the same pictures in the same order with the same augmentation, so that differences may be
taken seed by seed. The accuracy is that of the last epoch: none is chosen by the pictures that judge it.
Legend: N pictures of S x S pixels.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms

from fasternet.analysis.reference import hash_pictures
from fasternet.analysis.variants import SIZES, choose_variants, create_variant, summarize_variant
from fasternet.data.datasets import ImageDataset, create_datasets
from fasternet.data.transforms import LimitAspect, normalize_batch
from fasternet.environment import create_record
from fasternet.models.checkpoint import Preprocessing
from fasternet.records import Record, load_records
from fasternet.timing import Track, silent
from fasternet.train.device import select_device, select_precision
from fasternet.train.evaluate import evaluate
from fasternet.train.loop import autocast, fit
from fasternet.train.recipe import Recipe
from fasternet.train.state import seed_everything
from fasternet.train.task import Task

Say = Callable[[str], object]
Pictures = tuple[Tensor, Tensor]  # (N, 3, S, S) of bytes, labels (N,)

PREPROCESSING = Preprocessing(crop_ratio=1.0)
PAD_SHARE = 1 / 8  # of the side: how far a training crop may be shifted


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a size is trained by default: the recipe, and how many pictures at most."""

    recipe: Recipe
    num_train: int
    num_validation: int


_RECIPE = Recipe(
    epochs=12,
    batch_size=128,
    lr=4e-3,
    warmup_epochs=1,
    weight_decay=0.05,
    flip=True,
    input_size=SIZES["small"].input_size,
    random_resized_crop=(1.0, 1.0),  # whole pictures, which are shifted instead
    precision="fp32",
)
_FULL_RECIPE = dataclasses.replace(
    _RECIPE, epochs=60, batch_size=256, lr=1e-3, warmup_epochs=4, input_size=SIZES["full"].input_size, precision="auto"
)

PLANS: Mapping[str, Plan] = MappingProxyType(
    {
        # Half a minute a run on two cores, which brings the base from 10 to 45 % on ten classes. 8000 pictures
        # for 6 epochs gave 43.5 %, 6000 for 8 at batch 64 and rate 3e-3 45.1 % in more time (one seed each).
        "small": Plan(_RECIPE, num_train=4000, num_validation=2000),
        # For a GPU; it has never been run. The pictures lie in memory as bytes, 150 kB each.
        "full": Plan(_FULL_RECIPE, num_train=50_000, num_validation=10_000),
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Study(Task):
    """Classification of pictures in memory; nothing is kept but the trained network and the log of its epochs."""

    recipe: Recipe
    pictures: Pictures

    def batches(self, epoch: int, start: int = 0) -> Iterator[Pictures]:
        """Yield the steps of an epoch, shuffled, flipped and shifted as seed and epoch say."""
        images, labels = self.pictures
        drawn = torch.Generator().manual_seed((self.recipe.seed << 16 | epoch) % 2**63)
        order = torch.randperm(len(images), generator=drawn)
        for part in torch.split(order, self.recipe.batch_size)[: self.num_steps]:
            yield _augment(images[part], drawn), labels[part]

    def loss(self, model: nn.Module, batch: Pictures) -> Tensor:
        """Return the cross-entropy with smoothed labels."""
        logits = model(_prepare(batch[0], self.device))
        return F.cross_entropy(logits.float(), batch[1].to(self.device), label_smoothing=self.recipe.label_smoothing)

    def evaluate(self, model: nn.Module) -> Mapping[str, Any]:
        """Judge no epoch: the last one counts, and is judged once."""
        return {}

    def save(self, folder: Path, model: Any, values: Mapping[str, Any]) -> None:
        """Keep nothing: the folder is temporary."""

    def summarise(self, output: Path) -> list[Record]:
        """Add nothing to the log."""
        return []


def measure_ablation(
    folder: str | Path,
    *,
    data: str,
    size: str = "small",
    variants: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int | None = None,
    num_train: int | None = None,
    num_validation: int | None = None,
    known: Iterable[Record] = (),
    track: Track = silent,
    say: Say = lambda _: None,
    device: str | None = None,
) -> Iterator[Record]:
    """Train every variant with every seed, and judge it by validation pictures.

    Args:
        folder: See ``create_datasets``; not packed shards.
        data: What the records call the pictures.
        size: ``small`` (width 16, depths 1-1-2-1, 64 px; for two cores) or ``full`` (T0, 224 px; for a GPU).
        variants: Of ``VARIANTS``; None takes all, and the base is always among them.
        seeds: Each decides weights, order and augmentation; they are paired over the variants.
        epochs: None takes those of ``PLANS``.
        num_train: Training pictures at most, the same number of each class; None takes that of ``PLANS``.
        num_validation: Validation pictures, likewise.
        known: Records of an interrupted run; what they cover is not trained again.
        track: Shows progress over the runs.
        say: Takes a sentence about each run.
        device: Where to train; None: CUDA where there is a device.

    Yields:
        A record of each run as soon as it ends, all variants of the first seed first.

    Raises:
        ValueError: An argument is wrong, or a picture cannot be read; the message says what is allowed.
        FileNotFoundError: There is no such data.
    """
    labels, plan, target = choose_variants(variants, size), PLANS[size], select_device(device)
    recipe = dataclasses.replace(
        plan.recipe,
        epochs=plan.recipe.epochs if epochs is None else epochs,
        precision=select_precision(plan.recipe.precision, target),
    )
    datasets = create_datasets(folder)
    train = _select(datasets.train, plan.num_train if num_train is None else num_train, "num_train")
    validation = _select(
        datasets.validation, plan.num_validation if num_validation is None else num_validation, "num_validation"
    )
    condition = {
        "size": size,
        "data": data,
        **{name: getattr(recipe, name) for name in ("epochs", "batch_size", "lr", "input_size", "precision")},
        "num_train": len(train),
        "num_validation": len(validation),
        "pictures_hash": hash_pictures([*train.paths, *validation.paths]),
    }
    covered = [(r.subject, dict(r.condition)) for r in known if (r.suite, r.kind) == ("ablation", "study")]
    runs = itertools.product([dataclasses.replace(recipe, seed=seed) for seed in seeds], labels)
    missing = [(own, label) for own, label in runs if (label, {**condition, "seed": own.seed}) not in covered]
    if not missing:
        return
    say(f"{len(missing)} runs of {recipe.epochs} epochs on {len(train)} pictures of {recipe.input_size} pixels")
    pictures = [_load(part, recipe.input_size) for part in (train, validation)]
    spent = 0.0
    for number, (own, label) in enumerate(track(missing, len(missing), "ablation"), start=1):
        values = _train(label, size, datasets.class_names, pictures, own, target)
        spent += values["seconds"]
        left = f"{spent / number * (len(missing) - number) / 60:.1f} min left"
        say(f"{label}, seed {own.seed}: top-1 {values['top1']:.1f} % after {values['seconds']:.0f} s, {left}")
        yield create_record("ablation", "study", label, condition={**condition, "seed": own.seed}, values=values)


def _select(dataset: Any, count: int, name: str) -> ImageDataset:
    """Return ``count`` pictures at most, as many of each class as of any other, drawn by the classes' names alone."""
    if not isinstance(dataset, ImageDataset):
        raise ValueError("data must be a folder of pictures per class: the ablation does not read packed shards")
    num_classes = len(dataset.class_names)
    if count < num_classes:
        raise ValueError(f"{name} must be at least {num_classes}, a picture of each class, got {count}")
    members: list[list[int]] = [[] for _ in range(num_classes)]
    for index, label in enumerate(dataset.labels):
        members[label].append(index)
    for class_name, indices in zip(dataset.class_names, members, strict=True):
        random.Random(class_name).shuffle(indices)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*members))
    chosen = itertools.islice((index for index in turns if index is not None), count)
    return dataset.select(sorted(chosen))


def _load(dataset: ImageDataset, input_size: int) -> Pictures:
    """Read pictures once, the shorter side resized and the centre kept, as bytes (N, 3, S, S)."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(input_size, bicubic), transforms.CenterCrop(input_size), transforms.PILToTensor()]
    dataset.transform = transforms.Compose([LimitAspect(), *steps])
    images = torch.empty(len(dataset), 3, input_size, input_size, dtype=torch.uint8)
    for index in range(len(dataset)):
        images[index] = dataset[index][0]
    return images, torch.tensor(dataset.labels)


def _train(
    label: str,
    size: str,
    class_names: Sequence[str],
    pictures: Sequence[Pictures],
    recipe: Recipe,
    device: torch.device,
) -> dict[str, Any]:
    """Train one variant with one seed and return the values of its record."""
    started = time.perf_counter()
    train, validation = pictures
    seed_everything(recipe.seed)
    model = create_variant(label, size=size, num_classes=len(class_names))
    described = summarize_variant(label, model, size=size)
    task = _Study(
        name=label,
        model=model.to(device).to(memory_format=torch.channels_last),
        device=device,
        condition={},
        values={},
        num_steps=max(1, len(train[0]) // recipe.batch_size),
        metric="train_loss",
        recipe=recipe,
        pictures=train,
    )
    with tempfile.TemporaryDirectory() as folder:
        fit(task, Path(folder), recipe=recipe)
        last = load_records(Path(folder, "log.jsonl"))[-1]
    model.eval()
    with autocast(task, recipe):
        result = evaluate(
            lambda images: model(_prepare(images, device)),
            zip(*(torch.split(part, recipe.batch_size) for part in validation), strict=True),
            class_names=class_names,
        )
    return {
        **described,
        "top1": result.top1,
        "validation_loss": result.loss,
        "train_loss": last.values["train_loss"],
        "seconds": time.perf_counter() - started,
    }


def _augment(images: Tensor, drawn: torch.Generator) -> Tensor:
    """Mirror half of the pictures and shift each by up to an eighth, with black where nothing is left."""
    count, side = len(images), images.shape[-1]
    pad = int(PAD_SHARE * side)
    flipped = torch.rand(count, 1, 1, 1, generator=drawn) < 0.5
    images = F.pad(torch.where(flipped, images.flip(-1), images), [pad] * 4)  # (N, 3, S + 2 pad, S + 2 pad)
    corners = torch.randint(2 * pad + 1, (count, 2), generator=drawn).tolist()
    parts = [image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners, strict=True)]
    return torch.stack(parts)  # (N, 3, S, S)


def _prepare(images: Tensor, device: torch.device) -> Tensor:
    return normalize_batch(images.to(device), PREPROCESSING).to(memory_format=torch.channels_last)
