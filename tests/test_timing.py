import gc
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch.utils.benchmark import Timer

from fasternet import timing
from fasternet.environment import set_threads
from fasternet.timing import Measurement, Verdict, measure, measure_peaks, read_load, summarize

T = TypeVar("T")


class FakeClock:
    """Time passes only while a candidate runs; ``drift`` is the step of the walk that the machine's speed takes."""

    def __init__(self, seed: int = 0, drift: float = 0.0) -> None:
        self.now = 0.0
        self.noise = random.Random(seed)
        self.drift = drift
        self.slowness = 1.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def candidate(self, name: str, seconds: float, jitter: float = 0.0) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.slowness *= self.noise.lognormvariate(0, self.drift)
            self.now += seconds * self.slowness * self.noise.lognormvariate(0, jitter)

        return call


def _noisy(seed: int, ratio: float, num_blocks: int = 64) -> Measurement:
    """Samples whose true ratio a/b is known, under drift that all share and noise that none shares."""
    rng = np.random.default_rng(seed)
    drift = np.exp(np.cumsum(rng.normal(0, 0.01, num_blocks)))
    a, b, control = drift * np.exp(rng.normal(0, 0.03, (3, num_blocks)))
    return Measurement({"a": (ratio * a).tolist(), "b": b.tolist()}, "b", control.tolist(), {})


def test_planted_ratio_is_found() -> None:
    clock = FakeClock()
    candidates = {"slow": clock.candidate("slow", 0.0031, 0.02), "fast": clock.candidate("fast", 0.001, 0.02)}
    measured = measure(candidates, baseline="fast", clock=clock)
    ratio = measured.ratio("slow", "fast")
    assert ratio.value == pytest.approx(3.1, rel=0.02)
    assert ratio.low < 3.1 < ratio.high
    assert ratio.verdict == "slower"
    assert measured.ratio("fast", "slow").verdict == "faster"
    assert measured.summary("fast").median_ms == pytest.approx(1.0, rel=0.02)


def _measure_pair(seed: int, ratio: float) -> Verdict:
    """Measure two candidates on a machine that drifts by 8 % in a run and whose blocks scatter by 3 %."""
    clock = FakeClock(seed, drift=0.005)
    candidates = {"a": clock.candidate("a", ratio * 0.021, 0.03), "b": clock.candidate("b", 0.021, 0.03)}
    measured = measure(candidates, baseline="b", seed=seed, clock=clock)
    return measured.ratio("a", "b").verdict


def test_whole_runs_find_planted_five_percent() -> None:
    assert [_measure_pair(seed, 1.05) for seed in range(10)] == ["slower"] * 10
    assert [_measure_pair(seed, 1 / 1.05) for seed in range(10)] == ["faster"] * 10


def test_whole_runs_rarely_tell_equal_candidates_apart() -> None:
    assert [_measure_pair(seed, 1.0) for seed in range(40)].count("not distinguishable") >= 38  # one in twenty


def test_interval_covers_the_true_ratio() -> None:
    ratios = [_noisy(seed, 1.3).ratio("a", "b") for seed in range(200)]
    covered = sum(ratio.low <= 1.3 <= ratio.high for ratio in ratios) / len(ratios)
    assert 0.91 <= covered <= 0.985


def test_ratio_within_the_a_a_spread_is_no_claim() -> None:
    exact = {"a": [1.02] * 64, "b": [1.0] * 64}
    assert Measurement(exact, "b", [1.0] * 64, {}).ratio("a", "b").verdict == "slower"
    shaky = Measurement(exact, "b", [1.03] * 64, {})
    assert shaky.a_a.spread == pytest.approx(0.03)
    assert shaky.a_a.verdict == "slower"  # the control itself says that this run is not to be trusted
    assert shaky.ratio("a", "b").low > 1
    assert shaky.ratio("a", "b").verdict == "not distinguishable"


def test_rounds_hold_one_block_of_each_candidate_in_changing_order() -> None:
    clock = FakeClock()
    candidates = {name: clock.candidate(name, 0.03) for name in "abc"}
    measured = measure(candidates, baseline="b", num_blocks=40, warmup_s=0, clock=clock)
    assert set(measured.samples_ms) == {"a", "b", "c"}
    assert [len(samples) for samples in measured.samples_ms.values()] == [40, 40, 40]
    assert len(measured.control_ms) == 40
    rounds = np.reshape(clock.calls[-40 * 4 :], (40, 4))  # b twice
    assert all(sorted(row) == list("abbc") for row in rounds)
    assert len({tuple(row) for row in rounds}) > 6


