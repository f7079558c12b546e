"""use_native_blocks: the same function in any network, what it replaces, what it keeps and why."""

import copy

import pytest
import timm
import torch
from torch import nn

from fasternet import PConv2d, create_model, native, optimize_for_inference
from fasternet.deploy.blocks import NATIVE, NativeBlock, use_native_blocks

pytestmark = pytest.mark.skipif(native.explain_native() is not None, reason=str(native.explain_native()))

TIMM = "fasternet_t0"


def create_narrow(**options):
    return create_model("fasternet_t0", width=8, depths=(1, 1, 1, 1), head_width=16, **options)


def randomise(model):
    """Give norms and scales values that a wrong fold would show."""
    for name, tensor in model.state_dict().items():
        if "running_var" in name or "layer_scale" in name:
            tensor.uniform_(0.5, 2)
        elif "norm" in name and tensor.is_floating_point():
            tensor.normal_(1, 0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def check_same(model, x, example=None):
    """Convert; the function stays, and so does the given model. Returns the converted network."""
    model = randomise(model)
    state = copy.deepcopy(model.state_dict())
    fast = use_native_blocks(model, example)
    with torch.no_grad():
        expected = model(x)
    found = fast(x)
    pairs = zip(found, expected, strict=True) if isinstance(expected, list) else [(found, expected)]
    for a, b in pairs:
        assert b.isfinite().all()
        assert ((a - b).abs().max() / b.abs().max()).item() <= 1e-5
        assert not a.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    return fast


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("options", [{}, {"features_only": True}], ids=["classifier", "features"])
@pytest.mark.parametrize("folded", [False, True])
def test_timm_network_stays_the_same_function(options, folded):
    x = torch.randn(2, 3, 64, 96)
    fast = check_same(timm.create_model(TIMM, drop_path_rate=0.1, **options), x, x[:1] if folded else None)
    assert count(fast, NativeBlock) == 13
    assert list(fast.reasons.values()) == [NATIVE] * 13
    assert count(fast, nn.BatchNorm2d) == (0 if folded else 4)


@pytest.mark.parametrize(
    "options", [{"layer_scale": 0.5}, {"activation": "relu", "kernel_size": 5}, {"position": "rotate"}]
)
def test_own_network_stays_the_same_function(options):
    fast = check_same(create_narrow(drop_path_rate=0.2, **options), torch.randn(2, 3, 67, 45))
    assert count(fast, NativeBlock) == 4
    assert not fast.training


def test_layer_scale_of_timm_is_folded():
    fast = check_same(timm.create_model(TIMM, layer_scale_init_value=1.0), torch.randn(1, 3, 64, 64))
    assert set(fast.reasons.values()) == {NATIVE}


def test_network_that_merely_contains_pconv():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU())
            self.mix = PConv2d(12, kernel_size=5, position="last")
            self.timm = timm.models.fasternet.Partial_conv3(12, 4, "slicing")
            self.wide = PConv2d(12, dilation=2)
            self.out = nn.Conv2d(12, 5, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.out(self.mix(x) + self.wide(self.timm(x)) + self.mix(x.flip(3)))

    fast = check_same(Net(), torch.randn(2, 3, 17, 23))
    assert fast.reasons["mix"] == fast.reasons["timm"] == NATIVE
    assert fast.mix.impl == fast.timm.impl == "native"
    assert "dilation is 2" in fast.reasons["wide"]
    assert set(fast.reasons) == {"mix", "timm", "wide"}


def test_blocks_that_cannot_be_converted_are_kept_with_the_reason():
    class Own(PConv2d):
        """Computes something else."""

        def forward(self, x):
            return -super().forward(x)

    model = create_narrow()
    blocks = [stage.blocks[0] for stage in model.stages]
    blocks[0].pwconv1.register_forward_hook(lambda *_: None)
    blocks[1].act = nn.GELU(approximate="tanh")
    blocks[2].pconv = Own(32)
    blocks[3].norm = nn.GroupNorm(1, 128)
    fast = check_same(model, torch.randn(1, 3, 64, 64))
    assert count(fast, NativeBlock) == 0
    for i, match in enumerate(("hooks", "GELU", "Own has taken", "GroupNorm")):
        reason = fast.reasons[f"stages.{i}.blocks.0"]
        assert reason.startswith("kept: ")
        assert match in reason
        assert (fast.reasons[f"stages.{i}.blocks.0.pconv"] == NATIVE) == (i != 2)


def test_layer_norm_keeps_the_block_and_converts_its_pconv():
    fast = check_same(create_narrow(norm="ln"), torch.randn(1, 3, 64, 64))
    assert "LayerNorm2d" in fast.reasons["stages.0.blocks.0"]
    assert fast.reasons["stages.0.blocks.0.pconv"] == NATIVE


def test_other_types_and_other_networks_are_kept():
    fast = use_native_blocks(create_narrow().to(torch.bfloat16))
    assert all("torch.bfloat16" in reason for reason in fast.reasons.values())
    with torch.no_grad():
        assert fast(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    x = torch.randn(1, 3, 8, 8)
    assert use_native_blocks(plain).reasons == {}
    assert torch.equal(use_native_blocks(plain)(x), plain(x))


def test_a_block_alone_and_one_used_twice():
    block = randomise(create_narrow()).stages[0].blocks[0]
    x = torch.randn(1, 8, 9, 9)
    assert isinstance(check_same(block, x), NativeBlock)
    fast = check_same(nn.Sequential(block, nn.ReLU(), block), x)
    assert fast[0] is fast[2]


def test_a_network_converted_or_optimised_before():
    model = randomise(create_narrow())
    fast = use_native_blocks(use_native_blocks(model))
    assert list(fast.reasons.values()) == [NATIVE] * 4
    slow = use_native_blocks(optimize_for_inference(model))
    assert all("optimised for eager" in reason for reason in slow.reasons.values())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(fast(x), slow(x), rtol=1e-4, atol=1e-5)


def test_result_records_no_gradient_and_takes_checkpointing_off():
    model = create_narrow()
    model.set_grad_checkpointing()
    x = torch.randn(1, 3, 32, 32)
    fast = check_same(model, x)
    assert not any(p.requires_grad for p in fast.parameters())
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="no gradient"):
        fast(x.requires_grad_())


def test_result_copies_saves_compiles_and_exports():
    x = torch.randn(1, 3, 64, 64)
    fast = check_same(create_narrow(), x)
    y = fast(x)
    assert torch.equal(copy.deepcopy(fast)(x), y)
    other = use_native_blocks(create_narrow().eval())
    other.load_state_dict(fast.state_dict())
    torch.testing.assert_close(other(x), y)
    torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), y)
    torch.testing.assert_close(torch.export.export(fast, (x,)).module()(x), y)
    with torch.inference_mode():
        torch.testing.assert_close(use_native_blocks(create_narrow().eval())(x).shape, y.shape)


def test_engine_that_cannot_run_is_said_before_anything_is_copied(monkeypatch):
    monkeypatch.setattr(native, "explain_native", lambda *_: "the C++ library was not built")
    with pytest.raises(ValueError, match=r"the C\+\+ library was not built"):
        use_native_blocks(create_narrow())
