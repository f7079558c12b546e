"""optimize_for_inference: the same function, on every configuration; what it refuses and explains."""

import pytest
import timm
import torch
from torch import nn

from fasternet.deploy import explain_engine, from_timm, optimize_for_inference
from fasternet.models import create_model


def randomise(model):
    """Give every BN statistics and affine parameters that a wrong fold would show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def require(engine, precision="fp32"):
    if (reason := explain_engine(engine, precision)) is not None:
        pytest.skip(reason)


def relative_difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", ["fasternet_t0", "fasternet_t1", "fasternet_t2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_optimize_keeps_the_function(name, batch_size):
    model = randomise(create_model(name))
    x = torch.randn(batch_size, 3, 64, 96)
    before = x.clone()
    optimized = optimize_for_inference(model, batch_size=batch_size)
    with torch.no_grad():
        expected = model(x)
        assert expected.isfinite().all()
        assert relative_difference(optimized(x), expected) <= 1e-5
        assert relative_difference(optimized(x.to(memory_format=torch.channels_last)), expected) <= 1e-5
        assert torch.equal(optimized(x), optimized(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "ln"},
        {"layer_scale": 0.5},
        {"position": "rotate"},
        {"position": "last", "partial_ratio": 0.5},
        {"partial_ratio": 1.0, "kernel_size": 5, "in_chans": 1},
        {"features_only": True, "feature_norm": True},
        {"features_only": True, "out_indices": (1, 3)},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_optimize_keeps_the_function_of_any_configuration(options):
    model = randomise(create_model("fasternet_t0", width=12, **options))
    x = torch.randn(2, options.get("in_chans", 3), 65, 48)
    for batch_size in (1, 2):
        with torch.no_grad():
            expected, found = model(x), optimize_for_inference(model, batch_size=batch_size)(x)
        if not isinstance(expected, list):
            expected, found = [expected], [found]
        for a, b in zip(found, expected, strict=True):
            assert relative_difference(a, b) <= 1e-5


def test_optimize_takes_timm_networks():
    model = randomise(timm.create_model("fasternet_t0", layer_scale_init_value=0.3, num_classes=7))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_difference(optimize_for_inference(model)(x), model(x)) <= 1e-5
        assert torch.equal(from_timm(model)(x), model(x))


def test_optimize_leaves_the_callers_model_alone():
    model = create_model("fasternet_t0", width=8).train()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimize_for_inference(model)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_optimize_folds_every_batch_norm():
    optimized = optimize_for_inference(create_model("fasternet_t0", width=8))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in optimized.modules())
    assert not any(parameter.requires_grad for parameter in optimized.parameters())


def test_optimize_gives_reasons():
    reasons = optimize_for_inference(create_model("fasternet_t0", width=8)).reasons
    assert "folded" in reasons["norm"]
    assert "LayerNorm kept" in optimize_for_inference(create_model("fasternet_t0", width=8, norm="ln")).reasons["norm"]
    assert set(reasons) == {"norm", "block", "pointwise", "shortcut", "activation", "memory_format"}
    assert reasons["pointwise"].startswith("matrix products")
    many = optimize_for_inference(create_model("fasternet_t0", width=8), batch_size=32).reasons
    assert many["pointwise"].startswith("convolutions")


@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_optimized_network_refuses_training_and_records_no_gradient(engine):
    require(engine)
    optimized = optimize_for_inference(create_model("fasternet_t0", width=8), engine=engine)
    with pytest.raises(ValueError, match="inference only"):
        optimized.train()
    assert optimized.eval() is optimized
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert not optimized(x).requires_grad


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        (nn.Linear(2, 2), {}, "Linear"),
        (None, {"engine": "magic"}, "engine 'magic' is not one of"),
        (None, {"batch_size": 0}, "batch_size"),
        (None, {"precision": "bf16"}, "precision and threads are options of engine cpu"),
        (None, {"threads": 2}, "precision and threads are options of engine cpu"),
        (None, {"engine": "cpu", "threads": 0}, "threads must be an integer from 1 to 1024, not 0|library"),
        (None, {"engine": "cpu", "precision": "int8"}, "precision must be one of fp32, bf16"),
    ],
)
def test_optimize_refuses_with_the_argument_named(model, options, match):
    with pytest.raises(ValueError, match=match):
        optimize_for_inference(model or create_model("fasternet_t0", width=8), **options)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_cpu_engine_keeps_the_function(precision, limit):
    require("cpu", precision)
    model = randomise(create_model("fasternet_t0", width=8))
    x = torch.randn(2, 3, 64, 96)
    optimized = optimize_for_inference(model, engine="cpu", precision=precision)
    with torch.no_grad():
        assert relative_difference(optimized(x), model(x)) <= limit
    assert set(optimized.reasons) == {"engine", "norm", "isa"}


def test_bf16_without_hardware_is_refused_with_the_reason(monkeypatch):
    require("cpu")
    monkeypatch.setattr("fasternet.native.explain_native", lambda isa=None, precision="fp32": "the processor lacks it")
    with pytest.raises(ValueError, match="the processor lacks it"):
        optimize_for_inference(create_model("fasternet_t0", width=8), engine="cpu", precision="bf16")


def test_auto_takes_the_faster_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fasternet.deploy.optimize.TRIAL_SIZE", 32)
    model = randomise(create_model("fasternet_t0", width=8, depths=(1, 1, 1, 1), head_width=16))
    optimized = optimize_for_inference(model, engine="auto")
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert relative_difference(optimized(x), model(x)) <= 1e-5
    assert "choice" in optimized.reasons


def test_auto_has_no_choice_in_bf16():
    require("cpu", "bf16")
    optimized = optimize_for_inference(create_model("fasternet_t0", width=8), engine="auto", precision="bf16")
    assert optimized.reasons["choice"] == "no choice: in bf16 the engine cpu alone gives a module"


def test_auto_tries_on_the_weights_device(monkeypatch):
    def choose(model, example, **options):
        raise ValueError(f"tried on {example.device}")

    monkeypatch.setattr("fasternet.deploy.auto.choose_engine", choose)
    with pytest.raises(ValueError, match="tried on meta"):
        optimize_for_inference(create_model("fasternet_t0", width=8).to("meta"), engine="auto")


def test_optimized_network_exports_to_the_same_function():
    model = randomise(create_model("fasternet_t0", width=8, num_classes=5))
    optimized = optimize_for_inference(model)
    x = torch.randn(1, 3, 64, 64)
    exported = torch.export.export(optimized, (x,)).module()
    with torch.no_grad():
        assert relative_difference(exported(x), model(x)) <= 1e-5
