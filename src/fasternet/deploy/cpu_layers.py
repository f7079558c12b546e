"""A FasterNet as the layers of the C++ engine: BN folded in double precision, layer scale in the second projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasternet import native
from fasternet.deploy.optimize import InferenceFasterNet, from_timm
from fasternet.models.fasternet import ConvNorm, FasterNet, FasterNetBlock, Head, Stage
from fasternet.native import Array, Block, Feature, Layer, Patch

_ACTIVATIONS: dict[type[nn.Module], native.Activation] = {nn.GELU: "gelu", nn.ReLU: "relu"}


def to_layers(
    model: nn.Module, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> list[Layer]:
    """Return what the C++ engine computes a FasterNet with; it shares no memory with the model.

    Args:
        model: A ``FasterNet`` or timm's, as a classifier or for its feature maps; in any mode, on any device.
        mean: Of each channel of the pictures, from 0 to 1; with ``std`` it lets the engine take uint8 pictures.
        std: Of each channel.

    Returns:
        The embedding, then blocks and mergings, feature maps where the model gives them, and a classifier's head.
        Stages behind the last wanted map are left out.

    Raises:
        ValueError: ``model`` is no FasterNet, has been optimised already, or has a norm that cannot be folded.
    """
    if isinstance(model, InferenceFasterNet):
        raise ValueError("model is optimised for eager already: give the one that it was made from")
    if not isinstance(model, FasterNet):
        model = from_timm(model)
    if model.config.norm != "bn":
        raise ValueError(
            f"engine cpu has no norm {model.config.norm!r}, which depends on the input and is never folded: "
            "take another engine"
        )
    layers: list[Layer] = [_to_patch(model.embedding, *_check_normalisation(mean, std, model.config.in_chans))]
    wanted = None if model.head is not None else model.out_indices
    for i, stage in enumerate(model.stages):
        stage = cast(Stage, stage)
        if isinstance(stage.merging, ConvNorm):
            layers.append(_to_patch(stage.merging))
        layers += [to_block(cast(FasterNetBlock, block)) for block in stage.blocks]
        if wanted is not None and i in wanted:
            layers.append(_to_feature(model, i))
            if i == wanted[-1]:
                return layers
    return [*layers, _to_head(cast(Head, model.head))]


def _check_normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[Array | None, Array | None]:
    if mean is None and std is None:
        return None, None
    for name, values in (("mean", mean), ("std", std)):
        if values is None or len(values) != channels or not np.isfinite(values).all():
            raise ValueError(f"{name} must hold {channels} finite numbers, one for each channel, got {values}")
    if min(cast(Sequence[float], std)) <= 0:
        raise ValueError(f"std must be positive, got {std}")
    return np.array(mean, np.float32), np.array(std, np.float32)


def _double(tensor: Tensor) -> Tensor:
    """Return a copy in double precision in main memory."""
    return tensor.detach().to("cpu", torch.float64, copy=True)


def _single(tensor: Tensor) -> Array:
    return cast(Array, tensor.detach().to("cpu", torch.float32, copy=True).contiguous().numpy())


def _find_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift that a BN in evaluation mode is, in double precision."""
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"engine cpu folds BN with running statistics, not {norm}: take another engine")
    scale = (_double(norm.running_var) + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * _double(norm.weight)
    shift = -_double(norm.running_mean) * scale
    return scale, shift + _double(norm.bias) if norm.affine else shift


def _fold(conv: nn.Conv2d, norm: nn.Module) -> tuple[Array, Array | None]:
    """Return weight and bias of a convolution with the norm behind it; a norm folded before is an identity."""
    weight, bias = _double(conv.weight), None if conv.bias is None else _double(conv.bias)
    if not isinstance(norm, nn.Identity):
        scale, shift = _find_affine(norm)
        weight = weight * scale[:, None, None, None]
        bias = shift if bias is None else bias * scale + shift
    return _single(weight), None if bias is None else _single(bias)


def _to_patch(layer: ConvNorm, mean: Array | None = None, std: Array | None = None) -> Patch:
    return Patch(*_fold(layer.conv, layer.norm), mean, std)


def to_block(block: FasterNetBlock) -> Block:
    """Return what the C++ engine computes a block with, BN and layer scale folded.

    Raises:
        ValueError: PConv is dilated, or the norm or activation is one that the engine has not.
    """
    if block.pconv.dilation != 1:
        raise ValueError(f"engine cpu has no PConv of dilation {block.pconv.dilation}: take another engine")
    expand, expand_bias = _fold(block.pwconv1, block.norm)
    project, bias = _double(block.pwconv2.weight).flatten(1), block.pwconv2.bias  # (C, hidden)
    if block.layer_scale is not None:
        scale = _double(block.layer_scale)
        project, bias = project * scale[:, None], None if bias is None else _double(bias) * scale
    return Block(
        partial=_single(block.pconv.weight),
        expand=expand.reshape(expand.shape[:2]),
        expand_bias=expand_bias,
        project=_single(project),
        project_bias=None if bias is None else _single(bias),
        start=block.pconv.start,
        activation=_name_activation(block.act),
    )


def _to_feature(model: FasterNet, stage: int) -> Feature:
    channels = model.config.stage_channels[stage]
    if str(stage) not in model.feature_norms:
        return Feature(channels)
    scale, shift = _find_affine(model.feature_norms[str(stage)])
    return Feature(channels, _single(scale), _single(shift))


def _to_head(head: Head) -> native.Head:
    weight, bias = _fold(head.pwconv, nn.Identity())
    fc = head.fc if isinstance(head.fc, nn.Linear) else None
    return native.Head(
        weight=weight.reshape(weight.shape[:2]),
        bias=bias,
        classifier=None if fc is None else _single(fc.weight),
        classifier_bias=None if fc is None or fc.bias is None else _single(fc.bias),
        activation=_name_activation(head.act),
    )


def _name_activation(activation: nn.Module) -> native.Activation:
    name = _ACTIVATIONS.get(type(activation))
    if name is None or getattr(activation, "approximate", "none") != "none":
        raise ValueError(f"engine cpu has no activation {activation}: take another engine")
    return name
