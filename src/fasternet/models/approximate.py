"""PConv and PWConv in place of a trained convolution: least squares in closed form (Sections 3.3 and 4.1, Table 2).

The paper fits the replacement to feature maps by gradient descent. Without an activation between the two layers the
best fit has a closed form: a reduced-rank regression, which needs only second moments of the maps.

Legend: C and O channels of input and output, Cp of them convolved, k kernel size. At each position of the output, z
(D = k k Cp + C - Cp + 1) holds the patch of the convolved channels, the centre of the others, and a constant 1; y (O)
is what the convolution made. All moments are means over positions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasternet.ops import PConvPWConv

# Share of the maps' power that is added as white noise: where the pictures leave the fit open, it draws it to the
# closed form on the weights instead of to zero. Of a ResNet18 trained on flowers at 64 px, fitted to 300 pictures, 1e-2
# lowers the error on 200 others from 0.195 to 0.105 in layer4.0.conv2, where a picture has four positions, and changes
# that in layer1.0.conv2 (0.179) and layer2.1.conv1 (0.089) by less than 0.001; 1e-1 costs those 0.009 and 0.004.
WHITE_SHARE = 1e-2
_DEAD = 1e-30  # the same of maps that are zero everywhere


@dataclasses.dataclass(frozen=True)
class Moments:
    """Second moments of what a convolution reads and makes, in float64.

    Attributes:
        inputs: E z z^T, (D, D); None is the identity, which is that of white noise.
        cross: E y z^T, (O, D).
        power: E |y|^2.
        num_positions: Positions that were seen; None for white noise.
    """

    inputs: Tensor | None
    cross: Tensor
    power: float
    num_positions: int | None = None


@dataclasses.dataclass(frozen=True)
class Approximation:
    """The replacement's weights.

    Attributes:
        pconv: Filters, (R, Cp, k, k), R = min(Cp, O); with fewer outputs than Cp the other filters are free.
        pwconv: (O, C); None for a PConv alone.
        bias: Of the PWConv, (O); None where the convolution has none.
        error: Mean squared error over the variance of y: 0 is exact, 1 no better than the mean.
    """

    pconv: Tensor
    pwconv: Tensor | None
    bias: Tensor | None
    error: float


def find_filter_moments(conv: nn.Conv2d, partial_channels: int) -> Moments:
    """Return the moments that white noise (variance 1, independent in channels and positions) would have."""
    cp, k, num_outputs = partial_channels, conv.kernel_size[0], conv.out_channels
    weight = conv.weight.detach().double()
    part, rest = weight[:, :cp], weight[:, cp:, k // 2, k // 2]
    if conv.groups > 1:  # depthwise: filter i reads channel i only
        channels = torch.arange(num_outputs, device=weight.device)
        dense = weight.new_zeros(num_outputs, conv.in_channels)
        dense[channels, channels] = weight[:, 0, k // 2, k // 2]
        rest = dense[:, cp:]
        part = weight.new_zeros(num_outputs, cp, k, k)
        part[channels[:cp], channels[:cp]] = weight[:cp, 0]
    bias = weight.new_zeros(num_outputs) if conv.bias is None else conv.bias.detach().double()
    cross = torch.cat([part.flatten(1), rest, bias[:, None]], dim=1)  # (O, D)
    return Moments(None, cross, float(weight.square().sum() + bias.square().sum()))


def measure_moments(
    model: nn.Module, partial_channels: Mapping[str, int], batches: Iterable[Tensor]
) -> dict[str, Moments]:
    """Measure moments of convolutions of a network, all in one pass; no map is kept.

    Args:
        model: The network as it was trained, in evaluation mode; each convolution sees the maps of this network, not
            those of the layers that replace others before it.
        partial_channels: Cp by the name of the convolution.
        batches: Pictures, (N, C, H, W), normalised; few at a time, as patches take k * k times the room of the maps.

    Raises:
        ValueError: A map is not finite.
    """
    sums: dict[str, list[Any]] = {name: [0.0, 0.0, 0.0, 0] for name in partial_channels}

    def observe(name: str, conv: nn.Conv2d, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], y: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        z = _find_regressors(conv, x.double(), partial_channels[name])  # (D, N * H * W)
        y = y.double().flatten(2).transpose(0, 1).flatten(1)  # (O, N * H * W)
        for i, term in enumerate((z @ z.T, y @ z.T, float(y.square().sum()), y.shape[1])):
            sums[name][i] += term

    hooks = [
        model.get_submodule(name).register_forward_hook(functools.partial(observe, name), with_kwargs=True)
        for name in partial_channels
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name, (inputs, _, power, _) in sums.items():
        if not (torch.isfinite(inputs).all() and power < float("inf")):
            raise ValueError(f"the pictures give maps at {name} that are not finite")
    return {name: Moments(a / num, b / num, power / num, num) for name, (a, b, power, num) in sums.items()}


def _find_regressors(conv: nn.Conv2d, x: Tensor, partial_channels: int) -> Tensor:
    """Return z at each position of the output, (D, N * H * W)."""
    k, stride, dilation = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
    patches = F.unfold(
        x[:, :partial_channels], k, dilation=dilation, padding=dilation * (k // 2), stride=stride
    )  # (N, Cp * k * k, H * W)
    rest = x[:, partial_channels:, ::stride, ::stride].flatten(2)
    z = torch.cat([patches, rest, torch.ones_like(patches[:, :1])], dim=1)
    return z.transpose(0, 1).flatten(1)


def approximate_conv(
    conv: nn.Conv2d, partial_channels: int, moments: Moments | None = None, held_out: Moments | None = None
) -> Approximation:
    """Find the PConv and PWConv that come closest to a convolution.

    Minimises E |y - U K a - W b|^2 over U (O, Cp), K (Cp, k k Cp) and W, where a is the patch of the convolved channels
    and b the rest of z: what b explains is taken out of a and y, the best map of rank Cp of what is left gives U and K,
    and W follows. On white noise that is a singular value decomposition of the filters.

    Args:
        conv: The convolution, regular or depthwise.
        partial_channels: Cp; the first ones.
        moments: Of ``measure_moments``; None takes white noise: closeness of the weights.
        held_out: Of other pictures, for the error: on those that were fitted it is too small.

    Returns:
        Weights and the error: on the maps of ``held_out``, else of ``moments``, else on the weights.
    """
    white = find_filter_moments(conv, partial_channels)
    k, num_rest = conv.kernel_size[0], conv.in_channels - partial_channels
    size = white.cross.shape[1] - (conv.bias is None)  # without a bias there is no constant to fit
    u, filters, w = _regress(_blend(moments, white), partial_channels, partial_channels * k * k, size)
    unused = u.new_zeros(conv.out_channels, partial_channels - len(filters))
    return Approximation(
        pconv=filters.reshape(-1, partial_channels, k, k),
        pwconv=torch.cat([u, unused, w[:, :num_rest]], dim=1),
        bias=None if conv.bias is None else w[:, num_rest],
        error=_find_error(held_out or moments or white, torch.cat([u @ filters, w], dim=1)),
    )


@torch.no_grad()
def copy_approximation(found: Approximation, layer: PConvPWConv) -> None:
    """Write the weights of an approximation into a layer."""
    layer.pconv.weight[: len(found.pconv)] = found.pconv.to(layer.pconv.weight)
    assert found.pwconv is not None
    layer.pwconv.weight.copy_(found.pwconv[:, :, None, None])
    if layer.pwconv.bias is not None:
        assert found.bias is not None
        layer.pwconv.bias.copy_(found.bias)


def _regress(moments: Moments, rank: int, split: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Regress y on z[:split] with a map of the given rank and on z[split:size] with any: U (O, R), K, W."""
    s_ya, s_yb = moments.cross[:, :split], moments.cross[:, split:size]
    if moments.inputs is None:  # a and b are uncorrelated, and white
        full_rank, explained = s_ya, s_ya @ s_ya.T
    else:
        s_aa, s_ab = moments.inputs[:split, :split], moments.inputs[:split, split:size]
        s_bb = moments.inputs[split:size, split:size]
        from_b = torch.linalg.solve(s_bb, s_ab.T)  # (b, a): how b predicts a
        left = s_ya - s_yb @ from_b
        full_rank = torch.linalg.solve(s_aa - s_ab @ from_b, left.T).T  # (O, a)
        explained = full_rank @ left.T
    rank = min(rank, len(explained))
    u = torch.linalg.eigh((explained + explained.T) / 2).eigenvectors[:, -rank:].flip(1)
    filters = u.T @ full_rank  # (R, a)
    if moments.inputs is None:
        return u, filters, s_yb
    return u, filters, torch.linalg.solve(s_bb, (s_yb - u @ filters @ s_ab).T).T


