"""The block for inference: without full copies, and still the oracle's function."""

import pytest
import torch
import torch.nn.functional as F

from fasternet.ops import pconv2d_
from fasternet.ops.block import BlockWeights, block_restore_, block_split_cat


def draw(channels, partial, height, width, *, kernel_size=3, start=0):
    weights = BlockWeights(
        partial=torch.randn(partial, partial, kernel_size, kernel_size) / (partial * kernel_size**2) ** 0.5,
        expand=torch.randn(2 * channels, channels, 1, 1) / channels**0.5,
        expand_bias=torch.randn(2 * channels),
        project=torch.randn(channels, 2 * channels, 1, 1) / channels**0.5,
        start=start,
        project_bias=torch.randn(channels) if start else None,
    )
    return torch.randn(2, channels, height, width), weights


@pytest.mark.parametrize("activation", [F.gelu, F.relu])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_block_restore_equals_oracle(activation, memory_format):
    for channels, partial, height, width, kernel_size, start in [
        (16, 4, 8, 8, 3, 0),
        (10, 2, 5, 7, 3, 8),
        (12, 12, 4, 4, 3, 0),
        (8, 1, 1, 1, 5, 3),
    ]:
        x, weights = draw(channels, partial, height, width, kernel_size=kernel_size, start=start)
        x = x.to(memory_format=memory_format)
        expected = block_split_cat(x, weights, activation)
        before = x.clone()
        for pointwise in ("conv", "matmul") if memory_format is torch.channels_last else ("conv",):
            given = before.clone()
            y = block_restore_(given, weights, activation, pointwise=pointwise)
            assert y.data_ptr() == given.data_ptr()
            assert ((y - expected).abs().max() / expected.abs().max()).item() < 1e-6
            assert not torch.equal(given, before)


def test_block_oracle_leaves_its_input():
    x, weights = draw(16, 4, 6, 6)
    before = x.clone()
    block_split_cat(x, weights, F.relu)
    assert torch.equal(x, before)


def test_published_inplace_form_computes_another_function():
    x, weights = draw(16, 4, 6, 6)
    expected = block_split_cat(x, weights, F.relu)
    y = pconv2d_(x.clone(), weights.partial)  # the shortcut is overwritten, as in the published inference code
    inexact = y + F.conv2d(F.relu(F.conv2d(y, weights.expand, weights.expand_bias)), weights.project)
    assert (inexact - expected).abs().max() > 0.1 * expected.abs().max()
    torch.testing.assert_close(inexact[:, 4:], expected[:, 4:], rtol=1e-4, atol=1e-5)
