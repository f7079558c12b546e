import contextlib
import gc
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fasternet import timing
from fasternet.timing import Measurement, measure, measure_peaks, set_threads, summarize


class FakeClock:
    """Time passes only while a candidate runs."""

    def __init__(self, seed: int = 0) -> None:
        self.now = 0.0
        self.noise = random.Random(seed)
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def candidate(self, name: str, seconds: float, jitter: float = 0.0) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.now += seconds * self.noise.lognormvariate(0, jitter)

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


def test_planted_five_percent_are_found_every_time() -> None:
    assert [_noisy(seed, 1.05).ratio("a", "b").verdict for seed in range(20)] == ["slower"] * 20


def test_equal_candidates_are_rarely_told_apart() -> None:
    verdicts = [_noisy(seed, 1.0).ratio("a", "b").verdict for seed in range(100)]
    assert verdicts.count("not distinguishable") >= 95  # one false verdict in twenty


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


@pytest.mark.parametrize("seconds", [1e-7, 0.0013, 0.5])
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


def test_p90_needs_enough_samples() -> None:
    assert summarize(list(range(1, 64))).p90_ms is None
    assert summarize([*[1.0] * 56, *[2.0] * 8]).p90_ms == 2.0


@pytest.mark.parametrize(("jitter", "unstable"), [(0.01, False), (0.2, True)])
def test_wide_spread_is_marked_unstable(jitter: float, unstable: bool) -> None:
    clock = FakeClock()
    measured = measure({"a": clock.candidate("a", 0.03, jitter)}, clock=clock)
    assert measured.summary("a").unstable is unstable
    assert (measured.summary("a").spread > timing.MAX_SPREAD) is unstable


def test_few_disturbed_blocks_leave_a_row_stable() -> None:
    assert not summarize([*[1.0] * 60, *[50.0] * 4]).unstable


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


def test_threads_are_set_and_restored() -> None:
    before = torch.get_num_threads()
    with contextlib.suppress(KeyError), set_threads(1) as moment:
        assert torch.get_num_threads() == 1
        assert moment["load_average"] >= 0
        assert moment["affinity"] or moment["affinity_reason"]
        assert moment["clock_mhz"] or moment["clock_mhz_reason"]
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("num_threads", [0, 10_000])
def test_impossible_threads_are_refused(num_threads: int) -> None:
    with (
        pytest.raises(ValueError, match=f"threads must be from 1 to .* not {num_threads}"),
        set_threads(num_threads),
    ):
        pass


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


@pytest.mark.gpu
def test_blocks_on_cuda_are_timed_by_events() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    matrix = torch.rand(1024, 1024, device="cuda")
    measured = measure({"one": lambda: matrix @ matrix, "two": lambda: matrix @ matrix @ matrix}, device="cuda")
    assert measured.ratio("two", "one").value == pytest.approx(2, rel=0.2)
