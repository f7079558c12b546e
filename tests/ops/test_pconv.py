"""PConv: every implementation against the oracle, forward and gradients, and what the operator refuses."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasternet.ops import PConv2d, list_impls, pconv2d, pconv2d_, select_impl

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
FORMATS = (torch.contiguous_format, torch.channels_last)
SHAPES = (  # N, C, H, W, Cp, k
    (2, 16, 8, 8, 4, 3),
    (1, 7, 5, 9, 1, 3),
    (1, 6, 4, 3, 6, 3),
    (3, 10, 1, 1, 2, 3),
    (1, 40, 7, 7, 10, 5),
    (2, 9, 6, 11, 2, 1),
)


def plain_pconv(x, weight, start):
    """An independent computation in float64, one channel group at a time."""
    y = x.double().clone()
    stop = start + weight.shape[0]
    y[:, start:stop] = F.conv2d(x.double()[:, start:stop], weight.double(), padding=weight.shape[-1] // 2)
    return y


def relative_difference(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def draw(shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    n, c, h, w, cp, k = shape
    x = torch.randn(n, c, h, w).to(dtype).to(memory_format=memory_format)
    return x, (torch.randn(cp, cp, k, k) / (cp * k * k) ** 0.5).to(dtype)


@pytest.mark.parametrize("impl", list_impls())
def test_pconv2d_equals_plain_computation(impl):
    cases = list(itertools.product(SHAPES, TOLERANCE, FORMATS))
    assert len(cases) == 36
    for shape, dtype, memory_format in cases:
        x, weight = draw(shape, dtype, memory_format)
        for start in {0, shape[1] - shape[4]}:
            y = pconv2d(x, weight, impl=impl, start=start)
            assert relative_difference(y, plain_pconv(x, weight, start)) <= TOLERANCE[dtype], (shape, dtype)
            untouched = [i for i in range(shape[1]) if not start <= i < start + shape[4]]
            assert torch.equal(y[:, untouched], x[:, untouched])


@pytest.mark.parametrize("impl", list_impls())
def test_pconv2d_never_modifies_or_aliases_its_input(impl):
    for shape in SHAPES:
        x, weight = draw(shape)
        before = x.clone()
        y = pconv2d(x, weight, impl=impl)
        assert torch.equal(x, before)
        y.fill_(float("nan"))
        assert torch.equal(x, before)


@pytest.mark.parametrize("impl", list_impls())
@pytest.mark.parametrize("memory_format", FORMATS)
def test_pconv2d_gradients_equal_plain_computation(impl, memory_format):
    for shape in SHAPES:
        x, weight = draw(shape, memory_format=memory_format)
        y = torch.randn_like(x)
        gradients = []
        for function in (lambda a, b: pconv2d(a, b, impl=impl).double(), lambda a, b: plain_pconv(a, b, 0)):
            a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
            (function(a, b) * y).sum().backward()
            gradients.append((a.grad, b.grad))
        for ours, plain in zip(*gradients, strict=True):
            assert relative_difference(ours, plain) <= 1e-5


@settings(max_examples=25, deadline=None)
@given(
    channels=st.integers(1, 12),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    dilation=st.integers(1, 3),
    kernel_size=st.sampled_from([1, 3, 5]),
    data=st.data(),
)
def test_pconv2d_implementations_agree(channels, height, width, dilation, kernel_size, data):
    partial = data.draw(st.integers(1, channels))
    start = data.draw(st.integers(0, channels - partial))
    x, weight = draw((1, channels, height, width, partial, kernel_size))
    oracle = pconv2d(x, weight, impl="split_cat", dilation=dilation, start=start)
    for impl in list_impls():
        y = pconv2d(x, weight, impl=impl, dilation=dilation, start=start)
        torch.testing.assert_close(y, oracle, rtol=1e-5, atol=1e-6)
    assert oracle.shape == x.shape


def test_pconv2d_leaves_a_shortcut_intact():
    x, weight = draw(SHAPES[0])
    for impl in list_impls():
        shortcut = x
        y = shortcut + pconv2d(x, weight, impl=impl)
        assert relative_difference(y, x + plain_pconv(x, weight, 0)) < 1e-6


def test_pconv2d_inplace_overwrites_its_input():
    x, weight = draw(SHAPES[0])
    expected = pconv2d(x, weight)
    y = pconv2d_(x, weight)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(x, expected)


@pytest.mark.parametrize("which", ["x", "weight"])
def test_pconv2d_inplace_refuses_where_autograd_needs_its_input(which):
    x, weight = draw(SHAPES[0])
    (x if which == "x" else weight).requires_grad_()
    before = x.detach().clone()
    with pytest.raises(ValueError, match="autograd"):
        pconv2d_(x, weight)
    assert torch.equal(x.detach(), before)
    with torch.no_grad():
        pconv2d_(x.detach(), weight)


@pytest.mark.parametrize(
    ("x", "weight", "options", "match"),
    [
        ((4, 8, 8), (2, 2, 3, 3), {}, "N, C, H, W"),
        ((1, 4, 8, 8), (2, 3, 3, 3), {}, "Cp, Cp, k, k"),
        ((1, 4, 8, 8), (2, 2, 2, 2), {}, "odd"),
        ((1, 4, 8, 8), (5, 5, 3, 3), {}, "4 channels"),
        ((1, 4, 8, 8), (2, 2, 3, 3), {"start": 3}, "3 to 5"),
        ((1, 4, 8, 8), (2, 2, 3, 3), {"dilation": 0}, "dilation"),
        ((1, 4, 8, 8), (2, 2, 3, 3), {"impl": "magic"}, "split_cat"),
    ],
)
def test_pconv2d_refuses_with_the_argument_named(x, weight, options, match):
    with pytest.raises(ValueError, match=match):
        pconv2d(torch.zeros(x), torch.zeros(weight), **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"partial_ratio": 0.0}, "partial_ratio"),
        ({"partial_ratio": 1.5}, "partial_ratio"),
        ({"partial_channels": 9}, "partial_channels"),
        ({"partial_channels": 2, "partial_ratio": 0.5}, "not both"),
        ({"kernel_size": 4}, "kernel_size"),
        ({"position": "middle"}, "position"),
        ({"impl": "magic"}, "impl"),
    ],
)
def test_pconv2d_module_refuses_with_the_argument_named(options, match):
    with pytest.raises(ValueError, match=match):
        PConv2d(8, **options)


def test_pconv2d_module_refuses_another_width():
    with pytest.raises(ValueError, match="8 channels"):
        PConv2d(8)(torch.zeros(1, 9, 4, 4))


@pytest.mark.parametrize(
    ("channels", "ratio", "expected"), [(40, None, 10), (42, 1 / 8, 5), (9, 1 / 3, 3), (3, 0.25, 1), (8, 1.0, 8)]
)
def test_pconv2d_module_rounds_partial_channels_down(channels, ratio, expected):
    assert PConv2d(channels, ratio).weight.shape == (expected, expected, 3, 3)


def test_pconv2d_module_positions_convolve_what_they_say():
    x = torch.randn(1, 10, 5, 5)
    expected = {("first", 0): (0, 2), ("last", 0): (8, 10), ("rotate", 1): (2, 4), ("rotate", 6): (2, 4)}
    for (position, index), (start, stop) in expected.items():
        layer = PConv2d(10, position=position, index=index)
        with torch.no_grad():
            changed = (layer(x) != x).flatten(2).any(-1)[0]
        assert changed.nonzero().flatten().tolist() == list(range(start, stop))


def test_select_impl_gives_reasons():
    assert select_impl().impl == "split_cat"
    assert "slicing was never faster" in select_impl().reason
    assert select_impl("slicing").reason == "asked for"


@pytest.mark.parametrize("impl", ["auto", *list_impls()])
def test_pconv2d_exports_to_the_same_function(impl):
    x = torch.randn(2, 8, 6, 6)
    layer = PConv2d(8, impl=impl).eval()
    program = torch.export.export(layer, (x,))
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("impl", ["auto", *list_impls()])
def test_pconv2d_compiles_in_one_graph(impl):
    x = torch.randn(2, 8, 6, 6)
    layer = PConv2d(8, impl=impl)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).square().sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    layer(x).square().sum().backward()
    torch.testing.assert_close(gradient, layer.weight.grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_pconv2d_compiles_with_inductor():
    x = torch.randn(2, 8, 6, 6)
    for impl in list_impls():
        layer = PConv2d(8, impl=impl)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("impl", list_impls())
def test_pconv2d_under_autocast_rounds_the_convolution_only(impl):
    x = torch.randn(2, 8, 6, 6)
    net = nn.Sequential(PConv2d(8, impl=impl), nn.Conv2d(8, 4, 1))
    with torch.autocast("cpu", torch.bfloat16):
        y = net[0](x)
        z = net(x)
    assert torch.equal(y[:, 2:].to(x.dtype), x[:, 2:])
    assert relative_difference(y, plain_pconv(x, net[0].weight.detach(), 0)) < 2e-2
    z.float().sum().backward()
    assert net[0].weight.grad is not None


def test_pconv2d_module_state_and_repr():
    layer = PConv2d(8, dilation=2)
    assert list(layer.state_dict()) == ["weight"]
    assert "8, convolved=0:2, kernel_size=3, dilation=2" in repr(layer)
