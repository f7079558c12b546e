"""Costs: Equations 1 to 7 of the paper, and a counter of parameters, MACs and memory accesses for any module.

MACs are multiply-adds, which the paper calls FLOPs. Memory accesses are elements read and written, not bytes.
Legend: h, w height and width; c channels; cp the channels that PConv convolves; k kernel size.

* Eq. 1: ``latency_ms``
* Section 3.1: ``conv_macs`` (regular, group, depthwise, pointwise)
* Eq. 2, Eq. 3: ``conv_memory_accesses`` (DWConv with ``groups=channels``, regular with ``groups=1``)
* Eq. 4, Eq. 5: ``pconv_macs``, ``pconv_memory_accesses``
* Eq. 6, Eq. 7: ``tconv_macs``, ``pconv_pwconv_macs``
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


def latency_ms(macs: float, macs_per_second: float) -> float:
    """Return the latency in ms of ``macs`` multiply-adds at a speed of ``macs_per_second`` (Eq. 1)."""
    return 1e3 * macs / macs_per_second


def conv_macs(height: int, width: int, channels: int, *, kernel_size: int = 3, groups: int = 1) -> int:
    """Return the multiply-adds of a convolution: ``h w k^2 c^2 / groups`` (Section 3.1).

    Args:
        height: Height of the output.
        width: Width of the output.
        channels: Channels of the input and of the output.
        kernel_size: Side of the kernel; 1 is a PWConv.
        groups: 1 is a regular convolution, ``channels`` a DWConv, anything between a GConv.

    Raises:
        ValueError: ``groups`` does not divide ``channels``.
    """
    return height * width * _num_weights(channels, kernel_size, groups)


def conv_memory_accesses(
    height: int, width: int, channels: int, *, kernel_size: int = 3, groups: int = 1, exact: bool = True
) -> int:
    """Return the memory accesses of a convolution: ``h w 2c + k^2 c^2 / groups`` (Eq. 2, Eq. 3).

    Args:
        height: Height of input and output.
        width: Width of input and output.
        channels: Channels of the input and of the output.
        kernel_size: Side of the kernel.
        groups: ``channels`` gives Eq. 2 (DWConv), 1 gives Eq. 3 (regular).
        exact: Count the weights too; without them it is the paper's approximation, ``h w 2c``.

    Raises:
        ValueError: ``groups`` does not divide ``channels``.
    """
    num_weights = _num_weights(channels, kernel_size, groups)
    return height * width * 2 * channels + (num_weights if exact else 0)


def pconv_macs(height: int, width: int, partial_channels: int, *, kernel_size: int = 3) -> int:
    """Return the multiply-adds of a PConv: ``h w k^2 cp^2`` (Eq. 4)."""
    return conv_macs(height, width, partial_channels, kernel_size=kernel_size)


def pconv_memory_accesses(
    height: int, width: int, partial_channels: int, *, kernel_size: int = 3, exact: bool = True
) -> int:
    """Return the memory accesses of a PConv: ``h w 2cp + k^2 cp^2``, or ``h w 2cp`` if not exact (Eq. 5)."""
    return conv_memory_accesses(height, width, partial_channels, kernel_size=kernel_size, exact=exact)


def tconv_macs(height: int, width: int, channels: int, partial_channels: int, *, kernel_size: int = 3) -> int:
    """Return the multiply-adds of a T-shaped convolution: ``h w (k^2 cp c + c (c - cp))`` (Eq. 6)."""
    return height * width * channels * (kernel_size**2 * partial_channels + channels - partial_channels)


def pconv_pwconv_macs(height: int, width: int, channels: int, partial_channels: int, *, kernel_size: int = 3) -> int:
    """Return the multiply-adds of a PConv and the PWConv after it: ``h w (k^2 cp^2 + c^2)`` (Eq. 7).

    The paper prints ``c cp`` as the second term; a PWConv mixes all channels, so it must be ``c^2``.
    """
    pconv = pconv_macs(height, width, partial_channels, kernel_size=kernel_size)
    return pconv + conv_macs(height, width, channels, kernel_size=1)


def _num_weights(channels: int, kernel_size: int, groups: int) -> int:
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels, not {groups}")
    return kernel_size**2 * channels * channels // groups


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs: a module that computes something itself, not only through its children.

    Attributes:
        name: Path of the module; empty for the counted module itself.
        kind: Name of its class.
        input_shape: Shape of its first input.
        output_shape: Shape of its first output.
        num_params: Its own parameters, and those of children that it uses without calling them.
        macs: Multiply-adds.
        memory_accesses: Elements read and written.
    """

    name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    num_params: int
    macs: int
    memory_accesses: int


@dataclass(frozen=True)
class Costs:
    """What a module costs; each parameter, multiply-add and access stands in exactly one row.

    Attributes:
        rows: The layers in the order of execution.
        num_params: All parameters.
        num_params_without_batch_norm: Those left once batch normalization is folded, as the paper counts.
    """

    rows: tuple[LayerCost, ...]
    num_params: int
    num_params_without_batch_norm: int

    @property
    def macs(self) -> int:
        """Multiply-adds of all layers."""
        return sum(row.macs for row in self.rows)

    @property
    def memory_accesses(self) -> int:
        """Elements read and written by all layers."""
        return sum(row.memory_accesses for row in self.rows)


