"""PVT, the Pyramid Vision Transformer (Wang et al., ICCV 2021, its first version): Tiny, Small, Medium and Large.

Shapes: input (N, 3, H, W); stage i works on L = (H / 2^(i+2)) (W / 2^(i+2)) tokens (N, L, C), and the last one on a
class token before them; attention reads its keys and values from L / R^2 tokens, R being the stage's reduction.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

# Table 1 of that paper: blocks per stage; all else is the same in the four of them.
DEPTHS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"pvt_tiny": (2, 2, 2, 2), "pvt_small": (3, 4, 6, 3), "pvt_medium": (3, 4, 18, 3), "pvt_large": (3, 8, 27, 3)}
)
WIDTHS = (64, 128, 320, 512)
HEADS = (1, 2, 5, 8)
MLP_RATIOS = (8, 8, 4, 4)
REDUCTIONS = (8, 4, 2, 1)
PATCHES = (4, 2, 2, 2)
TRAINED_SIZE = 224  # the position embeddings belong to it
NORM_EPS = 1e-6


class SpatialReductionAttention(nn.Module):
    """Attention of all tokens to keys and values on a map that a strided convolution made smaller."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        self.reduce = nn.Conv2d(channels, channels, reduction, stride=reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS) if reduction > 1 else None

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map tokens (N, L, C) of a map to (N, L, C)."""
        q = self._split_heads(self.q(x))  # (N, heads, L, C / heads)
        if self.reduce is not None and self.norm is not None:
            x = self.reduce(_to_map(x, height, width))  # (N, C, H / R, W / R)
            x = self.norm(x.flatten(2).transpose(1, 2))  # (N, L / R^2, C)
        k, v = (self._split_heads(part) for part in self.kv(x).chunk(2, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.proj(y.transpose(1, 2).flatten(2)))  # (N, L, C)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and with a shortcut."""

    def __init__(self, channels: int, heads: int, reduction: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=NORM_EPS)
        self.attention = SpatialReductionAttention(channels, heads, reduction)
        self.norm2 = nn.LayerNorm(channels, eps=NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(channels, mlp_ratio * channels), nn.GELU(), nn.Linear(mlp_ratio * channels, channels)
        )
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map tokens (N, L, C) of a map to (N, L, C)."""
        x = x + self.drop_path(self.attention(self.norm1(x), height, width))
        return x + cast(Tensor, self.drop_path(self.mlp(self.norm2(x))))


class Stage(nn.Module):
    """Patches become tokens, get their positions, and go through the blocks; the last stage has a class token."""

    def __init__(self, index: int, drop_paths: list[float], *, class_token: bool) -> None:
        super().__init__()
        channels, patch = WIDTHS[index], PATCHES[index]
        side = TRAINED_SIZE // 2 ** (index + 2)
        self.proj = nn.Conv2d(WIDTHS[index - 1] if index else 3, channels, patch, stride=patch)
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.positions = nn.Parameter(torch.zeros(1, channels, side, side))
        self.class_token = nn.Parameter(torch.zeros(1, 1, channels)) if class_token else None
        self.class_position = nn.Parameter(torch.zeros(1, 1, channels)) if class_token else None
        self.blocks = nn.ModuleList(
            Block(channels, HEADS[index], REDUCTIONS[index], MLP_RATIOS[index], drop_path) for drop_path in drop_paths
        )

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Map (N, C', H', W') to tokens (N, L, C), a class token first if there is one, and their H and W."""
        x = self.proj(x)
        height, width = x.shape[2:]
        positions: Tensor = self.positions
        if positions.shape[2:] != x.shape[2:]:
            positions = F.interpolate(positions, size=(height, width), mode="bilinear")
        x = self.norm(x.flatten(2).transpose(1, 2)) + positions.flatten(2).transpose(1, 2)  # (N, L, C)
        if self.class_token is not None and self.class_position is not None:
            x = torch.cat([(self.class_token + self.class_position).expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, height, width)
        return x, height, width


class PVT(nn.Module):
    """Four stages, and a classifier on the class token.

    Args:
        depths: Blocks per stage.
        num_classes: Outputs of the classifier.
        features_only: Return the maps of the four stages instead, at strides 4, 8, 16 and 32; there is no class token.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 over all blocks.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        num_classes: int = 1000,
        *,
        features_only: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            Stage(index, [next(drop_paths) for _ in range(depth)], class_token=index == 3 and not features_only)
            for index, depth in enumerate(depths)
        )
        self.norm = None if features_only else nn.LayerNorm(WIDTHS[-1], eps=NORM_EPS)
        self.head = None if features_only else nn.Linear(WIDTHS[-1], num_classes)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 or "class_" in name or "positions" in name:  # linear layers and embeddings
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Map (N, 3, H, W) to logits (N, num_classes), or to its four maps."""
        maps = []
        for stage in self.stages:
            tokens, height, width = stage(x)
            if self.norm is not None and self.head is not None and stage is self.stages[-1]:
                return cast(Tensor, self.head(self.norm(tokens[:, 0])))
            x = _to_map(tokens, height, width)
            maps.append(x)
        return maps


def _to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """Map (N, L, C) to (N, C, H, W)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)