def approximate_conv_alone(
    conv: nn.Conv2d, partial_channels: int, moments: Moments | None = None, held_out: Moments | None = None
) -> Approximation:
    """Find the PConv without PWConv that comes closest: its rest passes through, so only its part can be fitted.

    Args:
        conv: A convolution with as many outputs as inputs, stride 1 and no bias.
        partial_channels: Cp; the first ones.
        moments: As in ``approximate_conv``.
        held_out: Likewise.

    Returns:
        Filters and the error over all channels, measured as in ``approximate_conv``.
    """
    white = find_filter_moments(conv, partial_channels)
    fitted, k = _blend(moments, white), conv.kernel_size[0]
    filters = fitted.cross[:partial_channels, : partial_channels * k * k]
    if fitted.inputs is not None:
        split = filters.shape[1]
        filters = torch.linalg.solve(fitted.inputs[:split, :split], filters.T).T
    passed = torch.eye(conv.in_channels - partial_channels).to(filters)
    whole = torch.block_diag(filters, passed)  # type: ignore[no-untyped-call]  # (C, D - 1)
    return Approximation(
        filters.reshape(-1, partial_channels, k, k), None, None, _find_error(held_out or moments or white, whole)
    )


def _blend(moments: Moments | None, white: Moments) -> Moments:
    """Add a little white noise to the moments of maps, none to the constant; without maps there is nothing else."""
    if moments is None or moments.inputs is None:
        return white
    power = moments.inputs.diagonal()[:-1]
    share = (WHITE_SHARE * power.mean()).clamp(min=_DEAD)
    noise = torch.cat([share.expand(len(power)), share.new_zeros(1)])  # (D)
    return dataclasses.replace(moments, inputs=moments.inputs + noise.diag(), cross=moments.cross + white.cross * noise)


def _find_error(moments: Moments, weight: Tensor) -> float:
    """Return E |y - weight z|^2 over the variance of y; ``weight`` is (O, D) or without the constant's column."""
    size = weight.shape[1]
    product = weight if moments.inputs is None else weight @ moments.inputs[:size, :size]
    squared = moments.power - float(((2 * moments.cross[:, :size] - product) * weight).sum())
    variance = moments.power - float(moments.cross[:, -1].square().sum())
    return max(squared, 0.0) / max(variance, torch.finfo(torch.float64).tiny)
