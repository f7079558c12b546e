"""What making a FasterNet fast costs and gains (Table 9): exactness first, then the forms against each other.

Every form has BN folded. ``optimized`` is ``optimize_for_inference``; ``split_cat`` and ``slicing`` are the published
forms, each in both memory formats. ``inplace`` is what the published speeds were measured with: it overwrites the
shortcut, so it does not compute the trained function, and is timed as the mark to beat, never as a candidate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasternet.benchmark.results import (
    MEMORY_FORMATS,
    Candidate,
    check_arguments,
    choose_settings,
    create_peak_records,
    find_fault,
    measure_candidates,
)
from fasternet.complexity import Costs, count_costs
from fasternet.deploy import compare_outputs, fold_batch_norm, optimize_for_inference
from fasternet.environment import create_record, set_threads
from fasternet.models import FasterNet, convert, create_model, list_models
from fasternet.ops import PConv2d, pconv2d_
from fasternet.records import Record
from fasternet.rivals import randomize_batch_norm
from fasternet.timing import Track, measure_peaks, silent

FORMS = ("split_cat", "slicing", "inplace")
INEXACT = "overwrites the shortcut: not the trained function"


def measure_deploy(
    networks: Sequence[str] | None = None,
    *,
    batch_size: int = 1,
    threads: int = 1,
    input_size: int = 224,
    device: str = "cpu",
    quick: bool = False,
    seed: int = 0,
    track: Track = silent,
) -> Iterator[Record]:
    """Measure the optimised form of FasterNets against the published forms.

    Args:
        networks: Names of ``list_models``; None takes T0 to S, with ``quick`` T0.
        batch_size: 1 for latency, 32 for throughput.
        threads: On the CPU.
        input_size: Side of the pictures.
        device: "cpu" or "cuda".
        quick: Fewer blocks.
        seed: Of weights, BN statistics, pictures and order.
        track: Shows progress.

    Yields:
        The machine's peaks; for each network its differences from timm's and from its own unoptimised form, then
        latencies, the A/A control, and the ratios of the optimised form to each of the others.

    Raises:
        ValueError: An argument is not one of what is allowed.
    """
    networks = networks or list_models()[: 1 if quick else 4]
    check_arguments(batch_size=batch_size, device=device)
    settings = choose_settings(device, quick=quick, seed=seed, track=track)
    shared = {"input_size": input_size, "batch_size": batch_size, "threads": threads, "device": device}
    condition = {**shared, "precision": "fp32", "engine": "eager"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = [(name, create_model(name).eval()) for name in networks]
    with set_threads(threads) as moment:
        peaks = measure_peaks(device=device, num_blocks=settings["num_blocks"] // 4)
        yield from create_peak_records("deploy", peaks, {"threads": threads, "device": device})
        for name, model in models:
            x = _fill(model, condition, seed).to(device)
            yield _compare_with_timm(name, model, x, condition)
            optimized = optimize_for_inference(model.to(device), batch_size=batch_size)
            yield _compare_with_itself(name, model, optimized, x, condition)
            candidates = _create_candidates(name, model, optimized, x, condition)
            best = candidates[0].name
            pairs = [(best, other.name) for other in candidates[1:]]
            yield from measure_candidates(
                "deploy", candidates, baseline=best, pairs=pairs, peaks=peaks, moment=moment, settings=settings
            )


def _fill(model: FasterNet, condition: Mapping[str, Any], seed: int) -> Tensor:
    """Give BN random statistics that fit the network's activations, and return a batch of noise."""
    random = torch.Generator().manual_seed(seed)
    size = condition["input_size"]
    batch_size = condition["batch_size"]
    noise = torch.randn(max(4, batch_size), 3, size, size, generator=random)
    randomize_batch_norm(model, noise[:4], seed=seed)
    return noise[:batch_size]


def _compare_with_timm(name: str, model: FasterNet, x: Tensor, condition: Mapping[str, Any]) -> Record:
    """Carry the weights to timm's network and back; neither way may change what is computed."""
    import timm

    theirs = timm.create_model(name).eval()
    theirs.load_state_dict(convert.to_format(model, "timm"), strict=True)
    back = create_model(name).eval()
    convert.load_state(back, theirs.state_dict(), source="timm's model")
    there, home = (compare_outputs(network, theirs, x.cpu()) for network in (model, back))
    worst = max(there, home, key=lambda found: found["max_relative_difference"])
    condition = {**condition, "baseline": "timm"}
    return create_record("deploy", "difference", name, condition=condition, values={**worst, "limit": 1e-6})


def _compare_with_itself(
    name: str, model: FasterNet, optimized: nn.Module, x: Tensor, condition: Mapping[str, Any]
) -> Record:
    values = {**compare_outputs(optimized, model, x), "limit": 1e-5}
    condition = {**condition, "baseline": name}
    return create_record("deploy", "difference", f"{name}:optimized", condition=condition, values=values)


def _create_candidates(
    name: str, model: FasterNet, optimized: nn.Module, x: Tensor, condition: Mapping[str, Any]
) -> list[Candidate]:
    """Return the optimised form, then each published form in both memory formats; the exact ones are checked.

    Raises:
        ValueError: A form that ought to be exact is not.
    """
    with torch.inference_mode():
        expected = model(x)
        assert isinstance(expected, Tensor)  # a classifier
    costs = count_costs(model, tuple(x.shape))
    forms: list[tuple[str, nn.Module, str]] = [("optimized", optimized, "channels_last")]
    for form, memory_format in itertools.product(FORMS, MEMORY_FORMATS):
        forms += [(form, create_form(model, form, memory_format, x), memory_format)]
    candidates = []
    for form, network, memory_format in forms:
        given = x if form == "optimized" else x.to(memory_format=MEMORY_FORMATS[memory_format])
        with torch.inference_mode():
            fault = None if form == "inplace" else find_fault(network(given), expected)
        if fault:
            raise ValueError(f"{name}:{form} is {fault}")
        candidates.append(_describe(f"{name}:{form}", network, given, memory_format, condition, costs))
    return candidates


def _describe(
    subject: str, network: nn.Module, x: Tensor, memory_format: str, condition: Mapping[str, Any], costs: Costs
) -> Candidate:
    exact = not subject.endswith("inplace")
    call: Callable[[], object] = lambda: network(x)  # noqa: E731
    batch_size = x.shape[0]
    return Candidate(
        subject if subject.endswith("optimized") else f"{subject}:{memory_format}",
        call,
        {**condition, "memory_format": memory_format},
        {"num_params": costs.num_params, "macs": costs.macs // batch_size},
        4 * costs.memory_accesses,
        {"exact": exact} if exact else {"exact": exact, "remark": INEXACT},
    )


def create_form(model: FasterNet, form: str, memory_format: str, x: Tensor) -> nn.Module:
    """Return a network with BN folded and PConv in one of ``FORMS`` or of ``list_impls``, in a memory format."""
    folded = fold_batch_norm(model, x[:1])
    for module in folded.modules():
        if isinstance(module, PConv2d) and form != "inplace":
            module.impl = form
        elif isinstance(module, PConv2d):
            module.__class__ = _InPlacePConv2d
    return folded.to(memory_format=MEMORY_FORMATS[memory_format])


class _InPlacePConv2d(PConv2d):
    """The form that the paper's speeds belong to; it overwrites the shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        return pconv2d_(x, self.weight, dilation=self.dilation, start=self.start)
