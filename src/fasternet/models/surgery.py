"""Surgery: puts PConv and PWConv in place of the k x k convolutions of somebody else's network (Section 3.3)."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from fasternet import timing
from fasternet.complexity import Costs, count_costs
from fasternet.models.approximate import (
    Moments,
    approximate_conv,
    approximate_conv_alone,
    copy_approximation,
    measure_moments,
)
from fasternet.models.replaceable import Kind, Select, choose, find_selector
from fasternet.models.surgery_report import Latency, Replacement, Skipped, SurgeryReport
from fasternet.models.widen import Widening, widen
from fasternet.ops import PConv2d, count_partial_channels
from fasternet.ops.pconv_nd import PConvPWConv

__all__ = ["Latency", "PConvPWConv", "Replacement", "Skipped", "SurgeryReport", "Widening", "replace_convs"]

Match = Literal["none", "macs", "params"]
Init = Literal["approximate", "random"]


def replace_convs(
    model: nn.Module,
    select: Select = "regular",
    kind: Kind = "pconv",
    match: Match = "none",
    init: Init = "approximate",
    *,
    partial_ratio: float = 0.25,
    images: Tensor | None = None,
    input_shape: Sequence[int] = (1, 3, 224, 224),
    measure: bool = True,
    threads: int = 1,
    seed: int = 0,
    prepare: Callable[[nn.Module], nn.Module] | None = None,
    track: timing.Track = timing.silent,
) -> tuple[nn.Module, SurgeryReport]:
    """Replace k x k convolutions of a network by PConv and PWConv.

    What can be replaced: regular and depthwise convolutions with odd k >= 3, "same" zero padding and stride 1 or 2,
    with enough input channels for a whole convolved one. BN and everything else stay as they are, the BN's statistics
    too: fine-tuning, or a pass in training mode, adapts them.

    Args:
        model: Any network; it is not modified. Trained weights, device, precision and mode are kept.
        select: Which of them: "regular", "depthwise", "all", a regular expression that the whole name has to match, or
            a function of name and convolution.
        kind: "pconv" is PConv and PWConv. "pconv_alone" is PConv without PWConv, where only BN and activation stand
            between the convolution and a pointwise one: the depthwise convolutions of MobileNetV2.
        match: "macs" or "params" changes the private widths around the replaced layers so that the network costs what
            it did; "none" leaves them.
        init: "approximate" derives the weights from the trained convolution by least squares in closed form, "random"
            draws them.
        partial_ratio: ``r = Cp / C`` of the layer's input.
        images: (N, 3, H, W), normalised: a few hundred pictures whose feature maps the closed form fits, each layer's
            inputs and outputs those of the given network; None fits the weights.
        input_shape: Of the input for which costs are counted and latency is measured.
        measure: Whether to measure latency.
        threads: Of the CPU, for the latency.
        seed: Of what is drawn.
        prepare: Applied to copies of both networks before they are timed: folds BN, for example.
        track: Shows progress of the timing.

    Returns:
        A new network and the report.

    Raises:
        ValueError: An argument does not fit, or nothing can be replaced.
    """
    _check(kind, match, init, partial_ratio, images)
    wants = find_selector(select)
    before = count_costs(model, input_shape)
    chosen, skipped = choose(model, select, wants, kind, partial_ratio, before, input_shape)
    trained = copy.deepcopy(model)  # the given network, its widths changed where costs have to match
    widened: tuple[Widening, ...] = ()
    reasons: Mapping[str, str] = {}
    if match != "none":
        cost = functools.partial(_cost_replacement, kind, partial_ratio)
        trained, widened, reasons = widen(trained, chosen, match, cost, input_shape, seed)
        _check_widths(trained, chosen, kind, match)
    new, errors = _replace(trained, chosen, kind, init, partial_ratio, images, seed)
    after = count_costs(new, input_shape)
    options = {
        "select": "|".join(map(re.escape, chosen)) if callable(select) else select,
        "kind": kind,
        "match": match,
        "partial_ratio": partial_ratio,
        "input_shape": list(input_shape),
        "seed": seed,
    }
    return new, SurgeryReport(
        replaced=tuple(_describe_replacement(name, trained, before, after, errors) for name in chosen),
        skipped=skipped,
        widened=widened,
        not_widened=tuple(Skipped(name, reason) for name, reason in reasons.items()),
        num_params_before=before.num_params,
        num_params_after=after.num_params,
        macs_before=before.macs,
        macs_after=after.macs,
        latency=_measure_latency(model, new, input_shape, threads, seed, prepare, track) if measure else None,
        options=options,
    )


def _check(kind: str, match: str, init: str, partial_ratio: float, images: Tensor | None) -> None:
    for name, value, allowed in (("kind", kind, Kind), ("match", match, Match), ("init", init, Init)):
        if value not in get_args(allowed):
            raise ValueError(f"{name} {value!r} is not one of {', '.join(get_args(allowed))}")
    count_partial_channels(1, partial_ratio)  # raises
    if images is None:
        return
    if init == "random":
        raise ValueError("images are for init 'approximate', not for 'random'")
    if images.dim() != 4 or not images.is_floating_point() or not len(images) or not torch.isfinite(images).all():
        form = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        raise ValueError(f"images must be finite floating-point numbers of the shape (N, 3, H, W), got {form}")


def _cost_replacement(
    kind: Kind, partial_ratio: float, conv: nn.Conv2d, in_channels: int, out_channels: int
) -> tuple[float, float]:
    """Return multiply-adds per output position and parameters of a replacement at other widths (Eq. 7)."""
    macs = conv.kernel_size[0] ** 2 * count_partial_channels(in_channels, partial_ratio) ** 2
    if kind == "pconv_alone":
        return macs, macs
    macs += in_channels * out_channels
    return macs, macs + (0 if conv.bias is None else out_channels)


def _check_widths(model: nn.Module, chosen: Iterable[str], kind: Kind, match: Match) -> None:
    for name in chosen if kind == "pconv_alone" else ():
        conv = cast(nn.Conv2d, model.get_submodule(name))
        if conv.in_channels != conv.out_channels:
            widths = f"{conv.in_channels} to {conv.out_channels} channels"
            raise ValueError(
                f"match {match!r} would give {name} {widths}, which a PConv alone cannot have: select less"
            )


def _replace(
    trained: nn.Module,
    chosen: Sequence[str],
    kind: Kind,
    init: Init,
    partial_ratio: float,
    images: Tensor | None,
    seed: int,
) -> tuple[nn.Module, dict[str, float]]:
    """Return a network with the replacements, and the errors of the closed form."""
    convs = {name: cast(nn.Conv2d, trained.get_submodule(name)) for name in chosen}
    num_partial = {name: count_partial_channels(conv.in_channels, partial_ratio) for name, conv in convs.items()}
    moments: Mapping[str, Moments] = {}
    if images is not None:
        parameter = next(trained.parameters())
        twin = copy.deepcopy(trained).eval()
        moments = measure_moments(twin, num_partial, torch.split(images.to(parameter.device, parameter.dtype), 8))
    new = copy.deepcopy(trained)
    paths: dict[nn.Module, list[str]] = {}  # a module that is used in several places is replaced in all of them
    for path, module in new.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    errors = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, conv in convs.items():
            replacement = _create_replacement(conv, kind, partial_ratio)
            if init == "approximate":
                errors[name] = _approximate(conv, replacement, num_partial[name], moments.get(name))
            for path in paths[new.get_submodule(name)]:
                new.set_submodule(path, replacement)
    return new, errors


def _create_replacement(conv: nn.Conv2d, kind: Kind, partial_ratio: float) -> PConv2d | PConvPWConv:
    settings: dict[str, Any] = {"kernel_size": conv.kernel_size[0], "dilation": conv.dilation[0]}
    new: PConv2d | PConvPWConv
    if kind == "pconv_alone":
        new = PConv2d(conv.in_channels, partial_ratio, **settings)
    else:
        settings |= {"stride": conv.stride[0], "partial_ratio": partial_ratio, "bias": conv.bias is not None}
        new = PConvPWConv(conv.in_channels, conv.out_channels, **settings)
    # made on the CPU, so that a seed means the same weights on every device
    return new.to(conv.weight).requires_grad_(conv.weight.requires_grad).train(conv.training)


@torch.no_grad()
def _approximate(
    conv: nn.Conv2d, replacement: PConv2d | PConvPWConv, partial_channels: int, moments: Moments | None
) -> float:
    if isinstance(replacement, PConv2d):
        fit = approximate_conv_alone(conv, partial_channels, moments)
        replacement.weight.copy_(fit.pconv)
        return fit.error
    fit = approximate_conv(conv, partial_channels, moments)
    copy_approximation(fit, replacement)
    return fit.error


def _describe_replacement(
    name: str, trained: nn.Module, before: Costs, after: Costs, errors: Mapping[str, float]
) -> Replacement:
    conv = cast(nn.Conv2d, trained.get_submodule(name))
    return Replacement(
        name=name,
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=conv.kernel_size[0],
        stride=conv.stride[0],
        macs_before=_sum_macs(before, name),
        macs_after=_sum_macs(after, name),
        error=errors.get(name),
    )


def _sum_macs(costs: Costs, name: str) -> int:
    return sum(row.macs for row in costs.rows if row.name == name or row.name.startswith(f"{name}."))


def _measure_latency(
    model: nn.Module,
    new: nn.Module,
    input_shape: Sequence[int],
    threads: int,
    seed: int,
    prepare: Callable[[nn.Module], nn.Module] | None,
    track: timing.Track,
) -> Latency:
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(input_shape), generator=generator).to(parameter.device, parameter.dtype)
    networks = {}
    for name, network in {"before": model, "after": new}.items():
        network = copy.deepcopy(network).eval()
        networks[name] = functools.partial(prepare(network) if prepare else network, x)
    with _threads(threads):
        measured = timing.measure(networks, baseline="before", device=str(parameter.device), track=track)
    ratio = measured.ratio("after", "before")
    return Latency(
        before_ms=measured.summary("before").median_ms,
        after_ms=measured.summary("after").median_ms,
        **{"ratio": ratio.value, "low": ratio.low, "high": ratio.high},
        verdict=ratio.verdict,
        a_a_spread=measured.a_a.spread,
        unstable=any(measured.summary(name).unstable for name in networks),
        threads=threads,
        engine="eager, prepared" if prepare else "eager, as given",
    )


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
