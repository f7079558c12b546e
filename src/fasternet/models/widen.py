"""Change the private widths of a network so that replacing its convolutions keeps the cost (Table 5's equal MACs).

A width is private when one convolution makes it, one reads it, and between them stands only what treats each channel
by itself: batch normalisation, activations, dropout, pooling, depthwise convolutions. Nothing else sees such a width:
the middle of a residual block, the expanded width of an inverted residual. The residual stream itself and what is
concatenated or split are not private.

Legend: G (new, old) mixes the old channels of a width into its new ones; each row has norm 1.
"""

from __future__ import annotations

import copy
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasternet.models.reads import ACTIVATIONS

Cost = Callable[[nn.Conv2d, int, int], tuple[float, float]]

RIGHT = "its width is right already"

# By the names that their functions have in torch, in torch.nn.functional and on tensors.
_ELEMENTWISE = {
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus"),
    *("sigmoid", "tanh", "hardsigmoid", "hardswish", "hardtanh", "dropout", "contiguous"),
}
_CHANNELWISE = (
    *ACTIVATIONS,
    nn.Identity,
    *(nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.Upsample),
)


@dataclass(frozen=True)
class Widening:
    """A private width that was changed.

    Attributes:
        layers: The convolutions that share it, from the one that makes it to the one that reads it.
        before: Channels in the given network.
        after: Channels now; less than ``before`` where the replacement costs more: that changes the function.
    """

    layers: tuple[str, ...]
    before: int
    after: int


@dataclass(frozen=True)
class _Width:
    """A private width: its convolutions (producer, depthwise ones, consumer), its BNs, its channels."""

    convs: tuple[str, ...]
    norms: tuple[str, ...]
    channels: int


def widen(
    model: nn.Module,
    wanted: Collection[str],
    match: Literal["macs", "params"],
    cost: Cost,
    input_shape: Sequence[int],
    seed: int = 0,
) -> tuple[nn.Module, tuple[Widening, ...], Mapping[str, str]]:
    """Give the network the widths at which it costs the same after ``wanted`` have been replaced.

    Private widths that share a convolution change by one factor, found so that their convolutions together, the wanted
    ones at their replacement's cost, come as close as whole channels allow to what they cost in the given network.
    Widening keeps the function in evaluation mode: new channels are mixtures of the layer's own, and the convolution
    that reads them starts with zeros for them. Narrowing keeps the channels with the largest product of norms along
    the width, and changes the function.

    Args:
        model: The network before any replacement; it is not modified.
        wanted: Names of the convolutions that will be replaced.
        match: What has to stay: multiply-adds or parameters.
        cost: What the replacement of a convolution costs with other numbers of channels:
            ``cost(conv, in_channels, out_channels)`` returns multiply-adds per output position and parameters.
        input_shape: (N, C, H, W), of the input.
        seed: Of the new channels.

    Returns:
        A copy of the network, the widths that changed, and for each wanted convolution without a changed width the
        reason.

    Raises:
        ValueError: ``match`` is unknown.
    """
    if match not in ("macs", "params"):
        raise ValueError(f"match must be macs or params, got {match!r}")
    model = copy.deepcopy(model)
    try:
        graph = _Graph(model)
    except Exception as error:  # what a network does while it is traced is its own
        why = textwrap.shorten(str(error) or type(error).__name__, 120, placeholder=" ...")
        return model, (), dict.fromkeys(wanted, f"torch.fx cannot trace the network ({why})")
    widths = [w for w in graph.find_widths() if not set(w.convs).isdisjoint(wanted)]
    positions = _count_positions(model, input_shape) if match == "macs" else {}
    widenings: list[Widening] = []
    changed: set[str] = set()
    generator = torch.Generator().manual_seed(seed)
    for segment in _join(widths):
        solved = _solve(model, segment, set(wanted), cost, positions)
        for width, channels in zip(segment, solved, strict=True):
            if channels != width.channels:
                _resize(model, width, channels, generator)
                changed.update(width.convs)
        widenings.extend(_describe(segment, solved))
    kept = {name for width in widths for name in width.convs} - changed
    reasons = {name: RIGHT if name in kept else graph.explain(name) for name in wanted if name not in changed}
    return model, tuple(widenings), reasons


