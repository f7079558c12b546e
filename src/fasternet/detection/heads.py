"""The heads on the regions of a picture: classes, boxes, masks, and their losses (torchvision's, but for the targets).

Masks are taught where they are laid, as 0 or 1: torchvision cuts their targets out half a pixel beside the regions, and
has fractions at their edges.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference
from torchvision.ops import roi_align

Target = dict[str, Tensor]


class Heads(RoIHeads):  # type: ignore[misc]
    """The box head and, in a Mask R-CNN, the mask head; losses are computed in fp32."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """Map levels and proposals to detections, in training mode to losses."""
        if self.training:
            return [], self._compute_losses(features, proposals, image_shapes, cast(list[Target], targets))
        logits, offsets = self._predict_boxes(features, proposals, image_shapes)
        boxes, scores, labels = self.postprocess_detections(logits, offsets, proposals, image_shapes)
        found = [{"boxes": b, "labels": k, "scores": s} for b, k, s in zip(boxes, labels, scores, strict=True)]
        if self.has_mask():
            masks = maskrcnn_inference(self._predict_masks(features, boxes, image_shapes), labels)
            for detections, mask in zip(found, masks, strict=True):
                detections["masks"] = mask  # (K, 1, 28, 28)
        return found, {}

    def _predict_boxes(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Return logits (K, classes + 1) and offsets (K, 4 * (classes + 1)) of the regions of all pictures."""
        logits, offsets = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        return logits.float(), offsets.float()

    def _predict_masks(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Return logits (K, classes + 1, 28, 28)."""
        regions = self.mask_roi_pool(features, boxes, image_shapes)
        return cast(Tensor, self.mask_predictor(self.mask_head(regions)).float())

    def _compute_losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target],
    ) -> dict[str, Tensor]:
        proposals, matches, labels, offsets = self.select_training_samples(proposals, targets)
        loss_class, loss_box = fastrcnn_loss(*self._predict_boxes(features, proposals, image_shapes), labels, offsets)
        losses = {"loss_classifier": loss_class, "loss_box_reg": loss_box}
        if self.has_mask():
            chosen = [torch.where(label > 0)[0] for label in labels]
            boxes = [box[index] for box, index in zip(proposals, chosen, strict=True)]
            wanted = torch.cat(
                [
                    cut_masks(target["masks"], box, match[index])
                    for target, box, match, index in zip(targets, boxes, matches, chosen, strict=True)
                ]
            )
            kinds = torch.cat([label[index] for label, index in zip(labels, chosen, strict=True)])
            logits = self._predict_masks(features, boxes, image_shapes)
            logits = logits[torch.arange(len(kinds), device=kinds.device), kinds]  # (K, 28, 28)
            # Without an object there is nothing to average, and the gradient is to be 0 everywhere.
            losses["loss_mask"] = F.binary_cross_entropy_with_logits(logits, wanted) if len(kinds) else logits.sum() * 0
        return losses


def cut_masks(masks: Tensor, boxes: Tensor, matches: Tensor, size: int = 28) -> Tensor:
    """Cut the masks of objects out along boxes.

    Args:
        masks: (objects, H, W), 0 or 1.
        boxes: (K, 4), in pixels.
        matches: (K,), the object of each box.
        size: Side of what is cut out.

    Returns:
        (K, size, size), 1 where an object fills at least half of a cell, else 0.
    """
    if not len(boxes):
        return boxes.new_zeros(0, size, size)
    regions = torch.cat([matches[:, None].to(boxes), boxes], dim=1)
    covered: Tensor = roi_align(masks[:, None].to(boxes), regions, size, aligned=True)[:, 0]
    return (covered >= 0.5).to(boxes)
