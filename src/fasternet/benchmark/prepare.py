"""A network by name, deployed in an engine, checked against itself as it was, ready to be timed.

BN is folded and branches are re-parameterised wherever they can be; in eager PyTorch each network runs in the memory
format that suits it better. FasterNet stands in as this package deploys it, and in eager PyTorch beside it by name in
other forms with BN folded: ``split_cat``, and ``slicing``, the published clone-then-write; where it is asked for, also
``inplace``, which is not exact, and compiled with ``max_autotune``.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fasternet.benchmark.deploy import FORMS, INEXACT, create_form
from fasternet.benchmark.memory import measure_peak_memory
from fasternet.benchmark.results import (
    BYTES,
    MEMORY_FORMATS,
    Candidate,
    WrongOutputError,
    create_failure_record,
    describe_failure,
    find_fault,
)
from fasternet.complexity import Costs, count_costs
from fasternet.deploy import create_runtime
from fasternet.environment import create_record
from fasternet.models import FasterNet, create_ablation, create_model, list_ablations, list_models
from fasternet.ops import list_impls
from fasternet.records import Record
from fasternet.rivals import create_rival, find_rival, randomize_batch_norm
from fasternet.timing import measure, silent

FASTERNETS = {"FasterNet-" + name.removeprefix("fasternet_").upper(): name for name in list_models()}
ABLATIONS = {f"FasterNet-{name}": name for name in list_ablations()}
NUM_CALIBRATION_PICTURES = 4
NUM_TRIAL_BLOCKS = 4

Setup = tuple[str, str]  # engine and precision


class Oracle(NamedTuple):
    """A network as it was made, what it says of a batch, and what it costs."""

    network: nn.Module
    x: Tensor
    expected: Tensor
    costs: Costs


def find_input_size(name: str) -> int:
    """Return the side of the pictures that a network is made for.

    Raises:
        ValueError: There is no such network.
    """
    network, _, impl = name.partition(":")
    if network in ABLATIONS and not impl:
        return 224
    if network not in FASTERNETS and not impl:
        return find_rival(name).input_size
    if network not in FASTERNETS or impl not in ("", *list_impls()):
        forms = ", ".join(f":{impl}" for impl in list_impls())
        raise ValueError(f"network {name!r} is unknown: {', '.join(FASTERNETS)} are, alone or with {forms}")
    return 224


def load_engines(setups: Sequence[Setup], device: str) -> None:
    """Run each engine once, so that no network's memory and loading time hold the engine's own."""
    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 30 * 30, 10)).eval().to(device)
    own = create_model("fasternet_t0", width=8, depths=(1, 1, 1, 1), head_width=16).eval()
    x = torch.zeros(1, 3, 32, 32, device=device)
    for engine, precision in setups:
        create_runtime(own if engine == "cpu" else tiny, x, engine=engine, precision=precision)(x)


def prepare_network(
    suite: str, name: str, condition: Mapping[str, Any], setups: Sequence[Setup], settings: Mapping[str, Any]
) -> Iterator[Candidate | Record]:
    """Build a network with random weights, deploy it in every setup, and check each against the network as it was.

    Args:
        suite: Of the records.
        name: As in ``measure_networks``.
        condition: What all setups share.
        setups: Pairs of engine and precision.
        settings: Of ``timing.measure``, for the trial of memory formats.

    Yields:
        The record of its costs; then for each setup a candidate, or the record of what failed.
    """
    fail = functools.partial(create_failure_record, suite, name, condition)
    try:
        oracle = create_oracle(name, condition, settings["seed"])
    except Exception as error:
        yield from (fail(setup, describe_failure(error)) for setup in setups)
        return
    costs = {key: getattr(oracle.costs, key) for key in ("num_params", "macs", "memory_accesses")}
    yield create_record(suite, "cost", name, condition=condition, values=costs)
    if not torch.isfinite(oracle.expected).all() or (fault := find_fault(oracle.expected, oracle.expected)):
        yield from (fail(setup, fault or "wrong: the oracle is not finite") for setup in setups)
        return
    for engine, precision in setups:
        own = {**condition, "engine": engine, "precision": precision}
        try:
            yield deploy_network(name, oracle, own, costs, settings)
        except Exception as error:
            yield fail((engine, precision), describe_failure(error))


@torch.no_grad()
def create_oracle(name: str, condition: Mapping[str, Any], seed: int) -> Oracle:
    """Build a network with random weights and BN statistics, and let it say what it computes from a batch of noise."""
    size, batch_size, device = (condition[key] for key in ("input_size", "batch_size", "device"))
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = create_network(name.partition(":")[0])
        noise = torch.randn(max(NUM_CALIBRATION_PICTURES, batch_size), 3, size, size, generator=random)
        randomize_layer_scale(network)
        randomize_batch_norm(network, noise[:NUM_CALIBRATION_PICTURES], seed=seed)
        costs = count_costs(network, (1, 3, size, size))
    x = noise[:batch_size].to(device)
    return Oracle(network.to(device), x, network(x), costs)


def randomize_layer_scale(network: nn.Module) -> None:
    """Let residual branches count, whose scales are 1e-6 in fresh networks: what a wrong one computes would be lost."""
    for name, parameter in network.named_parameters():
        if "gamma" in name.rpartition(".")[2] or "layer_scale" in name or name.endswith((".ls1.scale", ".ls2.scale")):
            parameter.uniform_(0.5, 1.5)


def create_network(network: str) -> nn.Module:
    """Build a FasterNet of Table 3 or 5, or a rival, by the paper's name, with random weights, in evaluation mode."""
    if network in FASTERNETS:
        return create_model(FASTERNETS[network]).eval()
    if network in ABLATIONS:
        return create_ablation(ABLATIONS[network]).eval()
    return create_rival(network)


