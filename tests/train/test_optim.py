import dataclasses
import math

import pytest
import torch
from torch import nn

from fasternet.train.optim import compute_lr, create_optimizer
from fasternet.train.recipes import RECIPES


@pytest.fixture
def published():
    return dataclasses.replace(
        RECIPES["small"], epochs=300, lr=0.004, warmup_epochs=20, warmup_lr=1e-6, min_lr=1e-5, lr_schedule="epoch"
    )


def test_compute_lr_by_epoch_is_the_published_one(published) -> None:
    rates = [compute_lr(published, epoch) for epoch in range(300)]
    assert rates[0] == 1e-6
    assert rates[10] == pytest.approx(1e-6 + 10 / 19 * (0.004 - 1e-6))
    assert rates[19] == rates[20] == 0.004
    assert rates[160] == pytest.approx((0.004 + 1e-5) / 2)
    assert rates[299] == pytest.approx(1e-5 + (0.004 - 1e-5) * (1 + math.cos(math.pi * 279 / 280)) / 2)
    assert compute_lr(published, 30, 0.9) == rates[30]


def test_compute_lr_by_step_rises_to_the_peak_and_falls_to_the_end(published) -> None:
    recipe = dataclasses.replace(published, lr_schedule="step", epochs=10, warmup_epochs=2)
    rates = [compute_lr(recipe, epoch, step / 50) for epoch in range(10) for step in range(50)]
    peak = rates.index(0.004)
    assert peak == 100
    assert rates[0] == 1e-6
    assert rates[:101] == sorted(rates[:101])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5, rel=0.01)


@pytest.mark.parametrize("schedule", ["epoch", "step"])
@pytest.mark.parametrize("warmup_epochs", [0, 1, 2, 5])
def test_compute_lr_stays_within_its_limits(published, schedule: str, warmup_epochs: int) -> None:
    recipe = dataclasses.replace(published, lr_schedule=schedule, epochs=2, warmup_epochs=warmup_epochs)
    rates = [compute_lr(recipe, epoch, done) for epoch in range(2) for done in (0.0, 0.5)]
    assert all(recipe.warmup_lr <= rate <= recipe.lr for rate in rates)
    if not warmup_epochs:
        assert rates[0] == recipe.lr


def test_create_optimizer_decays_everything_that_is_trained() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[0].weight.requires_grad = False
    recipe = dataclasses.replace(RECIPES["small"], weight_decay=0.5, lr=0.1)
    optimizer = create_optimizer(model, recipe)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if name == "0.weight" else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
