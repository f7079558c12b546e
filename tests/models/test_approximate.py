"""The closed form: exact where it can be, never worse than gradient descent, the same on noise and on weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasternet.models import approximate
from fasternet.models.approximate import approximate_conv, approximate_conv_alone, measure_moments
from fasternet.ops.pconv_nd import PConvPWConv


def build(conv, fit, partial_channels):
    """The replacement that an approximation describes."""
    ratio = partial_channels / conv.in_channels
    layer = PConvPWConv(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size[0],
        conv.stride[0],
        partial_ratio=ratio,
        dilation=conv.dilation[0],
        bias=conv.bias is not None,
    )
    with torch.no_grad():
        layer.pconv.weight[: len(fit.pconv)] = fit.pconv.float()
        layer.pwconv.weight.copy_(fit.pwconv[:, :, None, None])
        if fit.bias is not None:
            layer.pwconv.bias.copy_(fit.bias)
    return layer


def smooth_maps(num, channels, size=9):
    """Maps that are correlated over channels and positions, and not centred, as behind a ReLU."""
    mixing = torch.randn(channels, channels, 1, 1)
    return F.avg_pool2d(F.conv2d(torch.randn(num, channels, size + 2, size + 2), mixing), 3, stride=1).relu()


def relative_error(y, target):
    return ((y - target).square().mean() / (target - target.mean((0, 2, 3), keepdim=True)).square().mean()).item()


CONVS = [
    {"in_channels": 8, "out_channels": 8},
    {"in_channels": 8, "out_channels": 12, "stride": 2, "bias": True},
    {"in_channels": 8, "out_channels": 2, "bias": True},
    {"in_channels": 8, "out_channels": 8, "groups": 8},
    {"in_channels": 6, "out_channels": 5, "kernel_size": 5, "padding": 4, "dilation": 2},
]


@pytest.mark.parametrize("options", CONVS)
def test_error_is_that_of_the_layer_on_the_maps(options):
    conv = nn.Conv2d(**{"kernel_size": 3, "padding": 1, "bias": False, **options})
    x = smooth_maps(20, conv.in_channels)
    fit = approximate_conv(conv, 3, measure_moments(nn.Sequential(conv), {"0": 3}, [x])["0"])
    with torch.no_grad():
        assert relative_error(build(conv, fit, 3)(x), conv(x)) == pytest.approx(fit.error, rel=1e-3, abs=1e-6)
    assert fit.error < approximate_conv(conv, 3).error  # maps are easier than noise


@pytest.mark.parametrize("options", CONVS)
def test_a_conv_of_the_same_form_is_found_exactly(options):
    options = {"kernel_size": 3, "padding": 1, "bias": False, **options}
    conv = nn.Conv2d(**options)
    k = conv.kernel_size[0]
    with torch.no_grad():
        if conv.groups == 1:
            u, filters = torch.randn(conv.out_channels, 3), torch.randn(3, 3, k, k)
            conv.weight[:, :3] = torch.einsum("or,rikl->oikl", u, filters)
        outside = torch.ones(k, k, dtype=torch.bool)
        outside[k // 2, k // 2] = False
        rest = conv.weight[3:] if conv.groups > 1 else conv.weight[:, 3:]
        rest[..., outside] = 0
        x = smooth_maps(20, conv.in_channels)
        for moments in (None, measure_moments(nn.Sequential(conv), {"0": 3}, [x])["0"]):
            fit = approximate_conv(conv, 3, moments)
            assert fit.error < 1e-9
            assert relative_error(build(conv, fit, 3)(x), conv(x)) < 1e-9


@pytest.mark.slow
def test_closed_form_is_at_least_as_good_as_adam(monkeypatch):
    conv = nn.Conv2d(8, 8, 3, padding=1)
    x = smooth_maps(16, 8, 4)
    moments = measure_moments(nn.Sequential(conv), {"0": 2}, [x])["0"]
    with torch.no_grad():
        target = conv(x)
        ours = (build(conv, approximate_conv(conv, 2, moments), 2)(x) - target).square().mean()
        monkeypatch.setattr(approximate, "WHITE_SHARE", 1e-9)
        least = (build(conv, approximate_conv(conv, 2, moments), 2)(x) - target).square().mean()
    assert ours <= 1.01 * least  # what the white noise costs
    for lr in (3e-3, 1e-2, 3e-2):
        layer = PConvPWConv(8, 8, bias=True)
        optimizer = torch.optim.Adam(layer.parameters(), lr, fused=True)
        for _ in range(500):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert least <= (1 + 1e-5) * loss


def test_both_forms_agree_on_white_noise():
    conv = nn.Conv2d(8, 6, 3, padding=1)
    with torch.no_grad():
        conv.weight[:2] *= 4  # two outputs stand out, so that noise leaves no doubt about the best two directions
    x = torch.randn(50, 8, 96, 96)  # large: zeros are padded at the border
    white, maps = approximate_conv(conv, 2), measure_moments(nn.Sequential(conv), {"0": 2}, [x])["0"]
    fit = approximate_conv(conv, 2, maps)
    assert fit.error == pytest.approx(white.error, rel=0.02)
    with torch.no_grad():
        assert relative_error(build(conv, fit, 2)(x[:5]), build(conv, white, 2)(x[:5])) < 1e-3


def test_weights_alone_are_a_truncated_singular_value_decomposition():
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    weight = conv.weight.detach().double()
    lost = torch.linalg.svdvals(weight[:, :2].flatten(1))[2:].square().sum()
    centre = weight[:, 2:, 1, 1].square().sum()
    expected = (lost + weight[:, 2:].square().sum() - centre) / weight.square().sum()
    assert approximate_conv(conv, 2).error == pytest.approx(expected.item(), rel=1e-9)


def test_pconv_alone_takes_the_filters_of_its_part():
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    fit = approximate_conv_alone(conv, 2)
    assert torch.allclose(fit.pconv[[0, 1], [0, 1]].float(), conv.weight[:2, 0])
    assert (fit.pconv[0, 1] == 0).all()
    x = smooth_maps(10, 8)
    on_maps = approximate_conv_alone(conv, 2, measure_moments(nn.Sequential(conv), {"0": 2}, [x])["0"])
    with torch.no_grad():
        y = torch.cat([F.conv2d(x[:, :2], on_maps.pconv.float(), padding=1), x[:, 2:]], dim=1)
        assert relative_error(y, conv(x)) == pytest.approx(on_maps.error, rel=1e-3)
    assert torch.allclose(on_maps.pconv, fit.pconv, atol=1e-5)


def test_dead_and_few_maps_leave_the_fit_to_the_weights():
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    dead = measure_moments(nn.Sequential(conv), {"0": 2}, [torch.zeros(1, 8, 4, 4)])["0"]
    fit, white = approximate_conv(conv, 2, dead), approximate_conv(conv, 2)
    a, b = (torch.einsum("or,rikl->oikl", f.pwconv[:, :2], f.pconv) for f in (fit, white))
    assert torch.allclose(a, b, atol=1e-9)
    assert torch.allclose(fit.pwconv[:, 2:], white.pwconv[:, 2:], atol=1e-9)


def test_maps_that_are_not_finite_are_refused():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    nn.init.constant_(conv.weight, float("inf"))
    with pytest.raises(ValueError, match="pictures give maps at 0 that are not finite"):
        measure_moments(nn.Sequential(conv), {"0": 1}, [torch.randn(1, 4, 4, 4)])


def test_error_is_that_on_the_pictures_held_out():
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    few, others = smooth_maps(4, 16, 3), smooth_maps(100, 16, 3)
    fitted, held_out = (measure_moments(nn.Sequential(conv), {"0": 4}, [x])["0"] for x in (few, others))
    assert fitted.num_positions == 36
    fit = approximate_conv(conv, 4, fitted, held_out)
    with torch.no_grad():
        assert relative_error(build(conv, fit, 4)(others), conv(others)) == pytest.approx(fit.error, rel=1e-3)
    assert fit.error > 2 * approximate_conv(conv, 4, fitted).error


@pytest.mark.parametrize("options", CONVS)
def test_fit_does_not_depend_on_the_unit_of_the_maps(options):
    conv = nn.Conv2d(**{"kernel_size": 3, "padding": 1, "bias": False, **options}).double()
    x = smooth_maps(2, conv.in_channels, 4).double()  # few: the white noise has a say
    fits = [
        approximate_conv(conv, 3, measure_moments(nn.Sequential(conv), {"0": 3}, [x * scale])["0"])
        for scale in (1, 1e-3)
    ]
    assert fits[1].error == pytest.approx(fits[0].error, rel=1e-4, abs=1e-9)
    assert torch.allclose(fits[1].pwconv[:, 3:], fits[0].pwconv[:, 3:], rtol=0, atol=1e-6)
