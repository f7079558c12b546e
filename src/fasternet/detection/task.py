"""Detection as a task: pictures with objects, the four or five losses of a detector, COCO's AP (Section 4.4)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fasternet.data.coco import CocoData, CocoImage, find_coco, load_coco, split_coco
from fasternet.data.coco_dataset import CocoDataset, DetectionTransform, merge_pictures
from fasternet.data.coco_objects import import_masks
from fasternet.data.images import ImageError, load_image
from fasternet.data.loaders import TrainingLoader
from fasternet.detection.checkpoint import is_detector, load_detector, load_weights, save_detector
from fasternet.detection.detector import Detector, Kind, create_detector
from fasternet.detection.draw import draw_detections
from fasternet.detection.evaluate import DetectionEvaluation, check_finite, evaluate_detector
from fasternet.detection.predictor import DetectionPredictor
from fasternet.environment import create_record
from fasternet.records import Record
from fasternet.rivals.network import is_fasternet
from fasternet.train.detection_recipe import DetectionRecipe
from fasternet.train.distributed import World
from fasternet.train.loop import Hooks, train_task
from fasternet.train.optim import find_trunk, synchronize_batch_norm
from fasternet.train.run import Say, find_options
from fasternet.train.state import seed_everything
from fasternet.train.task import Task

NUM_PICTURES = 12  # drawn with what was found, for the sheet that ends a run
PICTURE_SIZE = 480  # pixels
MAX_TRAINING_PICTURES = 200  # of which an evaluation at the end takes little time
METRICS = ("box_ap", "box_ap50", "mask_ap", "mask_ap50")  # of an epoch
SUMMARY_THRESHOLD = 0.5  # of the scores that are drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionTask(Task):
    """Find objects in pictures, with boxes and classes, and with masks in a Mask R-CNN.

    Attributes:
        recipe: How to train.
        training: The pictures to learn from.
        validation: The pictures that judge.
        loader: Shuffles and augments the pictures to learn from.
    """

    recipe: DetectionRecipe
    training: CocoData
    validation: CocoData
    loader: TrainingLoader

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yield the shuffled, augmented parts of an epoch: pictures and what is on them."""
        return self.loader.batches(epoch, start)

    def names(self, epoch: int, step: int) -> Sequence[str]:
        """Return the names of the pictures of a step."""
        return self.loader.names(epoch, step)

    def loss(self, model: nn.Module, batch: tuple[list[Tensor], list[dict[str, Any]]]) -> Tensor:
        """Return the sum of the losses: of the proposals two, of the regions two, of the masks one."""
        images = [self.move(image) for image in batch[0]]
        targets = [
            {name: value.to(self.device) for name, value in target.items() if isinstance(value, Tensor)}
            for target in batch[1]
        ]
        losses: Mapping[str, Tensor] = model(images, targets)
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    def evaluate(self, model: nn.Module) -> Mapping[str, Any]:
        """Return AP and AP50 of boxes and masks on the validation pictures."""
        return _select_metrics(self.judge(model, self.validation).values())

    def save(self, folder: Path, model: Any, values: Mapping[str, Any]) -> None:
        """Write weights, configuration, class names, recipe and metrics."""
        metrics = _select_metrics(values)
        save_detector(
            folder,
            model,
            class_names=self.training.class_names,
            category_ids=self.training.category_ids,
            facts={"recipe": dataclasses.asdict(self.recipe), "metrics": metrics, "data": self.condition["data"]},
        )

    def summarise(self, output: Path) -> list[Record]:
        """Evaluate the best checkpoint as it is on the disk, in fp32, and draw what it finds on pictures by lot."""
        model = load_detector(output / "best").model.to(self.device).eval()
        parts = {"validation": self.validation}
        if len(self.training.images) <= MAX_TRAINING_PICTURES:
            parts["training"] = self.training
        records = [self._describe(model, data, split) for split, data in parts.items()]
        return [*records, *self._draw(model, output)] if self.world.is_main else []

    def judge(self, model: nn.Module, data: CocoData) -> DetectionEvaluation:
        """Return what a detector in evaluation mode finds, held against what is there.

        Pictures come one by one: in a batch they are padded, and the AP would depend on batch and processes.
        """
        detector = cast(Detector, model)
        check_finite(detector)
        with detector.transform.keep_masks_small():
            return evaluate_detector(
                lambda images: detector([self.move(image) for image in images]),
                data,
                masks=detector.config.kind == "mask_rcnn",
                num_workers=self.recipe.num_workers,
                world=self.world,
            )

    def move(self, image: Tensor) -> Tensor:
        """Return a picture (3, H, W) on the device."""
        return image.to(self.device, non_blocking=True)

    def _describe(self, model: nn.Module, data: CocoData, split: str) -> Record:
        values = {**self.judge(model, data).values(), "split": split}
        return create_record("train", "evaluation", self.name, condition=self.condition, values=values)

    def _draw(self, model: nn.Module, output: Path) -> Iterator[Record]:
        """Yield a record of each drawing; validation pictures come first."""
        (output / "pictures").mkdir(exist_ok=True)
        names = self.training.class_names
        predictor = DetectionPredictor.from_detector(cast(Detector, model), names)
        lot = random.Random(0).sample(self.validation.images, min(NUM_PICTURES, len(self.validation.images)))
        for number, found in enumerate(lot):
            image = load_image(found.path)
            detections = predictor.predict_image(image, score_threshold=SUMMARY_THRESHOLD)
            image.thumbnail((PICTURE_SIZE, PICTURE_SIZE))  # first, so that what is written on it can be read
            drawing = draw_detections(image, detections.resize(image.height, image.width))
            picture = f"pictures/{number:02}.jpg"
            drawing.save(output / picture, quality=90)
            values = {"role": "lot", "num_detections": len(detections), "num_objects": count_objects(found)}
            condition = {"score_threshold": SUMMARY_THRESHOLD}
            attachments = {"picture": picture}
            yield create_record(
                "train", "prediction", found.path.name, condition=condition, values=values, attachments=attachments
            )


