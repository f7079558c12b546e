"""CycleMLP: the Cycle FC against a deformable convolution, the weighted branches, and export."""

import pytest
import torch
from torch import nn
from torchvision.ops import deform_conv2d

from fasternet.rivals import create_rival
from fasternet.rivals.cyclemlp import DEPTHS, CycleFC, CycleMixer, CycleMLP, order_channels


@pytest.mark.parametrize(("stepsize", "channels"), [(7, 16), (3, 16), (4, 6), (7, 3)])
@pytest.mark.parametrize("axis", [1, 2])
def test_cycle_fc_is_a_deformable_convolution(axis, stepsize, channels):
    torch.manual_seed(0)
    layer, x = CycleFC(channels, axis=axis, stepsize=stepsize), torch.randn(2, 9, 5, channels)
    weight = torch.empty(channels, channels)
    weight[:, order_channels(channels, stepsize)] = layer.fc.weight.detach()
    offsets = torch.zeros(channels, 2)
    offsets[:, axis - 1] = (torch.arange(channels) + stepsize // 2) % stepsize - stepsize // 2
    expected = deform_conv2d(
        x.permute(0, 3, 1, 2), offsets.reshape(1, -1, 1, 1).repeat(2, 1, 9, 5), weight[..., None, None], layer.fc.bias
    )
    torch.testing.assert_close(layer(x), expected.permute(0, 2, 3, 1))


def test_cycle_fc_reads_zero_outside_of_the_map():
    layer = CycleFC(7, axis=1)
    nn.init.eye_(layer.fc.weight)
    nn.init.zeros_(layer.fc.bias)
    y = layer(torch.ones(1, 5, 1, 7))[0, :, 0].T
    assert order_channels(7, 7) == [4, 5, 6, 0, 1, 2, 3]  # offsets -3 to 3
    expected = [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1] * 5]
    assert y.tolist() == [*expected, *(row[::-1] for row in expected[2::-1])]


def test_branches_are_weighted_by_channel():
    torch.manual_seed(0)
    mixer, x = CycleMixer(8), torch.randn(2, 6, 5, 8)
    nn.init.zeros_(mixer.reweight[-1].weight)
    for index, branch in enumerate((mixer.cycle_w, mixer.cycle_h, mixer.plain)):
        nn.init.zeros_(mixer.reweight[-1].bias)
        mixer.reweight[-1].bias.data.view(8, 3)[:, index] = 1000
        torch.testing.assert_close(mixer(x), mixer.proj(branch(x)))


def test_network_takes_any_size_and_drops_paths():
    network = CycleMLP((1, 1, 1, 2), 5, drop_path_rate=0.4).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 3, 96, 70)).shape == (2, 5)
    rates = [block.drop_path.p for stage in network.stages for block in stage]
    torch.testing.assert_close(rates, [0.0, 0.1, 0.2, 0.3, 0.4], rtol=0, atol=1e-6)
    assert DEPTHS["cyclemlp_b1"] == (2, 2, 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PVT-Tiny", "CycleMLP-B1"])
def test_export_runs_in_onnxruntime(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, x = create_rival(name), torch.randn(1, 3, 224, 224)
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = model(x)
    assert (torch.from_numpy(logits) - expected).abs().max() < 1e-5 * expected.abs().max()
