"""What happens to long runs: stops at any step, pre-emption, dead processes, damage, divergence."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fasternet.cli._training import stop_between_steps
from fasternet.models.checkpoint import load_checkpoint
from fasternet.records import load_records
from fasternet.train.classification import Classification, train
from fasternet.train.loop import Hooks, Progress
from fasternet.train.recipe import Recipe, load_recipe
from fasternet.train.state import load_state

TINY_MODEL = {"width": 8, "depths": (1, 1, 1, 1), "head_width": 16}


@pytest.fixture
def recipe(recipe: Recipe) -> Recipe:
    """Everything that a state holds is on; three steps of two parts an epoch."""
    return dataclasses.replace(
        recipe, epochs=2, batch_size=6, mixup=0.0, cutmix=0.0, ema_decay=0.9, input_size=40, train_scale=0.8,
        full_size_epochs=1,
    )  # fmt: skip


@pytest.fixture
def run(pictures: Path, recipe: Recipe):
    def start(output: Path, *, resume: bool = False, hooks: Hooks | None = None, **fields) -> Path:
        changed = dataclasses.replace(recipe, **fields)
        options = {"recipe": changed, "model_options": TINY_MODEL, "device": "cpu"}
        return train("fasternet_t0", str(pictures), output, resume=resume, hooks=hooks, **options)

    start.data = pictures
    return start


def load_result(output: Path) -> dict[str, object]:
    state = load_state(output / "last" / "state.pt")
    logs = [(r.condition["epoch"], r.values["train_loss"], r.values["top1"], r.values["lr"])
            for r in load_records(output / "log.jsonl") if r.kind == "epoch"]  # fmt: skip
    return {"state": state, "best": load_checkpoint(output).model.state_dict(), "log": logs}


def assert_same(one: Path, other: Path) -> None:
    torch.testing.assert_close(load_result(one), load_result(other), rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict[str, Path]:
    return {"output": tmp_path_factory.mktemp("runs") / "finished"}


@pytest.fixture
def uninterrupted(finished, run) -> Path:
    output = finished["output"]
    return output if output.exists() else run(output)


@pytest.mark.parametrize("num_reports", range(1, 9))
def test_run_killed_after_any_step_goes_on_from_that_step(
    run, uninterrupted: Path, tmp_path: Path, num_reports: int
) -> None:
    output, seen = tmp_path / "run", []

    def die(state: Progress) -> None:
        seen.append(state)
        if len(seen) == num_reports:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(output, hooks=Hooks(progress=die, save_minutes=0))
    first = len(seen)
    again: list[Progress] = []
    run(output, resume=True, hooks=Hooks(progress=again.append))
    assert_same(output, uninterrupted)
    # A report comes before the state of its step is written: one step may be taken twice.
    assert len(again) <= 9 - first


def test_stop_saves_the_state_of_the_step(run, uninterrupted: Path, tmp_path: Path) -> None:
    output, seen = tmp_path / "run", []
    hooks = Hooks(progress=seen.append, stop=lambda: len(seen) == 5)
    with pytest.raises(InterruptedError, match="stopped in epoch 2 after step 2 of 3; the state is saved"):
        run(output, hooks=hooks)
    state = load_state(output / "last" / "state.pt")
    assert (state["epoch"], state["step"]) == (1, 2)
    run(output, resume=True)
    assert_same(output, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_ask_for_a_stop_and_a_second_one_does_not_wait(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with stop_between_steps() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop()
        assert signal.getsignal(number) in before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def _diverge_once(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    original, calls = Classification.loss, []

    def loss(self, model, batch):
        calls.append(1)
        return original(self, model, batch) * (float("nan") if len(calls) == at else 1)

    monkeypatch.setattr(Classification, "loss", loss)
    return calls


def test_rollback_goes_back_to_the_last_state_at_half_the_rate(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    calls = _diverge_once(monkeypatch, at=5)
    output = run(tmp_path / "run", rollbacks=1, hooks=Hooks(say=said.append))
    assert len(calls) == 6 + 2
    assert any("became nan in step 2 of epoch 2" in s and "back to epoch 2, step 0, at 0.5 of" in s for s in said)
    state = load_state(output / "last" / "state.pt")
    assert (state["num_rollbacks"], state["lr_factor"]) == (1, 0.5)
    plain = run(tmp_path / "plain")
    rates = [[r.values["lr"] for r in load_records(o / "log.jsonl") if r.kind == "epoch"] for o in (output, plain)]
    assert rates[0] == [rates[1][0], pytest.approx(rates[1][1] / 2)]


def test_rollbacks_are_no_more_than_allowed(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Classification.loss
    monkeypatch.setattr(Classification, "loss", lambda *arguments: original(*arguments) * float("inf"))
    said: list[str] = []
    with pytest.raises(ValueError, match=r"became inf in step 1 of epoch 1"):
        run(tmp_path / "run", rollbacks=2, hooks=Hooks(say=said.append))
    assert sum("back to epoch 1" in sentence for sentence in said) == 2


def test_weights_that_are_not_finite_reach_no_checkpoint(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.optim.AdamW.step
    calls = []

    def step(self, *arguments):
        calls.append(original(self, *arguments))
        if len(calls) == 3:  # the last step of the first epoch: no later loss can show it
            self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(ValueError, match="the weights are not finite at the end of epoch 1"):
        run(tmp_path / "run", hooks=Hooks(save_minutes=0))
    weights = load_state(tmp_path / "run" / "last" / "state.pt")["model"].values()
    assert all(tensor.isfinite().all() for tensor in weights)


@pytest.mark.parametrize("left", ["nothing", "recipe", "log"])
def test_run_killed_before_its_first_state_begins_anew(run, uninterrupted: Path, tmp_path: Path, left: str) -> None:
    output = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(output, hooks=Hooks(progress=_interrupt))
    for state in (output / "last").glob("*.pt"):
        state.unlink()
    if left != "log":
        (output / "log.jsonl").unlink()
    if left == "nothing":
        (output / "recipe.yaml").rename(output / ".recipe.x.yaml")
        for path in (output / "machines").iterdir():
            path.unlink()
        (output / "machines").rmdir()
        (output / "last").rmdir()
        (output / "log.csv").unlink()
    run(output, resume=left != "nothing")
    assert_same(output, uninterrupted)


def test_run_from_weights_is_not_begun_anew_without_them(run, tmp_path: Path) -> None:
    output = tmp_path / "run"
    source = run(tmp_path / "source", epochs=1)
    options = {"model_options": TINY_MODEL, "device": "cpu", "recipe": load_recipe(source / "recipe.yaml", Recipe)}
    with pytest.raises(KeyboardInterrupt):
        train("fasternet_t0", str(run.data), output, checkpoint=source, hooks=Hooks(progress=_interrupt), **options)
    with pytest.raises(ValueError, match="leave checkpoint and pretrained out"):
        train("fasternet_t0", str(run.data), output, checkpoint=source, resume=True, **options)
    for state in (output / "last").glob("*.pt"):
        state.unlink()
    with pytest.raises(FileNotFoundError, match="stopped before its first state"):
        train("fasternet_t0", str(run.data), output, resume=True, **options)


def _interrupt(_: Progress) -> None:
    raise KeyboardInterrupt


def start_command(pictures: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fasternet", "train", "fasternet_t0", "--data", str(pictures), "--width", "8"]
    command += ["--output", str(output), "--epochs", "200", "--set", "precision=fp32", "--batch-size", "8"]
    command += ["--input-size", "32", "--device", "cpu", *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def wait_for_second_epoch(process: subprocess.Popen[str]) -> None:
    assert any(line.startswith("epoch 2/") for line in process.stderr)


@pytest.mark.slow
def test_loader_process_that_dies_is_one_sentence(pictures: Path, tmp_path: Path) -> None:
    process = start_command(pictures, tmp_path / "run", "--set", "num_workers=2")
    wait_for_second_epoch(process)
    child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
    os.kill(int(child), signal.SIGKILL)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert rest.splitlines()[-1].startswith("error: a process that loads pictures died")
    assert "Traceback" not in rest
    assert load_state(tmp_path / "run" / "last" / "state.pt")["epoch"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_sigterm_of_the_whole_group_stops_the_command_with_its_state_saved(
    pictures: Path, tmp_path: Path, num_workers: int
) -> None:
    output = tmp_path / "run"
    process = start_command(pictures, output, "--set", f"num_workers={num_workers}")
    wait_for_second_epoch(process)
    os.killpg(process.pid, signal.SIGTERM)  # as torchrun does
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "Traceback" not in rest
    last = rest.splitlines()[-1]
    assert last.startswith("error: stopped in epoch ")
    assert f"--width 8 --device cpu --output {output} --resume" in last
    step = int(last.split("after step ")[1].split()[0])
    state = load_state(output / "last" / "state.pt")
    assert (state["step"], f"in epoch {state['epoch'] + 1} after" in last) == (step, True)


def test_pictures_that_vanish_are_skipped_in_training(run, tmp_path: Path, pictures: Path) -> None:
    """A file that is there when the run begins may not be there an hour later."""
    for name in ("a", "b"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        for number in range(6):
            for split in ("train", "val"):
                Image.new("RGB", (40, 40), (40 * number,) * 3).save(tmp_path / "data" / split / name / f"{number}.png")

    def remove(state: Progress) -> None:
        (tmp_path / "data" / "train" / "a" / "3.png").unlink(missing_ok=True)

    said: list[str] = []
    options = {"model_options": TINY_MODEL, "device": "cpu", "hooks": Hooks(progress=remove, say=said.append)}
    recipe = Recipe(
        epochs=3, batch_size=4, lr=1e-3, warmup_epochs=0, weight_decay=0.0, input_size=32,
        random_resized_crop=(0.5, 1.0), flip=True, precision="fp32",
    )  # fmt: skip
    train("fasternet_t0", str(tmp_path / "data"), tmp_path / "run", recipe=recipe, **options)
    assert sum("a/3.png: there is no such file; another picture takes its place" in s for s in said) == 1
