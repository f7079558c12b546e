"""The measuring protocol, and the only place that times anything (docs/measuring.md; Section 4.1).

Candidates of one comparison run interleaved: every round times one block of each, in random order, so that whatever
disturbs the machine disturbs all of them. A claim is the ratio of two medians over the same rounds with its bootstrap
interval, held against a control: the baseline, measured once more as a candidate that nobody sees.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch

T = TypeVar("T")
Verdict = Literal["faster", "slower", "not distinguishable"]
Clock = Callable[[], float]
Stopwatch = Callable[[Callable[[], object], int], tuple[float, float]]  # seconds of a block, and of launching a call
Load = tuple[float, float, float]  # seconds: of the clock; of the cores, for other processes; of the cores, stolen

MIN_SAMPLES_P90 = 64  # with fewer, at most six samples lie above the percentile: it is noise
MIN_SAMPLES_P99 = 662  # likewise
MAX_SPREAD = 0.10
MAX_SLOWDOWN = 1.05
MAX_OTHER_LOAD = 0.1  # cores
MAX_LAUNCH_SHARE = 0.9
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_BOOTSTRAP_DRAWS, _TAILS = 2000, (0.025, 0.975)
_MIN_QUARTER = 4  # blocks; the median of fewer is noise
_MIN_OTHER_S = 0.1  # of a core: ten of the ticks in which systems count
_MAX_GEMM_S = 0.5  # a call; without hardware for its precision a large one takes minutes
_BLOCK_MARGIN = 1.25  # blocks aim this far above their minimum, so that one that runs faster still reaches it


class Track(Protocol):
    """Shows progress while it iterates, as ``cli._common.track`` does."""

    def __call__(self, iterable: Iterable[T], total: int | None, description: str) -> Iterable[T]:
        """Iterate over ``iterable``."""


def silent(iterable: Iterable[T], total: int | None, description: str) -> Iterable[T]:
    """Track nothing."""
    return iterable


@dataclass(frozen=True)
class Summary:
    """What one candidate's samples say; milliseconds per call.

    Attributes:
        min_ms: Fastest block.
        median_ms: Median over blocks.
        low_ms: Lower end of the median's bootstrap 95 % interval.
        high_ms: Upper end.
        p90_ms: 90th percentile over blocks, or None with fewer than ``MIN_SAMPLES_P90`` of them.
        p99_ms: 99th percentile over blocks, or None with fewer than ``MIN_SAMPLES_P99`` of them.
        spread: Distance between the quartiles as a share of the median: like the median, it shrugs off a few
            disturbed blocks, and it grows when the machine has two speeds.
        unstable: The spread is over ``MAX_SPREAD``.
    """

    min_ms: float
    median_ms: float
    low_ms: float
    high_ms: float
    p90_ms: float | None
    p99_ms: float | None
    spread: float
    unstable: bool


@dataclass(frozen=True)
class Ratio:
    """A ratio of two median times, with its bootstrap 95 % interval.

    Attributes:
        value: Numerator's median over denominator's.
        low: Lower end of the interval.
        high: Upper end.
        verdict: What may be said of the numerator.
    """

    value: float
    low: float
    high: float
    verdict: Verdict

    @property
    def spread(self) -> float:
        """How far the interval reaches from 1, as a factor minus one; of an A/A control, the run's error."""
        return max(self.high, 1 / self.low) - 1


