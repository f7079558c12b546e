"""Classification as a task: pictures with labels, cross-entropy with mixup and cutmix, top-1 (Section 4.2)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from fasternet.data.datasets import Datasets, ImageDataset, create_datasets
from fasternet.data.images import ImageError
from fasternet.data.loaders import TrainingLoader, create_loader
from fasternet.data.shards import ShardLoader, ShardStream
from fasternet.data.transforms import create_transform, normalize_batch
from fasternet.environment import create_record, describe_machine
from fasternet.models.checkpoint import Preprocessing
from fasternet.models.fasternet import FasterNet
from fasternet.records import Record
from fasternet.rivals import create_network, load_network, save_network
from fasternet.rivals.network import is_fasternet, resolve_network
from fasternet.train.distill import compute_distillation, create_teacher
from fasternet.train.distributed import World, gather
from fasternet.train.evaluate import Evaluation, evaluate
from fasternet.train.loop import Hooks, train_task
from fasternet.train.optim import freeze_stages, synchronize_batch_norm
from fasternet.train.recipe import Recipe
from fasternet.train.run import Say, find_options
from fasternet.train.state import seed_everything
from fasternet.train.task import Task

NUM_PICTURES = 24  # drawn by lot, and as many of the worst mistakes, for the sheets that end a run
THUMBNAIL_SIZE = 160  # pixels

Loader = TrainingLoader | ShardLoader


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Tell the class of a picture.

    Attributes:
        recipe: How to train.
        datasets: The pictures.
        preprocessing: What evaluation does to a picture; it goes into the model folder.
        mixup: Mixes the pictures of a batch and their labels, or None.
        teacher: The network to distil, or None.
        loaders: The loader of the current size of training pictures, by that size.
    """

    recipe: Recipe
    datasets: Datasets
    preprocessing: Preprocessing
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    teacher: nn.Module | None
    loaders: dict[int, Loader] = dataclasses.field(default_factory=dict)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yield the shuffled, augmented parts of an epoch."""
        return self.loader(epoch).batches(epoch, start)

    def names(self, epoch: int, step: int) -> Sequence[str]:
        """Return the names of the pictures of a step."""
        return self.loader(epoch).names(epoch, step)

    def describe_resume(self, start: int) -> str | None:
        """Return a sentence where the data cannot go on exactly at step ``start``."""
        return self.loader(0).describe_resume(start)

    def loader(self, epoch: int) -> Loader:
        """Return the loader for the size of an epoch's pictures; it lives until the size changes."""
        size = self.recipe.size_of(epoch)
        if size not in self.loaders:
            self.loaders.clear()
            self.loaders[size] = self._create_loader(size)
        return self.loaders[size]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy with smoothed and, where the recipe says so, mixed labels and a teacher."""
        images, targets = self.move(batch[0]), batch[1].to(self.device, non_blocking=True)
        if self.mixup and len(images) > 1:
            even = len(images) // 2 * 2
            images, targets = self.mixup(images[:even], targets[:even])
        logits = model(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=self.recipe.label_smoothing)
        if self.teacher is None:
            return loss
        return compute_distillation(self.recipe, loss, logits, self.teacher(images))

    def evaluate(self, model: nn.Module) -> Mapping[str, Any]:
        """Return top-1, top-5 and loss on the validation pictures."""
        try:
            result = self._evaluate(model)
        except ImageError as error:
            raise ImageError(
                f"{error}; it is a validation picture: mend it and resume, or resume with --set skip_unreadable=true"
            ) from None
        return {"validation_loss": result.loss, "top1": result.top1, "top5": result.top5}

    def save(self, folder: Path, model: nn.Module, values: Mapping[str, Any]) -> None:
        """Write weights, class names, preprocessing, recipe and metrics."""
        metrics = {name: values[name] for name in ("top1", "top5", "validation_loss") if name in values}
        save_network(
            folder,
            model,
            name=self.name,
            class_names=self.datasets.class_names,
            preprocessing=self.preprocessing,
            facts={"recipe": dataclasses.asdict(self.recipe), "metrics": metrics, "data": self.condition["data"]},
        )

    def summarise(self, output: Path) -> list[Record]:
        """Evaluate the best checkpoint as it is on the disk, in fp32, and lay out sheets of its predictions."""
        model = load_network(output / "best").model.to(self.device).eval()
        result = self._evaluate(model)
        record = create_record("train", "evaluation", self.name, condition=self.condition, values=result.values())
        return [record, *self._create_sheets(result, output)] if self.world.is_main else []

    def move(self, images: Tensor) -> Tensor:
        """Return pictures on the device, in the recipe's memory format, normalized where they come as bytes."""
        images = images.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:  # before NHWC, where a value a channel is an inner loop of three
            images = normalize_batch(images, self.preprocessing)
        return images.to(memory_format=torch.channels_last) if self.recipe.channels_last else images

    def _create_loader(self, size: int) -> Loader:
        recipe, dataset = self.recipe, self.datasets.train
        dataset.transform = create_transform(
            dataclasses.replace(self.preprocessing, input_size=size),
            training=True,
            random_resized_crop=recipe.random_resized_crop,
            flip=recipe.flip,
            rand_augment=recipe.rand_augment,
            normalize=False,
        )
        options: dict[str, Any] = {
            "num_workers": recipe.num_workers,
            "seed": recipe.seed,
            "rank": self.world.rank,
            "world_size": self.world.size,
            "accumulate": recipe.accumulate,
            "on_error": self.unreadable.append,
        }
        if isinstance(dataset, ShardStream):
            return ShardLoader(dataset, recipe.batch_size, **options)
        return TrainingLoader(dataset, recipe.batch_size, **options)

    def _evaluate(self, model: nn.Module) -> Evaluation:
        recipe, validation, world = self.recipe, self.datasets.validation, self.world
        loader = create_loader(
            validation,
            max(1, recipe.batch_size // (world.size * recipe.accumulate)),
            num_workers=recipe.num_workers,
            rank=world.rank,
            world_size=world.size,
        )
        names = validation.class_names
        return evaluate(lambda images: model(self.move(images)), loader, class_names=names, world=world)

    def _create_sheets(self, result: Evaluation, output: Path) -> list[Record]:
        """Save thumbnails of the worst mistakes and of pictures drawn by lot, and record what was predicted."""
        wrong = (result.labels[:, 0] != result.truths).nonzero().flatten().tolist()
        wrong.sort(key=lambda index: -float(result.losses[index]))
        count = len(self.datasets.validation)
        lot = random.Random(0).sample(range(count), min(NUM_PICTURES, count))
        (output / "pictures").mkdir(exist_ok=True)
        chosen = [("mistake", index) for index in wrong[:NUM_PICTURES]] + [("lot", index) for index in lot]
        return [
            self._describe_prediction(result, index, role, output, f"pictures/{number:02}.png")
            for number, (role, index) in enumerate(chosen)
        ]

    def _describe_prediction(self, result: Evaluation, index: int, role: str, output: Path, picture: str) -> Record:
        validation, names = self.datasets.validation, self.datasets.class_names
        image = validation.load(index).copy()
        image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
        image.save(output / picture)
        labels, probabilities = result.labels[index].tolist(), result.probabilities[index].tolist()
        truth = validation.labels[index]
        values = {
            "role": role,
            "label": names[labels[0]],
            "probability": probabilities[0],
            "top": [[names[label], p] for label, p in zip(labels, probabilities, strict=True)],
            "truth": names[truth],
            "loss": float(result.losses[index]),
        }
        subject = validation.paths[index].as_posix()
        return create_record("train", "prediction", subject, values=values, attachments={"picture": picture})


def train(
    model_name: str,
    data: str,
    output: Path,
    *,
    recipe: Recipe,
    resume: bool = False,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    model_options: Mapping[str, Any] | None = None,
    device: str | None = None,
    hooks: Hooks | None = None,
) -> Path:
    """Train a network to classify pictures; see ``train_task`` for what else is said, returned and raised.

    Args:
        model_name: One of ``list_models()``, or another network that ``rivals.create_network`` knows.
        data: See ``create_datasets``.
        output: The run folder.
        recipe: How to train.
        resume: Go on with the run in ``output``.
        checkpoint: Weights to start from: a model folder, a run folder or a weights file; the classifier is fresh where
            they have another number of classes.
        pretrained: Start from the published weights instead.
        model_options: Further arguments of ``create_network``.
        device: Where to compute.
        hooks: What the run tells and asks while it goes on.
    """
    options = find_options(model_name, model_options, checkpoint, run=output if resume else None, key="model_options")

    def create(recipe: Recipe, target: torch.device, world: World, fresh: bool) -> Classification:
        return create_classification(
            model_name,
            data,
            recipe=recipe,
            model_options=options,
            device=target,
            world=world,
            checkpoint=checkpoint if fresh else None,
            pretrained=pretrained and fresh,
            say=hooks.say if hooks else lambda _: None,
        )

    begins_with = checkpoint or pretrained
    return train_task(create, output, recipe=recipe, resume=resume, begins_with=begins_with, device=device, hooks=hooks)


def create_classification(
    model_name: str,
    data: str,
    *,
    recipe: Recipe,
    model_options: Mapping[str, Any],
    device: torch.device,
    world: World | None = None,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    say: Say = lambda _: None,
) -> Classification:
    """Open the pictures and make the network; see ``train`` for the arguments."""
    world = world or World()
    datasets = create_datasets(data)
    if recipe.skip_unreadable:
        datasets = dataclasses.replace(datasets, validation=_keep_readable(datasets.validation, world, say))
    num_classes = len(datasets.class_names)
    preprocessing = dataclasses.replace(
        datasets.preprocessing_defaults, input_size=recipe.input_size, crop_ratio=recipe.crop_ratio
    )
    datasets.validation.transform = create_transform(preprocessing, training=False)
    model = _create_model(model_name, recipe, {**model_options, "num_classes": num_classes}, checkpoint, pretrained)
    _check_sizes(model, model_name, recipe, len(preprocessing.mean))
    model = model.to(device)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    teacher = create_teacher(recipe, datasets.class_names, preprocessing)
    mixed = recipe.mixup or recipe.cutmix
    task = Classification(
        name=model_name.partition(".")[0] if is_fasternet(model_name) else resolve_network(model_name).name,
        model=model,
        device=device,
        condition={
            "data": Path(data).name,
            "device": device.type,
            "model_options": dict(model_options),
            "initial_weights": checkpoint.resolve().name if checkpoint else "published" if pretrained else None,
        },
        values={
            "num_params": sum(parameter.numel() for parameter in model.parameters()),
            "num_train": len(datasets.train),
            "num_validation": len(datasets.validation),
            "num_classes": num_classes,
        },
        num_steps=0,
        metric="top1",
        world=world,
        recipe=recipe,
        datasets=datasets,
        preprocessing=preprocessing,
        # Labels are smoothed in the loss, mixed or not.
        mixup=Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=num_classes) if mixed else None,
        teacher=None if teacher is None else teacher.to(device),
    )
    return dataclasses.replace(task, num_steps=task.loader(0).num_steps)


