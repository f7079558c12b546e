"""create_runtime and choose_engine with networks that return feature maps."""

import pytest
import torch
from torch import nn

from fasternet.deploy import choose_engine, create_runtime, explain_engine
from fasternet.models import create_model
from fasternet.rivals import randomize_batch_norm

LIMITS = {"fp32": 1e-4, "bf16": 5e-2}
CHANNELS = (8, 16, 32, 64)


class Pair(nn.Module):
    """Two convolutions beside one another, whose maps differ in size."""

    def __init__(self, num_maps=2):
        super().__init__()
        self.num_maps = num_maps
        self.fine, self.coarse = nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, x):
        return [self.fine(x), self.coarse(x)][: self.num_maps]


def create_fasternet():
    model = create_model("fasternet_t0", width=8, depths=(1, 1, 1, 1), features_only=True, feature_norm=True)
    return randomize_batch_norm(model, torch.randn(8, 3, 64, 48)).eval()


def check(runtime, model, x, limit):
    with torch.no_grad():
        expected = model(x)
    maps = runtime(x)
    assert isinstance(maps, list)
    assert [tuple(y.shape) for y in maps] == [tuple(y.shape) for y in expected]
    for y, z in zip(maps, expected, strict=True):
        assert y.dtype == torch.float32
        assert (y - z).abs().max() <= limit * z.abs().max()
    kept = [y.clone() for y in maps]
    fewer = runtime(-x[1:])
    assert [len(y) for y in fewer] == [len(x) - 1] * len(maps)
    assert all(torch.equal(y, z) for y, z in zip(maps, kept, strict=True))  # no later call writes into them


@pytest.mark.parametrize("create", [create_fasternet, Pair])
@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        ("eager", "fp32"),
        ("eager", "bf16"),
        ("cpu", "fp32"),
        ("cpu", "bf16"),
        ("onnxruntime", "fp32"),
        pytest.param("openvino", "fp32", marks=pytest.mark.slow),
        pytest.param("openvino", "bf16", marks=pytest.mark.slow),
        pytest.param("compile", "fp32", marks=pytest.mark.slow),
    ],
)
def test_engine_gives_the_maps(engine, precision, create):
    if reason := explain_engine(engine, precision):
        pytest.skip(reason)
    if engine == "cpu" and create is Pair:
        pytest.skip("engine cpu runs a FasterNet alone")
    model, x = create(), torch.randn(2, 3, 64, 48)
    check(create_runtime(model, x, engine=engine, precision=precision), model, x, LIMITS[precision])


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_one_map_stays_a_list(engine):
    if reason := explain_engine(engine):
        pytest.skip(reason)
    model, x = Pair(1), torch.randn(2, 3, 32, 32)
    check(create_runtime(model, x, engine=engine), model, x, 1e-5)


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_other_outputs_are_refused(engine):
    if reason := explain_engine(engine):
        pytest.skip(reason)

    class Named(Pair):
        def forward(self, x):
            return dict(enumerate(super().forward(x)))

    with pytest.raises(ValueError, match="no tensor of logits and no list of feature maps, but a dict") as caught:
        create_runtime(Named(), torch.zeros(1, 3, 32, 32), engine=engine)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_engine_for_maps_is_chosen():
    model, x = Pair(), torch.randn(1, 3, 64, 64)
    choice = choose_engine(model, x, candidates=("eager", "openvino"), remember=False)
    trials = {trial.engine: trial for trial in choice.trials}
    assert trials["eager"].difference <= 1e-6
    assert choice.engine in trials
    assert len(choice.runtime(x)) == 2


def test_engine_with_a_wrong_map_is_left_out(monkeypatch):
    class Wrong:
        def __call__(self, x):
            first, second = Pair.forward(model, x)
            return [first, second * 1.01]

    model, x = Pair(), torch.randn(1, 3, 64, 64)
    monkeypatch.setattr("fasternet.deploy.auto.create_runtime", lambda *_, **__: Wrong())
    with pytest.raises(ValueError, match=r"wrong: it differs by .* of the largest output from eager"):
        choose_engine(model, x, candidates=("eager",), remember=False)
    monkeypatch.setattr(Wrong, "__call__", lambda self, x: Pair.forward(model, x)[:1])
    with pytest.raises(ValueError, match=r"wrong: it has 1 outputs instead of 2"):
        choose_engine(model, x, candidates=("eager",), remember=False)
