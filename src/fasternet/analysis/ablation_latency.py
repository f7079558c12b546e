"""The latency of the ablation's variants against the base, as they are deployed: with BN folded (Table 5)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from fasternet.analysis.variants import SIZES, choose_variants, create_variant, summarize_variant
from fasternet.deploy import fold_batch_norm
from fasternet.deploy.verify import describe_difference
from fasternet.environment import create_record, set_threads
from fasternet.measured import create_ratio_records, describe_latency
from fasternet.records import Record
from fasternet.rivals import randomize_batch_norm
from fasternet.timing import Track, measure, silent

MAX_DIFFERENCE = 5e-4  # of the largest output; folding BN rounds


def measure_ablation_latency(
    *,
    size: str = "small",
    variants: Sequence[str] | None = None,
    num_classes: int = 10,
    threads: int = 1,
    quick: bool = False,
    known: Iterable[Record] = (),
    track: Track = silent,
) -> Iterator[Record]:
    """Time every variant at batch size 1 in eager PyTorch, with BN folded wherever it can be, against the base.

    All run interleaved in one process on the CPU, each in the memory format that suits it better. The output of each
    form is compared with that of the network as it was, with random BN statistics, before it is timed.

    Args:
        size: See ``measure_ablation``.
        variants: Likewise.
        num_classes: Of the classifier; that of the data, as it belongs to what is timed.
        threads: Of PyTorch.
        quick: Half the rounds.
        known: Records of an interrupted run; where they cover all variants nothing is timed.
        track: Shows progress over the rounds.

    Yields:
        A latency for each variant, then the ratios to the base: first the base's to itself, the A/A control.

    Raises:
        ValueError: An argument is wrong.
    """
    labels = choose_variants(variants, size)
    condition = {
        **{"size": size, "num_classes": num_classes, "input_size": SIZES[size].input_size, "device": "cpu"},
        **{"engine": "eager", "precision": "fp32", "batch_size": 1, "threads": threads},
    }
    timed = {
        r.subject
        for r in known
        if r.suite == "ablation" and r.kind == "ratio" and condition.items() <= r.condition.items()
    }
    if timed >= set(labels):
        return
    settings: dict[str, Any] = {"num_blocks": 32, "warmup_s": 0.1} if quick else {}
    with set_threads(threads) as moment:
        forms = {label: _deploy(label, size, num_classes) for label in labels}
        measured = measure(
            {label: call for label, (call, _) in forms.items()}, baseline="base", track=track, **settings
        )
    for label, (_, described) in forms.items():
        values = {**describe_latency(measured, label), **described, **moment}
        values |= {"images_per_second": 1e3 / values["latency_ms"]}
        values |= {"macs_per_second": values["images_per_second"] * values["macs"]}
        samples = {"latency_ms": measured.samples_ms[label]}
        yield create_record("ablation", "latency", label, condition=condition, values=values, samples=samples)
    pairs = [(label, "base") for label in labels]
    yield from create_ratio_records("ablation", measured, pairs, dict.fromkeys(labels, condition))


@torch.no_grad()
def _deploy(label: str, size: str, num_classes: int) -> tuple[Callable[[], object], dict[str, Any]]:
    """Return a call of the folded network on one picture of noise, and what is to be recorded of it."""
    side = SIZES[size].input_size
    drawn = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = create_variant(label, size=size, num_classes=num_classes).eval()
    noise = torch.randn(4, 3, side, side, generator=drawn)
    randomize_batch_norm(network, noise)
    picture = noise[:1]
    folded, expected = fold_batch_norm(network, picture), network(picture)
    calls: dict[str, Callable[[], object]] = {}
    differences = {}
    for name, memory_format in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        form = copy.deepcopy(folded).to(memory_format=memory_format)
        calls[name] = call = functools.partial(form, picture.clone().to(memory_format=memory_format))
        differences[name] = describe_difference(call(), expected)["max_relative_difference"]
        if not differences[name] <= MAX_DIFFERENCE:
            raise ValueError(f"variant {label}, {name}: folded, its outputs differ by {differences[name]:.1e}")
    trial = measure(calls, num_blocks=4, warmup_s=0.1)
    better = min(calls, key=lambda name: trial.summary(name).min_ms)
    described = summarize_variant(label, network, size=size)
    return calls[better], {**described, "memory_format": better, "relative_difference": differences[better]}
