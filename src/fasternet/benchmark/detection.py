"""Detectors against each other: Table 4's latency, part by part, the backbones of a block interleaved in one process.

What a detector is, costs and consists of comes in from outside, as ``Methods``; here it is checked and timed. All have
BN folded and run in the same engine, but not all get the same: in eager PyTorch a FasterNet stands in this package's
exact form for inference (in place, matrix products, channels_last), a rival in the memory format that suits it better.
``FasterNet-S:split_cat`` is a FasterNet that gets what its rivals get, and no more.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fasternet.benchmark.deploy import create_form
from fasternet.benchmark.networks import find_setups, is_same_run, tell_progress
from fasternet.benchmark.prepare import Setup, randomize_layer_scale
from fasternet.benchmark.results import (
    MEMORY_FORMATS,
    Candidate,
    WrongOutputError,
    check_arguments,
    create_failure_record,
    describe_failure,
    find_fault,
    measure_candidates,
)
from fasternet.environment import create_record, describe_machine, describe_software, set_threads
from fasternet.ops import list_impls
from fasternet.paper import load_table
from fasternet.records import Record
from fasternet.rivals import randomize_batch_norm
from fasternet.timing import Track, measure, silent

SUITE = "detection"
SIZE = (800, 1280)  # height and width of the pictures of Table 4
STRIDE = 32  # detectors pad pictures to multiples of it
# A round of the twelve backbones, each part once and the whole, takes two minutes or so on a core of today.
NUM_BLOCKS, NUM_QUICK_BLOCKS = 5, 3
NUM_TRIAL_BLOCKS = 2
CALIBRATION = (4, 3, 128, 128)  # pictures of noise that BN takes its statistics from
# The parts of ``list_parts`` and whose multiply-adds are theirs.
PARTS: Mapping[str, tuple[str, ...]] = {
    "backbone": ("backbone",),
    "neck": ("neck",),
    "heads": ("rpn_head", "box_head", "mask_head"),
    "post-processing": (),
    "whole": ("backbone", "neck", "rpn_head", "box_head", "mask_head"),
}


class Methods(NamedTuple):
    """Detectors, for one that may not know them.

    Attributes:
        create: From the paper's name of a backbone to a detector with random weights in evaluation mode, whose
            ``backbone`` maps a picture to the levels of its pyramid by name.
        count_costs: Counts a detector for a picture of some height and width: the values of its record, with
            ``part_macs``.
        optimize: Deploys it in the engine that is measured; a new detector.
        list_parts: The parts of a detector by the names of ``PARTS``, ready to run on a picture.
    """

    create: Callable[[str], nn.Module]
    count_costs: Callable[[nn.Module, tuple[int, int]], Mapping[str, Any]]
    optimize: Callable[[nn.Module], nn.Module]
    list_parts: Callable[[nn.Module, Tensor], Mapping[str, Callable[[], object]]]


def list_groups() -> tuple[tuple[str, ...], ...]:
    """Return the three blocks of Table 4, each with its FasterNet, which the ratios are taken against, first."""
    groups: list[list[str]] = [[]]
    for row in load_table("table4_coco"):
        groups[-1].append(row["backbone"])
        if row["backbone"].startswith("FasterNet"):  # the last of its block
            groups[-1].insert(0, groups[-1].pop())
            groups.append([])
    return tuple(tuple(group) for group in groups if group)


def measure_detection(
    names: Sequence[str] | None = None,
    *,
    methods: Methods,
    engine: str = "eager",
    precision: str = "fp32",
    size: tuple[int, int] = SIZE,
    threads: int = 1,
    device: str = "cpu",
    quick: bool = False,
    seed: int = 0,
    track: Track = silent,
    known: Iterable[Record] = (),
    say: Callable[[str], object] = lambda _: None,
) -> Iterator[Record]:
    """Measure Mask R-CNN on several backbones, one interleaved run for each group.

    Args:
        names: One group of backbones, the paper's names; in eager PyTorch also ``FasterNet-S:split_cat``, the published
            form with BN folded. None runs ``list_groups()``, or with ``quick`` the first.
        methods: What detectors are; ``optimize`` has to deploy them in this engine and precision.
        engine: See ``create_runtime``; of the backbone.
        precision: Likewise.
        size: Height and width of the pictures, multiples of 32.
        threads: On the CPU.
        device: "cpu" or "cuda".
        quick: Fewer backbones, unless they are named, and fewer blocks.
        seed: Of weights, pictures and the order within rounds.
        track: Shows progress.
        known: Records of an earlier run; groups whose latencies and ratios they hold under the same conditions, with
            the same versions and at least as many rounds, are left out. What failed then is tried again.
        say: Takes a line after each group: what was done, and how long the rest may take.

    Yields:
        For each group the costs, the A/A control, of each part the ratios to the group's first FasterNet, and the
        latencies, with ``condition.part``. A detector that fails its check has a latency record with ``error``.

    Raises:
        ValueError: An argument is not one of what is allowed.
        ModuleNotFoundError: The engine is not installed.
    """
    if min(size) < 1 or any(side % STRIDE for side in size):
        raise ValueError(f"size {size[0]}x{size[1]} must be multiples of {STRIDE}, height by width, as in 800x1280")
    check_arguments(batch_size=1, device=device)
    setup = find_setups((engine,), (precision,), device)[0]
    groups = (tuple(dict.fromkeys(names)),) if names else list_groups()[: 1 if quick else None]
    _check_forms(groups, setup)
    num_blocks = NUM_QUICK_BLOCKS if quick else NUM_BLOCKS
    settings = {"num_blocks": num_blocks, "warmup_s": 0.0, "seed": seed, "device": device, "track": track}
    shared = {"height": size[0], "width": size[1], "batch_size": 1, "threads": threads, "device": device}
    wanted = shared | {"engine": engine, "precision": precision}
    done = set(_list_done(known, wanted, num_blocks))
    left = [group for group in groups if not _list_needed(group) <= done]
    if len(left) < len(groups):
        say(f"measured already, and left out: {len(groups) - len(left)} of {len(groups)} groups")
    with set_threads(threads) as moment:
        begin = time.monotonic()
        for number, group in enumerate(left, start=1):
            yield from _measure_group(group, methods, setup, shared, moment, settings)
            say(tell_progress(left, number, time.monotonic() - begin))


def _check_forms(groups: Iterable[Sequence[str]], setup: Setup) -> None:
    for name in (name for group in groups for name in group if ":" in name):
        backbone, _, form = name.partition(":")
        if not _is_fasternet(backbone) or form not in list_impls() or setup != ("eager", "fp32"):
            forms = ", ".join(f":{impl}" for impl in list_impls())
            raise ValueError(f"backbone {name!r}: a form ({forms}) is one of a FasterNet, in eager PyTorch in fp32")


def _is_fasternet(name: str) -> bool:
    return name.lower().startswith("fasternet")


def _find_baseline(names: Sequence[str]) -> str:
    """Return the backbone of a group that ratios are taken against."""
    return next((name for name in names if _is_fasternet(name) and ":" not in name), names[0])


def _list_needed(group: Sequence[str]) -> set[tuple[Any, ...]]:
    """Return subject, part and baseline (None: of a latency) of what makes a group complete."""
    baseline = _find_baseline(group)
    ratios = {(name, part, baseline) for name in group for part in PARTS if name != baseline}
    return ratios | {(name, part, None) for name in group for part in PARTS}


def _list_done(
    known: Iterable[Record], wanted: Mapping[str, Any], num_blocks: int
) -> Iterator[tuple[str, object, object]]:
    """Yield the same three of what earlier records hold, under the same conditions."""
    same_run = (SUITE, describe_machine().id, describe_software())
    for record in known:
        condition = record.condition
        if all(condition.get(name) == value for name, value in wanted.items()):
            if is_same_run(record, SUITE, num_blocks):
                yield record.subject, condition.get("part"), None
            elif (
                record.kind == "ratio"
                and (record.suite, record.machine, dict(record.versions)) == same_run
                and record.values.get("num_blocks", 0) >= num_blocks
            ):
                yield record.subject, condition.get("part"), condition.get("baseline")


def _measure_group(
    group: Sequence[str],
    methods: Methods,
    setup: Setup,
    condition: Mapping[str, Any],
    moment: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Iterator[Record]:
    candidates: list[Candidate] = []
    for name in settings["track"](group, len(group), "checking"):
        try:
            costs, prepared = _prepare(name, methods, setup, condition, settings)
        except Exception as error:
            yield create_failure_record(SUITE, name, {**condition, "part": "whole"}, setup, describe_failure(error))
            continue
        yield create_record(SUITE, "cost", name, condition=condition, values=costs)
        candidates += prepared
    if not candidates:
        return
    baseline = _find_baseline([candidate.subject for candidate in candidates])
    pairs = [
        (candidate.name, _name(baseline, candidate.condition["part"]))
        for candidate in candidates
        if candidate.subject != baseline
    ]
    try:
        run = measure_candidates(
            SUITE,
            candidates,
            baseline=_name(baseline, "whole"),
            pairs=pairs,
            peaks=(),
            moment=moment,
            settings=settings,
        )
        records = list(map(_drop_rates, run))
    except Exception as error:  # all of a group are in memory at once
        fault = describe_failure(error)
        records = [create_failure_record(SUITE, c.subject, c.condition, setup, fault) for c in candidates]
    # Latencies last: a group whose latencies are on record has its ratios there too.
    yield from sorted(records, key=lambda record: record.kind == "latency")


def _drop_rates(record: Record) -> Record:
    """Leave out the rate of multiply-adds: not all that is timed is counted, as of the mask head's deconvolution."""
    values = {name: value for name, value in record.values.items() if name not in ("macs_per_second", "peak_share")}
    return dataclasses.replace(record, values=values)


