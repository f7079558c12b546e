"""PConv in one and three dimensions, and PConv with PWConv in place of a convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasternet.ops import PConv2d
from fasternet.ops.pconv_nd import PConv1d, PConv3d, PConvPWConv

CASES = [(PConv1d, F.conv1d, (9,)), (PConv3d, F.conv3d, (3, 5, 4))]
OPTIONS = [{}, {"kernel_size": 5, "dilation": 2}, {"partial_ratio": 0.5, "position": "last"}, {"partial_channels": 8}]


@pytest.mark.parametrize(("module", "convolve", "size"), CASES)
@pytest.mark.parametrize("options", OPTIONS)
def test_pconv_convolves_its_part_and_passes_the_rest_on_bitwise(module, convolve, size, options):
    layer = module(8, **options)
    x = torch.randn(2, 8, *size)
    before = x.clone()
    y = layer(x)
    part = slice(layer.start, layer.start + layer.partial_channels)
    untouched = [i for i in range(8) if not part.start <= i < part.stop]
    padding = options.get("dilation", 1) * (options.get("kernel_size", 3) // 2)
    expected = convolve(x[:, part].double(), layer.weight.double(), padding=padding, dilation=layer.dilation)
    assert (y[:, part] - expected).abs().max() < 1e-5
    assert y.shape == x.shape
    assert torch.equal(y[:, untouched], x[:, untouched])
    y.fill_(float("nan"))
    assert torch.equal(x, before)
    x[:, untouched] = float("nan")  # what is not convolved never reaches what is
    assert torch.isfinite(layer(x)[:, part]).all()


@pytest.mark.parametrize("module", [PConv1d, PConv2d, PConv3d])
def test_pconv_has_the_same_face_in_every_dimension(module):
    num_dims = {PConv1d: 1, PConv2d: 2, PConv3d: 3}[module]
    layer = module(12, 1 / 3, kernel_size=3, position="rotate", index=4)
    assert (layer.partial_channels, layer.start) == (4, 4)
    assert layer.weight.shape == (4, 4, *[3] * num_dims)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        module(8, kernel_size=2)
    with pytest.raises(ValueError, match="not both"):
        module(8, 0.5, partial_channels=2)
    with pytest.raises(ValueError, match="partial_channels must be from 1 to channels"):
        module(8, partial_channels=9)
    with pytest.raises(ValueError, match="dilation must be positive"):
        module(8, dilation=0)
    with pytest.raises(ValueError, match="position 'middle'"):
        module(8, position="middle")
    with pytest.raises(ValueError, match="x must have"):
        layer(torch.zeros(1, 11, *[5] * num_dims))


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (2, 5)])
@pytest.mark.parametrize("options", [{}, {"kernel_size": 5}, {"dilation": 2}, {"partial_ratio": 1.0}, {"bias": True}])
def test_stride_2_is_stride_1_and_every_second_position(size, options):
    layer = PConvPWConv(8, 12, stride=2, dtype=torch.float64, **options)
    conv = nn.Conv2d(8, 12, 3, stride=2, padding=1, dtype=torch.float64)
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    y = layer(x)
    assert y.shape == conv(x).shape
    assert torch.allclose(y, layer.pwconv(layer.pconv(x)[:, :, ::2, ::2]), rtol=0, atol=1e-13)
    upstream = torch.randn_like(y)
    gradients = [
        torch.autograd.grad(out, (layer.pconv.weight, layer.pwconv.weight), upstream)
        for out in (y, layer.pwconv(layer.pconv(x)[:, :, ::2, ::2]))
    ]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(*gradients, strict=True))


def test_stride_1_is_pconv_and_pwconv():
    layer = PConvPWConv(8, 4, partial_ratio=0.5)
    x = torch.randn(1, 8, 5, 6)
    assert torch.equal(layer(x), layer.pwconv(layer.pconv(x)))
    assert (layer.pconv.partial_channels, layer.pwconv.bias) == (4, None)


@pytest.mark.parametrize(("option", "words"), [({"stride": 3}, "stride must be 1 or 2"), ({"dilation": 0}, "dilation")])
def test_pconv_pwconv_refuses(option, words):
    with pytest.raises(ValueError, match=words):
        PConvPWConv(8, 8, **option)


def test_pconv_pwconv_with_stride_2_refuses_other_channels():
    with pytest.raises(ValueError, match="x must have the shape"):
        PConvPWConv(8, 8, stride=2)(torch.zeros(1, 7, 4, 4))
