"""Mask R-CNN and Faster R-CNN over FasterNet or a rival (Section 4.4, Table 4), on torchvision's detection models.

The network is that of the published detectors: FPN over four maps, three anchors a position, a box head of two
linear layers, a mask head of four convolutions; what is added to the backbone is Xavier-initialised (Appendix B).
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fasternet.detection.heads import Heads
from fasternet.detection.layers import (
    ASPECT_RATIOS,
    AnchorMatcher,
    Anchors,
    ProposalNetwork,
    RegionAlign,
    SymmetricBoxCoder,
)
from fasternet.detection.transform import DetectorTransform
from fasternet.rivals.backbone import create_backbone
from fasternet.rivals.network import is_fasternet, read_options
from fasternet.train.optim import freeze_stages, keep_frozen

Kind = Literal["mask_rcnn", "faster_rcnn"]
HeadNorm = Literal["none", "bn"]
BOX_SIZE, MASK_SIZE = 7, 14  # sides of what the heads see of a region
MASK_LAYERS = 4
NORM_LAYERS: Mapping[HeadNorm, type[nn.Module] | None] = {"none": None, "bn": nn.BatchNorm2d}
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
RPN_OVERLAPS = (0.7, 0.3)  # of an anchor with an object: from here on it is one, below it is background

# Appendix B, Table 7: stochastic depth of the variants that were published.
DROP_PATH_RATES: Mapping[str, float] = {"fasternet_s": 0.15, "fasternet_m": 0.2, "fasternet_l": 0.3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """What defines a detector; a model folder keeps it.

    Attributes:
        kind: With masks, or boxes alone.
        backbone: Name for ``create_backbone``.
        num_classes: Kinds of objects; the background is not counted.
        min_size: Shorter side of the pictures that the network sees, in pixels.
        max_size: Their longer side at most.
        antialias: Average where a picture shrinks; the published detectors do not.
        fpn_channels: Channels of the pyramid.
        box_head_width: Hidden width of the box head.
        mask_head_channels: Channels of the mask head.
        head_norm: ``bn`` puts a BN behind each convolution of the pyramid and of the mask head, which learn faster from
            scratch so; the published detectors have none.
        score_threshold: Detections below it are dropped.
        nms_threshold: Of two detections of a class that overlap more than this, the weaker is dropped.
        detections_per_image: At most.
        backbone_options: Further arguments of ``create_backbone``: ``feature_norm``, ``width`` ...
    """

    kind: Kind = "mask_rcnn"
    backbone: str
    num_classes: int
    min_size: int = 800
    max_size: int = 1333
    antialias: bool = True
    fpn_channels: int = 256
    box_head_width: int = 1024
    mask_head_channels: int = 256
    head_norm: HeadNorm = "none"
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections_per_image: int = 100
    backbone_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in (("kind", Kind), ("head_norm", HeadNorm)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(get_args(choices))}")
        for name in (
            "num_classes",
            "min_size",
            "max_size",
            "fpn_channels",
            "box_head_width",
            "mask_head_channels",
            "detections_per_image",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.max_size < self.min_size:
            raise ValueError(f"max_size={self.max_size} must be at least min_size={self.min_size}")
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


class PyramidBackbone(nn.Module):
    """A backbone and its feature pyramid (FPN): pictures to maps of equal width at strides of 4 to 64.

    Attributes:
        body: Maps pictures to four maps.
        fpn: The neck.
        out_channels: Channels of every level.
    """

    def __init__(self, body: nn.Module, out_channels: int, head_norm: HeadNorm = "none") -> None:
        super().__init__()
        self.body = body
        channels = [*cast(tuple[int, ...], body.feature_channels)]
        self.fpn = FeaturePyramidNetwork(channels, out_channels, LastLevelMaxPool(), NORM_LAYERS[head_norm])
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) to levels "0" to "3" and "pool"."""
        maps = OrderedDict((str(i), x) for i, x in enumerate(self.body(x)))
        return cast(dict[str, Tensor], self.fpn(maps))


