"""Where 3x3 filters have their weight (Fig. 6, Section 3.3), and what PConv + PWConv sees of its input (Fig. 5).

A filter is what one output channel computes with: k^2 positions, c input channels. The salient position is the one
with the largest Frobenius norm over the channels. Positions are counted row by row; the fifth of nine is the centre.
Legend: c channels, k kernel size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fasternet.analysis.reference import Layer, Reference, list_layers
from fasternet.environment import create_record
from fasternet.ops import PConv2d, count_partial_channels
from fasternet.ops.reference_ops import TConv2d
from fasternet.records import Record

Array = npt.NDArray[np.float64]

KERNEL_SIZE = 3
CENTRE = KERNEL_SIZE**2 // 2

_NUM_RESAMPLES, _TAILS = 10_000, (0.025, 0.975)

OPERATORS: Mapping[str, Callable[[int, int], nn.Module]] = MappingProxyType(
    {  # (c, k) to a layer without bias; the order of Fig. 5
        "PConv + PWConv": lambda c, k: nn.Sequential(PConv2d(c, kernel_size=k), nn.Conv2d(c, c, 1, bias=False)),
        "T-shaped": lambda c, k: TConv2d(c, kernel_size=k),
        "Conv": lambda c, k: nn.Conv2d(c, c, k, padding=k // 2, bias=False),
    }
)


def measure_salience(reference: Reference, *, input_size: int | None = None, seed: int = 0) -> Iterator[Record]:
    """Count, stage by stage, at which position the 3x3 filters of a network are salient.

    All filters of convolutions with one group are counted, whatever their stride, and those of PConv. Filters of
    depthwise and group convolutions are not what the paper speaks of, and are left out; so are filters that are zero
    everywhere. Of equal norms the first position counts. BN that is folded scales a filter as a whole: nothing here
    changes by it.

    Args:
        reference: The network.
        input_size: S, which tells the stages apart; the network's own is the default.
        seed: Of the resampling, and of the baseline.

    Yields:
        A record of kind ``study`` for each stage that has such filters, and one for ``all``. A layer whose output is
        finer than stride 4 (a stem) is ``stage 0``. The interval of the centre's share resamples filters as if each
        were independent of the others in its layer. ``centre_share_random`` is that share for as many filters drawn
        from a normal distribution, the mean of many draws; one draw lies between ``random_low`` and ``random_high`` in
        95 %. No weights are drawn for it: by symmetry each position of such a filter is as often the salient one.

    Raises:
        ValueError: The network has no such filter.
    """
    found = list_layers(reference.model, input_size or reference.preprocessing.input_size)
    layers = [layer for layer in found if _is_counted(layer.module)]
    if not layers:
        raise ValueError(f"{reference.name} has no regular 3x3 convolution, whose filters salience is about")
    rng = np.random.default_rng(seed)
    norms = {layer.name: find_norms(layer.module.weight) for layer in layers}
    stages = {f"stage {stage}": _list_names(layers, stage) for stage in sorted({layer.stage for layer in layers})}
    for subject, names in {**stages, "all": [layer.name for layer in layers]}.items():
        chosen = np.concatenate([norms[name] for name in names])
        if len(chosen):
            values = {**_summarise(chosen, rng), "layers": names, "seed": seed}
            yield create_record("salience", "study", subject, condition=reference.condition, values=values)


def find_norms(weight: Tensor) -> Array:
    """Return the Frobenius norm at each position over the input channels of every filter that is not zero.

    Args:
        weight: (filters, c, k, k).

    Returns:
        (at most ``filters``, k^2), float64.
    """
    norms = weight.detach().double().square().sum(1).sqrt().flatten(1).cpu().numpy()
    return norms[norms.any(1)]


def _is_counted(module: nn.Conv2d | PConv2d) -> bool:
    is_regular = isinstance(module, PConv2d) or module.groups == 1
    return is_regular and module.weight.shape[2:] == (KERNEL_SIZE, KERNEL_SIZE)


def _list_names(layers: Sequence[Layer], stage: int) -> list[str]:
    return [layer.name for layer in layers if layer.stage == stage]


def _count(norms: Array) -> npt.NDArray[np.int64]:
    """Return for each position in how many filters (rows) it is the salient one."""
    return np.bincount(norms.argmax(1), minlength=norms.shape[1])


def _summarise(norms: Array, rng: np.random.Generator) -> dict[str, Any]:
    counts, num_filters = _count(norms), len(norms)
    share, uniform = counts[CENTRE] / num_filters, 1 / KERNEL_SIZE**2
    # How often the centre comes up when so many filters are drawn with replacement, and when all are random.
    (low, high, _), (random_low, random_high, random_mean) = (
        _spread(rng.binomial(num_filters, chance, size=_NUM_RESAMPLES) / num_filters) for chance in (share, uniform)
    )
    return {
        "counts": counts.tolist(),
        "num_filters": num_filters,
        "kernel_size": KERNEL_SIZE,
        "centre_share": float(share),
        "low": low,
        "high": high,
        "uniform_share": uniform,
        "centre_share_random": random_mean,
        "random_low": random_low,
        "random_high": random_high,
        "mean_norms": (norms / norms.mean(1, keepdims=True)).mean(0).tolist(),
    }


def _spread(shares: Array) -> tuple[float, float, float]:
    """Return the limits within which 95 % lie, and the mean."""
    low, high = np.quantile(shares, _TAILS)
    return float(low), float(high), float(shares.mean())


def measure_receptive_field(
    *,
    channels: int = 64,
    depths: Sequence[int] = (1, 8),
    kernel_size: int = KERNEL_SIZE,
    seed: int = 0,
    num_draws: int = 64,
) -> Iterator[Record]:
    """Measure what the centre of an operator's output sees of its input: the effective receptive field.

    The field is the mean, over draws of the weights and over input channels, of the absolute gradient of a random sum
    of the centre's output channels. Layers are stacked without normalisation and activation. Weights are normal with a
    variance of one by the number of inputs, so that a convolved channel keeps the scale of one that passes through.

    Args:
        channels: c, of every layer.
        depths: Numbers of layers that are stacked.
        kernel_size: k, odd.
        seed: Of the weights and of the sum.
        num_draws: Over which the field is averaged.

    Yields:
        A record of kind ``study`` for each operator and depth. The field sums to 1; ``by_channel``, for one layer, has
        the mean field of a channel among the first quarter and of one among the rest, on the same scale.

    Raises:
        ValueError: An argument is out of range.
    """
    for name, value, least in (("channels", channels, 2), ("num_draws", num_draws, 1), ("depths", min(depths), 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    Cp = count_partial_channels(channels, 0.25)
    for subject, create in OPERATORS.items():
        for depth in depths:
            stack = nn.Sequential(*(create(channels, kernel_size) for _ in range(depth)))
            size = depth * (kernel_size - 1) + 1
            field = _average_gradient(stack, channels, size, seed, num_draws)  # (c, size, size)
            field /= field.mean(0).sum()
            mean = field.mean(0)
            values = {"size": size, "field": mean.tolist(), "centre_share": float(mean[size // 2, size // 2])}
            if depth == 1:
                values["by_channel"] = [group.mean(0).flatten().tolist() for group in (field[:Cp], field[Cp:])]
            condition = {"channels": channels, "depth": depth, "kernel_size": kernel_size}
            condition |= {"num_draws": num_draws, "seed": seed}
            yield create_record("receptive_field", "study", subject, condition=condition, values=values)


def _average_gradient(stack: nn.Module, channels: int, size: int, seed: int, num_draws: int) -> Tensor:
    """Return the mean absolute gradient by channel and position, (c, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    # The stack is linear, so that its gradient does not depend on x; x is as large as the field, and padding not seen.
    x = torch.zeros(1, channels, size, size, requires_grad=True)
    total = torch.zeros(channels, size, size, dtype=torch.float64)
    for _ in range(num_draws):
        _draw_weights(stack, generator)
        weights = torch.randn(channels, generator=generator)
        centre = stack(x)[0, :, size // 2, size // 2]  # (c)
        (gradient,) = torch.autograd.grad(centre @ weights, x)
        total += gradient[0].abs()
    return total / num_draws


@torch.no_grad()
def _draw_weights(stack: nn.Module, generator: torch.Generator) -> None:
    for module in stack.modules():
        weights = list(module.parameters(recurse=False))
        num_inputs = sum(weight[0].numel() for weight in weights)  # of one filter
        for weight in weights:
            weight.normal_(0, num_inputs**-0.5, generator=generator)
