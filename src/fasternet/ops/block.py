"""The FasterNet block as one operator for inference (Fig. 4): the oracle, and the same function without full copies.

``y = x + W2 act(norm(W1 pconv(x)))``. Shapes: ``x`` and ``y`` (N, C, H, W), hidden (N, 2C, H, W). The oracle copies the
activation twice in full (concatenation, sum). ``block_restore_`` copies only the convolved quarter: it writes
PConv's result into ``x``, runs the first pointwise convolution on that, puts the kept quarter back, and adds the second
pointwise convolution to ``x``. The published in-place form left out the third step, and thereby changed the function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fasternet.ops import eager

Pointwise = Literal["conv", "matmul"]


class BlockWeights(NamedTuple):
    """What a block computes with; BN and layer scale are already folded into it.

    Attributes:
        partial: PConv's filters, (Cp, Cp, k, k).
        expand: First pointwise convolution, (2C, C, 1, 1).
        expand_bias: (2C,) or None.
        project: Second pointwise convolution, (C, 2C, 1, 1).
        start: First channel that PConv convolves.
        project_bias: (C,) or None.
    """

    partial: Tensor
    expand: Tensor
    expand_bias: Tensor | None
    project: Tensor
    start: int
    project_bias: Tensor | None = None


def block_split_cat(x: Tensor, weights: BlockWeights, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute the block as the paper writes it: the oracle. ``x`` is not modified."""
    y = eager.split_cat(x, weights.partial, dilation=1, start=weights.start)
    h = activation(F.conv2d(y, weights.expand, weights.expand_bias))
    return x + F.conv2d(h, weights.project, weights.project_bias)


def block_restore_(
    x: Tensor, weights: BlockWeights, activation: Callable[[Tensor], Tensor], *, pointwise: Pointwise = "conv"
) -> Tensor:
    """Compute the block into ``x`` and return it: what the oracle computes, up to the kernels' rounding.

    Args:
        x: (N, C, H, W), owned by the caller and overwritten with the result.
        weights: The block's weights.
        activation: Normalisation (where it cannot be folded) and activation of the hidden map; may work in place.
        pointwise: ``"conv"``, or ``"matmul"`` for matrix products over the pixels; then ``x`` must be channels_last.
    """
    part = x[:, weights.start : weights.start + weights.partial.shape[0]]
    kept = part.clone(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)
    part.copy_(F.conv2d(kept, weights.partial, padding=weights.partial.shape[-1] // 2))
    if pointwise == "conv":
        h = activation(F.conv2d(x, weights.expand, weights.expand_bias))
        part.copy_(kept)
        return x.add_(F.conv2d(h, weights.project, weights.project_bias))
    pixels = x.permute(0, 2, 3, 1)  # (N, H, W, C), dense
    h = F.linear(pixels, weights.expand.flatten(1), weights.expand_bias)  # (N, H, W, 2C)
    h = activation(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    part.copy_(kept)
    pixels.view(-1, x.shape[1]).addmm_(h.reshape(-1, h.shape[-1]), weights.project.flatten(1).t())
    return x if weights.project_bias is None else x.add_(weights.project_bias[:, None, None])
