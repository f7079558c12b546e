"""What a detector costs, part by part, counted as Table 4 counts: 1000 proposals and 100 masks at 1280x800.

The convolutions of the mask head count, its deconvolution and its logits do not. Parameters and multiply-adds agree
with the printed ones within 1 %; ``FOOTNOTES`` says why where they do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fasternet.complexity import count_costs
from fasternet.detection.detector import BOX_SIZE, MASK_SIZE, Detector, create_mask_rcnn

NUM_PROPOSALS, NUM_MASKS = 1000, 100  # regions that the box head and the mask head see
NUM_COCO_CLASSES = 80
SIZE = (800, 1280)  # height and width of the pictures of Table 4
PARTS = ("backbone", "neck", "rpn_head", "box_head", "mask_head")

_ATTENTION = "the two matrix products of attention, which have no weights, are not in the printed number"
FOOTNOTES: Mapping[str, str] = MappingProxyType(
    {
        "PVT-Small": f"297.5 G counted, 238 G printed: {_ATTENTION}; without them it is 238.1 G.",
        "PVT-Medium": f"384.7 G counted, 295 G printed: {_ATTENTION}; without them it is 294.6 G.",
        "PVT-Large": f"486.6 G counted, 358 G printed: {_ATTENTION}; without them it is 357.1 G.",
    }
)


@dataclass(frozen=True)
class DetectorCosts:
    """Parameters and multiply-adds of a detector.

    Attributes:
        num_params: All parameters.
        num_params_without_batch_norm: Those that the paper counts.
        part_macs: Multiply-adds of each of ``PARTS``.
        attention_macs: Those of products without weights, among the backbone's.
    """

    num_params: int
    num_params_without_batch_norm: int
    part_macs: Mapping[str, int]
    attention_macs: int

    @property
    def macs(self) -> int:
        """Multiply-adds of one picture."""
        return sum(self.part_macs.values())


def count_detector(detector: Detector | str, size: tuple[int, int] = SIZE) -> DetectorCosts:
    """Count the parameters and multiply-adds of a detector as Table 4 does; nothing is computed.

    Args:
        detector: A detector, or the name of a backbone: a Mask R-CNN on it for the 80 classes of COCO is counted.
        size: Height and width of the picture.

    Raises:
        ValueError: There is no such backbone, or the picture is too small for it.
    """
    if isinstance(detector, str):
        with torch.device("meta"):
            detector = create_mask_rcnn(name_backbone(detector), num_classes=NUM_COCO_CLASSES)
    costs = count_costs(_Layers(detector), (1, 3, *size))
    part_macs = {part: sum(r.macs for r in costs.rows if r.name.startswith(part)) for part in PARTS}
    attention_macs = sum(row.macs for row in costs.rows if not row.num_params)
    return DetectorCosts(costs.num_params, costs.num_params_without_batch_norm, part_macs, attention_macs)


def name_backbone(name: str) -> str:
    """Return the name that ``create_backbone`` has for a backbone of the paper: ``FasterNet-S`` is ``fasternet_s``."""
    return name.lower().replace("-", "_") if name.startswith("FasterNet-") else name


class _Layers(nn.Module):
    """The layers of a detector, the heads on as many regions as the paper counts, whatever is in the picture."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        heads = detector.roi_heads
        self.backbone, self.neck, self.rpn_head = detector.backbone.body, detector.backbone.fpn, detector.rpn.head
        self.box_head = nn.Sequential(heads.box_head, heads.box_predictor)
        self.mask_head = heads.mask_head
        self.uncounted = heads.mask_predictor  # its parameters do count

    def forward(self, x: Tensor) -> None:
        levels = [*self.neck({str(i): feature for i, feature in enumerate(self.backbone(x))}).values()]
        self.rpn_head(levels)
        channels = levels[0].shape[1]
        self.box_head(x.new_zeros(NUM_PROPOSALS, channels, BOX_SIZE, BOX_SIZE))
        if self.mask_head is not None:
            self.mask_head(x.new_zeros(NUM_MASKS, channels, MASK_SIZE, MASK_SIZE))
