"""Networks against each other: Table 3 and Figure 2, every network treated alike.

All run in the same engine and precision, BN folded and branches re-parameterised wherever they can be, each in the
memory format that suits it better. FasterNet stands in as this package deploys it, and beside it by name in two other
forms with BN folded: ``split_cat``, and ``slicing``, the published clone-then-write.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
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
from fasternet.deploy import InferenceFasterNet, fold_batch_norm, optimize_for_inference
from fasternet.environment import create_record
from fasternet.models.registry import create_model
from fasternet.ops import PConv2d, list_impls
from fasternet.paper import load_table
from fasternet.records import Record
from fasternet.rivals import create_rival, find_rival, list_rivals, randomize_batch_norm
from fasternet.rivals.registry import TODAY
from fasternet.timing import Track, measure, measure_peaks, set_threads, silent

_GROUPS_OF_TABLE3 = {row["network"]: row["group"] for row in load_table("table3_imagenet")}
FASTERNETS = tuple(name for name in _GROUPS_OF_TABLE3 if name.startswith("FasterNet-"))
QUICK = (
    *("FasterNet-T0", "FasterNet-T0:split_cat", "FasterNet-T0:slicing", "FasterNet-T1", "FasterNet-T2"),
    *("ShuffleNetV2 x1.5", "MobileNetV2", "MobileViT-XXS", "EdgeNeXt-XXS", "ResNet50"),
)
NUM_CALIBRATION_PICTURES = 4
NUM_TRIAL_BLOCKS = 4


def list_groups() -> tuple[tuple[str, ...], ...]:
    """Return what runs by default, one group after the other: those of Table 3, then today's fast networks.

    The first network of a group is the one that its ratios are taken against.
    """
    known = {rival.name for rival in list_rivals()}
    groups = []
    for own in FASTERNETS:
        forms = (own, *(f"{own}:{impl}" for impl in list_impls()))
        rivals = (name for name, group in _GROUPS_OF_TABLE3.items() if group == _GROUPS_OF_TABLE3[own])
        groups.append((*forms, *(name for name in rivals if name in known)))
    return (*groups, (FASTERNETS[0], *(rival.name for rival in TODAY)))


def measure_networks(
    networks: Sequence[str] | None = None,
    *,
    batch_size: int = 1,
    threads: int = 1,
    input_size: int | None = None,
    device: str = "cpu",
    quick: bool = False,
    seed: int = 0,
    track: Track = silent,
) -> Iterator[Record]:
    """Measure networks, one interleaved run for each group.

    Args:
        networks: One group: the paper's names, those of ``list_rivals``, and ``FasterNet-T0:split_cat`` for a form of
            a FasterNet. None runs ``list_groups()``, or with ``quick`` the short list ``QUICK``.
        batch_size: 1 for latency, 32 for throughput.
        threads: On the CPU.
        input_size: Side of the pictures; None takes what each network is made for.
        device: "cpu" or "cuda".
        quick: Fewer networks, unless they are named, and fewer blocks.
        seed: Of weights, pictures and the order within rounds.
        track: Shows progress.

    Yields:
        The machine's peaks; then for each group the costs, the latencies, the A/A control and the ratios: of each
        network to the group's first FasterNet, and to the FasterNet of its own group in Table 3. A network that fails
        its check has a latency record with ``error`` in place of a latency.

    Raises:
        ValueError: An argument is not one of what is allowed.
    """
    groups = (tuple(dict.fromkeys(networks)),) if networks else (QUICK,) if quick else list_groups()
    for name in (name for group in groups for name in group):
        _find_input_size(name)
    check_arguments(batch_size=batch_size, device=device)
    settings = choose_settings(device, quick=quick, seed=seed, track=track)
    shared = {"threads": threads, "device": device, "precision": "fp32"}
    with set_threads(threads) as moment:
        peaks = measure_peaks(device=device, num_blocks=settings["num_blocks"] // 4)
        yield from create_peak_records("networks", peaks, shared)
        for group in groups:
            candidates = []
            for name in track(group, len(group), "checking"):
                condition = {
                    "input_size": input_size or _find_input_size(name),
                    "batch_size": batch_size,
                    "engine": "eager",
                    **shared,
                }
                prepared = _prepare(name, condition, settings)
                if isinstance(prepared, Record):
                    yield prepared
                    continue
                yield create_record("networks", "cost", name, condition=condition, values=prepared.costs)
                candidates.append(prepared)
            if not candidates:
                continue
            names = [candidate.name for candidate in candidates]
            baseline = next((name for name in names if name in FASTERNETS), names[0])
            yield from measure_candidates(
                "networks",
                candidates,
                baseline=baseline,
                pairs=_pair(names, baseline),
                peaks=peaks,
                moment=moment,
                settings=settings,
            )


def _find_input_size(name: str) -> int:
    """Return the side of the pictures that a network is made for.

    Raises:
        ValueError: There is no such network.
    """
    network, _, impl = name.partition(":")
    if network not in FASTERNETS and not impl:
        return find_rival(name).input_size
    if network not in FASTERNETS or impl not in ("", *list_impls()):
        forms = ", ".join(f":{impl}" for impl in list_impls())
        raise ValueError(f"network {name!r} is unknown: {', '.join(FASTERNETS)} are, alone or with {forms}")
    return 224


def _pair(names: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    """Pair each network with the baseline, and with the FasterNet of its group in Table 3."""
    own = {_GROUPS_OF_TABLE3[name]: name for name in names if name in FASTERNETS}
    pairs: dict[tuple[str, str], None] = {}
    for name in names:
        group = _GROUPS_OF_TABLE3.get(name.partition(":")[0], "")
        pairs.update({(name, other): None for other in (baseline, own.get(group, baseline)) if other != name})
    return list(pairs)


def _prepare(name: str, condition: Mapping[str, Any], settings: Mapping[str, Any]) -> Candidate | Record:
    """Build a network with random weights, deploy it, and check it against itself before."""
    network, _, impl = name.partition(":")
    size, batch_size, device = (condition[key] for key in ("input_size", "batch_size", "device"))
    random = torch.Generator().manual_seed(settings["seed"])
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(settings["seed"])
            model = _create(network)
            noise = torch.randn(max(NUM_CALIBRATION_PICTURES, batch_size), 3, size, size, generator=random)
            randomize_batch_norm(model, noise[:NUM_CALIBRATION_PICTURES], seed=settings["seed"])
            one = count_costs(model, (1, 3, size, size))
            batch = one if batch_size == 1 else count_costs(model, (batch_size, 3, size, size))
            x = noise[:batch_size].to(device)
            expected = model.to(device)(x)
            deployed = _deploy(model, network, impl, x)
            if not (fault := find_fault(deployed(x), expected)):
                fast, x, memory_format, notes = _choose_memory_format(deployed, x, settings)
                fault = find_fault(fast(x), expected)  # also after many runs on the same input
    except Exception as error:
        fault = describe_failure(error)
    if fault:
        return create_record("networks", "latency", name, condition=condition, values={"error": fault})
    costs = {"num_params": one.num_params, "macs": one.macs, "memory_accesses": one.memory_accesses}
    condition = {**condition, "memory_format": memory_format}
    return Candidate(name, lambda: fast(x), condition, costs, 4 * batch.memory_accesses, notes)


def _create(network: str) -> nn.Module:
    if network in FASTERNETS:
        return create_model(network.lower().replace("-", "_")).eval()
    return create_rival(network)


def _deploy(model: nn.Module, network: str, impl: str, x: Tensor) -> nn.Module:
    """Make a network ready for inference on such an input; the one given stays as it is."""
    if network not in FASTERNETS:
        from timm.utils import reparameterize_model

        return fold_batch_norm(reparameterize_model(model), x)
    if not impl:
        return optimize_for_inference(model, batch_size=x.shape[0])
    folded = fold_batch_norm(model, x)
    for module in folded.modules():
        if isinstance(module, PConv2d):
            module.impl = impl
    return folded


def _choose_memory_format(
    model: nn.Module, x: Tensor, settings: Mapping[str, Any]
) -> tuple[nn.Module, Tensor, str, dict[str, Any]]:
    """Find the memory format that suits a network.

    Returns:
        The network and its input in the format that a short trial finds faster, its name, and the trial's times. An
        optimised FasterNet has chosen for itself; it takes the input as it comes.
    """
    if isinstance(model, InferenceFasterNet):
        return model, x, model.reasons["memory_format"].partition(":")[0], {}
    entries = {}
    for name, memory_format in MEMORY_FORMATS.items():
        converted = copy.deepcopy(model).to(memory_format=memory_format)
        entries[name] = converted, x.to(memory_format=memory_format)
    calls = {name: functools.partial(fast, batch) for name, (fast, batch) in entries.items()}
    trial = {**settings, "num_blocks": NUM_TRIAL_BLOCKS, "track": silent}
    measured = measure(calls, **trial)
    # The fastest block: few samples decide here, and whatever disturbs them makes them slower.
    trial_ms = {name: measured.summary(name).min_ms for name in entries}
    best = min(trial_ms, key=trial_ms.__getitem__)
    return *entries[best], best, {"memory_format_trial_ms": trial_ms}
