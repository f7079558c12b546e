"""PConv in one and three dimensions, and PConv with its PWConv in place of a convolution (Sections 3.2 and 3.3).

Shapes: ``x`` (N, C, L), (N, C, H, W) or (N, C, D, H, W); filters (Cp, Cp, k), (Cp, Cp, k, k) or (Cp, Cp, k, k, k).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasternet.ops.pconv import PConv2d, _PConv


class _PConvNd(_PConv):
    convolve: ClassVar[Callable[..., Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve channels ``start .. start + Cp``; the others are bitwise those of ``x``."""
        if x.dim() != self.num_dims + 2 or x.shape[1] != self.channels:
            sizes = "L" if self.num_dims == 1 else "D, H, W"
            raise ValueError(f"x must have the shape (N, {self.channels}, {sizes}), got {tuple(x.shape)}")
        stop = self.start + self.partial_channels
        padding = self.dilation * (self.weight.shape[-1] // 2)
        part = type(self).convolve(x[:, self.start : stop], self.weight, padding=padding, dilation=self.dilation)
        return torch.cat([piece for piece in (x[:, : self.start], part, x[:, stop:]) if piece.shape[1]], dim=1)


class PConv1d(_PConvNd):
    """Partial convolution of sequences, (N, C, L) to (N, C, L): ``PConv2d`` in one dimension.

    Args:
        channels: C, of input and output.
        partial_ratio: ``r = Cp / C``; ``Cp = max(1, floor(r * C))``; 1/4 where nothing is given.
        partial_channels: Cp itself, instead of ``partial_ratio``.
        kernel_size: k, odd.
        dilation: Spacing of the filter's taps.
        position: Which channels, as in ``PConv2d``.
        index: Number of this layer in its stage; for ``position="rotate"``.
        device: As in ``torch.nn.Conv1d``.
        dtype: As in ``torch.nn.Conv1d``.

    Raises:
        ValueError: An argument does not fit.
    """

    num_dims, convolve = 1, F.conv1d


class PConv3d(_PConvNd):
    """Partial convolution of volumes and videos, (N, C, D, H, W) to the same: ``PConv2d`` in three dimensions.

    Args:
        channels: C, of input and output.
        partial_ratio: ``r = Cp / C``; ``Cp = max(1, floor(r * C))``; 1/4 where nothing is given.
        partial_channels: Cp itself, instead of ``partial_ratio``.
        kernel_size: k, odd.
        dilation: Spacing of the filter's taps.
        position: Which channels, as in ``PConv2d``.
        index: Number of this layer in its stage; for ``position="rotate"``.
        device: As in ``torch.nn.Conv3d``.
        dtype: As in ``torch.nn.Conv3d``.

    Raises:
        ValueError: An argument does not fit.
    """

    num_dims, convolve = 3, F.conv3d


class PConvPWConv(nn.Module):
    """PConv and the PWConv after it, in place of a k x k convolution with "same" zero padding (Section 3.3, Eq. 7).

    There is no activation between the two: together they are one linear map. PConv has stride 1; with stride 2 every
    second position is kept behind it, before the PWConv. What is thrown away is not computed: the part is convolved
    with stride 2 and the rest sliced, which is the same function.

    Args:
        in_channels: C, of the input.
        out_channels: Channels of the output.
        kernel_size: k, odd.
        stride: 1 or 2; the output has ``ceil(H / stride)`` rows, as that of the convolution.
        partial_ratio: ``r = Cp / C`` of the input; None takes 1/4.
        dilation: Spacing of the filter's taps.
        bias: Whether the PWConv has a bias.
        device: As in ``torch.nn.Conv2d``.
        dtype: As in ``torch.nn.Conv2d``.

    Raises:
        ValueError: An argument does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        partial_ratio: float | None = None,
        dilation: int = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        self.stride = stride
        self.pconv = PConv2d(
            in_channels, partial_ratio, kernel_size=kernel_size, dilation=dilation, device=device, dtype=dtype
        )
        self.pwconv = nn.Conv2d(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)

    @property
    def in_channels(self) -> int:
        """C, as PConv has it: a pruning tool may have changed it."""
        return self.pconv.channels

    @property
    def out_channels(self) -> int:
        """Channels of the output, as the PWConv has them."""
        return self.pwconv.out_channels

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)); named as in ``nn.Conv2d``."""
        x = input
        if self.stride == 1:
            return self.pwconv(self.pconv(x))  # type: ignore[no-any-return]
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must have the shape (N, {self.in_channels}, H, W), got {tuple(x.shape)}")
        cp, weight, dilation = self.pconv.partial_channels, self.pconv.weight, self.pconv.dilation
        padding = dilation * (weight.shape[-1] // 2)
        part = F.conv2d(x[:, :cp], weight, stride=2, padding=padding, dilation=dilation)  # (N, Cp, H/2, W/2)
        if cp == self.in_channels:
            return self.pwconv(part)  # type: ignore[no-any-return]
        return self.pwconv(torch.cat([part, x[:, cp:, ::2, ::2]], dim=1))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Describe the layer in ``print(module)``."""
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"
