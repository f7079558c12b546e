"""Networks against each other: Table 3, Table 5 and Figure 2, in every engine.

``prepare`` says what is done to a network before it is timed; a group of networks runs interleaved, in all engines.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fasternet.benchmark.prepare import ABLATIONS, FASTERNETS, Setup, find_input_size, load_engines, prepare_network
from fasternet.benchmark.results import (
    Candidate,
    check_arguments,
    choose_settings,
    create_peak_records,
    describe_failure,
    measure_candidates,
    measure_register_peaks,
)
from fasternet.deploy import explain_engine
from fasternet.environment import create_record, describe_machine, describe_software, set_threads
from fasternet.measured import create_ratio_records
from fasternet.ops import list_impls
from fasternet.paper import load_table
from fasternet.records import Record
from fasternet.rivals.registry import DETECTION, TODAY
from fasternet.timing import Measurement, Peak, Track, measure_peaks, silent

SUITE = "networks"
_TABLE3 = {row["network"]: row for row in load_table("table3_imagenet")}
_GROUPS = {name: row["group"] for name, row in _TABLE3.items()}
QUICK = (
    *("FasterNet-T0", "FasterNet-T0:split_cat", "FasterNet-T0:slicing", "FasterNet-T1", "FasterNet-T2"),
    *("ShuffleNetV2 x1.5", "MobileNetV2", "MobileViT-XXS", "EdgeNeXt-XXS", "ResNet50"),
)


def list_groups() -> tuple[tuple[str, ...], ...]:
    """Return what runs by default, one group after the other: those of Table 3, backbones of Table 4, today's networks.

    The first network of a group is the one that its ratios are taken against.
    """
    groups = []
    for own in FASTERNETS:
        forms = (own, *(f"{own}:{impl}" for impl in list_impls()))
        groups.append((*forms, *(name for name in _GROUPS if _GROUPS[name] == _GROUPS[own] and name != own)))
    table4 = ("FasterNet-M", *(rival.name for rival in DETECTION))
    return (*groups, table4, ("FasterNet-T0", "FasterNet-T1", "FasterNet-T2", *(rival.name for rival in TODAY)))


def measure_networks(
    networks: Sequence[str] | None = None,
    *,
    engines: Sequence[str] = ("eager",),
    precisions: Sequence[str] = ("fp32",),
    batch_size: int = 1,
    threads: int = 1,
    input_size: int | None = None,
    device: str = "cpu",
    quick: bool = False,
    seed: int = 0,
    track: Track = silent,
    known: Iterable[Record] = (),
    say: Callable[[str], object] = lambda _: None,
) -> Iterator[Record]:
    """Measure networks, one interleaved run for each group.

    Args:
        networks: One group: the paper's names, those of ``list_rivals``, ``FasterNet-T0:split_cat`` for a form of
            a FasterNet, ``FasterNet-T0 LN`` for a variant of Table 5. None runs ``list_groups()``, or with ``quick``
            the short list ``QUICK``.
        engines: See ``create_runtime``; forms of a FasterNet run in eager PyTorch alone, and ``cpu`` runs FasterNets.
        precisions: Likewise; what an engine does not have is left out, unless no engine has it.
        batch_size: 1 for latency, 32 for throughput.
        threads: On the CPU.
        input_size: Side of the pictures; None takes what each network is made for.
        device: "cpu" or "cuda".
        quick: Fewer networks, unless they are named, and fewer blocks.
        seed: Of weights, pictures and the order within rounds.
        track: Shows progress.
        known: Records of an earlier run; groups that they cover under the same conditions, with the same versions and
            at least as many rounds, are left out. What failed then is tried again.
        say: Takes a line after each group: what was done, and how long the rest may take.

    Yields:
        The machine's peaks; then for each group the costs, the latencies, the A/A control and the ratios: under equal
        engine and precision of each network to the group's first FasterNet and to the FasterNet of its own group in
        Table 3; of each engine to eager PyTorch in fp32; and, with ``best_engines``, of each network to these
        FasterNets with both in their fastest engine. A network that fails its check has a latency record with
        ``error`` in place of a latency.

    Raises:
        ValueError: An argument is not one of what is allowed.
        ModuleNotFoundError: An engine is not installed.
    """
    groups = (tuple(dict.fromkeys(networks)),) if networks else (QUICK,) if quick else list_groups()
    sizes = {name: input_size or find_input_size(name) for name in itertools.chain(*groups)}
    check_arguments(batch_size=batch_size, device=device)
    setups = find_setups(engines, precisions, device)
    settings = choose_settings(device, quick=quick, seed=seed, track=track)
    shared = {"batch_size": batch_size, "threads": threads, "device": device}
    idle = [name for name in itertools.chain(*groups) if not list_setups(name, setups)]
    if idle and (networks or len(idle) == len(sizes)):
        form = "is a form of eager PyTorch in fp32, which is not among the engines"
        raise ValueError(f"{idle[0]} {form if ':' in idle[0] else 'is no FasterNet that the engine cpu runs'}")
    groups = tuple(filter(None, (tuple(name for name in group if name not in idle) for group in groups)))
    done = {_identify(r.subject, r.condition) for r in known if is_same_run(r, SUITE, settings["num_blocks"])}
    left = [group for group in groups if not _cover(done, group, setups, sizes, shared)]
    if len(left) < len(groups):
        say(f"measured already, and left out: {len(groups) - len(left)} of {len(groups)} groups")
    if not left:
        return
    with set_threads(threads) as moment:
        used = tuple(dict.fromkeys(precision for _, precision in setups))
        hidden: dict[str, str] = {}
        peaks = measure_peaks(precisions=used, device=device, num_blocks=settings["num_blocks"] // 4, reasons=hidden)
        peaks += measure_register_peaks(used, threads) if device == "cpu" else []
        for precision, reason in hidden.items():
            say(f"no peak in {precision}: {reason}")
        yield from create_peak_records(SUITE, peaks, {"threads": threads, "device": device})
        load_engines(setups, device)
        begin = time.monotonic()
        for number, group in enumerate(left, start=1):
            conditions = {name: {"input_size": sizes[name], **shared} for name in group}
            yield from _measure_group(conditions, setups, peaks, moment, settings)
            say(tell_progress(left, number, time.monotonic() - begin))


def find_setups(engines: Sequence[str], precisions: Sequence[str], device: str) -> list[Setup]:
    """Return the pairs of engine and precision that there are here, eager PyTorch in fp32 first.

    Raises:
        ValueError: An engine or a precision is not known, or has no partner here; the message says why.
        ModuleNotFoundError: An engine is not installed.
    """
    if not engines or not precisions:
        raise ValueError("engines and precisions must each name at least one")
    kind = device.partition(":")[0]
    reasons = {(e, p): explain_engine(e, p, kind) for e in dict.fromkeys(engines) for p in dict.fromkeys(precisions)}
    for wanted in (*engines, *precisions):
        own = [reason for setup, reason in reasons.items() if wanted in setup]
        if own and all(own):
            raise (ModuleNotFoundError if "pip install" in str(own[0]) else ValueError)(own[0])
    setups = [setup for setup, reason in reasons.items() if reason is None]
    return sorted(setups, key=lambda setup: setup != ("eager", "fp32"))


def list_setups(name: str, setups: Sequence[Setup]) -> list[Setup]:
    """Return the engines and precisions that a network runs in.

    A form of a FasterNet is one of eager PyTorch, and ``cpu`` runs what is a FasterNet whose BN can be folded.
    """
    has_cpu = name in FASTERNETS or (name in ABLATIONS and not name.endswith(" LN"))
    own = [setup for setup in setups if has_cpu or setup[0] != "cpu"]
    return [setup for setup in own if ":" not in name or setup == ("eager", "fp32")]


def is_same_run(record: Record, suite: str, num_blocks: int) -> bool:
    """Whether a latency of an earlier run stands for one that would be measured now."""
    return (
        (record.suite, record.kind, record.machine) == (suite, "latency", describe_machine().id)
        and dict(record.versions) == describe_software()
        and len(record.samples.get("latency_ms", ())) >= num_blocks
    )


def _identify(subject: str, condition: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("input_size", "batch_size", "threads", "device", "engine", "precision")
    return (subject, *(condition.get(name) for name in names))


def _cover(
    done: set[tuple[Any, ...]],
    group: Sequence[str],
    setups: Sequence[Setup],
    sizes: Mapping[str, int],
    shared: Mapping[str, Any],
) -> bool:
    return all(
        _identify(name, {**shared, "input_size": sizes[name], "engine": engine, "precision": precision}) in done
        for name in group
        for engine, precision in list_setups(name, setups)
    )


def tell_progress(groups: Sequence[Sequence[str]], number: int, seconds: float) -> str:
    """Say how far a run is; the rest is estimated from multiply-adds and, for building them, the networks' number."""
    work = [sum(1 + float(_TABLE3.get(n.partition(":")[0], {}).get("macs_g", 1)) for n in group) for group in groups]
    rest = seconds * sum(work[number:]) / sum(work[:number])
    left = f"; about {math.ceil(rest / 60)} min left" if number < len(groups) else ""
    return f"{number} of {len(groups)} groups measured ({groups[number - 1][0]}) in {seconds / 60:.0f} min{left}"


