"""The published detectors' files (mmdet 2: backbone, neck, RPN, box and mask head) in and out.

The tensors are the same under other names, but for the background: mmdet has it last among the classes and gives it
neither box nor mask, torchvision has it first, with a box and a mask that nobody reads. What the heads compute is made
equal by ``fasternet.detection.layers`` and by ``antialias=False``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasternet.detection.detector import Detector, Kind, create_detector
from fasternet.detection.optimize import check_unoptimized, fold_head_norms
from fasternet.models import convert
from fasternet.models.checkpoint import write_atomically
from fasternet.models.fasternet import FasterNet

# Our module and mmdet's; the backbone's names are in ``convert``.
_BODY, _BACKBONE = "backbone.body.", "backbone."
_MODULES: Mapping[str, str] = {
    **{f"backbone.fpn.inner_blocks.{i}.0": f"neck.lateral_convs.{i}.conv" for i in range(4)},
    **{f"backbone.fpn.layer_blocks.{i}.0": f"neck.fpn_convs.{i}.conv" for i in range(4)},
    "rpn.head.conv.0.0": "rpn_head.rpn_conv",
    "rpn.head.cls_logits": "rpn_head.rpn_cls",
    "rpn.head.bbox_pred": "rpn_head.rpn_reg",
    "roi_heads.box_head.fc6": "roi_head.bbox_head.shared_fcs.0",
    "roi_heads.box_head.fc7": "roi_head.bbox_head.shared_fcs.1",
    "roi_heads.box_predictor.cls_score": "roi_head.bbox_head.fc_cls",
    "roi_heads.box_predictor.bbox_pred": "roi_head.bbox_head.fc_reg",
    **{f"roi_heads.mask_head.{i}.0": f"roi_head.mask_head.convs.{i}.conv" for i in range(4)},
    "roi_heads.mask_predictor.conv5_mask": "roi_head.mask_head.upsample",
    "roi_heads.mask_predictor.mask_fcn_logits": "roi_head.mask_head.conv_logits",
}
_CLASSES = "roi_head.bbox_head.fc_cls"  # the background is a row of it, the first of ours, the last of mmdet's
_UNUSED = {"roi_head.bbox_head.fc_reg": 4, "roi_head.mask_head.conv_logits": 1}  # rows of ours for the background


def to_mmdet(model: Detector) -> dict[str, Tensor]:
    """Return a detector's tensors under mmdet's names, contiguous.

    The BN of neck and mask head, which the published detectors do not have, is folded into the convolutions: what is
    read again computes the same, with ``head_norm="none"``.

    Raises:
        ValueError: It is an optimised one, or its backbone is no FasterNet.
    """
    check_unoptimized(model)
    if not isinstance(model.backbone.body, FasterNet):
        raise ValueError(f"mmdet's format is known for FasterNet's backbones, and this is a {model.config.backbone}")
    if model.config.head_norm != "none":
        model = copy.deepcopy(model).eval()
        fold_head_norms(model)
    return {_rename(key): _export(_rename(key), tensor) for key, tensor in model.state_dict().items()}


def from_mmdet(
    state: Mapping[str, Tensor],
    *,
    source: str = "the state dict",
    backbone: str | None = None,
    backbone_options: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Detector:
    """Build a detector from tensors under mmdet's names.

    Args:
        state: As ``convert.read_state`` returns it; without a mask head it is a Faster R-CNN.
        source: Where the tensors come from, for messages.
        backbone: A FasterNet; None: told by its width and depths.
        backbone_options: Further arguments of ``create_backbone``, where the width is no published one.
        **fields: Fields of ``DetectorConfig`` that the tensors do not show: ``score_threshold``, ``min_size`` ...

    Returns:
        The detector in evaluation mode.

    Raises:
        ValueError: Keys are missing or extra, or shapes differ; the message lists them in the file's names.
    """
    if fields.get("head_norm", "none") != "none":
        raise ValueError(f"head_norm={fields['head_norm']} must be none: mmdet's detectors have no BN there")
    try:
        variant = backbone or convert.identify_variant(state)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{source} holds no detector of mmdet: {error}") from None
    kind: Kind = "mask_rcnn" if any(name.startswith("roi_head.mask_head.") for name in state) else "faster_rcnn"
    sizes = {
        "num_classes": max(_count_rows(state, f"{_CLASSES}.bias", 81) - 1, 1),
        "fpn_channels": _count_rows(state, "neck.lateral_convs.0.conv.weight", 256),
        "box_head_width": _count_rows(state, "roi_head.bbox_head.shared_fcs.0.weight", 1024),
        "mask_head_channels": _count_rows(state, "roi_head.mask_head.convs.0.conv.weight", 256),
    }
    model = create_detector(
        kind,
        variant,
        feature_norm=any(name.startswith(f"{_BACKBONE}norm0.") for name in state),
        backbone_options=backbone_options,
        **{"antialias": False, **sizes, **fields},
    )
    _check_fit(to_mmdet(model), state, source)
    names = {key: _rename(key) for key in model.state_dict()}
    model.load_state_dict({key: _import(name, state[name]) for key, name in names.items()})
    model.eval()
    return model


def load_mmdet(
    path: Path | str,
    backbone: str | None = None,
    *,
    backbone_options: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Detector:
    """Read a detector of mmdet 2 from a file; see ``from_mmdet`` for arguments and errors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or does not fit.
    """
    state = convert.read_state(Path(path))
    return from_mmdet(state, source=str(path), backbone=backbone, backbone_options=backbone_options, **fields)


def save_mmdet(path: Path | str, model: Detector) -> None:
    """Write a detector as mmdet 2 does; a file that is there is replaced only by a complete one.

    Args:
        path: What ``torch.load`` reads, or safetensors by suffix.
        model: A detector over a FasterNet; see ``to_mmdet``.

    Raises:
        ValueError: It is an optimised one, or its backbone is no FasterNet.
        OSError: The disk is full or not writable.
    """
    path, state = Path(path), to_mmdet(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: convert.write_state(temporary, state, "mmdet"))


def _rename(key: str) -> str:
    if key.startswith(_BODY):
        return _BACKBONE + convert.rename_key(key.removeprefix(_BODY), "official")
    module, _, tensor = key.rpartition(".")
    return f"{_MODULES[module]}.{tensor}"


def _export(name: str, tensor: Tensor) -> Tensor:
    """Give a tensor of ours the rows of mmdet's ``name``."""
    module = name.rpartition(".")[0]
    if module == _CLASSES:
        return tensor.roll(-1, 0)
    return tensor[_UNUSED.get(module, 0) :].contiguous() if tensor.dim() else tensor


def _import(name: str, tensor: Tensor) -> Tensor:
    """Give a tensor of mmdet's ``name`` our rows; a box and a mask of the background are 0."""
    module = name.rpartition(".")[0]
    if module == _CLASSES:
        return tensor.roll(1, 0)
    if rows := _UNUSED.get(module):
        return torch.cat([tensor.new_zeros(rows, *tensor.shape[1:]), tensor])
    return tensor


def _count_rows(state: Mapping[str, Tensor], name: str, published: int) -> int:
    """Return the first size of a tensor; where it is absent, which ``_check_fit`` says, the published one."""
    return state[name].shape[0] if name in state and state[name].dim() else published


def _check_fit(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    problems = {
        "missing": [name for name in wanted if name not in state],
        "not known": [name for name in state if name not in wanted],
        "of another shape": [
            f"{name} is {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    listing = "; ".join(f"{label}: {_shorten(names)}" for label, names in problems.items() if names)
    if listing:
        raise ValueError(f"{source} (mmdet keys) does not fit the detector: {listing}")


def _shorten(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