class Detector(GeneralizedRCNN):  # type: ignore[misc]
    """A detector with torchvision's face: a list of pictures (3, H, W) of floats from 0 to 1, to dictionaries.

    In training mode it takes targets (``boxes`` (K, 4), ``labels`` (K,) from 1 on, ``masks`` (K, H, W)) too, pictures
    resized already, and returns the losses; else it returns of each picture ``boxes``, ``labels``, ``scores`` and,
    with masks, ``masks`` (K, 1, H, W), the best first.

    Attributes:
        config: What it is.
        freeze_stages: Stages, from the first, that are not trained, the embedding with them.
        frozen_batch_norm: BN keeps its statistics in training.
    """

    def __init__(self, config: DetectorConfig, body: nn.Module) -> None:
        backbone = PyramidBackbone(body, config.fpn_channels, config.head_norm)
        rpn = _create_rpn(config)
        super().__init__(backbone, rpn, _create_heads(config), _create_transform(config))
        self.config = config
        self.freeze_stages, self.frozen_batch_norm = 0, False
        for part in (backbone.fpn, rpn, self.roi_heads):
            part.apply(_init_xavier)

    def train(self, mode: bool = True) -> Detector:
        """Switch to training, all but what is frozen."""
        super().train(mode)
        keep_frozen(self, self.freeze_stages, batch_norm=self.frozen_batch_norm)
        return self

    def freeze(self, stages: int, *, batch_norm: bool) -> None:
        """Train the backbone, but for its first stages with their BN; ``batch_norm``: every BN keeps its statistics.

        Raises:
            ValueError: There are not that many stages.
        """
        self.backbone.body.requires_grad_(True)
        freeze_stages(self, stages)
        self.freeze_stages, self.frozen_batch_norm = stages, batch_norm
        self.train(self.training)


def create_mask_rcnn(backbone: str, *, num_classes: int, **options: Any) -> Detector:
    """Create a Mask R-CNN: boxes, classes and masks; see ``create_detector`` for options and errors."""
    return create_detector("mask_rcnn", backbone, num_classes=num_classes, **options)


def create_faster_rcnn(backbone: str, *, num_classes: int, **options: Any) -> Detector:
    """Create a Faster R-CNN: boxes and classes; see ``create_detector`` for options and errors."""
    return create_detector("faster_rcnn", backbone, num_classes=num_classes, **options)


