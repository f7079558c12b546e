"""The operators of Table 2, and more of their kind, from any number of channels to any other (Section 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fasternet.ops import PConv2d
from fasternet.ops.reference_ops import TConv2d


class _TShaped(TConv2d):
    """T-shaped convolution to any number of channels, with or without bias."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__(in_channels)
        self.weight, self.centre_weight = (
            nn.Parameter(torch.empty(out_channels, *weight.shape[1:])) for weight in (self.weight, self.centre_weight)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels, 1, 1)) if bias else None
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.bias is None else y + self.bias


def _before_pwconv(spatial: Callable[[int], nn.Module]) -> Callable[[int, int, bool], nn.Module]:
    """Make a builder of an operator that keeps the channels, and the PWConv after it."""
    return lambda in_channels, out_channels, bias: nn.Sequential(
        spatial(in_channels), nn.Conv2d(in_channels, out_channels, 1, bias=bias)
    )


def _group_conv(channels: int, groups: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)


OPERATORS: Mapping[str, Callable[[int, int, bool], nn.Module]] = MappingProxyType(
    {
        "DWConv + PWConv": _before_pwconv(lambda channels: _group_conv(channels, channels)),
        "GConv(16) + PWConv": _before_pwconv(lambda channels: _group_conv(channels, 16)),
        "PConv + PWConv": _before_pwconv(PConv2d),
        "T-shaped": _TShaped,
        "PConv + PWConv r=1/8": _before_pwconv(lambda channels: PConv2d(channels, 1 / 8)),
        "PConv + PWConv r=1/2": _before_pwconv(lambda channels: PConv2d(channels, 1 / 2)),
    }
)
"""Operators by label, those of Table 2 first; each is called with in_channels, out_channels and bias."""
