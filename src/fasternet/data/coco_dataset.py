"""Pictures with objects as tensors: reading, augmentation that keeps boxes, labels and masks together, batches.

Legend: H, W = sides of a picture; K = its objects. A picture is (3, H, W), float32 from 0 to 1; its target holds
``boxes`` (K, 4) as x0, y0, x1, y1 in pixels, ``labels`` (K,) from 1 on, ``masks`` (K, H, W) and ``image_id``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import masks_to_boxes
from torchvision.transforms.functional import to_tensor

from fasternet.data.boxes import fit_size
from fasternet.data.coco import CocoData, CocoImage, decode_mask
from fasternet.data.images import ImageError, load_image

Target = dict[str, Any]
Sample = tuple[Tensor, Target]

MIN_SIDE = 1  # pixels of a box that a crop cut; what is left of the object is less than can be seen
ROUNDING = 0.01  # pixels that a box which was resized may cross the border by


class ImageSizeError(ImageError):
    """A picture has another size than annotated."""


class CocoDataset(Dataset[Sample]):
    """Pictures with objects, read when they are asked for; crowds are left out of the targets.

    Args:
        data: What an annotation file says.
        transform: Applied to picture and target; None leaves them as they are.
        masks: Give masks too.

    Attributes:
        data: As given.
        transform: As given.
        root: The folder that ``paths`` start from.
        paths: One for each picture, relative to ``root``.

    Raises:
        ValueError: Masks are asked for, and the file has none.
    """

    def __init__(
        self, data: CocoData, transform: Callable[[Tensor, Target], Sample] | None = None, *, masks: bool = True
    ) -> None:
        if masks and not data.has_masks:
            raise ValueError(f"annotation file {data.source} has no masks; a detector of boxes alone can learn from it")
        self.data, self.transform, self._masks = data, transform, masks
        paths = [image.path.absolute() for image in data.images]
        self.root = Path(os.path.commonpath([path.parent for path in paths]))
        self.paths = [path.relative_to(self.root) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        image = self.data.images[index]
        try:
            loaded = self.load(index)
        except ImageError as error:
            # Of the path, what does not depend on the machine: a run's records keep the sentence.
            name = self.root.name / self.paths[index]
            raise type(error)(str(error).replace(str(image.path), name.as_posix())) from error
        sample = to_tensor(loaded), _create_target(image, masks=self._masks)
        return self.transform(*sample) if self.transform else sample

    def load(self, index: int) -> Image.Image:
        """Return a picture, RGB, with the pixels that its annotations count.

        Annotations are of the picture as it is stored, or of the picture turned upright as its EXIF data says,
        as the tool had it: the annotated size tells.

        Raises:
            ImageError: It cannot be read.
            ImageSizeError: It has another size than annotated.
        """
        image = self.data.images[index]
        size = image.width, image.height
        loaded = load_image(image.path)
        if loaded.size != size and loaded.size[::-1] == size:
            loaded = load_image(image.path, upright=False)
        if loaded.size != size:
            raise ImageSizeError(
                f"picture {image.path} has {loaded.width}x{loaded.height} pixels, its annotation says "
                f"{image.width}x{image.height}"
            )
        return loaded


@dataclasses.dataclass(frozen=True)
class DetectionTransform:
    """Mirrors and resizes pictures with their boxes and masks; draws from PyTorch's random state.

    Attributes:
        min_size: What the shorter side becomes, in pixels.
        max_size: What the longer side becomes at most.
        flip: Mirror half of the pictures, left to right.
        vertical_flip: Mirror half of the pictures, top to bottom.
        multi_scale: Draw the shorter side anew for each picture, between these two factors of ``min_size``.
        scale_jitter: Large-scale jitter: resize by a factor drawn from this range on top, then crop sides that are
            longer than ``max_size``.
        antialias: Average where a picture shrinks; the published detectors do not.

    Raises:
        ValueError: A size or a range is not possible.
    """

    min_size: int
    max_size: int
    _: dataclasses.KW_ONLY
    flip: bool = False
    vertical_flip: bool = False
    multi_scale: tuple[float, float] | None = None
    scale_jitter: tuple[float, float] | None = None
    antialias: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.min_size <= self.max_size:
            raise ValueError(f"min_size={self.min_size} must be from 1 to max_size={self.max_size}")
        for name in ("multi_scale", "scale_jitter"):
            if (factors := getattr(self, name)) is not None and not 0 < factors[0] <= factors[1]:
                raise ValueError(f"{name}={factors} must be factors above 0 that rise")
        if self.multi_scale and self.scale_jitter:
            raise ValueError("multi_scale and scale_jitter both draw the size: give one of them")

    def __call__(self, image: Tensor, target: Target) -> Sample:
        """Return a picture and its target; the given ones stay as they are."""
        sample = image, target
        for wanted, axis in ((self.flip, -1), (self.vertical_flip, -2)):
            if wanted and torch.rand(()) < 0.5:
                sample = flip(*sample, axis)
        sample = resize(*sample, self._draw_size(*image.shape[-2:]), antialias=self.antialias)
        if self.scale_jitter:
            height, width = sample[0].shape[-2:]
            top, left = (int(torch.randint(max(side - self.max_size, 0) + 1, ())) for side in (height, width))
            sample = crop(*sample, top, left, min(height, self.max_size), min(width, self.max_size))
        return sample

    def _draw_size(self, height: int, width: int) -> tuple[int, int]:
        min_size = self.min_size
        if self.multi_scale:
            low, high = (max(round(factor * self.min_size), 1) for factor in self.multi_scale)
            min_size = int(torch.randint(low, high + 1, ()))
        size = fit_size(height, width, min_size, self.max_size)
        if self.scale_jitter:
            low_factor, high_factor = self.scale_jitter
            factor = low_factor + (high_factor - low_factor) * float(torch.rand(()))
            return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)
        return size


def merge_pictures(samples: Sequence[Sample]) -> tuple[list[Tensor], list[Target]]:
    """Return the pictures and the targets of a batch as lists: the pictures differ in size."""
    return [image for image, _ in samples], [target for _, target in samples]


def flip(image: Tensor, target: Target, axis: int) -> Sample:
    """Mirror left to right (axis -1) or top to bottom (axis -2)."""
    low, high = (0, 2) if axis == -1 else (1, 3)
    boxes = target["boxes"].clone()
    boxes[:, [low, high]] = image.shape[axis] - boxes[:, [high, low]]
    return image.flip(axis), _replace(target, boxes, lambda masks: masks.flip(axis))


def resize(image: Tensor, target: Target, size: tuple[int, int], *, antialias: bool) -> Sample:
    """Bring a picture to height and width as the detector does in evaluation; one that has them stays as it is."""
    height, width = image.shape[-2:]
    if size == (height, width):
        return image, target
    image = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=antialias)[0]
    factors = torch.tensor([size[1] / width, size[0] / height] * 2)
    return image, _replace(target, target["boxes"] * factors, lambda masks: _resize_masks(masks, size))


def crop(image: Tensor, target: Target, top: int, left: int, height: int, width: int) -> Sample:
    """Cut a part out; objects of which nothing is left are dropped, boxes that are cut follow from their masks."""
    rows, columns = slice(top, top + height), slice(left, left + width)
    shifted = target["boxes"] - torch.tensor([left, top] * 2)
    boxes = torch.stack([shifted[:, i].clamp(0, (width, height)[i % 2]) for i in range(4)], dim=1)
    cut = ((boxes - shifted).abs() > ROUNDING).any(1)
    target = _replace(target, boxes, lambda masks: masks[:, rows, columns].contiguous())
    kept = ~cut | (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(1)
    if "masks" in target:
        kept &= ~cut | target["masks"].flatten(1).any(1).bool()
        chosen = cut & kept
        if chosen.any():
            ends = torch.tensor([0, 0, 1, 1])  # the last row and column are in the box
            boxes[chosen] = masks_to_boxes(target["masks"][chosen]) + ends
    target = {key: value if key == "image_id" else value[kept] for key, value in target.items()}
    return image[:, rows, columns].contiguous(), target  # a view would carry the whole picture along


def _create_target(image: CocoImage, *, masks: bool) -> Target:
    instances = [instance for instance in image.instances if not instance.crowd]
    target: Target = {
        "boxes": torch.tensor([instance.box for instance in instances], dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([instance.label + 1 for instance in instances], dtype=torch.int64),
        "image_id": image.id,
    }
    if masks:
        # Masks of a large picture fill the memory: they are drawn into their place one by one.
        target["masks"] = torch.empty(len(instances), image.height, image.width, dtype=torch.uint8)
        for mask, instance in zip(target["masks"], instances, strict=True):
            mask.copy_(decode_mask(cast(Any, instance.segmentation), image.height, image.width))
    return target


def _replace(target: Target, boxes: Tensor, change: Callable[[Tensor], Tensor]) -> Target:
    masks = {"masks": change(target["masks"])} if "masks" in target else {}
    return target | {"boxes": boxes} | masks


def _resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize masks, each pixel from the one under its centre; PyTorch refuses a batch of none."""
    if len(masks) == 0:
        return masks.new_zeros(0, *size)
    return F.interpolate(masks[None], size, mode="nearest-exact")[0]
