import dataclasses
import math

import pytest
import torch
from torch import nn

from fasternet.models.registry import create_model
from fasternet.train.optim import create_optimizer, freeze_stages, set_lr, set_training
from fasternet.train.recipes import RECIPES


@pytest.fixture
def published():
    return dataclasses.replace(
        RECIPES["small"], epochs=300, lr=0.004, warmup_epochs=20, warmup_lr=1e-6, min_lr=1e-5, lr_schedule="epoch"
    )


def test_compute_lr_by_epoch_is_the_published_one(published) -> None:
    rates = [published.compute_lr(epoch) for epoch in range(300)]
    assert rates[0] == 1e-6
    assert rates[10] == pytest.approx(1e-6 + 10 / 19 * (0.004 - 1e-6))
    assert rates[19] == rates[20] == 0.004
    assert rates[160] == pytest.approx((0.004 + 1e-5) / 2)
    assert rates[299] == pytest.approx(1e-5 + (0.004 - 1e-5) * (1 + math.cos(math.pi * 279 / 280)) / 2)
    assert published.compute_lr(30, 0.9) == rates[30]


def test_compute_lr_by_step_rises_to_the_peak_and_falls_to_the_end(published) -> None:
    recipe = dataclasses.replace(published, lr_schedule="step", epochs=10, warmup_epochs=2)
    rates = [recipe.compute_lr(epoch, step / 50) for epoch in range(10) for step in range(50)]
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
    rates = [recipe.compute_lr(epoch, done) for epoch in range(2) for done in (0.0, 0.5)]
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


@pytest.fixture
def network():
    return create_model("fasternet_t0", width=8, depths=(1, 1, 2, 1), head_width=16, num_classes=3)


def test_layer_decay_lowers_the_rate_from_layer_to_layer(network) -> None:
    recipe = dataclasses.replace(RECIPES["small"], layer_decay=0.5)
    optimizer = create_optimizer(network, recipe)
    set_lr(optimizer, 1.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(network.parameters()))
    layers = [network.head, network.stages[3].blocks[0], network.stages[3].merging, network.stages[2].blocks[1]]
    layers += [network.stages[2].blocks[0], network.stages[2].merging, network.stages[1].blocks[0]]
    layers += [network.stages[1].merging, network.stages[0].blocks[0], network.embedding]
    for distance, layer in enumerate(layers):
        assert {rates[id(parameter)] for parameter in layer.parameters()} == {0.5**distance}


def test_frozen_stages_are_not_trained_and_keep_their_statistics(network) -> None:
    recipe = dataclasses.replace(RECIPES["small"], freeze=2, layer_decay=0.9)
    freeze_stages(network, recipe.freeze)
    optimizer = create_optimizer(network, recipe)
    set_training(network, recipe)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    frozen = {name for name in before if name.startswith(("embedding.", "stages.0.", "stages.1."))}
    assert not moved & frozen
    assert moved == set(before) - frozen


def test_frozen_batch_norm_keeps_its_statistics(network) -> None:
    set_training(network, dataclasses.replace(RECIPES["small"], batch_norm="frozen"))
    before = {name: value.clone() for name, value in network.named_buffers()}
    network(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    assert network.stages[0].blocks[0].drop_path.training


@pytest.mark.parametrize(("field", "value"), [("freeze", 1), ("layer_decay", 0.9)])
def test_layers_of_other_networks_are_not_known(field: str, value: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    recipe = dataclasses.replace(RECIPES["small"], **{field: value})
    with pytest.raises(ValueError, match=f"{field}.* needs a FasterNet"):
        freeze_stages(model, value) if field == "freeze" else create_optimizer(model, recipe)
