import torch
from torch import nn

from fasternet.rivals import randomize_batch_norm


def _create(num_layers: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=0.3)) for _ in range(num_layers)]
    return nn.Sequential(*(module for layer in layers for module in layer), nn.Dropout()).eval()


def test_batch_norm_gets_the_statistics_of_what_reaches_it() -> None:
    model, x = _create(), 5 + 3 * torch.randn(4, 8, 9, 9)
    norm = randomize_batch_norm(model, x)[1]
    y = model[0](x)
    torch.testing.assert_close(norm.running_mean, y.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.running_var, y.var(dim=(0, 2, 3)))
    assert norm.weight.unique().numel() == norm.bias.unique().numel() == 8
    assert norm.momentum == 0.3
    assert not any(module.training for module in model.modules())


def test_batch_norm_is_randomized_alike_from_one_seed() -> None:
    x = torch.randn(2, 8, 9, 9)
    one, two, other = (randomize_batch_norm(_create(), x, seed=seed)[1].weight for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_deep_network_keeps_its_scale() -> None:
    x = 1e-6 * torch.randn(2, 8, 64, 64)
    model = randomize_batch_norm(_create(num_layers=20), x)
    with torch.no_grad():
        assert 0.1 < model(x).std() < 10


def test_network_without_batch_norm_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3))
    before = [parameter.clone() for parameter in model.parameters()]
    assert randomize_batch_norm(model, torch.randn(2, 3, 4, 4)) is model
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
