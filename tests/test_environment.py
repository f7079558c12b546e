import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fasternet import environment
from fasternet.environment import describe_machine, set_threads

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or not Path("/proc/self/task").exists(),
    reason="this system does not let a process choose its cores",
)


def _affinities() -> set[frozenset[int]]:
    return {frozenset(os.sched_getaffinity(int(entry.name))) for entry in Path("/proc/self/task").iterdir()}


@contextlib.contextmanager
def _waiting_thread() -> Iterator[None]:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_threads_are_set_and_restored() -> None:
    before = torch.get_num_threads()
    with contextlib.suppress(KeyError), set_threads(1) as moment:
        assert torch.get_num_threads() == moment["torch_threads"] == 1
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


@needs_affinity
def test_all_threads_are_pinned_and_released() -> None:
    before = frozenset(os.sched_getaffinity(0))
    with contextlib.ExitStack() as late:
        with _waiting_thread(), contextlib.suppress(KeyError), set_threads(1) as moment:
            late.enter_context(_waiting_thread())  # inherits the pin, and outlives it
            assert _affinities() == {frozenset(moment["affinity"])}
            assert len(moment["affinity"]) == 1
            raise KeyError
        assert _affinities() == {before}


@needs_affinity
def test_thread_with_its_own_core_gets_it_back() -> None:
    cores = sorted(os.sched_getaffinity(0))
    with _waiting_thread():
        other = max(int(entry.name) for entry in Path("/proc/self/task").iterdir())
        os.sched_setaffinity(other, cores[-1:])
        with set_threads(1):
            pass
        assert os.sched_getaffinity(other) == set(cores[-1:])
    assert sorted(os.sched_getaffinity(0)) == cores


@needs_affinity
def test_unpinned_threads_keep_every_core() -> None:
    before = sorted(os.sched_getaffinity(0))
    with set_threads(1, pinned=False) as moment:
        assert torch.get_num_threads() == 1
        assert sorted(os.sched_getaffinity(0)) == before == moment["affinity"]


@needs_affinity
def test_machine_keeps_its_cores_while_pinned() -> None:
    cores = len(os.sched_getaffinity(0))
    describe_machine.cache_clear()
    with set_threads(1):
        assert describe_machine().cores == cores


def test_system_without_affinity_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    with set_threads(1) as moment:
        assert torch.get_num_threads() == 1
    assert moment["affinity"] is None
    assert "does not let a process choose" in moment["affinity_reason"]


@pytest.mark.parametrize(
    ("num_cores", "chosen"),
    [
        (1, [1]),  # the idle one
        (2, [1, 2]),  # 5 is as idle as 1, whose physical core it shares
        (3, [0, 1, 2]),
        (4, [0, 1, 2, 5]),  # no physical core is left; 5 is the least busy
        (6, [0, 1, 2, 4, 5, 6]),
    ],
)
def test_cores_are_the_least_busy_one_of_each_physical_core_first(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, chosen: list[int]
) -> None:
    looks = iter([dict.fromkeys(range(8), 100), {0: 105, 1: 100, 2: 101, 3: 100, 4: 105, 5: 100, 6: 101, 7: 100}])
    monkeypatch.setattr(environment, "_busy_ticks", lambda: next(looks))
    monkeypatch.setattr(environment, "_siblings", lambda core: {core % 4, core % 4 + 4})
    assert environment._choose_cores([0, 1, 2, 4, 5, 6], num_cores) == chosen


@pytest.mark.parametrize(("text", "siblings"), [("1,5\n", {1, 5}), ("0-1\n", {0, 1}), ("1\n", {1}), ("?", {1})])
def test_siblings_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, siblings: set[int]) -> None:
    folder = tmp_path / "cpu1" / "topology"
    folder.mkdir(parents=True)
    (folder / "thread_siblings_list").write_text(text)
    monkeypatch.setattr(environment, "_CORES", tmp_path)
    assert environment._siblings(1) == siblings
    assert environment._siblings(3) == {3}


def test_busy_ticks_leave_idle_ones_out(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 1 2 4 1000 2000 8 16 32 0 0\ncpu11 1 0 0 5 5 0 0 0 0 0\nintr 5 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: text)
    assert environment._busy_ticks() == {0: 63, 11: 1}
