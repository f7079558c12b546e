"""Pruning and quantisation tools of others on networks with PConv: torch-pruning, torchao, nncf."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from fasternet import PConv2d
from fasternet.models.fasternet import FasterNet, FasterNetConfig
from fasternet.models.surgery import PConvPWConv, replace_convs

CONFIG = FasterNetConfig(width=16, depths=(1, 1, 2, 1), activation="relu", head_width=64, num_classes=5)
NARROW = dataclasses.replace(CONFIG, width=8, head_width=32)
SHAPE = (2, 3, 64, 64)
PAGE = Path(__file__).parents[2] / "docs" / "surgery.md"
BATCH = (8, *SHAPE[1:])  # to calibrate with


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _replaced(stages: int = 4) -> nn.Module:
    """A residual network whose 3x3 convolutions, with stride 1 and 2, are PConv and PWConv."""
    model = ResNet(BasicBlock, [1] * stages, num_classes=5).eval()
    return replace_convs(model, init="random", measure=False, input_shape=(1, *SHAPE[1:]))[0]


def _prune(model: nn.Module, x: Tensor, ratio: float) -> None:
    """Prune as docs/surgery.md says."""
    pytest.importorskip("torch_pruning", reason="needs torch-pruning: pip install torch-pruning")
    (recipe,) = re.findall(r"```python\n([^`]*class PConvPruner.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(recipe, names)
    names["prune"](model, x, ratio)


def _embed(narrow: dict[str, Tensor], wide: dict[str, Tensor]) -> dict[str, Tensor]:
    """Spread a narrow network's weights over one of twice the width; what is between is zero, in PConv it is not."""
    spread = {}
    for key, target in wide.items():
        source = narrow[key]
        sizes = zip(source.shape, target.shape, strict=True)
        indices = [torch.arange(n) if n == w else torch.arange(1, w, 2) for n, w in sizes]
        spread[key] = torch.randn_like(target) if "pconv" in key else torch.zeros_like(target)
        if indices:
            spread[key][torch.meshgrid(*indices, indexing="ij")] = source
        else:
            spread[key] = source.clone()
    return spread


def test_pruning_zero_channels_gives_the_narrower_network_exactly(randomise, difference):
    narrow, wide = randomise(FasterNet(NARROW)), FasterNet(CONFIG).eval()
    wide.load_state_dict(_embed(narrow.state_dict(), wide.state_dict()))
    x = torch.randn(SHAPE)
    expected = narrow(x)
    assert difference(wide(x), expected) < 1e-5
    _prune(wide, x, 0.5)
    assert difference(wide(x), expected) < 1e-6
    state = wide.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in narrow.state_dict().items())
    assert [m.partial_channels for m in wide.modules() if isinstance(m, PConv2d)] == [2, 4, 8, 8, 16]


@pytest.mark.parametrize("position", ["first", "last", "rotate"])
def test_a_pruned_fasternet_is_a_fasternet_that_trains(randomise, position):
    config = dataclasses.replace(CONFIG, position=position)
    model, x = randomise(FasterNet(config)), torch.randn(SHAPE)
    before = _count(model)
    _prune(model, x, 0.5)
    assert _count(model) < before / 3
    FasterNet(dataclasses.replace(NARROW, position=position)).load_state_dict(model.state_dict())
    assert [(m.start, m.partial_channels) for m in model.modules() if isinstance(m, PConv2d)] == [
        (m.start, m.partial_channels)
        for m in FasterNet(dataclasses.replace(NARROW, position=position)).modules()
        if isinstance(m, PConv2d)
    ]
    y = model.train()(x)
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("stride", [1, 2])
def test_pruning_dead_channels_around_pconv_and_pwconv_keeps_the_function(stride):
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(PConvPWConv(16, 32, stride=stride, bias=True), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)),
    ).eval()
    with torch.no_grad():
        for made, norm, read in ((model[0], model[1], model[3].pwconv), (model[3].pwconv, model[4], model[8])):
            made.weight[::2] = made.bias[::2] = norm.weight[::2] = 0  # every second channel is dead
            read.weight[:, ::2] = 0
    x = torch.randn(SHAPE)
    expected = model(x)
    _prune(model, x, 0.5)
    assert (model[3].in_channels, model[3].pconv.partial_channels, model[3].out_channels) == (8, 2, 16)
    assert torch.allclose(model(x), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("match", ["none", "macs"])
def test_a_network_with_replaced_convolutions_can_be_pruned(match):
    network = ResNet(BasicBlock, [1] * 4, num_classes=5).eval()
    # equal multiply-adds give widths that Cp does not divide
    model, _ = replace_convs(network, init="random", match=match, measure=False, input_shape=(1, *SHAPE[1:]))
    before, x = _count(model), torch.randn(SHAPE)
    _prune(model, x, 0.5)
    assert _count(model) < before / 3
    y = model.train()(x)
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def _calibrate(model: nn.Module) -> nn.Module:
    """Give weights and BN statistics values with which the outputs are of sane scale."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        for _ in range(8):
            model.train()(torch.randn(BATCH))
    return model.eval()


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def _list_convs(model: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in model.graph.nodes if node.target is torch.ops.aten.conv2d.default]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasternet", "replaced"])
def test_torchao_quantises_every_convolution_of_an_exported_network(name):
    reason = "needs torchao: pip install torchao"
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason=reason)
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", reason=reason)
    model = _calibrate(FasterNet(CONFIG) if name == "fasternet" else _replaced())
    x = torch.randn(BATCH)
    # Without strict=True this quantiser knows convolutions by the class of their module, and PConv stays in float.
    exported = torch.export.export(model, (x,), strict=True).module()
    quantiser = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(exported, quantiser)
    with torch.no_grad():
        for _ in range(8):
            prepared(torch.randn(BATCH))
        quantised = pt2e.convert_pt2e(prepared)
        assert _relative(quantised(x), model(x)) < 0.1
    convs = _list_convs(quantised)
    assert len(convs) == sum(isinstance(m, nn.Conv2d | PConv2d) for m in model.modules())
    for conv in convs:
        assert all("dequantize" in str(tensor.target) for tensor in conv.args[:2])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["fasternet", "replaced"])
def test_nncf_quantises_an_exported_network(name):
    nncf = pytest.importorskip("nncf", reason="needs nncf: pip install 'fasternet[openvino]'")
    model = _calibrate(FasterNet(CONFIG) if name == "fasternet" else _replaced())
    x = torch.randn(BATCH)
    exported = torch.export.export(copy.deepcopy(model), (x,)).module()
    quantised = nncf.quantize(exported, nncf.Dataset([torch.randn(BATCH) for _ in range(8)]), subset_size=8)
    with torch.no_grad():
        assert _relative(quantised(x), model(x)) < 0.1
    convs = _list_convs(quantised)
    assert len(convs) == sum(isinstance(m, nn.Conv2d | PConv2d) for m in model.modules())
    assert not [conv for conv in convs if conv.args[1].op == "get_attr"]  # every weight is computed from integers
