import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fasternet.benchmark import faults
from fasternet.benchmark.faults import (
    FAULTS,
    KILL_ALL,
    KILL_ALONE,
    KILL_ONE,
    Fault,
    find_difference,
    flip_bit,
    kill_child,
    list_tree,
    measure_faults,
    stop_tree,
    tear_log,
    truncate_state,
)
from fasternet.environment import create_record
from fasternet.records import append_records, load_records
from fasternet.train.state import load_state, save_state

SLEEPER = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
SLEEPER += "print('started', flush=True); time.sleep(60)"


def make_run(folder: Path, *, weight: float = 1.0, loss: float = 0.5, moment: float = 0.0) -> Path:
    for name in ("best", "last"):
        (folder / name).mkdir(parents=True)
        save_file({"weight": torch.full((4096,), weight)}, folder / name / "model.safetensors")
    for step in (1, 2):
        state = {"model": {"weight": torch.full((4096,), weight)}, "optimizer": [torch.tensor(moment)], "step": step}
        save_state(folder / "last" / "state.pt", state)
    values = {"train_loss": loss}
    append_records(
        folder / "log.jsonl", [create_record("train", "epoch", "tiny", condition={"epoch": 1}, values=values)]
    )
    return folder


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, None),
        ({"weight": 1.0 + 1e-7}, "best/model.safetensors differs"),
        ({"moment": 1e-30}, "last/state.pt differs"),
        ({"loss": 0.6}, "log.jsonl differs"),
    ],
)
def test_runs_are_compared_bitwise(tmp_path: Path, change: dict[str, float], found: str | None) -> None:
    assert find_difference(make_run(tmp_path / "one", **change), make_run(tmp_path / "other")) == found


@pytest.mark.parametrize("damage", [truncate_state, flip_bit])
def test_damaged_state_is_the_last_one_alone(tmp_path: Path, damage: faults.Damage) -> None:
    run = make_run(tmp_path / "run")
    whole = (run / "last" / "state.pt").read_bytes()
    assert damage(run, random.Random(1))
    assert (run / "last" / "state.pt").read_bytes() != whole
    assert load_state(run / "last" / "state-before.pt")["step"] == 1
    (run / "last" / "state-before.pt").unlink()
    assert not damage(run, random.Random(1))


def test_torn_log_is_still_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert tear_log(run, random.Random(0))
    assert not (run / "log.jsonl").read_bytes().endswith(b"\n")
    assert len(load_records(run / "log.jsonl")) == 1


def test_kills_reach_the_processes_that_a_command_started() -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        _, child = list_tree(process.pid)
        assert kill_child(process, random.Random(0))
        while Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
        assert process.poll() is None
    finally:
        stop_tree(process)
        process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    assert not kill_child(process, random.Random(0))


@pytest.mark.parametrize(("num_kills", "shares"), [(20, (12, 4, 4)), (3, (1, 1, 1)), (7, (5, 1, 1))])
def test_kills_are_shared_out(num_kills: int, shares: tuple[int, int, int]) -> None:
    counts = faults._share_out(num_kills, 2)
    assert tuple(counts[name] for name in (KILL_ALONE, KILL_ONE, KILL_ALL)) == shares
    assert [counts[fault.name] for fault in FAULTS[3:]] == [2] * 8


def test_wrong_arguments_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="num_kills=2 must be at least 3"):
        list(measure_faults(num_kills=2))
    with pytest.raises(ValueError, match=r"unknown faults \['fire'\]: there are SIGKILL, "):
        list(measure_faults(faults=["fire"]))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_faults_that_never_hit_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "MAX_TRIES", 1)
    monkeypatch.setattr(faults, "FAULTS", (Fault(KILL_ALONE, lambda process, lot: True),))
    (record,) = measure_faults(num_kills=3, quick=True)
    assert record.values == {"injected": 0, "recovered": 0, "bitwise_equal": 0, "remark": ""}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_run_that_fails_before_its_fault_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "FAULTS", (Fault("none", lambda process, lot: True, num_workers=-1),))
    with pytest.raises(OSError, match="a run failed before its fault: recipe field num_workers=-1"):
        list(measure_faults(num_kills=3, quick=True))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_run_that_ends_otherwise_is_not_bitwise_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best weights are changed before the run goes on: another epoch could only replace them by luck."""

    def forge(output: Path, lot: random.Random) -> bool:
        state = output / "last" / "state.pt"
        if not state.is_file():
            return False
        content = load_state(state)
        content["model"] = {key: tensor * 2 for key, tensor in content["model"].items()}
        save_state(state, content)
        return True

    monkeypatch.setattr(faults, "FAULTS", (Fault(KILL_ALONE, faults.kill_all, forge),))
    (record,) = measure_faults(num_kills=3, quick=True)
    assert (record.values["injected"], record.values["recovered"], record.values["bitwise_equal"]) == (1, 1, 0)
    assert record.values["remark"].endswith("differs")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", [fault.name for fault in FAULTS])
def test_every_fault_is_recovered_from_bitwise(name: str) -> None:
    (record,) = measure_faults(num_kills=3, quick=True, faults=[name])
    assert (record.suite, record.kind, record.subject) == ("faults", "fault", name)
    counts = [record.values[key] for key in ("injected", "recovered", "bitwise_equal")]
    assert counts == [1, 1, 1], record.values["remark"]
    assert not re.search(r"(^|[ (])/", record.values["remark"])
