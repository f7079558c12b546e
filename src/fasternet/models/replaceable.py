"""Which convolutions of a network PConv can replace, and why not the others (Sections 3.2 and 3.3)."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from fasternet.complexity import Costs
from fasternet.models.reads import ACTIVATIONS, count_reads
from fasternet.models.surgery_report import Skipped

Select = Literal["regular", "depthwise", "all"] | str | Sequence[str] | Callable[[str, nn.Conv2d], bool]
Kind = Literal["pconv", "pconv_alone"]

# What may stand between a PConv without PWConv and the pointwise convolution after it.
_PASSING = (nn.BatchNorm2d, *ACTIVATIONS)


def find_selector(select: Select) -> Callable[[str, nn.Conv2d], bool]:
    """Return ``select`` of ``replace_convs`` as a function of name and convolution.

    Raises:
        ValueError: ``select`` is none of what it can be.
    """
    if callable(select):
        return select
    allowed = "regular, depthwise, all, a regular expression, names, or a function of name and convolution"
    if not isinstance(select, str):
        if not isinstance(select, Collection) or not all(isinstance(name, str) for name in select):
            raise ValueError(f"select {select!r} is not {allowed}")
        return lambda name, conv: name in select
    if select in ("regular", "depthwise", "all"):
        return lambda name, conv: select == "all" or (conv.groups == 1) == (select == "regular")
    try:
        pattern = re.compile(select)
    except re.error as error:
        raise ValueError(f"select {select!r} is not {allowed}: {error}") from error
    return lambda name, conv: pattern.fullmatch(name) is not None


def choose(
    model: nn.Module,
    select: Select,
    wants: Callable[[str, nn.Conv2d], bool],
    kind: Kind,
    partial_ratio: float,
    costs: Costs,
    input_shape: Sequence[int],
) -> tuple[list[str], tuple[Skipped, ...]]:
    """Choose the convolutions to replace.

    Args:
        model: The network.
        select: What the caller asked for.
        wants: Of ``find_selector``.
        kind: "pconv_alone" takes fewer.
        partial_ratio: Layers with too few channels for it are left.
        costs: Of the network: what does not run is left.
        input_shape: Of the input.

    Returns:
        Their names, and the other convolutions with k > 1, each with the reason.

    Raises:
        ValueError: There is none, or ``select`` matches none.
    """
    if isinstance(model, _ConvNd):
        raise ValueError(f"model itself is the convolution, a {type(model).__name__}: put it into an nn.Sequential")
    run = {row.name: row.input_shape for row in costs.rows}
    convs = {name: m for name, m in model.named_modules() if name and isinstance(m, _ConvNd) and max(m.kernel_size) > 1}
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    followed = _find_followed(model, input_shape) if kind == "pconv_alone" else set()
    chosen, candidates, skipped = [], [], []
    for name, conv in convs.items():
        reason = _find_obstacle(conv, partial_ratio) or _find_use(name, conv, run, owners)
        if kind == "pconv_alone":
            reason = reason or _find_obstacle_alone(name, conv, followed)
        if reason is None:
            candidates.append(name)
            if wants(name, cast(nn.Conv2d, conv)):
                chosen.append(name)
                continue
        skipped.append(Skipped(name, reason or "not selected"))
    if not isinstance(select, str) and not callable(select) and (unknown := [n for n in select if n not in convs]):
        raise ValueError(f"select names what is no k x k convolution of model: {', '.join(unknown)}")
    if not candidates:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:8]) or "it has no k x k convolution"
        raise ValueError(f"nothing in model can be replaced by kind {kind!r} ({reasons})")
    if not chosen:
        asked = [s for s in skipped if s.name not in candidates and wants(s.name, cast(nn.Conv2d, convs[s.name]))]
        why = f"; it matches {', '.join(f'{s.name} ({s.reason})' for s in asked[:8])}" if asked else ""
        names = ", ".join(candidates)
        raise ValueError(f"select {select!r} matches none of the convolutions that can be replaced: {names}{why}")
    return chosen, tuple(skipped)


def _find_obstacle(conv: _ConvNd, partial_ratio: float) -> str | None:
    """Say why PConv and PWConv cannot stand in for a convolution; None if they can."""
    if not isinstance(conv, nn.Conv2d):
        return f"a {type(conv).__name__}"
    if is_parametrized(conv) or not isinstance(conv._parameters.get("weight"), nn.Parameter):
        return "its weight is parametrised"
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__}, which may compute something else than Conv2d"
    k, other = conv.kernel_size
    same = conv.padding in ("same", tuple(d * (k // 2) for d in conv.dilation))
    obstacles = {
        f"kernel {k} x {other}: not square": k != other,
        f"kernel {k} x {other}: even": k % 2 == 0,
        f"stride {conv.stride}: neither 1 nor 2": conv.stride not in ((1, 1), (2, 2)),
        f"dilation {conv.dilation}: differs by direction": len(set(conv.dilation)) > 1,
        f"padding {conv.padding}: not 'same'": not same,
        f"padding mode {conv.padding_mode!r}: PConv pads with zeros": conv.padding_mode != "zeros",
        f"{conv.groups} groups: neither regular nor depthwise": conv.groups > 1
        and not conv.groups == conv.in_channels == conv.out_channels,
        f"{conv.in_channels} input channels: {partial_ratio:g} of them is less than one": (
            partial_ratio * conv.in_channels + 1e-6 < 1
        ),
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def _find_use(name: str, conv: _ConvNd, run: Mapping[str, tuple[int, ...]], owners: Mapping[int, int]) -> str | None:
    """Say what of the way a network uses a convolution keeps it from being replaced."""
    if name not in run:
        return "its forward is never called: the network does not use it, or uses its weight alone"
    if len(run[name]) != 4:
        return f"its input, {run[name]}, has no batch"
    if owners[id(conv.weight)] > 1:
        return "another module has the same weight"
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks:
        return "it has hooks, which would be lost"
    return None


def _find_obstacle_alone(name: str, conv: _ConvNd, followed: Collection[str]) -> str | None:
    obstacles = {
        f"{conv.in_channels} to {conv.out_channels} channels: a PConv alone keeps them": (
            conv.in_channels != conv.out_channels
        ),
        f"stride {conv.stride[0]}: a PConv alone has stride 1": conv.stride[0] != 1,
        "it has a bias, a PConv alone has none": conv.bias is not None,
        "something else than BN, an activation and one pointwise convolution reads it": name not in followed,
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def _find_followed(model: nn.Module, input_shape: Sequence[int]) -> set[str]:
    """Return the convolutions whose output only BN and activations read, and behind them a pointwise convolution.

    What reads what is observed in one forward pass.
    """
    model = copy.deepcopy(model).eval()
    names = {module: name for name, module in model.named_modules()}
    readers: dict[int, list[tuple[nn.Module, Tensor]]] = {}  # by the tensor's id; its readers and what they made
    made: list[tuple[nn.Module, Tensor]] = []

    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor) and isinstance(output, Tensor):
            readers.setdefault(id(x), []).append((module, output))
            made.append((module, output))

    for module in names:
        if isinstance(module, (*_PASSING, nn.Conv2d)):
            module.register_forward_hook(observe, with_kwargs=True)
    parameter = next(model.parameters())
    x = torch.zeros(tuple(input_shape), dtype=parameter.dtype, device=parameter.device)
    reads = count_reads(model, x)

    def leads_to_pointwise(tensor: Tensor) -> bool:
        *changing, last = readers.get(id(tensor), [(nn.Identity(), tensor)])
        if reads[id(tensor)] != len(changing) + 1:
            return False
        if not all(isinstance(module, _PASSING) and output is tensor for module, output in changing):
            return False
        module, output = last
        if isinstance(module, nn.Conv2d):
            return module.kernel_size == (1, 1) and module.groups == 1
        return output is not tensor and leads_to_pointwise(output)

    convs = {name: [t for module, t in made if names[module] == name] for name in {names[module] for module, _ in made}}
    return {name for name, tensors in convs.items() if all(map(leads_to_pointwise, tensors))}
