"""The operators that PConv is compared with; the T-shaped convolution against a dense one with zeros."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fasternet.ops.pconv import PConv2d
from fasternet.ops.reference_ops import OPERATORS, WIDTHS, TConv2d, create_operator, tconv2d
from fasternet.paper import load_table


def dense_weight(weight: torch.Tensor, centre_weight: torch.Tensor) -> torch.Tensor:
    """The k x k filters over all channels that a T-shaped convolution stands for."""
    k = weight.shape[-1]
    return torch.cat([weight, F.pad(centre_weight, (k // 2,) * 4)], dim=1)


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 12),
    out_channels=st.integers(1, 9),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    kernel_size=st.sampled_from([1, 3, 5]),
    channels_last=st.booleans(),
    data=st.data(),
)
def test_tconv2d_equals_the_dense_convolution_with_gradients(
    channels, out_channels, height, width, kernel_size, channels_last, data
):
    partial_channels = data.draw(st.integers(1, channels))
    generator = torch.Generator().manual_seed(channels * 1000 + height * 10 + width)
    shapes = (
        (2, channels, height, width),
        (out_channels, partial_channels, kernel_size, kernel_size),
        (out_channels, channels - partial_channels, 1, 1),
    )
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    x, weight, centre_weight = inputs
    x_used = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    expected = F.conv2d(x, dense_weight(weight, centre_weight), padding=kernel_size // 2)
    actual = tconv2d(x_used, weight, centre_weight)
    torch.testing.assert_close(actual, expected)

    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    # an empty centre_weight (Cp = C) takes no part in the function, so its gradient may be missing
    wanted = torch.autograd.grad(expected, inputs, upstream, materialize_grads=True)
    found = torch.autograd.grad(actual, inputs, upstream, materialize_grads=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_tconv2d_reaches_only_the_centre_beyond_the_partial_channels():
    x = torch.zeros(1, 8, 5, 5)
    x[:, :, 2, 2] = torch.randn(8)
    layer = TConv2d(8)
    x[:, :2] = 0  # only channels that see the centre alone are left
    y = layer(x)
    assert y[..., 2, 2].abs().min() > 0
    y[..., 2, 2] = 0
    assert torch.count_nonzero(y) == 0


def test_tconv2d_leaves_its_input_alone():
    x = torch.randn(2, 8, 5, 6)
    before = x.clone()
    with torch.inference_mode():
        TConv2d(8)(x)
    assert torch.equal(x, before)


def test_tconv2d_init_has_the_scale_of_a_dense_convolution_with_as_many_inputs():
    torch.manual_seed(0)
    layer = TConv2d(64)
    bound = (64 // 4 * 9 + 48) ** -0.5
    for weight in (layer.weight, layer.centre_weight):
        assert 0.99 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 8, 4, 4), (8, 2, 3, 3), (8, 5, 1, 1)], "x has 8 channels, the weights have 2 \\+ 5"),
        ([(1, 8, 4, 4), (8, 2, 2, 2), (8, 6, 1, 1)], "odd kernel size, got 2"),
    ],
)
def test_tconv2d_names_what_does_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        tconv2d(*(torch.zeros(shape) for shape in shapes))


def test_tconv2d_module_refuses_even_kernels_and_bad_ratios():
    with pytest.raises(ValueError, match="kernel_size must be odd and positive, got 4"):
        TConv2d(8, kernel_size=4)
    with pytest.raises(ValueError, match="partial_ratio"):
        TConv2d(8, 1.5)


@pytest.mark.parametrize("name", OPERATORS)
def test_create_operator_keeps_the_shape_and_has_no_bias(name):
    operator, channels = create_operator(name, 32), 32 * WIDTHS.get(name, 1)
    assert operator(torch.randn(2, channels, 5, 7)).shape == (2, channels, 5, 7)
    assert all(parameter.dim() == 4 for parameter in operator.parameters())


def test_create_operator_knows_every_operator_of_table_1():
    assert {row["operator"] for row in load_table("table1_operators")} <= set(OPERATORS)


@pytest.mark.parametrize(
    ("name", "num_weights"),
    [
        ("conv3x3", 9 * 32 * 32),
        ("gconv3x3_16groups", 9 * 32 * 2),
        ("dwconv3x3", 9 * 32),
        ("dwconv3x3_2x", 9 * 64),
        ("dwconv3x3_4x", 9 * 128),
        ("dwconv3x3_6x", 9 * 192),
        ("dwconv3x3+pwconv", 9 * 32 + 32 * 32),
        ("pwconv", 32 * 32),
        ("tconv3x3_r1/4", 9 * 8 * 32 + 24 * 32),
        ("pconv3x3_r1/4", 9 * 8 * 8),
        ("pconv3x3_r1/4+pwconv", 9 * 8 * 8 + 32 * 32),
    ],
)
def test_create_operator_has_the_weights_of_its_definition(name, num_weights):
    assert sum(parameter.numel() for parameter in create_operator(name, 32).parameters()) == num_weights


@pytest.mark.parametrize("name", ["pconv3x3_r1/4", "pconv3x3_r1/4+pwconv"])
def test_create_operator_hands_options_to_pconv(name):
    operator = create_operator(name, 16, impl="slicing")
    assert [m.impl for m in operator.modules() if isinstance(m, PConv2d)] == ["slicing"]


def test_create_operator_names_what_is_allowed():
    with pytest.raises(ValueError, match="operator 'conv' is not one of conv3x3, "):
        create_operator("conv", 32)
    with pytest.raises(ValueError, match="channels must be a multiple of the 16 groups, got 24"):
        create_operator("gconv3x3_16groups", 24)