class _Tracer(fx.Tracer):
    """Convolutions and BNs of other packages, too, are single nodes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | _BatchNorm) or super().is_leaf_module(m, module_qualified_name)

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], *rest: Any, **more: Any) -> Any:
        """Give the pieces of ``chunk`` and ``split`` as a tuple where their number is known, as in YOLO blocks."""
        proxy: Any = super().create_proxy(kind, target, args, *rest, **more)
        pieces = args[1] if len(args) > 1 else None
        name = getattr(target, "__name__", target)
        if name == "chunk" and isinstance(pieces, int):
            return tuple(proxy[i] for i in range(pieces))
        if name == "split" and isinstance(pieces, list | tuple):
            return tuple(proxy[i] for i in range(len(pieces)))
        return proxy


class _Graph:
    """Who reads what in a network."""

    def __init__(self, model: nn.Module) -> None:
        model = copy.deepcopy(model).eval()  # its modules are only looked at, and by name
        nodes = list(_Tracer().trace(model).nodes)
        self.modules = dict(model.named_modules())
        self.calls = Counter(node.target for node in nodes if node.op == "call_module")
        self.nodes = {str(node.target): node for node in nodes if node.op == "call_module"}
        params = {name: [p for p in m._parameters.values() if p is not None] for name, m in self.modules.items()}
        owners = Counter(id(p) for tensors in params.values() for p in tensors)
        self.shared = {name for name, tensors in params.items() if any(owners[id(p)] > 1 for p in tensors)}
        self.shared |= {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}

    def find_widths(self) -> Iterator[_Width]:
        """Yield the private widths, in order of execution."""
        for name, node in self.nodes.items():
            if self._is_end(node):
                chain, _ = self._follow(node)
                if self._is_end(chain[-1]) and len(chain) > 1:
                    names = [str(n.target) for n in chain if n.op == "call_module"]
                    yield _Width(
                        tuple(n for n in names if isinstance(self.modules[n], nn.Conv2d)),
                        tuple(n for n in names if isinstance(self.modules[n], _BatchNorm)),
                        cast(nn.Conv2d, self.modules[name]).out_channels,
                    )

    def explain(self, name: str) -> str:
        """Say in words why neither width of a convolution is private."""
        conv, node = self.modules.get(name), self.nodes.get(name)
        if node is None:
            return "it does not run on its own in the forward pass"
        if type(conv) is not nn.Conv2d:
            return f"it is a {type(conv).__name__}, not a plain Conv2d"
        if self.calls[name] > 1:
            return f"it runs {self.calls[name]} times"
        if not self._is_plain(node):
            return "its weights are used elsewhere, or computed"
        if not (self._is_end(node) or self._is_depthwise(node)):
            return f"it has {conv.groups} groups"
        sides = {"its input": self._explain_input(node), "its output": self._follow(node)[1]}
        return ", and ".join(f"{side} {words}" for side, words in sides.items() if words)

    def _follow(self, node: fx.Node) -> tuple[list[fx.Node], str]:
        """Follow a convolution's output to the convolution that reads it, or to where it stops being private."""
        chain = [node]
        while True:
            users = list(node.users)
            if len(users) != 1:
                return chain, f"is read {len(users)} times ({', '.join(map(self._name, users))})"
            node = users[0]
            if self._is_end(node):
                return [*chain, node], ""
            if not self._keeps_channels(node):
                return chain, f"goes into {self._name(node)}"
            chain.append(node)

    def _explain_input(self, node: fx.Node) -> str:
        """Follow a convolution's input back; empty where it is private up to the convolution that makes it."""
        while True:
            node = node.all_input_nodes[0]
            if len(node.users) > 1:
                return f"({self._name(node)}) is read {len(node.users)} times"
            if not self._keeps_channels(node):
                return "" if self._is_end(node) else f"comes from {self._name(node)}"

    def _name(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "output"):
            return "the network's input" if node.op == "placeholder" else "the network's output"
        return str(node.target) if node.op != "call_function" else str(getattr(node.target, "__name__", node.target))

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether a node is a module that runs once and alone has its parameters, which no hook computes."""
        if node.op != "call_module" or self.calls[node.target] > 1 or node.target in self.shared:
            return False
        return not self.modules[str(node.target)]._forward_pre_hooks

    def _is_end(self, node: fx.Node) -> bool:
        module = self.modules.get(str(node.target))
        return self._is_plain(node) and type(module) is nn.Conv2d and module.groups == 1

    def _is_depthwise(self, node: fx.Node) -> bool:
        module = self.modules.get(str(node.target))
        return (
            self._is_plain(node)
            and type(module) is nn.Conv2d
            and module.groups == module.in_channels == module.out_channels
        )

    def _keeps_channels(self, node: fx.Node) -> bool:
        """Whether a node treats each channel of its one input by itself, in a way that can be resized."""
        if len(node.all_input_nodes) != 1:
            return False
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if isinstance(module, _BatchNorm):
                return self._is_plain(node) and all(isinstance(m, _CHANNELWISE) for m in module.children())
            return self._is_depthwise(node) or isinstance(module, _CHANNELWISE)
        if node.op == "call_method":
            return str(node.target).removesuffix("_") in _ELEMENTWISE
        name = getattr(node.target, "__name__", "")
        known = name.removesuffix("_") in _ELEMENTWISE
        return known and node.target in (getattr(torch, name, None), getattr(F, name, None))


def _count_positions(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """Count the output positions (H * W) of each convolution that runs, on zeros."""
    positions: dict[str, int] = {}
    model = copy.deepcopy(model).eval()  # running it must leave nothing behind

    def note(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, inputs, output: positions.__setitem__(name, output[0, 0].numel())

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note(name))
    parameter = next(model.parameters())
    with torch.inference_mode():
        model(torch.zeros((1, *input_shape[1:]), device=parameter.device, dtype=parameter.dtype))
    return positions


def _join(widths: Sequence[_Width]) -> list[list[_Width]]:
    """Join the widths that share a convolution to segments."""
    segments: list[list[_Width]] = []
    for width in widths:
        near = [s for s in segments if any(set(width.convs) & set(other.convs) for other in s)]
        segments = [s for s in segments if s not in near]
        segments.append([*(other for s in near for other in s), width])
    return segments


def _solve(
    model: nn.Module, segment: Sequence[_Width], wanted: set[str], cost: Cost, positions: Mapping[str, int]
) -> list[int]:
    """Find the segment's widths; without ``positions`` at equal parameters, else at equal multiply-adds."""
    largest = max(width.channels for width in segment)

    def scale(channels: int) -> list[int]:
        return [max(1, round(channels * width.channels / largest)) for width in segment]

    def count(channels: int, replaced: set[str]) -> float:
        return _count(model, list(zip(segment, scale(channels), strict=True)), replaced, cost, positions)

    target = count(largest, set())
    high = largest
    while count(high, wanted) < target:
        high *= 2
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle, wanted) < target else (low, middle)
    best = min(max(1, low), high, key=lambda channels: abs(count(channels, wanted) - target))
    return scale(best)