@pytest.mark.parametrize(("seconds", "untimed"), [(0.011, 1), (0.5, 0)])
def test_blocks_of_several_calls_begin_with_an_untimed_one(seconds: float, untimed: int) -> None:
    clock, before = FakeClock(), []

    def track(iterable, total, description):
        before.append(len(clock.calls))
        return iterable

    measured = measure({"a": clock.candidate("a", seconds)}, num_blocks=5, warmup_s=0, clock=clock, track=track)
    assert len(clock.calls) - before[0] == 5 * 2 * (measured.num_loops["a"] + untimed)


def test_order_depends_on_the_seed_alone() -> None:
    def calls(seed: int) -> list[str]:
        clock = FakeClock()
        measure({name: clock.candidate(name, 0.03) for name in "abc"}, seed=seed, num_blocks=9, clock=clock)
        return clock.calls

    assert calls(1) == calls(1) != calls(2)


@pytest.mark.parametrize("seconds", [1e-6, 0.0013, 0.5])
def test_blocks_last_at_least_their_minimum(seconds: float) -> None:
    clock = FakeClock()
    measured = measure({"a": clock.candidate("a", seconds)}, num_blocks=3, warmup_s=0.1, clock=clock)
    assert 0.02 <= measured.num_loops["a"] * seconds <= max(0.03, seconds)
    assert measured.samples_ms["a"] == pytest.approx([seconds * 1e3] * 3)


def test_warm_up_lasts_its_time_and_is_not_sampled() -> None:
    clock = FakeClock()

    def call() -> None:
        clock.now += 0.5 if clock.now < 1 else 0.005  # the first calls compile

    measured = measure({"a": call}, num_blocks=5, warmup_s=3.0, clock=clock)
    assert max(measured.samples_ms["a"]) == pytest.approx(5.0)
    assert clock.now > 3.0


def test_percentiles_need_enough_samples() -> None:
    assert summarize(list(range(1, 64))).p90_ms is None
    assert summarize([*[1.0] * 56, *[2.0] * 8]).p90_ms == 2.0
    assert summarize(list(range(1, 662))).p99_ms is None
    assert summarize([*[1.0] * 654, *[2.0] * 8]).p99_ms == 2.0


def test_interval_covers_the_true_median() -> None:
    rng = np.random.default_rng(0)
    summaries = [summarize(np.exp(rng.normal(0, 0.1, 64)).tolist()) for _ in range(200)]
    covered = sum(summary.low_ms <= 1 <= summary.high_ms for summary in summaries) / len(summaries)
    assert 0.91 <= covered <= 0.99
    assert all(summary.low_ms <= summary.median_ms <= summary.high_ms for summary in summaries)
    assert summarize([3.0, 1.0, 2.0]) == summarize([3.0, 1.0, 2.0])


@pytest.mark.parametrize(("jitter", "unstable"), [(0.01, False), (0.2, True)])
def test_wide_spread_is_marked_unstable(jitter: float, unstable: bool) -> None:
    clock = FakeClock()
    measured = measure({"a": clock.candidate("a", 0.03, jitter)}, clock=clock)
    assert measured.summary("a").unstable is unstable
    assert (measured.summary("a").spread > timing.MAX_SPREAD) is unstable


def test_few_disturbed_blocks_leave_a_row_stable() -> None:
    assert not summarize([*[1.0] * 60, *[50.0] * 4]).unstable


def _warnings(clock: FakeClock, candidates: dict[str, Callable[[], None]], **options: Any) -> tuple[str, ...]:
    return measure(candidates, clock=clock, **{"load": lambda: None, **options}).warnings


@pytest.mark.parametrize(
    ("wall", "others", "stolen", "warnings"),
    [
        (10, 3, 0, ("other processes kept 0.3 cores busy during the run",)),
        (10, 0, 12, ("the host took 1.2 cores away during the run",)),
        (10, 0.9, 0.9, ()),
        (0.1, 0.09, 0, ()),  # a few ticks
    ],
)
def test_other_load_is_warned_of(wall: float, others: float, stolen: float, warnings: tuple[str, ...]) -> None:
    clock = FakeClock(drift=0.0005)
    looks = iter([(5.0, 7.0, 3.0), (5.0 + wall, 7.0 + others, 3.0 + stolen)])
    assert _warnings(clock, {"a": clock.candidate("a", 0.021, 0.02)}, load=lambda: next(looks)) == warnings


