"""What happens to long runs: stops at any step, pre-emption, dead processes, damage, divergence."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from fasternet.benchmark.faults import find_difference, list_tree, stop_tree
from fasternet.cli._training import stop_between_steps
from fasternet.models.checkpoint import load_checkpoint, write_atomically
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


@pytest.mark.parametrize("epoch", [1, 2])
def test_stop_asked_for_in_evaluation_comes_after_it(run, uninterrupted: Path, tmp_path: Path, epoch: int) -> None:
    output, seen = tmp_path / "run", []
    hooks = Hooks(progress=seen.append, stop=lambda: bool(seen and seen[-1].epoch == epoch and seen[-1].values))
    with pytest.raises(InterruptedError, match=f"^stopped after epoch {epoch} of 2; the state is saved"):
        run(output, hooks=hooks)
    run(output, resume=True)
    assert_same(output, uninterrupted)
    assert [r.kind for r in load_records(output / "log.jsonl")].count("evaluation") == 1


@pytest.mark.parametrize("has_state", [True, False])
def test_what_a_kill_left_of_a_file_goes_when_the_run_goes_on(run, tmp_path: Path, has_state: bool) -> None:
    output, names = tmp_path / "run", []
    with pytest.raises(KeyboardInterrupt):
        run(output, hooks=Hooks(progress=_interrupt))
    write_atomically(output / "last" / "part.pt", lambda part: (part.touch(), names.append(part.name)))
    left = [output / names[0], output / "last" / names[0], output / "best" / names[0]]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    if not has_state:  # the run begins anew
        (output / "last" / "state.pt").unlink()
    run(output, resume=True)
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("launched", [False, True])
def test_signals_ask_for_a_stop_and_a_second_ctrl_c_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, launched: bool
) -> None:
    """torchrun makes two signals of one."""
    monkeypatch.setenv("RANK", "0") if launched else monkeypatch.delenv("RANK", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with stop_between_steps() as stop:
            assert not stop()
            signal.raise_signal(number)
            assert stop()
        # The command has yet to say how to go on.
        assert (signal.getsignal(number) == before[number]) == (number == signal.SIGINT and not launched)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def test_signals_are_as_they_were_after_a_run_that_nobody_stopped() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_between_steps() as stop:
        assert not stop()
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


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
        (output / "recipe.yaml").rename(output / ".part-recipe.x.yaml")
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


def start_command(pictures: Path, output: Path, *options: str, torchrun: Sequence[str] = ()) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    command = [sys.executable, *launcher, "-m", "fasternet", "train", "fasternet_t0", "--data", str(pictures)]
    command += [
        "--width",
        "8",
        "--output",
        str(output),
        "--epochs",
        "200",
        "--set",
        "precision=fp32",
        "--batch-size",
        "8",
    ]
    command += ["--input-size", "32", "--device", "cpu", *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def wait_for_second_epoch(process: subprocess.Popen[str]) -> None:
    assert any(line.startswith("epoch 2/") for line in process.stderr)


def describe_stop(output: Path) -> str:
    """Return how the sentence about a stop with the state in this folder begins."""
    state = load_state(output / "last" / "state.pt")
    epoch, step = state["epoch"], state["step"]
    return f"stopped in epoch {epoch + 1} after step {step} of " if step else f"stopped after epoch {epoch} of "


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
    assert last.startswith(f"error: {describe_stop(output)}")
    assert f"--width 8 --device cpu --output {output} --resume" in last


@pytest.mark.multiprocess
def test_sigterm_of_all_processes_under_torchrun_saves_before_it_stops(pictures: Path, tmp_path: Path) -> None:
    """``scancel --signal=TERM`` reaches them all, and torchrun then sends its own a second one."""

    def start(name: str, *options: str) -> subprocess.Popen[str]:
        options = ("--epochs", "20", *options)
        return start_command(pictures, tmp_path / name, *options, torchrun=("--standalone", "--nproc-per-node", "2"))

    calm = start("calm")
    assert "epoch 20/20" in calm.communicate(timeout=240)[1]
    process = start("run")
    try:
        wait_for_second_epoch(process)
        for pid in list_tree(process.pid)[1:]:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.02)  # else the two are one to Python
        process.terminate()
        said = process.communicate(timeout=60)[1]
    finally:
        stop_tree(process)
    stopped = next((line for line in said.splitlines() if line.startswith("error: ")), said)
    assert stopped.endswith("; the state is saved; go on with the same torchrun command and --resume")
    assert stopped.startswith(f"error: {describe_stop(tmp_path / 'run')}")
    resumed = start("run", "--resume")
    assert "epoch 20/20" in resumed.communicate(timeout=240)[1]
    assert find_difference(tmp_path / "run", tmp_path / "calm") is None


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