def _count(
    model: nn.Module,
    widths: Sequence[tuple[_Width, int]],
    replaced: set[str],
    cost: Cost,
    positions: Mapping[str, int],
) -> float:
    """Count what the convolutions of a segment cost at other widths, and for parameters its BNs."""
    read = {name: channels for width, channels in widths for name in width.convs[1:]}
    made = {name: channels for width, channels in widths for name in width.convs[:-1]}
    total = 0.0
    for name in {**read, **made}:
        conv = cast(nn.Conv2d, model.get_submodule(name))
        function = cost if name in replaced else _cost_conv
        macs, params = function(conv, read.get(name, conv.in_channels), made.get(name, conv.out_channels))
        total += macs * positions[name] if positions else params
    if not positions:
        for width, channels in widths:
            tensors = (p for name in width.norms for p in model.get_submodule(name).parameters())
            total += sum(channels for _ in tensors)
    return total


def _cost_conv(conv: nn.Conv2d, in_channels: int, out_channels: int) -> tuple[float, float]:
    groups = 1 if conv.groups == 1 else in_channels
    weights = in_channels // groups * out_channels * conv.kernel_size[0] * conv.kernel_size[1]
    return weights, weights + (0 if conv.bias is None else out_channels)


def _describe(segment: Sequence[_Width], solved: Sequence[int]) -> Iterator[Widening]:
    """Yield one entry for neighbours that had the same width: both sides of a bottleneck's 3x3 convolution."""
    entries: list[Widening] = []
    for width, after in zip(segment, solved, strict=True):
        last = entries[-1] if entries else None
        if last and last.before == width.channels and last.layers[-1] == width.convs[0]:
            entries[-1] = Widening(last.layers + width.convs[1:], last.before, after)
        else:
            entries.append(Widening(width.convs, width.channels, after))
    return (entry for entry in entries if entry.before != entry.after)


