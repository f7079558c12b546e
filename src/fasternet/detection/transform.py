"""From pictures of any size to a batch, and back: what stands before and after the network (Table 7: 800/1333 px)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from fasternet.data.boxes import fit_size
from fasternet.detection.layers import paste_masks
from fasternet.models.checkpoint import Preprocessing

SIZE_DIVISOR = 32  # the stride of the last stage


class DetectorTransform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Normalizes, in evaluation also resizes, and pads; maps boxes and masks back to the pictures as they came.

    In training the data come resized, as augmentation changes sizes.

    Args:
        min_size: What the shorter side becomes, in pixels.
        max_size: What the longer side becomes at most.
        antialias: Average where a picture shrinks; the published detectors do not.

    Attributes:
        full_masks: Lay masks into the picture; else they stay as they are, to be pasted one at a time.
    """

    def __init__(self, min_size: int, max_size: int, *, antialias: bool = True) -> None:
        colors = Preprocessing()
        super().__init__(min_size, max_size, [*colors.mean], [*colors.std], SIZE_DIVISOR)
        self.antialias = antialias
        self.full_masks = True

    @contextlib.contextmanager
    def keep_masks_small(self) -> Iterator[None]:
        """Leave masks as the network makes them for a while: those of a large picture would fill the memory."""
        before, self.full_masks = self.full_masks, False
        try:
            yield
        finally:
            self.full_masks = before

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Bring a picture (3, H, W) to its size; one that has it already stays as it is."""
        height, width = image.shape[-2:]
        size = fit_size(height, width, self.min_size[-1], self.max_size)
        if not self.training and size != (height, width):
            image = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=self.antialias)[0]
        return image, target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Bring boxes, and with ``full_masks`` masks (K, 1, H, W), to the pictures as they came."""
        if self.training:
            return result
        for prediction, shape, original in zip(result, image_shapes, original_image_sizes, strict=True):
            prediction["boxes"] = resize_boxes(prediction["boxes"], shape, original)
            if "masks" in prediction and self.full_masks:
                prediction["masks"] = paste_masks(prediction["masks"][:, 0], prediction["boxes"], *original)[:, None]
        return result
