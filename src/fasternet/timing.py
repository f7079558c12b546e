"""The measuring protocol, and the only place that times anything (docs/measuring.md; Section 4.1).

Candidates of one comparison run interleaved: every round times one block of each, in random order, so
that whatever disturbs the machine disturbs all of them. A claim is the ratio of two medians over the same
rounds with its bootstrap interval, held against a control: the baseline, measured once more as a
candidate that nobody sees.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch

T = TypeVar("T")
Verdict = Literal["faster", "slower", "not distinguishable"]
Clock = Callable[[], float]

MIN_SAMPLES_P90 = 64  # with fewer, at most six samples lie above the percentile: it is noise
MAX_SPREAD = 0.10
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_BOOTSTRAP_DRAWS = 2000
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
        p90_ms: 90th percentile over blocks, or None with fewer than ``MIN_SAMPLES_P90`` of them.
        spread: Distance between the quartiles as a share of the median: like the median, it shrugs off a few
            disturbed blocks, and it grows when the machine has two speeds.
        unstable: The spread is over ``MAX_SPREAD``.
    """

    min_ms: float
    median_ms: float
    p90_ms: float | None
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
    """

    samples_ms: Mapping[str, list[float]]
    baseline: str
    control_ms: list[float]
    num_loops: Mapping[str, int]

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
    low, median, high = np.percentile(samples_ms, (25, 50, 75)).tolist()
    spread = (high - low) / median
    return Summary(
        min_ms=min(samples_ms),
        median_ms=median,
        p90_ms=float(np.percentile(samples_ms, 90)) if len(samples_ms) >= MIN_SAMPLES_P90 else None,
        spread=spread,
        unstable=spread > MAX_SPREAD,
    )


def _compare(numerator: Sequence[float], denominator: Sequence[float], *, noise: float) -> Ratio:
    above, below = np.asarray(numerator), np.asarray(denominator)
    value = float(np.median(above) / np.median(below))
    rounds = np.random.default_rng(0).integers(0, above.size, (_BOOTSTRAP_DRAWS, above.size))
    draws = np.median(above[rounds], axis=1) / np.median(below[rounds], axis=1)
    low, high = np.quantile(draws, (0.025, 0.975)).tolist()
    verdict: Verdict = "not distinguishable"
    if max(value, 1 / value) - 1 > noise:
        verdict = "faster" if high < 1 else "slower" if low > 1 else verdict
    return Ratio(value=value, low=low, high=high, verdict=verdict)


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
        track: Shows progress over the rounds.

    Returns:
        Every sample of every candidate.

    Raises:
        ValueError: There is no candidate, or the baseline is none of them.
    """
    if not candidates:
        raise ValueError("candidates must name at least one thing to measure")
    baseline = next(iter(candidates)) if baseline is None else baseline
    if baseline not in candidates:
        raise ValueError(f"baseline {baseline!r} is not one of the candidates {', '.join(candidates)}")
    stopwatch = _time_by_events if torch.device(device).type == "cuda" else partial(_time_by_clock, clock)
    with torch.inference_mode(), _without_garbage_collection():
        num_loops = {name: _warm_up(call, stopwatch, min_block_s, warmup_s) for name, call in candidates.items()}
        lanes = [(call, num_loops[name], list[float]()) for name, call in candidates.items()]
        control = (candidates[baseline], num_loops[baseline], list[float]())
        order = random.Random(seed)
        for _ in track(range(num_blocks), num_blocks, "timing"):
            for call, loops, samples in order.sample([*lanes, control], len(lanes) + 1):
                if loops > 1:
                    call()
                samples.append(1e3 * stopwatch(call, loops) / loops)
    samples_ms = {name: samples for name, (_, _, samples) in zip(candidates, lanes, strict=True)}
    return Measurement(samples_ms, baseline, control[2], num_loops)


def _warm_up(
    call: Callable[[], object],
    stopwatch: Callable[[Callable[[], object], int], float],
    min_block_s: float,
    warmup_s: float,
) -> int:
    """Run for ``warmup_s`` and return how many calls fill a block, found along the way."""
    num_loops, elapsed = 1, 0.0
    while True:
        seconds = stopwatch(call, num_loops)
        elapsed += seconds
        if seconds < min_block_s:
            growth = _BLOCK_MARGIN * min_block_s / seconds if seconds > 0 else math.inf
            num_loops = math.ceil(num_loops * min(growth, 10))
        elif elapsed >= warmup_s:
            return num_loops


