"""A FasterNet as the layers of the C++ engine: BN folded in double precision, layer scale in the second projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fasternet import native
from fasternet.deploy.optimize import InferenceFasterNet, from_timm
from fasternet.deploy.published import NORMS, check_block, check_calls, check_conv, check_type
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
        ValueError: ``model`` is no FasterNet, has been optimised already, has a part that is not the published one
            (another classifier than a linear layer too), hooks, or a norm that cannot be folded.
    """
    if isinstance(model, InferenceFasterNet):
        raise ValueError("model is optimised for eager already: give the one that it was made from")
    if not isinstance(model, FasterNet):
        model = from_timm(model)
    if type(model) is not FasterNet:
        raise ValueError(f"model is a {type(model).__name__}, a class of its own, which may compute something else")
    check_calls(model)
    if model.config.norm != "bn":
        raise ValueError(
            f"engine cpu has no norm {model.config.norm!r}, which depends on the input and is never folded: "
            "take another engine"
        )
    layers: list[Layer] = [_to_patch(model.embedding, 4, *_check_normalisation(mean, std, model.config.in_chans))]
    wanted = None if model.head is not None else model.out_indices
    for i, stage in enumerate(model.stages):
        stage = cast(Stage, stage)
        check_type("stage", stage, Stage)
        if i > 0 or type(stage.merging) is not nn.Identity:
            layers.append(_to_patch(cast(ConvNorm, stage.merging), 2))
        check_type("sequence of blocks", stage.blocks, nn.Sequential)
        for block in stage.blocks:
            check_type("block", block, FasterNetBlock)
            layers.append(to_block(cast(FasterNetBlock, block)))
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
    arrays = []
    for name, values, allowed in (("mean", mean, "from 0 to 1"), ("std", std, "above 0")):
        try:
            array = np.array(values, np.float32)
        except (ValueError, TypeError):
            array = np.empty(0, np.float32)
        fits = array.shape == (channels,) and np.isfinite(array).all()
        if not fits or not ((array >= 0) & (array <= 1) if name == "mean" else array > 0).all():
            raise ValueError(f"{name} must hold {channels} numbers {allowed}, one for each channel, not {values!r}")
        arrays.append(array)
    return arrays[0], arrays[1]


def _double(tensor: Tensor) -> Tensor:
    """Return a copy in double precision in main memory."""
    return tensor.detach().to("cpu", torch.float64, copy=True)


def _single(tensor: Tensor) -> Array:
    return cast(Array, tensor.detach().to("cpu", torch.float32, copy=True).contiguous().numpy())


def _find_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift that a BN in evaluation mode is, in double precision."""
    if type(norm) not in NORMS or cast(nn.BatchNorm2d, norm).running_mean is None:
        raise ValueError(f"engine cpu folds BN with running statistics, not {norm}: take another engine")
    norm = cast(nn.BatchNorm2d, norm)
    scale = (_double(cast(Tensor, norm.running_var)) + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * _double(norm.weight)
    shift = -_double(cast(Tensor, norm.running_mean)) * scale
    return scale, shift + _double(norm.bias) if norm.affine else shift


def _fold(conv: nn.Conv2d, norm: nn.Module) -> tuple[Array, Array | None]:
    """Return weight and bias of a convolution with the norm behind it; a norm folded before is an identity."""
    weight, bias = _double(conv.weight), None if conv.bias is None else _double(conv.bias)
    if type(norm) is not nn.Identity:
        scale, shift = _find_affine(norm)
        weight = weight * scale[:, None, None, None]
        bias = shift if bias is None else bias * scale + shift
    return _single(weight), None if bias is None else _single(bias)


def _to_patch(layer: ConvNorm, kernel_size: int, mean: Array | None = None, std: Array | None = None) -> Patch:
    check_type("embedding or merging", layer, ConvNorm)
    check_conv(layer.conv, kernel_size, stride=kernel_size)
    return Patch(*_fold(layer.conv, layer.norm), mean, std)


def to_block(block: FasterNetBlock) -> Block:
    """Return what the C++ engine computes a block with, BN and layer scale folded.

    Raises:
        ValueError: A part is not the published one, PConv is dilated, or the norm or activation is one that the engine
            has not.
    """
    check_block(block)
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
    check_type("head", head, Head)
    check_type("dropout", head.drop, nn.Dropout, nn.Identity)
    check_conv(head.pwconv, 1)
    if type(head.fc) not in (nn.Linear, nn.Identity):
        raise ValueError(f"the classifier must be a Linear layer or an Identity, not {type(head.fc).__name__}")
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
