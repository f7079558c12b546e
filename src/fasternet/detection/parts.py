"""The parts of a detector as calls that can be timed one by one (Table 4's latency): backbone, neck, heads, the rest.

Fixed, seeded regions and scores stand in for what the heads would find, so that random weights do not decide how much
there is to do. Shapes: picture (1, 3, H, W); K regions as boxes (K, 4) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.models.detection.rpn import concat_box_prediction_layers

from fasternet.detection.costs import NUM_MASKS, NUM_PROPOSALS
from fasternet.detection.detector import Detector
from fasternet.detection.layers import paste_masks

MIN_SIDE = 16  # pixels, of a region
# Added to the logit of the background: of 1000 regions and 80 classes some 300 scores pass the usual 0.05, as in a
# picture with many objects.
BACKGROUND = 5.0


class Outputs(NamedTuple):
    """What the heads say.

    Attributes:
        objectness: Of each level (1, A, H, W).
        offsets: Of each level (1, 4 * A, H, W).
        class_logits: (K, classes), the background first.
        box_offsets: (K, 4 * classes).
        mask_logits: (K', classes, m, m); None without masks.
    """

    objectness: list[Tensor]
    offsets: list[Tensor]
    class_logits: Tensor
    box_offsets: Tensor
    mask_logits: Tensor | None


@torch.no_grad()
def list_parts(
    detector: Detector,
    image: Tensor | tuple[int, int],
    *,
    num_proposals: int = NUM_PROPOSALS,
    num_masks: int = NUM_MASKS,
    seed: int = 0,
) -> dict[str, Callable[[], object]]:
    """Return the parts of a detector, each ready to run on inputs that were computed once.

    Args:
        detector: In evaluation mode, optimised or not.
        image: (1, 3, H, W), normalized; or height and width of one of noise.
        num_proposals: Regions that the box head sees.
        num_masks: Regions that the mask head sees, the first of these.
        seed: Of what is random.

    Returns:
        ``backbone``, ``neck``, ``heads`` (those of the RPN, of boxes and of masks, with cutting out what they see),
        ``post-processing`` (boxes and NMS of the RPN, then of the detections, masks into the picture) and ``whole``,
        all of that one after the other. To be called in ``torch.inference_mode``.
    """
    random = torch.Generator().manual_seed(seed)
    if not isinstance(image, Tensor):
        image = torch.randn(1, 3, *image, generator=random)
    picture, size = image, (image.shape[2], image.shape[3])
    regions = _draw_regions(num_proposals, size, random).to(picture.device)
    body, fpn = detector.backbone.body, detector.backbone.fpn

    def compute_levels(maps: list[Tensor]) -> dict[str, Tensor]:
        levels: dict[str, Tensor] = fpn({str(i): x for i, x in enumerate(maps)})
        return levels

    def compute_whole() -> object:
        _run_heads(detector, compute_levels(body(picture)), regions, num_masks)
        return finish()

    maps = body(picture)
    levels = compute_levels(maps)
    outputs = _draw_outputs(_run_heads(detector, levels, regions, num_masks), random)
    labels = torch.randint(outputs.class_logits.shape[1], (num_masks,), generator=random).to(picture.device)

    def finish() -> object:
        return _finish(detector, picture, levels, outputs, regions, labels)

    return {
        "backbone": lambda: body(picture),
        "neck": lambda: compute_levels(maps),
        "heads": lambda: _run_heads(detector, levels, regions, num_masks),
        "post-processing": finish,
        "whole": compute_whole,
    }


def _run_heads(detector: Detector, levels: dict[str, Tensor], regions: Tensor, num_masks: int) -> Outputs:
    heads = detector.roi_heads
    objectness, offsets = detector.rpn.head([*levels.values()])
    seen = heads.box_head(heads.box_roi_pool(levels, [regions], []))
    class_logits, box_offsets = heads.box_predictor(seen)
    masks = None
    if heads.has_mask():
        masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(levels, [regions[:num_masks]], [])))
    return Outputs(objectness, offsets, class_logits, box_offsets, masks)


def _finish(
    detector: Detector,
    picture: Tensor,
    levels: dict[str, Tensor],
    outputs: Outputs,
    regions: Tensor,
    labels: Tensor,
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Return the proposals, the detections, and the masks of the first regions in the picture."""
    rpn, heads, size = detector.rpn, detector.roi_heads, (picture.shape[2], picture.shape[3])
    anchors = rpn.anchor_generator(ImageList(picture, [size]), [*levels.values()])
    objectness, offsets = concat_box_prediction_layers(outputs.objectness, outputs.offsets)
    boxes = rpn.box_coder.decode(offsets, anchors).view(1, -1, 4)
    numbers = [level[0].numel() for level in outputs.objectness]
    proposals, _ = rpn.filter_proposals(boxes, objectness, [size], numbers)
    found = heads.postprocess_detections(outputs.class_logits, outputs.box_offsets, [regions], [size])
    detections = {name: values[0] for name, values in zip(("boxes", "scores", "labels"), found, strict=True)}
    if outputs.mask_logits is None:
        return proposals[0], detections, None
    masks = maskrcnn_inference(outputs.mask_logits, [labels])[0]  # (K', 1, m, m)
    return proposals[0], detections, paste_masks(masks[:, 0], regions[: len(masks)], *size)


def _draw_regions(number: int, size: tuple[int, int], random: torch.Generator) -> Tensor:
    """Return boxes (number, 4) inside a picture, of sides from small to its own, each order of size as often."""
    corners, ends = [], []
    for side in reversed(size):
        least = min(math.log(MIN_SIDE), math.log(side))
        lengths = torch.exp(least + (math.log(side) - least) * torch.rand(number, generator=random))
        corners.append(torch.rand(number, generator=random) * (side - lengths))
        ends.append(corners[-1] + lengths)
    return torch.stack([*corners, *ends], dim=1)


def _draw_outputs(outputs: Outputs, random: torch.Generator) -> Outputs:
    """Return noise of the same shapes in the same memory formats."""

    def draw(like: Tensor) -> Tensor:
        return torch.empty_like(like).copy_(torch.randn(like.shape, generator=random))

    class_logits = draw(outputs.class_logits)
    class_logits[:, 0] += BACKGROUND
    return Outputs(
        [draw(level) for level in outputs.objectness],
        [draw(level) for level in outputs.offsets],
        class_logits,
        draw(outputs.box_offsets),
        None if outputs.mask_logits is None else draw(outputs.mask_logits),
    )