def _time_by_clock(clock: Clock, call: Callable[[], object], num_loops: int) -> float:
    begin = clock()
    for _ in range(num_loops):
        call()
    return clock() - begin


def _time_by_events(call: Callable[[], object], num_loops: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(num_loops):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


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


@contextlib.contextmanager
def set_threads(num_threads: int) -> Iterator[dict[str, Any]]:
    """Compute with so many threads inside the ``with`` block.

    Yields:
        What the machine was like on entry, for the record: ``affinity`` (the cores this process may use),
        ``load_average`` (of the last minute) and ``clock_mhz``; what cannot be read is None, with its
        ``<name>_reason``.

    Raises:
        ValueError: This process has fewer cores.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    available = len(cores) if cores else os.cpu_count() or 1
    if not 1 <= num_threads <= available:
        raise ValueError(f"threads must be from 1 to {available}, the cores at hand, not {num_threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        if (actual := torch.get_num_threads()) != num_threads:
            raise RuntimeError(f"torch computes with {actual} threads instead of {num_threads}")
        yield {"load_average": os.getloadavg()[0], **_describe_cores(cores)}
    finally:
        torch.set_num_threads(before)


def _describe_cores(cores: list[int] | None) -> dict[str, Any]:
    if cores is None:
        hidden = "this system does not say which cores a process uses"
        return {"affinity": None, "affinity_reason": hidden, "clock_mhz": None, "clock_mhz_reason": hidden}
    folder = Path("/sys/devices/system/cpu")
    try:
        clocks = [int((folder / f"cpu{core}/cpufreq/scaling_cur_freq").read_text()) / 1e3 for core in cores]
    except (OSError, ValueError):
        hidden = "no cpufreq interface (virtual machines hide it)"
        return {"affinity": cores, "clock_mhz": None, "clock_mhz_reason": hidden}
    return {"affinity": cores, "clock_mhz": clocks}


@dataclass(frozen=True)
class Peak:
    """The most that this machine attains.

    Attributes:
        subject: "gemm" (multiply-adds a second) or "copy" (bytes a second, read and written).
        condition: The precision and the size at which it was attained.
        per_second: The rate of the fastest block.
    """

    subject: Literal["gemm", "copy"]
    condition: Mapping[str, Any]
    per_second: float


def measure_peaks(
    *,
    precisions: Sequence[str] = ("fp32",),
    gemm_sizes: Sequence[int] = (512, 1024, 2048),
    copy_mib: Sequence[int] = (1, 8, 128),
    device: str = "cpu",
    num_blocks: int = 8,
    clock: Clock = time.perf_counter,
) -> list[Peak]:
    """Measure the best library GEMM of each precision, and the copy bandwidth at each size.

    Args:
        precisions: Names in ``PRECISIONS``.
        gemm_sizes: Sides of the square matrices that are tried; the best one counts.
        copy_mib: Sizes of the copied buffer in MiB, one peak each: they end up in different caches.
        device: "cpu" or "cuda".
        num_blocks: As in ``measure``.
        clock: As in ``measure``.
    """
    peaks = []
    settings: dict[str, Any] = {"num_blocks": num_blocks, "warmup_s": 0.1, "device": device, "clock": clock}
    for precision in precisions:
        gemms = {size: _gemm(size, PRECISIONS[precision], device) for size in gemm_sizes}
        measured = measure({str(size): call for size, call in gemms.items()}, **settings)
        rates = {size: size**3 / measured.summary(str(size)).min_ms * 1e3 for size in gemm_sizes}
        best = max(rates, key=rates.__getitem__)
        peaks.append(Peak("gemm", {"precision": precision, "size": best}, rates[best]))
    copies = {str(size): _copy(size * 2**20, device) for size in copy_mib}
    measured = measure(copies, **settings)
    for size in copy_mib:
        rate = 2 * size * 2**20 / measured.summary(str(size)).min_ms * 1e3
        peaks.append(Peak("copy", {"mib": size}, rate))
    return peaks


def _gemm(size: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    a, b = torch.rand(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _copy(num_bytes: int, device: str) -> Callable[[], object]:
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
