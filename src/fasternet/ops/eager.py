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
    return _convolve(x[:, start : start + weight.shape[0]], weight, dilation)


def split_cat(x: Tensor, weight: Tensor, *, dilation: int, start: int) -> Tensor:
    """Convolve a part and concatenate it with the rest: the oracle."""
    place, stop = int(start > 0), start + weight.shape[0]
    if x.requires_grad and not torch.compiler.is_compiling():
        # The gradient of a split is one concatenation, that of slices a sum of maps padded with zeros, with which a
        # step of T0 takes 3 % longer. An empty piece would cost it the memory format, and 4 %.
        sizes = [size for size in (start, weight.shape[0], x.shape[1] - stop) if size]
        pieces = list(torch.split(x, sizes, dim=1))
    else:  # exporters turn a split into a node of its own
        pieces = [piece for piece in (x[:, :start], x[:, start:stop], x[:, stop:]) if piece.shape[1]]
    pieces[place] = _convolve(pieces[place], weight, dilation)
    return torch.cat(pieces, dim=1)


def _convolve(part: Tensor, weight: Tensor, dilation: int) -> Tensor:
    return F.conv2d(part, weight, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)


def slicing(x: Tensor, weight: Tensor, *, dilation: int, start: int) -> Tensor:
    """Clone ``x``, then write the convolved part into the clone; the caller's tensor is never touched."""
    y = x.clone()
    y[:, start : start + weight.shape[0]] = convolve_part(x, weight, dilation=dilation, start=start)
    return y


def slicing_(x: Tensor, weight: Tensor, *, dilation: int, start: int) -> Tensor:
    """Write the convolved part into ``x`` itself and return ``x``."""
    x[:, start : start + weight.shape[0]] = convolve_part(x, weight, dilation=dilation, start=start)
    return x
