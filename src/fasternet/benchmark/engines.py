"""The CPU engine against every other way to run a FasterNet on this processor, all interleaved in one process.

The rivals have BN folded: the published forms of PConv as PyTorch runs them, each in its better memory format
(``inplace``, which the paper's speeds belong to, is not exact and a mark to beat all the same), this package's own
eager form, torch.compile with frozen weights, without and with ``max_autotune``, ONNX Runtime and OpenVINO.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fasternet import native
from fasternet.benchmark.deploy import FORMS
from fasternet.benchmark.networks import is_same_run, tell_progress
from fasternet.benchmark.prepare import FASTERNETS, Oracle, create_oracle, deploy_network, load_engines
from fasternet.benchmark.restrict import explain_leak, is_restricted, list_variables
from fasternet.benchmark.results import (
    Candidate,
    WrongOutputError,
    check_arguments,
    choose_settings,
    create_failure_record,
    create_latency_record,
    create_peak_records,
    describe_failure,
    measure_register_peaks,
)
from fasternet.benchmark.stages import measure_stages
from fasternet.complexity import count_costs
from fasternet.deploy import explain_engine
from fasternet.deploy.verify import describe_difference
from fasternet.environment import create_record, set_threads
from fasternet.measured import create_ratio_records
from fasternet.models import create_model
from fasternet.records import Record
from fasternet.timing import Measurement, Peak, Track, measure, measure_peaks, silent

SUITE = "engines"
INPUT_SIZE = 224
LIMITS = {"fp32": 1e-5, "bf16": 2e-2}  # of the engine's relative difference from eager fp32; beyond it: no speed
MIN_BLOCKS, MAX_MACS_PER_CANDIDATE = 12, 2e12  # FasterNet-T2 at batch 32 runs in 32 rounds, L there in 12


class Way(NamedTuple):
    """A way to run a FasterNet: a form of it (empty: as this package deploys it) in an engine and a precision."""

    form: str
    engine: str
    precision: str

    def name(self, network: str) -> str:
        """Return the subject of its records."""
        return f"{network}:{self.form}" if self.form else network


WAYS = (
    Way("", "cpu", "fp32"),
    *(Way(form, "eager", "fp32") for form in (*FORMS, "")),
    *(Way(form, "compile", "fp32") for form in ("", "max_autotune")),
    *(Way("", engine, "fp32") for engine in ("onnxruntime", "openvino")),
    *(Way("", engine, "bf16") for engine in ("cpu", "eager", "compile")),
    *(Way("max_autotune", "compile", "bf16"), Way("", "openvino", "bf16")),
)

# How many times as fast as its best rival the engine is to be: 1 is "not slower". By precision, instruction set, batch.
TARGETS: Mapping[tuple[str, str, int], Mapping[str, float]] = {
    ("fp32", "avx512", 1): {"T0": 1.15, "T1": 1.1, "T2": 1.0, "S": 1.0, "M": 1.0, "L": 1.0},
    ("fp32", "avx2", 1): {"T0": 1.0, "T1": 1.0, "T2": 1.0},
    ("bf16", "amx", 1): {"T0": 1.9, "T1": 1.6, "T2": 1.4, "S": 1.3, "M": 1.0, "L": 1.0},
    ("bf16", "amx", 32): {"T0": 1.3, "T1": 1.3, "T2": 1.3},
}
MIN_NOT_SLOWER = 0.98  # of the median, where the interval reaches 1
# What holds some of the candidates back, and not the others.
HOLDING_BACK = (native.ISA_VARIABLE, "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


def measure_engines(
    networks: Sequence[str] | None = None,
    *,
    precisions: Sequence[str] | None = None,
    batch_size: int = 1,
    threads: int = 1,
    isa: str | None = None,
    quick: bool = False,
    seed: int = 0,
    track: Track = silent,
    known: Iterable[Record] = (),
    say: Callable[[str], object] = lambda _: None,
) -> Iterator[Record]:
    """Measure the CPU engine and its rivals, one interleaved run for each network.

    Args:
        networks: FasterNets by the paper's names; None takes all six, with ``quick`` T0.
        precisions: Of "fp32" and "bf16"; None takes what the engine has here.
        batch_size: 1 for latency, 32 for throughput.
        threads: Of all of them.
        isa: Hold everything to an instruction set of ``native.ISAS``; this process must have been started under
            ``restrict.list_variables``. What cannot be held is left out.
        quick: T0 alone unless networks are named, without the compiler, in fewer blocks.
        seed: Of weights, pictures and the order within rounds.
        track: Shows progress.
        known: Records of an earlier run: see ``measure_networks``.
        say: Takes a line for what is left out and after each network.

    Yields:
        The machine's peaks; then for each network its costs, the engine's differences from eager PyTorch; for each
        precision the A/A control and the ratios of the engine to every rival (in bf16 also to the published forms in
        fp32 and to itself in fp32) and, with ``best_rival`` and its target, to the fastest; stages, and the latencies.
        What fails or is left out has a latency record with ``error``.

    Raises:
        ValueError: An argument is not one of what is allowed, or the engine cannot run here.
    """
    names = tuple(dict.fromkeys(networks or list(FASTERNETS)[: 1 if quick else None]))
    _check(names, batch_size, isa)
    precisions = _choose_precisions(precisions)
    settings = choose_settings("cpu", quick=quick, seed=seed, track=track)
    shared = {"input_size": INPUT_SIZE, "batch_size": batch_size, "threads": threads, "device": "cpu"}
    shared |= {"isa": isa} if isa else {}
    ways = [way for way in WAYS if way.precision in precisions and not (quick and way.engine == "compile")]
    left_out = {way: reason for way in ways if (reason := _explain_absence(way, isa))}
    for reason in dict.fromkeys(left_out.values()):
        say(f"left out: {reason}")
    ways = [way for way in ways if way not in left_out]
    rounds = {name: _count_rounds(name, batch_size, settings["num_blocks"]) for name in names}
    known = list(known)
    left = [name for name in names if not _is_known(known, name, ways, shared, rounds[name])]
    if len(left) < len(names):
        say(f"measured already, and left out: {len(names) - len(left)} of {len(names)} networks")
    if not left:
        return
    yield from (
        create_failure_record(SUITE, way.name(name), shared, (way.engine, way.precision), f"left out: {reason}")
        for name in left
        for way, reason in left_out.items()
    )
    yield from _measure_networks({name: rounds[name] for name in left}, ways, precisions, shared, settings, say)


_OF_RUNS = ("input_size", "batch_size")


def _measure_networks(
    rounds: Mapping[str, int],
    ways: Sequence[Way],
    precisions: Sequence[str],
    shared: Mapping[str, Any],
    settings: Mapping[str, Any],
    say: Callable[[str], object],
) -> Iterator[Record]:
    """Measure the machine's peaks, then each network in its number of rounds."""
    with set_threads(shared["threads"]) as moment:
        peaks = measure_peaks(precisions=tuple(precisions), num_blocks=settings["num_blocks"] // 4)
        peaks += measure_register_peaks(precisions, shared["threads"])
        yield from create_peak_records(SUITE, peaks, {name: shared[name] for name in shared if name not in _OF_RUNS})
        load_engines(list(dict.fromkeys((way.engine, way.precision) for way in ways)), "cpu")
        begin = time.monotonic()
        for number, name in enumerate(rounds, start=1):
            records = _measure_network(name, ways, shared, peaks, moment, {**settings, "num_blocks": rounds[name]})
            # Latencies last: a network whose latencies are on record has its ratios there too.
            yield from sorted(records, key=lambda record: record.kind == "latency")
            say(tell_progress([(one,) for one in rounds], number, time.monotonic() - begin))


def _check(names: Sequence[str], batch_size: int, isa: str | None) -> None:
    if unknown := [name for name in names if name not in FASTERNETS]:
        raise ValueError(f"network {unknown[0]!r} is not one of {', '.join(FASTERNETS)}, which the engine runs")
    check_arguments(batch_size=batch_size, device="cpu")
    if isa is not None and isa not in native.ISAS:
        raise ValueError(f"isa {isa!r} is not one of {', '.join(native.ISAS)}")
    if isa is not None and not is_restricted(list_variables(isa)):
        variables = " ".join(f"{name}={value}" for name, value in list_variables(isa).items())
        raise ValueError(f"isa={isa} needs a process that was started under {variables}")
    if isa is None and (held := [name for name in HOLDING_BACK if os.environ.get(name)]):
        raise ValueError(f"{held[0]}={os.environ[held[0]]} holds some of the engines back: unset it, or give isa")


def _choose_precisions(wanted: Sequence[str] | None) -> list[str]:
    """Return what was asked for, if the engine has it here; else all that it has, of which there must be one."""
    for precision in wanted or ():
        if precision not in LIMITS:
            raise ValueError(f"precision {precision!r} is not one of {', '.join(LIMITS)}, which the engine computes in")
    reasons = {precision: explain_engine("cpu", precision) for precision in wanted or LIMITS}
    missing = [reason for reason in reasons.values() if reason is not None]
    if missing and (wanted or len(missing) == len(reasons)):
        raise ValueError(missing[-1])  # of bf16, which amx and avx512_bf16 alone compute in
    return [precision for precision, reason in reasons.items() if reason is None]


def _explain_absence(way: Way, isa: str | None) -> str | None:
    """Say why a way is left out: it cannot run here, or cannot be held to an instruction set."""
    return explain_engine(way.engine, way.precision) or (explain_leak(way.engine, isa) if isa else None)


def _count_rounds(name: str, batch_size: int, wanted: int) -> int:
    """Return fewer rounds for what takes long; the same for the same work, so that a run can be resumed."""
    with torch.device("meta"):
        macs = count_costs(create_model(FASTERNETS[name]), (1, 3, INPUT_SIZE, INPUT_SIZE)).macs
    return min(wanted, max(MIN_BLOCKS, int(MAX_MACS_PER_CANDIDATE / (macs * batch_size))))


def _is_known(
    known: Sequence[Record], name: str, ways: Sequence[Way], condition: Mapping[str, Any], num_blocks: int
) -> bool:
    done = {
        (record.subject, record.condition["engine"], record.condition["precision"])
        for record in known
        if is_same_run(record, SUITE, 0 if "error" in record.values else num_blocks)  # what failed has no samples
        and {key: record.condition.get(key) for key in (*condition, "isa")} == {"isa": None, **condition}
    }
    return all((way.name(name), way.engine, way.precision) in done for way in ways)


def _fail(name: str, way: Way, condition: Mapping[str, Any], fault: str) -> Record:
    return create_failure_record(SUITE, way.name(name), condition, (way.engine, way.precision), fault)


def _measure_network(
    name: str,
    ways: Sequence[Way],
    condition: Mapping[str, Any],
    peaks: Sequence[Peak],
    moment: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Iterator[Record]:
    oracle = create_oracle(name, condition, settings["seed"])
    costs = {key: getattr(oracle.costs, key) for key in ("num_params", "macs", "memory_accesses")}
    yield create_record(SUITE, "cost", name, condition=condition, values=costs)
    candidates: list[Candidate] = []
    for way in settings["track"](ways, len(ways), f"preparing {name}"):
        own = {**condition, "engine": way.engine, "precision": way.precision}
        try:
            candidate = deploy_network(way.name(name), oracle, own, costs, settings)
            if way.engine == "cpu":
                yield _compare(candidate, oracle)
                candidate = _note_isa(candidate)
            candidates.append(candidate)
        except Exception as error:
            yield _fail(name, way, condition, describe_failure(error))
    ours = [candidate for candidate in candidates if candidate.condition["engine"] == "cpu"]
    if not ours:
        return
    twins = {own.name: f"{own.name} again" for own in ours[1:]}  # controls; ``measure`` makes that of the first
    calls = {candidate.name: candidate.call for candidate in candidates} | {twins[c.name]: c.call for c in ours[1:]}
    measured = measure(calls, baseline=ours[0].name, **settings)
    for candidate in candidates:
        yield create_latency_record(SUITE, candidate, measured, peaks, moment)
    for engine in ours:
        control = measured.samples_ms[twins[engine.name]] if engine.name in twins else measured.control_ms
        held = dataclasses.replace(measured, baseline=engine.name, control_ms=control)
        yield from _compare_all(engine, candidates, held)
    for engine in ours:
        given = (oracle.network, oracle.x, engine.condition, peaks)
        yield from measure_stages(SUITE, name, *given, num_runs=settings["num_blocks"])


def _compare(candidate: Candidate, oracle: Oracle) -> Record:
    """Hold the engine's outputs against the network as it was.

    Raises:
        WrongOutputError: They are further from it than the precision's rounding explains.
    """
    output, expected, precision = candidate.call(), oracle.expected, candidate.condition["precision"]
    assert isinstance(output, torch.Tensor)
    values = {**describe_difference(output, expected), "limit": LIMITS[precision]}
    if not (difference := values["max_relative_difference"]) <= LIMITS[precision]:
        raise WrongOutputError(f"wrong: relative difference {difference:.1e} to eager, more than {LIMITS[precision]:g}")
    condition = {**candidate.condition, "baseline": candidate.subject, "baseline_engine": "eager"}
    return create_record(
        SUITE, "difference", f"{candidate.subject}:cpu:{precision}", condition=condition, values=values
    )


def _note_isa(candidate: Candidate) -> Candidate:
    isa, reason = native.select_isa(None, candidate.condition["precision"])
    return dataclasses.replace(candidate, notes={**candidate.notes, "isa": isa, "isa_reason": reason})


def _compare_all(own: Candidate, candidates: Sequence[Candidate], measured: Measurement) -> Iterator[Record]:
    """Compare the engine with itself, its rivals, the best of them; in bf16 with the published forms in fp32 too."""
    precision = own.condition["precision"]
    others = [candidate for candidate in candidates if candidate.condition["engine"] != "cpu"]
    rivals = [candidate for candidate in others if candidate.condition["precision"] == precision]
    marks = [c for c in candidates if c.condition["precision"] == "fp32" and _is_mark(c)] if precision != "fp32" else []
    conditions = {candidate.name: candidate.condition for candidate in candidates}
    subjects = {candidate.name: candidate.subject for candidate in candidates}
    pairs = [(own.name, other.name) for other in (own, *rivals, *marks)]
    yield from create_ratio_records(SUITE, measured, pairs, conditions, subjects)
    if rivals:
        best = min(rivals, key=lambda rival: measured.summary(rival.name).median_ms)
        further = {"best_rival": True, "baseline_exact": best.notes.get("exact", True)}
        pair = [(own.name, best.name)]
        for record in create_ratio_records(SUITE, measured, pair, conditions, subjects, **further):
            yield dataclasses.replace(record, values={**record.values, **judge_target(record, own.notes["isa"])})


def _is_mark(candidate: Candidate) -> bool:
    return candidate.condition["engine"] == "cpu" or candidate.subject.partition(":")[2] in FORMS


def judge_target(record: Record, isa: str) -> dict[str, Any]:
    """Return how many times as fast as its best rival the engine is, the target for that, and whether it is met.

    Args:
        record: The engine's ratio to its best rival.
        isa: In which the engine ran.
    """
    precision, batch_size = record.condition["precision"], record.condition["batch_size"]
    target = TARGETS.get((precision, isa, batch_size), {}).get(record.subject.removeprefix("FasterNet-"))
    values: dict[str, Any] = {"times_as_fast": 1 / record.values["ratio"], "target": target}
    if target is None:
        with_amx = precision == "bf16" and isa != "amx"
        return {**values, "target_met": None, "target_reason": "no AMX here" if with_amx else "no target"}
    is_not_slower = values["times_as_fast"] >= MIN_NOT_SLOWER and record.values["low"] <= 1  # the interval reaches 1
    is_met = is_not_slower if target == 1 else values["times_as_fast"] >= target
    return {**values, "target_met": is_met, "target_reason": "met" if is_met else "not met"}
