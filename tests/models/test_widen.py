import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fasternet.models.widen import Widening, widen

SHAPE = (1, 3, 64, 64)


def _cost(conv: nn.Conv2d, in_channels: int, out_channels: int) -> tuple[float, float]:
    """A PConv of a quarter and a PWConv."""
    cp = max(1, in_channels // 4)
    weights = cp * cp * conv.kernel_size[0] ** 2 + in_channels * out_channels
    return weights, weights + (0 if conv.bias is None else out_channels)


def _dear(conv: nn.Conv2d, in_channels: int, out_channels: int) -> tuple[float, float]:
    return 9 * 4 * in_channels * out_channels, 9 * 4 * in_channels * out_channels


def _conv(i: int, o: int, k: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), nn.SiLU())


class _Pair(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = _conv(channels, channels), _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class _C2f(nn.Module):
    """A block as in YOLO networks: split, a chain of pairs, everything concatenated."""

    def __init__(self, channels: int, num_pairs: int = 2) -> None:
        super().__init__()
        half = channels // 2
        self.enter, self.leave = _conv(3, channels, 1), _conv((2 + num_pairs) * half, channels, 1)
        self.pairs = nn.ModuleList(_Pair(half) for _ in range(num_pairs))

    def forward(self, x: Tensor) -> Tensor:
        maps = list(self.enter(x).chunk(2, 1))
        for pair in self.pairs:
            maps.append(pair(maps[-1]))
        return self.leave(torch.cat(maps, 1))


BUILDERS = {
    "basic": lambda: ResNet(BasicBlock, [2, 1, 1, 1], num_classes=5),
    "bottleneck": lambda: ResNet(Bottleneck, [1, 2, 1, 1], num_classes=5),
    "c2f": lambda: _C2f(16),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "resnet50")]
SLOW_MATCHES = [
    pytest.param(name, match, marks=pytest.mark.slow)
    for name in ("basic", "resnet18", "resnet50")
    for match in ("macs", "params")
]


def _create(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = BUILDERS[name]() if name in BUILDERS else getattr(torchvision.models, name)(num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
            ):
                nn.init.uniform_(tensor, low, high)
    return model.eval()


def _find(model: nn.Module) -> list[str]:
    """Name the 3x3 convolutions; in MobileNetV2 all but the stem are depthwise."""
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
    depthwise = [n for n, m in convs.items() if m.groups > 1]
    return depthwise or list(convs)


def _count(model: nn.Module, layers: tuple[str, ...], wanted: list[str], match: str) -> float:
    """Count what the layers cost in the network as it is, the wanted ones at their replacement's cost."""
    positions = {}
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda m, i, y, n=n: positions.update({n: y[0, 0].numel()}))
        for n in layers
    ]
    with torch.inference_mode():
        model(torch.zeros(SHAPE))
    for hook in hooks:
        hook.remove()
    total = 0.0
    for n in layers:
        conv = model.get_submodule(n)
        macs, params = (conv.weight.numel(),) * 2
        if n in wanted:
            macs, params = _cost(conv, conv.in_channels, conv.out_channels)
        total += macs * positions[n] if match == "macs" else params
    return total


@pytest.mark.parametrize(("name", "match"), [("bottleneck", "macs"), ("c2f", "params"), *SLOW_MATCHES])
def test_widening_keeps_the_function_and_the_given_model(name, match):
    model = _create(name)
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, *SHAPE[1:])
    new, widenings, reasons = widen(model, _find(model), match, _cost, SHAPE, seed=0)
    with torch.inference_mode():
        a, b = model(x), new(x)
    assert ((a - b).abs().max() / a.abs().max()).item() < 1e-5
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert {w.after > w.before for w in widenings} == {True}
    assert len(widenings) == {"basic": 5, "bottleneck": 5, "c2f": 2, "resnet18": 8, "resnet50": 16}[name]
    assert not reasons
    assert not new.training


@pytest.mark.parametrize("name", ["basic", "bottleneck", "mobilenet_v2", "c2f", *SLOW])
def test_the_solved_width_is_right_within_one_channel(name):
    model = _create(name)
    wanted = _find(model)
    new, widenings, _ = widen(model, wanted, "macs", _cost, SHAPE)
    for widening in widenings:
        convs = [new.get_submodule(n) for n in widening.layers]
        assert convs[0].out_channels == convs[-1].in_channels == widening.after
        target = _count(model, widening.layers, [], "macs")
        reached = _count(new, widening.layers, wanted, "macs")
        # The cost of one more channel is at most about twice the segment's cost per channel, PConv's rounding aside.
        assert abs(reached - target) < 4 * target / widening.after


def test_equal_parameters_count_bn_and_bias():
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 6, 1)).eval()
    free = lambda conv, i, o: (1.0, 1.0)  # noqa: E731
    _, (widening,), _ = widen(model, ["0"], "params", free, SHAPE)
    total = sum(p.numel() for p in model.parameters())
    assert widening == Widening(("0", "3"), 32, round((total - 1 - 6) / (6 + 2)))