def test_load_is_what_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "cpu  100 200 300 9000 9000 400 500 600 7 7\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: text)
    monkeypatch.setattr("os.sysconf", {"SC_CLK_TCK": 100}.__getitem__)
    monkeypatch.setattr("time.process_time", lambda: 4.0)
    load = read_load()
    assert load is not None
    assert load[1:] == pytest.approx((11.0, 6.0))


def test_load_is_unknown_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, encoding: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert read_load() is None


@pytest.mark.parametrize(("slowness", "warned"), [(1.04, False), (1.07, True), (0.94, False)])
def test_slowing_down_is_warned_of(slowness: float, warned: bool) -> None:
    clock = FakeClock()

    def track(iterable: Iterable[T], total: int | None, description: str) -> Iterator[T]:
        for position, item in enumerate(iterable):
            clock.slowness = slowness if position >= 40 else 1.0
            yield item

    warnings = _warnings(clock, {"a": clock.candidate("a", 0.021, 0.01)}, track=track)
    assert [text.startswith("the machine slowed down: a took 1.07 times") for text in warnings] == [True] * warned


def test_noise_is_no_slowing_down() -> None:
    clocks = [FakeClock(seed) for seed in range(20)]
    assert sum(bool(_warnings(clock, {"a": clock.candidate("a", 0.021, 0.05)})) for clock in clocks) <= 1


def test_wide_spread_is_warned_of_by_name() -> None:
    clock = FakeClock()
    candidates = {"calm": clock.candidate("calm", 0.03), "wild": clock.candidate("wild", 0.03, 0.2)}
    assert _warnings(clock, candidates) == ("the quartiles lie further apart than 10% of the median: wild",)


