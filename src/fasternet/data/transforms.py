"""From a picture to the tensor that a network reads: Section 4.2's evaluation and Table 6's augmentation.

Legend: S = input size; a transform maps an RGB picture of any size to a tensor (3, S, S), float32;
(1, S, S) where the network takes grey pictures.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import timm.data
import timm.data.auto_augment
import torch
from PIL import Image
from timm.data.transforms import str_to_interp_mode, str_to_pil_interp
from torchvision import transforms
from torchvision.transforms import functional

if TYPE_CHECKING:
    from fasternet.models.checkpoint import Preprocessing

Transform = Callable[[Image.Image], torch.Tensor]

# timm passes over words that it does not understand.
_RAND_AUGMENT = re.compile(r"rand-m\d+(\.\d+)?(-n\d+|-p[01](\.\d+)?|-mstd\d+(\.\d+)?|-inc[01])*")


def create_transform(
    preprocessing: Preprocessing,
    *,
    training: bool,
    random_resized_crop: tuple[float, float] = (0.08, 1.0),
    flip: bool = True,
    rand_augment: str | None = None,
    normalize: bool = True,
) -> Transform:
    """Make the transform for evaluation or for training.

    Evaluation resizes the shorter side to ``floor(input_size / crop_ratio)`` (224 at 0.9: 248), crops the
    centre and normalises; it is timm's, to the bit. Training crops a random part of random aspect, resizes
    and flips it and applies RandAugment; there is no colour jitter and no erasing.

    Args:
        preprocessing: Input size, crop ratio, mean, standard deviation and interpolation that the network takes;
            a mean of one value turns pictures grey.
        training: Whether to augment.
        random_resized_crop: Smallest and largest share of the area that a training crop keeps.
        flip: Mirror half of the training pictures.
        rand_augment: timm's words for RandAugment, for example ``rand-m3-mstd0.5-inc1``, or None for none.
        normalize: In training, off leaves bytes (uint8) for ``normalize_batch``: less to compute and to carry.

    Returns:
        A picklable callable. In training it draws from the random states of ``random``, NumPy and PyTorch.

    Raises:
        ValueError: ``mean`` has neither 1 nor 3 channels, or ``rand_augment`` is not understood.
    """
    num_channels = len(preprocessing.mean)
    if num_channels not in (1, 3):
        raise ValueError(f"mean={preprocessing.mean} must have a value per channel: 3, or 1 for grey pictures")
    steps: list[object] = [transforms.Grayscale()] if num_channels == 1 else []
    if training:
        steps += _create_augmentation(preprocessing, random_resized_crop, flip, rand_augment)
        steps += _create_conversion(preprocessing) if normalize else [transforms.PILToTensor()]
    else:
        steps += [
            LimitAspect(),
            timm.data.create_transform(
                preprocessing.input_size,
                crop_pct=preprocessing.crop_ratio,
                interpolation=preprocessing.interpolation,
                mean=preprocessing.mean,
                std=preprocessing.std,
            ),
        ]
    transform: Transform = transforms.Compose(steps)
    return transform


def normalize_batch(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Map pictures of bytes (N, C, S, S), which stay as they are, to the float32 that a network takes."""
    mean, std = ([255 * value for value in values] for values in (preprocessing.mean, preprocessing.std))
    normalized: torch.Tensor = functional.normalize(images.float(), mean, std, inplace=True)
    return normalized


@dataclasses.dataclass(frozen=True)
class LimitAspect:
    """Cut a very long picture to its middle: a 1 x 100 000 strip would otherwise grow to 248 x 24 800 000.

    Attributes:
        ratio: Longest allowed ratio of the sides; the centre crop that follows sees no difference.
    """

    ratio: int = 32

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the picture, or its middle where it is too long."""
        width, height = image.size
        longest = self.ratio * min(width, height)
        if max(width, height) <= longest:
            return image
        left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
        return image.crop((left, top, width - left, height - top))


def _create_augmentation(
    preprocessing: Preprocessing, area: tuple[float, float], flip: bool, rand_augment: str | None
) -> list[object]:
    # torchvision's crop, as timm's turns tiny pictures black: it rounds a side of the crop to 0 pixels.
    steps: list[object] = [
        transforms.RandomResizedCrop(
            preprocessing.input_size, area, interpolation=str_to_interp_mode(preprocessing.interpolation)
        )
    ]
    if flip:
        steps.append(transforms.RandomHorizontalFlip())
    if rand_augment:
        steps.append(_create_rand_augment(rand_augment, preprocessing))
    return steps


def _create_conversion(preprocessing: Preprocessing) -> list[object]:
    return [transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)]


def _create_rand_augment(words: str, preprocessing: Preprocessing) -> object:
    if not _RAND_AUGMENT.fullmatch(words):
        raise ValueError(f"rand_augment={words!r} is not understood; write it like 'rand-m3-mstd0.5-inc1'")
    parameters = {
        "translate_const": int(0.45 * preprocessing.input_size),  # in pixels
        "img_mean": tuple(min(255, max(0, round(255 * value))) for value in preprocessing.mean),
        "interpolation": str_to_pil_interp(preprocessing.interpolation),
    }
    return timm.data.auto_augment.rand_augment_transform(words, parameters)
