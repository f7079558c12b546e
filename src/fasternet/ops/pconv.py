"""PConv, the partial convolution (Section 3.2, Fig. 1 and 4): one face, several implementations.

Shapes: ``x`` (N, C, H, W), ``weight`` (Cp, Cp, k, k) with ``Cp = r * C``. All implementations compute the same
function; ``split_cat`` is the oracle.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from fasternet.ops import eager, native_ops  # noqa: F401  (makes torch.ops.fasternet)

Position = Literal["first", "last", "rotate"]


@dataclasses.dataclass(frozen=True)
class Selection:
    """An implementation's name and why it was taken."""

    impl: str
    reason: str


_IMPLS: Mapping[str, Callable[..., Tensor]] = MappingProxyType({"split_cat": eager.split_cat, "slicing": eager.slicing})


def list_impls() -> tuple[str, ...]:
    """List the implementations of ``pconv2d`` that take any device, precision and memory format."""
    return tuple(_IMPLS)


def select_impl(impl: str = "auto") -> Selection:
    """Choose an implementation.

    Args:
        impl: ``"auto"``, or a name that is taken as it is: one of ``list_impls``, or ``"native"``, the C++ engine.

    Returns:
        The implementation's name with the reason.

    Raises:
        ValueError: ``impl`` is unknown.
    """
    if impl in _IMPLS or impl == "native":
        return Selection(impl, "asked for")
    if impl != "auto":
        raise ValueError(f"impl {impl!r} is not one of auto, {', '.join(_IMPLS)}, native")
    return Selection(
        "split_cat", "slicing was never faster where it was measured, and does not export or train as well"
    )


def pconv2d(x: Tensor, weight: Tensor, *, impl: str = "auto", dilation: int = 1, start: int = 0) -> Tensor:
    """Apply a partial convolution with stride 1 and "same" zero padding.

    Args:
        x: Input, (N, C, H, W), any memory format; it is never modified.
        weight: Filters, (Cp, Cp, k, k) with odd k and ``start + Cp <= C``.
        impl: ``"auto"`` or a name of ``list_impls``; all compute the same function. ``"native"``, the C++ engine, does
            so too, where it is installed: in float32 on the CPU, without dilation and without a gradient.
        dilation: Spacing of the filter's taps.
        start: First channel that is convolved.

    Returns:
        (N, C, H, W), a new tensor; channels outside ``start .. start + Cp`` are bitwise those of ``x``.

    Raises:
        ValueError: A shape or an option does not fit, or ``"native"`` is asked for what it cannot do.
    """
    _check(x, weight, dilation, start)
    impl = select_impl(impl).impl
    function = _native if impl == "native" else _IMPLS[impl]
    return function(x, weight, dilation=dilation, start=start)


def _native(x: Tensor, weight: Tensor, *, dilation: int, start: int) -> Tensor:
    if x.device.type != "cpu" or weight.device.type != "cpu":
        raise ValueError(f"impl 'native' is for the CPU, got x on {x.device} and weight on {weight.device}")
    if dilation != 1:
        raise ValueError(f"impl 'native' computes without dilation, got {dilation}")
    return cast(Tensor, torch.ops.fasternet.pconv.default(x, weight, start))


def pconv2d_(x: Tensor, weight: Tensor, *, dilation: int = 1, start: int = 0) -> Tensor:
    """Apply a partial convolution in place: ``x`` itself is overwritten.

    This is the form whose speed the paper published. Inside a residual block it also overwrites the shortcut, which
    changes the network's function; no block of this package uses it.

    Args:
        x: Input and output, (N, C, H, W).
        weight: Filters, (Cp, Cp, k, k).
        dilation: Spacing of the filter's taps.
        start: First channel that is convolved.

    Returns:
        ``x``.

    Raises:
        ValueError: Autograd needs the input that would be overwritten, or a shape does not fit.
    """
    _check(x, weight, dilation, start)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise ValueError("pconv2d_ overwrites x, which autograd needs here: use pconv2d, or torch.no_grad()")
    return eager.slicing_(x, weight, dilation=dilation, start=start)