def train_detector(
    backbone: str,
    data: str,
    output: Path,
    *,
    recipe: DetectionRecipe,
    kind: Kind | None = None,
    resume: bool = False,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    backbone_options: Mapping[str, Any] | None = None,
    device: str | None = None,
    hooks: Hooks | None = None,
) -> Path:
    """Train a detector; see ``train_task`` for what else is said, returned and raised.

    Args:
        backbone: A FasterNet, or a rival of Table 4.
        data: A COCO file or a folder that ``find_coco`` knows.
        output: The run folder.
        recipe: How to train.
        kind: ``"mask_rcnn"`` or ``"faster_rcnn"``; None: masks where the data have them.
        resume: Go on with the run in ``output``.
        checkpoint: Weights to start from: a detector's model or run folder or published file (what tells classes stays
            fresh where the classes differ), or the backbone's in any form.
        pretrained: Start from the backbone's published weights instead.
        backbone_options: Further arguments of ``create_backbone``: ``width`` ...
        device: Where to compute.
        hooks: What the run tells and asks while it goes on.
    """
    if checkpoint is not None and pretrained:
        raise ValueError("checkpoint and pretrained are both weights to start from: give one of them")

    options = find_options(
        backbone, backbone_options, checkpoint, run=output if resume else None, key="backbone_options"
    )

    def create(recipe: DetectionRecipe, target: torch.device, world: World, fresh: bool) -> DetectionTask:
        return create_detection(
            backbone,
            data,
            recipe=recipe,
            kind=kind,
            device=target,
            world=world,
            checkpoint=checkpoint if fresh else None,
            pretrained=pretrained and fresh,
            backbone_options=options,
            hooks=hooks or Hooks(),
        )

    begins_with = checkpoint or pretrained
    return train_task(create, output, recipe=recipe, resume=resume, begins_with=begins_with, device=device, hooks=hooks)