@dataclass(frozen=True)
class Measurement:
    """All samples of one interleaved run.

    Attributes:
        samples_ms: Milliseconds per call, by candidate; position i of every list is round i.
        baseline: The candidate that the control repeats.
        control_ms: Samples of the control.
        num_loops: Calls in one block, by candidate.
        warnings: What speaks against the run, a sentence each: other load, a machine that slowed down, a wide spread,
            work that the host launches as slowly as the GPU computes it.
    """

    samples_ms: Mapping[str, list[float]]
    baseline: str
    control_ms: list[float]
    num_loops: Mapping[str, int]
    warnings: tuple[str, ...] = ()

    @property
    def a_a(self) -> Ratio:
        """The A/A control, the baseline against itself: a verdict here says not to trust the run."""
        return _compare(self.control_ms, self.samples_ms[self.baseline], noise=0.0)

    def summary(self, name: str) -> Summary:
        """Summarise one candidate."""
        return summarize(self.samples_ms[name])

    def ratio(self, numerator: str, denominator: str) -> Ratio:
        """Compare two candidates; "faster" means that the numerator takes less time.

        A verdict other than "not distinguishable" needs an interval without 1, and a ratio that is further
        from 1 than the A/A control's interval reaches.
        """
        return _compare(self.samples_ms[numerator], self.samples_ms[denominator], noise=self.a_a.spread)


def summarize(samples_ms: Sequence[float]) -> Summary:
    """Summarise samples, one a block."""
    samples = np.asarray(samples_ms, dtype=float)
    quarter, median, three_quarters = np.percentile(samples, (25, 50, 75)).tolist()
    low, high = np.quantile(_draw_medians(samples), _TAILS).tolist()
    spread = (three_quarters - quarter) / median
    return Summary(
        min_ms=float(samples.min()),
        median_ms=median,
        low_ms=low,
        high_ms=high,
        p90_ms=float(np.percentile(samples, 90)) if samples.size >= MIN_SAMPLES_P90 else None,
        p99_ms=float(np.percentile(samples, 99)) if samples.size >= MIN_SAMPLES_P99 else None,
        spread=spread,
        unstable=spread > MAX_SPREAD,
    )


def _compare(numerator: Sequence[float], denominator: Sequence[float], *, noise: float) -> Ratio:
    above, below = np.asarray(numerator), np.asarray(denominator)
    value = float(np.median(above) / np.median(below))
    low, high = np.quantile(_draw_medians(above) / _draw_medians(below), _TAILS).tolist()
    verdict: Verdict = "not distinguishable"
    if max(value, 1 / value) - 1 > noise:
        verdict = "faster" if high < 1 else "slower" if low > 1 else verdict
    return Ratio(value=value, low=low, high=high, verdict=verdict)


