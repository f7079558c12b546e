"""Operators against each other: Table 1 and the operator half of Table 9, ten stacked layers of one operator.

PConv stands in it as this package computes it, and once more in every other form by name: ``split_cat``,
``slicing`` (clone, then write), and ``in_place``, which is what the paper timed: there the stack clones its input once,
because a stack that ran on its own output again and again would soon compute with denormals.
Beside each time stands the roofline of the operator: what its multiply-adds and its memory accesses (Eq. 2 to 5) allow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fasternet.benchmark.results import (
    MEMORY_FORMATS,
    Candidate,
    check_arguments,
    choose_settings,
    create_peak_records,
    describe_failure,
    find_fault,
    measure_candidates,
)
from fasternet.complexity import count_costs
from fasternet.environment import create_record, set_threads
from fasternet.ops import list_impls, pconv2d_, reference_ops, select_impl
from fasternet.paper import load_table
from fasternet.records import Record
from fasternet.timing import Peak, Track, measure_peaks, silent

Passes = Literal["forward", "forward+backward"]

NUM_LAYERS = 10
# A convolution is computed three times in training: the output, the gradient of its input and that of its weights.
# Each takes two of input, weights and output and makes the third, so all have the same costs.
NUM_COMPUTATIONS = {"forward": 1, "forward+backward": 3}
PCONV, CONV = "pconv3x3_r1/4", "conv3x3"

_TABLE1 = load_table("table1_operators")
SHAPES = tuple(dict.fromkeys((int(row["channels"]), int(row["height"]), int(row["width"])) for row in _TABLE1))
IN_PLACE = f"{PCONV}:in_place"
QUICK_OPERATORS = (
    *dict.fromkeys(row["operator"] for row in _TABLE1),
    *(f"{PCONV}:{impl}" for impl in list_impls()),
    IN_PLACE,
)
OPERATORS = (
    *QUICK_OPERATORS,
    *reference_ops.WIDTHS,
    *("dwconv3x3+pwconv", "tconv3x3_r1/4", f"{PCONV}+pwconv"),
)


def measure_operators(
    operators: Sequence[str] | None = None,
    *,
    passes: Passes = "forward",
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    batch_size: int = 1,
    threads: int = 1,
    device: str = "cpu",
    memory_format: str = "contiguous",
    quick: bool = False,
    seed: int = 0,
    track: Track = silent,
) -> Iterator[Record]:
    """Measure stacks of ten equal operators, one interleaved run for each shape.

    Args:
        operators: Names of ``ops.reference_ops``, for PConv also ``name:impl``; None takes those of ``OPERATORS``.
            The first PConv is what the ratios are taken against, else the first name.
        passes: "forward", or "forward+backward" with the gradients of input and weights, which leaves out what writes
            in place.
        shapes: Channels, height and width of each run.
        batch_size: 1 for latency, 32 for throughput.
        threads: On the CPU.
        device: "cpu" or "cuda".
        memory_format: "contiguous" (the paper's) or "channels_last".
        quick: Fewer blocks; Table 1 and the forms of PConv alone.
        seed: Of weights, inputs and the order within rounds.
        track: Shows progress.

    Yields:
        The machine's peaks; then for each shape the latencies, the A/A control and the ratios. An operator that fails
        its check has a latency record with ``error`` in place of a latency.

    Raises:
        ValueError: An argument is not one of what is allowed.
    """
    check_arguments(batch_size=batch_size, device=device, memory_format=memory_format)
    names = _choose_operators(operators, passes, quick=quick)
    settings = choose_settings(device, quick=quick, seed=seed, track=track)
    shared = {"threads": threads, "device": device, "precision": "fp32"}
    with set_threads(threads) as moment:
        peaks = measure_peaks(device=device, num_blocks=settings["num_blocks"] // 4)
        yield from create_peak_records("operators", peaks, shared)
        for shape in shapes:
            condition = {
                **dict(zip(("channels", "height", "width"), shape, strict=True)),
                **{"num_layers": NUM_LAYERS, "passes": passes, "batch_size": batch_size},
                **{"memory_format": memory_format, "engine": "eager", **shared},
            }
            candidates: list[Candidate] = []
            for name in names:
                prepared = _prepare(name, condition, peaks, seed)
                if isinstance(prepared, Record):
                    yield prepared
                elif operators or not _is_repeated(prepared, candidates):
                    candidates.append(prepared)
            if candidates:
                yield from _measure_shape(candidates, peaks=peaks, moment=moment, settings=settings)


def _measure_shape(candidates: Sequence[Candidate], **options: Any) -> Iterator[Record]:
    """Measure what has passed its check; to each latency add the share of its roofline."""
    baseline, pairs = _pair(candidates)
    for record in measure_candidates("operators", candidates, baseline=baseline, pairs=pairs, **options):
        if record.kind == "latency":
            share = record.values["macs_per_second"] / record.values["roofline_macs_per_second"]
            yield dataclasses.replace(record, values={**record.values, "roofline_share": share})
        else:
            yield record


def _choose_operators(operators: Sequence[str] | None, passes: str, *, quick: bool) -> list[str]:
    if passes not in get_args(Passes):
        raise ValueError(f"passes {passes!r} is not one of {', '.join(get_args(Passes))}")
    known = dict.fromkeys((*reference_ops.OPERATORS, *OPERATORS))
    if unknown := [name for name in operators or () if name not in known]:
        raise ValueError(f"operator {unknown[0]!r} is not one of {', '.join(known)}")
    names = list(operators or (QUICK_OPERATORS if quick else OPERATORS))
    if passes == "forward" or IN_PLACE not in names:
        return names
    if operators:
        raise ValueError(f"operator {IN_PLACE!r} overwrites what the gradients need: passes must be forward with it")
    return [name for name in names if name != IN_PLACE]


def _pair(candidates: Sequence[Candidate]) -> tuple[str, list[tuple[str, str]]]:
    """Choose the baseline, and the ratios to take: all against it, and those that the paper or its authors claim."""
    names = [candidate.name for candidate in candidates]
    baseline = next((name for name in names if name.partition(":")[0] == PCONV), names[0])
    split_cat = next((c.name for c in candidates if c.notes.get("impl") == "split_cat"), "")
    claimed = [(CONV, f"{PCONV}+pwconv"), (CONV, "tconv3x3_r1/4"), (split_cat, f"{PCONV}:slicing")]
    pairs = [(name, baseline) for name in names if name != baseline]
    return baseline, [*pairs, *(pair for pair in claimed if set(pair) <= set(names) and pair not in pairs)]


def _prepare(name: str, condition: dict[str, Any], peaks: Sequence[Peak], seed: int) -> Candidate | Record:
    """Build a stack and check it against the oracle: the same operator, as ``split_cat`` where it is a PConv."""
    operator, _, impl = name.partition(":")
    device, channels, passes = condition["device"], condition["channels"], condition["passes"]
    memory_format = MEMORY_FORMATS[condition["memory_format"]]
    width = channels * reference_ops.WIDTHS.get(operator, 1)
    shape = (condition["batch_size"], width, condition["height"], condition["width"])
    oracle = _create_stack(operator, "split_cat" if operator == PCONV else "", channels, seed).to(device)
    stack = _create_stack(operator, impl, channels, seed).to(device)
    stack.to(memory_format=memory_format)
    try:
        random = torch.Generator().manual_seed(seed)
        x, upstream = (torch.randn(shape, generator=random).to(device) for _ in range(2))
        expected = _create_call(oracle, x, upstream, passes)
        x, upstream = x.to(memory_format=memory_format), upstream.to(memory_format=memory_format)
        call = _create_call(stack, x, upstream, passes)
        with torch.inference_mode():
            faults = map(find_fault, call(), expected())
        fault = next(filter(None, faults), None)
        if operator == PCONV and impl != "in_place":
            impl = select_impl(impl or "auto").impl
    except Exception as error:
        fault = describe_failure(error)
    if fault:
        return create_record("operators", "latency", name, condition=condition, values={"error": fault})
    costs, num_bytes, working_set = _count_costs(oracle, shape, passes)
    roofline = find_roofline(shape[0] * costs["macs"], num_bytes, working_set, peaks)
    return Candidate(name, call, condition, costs, num_bytes, {**({"impl": impl} if impl else {}), **roofline})


def _create_call(stack: nn.Module, x: Tensor, upstream: Tensor, passes: str) -> Callable[[], Sequence[Tensor]]:
    """Return what runs a stack once: its output, with "forward+backward" also the gradients of input and weights."""
    if passes == "forward":
        return lambda: (stack(x),)
    x = x.detach().requires_grad_()
    inputs = [x, *stack.parameters()]

    def call() -> Sequence[Tensor]:
        # timing.measure calls in inference mode, where autograd records nothing
        with torch.inference_mode(mode=False), torch.enable_grad():
            y = stack(x)
            return (y.detach(), *torch.autograd.grad(y, inputs, upstream))

    return call


def _count_costs(stack: nn.Module, shape: tuple[int, ...], passes: str) -> tuple[dict[str, int], int, int]:
    """Count what a stack costs.

    Returns:
        Its costs for one picture; the bytes that one call reads and writes; and its working set in bytes. That is all
        weights with the maps of one layer, for maps of the next take their place; backward needs the maps of all
        layers, and holds the gradients of the weights.
    """
    times = NUM_COMPUTATIONS[passes]
    one, batch = count_costs(stack, (1, *shape[1:])), count_costs(stack, shape)
    maps = batch.memory_accesses - batch.num_params
    working_set = batch.num_params + maps // NUM_LAYERS if times == 1 else 2 * batch.num_params + maps
    costs = {"macs": times * one.macs, "memory_accesses": times * one.memory_accesses}
    return costs, 4 * times * batch.memory_accesses, 4 * working_set


def find_roofline(macs: int, num_bytes: int, working_set: int, peaks: Sequence[Peak]) -> dict[str, float]:
    """Return the arithmetic intensity of one call and the speed that the machine allows at that intensity.

    Args:
        macs: Multiply-adds.
        num_bytes: Bytes read and written.
        working_set: Bytes that are in use again and again; the smallest copied buffers, source and target, that are
            as large give the bandwidth.
        peaks: What the machine attains.
    """
    gemm = max(peak.per_second for peak in peaks if peak.subject == "gemm")
    copies = sorted((2 * 2**20 * peak.condition["mib"], peak.per_second) for peak in peaks if peak.subject == "copy")
    bandwidth = next((rate for size, rate in copies if size >= working_set), copies[-1][1])
    intensity = macs / num_bytes
    return {"arithmetic_intensity": intensity, "roofline_macs_per_second": min(gemm, intensity * bandwidth)}


def _is_repeated(candidate: Candidate, others: Sequence[Candidate]) -> bool:
    """Tell whether a named form of PConv is the one that was chosen automatically."""
    return any(candidate.notes.get("impl") == other.notes.get("impl", "") for other in others)


class _InPlaceStack(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for weight in self.parameters():
            x = pconv2d_(x, weight)
        return x


def _create_stack(operator: str, impl: str, channels: int, seed: int) -> nn.Sequential:
    """Stack an operator with random weights that keep the scale of what passes through."""
    options = {"impl": impl} if impl not in ("", "in_place") else {}
    layers = [reference_ops.create_operator(operator, channels, **options) for _ in range(NUM_LAYERS)]
    random = torch.Generator().manual_seed(seed)
    for part in nn.Sequential(*layers).modules():
        weights = list(part.parameters(recurse=False))
        num_inputs = sum(weight[0].numel() for weight in weights)  # of a T-shaped filter in two pieces
        for weight in weights:
            nn.init.normal_(weight, std=num_inputs**-0.5, generator=random)
    return _InPlaceStack(*layers) if impl == "in_place" else nn.Sequential(*layers)
