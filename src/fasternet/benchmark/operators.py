"""Operators against each other: Table 1, ten stacked layers of one operator on one shape.

PConv stands in it as this package computes it, and once more in every other form by name: ``split_cat``,
``slicing`` (clone, then write), and ``in_place``, which is what the paper timed: there the stack clones its input once,
because a stack that ran on its own output again and again would soon compute with denormals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

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
from fasternet.environment import create_record
from fasternet.ops import list_impls, pconv2d_, reference_ops, select_impl
from fasternet.paper import load_table
from fasternet.records import Record
from fasternet.timing import Track, measure_peaks, set_threads, silent

NUM_LAYERS = 10
PCONV = "pconv3x3_r1/4"

_TABLE1 = load_table("table1_operators")
SHAPES = tuple(dict.fromkeys((int(row["channels"]), int(row["height"]), int(row["width"])) for row in _TABLE1))
OPERATORS = (
    *dict.fromkeys(row["operator"] for row in _TABLE1),
    *(f"{PCONV}:{impl}" for impl in (*list_impls(), "in_place")),
)


def measure_operators(
    operators: Sequence[str] | None = None,
    *,
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
        operators: Names of ``ops.reference_ops``, for PConv also ``name:impl``; None takes those of Table 1 and every
            form of PConv. The first PConv is what the ratios are taken against, else the first name.
        shapes: Channels, height and width of each run.
        batch_size: 1 for latency, 32 for throughput.
        threads: On the CPU.
        device: "cpu" or "cuda".
        memory_format: "contiguous" (the paper's) or "channels_last".
        quick: Fewer blocks.
        seed: Of weights, inputs and the order within rounds.
        track: Shows progress.

    Yields:
        The machine's peaks; then for each shape the latencies, the A/A control and the ratios. An operator that fails
        its check has a latency record with ``error`` in place of a latency.

    Raises:
        ValueError: An argument is not one of what is allowed.
    """
    check_arguments(batch_size=batch_size, device=device, memory_format=memory_format)
    if unknown := [name for name in operators or () if name not in (*reference_ops.OPERATORS, *OPERATORS)]:
        known = ", ".join(dict.fromkeys((*reference_ops.OPERATORS, *OPERATORS)))
        raise ValueError(f"operator {unknown[0]!r} is not one of {known}")
    settings = choose_settings(device, quick=quick, seed=seed, track=track)
    shared = {"threads": threads, "device": device, "precision": "fp32"}
    with set_threads(threads) as moment:
        peaks = measure_peaks(device=device, num_blocks=settings["num_blocks"] // 4)
        yield from create_peak_records("operators", peaks, shared)
        for shape in shapes:
            condition = {
                **dict(zip(("channels", "height", "width"), shape, strict=True)),
                "num_layers": NUM_LAYERS,
                "batch_size": batch_size,
                "memory_format": memory_format,
                "engine": "eager",
                **shared,
            }
            candidates: list[Candidate] = []
            for name in operators or OPERATORS:
                prepared = _prepare(name, condition, seed)
                if isinstance(prepared, Record):
                    yield prepared
                elif operators or not _is_repeated(prepared, candidates):
                    candidates.append(prepared)
            if not candidates:
                continue
            names = [candidate.name for candidate in candidates]
            baseline = next((name for name in names if name.partition(":")[0] == PCONV), names[0])
            yield from measure_candidates(
                "operators",
                candidates,
                baseline=baseline,
                pairs=[(name, baseline) for name in names if name != baseline],
                peaks=peaks,
                moment=moment,
                settings=settings,
            )


def _prepare(name: str, condition: dict[str, Any], seed: int) -> Candidate | Record:
    """Build a stack and check it against the oracle: the same operator, as ``split_cat`` where it is a PConv."""
    operator, _, impl = name.partition(":")
    device, channels = condition["device"], condition["channels"]
    shape = (condition["batch_size"], channels, condition["height"], condition["width"])
    oracle = _create_stack(operator, "split_cat" if operator == PCONV else "", channels, seed).to(device)
    stack = _create_stack(operator, impl, channels, seed).to(device)
    stack.to(memory_format=MEMORY_FORMATS[condition["memory_format"]])
    try:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
        with torch.inference_mode():
            expected = oracle(x)
            x = x.to(memory_format=MEMORY_FORMATS[condition["memory_format"]])
            fault = find_fault(stack(x), expected)
            if operator == PCONV and impl != "in_place":
                impl = select_impl(impl or "auto").impl
    except Exception as error:
        fault = describe_failure(error)
    if fault:
        return create_record("operators", "latency", name, condition=condition, values={"error": fault})
    one, batch = count_costs(oracle, (1, *shape[1:])), count_costs(oracle, shape)
    costs = {"macs": one.macs, "memory_accesses": one.memory_accesses}
    notes = {"impl": impl} if impl else {}
    return Candidate(name, lambda: stack(x), condition, costs, 4 * batch.memory_accesses, notes)


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
    for layer in layers:
        for weight in layer.parameters():
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=random)
    return _InPlaceStack(*layers) if impl == "in_place" else nn.Sequential(*layers)