def count_costs(module: nn.Module, input_shape: Sequence[int] = (1, 3, 224, 224)) -> Costs:
    """Count the parameters, multiply-adds and memory accesses of any module in evaluation mode.

    Multiply-adds are those of convolutions, linear layers and matrix products, attention included;
    normalization, activation, pooling and addition count 0. Memory accesses follow Eq. 2 to 5: each operation
    reads its inputs and weights once and writes its result. Views, copies and rearrangements (slice,
    concatenate, shuffle, pad) belong to an implementation and count 0, so PConv touches ``2 cp`` channels.

    The module itself stays as it is: a copy of it runs on the meta device, where nothing is computed, or on
    the CPU if values steer it or it creates tensors on a device of its own choice.

    Args:
        module: The module, on any device; it is called with one tensor of its parameters' type.
        input_shape: Shape of that tensor, batch included.

    Raises:
        ValueError: The module cannot be run on such an input.
    """
    with contextlib.suppress(Exception):
        return _count(module, input_shape, "meta")
    try:
        return _count(module, input_shape, "cpu")
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        name = type(module).__name__
        raise ValueError(f"input_shape {tuple(input_shape)} does not fit {name}: {reason}") from error


@torch.inference_mode(False)  # in inference mode attention would stay one operation
@torch.no_grad()
def _count(module: nn.Module, input_shape: Sequence[int], device: str) -> Costs:
    twin = _copy_to(module, device)
    recorder = _Recorder(twin)
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.get_default_dtype())
    # MATH: a fused attention kernel would hide the operations that it consists of
    with torch.random.fork_rng(devices=[]), torch.device(device), sdpa_kernel(SDPBackend.MATH):
        x = torch.rand(tuple(input_shape), dtype=dtype)
        with recorder.flops, recorder:
            twin(x)
    return recorder.costs()


def _copy_to(module: nn.Module, device: str) -> nn.Module:
    """Copy a module to a device, in evaluation mode; to the meta device without copying any data."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        # vars: a tensor that is a plain attribute has to move too
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False), *vars(part).values()):
            if isinstance(tensor, Tensor):
                twin = torch.empty_like(tensor, device=device, requires_grad=False).copy_(tensor.detach())
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(twin, requires_grad=False) if is_parameter else twin
    return copy.deepcopy(module, memo).eval()


@dataclass
class _Call:
    """What a module itself did while it ran."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...] = ()
    macs: int = 0
    memory_accesses: int = 0


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation and books it on the innermost module that is running."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module = module
        self.flops = FlopCounterMode(display=False)
        self.calls: dict[str, _Call] = {}
        self.running: list[_Call] = []
        for name, part in module.named_modules():
            part.register_forward_pre_hook(functools.partial(self._enter, name), with_kwargs=True)
            part.register_forward_hook(self._leave)

    def _enter(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running.append(self.calls.setdefault(name, _Call(_first_shape((args, kwargs)))))

    def _leave(self, _: nn.Module, args: object, output: object) -> None:
        self.running.pop().output_shape = _first_shape(output)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        flops_before = self.flops.get_total_flops()
        output = func(*args, **(kwargs or {}))
        call = self.running[-1]
        call.macs += (self.flops.get_total_flops() - flops_before) // 2
        inputs = {id(tensor): tensor.numel() for tensor in _tensors((args, kwargs))}
        if inputs and not func.is_view and not _MOVES.fullmatch(func.overloadpacket.__name__):
            # the first output is the result; others are statistics and indices that an implementation keeps
            call.memory_accesses += sum(inputs.values()) + math.prod(_first_shape(output))
        return output

    def costs(self) -> Costs:
        num_params = dict.fromkeys(self.calls, 0)
        num_batch_norm = 0
        for name, parameter in self.module.named_parameters():
            owner = name.rpartition(".")[0]
            if isinstance(self.module.get_submodule(owner), _BATCH_NORMS):
                num_batch_norm += parameter.numel()
            while owner not in num_params:  # never called: its parent uses the weights, or nobody does
                owner = owner.rpartition(".")[0]
            num_params[owner] += parameter.numel()
        total = sum(num_params.values())
        return Costs(tuple(self._rows(num_params)), total, total - num_batch_norm)

    def _rows(self, num_params: dict[str, int]) -> Iterator[LayerCost]:
        for name, call in self.calls.items():
            if num_params[name] or call.macs or call.memory_accesses:
                yield LayerCost(
                    name=name,
                    kind=type(self.module.get_submodule(name)).__name__,
                    input_shape=call.input_shape,
                    output_shape=call.output_shape,
                    num_params=num_params[name],
                    macs=call.macs,
                    memory_accesses=call.memory_accesses,
                )


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# Operations that create, copy or rearrange and compute nothing; views are known by their schema.
_MOVES = re.compile(
    r"_to_copy|_unsafe_view|cat|(native_)?channel_shuffle|clone|copy_?|fill_|flip|gather|im2col|index(_put_?|_select)?"
    r"|masked_select|new_\w+|pixel_(un)?shuffle|repeat|roll|stack|zero_|\w+_(like|pad_nd|pad\dd|scatter)"
)


def _tensors(tree: object) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries."""
    if isinstance(tree, Tensor):
        yield tree
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    for branch in branches:
        yield from _tensors(branch)


def _first_shape(tree: object) -> tuple[int, ...]:
    return next((tuple(tensor.shape) for tensor in _tensors(tree)), ())
