"""Surgery: puts PConv and PWConv in place of the k x k convolutions of somebody else's network (Section 3.3)."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from fasternet import environment, timing
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
from fasternet.models.widen import RIGHT, Widening, find_memory_format, widen
from fasternet.ops import PConv2d, count_partial_channels
from fasternet.ops.pconv_nd import PConvPWConv

__all__ = ["Latency", "PConvPWConv", "Replacement", "Skipped", "SurgeryReport", "Widening", "replace_convs"]

Match = Literal["none", "macs", "params"]
Init = Literal["approximate", "random"]

MATCH_TOLERANCE = 0.02  # of the costs; whole channels alone miss by less
HOLD_OUT = 5  # one picture of so many is held out of the fit


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
        select: Which of them: "regular", "depthwise", "all", a regular expression that the whole name has to match,
            a list of names, or a function of name and convolution.
        kind: "pconv" is PConv and PWConv. "pconv_alone" is PConv without PWConv, where only BN and activation stand
            between the convolution and a pointwise one: the depthwise convolutions of MobileNetV2.
        match: "macs" or "params" changes the private widths around the replaced layers so that the network costs what
            it did; "none" leaves them. Narrowing, where the replacement costs more, changes the network's function.
        init: "approximate" derives the weights from the trained convolution by least squares in closed form, "random"
            draws them.
        partial_ratio: ``r = Cp / C`` of the layer's input.
        images: (N, 3, H, W), normalised: a few hundred pictures whose feature maps the closed form fits, each layer's
            inputs and outputs those of the given network, after ``match``; every fifth is held out of the fit, for the
            error. None fits the weights.
        input_shape: Of the input for which costs are counted and latency is measured.
        measure: Whether to measure latency.
        threads: Of the CPU, for the latency.
        seed: Of what is drawn.
        prepare: Applied to copies of both networks before they are timed: folds BN, for example.
        track: Shows progress of the pictures and of the timing.

    Returns:
        A new network and the report.

    Raises:
        ValueError: An argument does not fit, nothing can be replaced, or no width can be changed for ``match``.
    """
    _check(kind, match, init, partial_ratio, images)
    if measure:
        with environment.set_threads(threads, pinned=False):
            pass  # raises now rather than after minutes
    wants = find_selector(select)
    before = count_costs(model, input_shape)
    chosen, skipped = choose(model, select, wants, kind, partial_ratio, before, input_shape)
    if images is not None:
        _check_images(model, images)
    trained = copy.deepcopy(model)  # the given network, its widths changed where costs have to match
    widened: tuple[Widening, ...] = ()
    reasons: Mapping[str, str] = {}
    if match != "none":
        cost = functools.partial(_cost_replacement, kind, partial_ratio)
        trained, widened, reasons = widen(trained, chosen, match, cost, input_shape, seed)
        _check_widths(trained, chosen, kind, match)
    new = _replace(trained, chosen, kind, partial_ratio, seed)
    after = _count_after(new, input_shape)
    notes = [*_check_match(match, before, after, widened, reasons)]
    errors: Mapping[str, float] = {}
    if init == "approximate":
        errors, more = _approximate_all(trained, new, chosen, images, track)
        notes += more
    options = {
        "select": select if isinstance(select, str) else "|".join(map(re.escape, chosen)),
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
        notes=tuple(notes),
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


def _check_images(model: nn.Module, images: Tensor) -> None:
    try:
        with torch.no_grad():
            copy.deepcopy(model).eval()(images[:1].to(next(model.parameters())))
    except Exception as error:  # what a network says to a wrong input is its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"images of the shape {tuple(images.shape)} do not fit the network: {reason}") from error


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


def _check_match(
    match: Match, before: Costs, after: Costs, widened: Sequence[Widening], reasons: Mapping[str, str]
) -> Iterator[str]:
    """Yield what has to be said of costs that do not match; raise ValueError where no width could be changed."""
    if match == "none":
        return
    why: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason != RIGHT:
            why.setdefault(reason, []).append(name)
    if why and not widened:
        found = "; ".join(f"{_list(names, 1)}: {reason}" for reason, names in [*why.items()][:3])
        others = f"; and {len(why) - 3} other reasons" if len(why) > 3 else ""
        raise ValueError(f"match {match!r} cannot be met, as no width can change: {found}{others}")
    old, new = (c.macs if match == "macs" else c.num_params for c in (before, after))
    if abs(new / old - 1) > MATCH_TOLERANCE:
        yield f"match {match!r} is missed: {new / old:.2f} times the given network's, as only private widths can change"
    if any(width.after < width.before for width in widened):
        yield "narrowing changes the network's function, and is not in the errors"


def _list(names: Sequence[str], most: int = 4) -> str:
    others = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + others


def _count_after(new: nn.Module, input_shape: Sequence[int]) -> Costs:
    try:
        return count_costs(new, input_shape)
    except ValueError as error:
        cause = error.__cause__ or error
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        raise ValueError(
            f"the network runs no longer with its convolutions replaced, select others: {reason}"
        ) from error


def _replace(trained: nn.Module, chosen: Sequence[str], kind: Kind, partial_ratio: float, seed: int) -> nn.Module:
    """Return a network with the replacements, whose weights are drawn."""
    new = copy.deepcopy(trained)
    paths: dict[nn.Module, list[str]] = {}  # a module that is used in several places is replaced in all of them
    for path, module in new.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    form = find_memory_format(new.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU, too
        for name in chosen:
            conv = cast(nn.Conv2d, new.get_submodule(name))
            replacement = _create_replacement(conv, kind, partial_ratio).to(memory_format=form)
            for path in paths[conv]:
                new.set_submodule(path, replacement)
    return new


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
def _approximate_all(
    trained: nn.Module, new: nn.Module, chosen: Sequence[str], images: Tensor | None, track: timing.Track
) -> tuple[dict[str, float], list[str]]:
    """Write the closed form's weights into the replacements; return its errors, and what has to be said of them."""
    replacements = {name: cast(PConv2d | PConvPWConv, new.get_submodule(name)) for name in chosen}
    parts = {name: r if isinstance(r, PConv2d) else r.pconv for name, r in replacements.items()}
    num_partial = {name: part.partial_channels for name, part in parts.items()}
    fitted: Mapping[str, Moments] = {}
    held_out: Mapping[str, Moments] = {}
    notes = ["error: share of the variance, for white noise; none of it was measured on pictures"]
    if images is not None:
        held = torch.arange(len(images)) % HOLD_OUT == HOLD_OUT - 1
        fitted = _measure_moments(trained, num_partial, images[~held], "maps of pictures", track)
        notes = [f"error: not measured, as {len(images)} pictures are too few to hold one of {HOLD_OUT} out of the fit"]
        if held.any():
            held_out = _measure_moments(trained, num_partial, images[held], "maps of pictures held out", track)
            notes = [f"error: share of the variance, on {held.sum()} of {len(images)} pictures, held out of the fit"]
    errors, few = {}, []
    for name, replacement in replacements.items():
        conv = cast(nn.Conv2d, trained.get_submodule(name))
        moments, size = fitted.get(name), parts[name].weight[0].numel()
        if isinstance(replacement, PConv2d):
            fit = approximate_conv_alone(conv, num_partial[name], moments, held_out.get(name))
            replacement.weight.copy_(fit.pconv)
        else:
            fit = approximate_conv(conv, num_partial[name], moments, held_out.get(name))
            copy_approximation(fit, replacement)
            size += conv.in_channels - num_partial[name]
        if images is None or held_out:
            errors[name] = fit.error
        if moments is not None and moments.num_positions is not None and moments.num_positions < size:
            few.append(name)
    if few:
        notes.append(f"few pictures: fewer positions than unknowns in {_list(few)}")
    return errors, notes


def _measure_moments(
    model: nn.Module, num_partial: Mapping[str, int], images: Tensor, description: str, track: timing.Track
) -> dict[str, Moments]:
    parameter = next(model.parameters())
    batches = torch.split(images, 8)
    tracked = track(batches, len(batches), description)
    placed = (batch.to(parameter.device, parameter.dtype) for batch in tracked)
    return measure_moments(copy.deepcopy(model).eval(), num_partial, placed)


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
    if x.dim() == 4:
        x = x.contiguous(memory_format=find_memory_format(model.parameters()))
    networks = {}
    for name, network in {"before": model, "after": new}.items():
        network = copy.deepcopy(network).eval()
        networks[name] = functools.partial(prepare(network) if prepare else network, x)
    with environment.set_threads(threads):
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
