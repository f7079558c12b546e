"""The loop trains any task, not classification alone."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fasternet.records import load_records
from fasternet.train.loop import fit
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