def deploy_network(
    name: str, oracle: Oracle, condition: Mapping[str, Any], costs: Mapping[str, int], settings: Mapping[str, Any]
) -> Candidate:
    """Return the network in an engine, ready to be timed.

    Args:
        name: As in ``measure_networks``; ``:inplace`` and ``:max_autotune`` are forms too.
        oracle: The network, by ``create_oracle``.
        condition: With the engine and the precision.
        costs: Of one picture.
        settings: Of ``timing.measure``, for the trial of memory formats.

    Raises:
        Exception: Whatever an engine raises; ``WrongOutputError`` where it computes something else.
    """
    network, form = oracle.network, name.partition(":")[2]
    engine, precision, threads = (condition[key] for key in ("engine", "precision", "threads"))
    notes: dict[str, Any] = {"exact": False, "remark": INEXACT} if form == "inplace" else {}
    options: dict[str, Any] = {"engine": engine, "precision": precision, "threads": threads}
    if form in (*FORMS, *list_impls()):  # not as this package would deploy it
        network = nn.Sequential(create_form(cast(FasterNet, network), form, "contiguous", oracle.x))
    if engine == "eager" and (form or not name.startswith("FasterNet")):
        trial_ms = _try_memory_formats(network, oracle.x, options, settings)
        options["memory_format"] = min(trial_ms, key=trial_ms.__getitem__)
        notes["memory_format_trial_ms"] = trial_ms
        condition = {**condition, "memory_format": options["memory_format"]}
    x = oracle.x.to(memory_format=MEMORY_FORMATS[options.get("memory_format", "contiguous")])

    def create() -> Callable[[], Tensor]:
        with _tune() if form == "max_autotune" else contextlib.nullcontext():
            runtime = create_runtime(network, x, **options)
        notes.update(load_s=runtime.load_s, file_bytes=runtime.file_bytes)
        return functools.partial(runtime, x)

    call, peak_mib = measure_peak_memory(create, condition["device"])
    for _ in range(0 if form == "inplace" else 2):  # also after it has run on the same input
        if fault := find_fault(call(), oracle.expected, precision):  # type: ignore[arg-type]
            raise WrongOutputError(fault)
    notes |= {"peak_memory_mib": peak_mib if math.isfinite(peak_mib) else None, "speed_only": precision == "int8"}
    num_bytes = BYTES[precision] * oracle.costs.memory_accesses * condition["batch_size"]
    return Candidate(f"{name} {engine} {precision}", call, condition, costs, num_bytes, notes, subject=name)


def _tune() -> contextlib.AbstractContextManager[None]:
    """Let the compiler try its kernels for each matrix product, and take the fastest."""
    from torch._inductor import config

    return cast(contextlib.AbstractContextManager[None], config.patch(max_autotune=True))


def _try_memory_formats(
    network: nn.Module, x: Tensor, options: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, float]:
    """Return the ms of a network's fastest block in each memory format: few samples, and disturbed ones are slower."""
    calls = {}
    for name, memory_format in MEMORY_FORMATS.items():
        runtime = create_runtime(network, x, **options, memory_format=name)
        calls[name] = functools.partial(runtime, x.to(memory_format=memory_format))
    measured = measure(calls, **{**settings, "num_blocks": NUM_TRIAL_BLOCKS, "track": silent})
    return {name: measured.summary(name).min_ms for name in calls}