def _name(subject: str, part: str) -> str:
    return f"{subject} {part}"


@torch.no_grad()
def _prepare(
    name: str, methods: Methods, setup: Setup, condition: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[Mapping[str, Any], list[Candidate]]:
    """Build a detector, deploy it, check its pyramid against the plain one's, and return its costs and parts.

    Raises:
        Exception: Whatever building or the engine raises; ``WrongOutputError`` where it computes something else.
    """
    (engine, precision), seed = setup, settings["seed"]
    size = (condition["height"], condition["width"])
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = methods.create(name.partition(":")[0])
        pyramid = cast(nn.Module, detector.backbone)
        randomize_layer_scale(pyramid)
        randomize_batch_norm(pyramid, torch.randn(CALIBRATION, generator=random), seed=seed)
    costs = methods.count_costs(detector, size)
    image = torch.randn(1, 3, *size, generator=random).to(condition["device"])
    expected = _compute_levels(detector.to(condition["device"]), image)
    condition, notes = {**condition, "engine": engine, "precision": precision}, {}
    if engine == "eager" and (":" in name or not _is_fasternet(name)):
        deploy = functools.partial(_deploy, methods, detector, name.partition(":")[2])
        condition["memory_format"], fast, notes["memory_format_trial_ms"] = _choose_format(deploy, image, settings)
    else:
        fast = methods.optimize(detector)
        if engine == "eager":  # it lays out its activations itself
            condition["memory_format"] = "channels_last"
    image = image.to(memory_format=MEMORY_FORMATS[condition.get("memory_format", "contiguous")])
    for _ in range(2):  # also after it has run on the same input
        if fault := find_fault(_compute_levels(fast, image), expected, precision):
            raise WrongOutputError(fault)
    parts = methods.list_parts(fast, image)
    return costs, [
        Candidate(
            _name(name, part),
            parts[part],
            {**condition, "part": part},
            {"macs": sum(costs["part_macs"][each] for each in members)},
            num_bytes=0,
            notes=notes,
            subject=name,
        )
        for part, members in PARTS.items()
    ]


def _compute_levels(detector: nn.Module, image: Tensor) -> Tensor:
    """Return the levels of the pyramid as one vector.

    They are compared as one: in ResNet101 folding BN moves the coarsest level by 6e-4 of its own largest value, all by
    2e-4 of theirs, and either by 1e-12 in float64.
    """
    levels = cast(nn.Module, detector.backbone)(image)
    return torch.cat([level.flatten().float() for level in levels.values()])


def _deploy(methods: Methods, detector: nn.Module, form: str) -> nn.Module:
    """Return a detector as it is deployed, or with its FasterNet in one of the published forms with BN folded."""
    fast = methods.optimize(detector)
    if form:
        body = cast(Any, detector.backbone).body
        plain = create_form(body, form, "contiguous", torch.zeros(1, 3, 64, 64, device=next(body.parameters()).device))
        plain.feature_norms = nn.ModuleDict()  # deploying folded them into the pyramid
        cast(Any, fast.backbone).body = plain
    return fast


def _choose_format(
    deploy: Callable[[], nn.Module], image: Tensor, settings: Mapping[str, Any]
) -> tuple[str, nn.Module, dict[str, float]]:
    """Deploy a detector with its backbone in the memory format that suits it, tried on a quarter of the picture.

    Returns:
        The format, the detector, and the ms of the pyramid's fastest block in each format.
    """
    part = image[:, :, : max(image.shape[2] // 2, STRIDE), : max(image.shape[3] // 2, STRIDE)]
    twins, calls = {}, {}
    for name, memory_format in MEMORY_FORMATS.items():
        twins[name] = deploy()
        cast(Any, twins[name].backbone).body.to(memory_format=memory_format)
        calls[name] = functools.partial(cast(Any, twins[name].backbone), part.contiguous(memory_format=memory_format))
    measured = measure(calls, **{**settings, "num_blocks": NUM_TRIAL_BLOCKS, "track": silent})
    trial_ms = {name: measured.summary(name).min_ms for name in calls}
    best = min(trial_ms, key=trial_ms.__getitem__)
    return best, twins[best], trial_ms
