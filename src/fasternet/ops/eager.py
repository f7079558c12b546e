"""PConv in plain PyTorch (Section 3.2; Appendix E, Listing 1): the oracle, and the forms compared with it.

Shapes: ``x`` (N, C, H, W), ``weight`` (Cp, Cp, k, k). Channels ``start .. start + Cp`` are convolved with stride 1 and
"same" zero padding, the others pass through.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve_part(x: Tensor, weight: Tensor, *, dilation: int, start: int) -> Tensor:
    """Convolve channels ``start .. start + Cp`` of ``x``; return only them, (N, Cp, H, W)."""
    part = x[:, start : start + weight.shape[0]]
    return F.conv2d(part, weight, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)


def split_cat(x: Tensor, weight: Tensor, *, dilation: int, start: int) -> Tensor:
    """Convolve a part and concatenate it with the rest: the oracle.

    Slices rather than ``torch.split``: exporters turn a split into a node of its own.
    """
    y = convolve_part(x, weight, dilation=dilation, start=start)
    stop = start + weight.shape[0]
    parts = [part for part in (x[:, :start], y, x[:, stop:]) if part.shape[1]]
    return torch.cat(parts, dim=1)


def slicing(x: Tensor, weight: Tensor, *, dilation: int, start: int) -> Tensor:
    """Clone ``x``, then write the convolved part into the clone; the caller's tensor is never touched."""
    y = x.clone()
    y[:, start : start + weight.shape[0]] = convolve_part(x, weight, dilation=dilation, start=start)
    return y


def slicing_(x: Tensor, weight: Tensor, *, dilation: int, start: int) -> Tensor:
    """Write the convolved part into ``x`` itself and return ``x``."""
    x[:, start : start + weight.shape[0]] = convolve_part(x, weight, dilation=dilation, start=start)
    return x