def create_detection(
    backbone: str,
    data: str,
    *,
    recipe: DetectionRecipe,
    kind: Kind | None,
    device: torch.device,
    world: World,
    checkpoint: Path | None,
    pretrained: bool,
    backbone_options: Mapping[str, Any],
    hooks: Hooks,
) -> DetectionTask:
    """Open the pictures and make the detector; see ``train_detector`` for the arguments."""
    import_masks()  # which the evaluation at the end of the first epoch needs
    say: Say = hooks.say if world.is_main else lambda _: None
    training, validation, kind = _open_pictures(data, recipe, kind, say)
    model = _create_model(
        backbone, recipe, kind, training.class_names, checkpoint, pretrained, backbone_options, say
    ).to(device)
    unreadable: list[ImageError] = []
    loader = TrainingLoader(
        CocoDataset(training, _create_transform(recipe), masks=kind == "mask_rcnn"),
        recipe.batch_size,
        num_workers=recipe.num_workers,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.size,
        accumulate=recipe.accumulate,
        on_error=unreadable.append,
        merge=merge_pictures,
    )
    return DetectionTask(
        name=backbone,
        model=model,
        device=device,
        condition={
            "task": "detection",
            "kind": kind,
            "data": Path(data).resolve().name,
            "device": device.type,
            "backbone_options": dict(backbone_options),
            "initial_weights": checkpoint.resolve().name if checkpoint else "published" if pretrained else None,
        },
        values={
            "num_params": sum(parameter.numel() for parameter in model.parameters()),
            "num_train": len(training.images),
            "num_validation": len(validation.images),
            "num_classes": len(training.class_names),
        },
        num_steps=loader.num_steps,
        metric="mask_ap" if kind == "mask_rcnn" else "box_ap",
        world=world,
        unreadable=unreadable,
        recipe=recipe,
        training=training,
        validation=validation,
        loader=loader,
    )


def _open_pictures(data: str, recipe: DetectionRecipe, kind: Kind | None, say: Say) -> tuple[CocoData, CocoData, Kind]:
    """Open both parts of the data; say what is left out of them, and choose masks or boxes alone."""
    share, seed = recipe.validation_share, recipe.seed
    parts = load_split(data, share, seed, masks=kind != "faster_rcnn")
    if kind is None and parts[0].has_masks != parts[1].has_masks:
        masked, other = parts if parts[0].has_masks else reversed(parts)
        say(f"{masked.source} has masks and {other.source} has none: boxes alone are learned")
        parts = load_split(data, share, seed, masks=False)  # with masks, objects without one are left out
    for note in dict.fromkeys(f"{part.source}: {n} {reason}" for part in parts for reason, n in part.skipped.items()):
        say(note)
    for part, use in zip(parts, ("train on", "validate on"), strict=True):
        if not any(map(count_objects, part.images)):
            raise ValueError(f"{part.source} has no objects to {use} in its {len(part)} pictures")
    has_masks = parts[0].has_masks and parts[1].has_masks
    if kind == "mask_rcnn" and not has_masks:
        raise ValueError(f"kind=mask_rcnn needs masks, and {data} has boxes alone: take faster_rcnn")
    return *parts, kind or ("mask_rcnn" if has_masks else "faster_rcnn")


def _select_metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in METRICS if name in values}


def count_objects(image: CocoImage) -> int:
    """Return the objects of a picture; crowds are none."""
    return sum(not instance.crowd for instance in image.instances)


