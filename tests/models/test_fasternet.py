"""FasterNet: the published function in evaluation and training, every configuration, features, and what it refuses."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from fasternet.complexity import count_costs
from fasternet.models import VARIANTS, FasterNet, FasterNetConfig, create_model
from fasternet.models.convert import load_state, to_format
from fasternet.ops import PConv2d

ACTS = {"gelu": F.gelu, "relu": F.relu}


@pytest.fixture
def pair(official, tiny):
    """Create a model and the official state that it holds."""

    def create(activation="gelu", layer_scale=False, **fields):
        scale = {"layer_scale": 1.0} if layer_scale else {}
        model = FasterNet(FasterNetConfig(**tiny, activation=activation, **scale, **fields))
        state = official.create_state(**tiny, layer_scale=layer_scale)
        load_state(model, state, source="test")
        return model, state

    return create


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (37, 61), (63, 64), (100, 129)])
@pytest.mark.parametrize(("activation", "layer_scale"), [("gelu", False), ("relu", True)])
def test_evaluation_equals_the_official_formula(pair, official, difference, tiny, activation, layer_scale, size):
    model, state = pair(activation, layer_scale)
    x = torch.randn(2, 3, *size)
    expected = official.run(state, x, tiny["depths"], ACTS[activation])
    with torch.no_grad():
        found = [*model.eval().forward_intermediates(x), model(x)]
        assert torch.equal(model.forward_features(x), found[-2])
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert b.isfinite().all()
        assert difference(a, b) <= 1e-6


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_training_equals_the_official_formula(pair, official, difference, tiny, activation):
    model, state = pair(activation, drop_path_rate=0.0)
    model.double().train()
    for key, tensor in state.items():
        if tensor.is_floating_point():
            state[key] = tensor.double().requires_grad_("running" not in key)
    x, target = torch.randn(4, 3, 64, 64, dtype=torch.double), torch.tensor([0, 1, 2, 3])
    expected = official.run(state, x, tiny["depths"], ACTS[activation], training=True)[-1]
    logits = model(x)
    assert difference(logits, expected) <= 1e-12
    F.cross_entropy(logits, target).backward()
    F.cross_entropy(expected, target).backward()
    ours = {key: tensor.grad for key, tensor in model.named_parameters()}
    names = dict(zip(model.state_dict(), to_format(model, "official"), strict=True))
    for key, gradient in ours.items():
        assert difference(gradient, state[names[key]].grad) <= 1e-9, key
    for key, buffer in model.named_buffers():
        if "running" in key:
            assert difference(buffer, state[names[key]]) <= 1e-12, key


def test_evaluation_does_not_change_the_model_or_the_input(pair):
    model, _ = pair()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 40, 40)
    kept = x.clone()
    with torch.no_grad():
        contiguous = model.eval()(x)
        assert torch.allclose(model(x.to(memory_format=torch.channels_last)), contiguous, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, kept)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 31, 64), (1, 3, 64, 8), (1, 64, 64, 3)])
def test_input_that_does_not_fit_is_one_clear_error(pair, shape):
    model, _ = pair()
    sentence = f"the input must have the shape (N, 3, H, W) with H and W of at least 32, got {shape}"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        model(torch.zeros(shape))


@pytest.mark.parametrize("size", [(64, 64), (37, 61), (224, 160)])
def test_features_only_returns_the_maps_at_their_strides(tiny, size):
    model = create_model("fasternet_t0", features_only=True, **tiny).eval()
    maps = model(torch.randn(1, 3, *size))
    assert model.feature_channels == (8, 16, 32, 64)
    assert model.feature_strides == (4, 8, 16, 32)
    expected = [(1, c, size[0] // s, size[1] // s) for c, s in zip((8, 16, 32, 64), (4, 8, 16, 32), strict=True)]
    assert [tuple(x.shape) for x in maps] == expected


def test_out_indices_choose_among_the_maps(pair):
    model, state = pair()
    chosen = FasterNet(model.config, out_indices=(1, 3))
    load_state(chosen, state, source="test")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = model.eval().forward_intermediates(x)
        for found in (chosen.eval()(x), model.forward_intermediates(x, (1, 3))):
            assert len(found) == 2
            assert torch.equal(found[0], maps[1])
            assert torch.equal(found[1], maps[3])
    assert chosen.feature_channels == (16, 64)
    assert chosen.feature_strides == (8, 32)


def test_feature_norm_stands_beside_the_trunk(official, difference, tiny):
    state = official.create_state(tiny["width"], tiny["depths"], backbone=True)
    model = create_model("fasternet_t0", features_only=True, feature_norm=True, **tiny)
    load_state(model, state, source="test")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = model.eval()(x)
    for a, b in zip(found, official.run(state, x, tiny["depths"], F.gelu), strict=True):
        assert difference(a, b) <= 1e-6


@pytest.mark.parametrize("indices", [(), (2, 1), (1, 1), (0, 4), (-1,)])
def test_wrong_out_indices_are_named(tiny, indices):
    with pytest.raises(ValueError, match="out_indices must be increasing stages from 0 to 3"):
        create_model("fasternet_t0", features_only=True, out_indices=indices, **tiny)


@pytest.mark.parametrize(
    ("fields", "pconv_channels"),
    [
        ({}, [2, 4, 8, 16]),
        ({"partial_ratio": 1 / 3}, [2, 5, 10, 21]),
        ({"partial_ratio": 1.0}, [8, 16, 32, 64]),
        ({"partial_ratio": 1 / 100}, [1, 1, 1, 1]),
        ({"width": 10, "depths": [1, 1, 1, 2]}, [2, 5, 10, 20]),
        ({"kernel_size": 5, "position": "rotate", "mlp_ratio": 1.5}, [2, 4, 8, 16]),
        ({"norm": "ln", "activation": "relu", "layer_scale": 1e-5}, [2, 4, 8, 16]),
        ({"in_chans": 1, "num_classes": 0, "head_width": 7}, [2, 4, 8, 16]),
    ],
    ids=str,
)
def test_any_configuration_can_be_trained(tiny, fields, pconv_channels):
    model = create_model("fasternet_t0", **{**tiny, **fields})
    assert [stage.blocks[0].pconv.partial_channels for stage in model.stages] == pconv_channels
    y = model(torch.randn(2, model.config.in_chans, 64, 64))
    assert y.shape == (2, model.config.num_classes or model.config.head_width)
    y.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_position_says_which_channels_each_block_convolves(tiny):
    fields = {**tiny, "depths": (1, 1, 6, 1)}

    def starts(position):
        stage = create_model("fasternet_t0", position=position, **fields).stages[2]
        return [block.pconv.start for block in stage.blocks]

    assert starts("first") == [0] * 6
    assert starts("last") == [24] * 6
    assert starts("rotate") == [0, 8, 16, 24, 0, 8]


def test_layer_norm_stands_in_place_of_every_batch_norm(tiny):
    model = create_model("fasternet_t0", norm="ln", **tiny)
    reference = create_model("fasternet_t0", **tiny)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert list(norms) == [name for name, module in reference.named_modules() if isinstance(module, nn.BatchNorm2d)]
    norm = norms["stages.1.merging.norm"]
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 16, 3, 5)
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
    expected = (x - mean) / (var + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    assert torch.allclose(norm(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"width": 0}, "width must be a positive integer, got 0"),
        ({"width": "8"}, "width must be a positive integer, got '8'"),
        ({"head_width": -1}, "head_width must be a positive integer, got -1"),
        ({"in_chans": 0}, "in_chans must be a positive integer, got 0"),
        ({"kernel_size": 2.5}, "kernel_size must be a positive integer, got 2.5"),
        ({"kernel_size": 4}, "kernel_size must be odd and positive, got 4"),
        ({"depths": (1, 2, 3)}, "depths must be four positive integers, got (1, 2, 3)"),
        ({"depths": (1, 2, 0, 1)}, "depths must be four positive integers, got (1, 2, 0, 1)"),
        ({"depths": 4}, "depths must be four positive integers, got 4"),
        ({"activation": "silu"}, "activation 'silu' is not one of gelu, relu"),
        ({"norm": "gn"}, "norm 'gn' is not one of bn, ln"),
        ({"position": "middle"}, "position 'middle' is not one of first, last, rotate"),
        ({"partial_ratio": 0.0}, "partial_ratio must be in (0, 1], got 0.0"),
        ({"partial_ratio": 1.5}, "partial_ratio must be in (0, 1], got 1.5"),
        ({"mlp_ratio": 0.1}, "mlp_ratio 0.1 leaves no hidden channel at width 8"),
        ({"layer_scale": 0.0}, "layer_scale must be positive or None, got 0.0"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0, got -1"),
        ({"drop_rate": 1.0}, "drop_rate must be in [0, 1), got 1.0"),
        ({"drop_path_rate": -0.1}, "drop_path_rate must be in [0, 1), got -0.1"),
    ],
    ids=str,
)
def test_wrong_field_is_named_with_what_is_allowed(tiny, fields, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        create_model("fasternet_t0", **{**tiny, **fields})


@pytest.mark.parametrize(
    ("name", "num_params", "macs"),
    [
        ("fasternet_t0", 3_905_500, 335.42e6),
        ("fasternet_t1", 7_595_368, 850.51e6),
        ("fasternet_t2", 14_982_888, 1904.33e6),
        ("fasternet_s", 31_181_032, 4549.74e6),
        ("fasternet_m", 53_521_464, 8721.94e6),
        ("fasternet_l", 93_465_192, 15494.38e6),
    ],
)
def test_variants_cost_what_the_published_networks_cost(name, num_params, macs):
    with torch.device("meta"):
        costs = count_costs(create_model(name))
    assert costs.num_params == num_params
    assert costs.macs == pytest.approx(macs, abs=5e3)


def test_variant_t0_star_costs_what_table5_needs():
    with torch.device("meta"):
        model = create_model("fasternet_t0", width=42, partial_ratio=1 / 8)
    assert count_costs(model).macs == pytest.approx(338.78e6, abs=5e3)


def test_drop_path_rates_grow_linearly_over_all_blocks(tiny):
    model = create_model("fasternet_t0", drop_path_rate=0.3, **{**tiny, "depths": (1, 2, 3, 1)})
    rates = [module.p for module in model.modules() if isinstance(module, StochasticDepth)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3])


def test_drop_path_drops_whole_rows_in_training_only(tiny):
    torch.manual_seed(0)
    block = create_model("fasternet_t0", drop_path_rate=0.5, **tiny).stages[3].blocks[-1].eval()
    x = torch.randn(64, 64, 3, 3)
    with torch.no_grad():
        whole = block(x)
        assert torch.equal(block(x), whole)
        block.drop_path.train()
        y = block(x)
    dropped = (y == x).flatten(1).all(1)
    assert 16 < dropped.sum() < 48
    kept = x + 2 * (whole - x)
    assert torch.allclose(y[~dropped], kept[~dropped], atol=1e-6)


def test_drop_rate_acts_before_the_classifier_in_training_only(tiny):
    model = create_model("fasternet_t0", drop_rate=0.5, **tiny).eval()
    x = torch.randn(2, 64, 1, 1)
    assert torch.equal(model.forward_head(x), model.forward_head(x))
    model.head.train()
    assert (model.forward_head(x, pre_logits=True) == 0).float().mean() > 0.2


@pytest.mark.parametrize("norm", ["bn", "ln"])
def test_gradient_checkpointing_changes_nothing_but_memory(tiny, norm):
    model = create_model("fasternet_t0", norm=norm, drop_path_rate=0.3, **tiny)
    frugal = copy.deepcopy(model)
    frugal.set_grad_checkpointing(True)
    x = torch.randn(4, 3, 64, 64)
    num_runs = []
    for network in (model, frugal):
        calls = []
        network.stages[2].blocks[1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(0)
        network(x).square().sum().backward()
        num_runs.append(len(calls))
    assert num_runs == [1, 2]
    for (name, a), b in zip(model.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(model.named_buffers(), frugal.buffers(), strict=True):
        assert torch.equal(a, b), name
    frugal.set_grad_checkpointing(False)
    calls.clear()
    frugal(x).sum().backward()
    assert len(calls) == 1


def test_reset_classifier_replaces_the_last_layer_alone(tiny):
    model = create_model("fasternet_t0", **tiny).to(torch.bfloat16).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.reset_classifier(7)
    assert model.config.num_classes == 7
    assert model.get_classifier().weight.shape == (7, 16)
    assert model.get_classifier().weight.dtype == torch.bfloat16
    assert not model.get_classifier().training
    assert not model.get_classifier().bias.any()
    kept = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("head.fc")}
    assert len(kept) == len(before) - 2
    assert all(torch.equal(tensor, before[key]) for key, tensor in kept.items())
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).shape == (2, 16)
    model.reset_classifier(3)
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).shape == (2, 3)


def test_backbone_has_no_classifier_and_says_so(tiny):
    model = create_model("fasternet_t0", features_only=True, **tiny)
    assert model.get_classifier() is None
    with pytest.raises(ValueError, match="features_only has no classifier"):
        model.reset_classifier(3)
    with pytest.raises(ValueError, match="features_only has no head"):
        model.forward_head(torch.zeros(1, 64, 1, 1))


def test_fresh_weights_are_normal_with_std_of_two_hundredths():
    torch.manual_seed(0)
    model = create_model("fasternet_t0", width=32, depths=(1, 1, 1, 1), num_classes=100)
    model.reset_classifier(200)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | PConv2d)]
    assert len(layers) == 4 + 4 * 3 + 2
    for layer in layers:
        expected = 0.02 * layer.weight.numel() ** -0.5
        assert abs(layer.weight.mean()) < 5 * expected
        assert layer.weight.std().item() == pytest.approx(0.02, abs=5 * expected)
    assert not model.head.fc.bias.any()


def test_variants_stay_as_they_are():
    with pytest.raises(TypeError):
        VARIANTS["fasternet_t0"] = VARIANTS["fasternet_t1"]
    assert create_model("fasternet_t0", depths=[1, 2, 8, 2], width=8).config.depths == (1, 2, 8, 2)