def _keep_readable(dataset: ImageDataset, world: World, say: Say) -> ImageDataset:
    """Return the pictures that can be read, and name the others."""

    def find_error(index: int) -> tuple[int, str] | None:
        try:
            dataset.load(index)
        except ImageError as error:
            return index, str(error)
        return None

    with ThreadPoolExecutor(describe_machine().cores) as pool:
        own = list(filter(None, pool.map(find_error, range(world.rank, len(dataset), world.size))))
    errors = dict(error for share in gather(world, own) for error in share)
    for error in errors.values() if world.is_main else ():
        say(f"{error}; the validation goes on without it")
    return dataset.select([index for index in range(len(dataset)) if index not in errors]) if errors else dataset


def _create_model(
    name: str, recipe: Recipe, options: dict[str, Any], checkpoint: Path | None, pretrained: bool
) -> nn.Module:
    seed_everything(recipe.seed)
    if recipe.drop_path_rate:
        options["drop_path_rate"] = recipe.drop_path_rate
    model = create_network(name, checkpoint_path=checkpoint, pretrained=pretrained, **options)
    freeze_stages(model, recipe.freeze)
    if recipe.grad_checkpointing:
        _checkpoint_gradients(model, name)
    return synchronize_batch_norm(model) if recipe.batch_norm == "sync" else model


def _check_sizes(model: nn.Module, name: str, recipe: Recipe, channels: int) -> None:
    """Refuse pictures of a size that the network does not take.

    Raises:
        ValueError: It does not take one of the recipe's sizes.
    """
    model.eval()
    for size in sorted({recipe.input_size, *map(recipe.size_of, range(recipe.epochs))}):
        try:
            with torch.no_grad():
                model(torch.zeros(1, channels, size, size))
        except Exception as error:  # each network has its own
            field = f"recipe field input_size={recipe.input_size}"
            raise ValueError(f"{field}: {name} cannot take pictures of {size} pixels: {error}") from None
    model.train()


def _checkpoint_gradients(model: nn.Module, name: str) -> None:
    """Let a network compute its activations anew in the backward pass.

    Raises:
        ValueError: It cannot, or its BN would take the statistics of each batch twice.
    """
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    try:
        if has_batch_norm and not isinstance(model, FasterNet):
            raise AttributeError
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise ValueError(
            f"recipe field grad_checkpointing=true is not for {name}: it is for FasterNet and for networks of timm "
            "without BN that can compute anew"
        ) from None
