"""Classification as a task: folders of pictures, cross-entropy with mixup and cutmix, top-1 (Section 4.2)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from fasternet.data.datasets import Datasets, create_datasets
from fasternet.data.loaders import create_loader
from fasternet.data.transforms import create_transform
from fasternet.environment import create_record
from fasternet.models.checkpoint import Preprocessing, load_checkpoint, save_checkpoint
from fasternet.models.fasternet import FasterNet
from fasternet.models.registry import create_model
from fasternet.records import Record
from fasternet.train.evaluate import Evaluation, evaluate
from fasternet.train.recipes import Recipe
from fasternet.train.state import seed_everything
from fasternet.train.task import Task

NUM_PREDICTIONS = 24  # on the sheet of pictures that ends a run
THUMBNAIL_SIZE = 160  # pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Tell the class of a picture.

    Attributes:
        recipe: How to train.
        datasets: The pictures, their transforms set.
        preprocessing: What evaluation does to a picture; it goes into the model folder.
        mixup: Mixes the pictures of a batch and their labels, or None.
    """

    recipe: Recipe
    datasets: Datasets
    preprocessing: Preprocessing
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None

    def batches(self, epoch: int) -> Iterable[Any]:
        """Return the shuffled, augmented batches of an epoch."""
        recipe = self.recipe
        return create_loader(
            self.datasets.train,
            recipe.batch_size,
            training=True,
            num_workers=recipe.num_workers,
            seed=recipe.seed,
            epoch=epoch,
        )

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy with smoothed and, where the recipe says so, mixed labels."""
        images, targets = self._move(batch[0]), batch[1].to(self.device, non_blocking=True)
        if self.mixup:
            even = len(images) // 2 * 2
            images, targets = self.mixup(images[:even], targets[:even])
        return F.cross_entropy(model(images).float(), targets, label_smoothing=self.recipe.label_smoothing)

    def evaluate(self, model: nn.Module) -> Mapping[str, Any]:
        """Return top-1, top-5 and loss on the validation pictures."""
        result = self._evaluate(model)
        return {"validation_loss": result.loss, "top1": result.top1, "top5": result.top5}

    def save(self, folder: Path, model: FasterNet) -> None:
        """Write weights, class names and preprocessing."""
        save_checkpoint(
            folder,
            model,
            name=self.name,
            class_names=self.datasets.class_names,
            preprocessing=self.preprocessing,
        )

    def summarise(self, output: Path) -> list[Record]:
        """Evaluate the best checkpoint as it is on the disk, in fp32, and lay out a sheet of its predictions."""
        model = load_checkpoint(output / "best").model.to(self.device).eval()
        result = self._evaluate(model)
        record = create_record("train", "evaluation", self.name, condition=self.condition, values=result.values())
        return [record, *self._create_sheet(result, output)]

    def _evaluate(self, model: nn.Module) -> Evaluation:
        recipe, validation = self.recipe, self.datasets.validation
        loader = create_loader(validation, recipe.batch_size, training=False, num_workers=recipe.num_workers)
        return evaluate(lambda images: model(self._move(images)), loader, class_names=validation.class_names)

    def _create_sheet(self, result: Evaluation, output: Path) -> list[Record]:
        """Save thumbnails of validation pictures, drawn by lot, and record what was predicted for them."""
        validation, names = self.datasets.validation, self.datasets.class_names
        (output / "pictures").mkdir(exist_ok=True)
        lot = random.Random(0).sample(range(len(validation)), min(NUM_PREDICTIONS, len(validation)))
        records = []
        for number, index in enumerate(lot):
            picture = f"pictures/{number:02}.png"
            image = validation.load(index).copy()
            image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
            image.save(output / picture)
            labels, probabilities = result.labels[index].tolist(), result.probabilities[index].tolist()
            values = {
                "label": names[labels[0]],
                "probability": probabilities[0],
                "top": [[names[label], p] for label, p in zip(labels, probabilities, strict=True)],
                "truth": names[validation.labels[index]],
            }
            subject = validation.paths[index].as_posix()
            records.append(
                create_record("train", "prediction", subject, values=values, attachments={"picture": picture})
            )
        return records

    def _move(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        return images.to(self.device, memory_format=layout, non_blocking=True)


def create_classification(
    model_name: str, data: str, *, recipe: Recipe, model_options: Mapping[str, Any], device: torch.device
) -> Classification:
    """Open the pictures and make the network; see ``train`` for the arguments."""
    datasets = create_datasets(data)
    num_classes = len(datasets.class_names)
    preprocessing = dataclasses.replace(
        datasets.preprocessing_defaults, input_size=recipe.input_size, crop_ratio=recipe.crop_ratio
    )
    datasets.validation.transform = create_transform(preprocessing, training=False)
    datasets.train.transform = create_transform(
        preprocessing,
        training=True,
        random_resized_crop=recipe.random_resized_crop,
        flip=recipe.flip,
        rand_augment=recipe.rand_augment,
    )
    seed_everything(recipe.seed)
    options = {"drop_path_rate": recipe.drop_path_rate, **model_options, "num_classes": num_classes}
    model = create_model(model_name, **options).to(device)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    mixed = recipe.mixup or recipe.cutmix
    return Classification(
        name=model_name,
        model=model,
        device=device,
        condition={"data": Path(data).name, "device": device.type, "model_options": dict(model_options)},
        values={
            "num_params": sum(parameter.numel() for parameter in model.parameters()),
            "num_train": len(datasets.train),
            "num_validation": len(datasets.validation),
            "num_classes": num_classes,
        },
        num_steps=max(1, len(datasets.train) // recipe.batch_size),
        metric="top1",
        recipe=recipe,
        datasets=datasets,
        preprocessing=preprocessing,
        # Labels are smoothed in the loss, mixed or not.
        mixup=Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=num_classes) if mixed else None,
    )