def _draw_medians(samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return medians over rounds drawn with replacement: the same rounds for as many samples."""
    rounds = np.random.default_rng(0).integers(0, samples.size, (_BOOTSTRAP_DRAWS, samples.size))
    return np.asarray(np.median(samples[rounds], axis=1))


def read_load() -> Load | None:
    """Return the seconds so far; None where the system has no ``/proc/stat``."""
    try:
        ticks = Path("/proc/stat").read_text(encoding="utf-8").split()[1:9]  # of all cores together
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, stolen = (int(tick) / os.sysconf("SC_CLK_TCK") for tick in ticks)
    return time.perf_counter(), user + nice + system + irq + softirq - time.process_time(), stolen


@dataclass
class _Lane:
    name: str
    call: Callable[[], object]
    num_loops: int
    samples_ms: list[float] = field(default_factory=list)
    launch_ms: list[float] = field(default_factory=list)


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    baseline: str | None = None,
    num_blocks: int = 64,
    min_block_s: float = 0.02,
    warmup_s: float = 0.3,
    seed: int = 0,
    device: str = "cpu",
    clock: Clock = time.perf_counter,
    load: Callable[[], Load | None] = read_load,
    track: Track = silent,
) -> Measurement:
    """Time candidates against each other.

    A block of several calls begins with an untimed one, so that no candidate pays for what the one before left in the
    caches; a call that fills a block by itself is too long to notice.

    Args:
        candidates: What to call, by name.
        baseline: The candidate that the A/A control repeats; None takes the first.
        num_blocks: Rounds; each gives every candidate one sample.
        min_block_s: A block repeats its call until it lasts so long.
        warmup_s: Each candidate runs at least so long, untimed, before the first round.
        seed: Of the order within the rounds.
        device: "cpu" reads ``clock``; on "cuda" a block is timed by events.
        clock: Seconds, for tests.
        load: What else the machine does, for tests.
        track: Shows progress over the rounds.

    Returns:
        Every sample of every candidate, and what speaks against them.

    Raises:
        ValueError: There is no candidate, or the baseline is none of them.
    """
    if not candidates:
        raise ValueError("candidates must name at least one thing to measure")
    baseline = next(iter(candidates)) if baseline is None else baseline
    if baseline not in candidates:
        raise ValueError(f"baseline {baseline!r} is not one of the candidates {', '.join(candidates)}")
    stopwatch = _stopwatch(device, clock)
    with torch.inference_mode(), _without_garbage_collection():
        num_loops = {name: _warm_up(call, stopwatch, min_block_s, warmup_s) for name, call in candidates.items()}
        lanes = [_Lane(name, candidates[name], loops) for name, loops in num_loops.items()]
        control = _Lane(baseline, candidates[baseline], num_loops[baseline])
        order = random.Random(seed)
        load_before = load()
        for _ in track(range(num_blocks), num_blocks, "timing"):
            for lane in order.sample([*lanes, control], len(lanes) + 1):
                if lane.num_loops > 1:
                    lane.call()
                seconds, launching = stopwatch(lane.call, lane.num_loops)
                lane.samples_ms.append(1e3 * seconds / lane.num_loops)
                lane.launch_ms.append(1e3 * launching)
        warnings = (*_judge_load(load_before, load()), *_judge_lanes(lanes, control))
    samples_ms = {lane.name: lane.samples_ms for lane in lanes}
    return Measurement(samples_ms, baseline, control.samples_ms, num_loops, warnings)


def _judge_load(before: Load | None, after: Load | None) -> Iterator[str]:
    if before is None or after is None:
        return
    wall, others, stolen = (late - early for early, late in zip(before, after, strict=True))
    limit = max(MAX_OTHER_LOAD * wall, _MIN_OTHER_S)
    if others > limit:
        yield f"other processes kept {others / wall:.1f} cores busy during the run"
    if stolen > limit:
        yield f"the host took {stolen / wall:.1f} cores away during the run"


def _judge_lanes(lanes: Sequence[_Lane], control: _Lane) -> Iterator[str]:
    if (quarter := len(control.samples_ms) // 4) >= _MIN_QUARTER:
        twins = [lane.samples_ms for lane in (*lanes, control) if lane.name == control.name]
        slowdown = min(np.median(twin[-quarter:]) / np.median(twin[:quarter]) for twin in twins)  # that both show
        if slowdown > MAX_SLOWDOWN:
            yield f"the machine slowed down: {control.name} took {slowdown:.2f} times as long at the end as at first"
    if wide := [lane.name for lane in lanes if summarize(lane.samples_ms).unstable]:
        yield f"the quartiles lie further apart than {MAX_SPREAD:.0%} of the median: {', '.join(wide)}"
    slow = [lane.name for lane in lanes if np.median(lane.launch_ms) >= MAX_LAUNCH_SHARE * np.median(lane.samples_ms)]
    if slow:
        yield f"the host takes as long to launch the work as the GPU to do it: {', '.join(slow)}"


def _stopwatch(device: str, clock: Clock) -> Stopwatch:
    return partial(_time_by_events if torch.device(device).type == "cuda" else _time_by_clock, clock)


def _warm_up(call: Callable[[], object], stopwatch: Stopwatch, min_block_s: float, warmup_s: float) -> int:
    """Run for ``warmup_s`` and return how many calls fill a block, found along the way."""
    num_loops, elapsed = 1, 0.0
    while True:
        seconds, _ = stopwatch(call, num_loops)
        elapsed += seconds
        if seconds < min_block_s:
            num_loops = math.ceil(num_loops * min(_BLOCK_MARGIN * min_block_s / max(seconds, 1e-12), 10))
        elif elapsed >= warmup_s:
            return num_loops


def _time_by_clock(clock: Clock, call: Callable[[], object], num_loops: int) -> tuple[float, float]:
    begin = clock()
    for _ in range(num_loops):
        call()
    return clock() - begin, 0.0


def _time_by_events(clock: Clock, call: Callable[[], object], num_loops: int) -> tuple[float, float]:
    # The first call stands for the others: further on, the queue may be full, and launching waits for the GPU.
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    launch = clock()
    call()
    launching = clock() - launch
    for _ in range(num_loops - 1):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3, launching


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class Peak:
    """The most that this machine attains.

    Attributes:
        subject: "gemm" and "registers" (multiply-adds a second), "copy" (bytes a second, read and written).
        condition: The precision and the size at which it was attained.
        per_second: The rate of the fastest block.
    """

    subject: Literal["gemm", "registers", "copy"]
    condition: Mapping[str, Any]
    per_second: float


def measure_peaks(
    *,
    precisions: Sequence[str] = ("fp32",),
    gemm_sizes: Sequence[int] | None = None,
    copy_mib: Sequence[int] = (1, 8, 128),
    device: str = "cpu",
    num_blocks: int = 8,
    reasons: dict[str, str] | None = None,
    clock: Clock = time.perf_counter,
) -> list[Peak]:
    """Measure the best library GEMM of each precision, and the copy bandwidth at each size.

    Args:
        precisions: Names in ``PRECISIONS``, or "int8"; one that fails on this device is left out.
        gemm_sizes: Sides of the square matrices to try, unless they take too long; None takes what suits the device.
        copy_mib: Sizes of the copied buffer in MiB, one peak each: they end up in different caches.
        device: "cpu" or "cuda".
        num_blocks: As in ``measure``.
        reasons: Filled with why a precision has been left out, by its name.
        clock: As in ``measure``.
    """
    peaks = []
    settings: dict[str, Any] = {"num_blocks": num_blocks, "warmup_s": 0.1, "device": device, "clock": clock}
    sizes = sorted(gemm_sizes or ((2048, 4096, 8192) if torch.device(device).type == "cuda" else (512, 1024, 2048)))
    for precision in precisions:
        try:
            gemms = {size: _gemm(size, precision, device) for size in sizes}
            seconds = min(_stopwatch(device, clock)(gemms[sizes[0]], 1)[0] for _ in range(2))
            longest = max(sizes[0], sizes[0] * (_MAX_GEMM_S / seconds) ** (1 / 3))
            measured = measure({str(size): call for size, call in gemms.items() if size <= longest}, **settings)
        except RuntimeError as error:  # this device, or this library, does not multiply in it
            if reasons is not None:
                reasons[precision] = str(error).partition("\n")[0]
            continue
        fastest_ms = {int(name): measured.summary(name).min_ms for name in measured.samples_ms}
        rate, size = max((size**3 / milliseconds * 1e3, size) for size, milliseconds in fastest_ms.items())
        peaks.append(Peak("gemm", {"precision": precision, "size": size}, rate))
    measured = measure({str(mib): _copy(mib * 2**20, device) for mib in copy_mib}, **settings)
    fastest_ms = {mib: measured.summary(str(mib)).min_ms for mib in copy_mib}
    return [*peaks, *(Peak("copy", {"mib": mib}, 2 * mib * 2**20 / fastest_ms[mib] * 1e3) for mib in copy_mib)]


def _gemm(size: int, precision: str, device: str) -> Callable[[], object]:
    if precision == "int8":
        a, b = torch.randint(-128, 128, (2, size, size), dtype=torch.int8, device=device)
        sums = torch.empty(size, size, dtype=torch.int32, device=device)
        return lambda: torch._int_mm(a, b, out=sums)  # PyTorch has no public one
    a, b = torch.rand(2, size, size, device=device).to(PRECISIONS[precision])
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _copy(num_bytes: int, device: str) -> Callable[[], object]:
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