def _measure_group(
    conditions: Mapping[str, Mapping[str, Any]],
    setups: Sequence[Setup],
    peaks: Sequence[Peak],
    moment: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Iterator[Record]:
    candidates: list[Candidate] = []
    for name in settings["track"](conditions, len(conditions), "checking"):
        for prepared in prepare_network(SUITE, name, conditions[name], list_setups(name, setups), settings):
            if isinstance(prepared, Record):
                yield prepared
            else:
                candidates.append(prepared)
    if not candidates:
        return
    subjects = list(dict.fromkeys(candidate.subject for candidate in candidates))
    baseline = next((name for name in subjects if name in FASTERNETS), subjects[0])
    first = next(candidate for candidate in candidates if candidate.subject == baseline)
    opponents = find_opponents(subjects, baseline)

    def run() -> Iterator[Record]:
        measured = yield from measure_candidates(
            SUITE,
            candidates,
            baseline=first.name,
            pairs=_pair(candidates, opponents),
            peaks=peaks,
            moment=moment,
            settings=settings,
        )
        yield from _compare_best(measured, candidates, opponents)

    try:
        records = list(run())
    except Exception as error:  # all of a group are in memory at once
        fault = describe_failure(error)
        records = [
            create_record(SUITE, "latency", c.subject, condition=c.condition, values={"error": fault})
            for c in candidates
        ]
    # Latencies last: a group whose latencies are on record has its ratios there too.
    yield from sorted(records, key=lambda record: record.kind == "latency")


def find_opponents(subjects: Sequence[str], baseline: str) -> dict[str, list[str]]:
    """Return for each network the FasterNets it is compared with.

    These are the group's first and the one of its own group in Table 3; for a network that the table lacks, all.
    """
    own = {_GROUPS[name]: name for name in subjects if name in FASTERNETS}
    found = {}
    for name in subjects:
        base = name.partition(":")[0].partition(" ")[0].rstrip("*") if name.startswith("FasterNet") else name
        others = [own.get(_GROUPS[base], baseline)] if base in _GROUPS else own.values()
        found[name] = [other for other in dict.fromkeys((baseline, *others)) if other != name]
    return found


def _pair(candidates: Sequence[Candidate], opponents: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Pair candidates under equal engine and precision with their opponents, and with themselves in eager fp32.

    A rival is also paired with its opponents as plain PyTorch runs them, ``split_cat``.
    """
    names = {
        (c.subject, c.condition["engine"], c.condition["precision"]): c.name for c in candidates
    }  # fmt: skip
    pairs = []
    for (subject, engine, precision), name in names.items():
        others = [form for other in opponents[subject] for form in (other, f"{other}:split_cat")]
        wanted = ((other, engine, precision) for other in others if ":" not in other or subject not in FASTERNETS)
        pairs += [(name, names[key]) for key in wanted if key in names and names[key] != name]
        eager = names.get((subject, "eager", "fp32"), name)
        pairs += [(name, eager)] if eager != name else []
    return pairs


def _compare_best(
    measured: Measurement, candidates: Sequence[Candidate], opponents: Mapping[str, Sequence[str]]
) -> Iterator[Record]:
    """Compare networks with their opponents, each in the engine that is fastest for it in fp32."""
    if len({candidate.condition["engine"] for candidate in candidates}) == 1:
        return
    best: dict[str, str] = {}
    for candidate in candidates:
        if candidate.condition["precision"] == "fp32" and ":" not in candidate.subject:
            held = best.setdefault(candidate.subject, candidate.name)
            best[candidate.subject] = min(held, candidate.name, key=lambda name: measured.summary(name).median_ms)
    pairs = [(best[name], best[other]) for name in best for other in opponents[name] if other in best]
    yield from create_ratio_records(
        SUITE,
        measured,
        pairs,
        {candidate.name: candidate.condition for candidate in candidates},
        {candidate.name: candidate.subject for candidate in candidates},
        best_engines=True,
    )
