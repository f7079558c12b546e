"""The C++ engine's PConv and FasterNet block (Fig. 4) as PyTorch operators, in ``torch.ops.fasternet``.

``block`` computes ``x + project act(expand pconv(x) + expand_bias) + project_bias``, ``pconv`` the partial convolution
alone: in float32 on the CPU, in PyTorch's threads, for inference only. They pass through torch.compile and
torch.export. Shapes: ``x`` (N, C, H, W) in any memory format, the result in channels_last, the engine's own layout.

The engine packs weights ahead. What was packed is kept for as long as the weights live, and packed anew where one has
been written to. A write that PyTorch does not count, through ``.data`` or a NumPy view, is not seen. Weights that were
made in inference mode, where no write is counted, are packed at each call.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasternet import native

Weights = tuple[Tensor | None, ...]
Options = tuple[int | str, ...]


WEIGHTS = {"block": ("partial", "expand", "expand_bias", "project", "project_bias"), "pconv": ("weight",)}


class _Packed(NamedTuple):
    """A network, the state of the weights that it was packed from, and what removes it where one of them ends."""

    states: list[tuple[int, int]]
    network: native.Network
    references: list[weakref.ref[Tensor]]
    storages: list[torch.UntypedStorage]  # alive, so that no other data of a weight can have the same address


# By the ids of the weights and the options; an entry is gone before an id can be used again.
_packed: dict[tuple[int | str, ...], _Packed] = {}


def block(
    x: Tensor,
    partial: Tensor,
    expand: Tensor,
    expand_bias: Tensor | None,
    project: Tensor,
    project_bias: Tensor | None,
    start: int,
    activation: str,
) -> Tensor:
    """Compute a FasterNet block whose BN and layer scale are folded into its weights.

    Args:
        x: Input, (N, C, H, W); it is not modified.
        partial: PConv's filters, (Cp, Cp, k, k) with odd k.
        expand: First pointwise convolution, (hidden, C) or (hidden, C, 1, 1).
        expand_bias: (hidden,) or None.
        project: Second pointwise convolution, (C, hidden) or (C, hidden, 1, 1).
        project_bias: (C,) or None.
        start: First channel that PConv convolves.
        activation: ``"gelu"`` (exact), ``"relu"`` or ``"none"``.

    Returns:
        (N, C, H, W), a new tensor in channels_last.

    Raises:
        ValueError: A shape, type or option does not fit, a gradient is wanted, or the engine cannot run here.
    """
    weights = (partial, expand, expand_bias, project, project_bias)
    _check(x, "block", weights)
    network = _find_network(_create_block, "block", weights, (start, activation))
    if x.shape[1] != expand.shape[1]:  # of an empty batch too, which the network never sees
        raise ValueError(f"x must have {expand.shape[1]} channels, got the shape {tuple(x.shape)}")
    return _run(x, network)


def pconv(x: Tensor, weight: Tensor, start: int) -> Tensor:
    """Compute a partial convolution with stride 1 and "same" zero padding.

    Args:
        x: Input, (N, C, H, W); it is not modified.
        weight: Filters, (Cp, Cp, k, k) with odd k and ``start + Cp <= C``.
        start: First channel that is convolved.

    Returns:
        (N, C, H, W), a new tensor in channels_last; channels that are not convolved are bitwise those of ``x``.

    Raises:
        ValueError: A shape or type does not fit, a gradient is wanted, or the engine cannot run here.
    """
    _check(x, "pconv", (weight,))
    return _run(x, _find_network(_create_pconv, "pconv", (weight,), (x.shape[1], start)))


def _check(x: Tensor, operator: str, weights: Weights) -> None:
    """Refuse what the engine cannot take; the weights' types and shapes are checked where they are packed."""
    for name, weight in zip(WEIGHTS[operator], weights, strict=True):
        if weight is not None and (weight.device != x.device or x.is_cuda):
            where = f"x on {x.device}, {name} on {weight.device}"
            raise ValueError(f"the C++ engine computes on the CPU alone, got {where}")
    if x.dim() != 4:
        raise ValueError(f"x must have the shape (N, C, H, W), got {tuple(x.shape)}")
    if x.dtype != torch.float32:
        raise ValueError(f"the C++ engine takes maps of torch.float32, got {x.dtype}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights)):
        raise ValueError("the C++ engine computes no gradient: use torch.no_grad(), or another implementation")


def _find_network(
    create: Callable[..., list[native.Layer]], operator: str, weights: Weights, options: Options
) -> native.Network:
    """Return the network that was packed from these weights, or pack one."""
    given = [w for w in weights if w is not None]
    if any(w.is_inference() for w in given):  # writes to these are not counted
        return _pack(create, operator, weights, options)
    key = (*map(id, weights), *options)
    states = [(w.data_ptr(), w._version) for w in given]  # before what is packed is read
    found = _packed.get(key)
    if found is not None and found.states == states:
        return found.network
    network = _pack(create, operator, weights, options)

    def forget(_: Any) -> None:
        _packed.pop(key, None)

    references, storages = [weakref.ref(w, forget) for w in given], [w.untyped_storage() for w in given]
    _packed[key] = _Packed(states, network, references, storages)
    return network


def _pack(
    create: Callable[..., list[native.Layer]], operator: str, weights: Weights, options: Options
) -> native.Network:
    for name, weight in zip(WEIGHTS[operator], weights, strict=True):
        if weight is not None and weight.dtype != torch.float32:
            raise ValueError(f"the C++ engine takes weights of torch.float32, but {name} is {weight.dtype}")
    arrays = (None if w is None else w.detach().contiguous().numpy() for w in weights)
    return native.Network(create(*arrays, *options))


def _create_block(
    partial: Any, expand: Any, expand_bias: Any, project: Any, project_bias: Any, start: int, activation: Any
) -> list[native.Layer]:
    for name, weight in (("expand", expand), ("project", project)):
        if weight.shape[2:] not in ((), (1, 1)):
            raise ValueError(f"{name} must be a matrix or the weight of a 1 x 1 convolution, got {weight.shape}")
    expand, project = expand.reshape(expand.shape[:2]), project.reshape(project.shape[:2])
    layer = native.Block(partial, expand, expand_bias, project, project_bias, start, activation)
    return [layer, native.Feature(expand.shape[1])]


def _create_pconv(weight: Any, channels: int, start: int) -> list[native.Layer]:
    return [native.PartialConv(weight, channels, start), native.Feature(channels)]


def _run(x: Tensor, network: native.Network) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.channels_last)
    if y.numel():
        pixels = x.detach().contiguous(memory_format=torch.channels_last).numpy().transpose(0, 2, 3, 1)  # (N, H, W, C)
        out = [y.numpy().transpose(0, 2, 3, 1)]
        network.run(pixels, layout="NHWC", threads=torch.get_num_threads(), out=out)
    return y


def _fake(operator: str, x: Tensor, *arguments: Any) -> Tensor:
    _check(x, operator, arguments[: len(WEIGHTS[operator])])
    return torch.empty_like(x, memory_format=torch.channels_last)


def _register(library: torch.library.Library, operator: Callable[..., Tensor]) -> None:
    """Make a function an operator. In this way a call costs 4 us; through torch.library.custom_op, 9 us."""
    name = f"fasternet::{operator.__name__}"
    schema = torch.library.infer_schema(operator, mutates_args=())
    torch.library.define(name, schema, lib=library, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "cpu", operator, lib=library)
    torch.library.impl(name, "cuda", operator, lib=library)  # which refuses, in one sentence
    torch.library.register_fake(name, functools.partial(_fake, operator.__name__), lib=library)


_library = torch.library.Library("fasternet", "FRAGMENT")  # type: ignore[no-untyped-call]
for _operator in (block, pconv):
    _register(_library, _operator)
