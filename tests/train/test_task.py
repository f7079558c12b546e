"""The loop trains any task, not classification alone."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from fasternet.records import load_records
from fasternet.train.loop import Hooks, describe_plan, fit
from fasternet.train.state import load_state, save_state
from fasternet.train.task import Task


class Regression(Task):
    """Fit a line: batches of another form, another loss, another metric."""

    def batches(self, epoch, start=0):
        points = torch.linspace(-1, 1, 8)[:, None]
        return iter([(points[i::2], {"target": 3 * points[i::2]}) for i in (0, 1)][start:])

    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]["target"]).square().mean()

    def evaluate(self, model):
        return {"accuracy": -abs(model.weight.item() - 3)}

    def save(self, folder, model, values):
        folder.mkdir(exist_ok=True)
        torch.save(model.state_dict(), folder / "weights.pt")

    def summarise(self, output):
        return []


@pytest.fixture
def regression() -> Regression:
    return Regression(
        name="line",
        model=torch.nn.Linear(1, 1, bias=False),
        device=torch.device("cpu"),
        condition={},
        values={},
        num_steps=2,
        metric="accuracy",
    )


@pytest.mark.parametrize("limit", [0.01, None])
def test_fit_clips_the_gradient(regression: Regression, recipe, tmp_path: Path, limit: float | None) -> None:
    fit(regression, tmp_path, recipe=dataclasses.replace(recipe, epochs=1, clip_grad=limit))
    norm = regression.model.weight.grad.norm().item()
    assert norm == pytest.approx(limit, rel=1e-3) if limit else norm > 0.1


def test_fit_trains_whatever_task(regression: Regression, recipe, tmp_path: Path) -> None:
    fit(regression, tmp_path, recipe=dataclasses.replace(recipe, lr=0.1, epochs=60, weight_decay=0.0, batch_size=4))
    log = [r.values["accuracy"] for r in load_records(tmp_path / "log.jsonl") if r.kind == "epoch"]
    assert len(log) == 60
    weight = torch.load(tmp_path / "best" / "weights.pt", weights_only=True)["weight"].item()
    assert -abs(weight - 3) == max(log) > -0.1


def test_plan_ends_with_what_is_never_reached(regression: Regression, recipe) -> None:
    assert describe_plan(recipe, regression.world, 2) == "batch 8, rate 0.002, 3 epochs of 2 steps, fp32"
    plan = describe_plan(dataclasses.replace(recipe, epochs=1), regression.world, 2)
    assert plan.endswith("1 epochs of 2 steps, fp32; with this warm-up and epochs=1 the rate reaches 0.001 at most")


def _change_loss(monkeypatch: pytest.MonkeyPatch, first: int, change) -> None:
    """Change the loss from a step on, counted from 1."""
    original, calls = Regression.loss, []

    def loss(self, model, batch):
        calls.append(batch)
        value = original(self, model, batch)
        return value if len(calls) < first else change(value)

    monkeypatch.setattr(Regression, "loss", loss)


def _refuse(value: torch.Tensor) -> torch.Tensor:
    raise ValueError("a wrong argument")


@pytest.mark.parametrize(("step", "before", "left"), [(1, (), False), (1, (".notes",), True), (2, (), True)])
def test_fit_leaves_no_folder_behind_where_the_first_step_fails(
    regression: Regression,
    recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    before: tuple[str, ...],
    left: bool,
) -> None:
    output = tmp_path / "run"
    for name in before:
        output.mkdir()
        (output / name).write_text("precious")
    _change_loss(monkeypatch, step, _refuse)
    with pytest.raises(ValueError, match="a wrong argument"):
        fit(regression, output, recipe=recipe)
    assert output.exists() == left
    assert all((output / name).read_text() == "precious" for name in before)


def test_fit_keeps_the_folder_where_the_first_step_after_a_resume_fails(
    regression: Regression, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_after_a_step(regression, recipe, tmp_path / "run")
    _change_loss(monkeypatch, 1, _refuse)
    with pytest.raises(ValueError, match="a wrong argument"):
        fit(regression, tmp_path / "run", recipe=recipe, resume=True)
    assert (tmp_path / "run" / "last" / "state.pt").is_file()


def _stop_after_a_step(task: Task, recipe, output: Path) -> None:
    with pytest.raises(InterruptedError):
        fit(task, output, recipe=recipe, hooks=Hooks(stop=lambda: True))


def test_fit_counts_the_seconds_of_an_epoch_before_a_resume_too(regression: Regression, recipe, tmp_path: Path) -> None:
    _stop_after_a_step(regression, recipe, tmp_path)
    path = tmp_path / "last" / "state.pt"
    state = load_state(path)
    assert 0 < state["seconds"] < 60
    save_state(path, {**state, "seconds": 1000.0})
    fit(regression, tmp_path, recipe=recipe, resume=True)
    seconds = [r.values["seconds"] for r in load_records(tmp_path / "log.jsonl") if r.kind == "epoch"]
    assert [value > 1000 for value in seconds] == [True, False, False]


def test_fit_resumes_a_state_from_before_it_held_seconds(regression: Regression, recipe, tmp_path: Path) -> None:
    _stop_after_a_step(regression, recipe, tmp_path)
    path = tmp_path / "last" / "state.pt"
    save_state(path, {k: v for k, v in load_state(path).items() if k not in ("seconds", "first_loss")})
    fit(regression, tmp_path, recipe=recipe, resume=True)
    assert load_state(path)["epoch"] == 3


def test_fit_says_once_that_a_finite_loss_diverges(
    regression: Regression, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    _change_loss(monkeypatch, 3, lambda value: 1e9 * value)
    stopped = Hooks(say=said.append, stop=lambda: any("diverges" in sentence for sentence in said))
    with pytest.raises(InterruptedError, match="in epoch 2 after step 2"):
        fit(regression, tmp_path, recipe=recipe, hooks=stopped)
    fit(regression, tmp_path, recipe=recipe, resume=True, hooks=Hooks(say=said.append))
    (warning,) = (sentence for sentence in said if "diverges" in sentence)
    assert "e+09 in epoch 2; train anew with lr=0.0005" in warning
    assert load_state(tmp_path / "last" / "state.pt")["first_loss"] == math.inf
