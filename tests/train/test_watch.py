"""What follows a run: right after every epoch, right again after a run was resumed."""

import csv
import importlib.machinery
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasternet.records import Record, append_records
from fasternet.train.watch import check_watchers, open_watchers, write_csv


def log_epoch(output: Path, epoch: int, **values: Any) -> dict[str, Any]:
    """Write the record of an epoch as the loop does, and return its values."""
    values = {"train_loss": 2 / epoch, "top1": 10.0 * epoch} | values
    record = Record(
        suite="train", kind="epoch", subject="t0", condition={"epoch": epoch}, values=values,
        created=f"2026-01-02T03:04:{epoch:02}+00:00",
    )  # fmt: skip
    append_records(output / "log.jsonl", [record])
    return values


def follow(output: Path, names: list[str], epochs: range) -> None:
    """Train epochs, so to speak."""
    with open_watchers(names, output, subject="t0", condition={"lr": 0.1, "crop": (0.3, 1.0), "data": Path("x")}) as w:
        for epoch in epochs:
            w(epoch, log_epoch(output, epoch, per_class=["not a number"], best=True))


def read_csv(output: Path) -> list[dict[str, str]]:
    with (output / "log.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class FakeRun:
    """Drops steps that are not new, as the real one does."""

    def __init__(self, logged: dict[int, dict[str, Any]]) -> None:
        self.logged = logged
        self.exit_code: int | None = None

    @property
    def step(self) -> int:
        return max(self.logged, default=-1) + 1

    def log(self, values: dict[str, Any], step: int) -> None:
        assert step >= self.step
        self.logged[step] = values

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Weights & Biases that keeps all runs in itself."""

    class Error(Exception):
        pass

    def init(**arguments: Any) -> FakeRun:
        if not module.online:
            raise Error("No API key\nconfigured.")
        module.calls.append(arguments)
        module.runs.append(FakeRun(module.servers.setdefault(arguments["id"], {})))
        return module.runs[-1]

    module: Any = ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.calls, module.runs, module.servers, module.online = [], [], {}, True
    module.Error, module.init = Error, init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_csv_has_a_row_an_epoch_while_the_run_goes(tmp_path: Path) -> None:
    with open_watchers([], tmp_path, subject="t0", condition={}) as watch:
        assert read_csv(tmp_path) == []
        watch(1, log_epoch(tmp_path, 1))
        assert read_csv(tmp_path) == [{"epoch": "1", "train_loss": "2.0", "top1": "10.0"}]
        watch(2, log_epoch(tmp_path, 2, unreadable=3))
    assert [(row["epoch"], row["top1"], row["unreadable"]) for row in read_csv(tmp_path)] == [
        ("1", "10.0", ""),
        ("2", "20.0", "3"),
    ]


def test_csv_of_a_repeated_epoch_has_its_last_values(tmp_path: Path) -> None:
    for epoch, top1 in ((1, 10.0), (2, 20.0), (2, 21.0)):
        log_epoch(tmp_path, epoch, top1=top1)
    write_csv(tmp_path)
    assert [(row["epoch"], row["top1"]) for row in read_csv(tmp_path)] == [("1", "10.0"), ("2", "21.0")]
    assert not list(tmp_path.glob(".log*"))


def test_resumed_run_cuts_what_was_lost_from_the_csv(tmp_path: Path) -> None:
    follow(tmp_path, [], range(1, 4))
    (tmp_path / "log.jsonl").unlink()  # the loop cuts the log back to the checkpoint first
    log_epoch(tmp_path, 1)
    with open_watchers([], tmp_path, subject="t0", condition={}):
        assert [row["epoch"] for row in read_csv(tmp_path)] == ["1"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_continues_the_curves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level(logging.CRITICAL)
    follow(tmp_path, ["tensorboard"], range(1, 4))
    (tmp_path / "log.jsonl").unlink()  # cut back to the checkpoint of epoch 1
    log_epoch(tmp_path, 1)
    follow(tmp_path, ["tensorboard"], range(2, 5))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["top1", "train_loss"]
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("top1")] == [(n, 10.0 * n) for n in range(1, 5)]
    assert events.Scalars("top1")[0].wall_time == 1767323041  # when the epoch ended, not when it was written again


def test_wandb_continues_the_curves_of_the_same_run(tmp_path: Path, wandb: Any) -> None:
    follow(tmp_path, ["wandb", "wandb"], range(1, 3))
    follow(tmp_path, ["wandb"], range(3, 4))
    first, second = wandb.calls
    assert first["id"] == second["id"] == (tmp_path / "wandb-id.txt").read_text(encoding="utf-8").strip()
    assert (first["resume"], first["dir"], first["name"]) == ("allow", str(tmp_path), tmp_path.name)
    assert first["config"] == {"network": "t0", "lr": 0.1, "crop": [0.3, 1.0], "data": "x"}
    assert "mode" not in first  # so WANDB_MODE decides
    (logged,) = wandb.servers.values()
    assert logged == {n: {"train_loss": 2 / n, "top1": 10.0 * n} for n in range(1, 4)}
    assert [run.exit_code for run in wandb.runs] == [0, 0]


def test_wandb_asked_for_at_resuming_gets_what_is_done(tmp_path: Path, wandb: Any) -> None:
    follow(tmp_path, [], range(1, 3))
    follow(tmp_path, ["wandb"], range(3, 4))
    assert list(*wandb.servers.values()) == [1, 2, 3]


def test_wandb_hears_that_a_run_failed(tmp_path: Path, wandb: Any) -> None:
    with (
        pytest.raises(ValueError, match="nan"),
        open_watchers(["wandb"], tmp_path, subject="t0", condition={}),
    ):
        raise ValueError("the loss became nan")
    assert [run.exit_code for run in wandb.runs] == [1]


def test_wandb_that_cannot_start_is_one_sentence(tmp_path: Path, wandb: Any) -> None:
    wandb.online = False
    with pytest.raises(OSError, match=r"cannot start: No API key configured\. \(WANDB_MODE=offline") as caught:
        follow(tmp_path, ["wandb"], range(1, 2))
    assert "\n" not in str(caught.value)


def test_unknown_or_missing_watcher_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="watcher 'aim' is not one of tensorboard, wandb"):
        follow(tmp_path, ["aim"], range(1, 2))
    assert not any(tmp_path.iterdir())
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ModuleNotFoundError, match=rf"pip install 'fasternet\[{name}\]'"):
            check_watchers([name])