def test_a_bottleneck_is_widened_on_both_sides_with_one_width():
    model = _create("bottleneck")
    new, widenings, _ = widen(model, ["layer2.1.conv2"], "macs", _cost, SHAPE)
    (widening,) = widenings
    assert widening.layers == ("layer2.1.conv1", "layer2.1.conv2", "layer2.1.conv3")
    block = new.layer2[1]
    assert block.conv2.in_channels == block.conv2.out_channels == block.bn1.num_features == widening.after > 128
    assert new.layer2[0].conv2.in_channels == 128


def test_mobilenet_narrows_and_keeps_the_strongest_channels():
    model = _create("mobilenet_v2")
    wanted = _find(model)
    conv = model.features[2].conv[2]
    with torch.no_grad():
        conv.weight[:, 40:] = 0  # as if these channels were never read
    new, widenings, _ = widen(model, wanted, "macs", _cost, SHAPE)
    assert len(widenings) == 17
    assert all(w.after < w.before for w in widenings)
    dwconv = new.features[2].conv[1][0]
    assert dwconv.groups == dwconv.in_channels == dwconv.out_channels
    assert torch.equal(new.features[2].conv[0][0].weight[:40], model.features[2].conv[0][0].weight[:40])
    assert torch.isfinite(new(torch.randn(SHAPE))).all()
    assert torch.isfinite(new.train()(torch.randn(2, *SHAPE[1:]))).all()


def test_narrowing_by_dead_channels_keeps_the_function():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3)).eval()
    with torch.no_grad():
        model[3].weight[:, ::2] = 0
    new, (widening,), _ = widen(model, ["0", "3"], "macs", _dear, SHAPE)
    assert widening.after == 8
    with torch.no_grad():
        model[3].weight[:, 9:] = 0
    new, (widening,), _ = widen(model, ["0", "3"], "macs", _dear, SHAPE)
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(new(x), model(x), atol=1e-6)


def test_widened_layers_keep_their_memory_format():
    model = _create("c2f").to(memory_format=torch.channels_last)
    new, widenings, _ = widen(model, _find(model), "macs", _cost, SHAPE)
    weights = [new.get_submodule(name).weight for widening in widenings for name in widening.layers]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_new_channels_follow_the_seed_and_learn():
    model = _create("c2f")
    widths = [widen(model, _find(model), "macs", _cost, SHAPE, seed=s)[0] for s in (0, 0, 1)]
    weights = [m.pairs[0].first[0].weight for m in widths]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    new = widths[0].train()
    new(torch.randn(2, *SHAPE[1:])).square().sum().backward()
    assert new.pairs[0].second[0].weight.grad[:, 8:].abs().amax(dim=(0, 2, 3)).min() > 0


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.group, self.last = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.group(self.conv(self.conv(x))))


def test_a_width_that_others_see_is_left_alone_with_a_reason():
    c2f = _create("c2f")
    _, widenings, reasons = widen(c2f, ["enter.0", "leave.0"], "macs", _cost, SHAPE)
    assert widenings == ()
    assert "chunk" in reasons["enter.0"]
    assert reasons["leave.0"] == "its input comes from cat, and its output goes into the network's output"
    model = _create("basic")
    _, widenings, reasons = widen(model, ["conv1", "layer2.0.downsample.0"], "macs", _cost, SHAPE)
    assert widenings == ()
    assert "layer1.0.conv1" in reasons["conv1"]
    assert "goes into add" in reasons["layer2.0.downsample.0"]
    _, _, reasons = widen(_Twice(), ["conv", "group", "last"], "params", _cost, (1, 8, 16, 16))
    assert reasons["conv"] == "it runs 2 times"
    assert reasons["group"] == "it has 2 groups"
    assert reasons["last"] == "its input comes from group, and its output goes into the network's output"


def test_shared_weights_are_left_alone():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[2].weight = model[0].weight
    _, widenings, reasons = widen(model, ["0", "1"], "params", _cost, (1, 8, 16, 16))
    assert widenings == ()
    assert reasons["0"] == "its weights are used elsewhere, or computed"


class _Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) if x.sum() > 0 else self.first(x)


def test_what_fx_cannot_trace_comes_back_unchanged():
    model = _Untraceable()
    new, widenings, reasons = widen(model, ["first", "second"], "macs", _cost, SHAPE)
    assert widenings == ()
    assert set(reasons) == {"first", "second"}
    assert all(r.startswith("torch.fx cannot trace the network") for r in reasons.values())
    assert new is not model
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), model.parameters(), strict=True))


def test_an_unknown_match_is_named():
    with pytest.raises(ValueError, match="match must be macs or params, got 'flops'"):
        widen(_Twice(), [], "flops", _cost, SHAPE)