def create_detector(
    kind: Kind,
    backbone: str,
    *,
    num_classes: int,
    pretrained_backbone: bool = False,
    backbone_checkpoint: Path | str | None = None,
    feature_norm: bool | None = None,
    drop_path_rate: float | None = None,
    freeze_stages: int = 0,
    frozen_batch_norm: bool = False,
    backbone_options: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Detector:
    """Create a detector (Section 4.4).

    Args:
        kind: ``"mask_rcnn"`` or ``"faster_rcnn"``.
        backbone: A FasterNet (``fasternet_s``), or a rival of Table 4 (``ResNet50``, ``PVT-Small`` ...).
        num_classes: Kinds of objects; the background, which torchvision counts, is not counted.
        pretrained_backbone: Start from published ImageNet weights, downloading them once.
        backbone_checkpoint: Start from these weights: a model or run folder, or a file in any format.
        feature_norm: A BN on each of FasterNet's maps, as in the published detectors; None: as ``backbone_options`` has
            it, else for a FasterNet, yes.
        drop_path_rate: Stochastic depth; None: as ``backbone_options`` has it, else as published for S, M and L, 0 for
            the others.
        freeze_stages: Stages of a FasterNet that are not trained, from the first, with the embedding.
        frozen_batch_norm: BN keeps its statistics, in the whole detector.
        backbone_options: Further arguments of ``create_backbone``: ``width``, ``depths`` ...
        **fields: Fields of ``DetectorConfig``: ``min_size``, ``fpn_channels``, ``score_threshold`` ...

    Returns:
        The detector in training mode, as every new module.

    Raises:
        ValueError: A name, an option or a checkpoint does not fit.
        FileNotFoundError: There is no such checkpoint.
        ConnectionError: The weights cannot be downloaded.
    """
    allowed = [f.name for f in dataclasses.fields(DetectorConfig) if f.name not in ("kind", "backbone")]
    if unknown := sorted(set(fields) - set(allowed)):
        raise ValueError(f"unknown option {', '.join(unknown)}: a detector takes {', '.join(allowed)}")
    brought = read_options(backbone, Path(backbone_checkpoint)) if backbone_checkpoint is not None else {}
    given = {"feature_norm": feature_norm, "drop_path_rate": drop_path_rate}
    given = {name: value for name, value in given.items() if value is not None}
    options: dict[str, Any] = {**brought, **(backbone_options or {}), **given}
    if is_fasternet(backbone):
        options.setdefault("feature_norm", True)
        options.setdefault("drop_path_rate", DROP_PATH_RATES.get(backbone.partition(".")[0], 0.0))
    elif options.pop("feature_norm", False):
        raise ValueError(f"feature_norm=True is for FasterNet's maps, and the backbone is {backbone}")
    if options.get("drop_path_rate") == 0:
        del options["drop_path_rate"]  # every network's default
    config = DetectorConfig(kind=kind, backbone=backbone, num_classes=num_classes, backbone_options=options, **fields)
    body = create_backbone(
        backbone, pretrained=pretrained_backbone, checkpoint_path=backbone_checkpoint, **config.backbone_options
    )
    detector = Detector(config, body)
    detector.freeze(freeze_stages, batch_norm=frozen_batch_norm)
    return detector


def build_detector(config: DetectorConfig) -> Detector:
    """Build the detector of a configuration, with random weights."""
    return Detector(config, create_backbone(config.backbone, **config.backbone_options))


def _create_transform(config: DetectorConfig) -> DetectorTransform:
    return DetectorTransform(config.min_size, config.max_size, antialias=config.antialias)


def _create_rpn(config: DetectorConfig) -> ProposalNetwork:
    rpn = ProposalNetwork(
        Anchors(),
        RPNHead(config.fpn_channels, len(ASPECT_RATIOS)),
        *RPN_OVERLAPS,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 1000, "testing": 1000},
        nms_thresh=0.7,
    )
    rpn.box_coder = SymmetricBoxCoder(rpn.box_coder.weights)
    rpn.proposal_matcher = AnchorMatcher(*RPN_OVERLAPS, allow_low_quality_matches=True)
    return rpn


def _create_heads(config: DetectorConfig) -> Heads:
    """Return the heads; torchvision counts the background as class 0."""
    num_outputs = config.num_classes + 1
    masks: dict[str, nn.Module] = {}
    if config.kind == "mask_rcnn":
        width = config.mask_head_channels
        masks = {
            "mask_roi_pool": RegionAlign(MASK_SIZE),
            "mask_head": MaskRCNNHeads(
                config.fpn_channels, [width] * MASK_LAYERS, dilation=1, norm_layer=NORM_LAYERS[config.head_norm]
            ),
            "mask_predictor": MaskRCNNPredictor(width, width, num_outputs),
        }
    heads = Heads(
        RegionAlign(BOX_SIZE),
        TwoMLPHead(config.fpn_channels * BOX_SIZE**2, config.box_head_width),
        FastRCNNPredictor(config.box_head_width, num_outputs),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=512,
        positive_fraction=0.25,
        bbox_reg_weights=BOX_WEIGHTS,
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_threshold,
        detections_per_img=config.detections_per_image,
        **masks,
    )
    heads.box_coder = SymmetricBoxCoder(BOX_WEIGHTS)
    return heads


def _init_xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
