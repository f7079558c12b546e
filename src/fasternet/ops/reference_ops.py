"""The operators that PConv is compared with, each by name (Table 1, Table 2, Sections 3.1 and 3.3).

Regular, group, depthwise and pointwise convolutions are ``torch.nn.Conv2d`` with stride 1, "same" padding and
no bias. The T-shaped convolution (Fig. 5b, Eq. 6) is written here. Where a depthwise convolution replaces a regular
one, the network is widened from c to c' channels (Section 3.1; six times in an inverted residual block):
``dwconv3x3_6x`` is that layer, on 6C channels.
Legend: N C H W; Cp the channels with a k x k neighbourhood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasternet.ops.pconv import PConv2d, count_partial_channels


def tconv2d(x: Tensor, weight: Tensor, centre_weight: Tensor) -> Tensor:
    """Apply a T-shaped convolution with stride 1 and "same" zero padding (Section 3.3).

    It equals a k x k convolution whose filters, beyond the first Cp channels, are zero outside of the centre.

    Args:
        x: Input, (N, C, H, W).
        weight: Filters over the first Cp channels, (C_out, Cp, k, k) with odd k.
        centre_weight: Weights at the centre for the other channels, (C_out, C - Cp, 1, 1).

    Returns:
        (N, C_out, H, W), a new tensor.

    Raises:
        ValueError: The weights do not fit each other or ``x``.
    """
    Cp, k = weight.shape[1], weight.shape[-1]
    if x.shape[1] != Cp + centre_weight.shape[1]:
        raise ValueError(f"x has {x.shape[1]} channels, the weights have {Cp} + {centre_weight.shape[1]}")
    if k % 2 == 0:
        raise ValueError(f"weight must have an odd kernel size, got {k}")
    y = F.conv2d(x[:, :Cp], weight, padding=k // 2)  # (N, C_out, H, W)
    return y + F.conv2d(x[:, Cp:], centre_weight) if centre_weight.numel() else y


class TConv2d(nn.Module):
    """T-shaped convolution: a k x k window over Cp of C channels, the centre alone in the rest (Fig. 5b).

    Args:
        channels: C, of input and output.
        partial_ratio: ``r = Cp / C``, as in ``PConv2d``.
        kernel_size: k, odd.

    Raises:
        ValueError: An argument does not fit.
    """

    def __init__(self, channels: int, partial_ratio: float = 0.25, *, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        Cp = count_partial_channels(channels, partial_ratio)
        self.weight = nn.Parameter(torch.empty(channels, Cp, kernel_size, kernel_size))
        self.centre_weight = nn.Parameter(torch.empty(channels, channels - Cp, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``torch.nn.Conv2d`` does, counting the inputs that a filter has."""
        bound = 1 / math.sqrt(self.weight[0].numel() + self.centre_weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.centre_weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        return tconv2d(x, self.weight, self.centre_weight)


def _conv(channels: int, kernel_size: int, groups: int = 1) -> nn.Conv2d:
    if channels % groups:
        raise ValueError(f"channels must be a multiple of the {groups} groups, got {channels}")
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)


def _depthwise(channels: int, width: int = 1) -> nn.Conv2d:
    return _conv(width * channels, 3, groups=width * channels)


WIDTHS: Mapping[str, int] = MappingProxyType({f"dwconv3x3_{width}x": width for width in (2, 4, 6)})

OPERATORS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "conv3x3": lambda channels: _conv(channels, 3),
        "gconv3x3_16groups": lambda channels: _conv(channels, 3, groups=16),
        "dwconv3x3": _depthwise,
        **{name: partial(_depthwise, width=width) for name, width in WIDTHS.items()},
        "dwconv3x3+pwconv": lambda channels: nn.Sequential(_depthwise(channels), _conv(channels, 1)),
        "pwconv": lambda channels: _conv(channels, 1),
        "tconv3x3_r1/4": TConv2d,
        "pconv3x3_r1/4": PConv2d,
        "pconv3x3_r1/4+pwconv": lambda channels, **options: nn.Sequential(
            PConv2d(channels, **options), _conv(channels, 1)
        ),
    }
)


def create_operator(name: str, channels: int, **options: Any) -> nn.Module:
    """Create an operator that keeps the number of channels and the size of its input.

    Args:
        name: A name of ``OPERATORS``; Table 1 of the paper uses the same ones.
        channels: C, of input and output; an operator of ``WIDTHS`` takes and returns so many times as many.
        options: Options of the ``PConv2d`` in it, such as ``impl``.

    Raises:
        ValueError: ``name`` is unknown, or ``channels`` does not suit it.
    """
    if name not in OPERATORS:
        raise ValueError(f"operator {name!r} is not one of {', '.join(OPERATORS)}")
    return OPERATORS[name](channels, **options)
