"""A training step of each network: forward, cross-entropy, backward, SGD, as they come, BN included, in eager PyTorch.

What it takes to train with real pictures, and what limits it, is measured by ``training``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasternet.benchmark.networks import find_opponents
from fasternet.benchmark.prepare import create_network, find_input_size
from fasternet.benchmark.results import (
    MEMORY_FORMATS,
    Candidate,
    check_arguments,
    choose_settings,
    create_peak_records,
    describe_failure,
    measure_candidates,
)
from fasternet.complexity import count_costs
from fasternet.environment import create_record, set_threads
from fasternet.records import Record
from fasternet.timing import Track, measure, measure_peaks, silent

SUITE = "steps"
NETWORKS = ("FasterNet-T0", "FasterNet-T1", "ShuffleNetV2 x1.5", "MobileNetV2", "MobileViT-XXS", "EdgeNeXt-XXS")
NUM_BLOCKS, NUM_QUICK_BLOCKS, NUM_TRIAL_BLOCKS = 16, 6, 3
LEARNING_RATE = 1e-4
MACS_OF_A_STEP = 3  # of a forward pass: backward computes the gradients of inputs and of weights


def measure_steps(
    networks: Sequence[str] = NETWORKS,
    *,
    batch_size: int = 32,
    threads: int = 1,
    input_size: int | None = None,
    device: str = "cpu",
    quick: bool = False,
    seed: int = 0,
    track: Track = silent,
) -> Iterator[Record]:
    """Measure a training step of networks, interleaved, each in the memory format that suits it better.

    Args:
        networks: As in ``measure_networks``, without forms.
        batch_size: Pictures of a step.
        threads: On the CPU.
        input_size: Side of the pictures; None takes what each network is made for.
        device: "cpu" or "cuda".
        quick: Fewer blocks.
        seed: Of weights, pictures, labels and the order within rounds.
        track: Shows progress.

    Yields:
        The latencies, the A/A control, and the ratios to the first FasterNet and that of the network's group. A network
        whose loss is not finite after some steps has an ``error``.

    Raises:
        ValueError: An argument is not one of what is allowed.
    """
    check_arguments(batch_size=batch_size, device=device)
    sizes = {name: input_size or find_input_size(name) for name in networks}
    settings = choose_settings(device, quick=quick, seed=seed, track=track)
    settings["num_blocks"] = NUM_QUICK_BLOCKS if quick else NUM_BLOCKS
    shared = {"batch_size": batch_size, "threads": threads, "device": device, "engine": "eager", "precision": "fp32"}
    with set_threads(threads) as moment:
        peaks = measure_peaks(device=device, num_blocks=4)
        yield from create_peak_records(SUITE, peaks, {"threads": threads, "device": device})
        candidates: list[Candidate] = []
        for name in track(networks, len(networks), "checking"):
            condition = {"input_size": sizes[name], **shared}
            try:
                candidates.append(_prepare(name, condition, settings))
            except Exception as error:
                values = {"error": describe_failure(error)}
                yield create_record(SUITE, "latency", name, condition=condition, values=values)
        if not candidates:
            return
        names = [candidate.name for candidate in candidates]
        baseline = next((name for name in names if name.startswith("FasterNet")), names[0])
        pairs = [(name, other) for name, others in find_opponents(names, baseline).items() for other in others]
        yield from measure_candidates(
            SUITE, candidates, baseline=baseline, pairs=pairs, peaks=peaks, moment=moment, settings=settings
        )


def _prepare(name: str, condition: Mapping[str, Any], settings: Mapping[str, Any]) -> Candidate:
    """Return a network's step in its better memory format, after it has learnt a batch.

    Raises:
        ValueError: The loss after some steps is not finite.
    """
    random = torch.Generator().manual_seed(settings["seed"])
    size, batch_size = condition["input_size"], condition["batch_size"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        network = create_network(name)
    costs = count_costs(network, (1, 3, size, size))
    x = torch.randn(batch_size, 3, size, size, generator=random).to(condition["device"])
    labels = torch.randint(1000, (batch_size,), generator=random).to(condition["device"])
    steps = {key: _create_step(copy.deepcopy(network), x, labels, form) for key, form in MEMORY_FORMATS.items()}
    measured = measure(steps, **{**settings, "num_blocks": NUM_TRIAL_BLOCKS, "warmup_s": 0.0, "track": silent})
    trial_ms = {key: measured.summary(key).min_ms for key in steps}
    best = min(trial_ms, key=trial_ms.__getitem__)
    for key, step in steps.items():
        if not torch.isfinite(loss := step()):
            raise ValueError(f"the loss is {float(loss)} after some steps in {key}")
    return Candidate(
        name,
        steps[best],
        {**condition, "memory_format": best},
        {"num_params": costs.num_params, "macs": MACS_OF_A_STEP * costs.macs},
        0,
        {"memory_format_trial_ms": trial_ms},
    )


def _create_step(network: nn.Module, x: Tensor, labels: Tensor, memory_format: Any) -> Callable[[], Tensor]:
    network = network.to(x.device).to(memory_format=memory_format).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=0.9)
    x = x.to(memory_format=memory_format)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(network(x), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step
