"""What torchvision's Mask R-CNN computes otherwise than the published detectors (mmdet 2), computed as they do.

Anchors keep their fractions and the strides of their levels, an object without an anchor that suits it gets none,
regions are aligned to pixel centres with as many samples as they need, and masks are laid into a picture by sampling at
its pixel centres. Proposals are ranked and masks laid in fp32 under autocast too.

Shapes: maps (N, C, H / s, W / s) at strides s of 4 to 64; boxes (K, 4) as x0, y0, x1, y1 in pixels; masks (K, m, m).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign, roi_align

STRIDES = (4, 8, 16, 32, 64)  # of the pyramid's levels
ANCHOR_SCALE = 8  # side of a square anchor, in strides
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height over width
CANONICAL_SIZE = 56  # side of the largest region of the finest level


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """Three anchors at each position of each level; torchvision rounds their corners and guesses the strides."""

    def __init__(self) -> None:
        sizes = tuple((ANCHOR_SCALE * stride,) for stride in STRIDES)
        super().__init__(sizes, (ASPECT_RATIOS,) * len(STRIDES))

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Tensor:
        """Return the anchors (3, 4) around the origin."""
        side = torch.as_tensor(scales, dtype=dtype, device=device)
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths, heights = (side / root[:, None]).flatten(), (side * root[:, None]).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors (K, 4) of each picture, level by level, row by row."""
        reference = feature_maps[0]
        self.set_cell_anchors(torch.float32, reference.device)  # bf16 has no fractions of a pixel from 256 on
        strides = [[torch.tensor(stride, device=reference.device)] * 2 for stride in STRIDES]
        anchors = torch.cat(self.grid_anchors([[*x.shape[-2:]] for x in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class SymmetricBoxCoder(BoxCoder):  # type: ignore[misc]
    """Limits how far a box may shrink as well as how far it may grow; torchvision limits growth alone.

    Boxes are decoded in fp32, as bf16 has no fractions of a pixel from 256 on.
    """

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Map offsets (K, 4 * classes) of boxes (K, 4) to boxes (K, 4 * classes)."""
        codes = rel_codes.float().reshape(-1, rel_codes.shape[1] // 4, 4)  # a trace takes len for a constant
        limits = [self.bbox_xform_clip * weight for weight in self.weights[2:]]
        sizes = [codes[..., 2 + i].clamp(-limit, limit) for i, limit in enumerate(limits)]
        codes = torch.stack([codes[..., 0], codes[..., 1], *sizes], dim=-1)
        return cast(Tensor, super().decode_single(codes.flatten(1), boxes))


class AnchorMatcher(Matcher):  # type: ignore[misc]
    """Gives an object without a good anchor its best ones, if they overlap it by ``low_threshold`` at least.

    torchvision's gives an object of a few pixels every anchor around it, all of which overlap it alike.
    """

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Match the best anchors of each object in place; overlaps are (objects, anchors)."""
        suited = match_quality_matrix.amax(1) >= self.low_threshold
        super().set_low_quality_matches_(matches, all_matches, match_quality_matrix[suited])


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """Ranks proposals in fp32, whatever the head computes in: bf16 rounds each probability above 0.998 to 1."""

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the proposals of each picture and their probabilities, the best first."""
        found = super().filter_proposals(proposals, objectness.float(), image_shapes, num_anchors_per_level)
        return cast(tuple[list[Tensor], list[Tensor]], found)


class RegionAlign(MultiScaleRoIAlign):  # type: ignore[misc]
    """Cuts regions out of the level that suits their size, aligned to pixel centres, with enough samples.

    Args:
        output_size: Side of what is cut out: 7 for boxes, 14 for masks.
    """

    def __init__(self, output_size: int) -> None:
        super().__init__(["0", "1", "2", "3"], output_size, sampling_ratio=0)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Map levels and the boxes of each picture to (K, C, output_size, output_size), K over all pictures."""
        del image_shapes  # torchvision guesses the strides from them
        maps = [x[name] for name in self.featmap_names]
        corners = torch.cat(boxes)
        number = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        regions = torch.cat([number, corners], dim=1)  # (K, 5)
        sides = ((corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])).sqrt()
        levels = torch.floor(torch.log2(sides / CANONICAL_SIZE + 1e-6)).clamp(0, len(maps) - 1)
        chosen = [torch.where(levels == level)[0] for level in range(len(maps))]
        cut = [
            roi_align(feature, regions[index], self.output_size, 1 / stride, sampling_ratio=0, aligned=True)
            for feature, index, stride in zip(maps, chosen, STRIDES, strict=False)
        ]
        back = torch.argsort(torch.cat(chosen))
        return torch.cat([part.to(maps[0].dtype) for part in cut])[back]


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Lay masks into their boxes in a picture, sampled bilinearly at the centres of its pixels.

    Bilinear sampling on a grid is two matrix products, which any runtime has; they are computed in fp32.

    Args:
        masks: (K, m, m), probabilities.
        boxes: (K, 4), in pixels of the picture.
        height: Of the picture.
        width: Of the picture.

    Returns:
        (K, height, width), 0 outside of the boxes.
    """
    boxes = boxes.float()
    rows = _interpolate(masks.shape[1], boxes[:, 1], boxes[:, 3], torch.arange(height, device=masks.device))
    columns = _interpolate(masks.shape[2], boxes[:, 0], boxes[:, 2], torch.arange(width, device=masks.device))
    return _sample(rows, masks, columns)


def paste_mask(mask: Tensor, box: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
    """Lay one mask into a picture, only where it can be: for pictures whose full masks would fill the memory.

    Args:
        mask: (m, m), probabilities.
        box: (4,), in pixels of the picture.
        height: Of the picture.
        width: Of the picture.

    Returns:
        The part (h, w) of what ``paste_masks`` returns that can be above 0, and its first row and column.
    """
    box = box.float()
    x0, y0, x1, y1 = box.tolist()
    margin_x, margin_y = (x1 - x0) / mask.shape[1], (y1 - y0) / mask.shape[0]
    top, left = max(int(y0 - margin_y), 0), max(int(x0 - margin_x), 0)
    bottom, right = min(int(y1 + margin_y) + 1, height), min(int(x1 + margin_x) + 1, width)
    ys = torch.arange(top, max(bottom, top), device=mask.device)
    xs = torch.arange(left, max(right, left), device=mask.device)
    rows = _interpolate(mask.shape[0], box[1:2], box[3:4], ys)[0]
    columns = _interpolate(mask.shape[1], box[0:1], box[2:3], xs)[0]
    return _sample(rows, mask, columns), top, left


def _interpolate(num_cells: int, start: Tensor, end: Tensor, pixels: Tensor) -> Tensor:
    """Return the weights (K, pixels, cells) of the cells of a mask in each pixel along one side."""
    size = (end - start).clamp(min=1e-6)[:, None]
    position = (pixels + 0.5 - start[:, None]) / size * num_cells - 0.5  # (K, pixels), in cells
    cells = torch.arange(num_cells, device=pixels.device)
    return (1 - (position[..., None] - cells).abs()).clamp(min=0)


def _sample(rows: Tensor, masks: Tensor, columns: Tensor) -> Tensor:
    """Return (..., H, m) (..., m, m) (..., m, W) in fp32: under autocast the products would be rounded to bf16."""
    with torch.autocast(masks.device.type, enabled=False):
        return rows @ masks.float() @ columns.transpose(-2, -1)