class FakeDevice:
    """A GPU that works off a queue while the host goes on."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.free = 0.0

    def kernel(self, launch_s: float, work_s: float) -> Callable[[], None]:
        def call() -> None:
            self.clock.now += launch_s
            self.free = max(self.free, self.clock.now) + work_s

        return call

    def create_event(self, enable_timing: bool) -> "FakeEvent":
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def record(self) -> None:
        self.stamp = max(self.device.free, self.device.clock.now)

    def synchronize(self) -> None:
        self.device.clock.now = max(self.device.clock.now, self.stamp)

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1e3 * (end.stamp - self.stamp)


def test_launch_bound_work_on_cuda_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    device = FakeDevice(clock)
    monkeypatch.setattr(torch.cuda, "Event", device.create_event)
    candidates = {"small": device.kernel(0.0010, 0.0004), "large": device.kernel(0.0010, 0.0020)}
    measured = measure(candidates, device="cuda", clock=clock, load=lambda: None)
    assert measured.summary("large").median_ms == pytest.approx(2.0, rel=0.05)  # the device's time, not the host's
    assert measured.summary("small").median_ms == pytest.approx(1.0, rel=0.05)
    assert measured.warnings == ("the host takes as long to launch the work as the GPU to do it: small",)


def test_candidates_run_in_inference_mode_without_garbage_collection() -> None:
    clock = FakeClock()
    seen = set()

    def call() -> None:
        clock.now += 0.03
        seen.add((torch.is_inference_mode_enabled(), gc.isenabled()))

    measure({"a": call}, num_blocks=1, warmup_s=0, clock=clock)
    assert seen == {(True, False)}
    assert gc.isenabled()


def test_progress_follows_the_rounds() -> None:
    clock = FakeClock()
    shown: list[tuple[int | None, str]] = []

    def track(iterable, total, description):  # type: ignore[no-untyped-def]
        shown.append((total, description))
        return iterable

    measure({"a": clock.candidate("a", 0.03)}, num_blocks=7, clock=clock, track=track)
    assert shown == [(7, "timing")]


def test_unusable_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="candidates must name"):
        measure({})
    with pytest.raises(ValueError, match="baseline 'b' is not one of the candidates a"):
        measure({"a": lambda: None}, baseline="b")


def test_peaks_count_what_was_done() -> None:
    ticks = iter(range(10**6))
    peaks = measure_peaks(gemm_sizes=(8, 16), copy_mib=(1,), num_blocks=2, clock=lambda: next(ticks) * 0.03)
    # Every block takes 0.03 s on this clock, however many calls it holds: one.
    assert [(peak.subject, peak.condition) for peak in peaks] == [
        ("gemm", {"precision": "fp32", "size": 16}),
        ("copy", {"mib": 1}),
    ]
    assert peaks[0].per_second == pytest.approx(16**3 / 0.03)
    assert peaks[1].per_second == pytest.approx(2 * 2**20 / 0.03)


def test_precision_that_fails_has_no_peak_but_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise NotImplementedError("int8 is not for this device\nand so on")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    ticks, reasons = iter(range(10**6)), {}
    options = {"gemm_sizes": (32,), "copy_mib": (), "num_blocks": 1, "clock": lambda: next(ticks) * 0.03}
    with pytest.raises(ValueError, match="at least one"):
        measure_peaks(**options)
    peaks = measure_peaks(precisions=("int8", "bf16"), reasons=reasons, **{**options, "copy_mib": (1,)})
    assert [peak.condition.get("precision") for peak in peaks] == ["bf16", None]
    assert reasons == {"int8": "int8 is not for this device"}


def test_int8_has_a_peak() -> None:
    reasons: dict[str, str] = {}
    peaks = measure_peaks(precisions=("int8",), gemm_sizes=(64,), copy_mib=(1,), num_blocks=1, reasons=reasons)
    assert reasons or peaks[0].condition == {"precision": "int8", "size": 64}
    assert all(peak.per_second > 0 for peak in peaks)


def test_products_that_take_too_long_are_passed_over() -> None:
    ticks = iter(range(10**6))
    peaks = measure_peaks(gemm_sizes=(32, 64, 128), copy_mib=(1,), num_blocks=1, clock=lambda: next(ticks) * 0.05)
    assert peaks[0].condition["size"] == 64  # 128 would take 0.05 s times 64


@pytest.mark.slow
def test_ratio_agrees_with_torch_benchmark() -> None:
    small, large = torch.rand(256, 256), torch.rand(512, 512)
    calls: dict[str, Callable[[], object]] = {"small": lambda: small @ small, "large": lambda: large @ large}
    differences = []
    with set_threads(1):
        for _ in range(3):  # other programs may disturb a try
            ours = measure(calls).ratio("large", "small").value
            large_s, small_s = (
                Timer("call()", globals={"call": calls[name]}, num_threads=1).blocked_autorange(min_run_time=1).median
                for name in ("large", "small")
            )
            differences.append(abs(ours * small_s / large_s - 1))
            if differences[-1] < 0.15:
                return
    pytest.fail(f"differences of {differences}")


def _judge_real_pairs(num_runs: int, num_more: int) -> list[Verdict]:
    """Compare products of matrices done so many times more than twenty with as many done twenty times, in many runs."""
    matrix = torch.rand(256, 256)

    def repeat(times: int) -> None:
        for _ in range(times):
            matrix @ matrix

    calls = {"b": lambda: repeat(20), "a": lambda: repeat(20 + num_more)}
    with set_threads(1):
        runs = [measure(calls, baseline="b", seed=seed) for seed in range(num_runs)]
    if sum("cores" in text for run in runs for text in run.warnings) > num_runs // 4:
        pytest.skip("other processes, or the host, keep this machine too busy to measure")
    return [run.ratio("a", "b").verdict for run in runs]


@pytest.mark.slow
def test_real_slow_down_of_five_percent_is_found() -> None:
    assert _judge_real_pairs(10, 1) == ["slower"] * 10


@pytest.mark.slow
def test_real_equals_are_rarely_told_apart() -> None:
    assert _judge_real_pairs(20, 0).count("not distinguishable") >= 19


@pytest.mark.gpu
def test_blocks_on_cuda_are_timed_by_events() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    matrix = torch.rand(1024, 1024, device="cuda")
    measured = measure({"one": lambda: matrix @ matrix, "two": lambda: matrix @ matrix @ matrix}, device="cuda")
    assert measured.ratio("two", "one").value == pytest.approx(2, rel=0.2)