class _PConv(nn.Module):
    """What PConv is in any number of dimensions: which channels are convolved, and their filters."""

    num_dims: ClassVar[int]

    def __init__(
        self,
        channels: int,
        partial_ratio: float | None = None,
        *,
        partial_channels: int | None = None,
        kernel_size: int = 3,
        dilation: int = 1,
        position: Position = "first",
        index: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if partial_ratio is not None and partial_channels is not None:
            raise ValueError("give partial_ratio or partial_channels, not both")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        if dilation < 1:
            raise ValueError(f"dilation must be positive, got {dilation}")
        if partial_channels is None:
            partial_channels = count_partial_channels(channels, 0.25 if partial_ratio is None else partial_ratio)
        if not 1 <= partial_channels <= channels:
            raise ValueError(f"partial_channels must be from 1 to channels ({channels}), got {partial_channels}")
        self.channels = channels
        self.partial_channels = partial_channels
        self.dilation = dilation
        self.start = _find_start(position, channels, partial_channels, index)
        shape = (partial_channels, partial_channels, *[kernel_size] * self.num_dims)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the filters as ``torch.nn`` does those of a convolution."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def extra_repr(self) -> str:
        """Describe the layer in ``print(module)``."""
        part = f"{self.start}:{self.start + self.partial_channels}"
        return f"{self.channels}, convolved={part}, kernel_size={self.weight.shape[-1]}, dilation={self.dilation}"


class PConv2d(_PConv):
    """Partial convolution: a k x k convolution over ``Cp`` of ``C`` channels, the others pass through (Section 3.2).

    Stride is 1 and padding "same"; there is no bias, and neither normalisation nor activation behind it: a pointwise
    convolution has to follow, which carries the information to all channels (Section 3.3) and may change the width.

    Args:
        channels: C, of input and output.
        partial_ratio: ``r = Cp / C``; ``Cp = max(1, floor(r * C))``. The paper uses 1/4 (its default here).
        partial_channels: Cp itself, instead of ``partial_ratio``.
        kernel_size: k, odd.
        dilation: Spacing of the filter's taps.
        position: Which channels: the ``"first"`` Cp, the ``"last"`` Cp, or with ``"rotate"`` group ``index`` modulo
            ``C // Cp`` of consecutive Cp channels.
        index: Number of this layer in its stage; for ``position="rotate"``.
        impl: See ``pconv2d``.
        device: As in ``torch.nn.Conv2d``.
        dtype: As in ``torch.nn.Conv2d``.

    Raises:
        ValueError: An argument does not fit.
    """

    num_dims = 2

    def __init__(
        self,
        channels: int,
        partial_ratio: float | None = None,
        *,
        partial_channels: int | None = None,
        kernel_size: int = 3,
        dilation: int = 1,
        position: Position = "first",
        index: int = 0,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        select_impl(impl)  # raises
        super().__init__(
            channels,
            partial_ratio,
            partial_channels=partial_channels,
            kernel_size=kernel_size,
            dilation=dilation,
            position=position,
            index=index,
            device=device,
            dtype=dtype,
        )
        self.impl = impl

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W); the argument's name is that of ``torch.nn.Conv2d``."""
        if input.dim() == 4 and input.shape[1] != self.channels:
            raise ValueError(f"x must have {self.channels} channels, got shape {tuple(input.shape)}")
        return pconv2d(input, self.weight, impl=self.impl, dilation=self.dilation, start=self.start)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(module)``."""
        return f"{super().extra_repr()}, impl={self.impl}"


def count_partial_channels(channels: int, partial_ratio: float) -> int:
    """Return ``Cp = max(1, floor(r * C))``, with 1e-6 against rounding of ratios such as 1/3.

    Raises:
        ValueError: ``partial_ratio`` is not in (0, 1].
    """
    if not 0 < partial_ratio <= 1:
        raise ValueError(f"partial_ratio must be in (0, 1], got {partial_ratio}")
    return max(1, math.floor(channels * partial_ratio + 1e-6))


def _find_start(position: str, channels: int, partial_channels: int, index: int) -> int:
    if position not in get_args(Position):
        raise ValueError(f"position {position!r} is not one of {', '.join(get_args(Position))}")
    if position == "rotate":
        return index % (channels // partial_channels) * partial_channels
    return 0 if position == "first" else channels - partial_channels


def _check(x: Tensor, weight: Tensor, dilation: int, start: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must have the shape (N, C, H, W), got {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[0] != weight.shape[1] or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must have the shape (Cp, Cp, k, k), got {tuple(weight.shape)}")
    if weight.shape[-1] % 2 == 0:
        raise ValueError(f"weight must have an odd kernel size, got {weight.shape[-1]}")
    if dilation < 1:
        raise ValueError(f"dilation must be positive, got {dilation}")
    if start < 0 or start + weight.shape[0] > x.shape[1]:
        stop = start + weight.shape[0]
        raise ValueError(f"channels {start} to {stop} are convolved, but x has {x.shape[1]} channels")