def load_split(data: str, share: float, seed: int, *, masks: bool = True) -> tuple[CocoData, CocoData]:
    """Open the pictures to train on and to validate on; without a split of their own, a share is drawn by the seed.

    Raises:
        FileNotFoundError: There is nothing at ``data``.
        ValueError: An annotation file is wrong, or the two parts have other classes.
    """
    first, second = find_coco(Path(data))
    training = load_coco(first, masks=masks)
    if second is None:
        return split_coco(training, share, seed)
    validation = load_coco(second, masks=masks)
    if training.class_names != validation.class_names or training.category_ids != validation.category_ids:
        raise ValueError(f"{first} and {second} have other classes, and must have the same with the same ids")
    return training, validation


def select_pictures(data: str, split: str, recipe: Mapping[str, Any] | None = None, *, masks: bool = True) -> CocoData:
    """Open the pictures of a part of the data.

    Args:
        data: A COCO file or a folder that ``find_coco`` knows.
        split: ``validation``, ``training`` or ``all``, which is the one annotation file that there is.
        recipe: Fields of the run's recipe, which say how data without a validation file were split.
        masks: Read masks too, where there are some.

    Raises:
        ValueError: There is no such part, or nobody says how the data were split.
    """
    if split not in ("validation", "training", "all"):
        raise ValueError(f"split={split} is not one of validation, training, all")
    first, second = find_coco(Path(data))
    if split == "all":
        if second is not None:
            raise ValueError(f"split=all is for one annotation file, and {data} has two: name the file as data")
        return load_coco(first, masks=masks)
    if second is not None:  # the other file may be large, and its pictures not here
        return load_coco(second if split == "validation" else first, masks=masks)
    if recipe is None or "validation_share" not in recipe:
        raise ValueError(f"{data} has one annotation file, and no run says how it was split: take --split all")
    parts = split_coco(load_coco(first, masks=masks), recipe["validation_share"], recipe["seed"])
    return parts[split == "validation"]


def _create_transform(recipe: DetectionRecipe) -> DetectionTransform:
    return DetectionTransform(
        recipe.min_size,
        recipe.max_size,
        flip=recipe.flip,
        vertical_flip=recipe.vertical_flip,
        multi_scale=recipe.multi_scale,
        scale_jitter=recipe.scale_jitter,
        antialias=recipe.antialias,
    )


def _create_model(
    backbone: str,
    recipe: DetectionRecipe,
    kind: Kind,
    class_names: Sequence[str],
    checkpoint: Path | None,
    pretrained: bool,
    backbone_options: Mapping[str, Any],
    say: Say,
) -> Detector:
    seed_everything(recipe.seed)
    whole = checkpoint is not None and is_detector(checkpoint)
    model = create_detector(
        kind,
        backbone,
        num_classes=len(class_names),
        pretrained_backbone=pretrained,
        backbone_checkpoint=None if whole else checkpoint,
        feature_norm=recipe.feature_norm if is_fasternet(backbone) else None,
        drop_path_rate=recipe.drop_path_rate,
        freeze_stages=recipe.freeze,
        frozen_batch_norm=recipe.batch_norm == "frozen",
        backbone_options=backbone_options,
        min_size=recipe.min_size,
        max_size=recipe.max_size,
        fpn_channels=recipe.fpn_channels,
        box_head_width=recipe.box_head_width,
        mask_head_channels=recipe.mask_head_channels,
        head_norm=recipe.head_norm,
        antialias=recipe.antialias,
    )
    if whole and (note := load_weights(model, cast(Path, checkpoint), class_names)):
        say(note)
    model.roi_heads.fg_bg_sampler.batch_size_per_image = recipe.regions_per_image
    if recipe.grad_checkpointing:
        trunk = find_trunk(model)
        if trunk is None:
            raise ValueError(f"recipe field grad_checkpointing=true is for FasterNet, and the backbone is {backbone}")
        trunk.set_grad_checkpointing(True)
    if recipe.batch_norm == "sync":
        model = cast(Detector, synchronize_batch_norm(model))
    return model.to(memory_format=torch.channels_last) if recipe.channels_last else model
