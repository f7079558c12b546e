"""What surgery did to a network, as data and as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fasternet.models.widen import Widening
from fasternet.timing import Verdict


@dataclass(frozen=True)
class Replacement:
    """A convolution that was replaced.

    Attributes:
        name: Path of the module.
        in_channels: Of the replacement; widening may have changed them.
        out_channels: Likewise.
        kernel_size: k.
        stride: 1 or 2.
        macs_before: Multiply-adds of the convolution in the given network.
        macs_after: Multiply-adds of the replacement.
        error: Of the closed form, a share of the output's variance: on pictures that were not fitted, without
            pictures for white noise; None with ``init="random"`` and with too few pictures to hold some out. What
            narrowing changed is not in it: the replacement is fitted to the narrowed network. A PConv alone passes most
            channels on at another scale: it may be far above 1 until the BN behind has adapted.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    macs_before: int
    macs_after: int
    error: float | None


@dataclass(frozen=True)
class Skipped:
    """A convolution that was left as it is, or not widened, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Latency:
    """Median latency before and after, interleaved: milliseconds per call with ``input_shape``.

    Attributes:
        before_ms: Of the given network.
        after_ms: Of the new one.
        ratio: ``after_ms / before_ms``.
        low: Lower end of the ratio's bootstrap 95 % interval.
        high: Upper end.
        verdict: What may be said of the new network.
        a_a_spread: How far the interval of the given network against itself reaches from 1.
        unstable: The samples of one of them spread too far.
        threads: Of the CPU.
        engine: What ran: both networks in evaluation mode, BN not folded, unless they were prepared.
    """

    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float
    verdict: Verdict
    a_a_spread: float
    unstable: bool
    threads: int
    engine: str


@dataclass(frozen=True)
class SurgeryReport:
    """What ``replace_convs`` did; ``str(report)`` is a table.

    Attributes:
        replaced: In order of the module tree.
        skipped: Convolutions with k > 1 that were left as they are.
        widened: Widths that were changed for ``match``.
        not_widened: Replaced convolutions without such a width.
        num_params_before: Parameters of the given network.
        num_params_after: Parameters of the new one.
        macs_before: Multiply-adds with ``input_shape``.
        macs_after: Likewise.
        latency: None without ``measure``.
        notes: A sentence each: what the errors were measured on, what they leave out, how far ``match`` was missed.
        options: ``replace_convs(model, **options, init="random", measure=False)`` gives a network like the given one
            the same architecture; JSON-able.
    """

    replaced: tuple[Replacement, ...]
    skipped: tuple[Skipped, ...]
    widened: tuple[Widening, ...]
    not_widened: tuple[Skipped, ...]
    num_params_before: int
    num_params_after: int
    macs_before: int
    macs_after: int
    latency: Latency | None
    notes: tuple[str, ...]
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return "\n".join(_describe(self))


def _describe(report: SurgeryReport) -> Iterator[str]:
    """Yield the lines of a report for a terminal."""
    rows = [["layer", "in", "out", "kernel", "stride", "MMACs before", "after", "error"]]
    for r in report.replaced:
        error = "-" if r.error is None else f"{r.error:.3g}"
        sizes = [str(size) for size in (r.in_channels, r.out_channels, r.kernel_size, r.stride)]
        rows.append([r.name, *sizes, f"{r.macs_before / 1e6:.4g}", f"{r.macs_after / 1e6:.4g}", error])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
    yield ""
    yield f"parameters {_change(report.num_params_before, report.num_params_after)}"
    yield f"multiply-adds {_change(report.macs_before, report.macs_after)}"
    if late := report.latency:
        ratio = f"{late.ratio:.2f} times (95 % interval {late.low:.2f} to {late.high:.2f}): {late.verdict}"
        yield f"latency {late.before_ms:.3g} -> {late.after_ms:.3g} ms, {ratio}; {late.engine}, threads: {late.threads}"
        if late.unstable:
            yield "the samples spread widely: measure again on a quieter machine"
    for wide in report.widened:
        narrowed = ", narrowed" if wide.after < wide.before else ""
        yield f"width {wide.before} -> {wide.after}{narrowed}: {', '.join(wide.layers)}"
    for verb, entries in (("not widened", report.not_widened), ("left", report.skipped)):
        for reason in dict.fromkeys(entry.reason for entry in entries):
            yield f"{verb}: {', '.join(entry.name for entry in entries if entry.reason == reason)} ({reason})"
    yield from report.notes
    yield "accuracy: not the given network's before fine-tuning; a pass of pictures in training mode adapts BN"


def _change(before: int, after: int) -> str:
    unit, symbol = next((u for u in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if max(before, after) >= u[0]), (1, ""))
    ratio = f" ({after / before:.2f} times)" if before else ""
    return f"{before / unit:.4g} -> {after / unit:.4g}{symbol}{ratio}"