@torch.no_grad()
def _resize(model: nn.Module, width: _Width, channels: int, generator: torch.Generator) -> None:
    convs = [cast(nn.Conv2d, model.get_submodule(name)) for name in width.convs]
    norms = [cast(_BatchNorm, model.get_submodule(name)) for name in width.norms]
    remake = _narrow(convs, norms, channels) if channels < width.channels else _mix(width.channels, channels, generator)
    consumer = convs[-1]
    read = consumer.weight.transpose(0, 1)  # (old, out, k, k)
    new = consumer.weight.new_zeros(max(0, channels - width.channels), *read.shape[1:])
    kept = torch.cat((read, new)) if len(new) else remake(read, False)
    consumer.weight, consumer.in_channels = _like(consumer.weight, kept.transpose(0, 1)), channels
    for conv in convs[:-1]:
        if conv.groups > 1:
            conv.in_channels = conv.groups = channels
        conv.out_channels = channels
        conv.weight = _like(conv.weight, remake(conv.weight, False))
        conv.bias = None if conv.bias is None else _like(conv.bias, remake(conv.bias, False))
    for norm in norms:
        norm.num_features = channels
        norm.weight = None if norm.weight is None else _like(norm.weight, remake(norm.weight, True))
        norm.bias = None if norm.bias is None else _like(norm.bias, remake(norm.bias, True))
        norm.running_mean = None if norm.running_mean is None else remake(norm.running_mean, False)
        norm.running_var = None if norm.running_var is None else remake(norm.running_var, True)


def _mix(before: int, after: int, generator: torch.Generator) -> Callable[[Tensor, bool], Tensor]:
    """Make the function that appends mixtures of a tensor's (old, ...) own entries; G is that of the whole width.

    What is not linear in the filters, scales and variances, is averaged with G's squares, which sum to 1.
    """
    mixture = F.normalize(torch.randn(after - before, before, generator=generator))

    def remake(tensor: Tensor, average: bool) -> Tensor:
        rows = (mixture.square() if average else mixture).to(tensor)
        return torch.cat((tensor, torch.tensordot(rows, tensor, dims=1)))

    return remake


def _narrow(convs: Sequence[nn.Conv2d], norms: Sequence[_BatchNorm], after: int) -> Callable[[Tensor, bool], Tensor]:
    """Make the function that selects the channels with the largest product of norms along the width."""
    score = convs[-1].weight.transpose(0, 1).flatten(1).norm(dim=1)
    for conv in convs[:-1]:
        score = score * conv.weight.flatten(1).norm(dim=1)
    for norm in norms:
        if norm.weight is not None:
            score = score * norm.weight.abs()
        if norm.running_var is not None:
            score = score / (norm.running_var + norm.eps).sqrt()
    keep = score.argsort(descending=True, stable=True)[:after].sort().values
    return lambda tensor, average: tensor[keep]


def _like(parameter: Tensor, tensor: Tensor) -> nn.Parameter:
    form = find_memory_format([parameter])
    return nn.Parameter(tensor.clone(memory_format=form), requires_grad=parameter.requires_grad)


def find_memory_format(parameters: Iterable[Tensor]) -> torch.memory_format:
    """Return channels_last if one of them lies so alone: 1 x 1 and depthwise filters lie both ways."""
    last = torch.channels_last
    alike = (p.dim() == 4 and p.is_contiguous(memory_format=last) and not p.is_contiguous() for p in parameters)
    return last if any(alike) else torch.contiguous_format
