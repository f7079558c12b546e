"""CycleMLP (Chen et al., ICLR 2022): B1 and B2, whose only spatial mixing is a shift of channels before a linear layer.

Shapes: (N, H, W, C) throughout; stage i works on (N, H / 2^(i+2), W / 2^(i+2), C).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

# Blocks per stage; widths and MLP ratio are the same in both.
DEPTHS: Mapping[str, tuple[int, ...]] = MappingProxyType({"cyclemlp_b1": (2, 2, 4, 2), "cyclemlp_b2": (2, 3, 10, 3)})
WIDTHS = (64, 128, 320, 512)
MLP_RATIO = 4
STEPSIZE = 7  # the paper's 1 x 7 and 7 x 1; its released code takes 3, at the same cost


def order_channels(channels: int, stepsize: int) -> list[int]:
    """Return the channels sorted by their offset, -(stepsize // 2) first; channel 0 is not shifted."""
    half = stepsize // 2
    return sorted(range(channels), key=lambda channel: (channel + half) % stepsize)


class CycleFC(nn.Module):
    """A linear layer that reads channel c at offset ``(c + S // 2) mod S - S // 2`` along one axis; outside is 0.

    Channels of one offset are a strided slice, so that slices, a padding and a concatenation do, which every runtime
    knows. The linear layer takes them in the order of ``order_channels``: a published weight's columns would have to
    be put in it.

    Args:
        channels: Read and written.
        axis: 1 shifts along the height, 2 along the width.
        stepsize: S.
    """

    def __init__(self, channels: int, *, axis: int, stepsize: int = STEPSIZE) -> None:
        super().__init__()
        self.axis = axis
        self.stepsize = stepsize
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, H, W, C) to (N, H, W, C)."""
        half, length = self.stepsize // 2, x.shape[self.axis]
        sides = (half, half)
        padded = F.pad(x, (0, 0, 0, 0, *sides) if self.axis == 1 else (0, 0, *sides))
        shifted = [
            padded.narrow(self.axis, index, length)[..., (index - half) % self.stepsize :: self.stepsize]
            for index in range(self.stepsize)
        ]
        return cast(Tensor, self.fc(torch.cat(shifted, dim=-1)))


class CycleMixer(nn.Module):
    """Two Cycle FCs, along the width and the height, and a plain linear layer, weighted per picture and channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cycle_w = CycleFC(channels, axis=2)
        self.cycle_h = CycleFC(channels, axis=1)
        self.plain = nn.Linear(channels, channels, bias=False)
        self.reweight = _create_mlp(channels, channels // 4, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, H, W, C) to (N, H, W, C)."""
        branches = (self.cycle_w(x), self.cycle_h(x), self.plain(x))
        pooled = (branches[0] + branches[1] + branches[2]).mean(dim=(1, 2))  # (N, C)
        weights = self.reweight(pooled).unflatten(1, (-1, 3)).softmax(dim=-1)[:, None, None]  # (N, 1, 1, C, 3)
        y = branches[0] * weights[..., 0] + branches[1] * weights[..., 1] + branches[2] * weights[..., 2]
        return cast(Tensor, self.proj(y))


class Block(nn.Module):
    """Spatial mixing and an MLP, each behind a LayerNorm and with a shortcut."""

    def __init__(self, channels: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.mixer = CycleMixer(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = _create_mlp(channels, MLP_RATIO * channels, channels)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, H, W, C) to (N, H, W, C)."""
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + cast(Tensor, self.drop_path(self.mlp(self.norm2(x))))


class CycleMLP(nn.Module):
    """Overlapping patches, four stages with a strided convolution between them, and a classifier on the mean.

    Args:
        depths: Blocks per stage.
        num_classes: Outputs of the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 over all blocks.
    """

    def __init__(self, depths: tuple[int, ...], num_classes: int = 1000, *, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.merging = nn.ModuleList([nn.Conv2d(3, WIDTHS[0], 7, stride=4, padding=2)])
        for narrow, wide in itertools.pairwise(WIDTHS):
            self.merging.append(nn.Conv2d(narrow, wide, 3, stride=2, padding=1))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width, next(drop_paths)) for _ in range(depth)))
            for width, depth in zip(WIDTHS, depths, strict=True)
        )
        self.norm = nn.LayerNorm(WIDTHS[-1])
        self.head = nn.Linear(WIDTHS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) to logits (N, num_classes)."""
        for merging, stage in zip(self.merging, self.stages, strict=True):
            x = stage(merging(x).permute(0, 2, 3, 1))  # (N, H, W, C)
            x = x.permute(0, 3, 1, 2)  # (N, C, H, W)
        x = self.norm(x.permute(0, 2, 3, 1))  # (N, H, W, C)
        return cast(Tensor, self.head(x.mean(dim=(1, 2))))


def _create_mlp(channels: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, outputs))
