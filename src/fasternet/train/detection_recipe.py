"""The recipes of detection, as data: the paper's 1x schedule for S, M and L (Table 7), and one for few pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

from fasternet.train.recipe import TINY, BaseRecipe, Bounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionRecipe(BaseRecipe):
    """How a detector is trained; the run folder's ``recipe.yaml`` holds exactly these fields and those of its base.

    Attributes:
        warmup_iterations: Steps of the linear warm-up.
        warmup_factor: Share of the rate that it starts from.
        lr_schedule: After it the rate falls at ``lr_step_epochs`` (``steps``), or along half a cosine to 0.
        lr_step_epochs: Epochs that are done when the rate falls.
        lr_step_factor: What is left of the rate then.
        drop_path_rate: Stochastic depth; None: as published for the backbone.
        feature_norm: A BN on each of FasterNet's feature maps, as in the published detectors.
        min_size: Shorter side of the pictures that the network sees, in pixels.
        max_size: Their longer side at most.
        antialias: Average where a picture shrinks; the published detectors do not.
        vertical_flip: Turn half of the training pictures upside down.
        multi_scale: In training the shorter side is ``min_size`` times a factor between these two, drawn anew for each
            picture; ``max_size`` still limits the longer one. None: it is ``min_size``.
        scale_jitter: Large-scale jitter in training: smallest and largest factor, then a crop where a side is longer
            than ``max_size``; or None.
        fpn_channels: Channels of the pyramid.
        box_head_width: Hidden width of the box head.
        mask_head_channels: Channels of the mask head.
        head_norm: BN in the pyramid and the mask head (``bn``), which from scratch learn faster so, or ``none``.
        regions_per_image: Proposals of a picture that the heads are trained on, a quarter of them on objects.
        validation_share: Part of the pictures that validates, drawn by the seed, where there is no split.
    """

    warmup_iterations: int = 500
    warmup_factor: float = 0.001
    lr_schedule: Literal["steps", "cosine"] = "steps"
    lr_step_epochs: tuple[float, float] = (8.0, 11.0)
    lr_step_factor: float = 0.1
    drop_path_rate: float | None = None
    feature_norm: bool = True
    min_size: int = 800
    max_size: int = 1333
    antialias: bool = True
    vertical_flip: bool = False
    multi_scale: tuple[float, float] | None = None
    scale_jitter: tuple[float, float] | None = None
    fpn_channels: int = 256
    box_head_width: int = 1024
    mask_head_channels: int = 256
    head_norm: Literal["none", "bn"] = "none"
    regions_per_image: int = 512
    validation_share: float = 0.2

    BOUNDS: ClassVar[Bounds] = MappingProxyType(
        {
            **BaseRecipe.BOUNDS,
            "warmup_iterations": (0, math.inf),
            "warmup_factor": (TINY, 1.0),
            "lr_step_factor": (TINY, 1.0),
            "drop_path_rate": (0.0, 0.99),
            "min_size": (32, 16384),
            "max_size": (32, 16384),
            "fpn_channels": (1, 4096),
            "box_head_width": (1, 65536),
            "mask_head_channels": (1, 4096),
            "regions_per_image": (4, 65536),
            "validation_share": (0.01, 0.99),
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_size < self.min_size:
            raise ValueError(f"recipe field max_size={self.max_size} must be at least min_size={self.min_size}")
        ranges = {"multi_scale": (0.01, 10), "scale_jitter": (0.01, 10), "lr_step_epochs": (0, math.inf)}
        for name, (low, high) in ranges.items():
            if (value := getattr(self, name)) and not low <= value[0] <= value[1] <= high:
                raise ValueError(f"recipe field {name}={value[0]:g},{value[1]:g} must rise within [{low}, {high}]")
        if self.multi_scale and self.scale_jitter:
            raise ValueError("recipe fields multi_scale and scale_jitter exclude each other: set one of them to none")
        if self.compile:
            raise ValueError("recipe field compile=true is not for detectors: their pictures change in size")

    def compute_lr(self, epoch: int, done: float = 0.0, num_steps: int = 1) -> float:
        """Return the rate: a linear warm-up by steps, on top of what falls at epochs or along a cosine."""
        step = round((epoch + done) * num_steps)
        ramp = min(1.0, self.warmup_factor + (1 - self.warmup_factor) * step / max(self.warmup_iterations, 1))
        if not self.warmup_iterations:
            ramp = 1.0
        if self.lr_schedule == "steps":
            share = self.lr_step_factor ** sum(epoch >= end for end in self.lr_step_epochs)
        else:
            share = (1 + math.cos(math.pi * (epoch + done) / self.epochs)) / 2
        return self.effective_lr * ramp * share


def _create_paper_recipe(*, lr: float, drop_path_rate: float) -> DetectionRecipe:
    """Return a column of Table 7; what it does not print is the published configuration's."""
    return DetectionRecipe(
        epochs=12,
        batch_size=16,
        lr=lr,
        lr_batch_size=16,
        weight_decay=1e-4,
        clip_grad=None,
        drop_path_rate=drop_path_rate,
        flip=True,
        antialias=False,
        num_workers=4,
    )


PAPER_DETECTION_RECIPES: Mapping[str, DetectionRecipe] = MappingProxyType(
    {
        "fasternet_s": _create_paper_recipe(lr=2e-4, drop_path_rate=0.15),
        "fasternet_m": _create_paper_recipe(lr=1e-4, drop_path_rate=0.2),
        "fasternet_l": _create_paper_recipe(lr=1e-4, drop_path_rate=0.3),
    }
)

DETECTION_RECIPES: Mapping[str, DetectionRecipe] = MappingProxyType(
    {
        # One GPU or CPU and a few pictures, from scratch: light heads, so that many steps fit into minutes.
        "small": DetectionRecipe(
            epochs=100,
            batch_size=2,
            lr=1e-3,
            weight_decay=0.05,
            warmup_iterations=20,
            lr_schedule="cosine",
            flip=True,
            vertical_flip=True,
            min_size=320,
            max_size=533,
            multi_scale=(0.8, 1.25),
            fpn_channels=64,
            box_head_width=256,
            mask_head_channels=64,
            head_norm="bn",
            regions_per_image=64,
        ),
    }
)


def find_detection_recipe(name: str, backbone: str | None = None) -> DetectionRecipe:
    """Return the recipe of this name.

    Args:
        name: ``paper``, or one of ``DETECTION_RECIPES``.
        backbone: The network, as ``paper`` is another recipe for each variant.

    Raises:
        ValueError: There is none, or the paper has none for this backbone.
    """
    if name == "paper":
        if backbone is None or backbone not in PAPER_DETECTION_RECIPES:
            allowed = ", ".join(PAPER_DETECTION_RECIPES)
            raise ValueError(f"recipe 'paper' of detection is for {allowed}, and not for {backbone}")
        return PAPER_DETECTION_RECIPES[backbone]
    if name not in DETECTION_RECIPES:
        raise ValueError(f"recipe {name!r} is not one of paper, {', '.join(DETECTION_RECIPES)}")
    return DETECTION_RECIPES[name]
