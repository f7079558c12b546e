"""FasterNet blocks and PConv of any network in the C++ engine; everything else stays in PyTorch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fasternet import native
from fasternet.deploy.cpu_layers import to_block
from fasternet.deploy.fold import fold_batch_norm
from fasternet.deploy.optimize import InferenceBlock
from fasternet.deploy.published import check_calls, read_timm_block, read_timm_pconv
from fasternet.models.fasternet import FasterNetBlock
from fasternet.ops import PConv2d

NATIVE = "in the C++ engine"


class NativeBlock(nn.Module):
    """A FasterNet block as the operator ``fasternet::block``, for inference only; BN and layer scale are folded."""

    partial: Tensor
    expand: Tensor
    expand_bias: Tensor | None
    project: Tensor
    project_bias: Tensor | None

    def __init__(self, layer: native.Block) -> None:
        super().__init__()
        for name in ("partial", "expand", "expand_bias", "project", "project_bias"):
            weight = getattr(layer, name)
            weight = None if weight is None else nn.Parameter(torch.from_numpy(weight), requires_grad=False)
            self.register_parameter(name, weight)
        self.start, self.activation = layer.start, layer.activation
        super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W) in channels_last."""
        weights = (self.partial, self.expand, self.expand_bias, self.project, self.project_bias)
        return cast(Tensor, torch.ops.fasternet.block.default(x, *weights, self.start, self.activation))

    def extra_repr(self) -> str:
        """Describe the block in ``print(module)``."""
        (hidden, channels), (partial, _, k, _) = self.expand.shape, self.partial.shape
        part = f"{self.start}:{self.start + partial}"
        return f"{channels}, convolved={part}, kernel_size={k}, hidden={hidden}, activation={self.activation}"


def use_native_blocks(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """Return a new network that computes its FasterNet blocks and its PConv in the C++ engine.

    Args:
        model: Any network; blocks and PConv of this package and of timm are found. It is not modified.
        example: An input that the network takes; with it, BN in the other parts of the network is folded too.

    Returns:
        A network for inference only, in evaluation mode, with the attribute ``reasons``: for each block and PConv by
        its name, that the engine computes it, or why not. The difference from ``model`` is at most 1e-5 of the largest
        output. Maps become channels_last; no gradient is recorded.

    Raises:
        ValueError: The engine cannot run here.
    """
    native.select_isa(None, "fp32")
    reasons: dict[str, str] = {}
    with torch.inference_mode(False):  # the operators could not see a write to that mode's tensors
        network = copy.deepcopy(model).eval() if example is None else fold_batch_norm(model, example)
        network = _convert(network.requires_grad_(False), "", {}, reasons)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and NATIVE in reasons.values():
            module.to(memory_format=torch.channels_last)
        if hasattr(module, "grad_checkpointing"):  # reads what a block of the engine does not have
            cast(Any, module).grad_checkpointing = False
    cast(Any, network).reasons = reasons
    return network


def _convert(module: nn.Module, name: str, seen: dict[nn.Module, nn.Module], reasons: dict[str, str]) -> nn.Module:
    """Return what takes the module's place, the module itself where nothing does; its children are converted too."""
    if module in seen:
        return seen[module]
    seen[module] = module
    try:
        replacement = _to_native(module)
        if replacement is not None:
            reasons[name] = NATIVE
            seen[module] = replacement
            return replacement
    except ValueError as error:
        reasons[name] = f"kept: {error}"
    for key, child in list(module._modules.items()):
        if child is not None:
            setattr(module, key, _convert(child, f"{name}.{key}".removeprefix("."), seen, reasons))
    return module


def _to_native(module: nn.Module) -> nn.Module | None:
    """Return a block or PConv in the C++ engine, None for anything else; raise ValueError where it cannot be one."""
    if isinstance(module, InferenceBlock):
        raise ValueError("it is optimised for eager already, give the network that it was made from")
    converters: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
        FasterNetBlock: lambda block: NativeBlock(to_block(block)),
        NativeBlock: lambda block: block,
        PConv2d: _to_native_pconv,
    }
    if timm := sys.modules.get("timm.models.fasternet"):  # else timm made none of the network's modules
        converters[timm.MLPBlock] = lambda block: NativeBlock(to_block(read_timm_block(block)))
        converters[timm.Partial_conv3] = lambda pconv: _to_native_pconv(read_timm_pconv(pconv))
    if not isinstance(module, tuple(converters)):
        return None
    if type(module) not in converters:
        raise ValueError(f"{type(module).__name__} is a class of its own, which may compute something else")
    _check(module)
    return converters[type(module)](module)


def _check(module: nn.Module) -> None:
    """Refuse weights that the engine does not take, and hooks that would no longer be called."""
    for tensor in module.parameters():
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(f"its weights are {tensor.dtype} on {tensor.device}, the engine takes float32 on the CPU")
    check_calls(module)


def _to_native_pconv(pconv: PConv2d) -> PConv2d:
    if pconv.dilation != 1:
        raise ValueError(f"its dilation is {pconv.dilation}, the engine has none")
    pconv.impl = "native"
    return pconv
