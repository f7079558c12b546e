"""A block in the style of YOLOv8's C2f, for ``fasternet surgery runs/c2f.py:create --input-channels 64``."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


def convolve(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Make a convolution with BN and SiLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.SiLU(inplace=True))


class Bottleneck(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(convolve(channels, channels, 3), convolve(channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        return x + cast(Tensor, self.convs(x))


class C2f(nn.Module):
    """Half of the channels passes bottlenecks one after the other; every step of it is concatenated."""

    def __init__(self, channels: int, num_bottlenecks: int) -> None:
        super().__init__()
        self.width = channels // 2
        self.enter = convolve(channels, channels, 1)
        self.bottlenecks = nn.ModuleList(Bottleneck(self.width) for _ in range(num_bottlenecks))
        self.leave = convolve((2 + num_bottlenecks) * self.width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        first, last = torch.split(self.enter(x), [self.width, self.width], dim=1)
        steps = [first, last]
        for bottleneck in self.bottlenecks:
            steps.append(bottleneck(steps[-1]))
        return cast(Tensor, self.leave(torch.cat(steps, dim=1)))


def create() -> nn.Module:
    """Make the block of 64 channels with two bottlenecks, as the smallest YOLOv8 has it at stride 8."""
    return C2f(64, 2)
