"""Surgery on networks of others: what is replaced, what is left and why, and that the given network stays as it is."""

import json
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from fasternet.complexity import count_costs
from fasternet.models.surgery import replace_convs
from fasternet.ops import PConv2d
from fasternet.ops.pconv_nd import PConvPWConv

SMALL = (1, 3, 32, 32)


class Unit(nn.Module):
    """Convolution, BN, SiLU."""

    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.second = Unit(channels, channels, 3), Unit(channels, channels, 3)

    def forward(self, x):
        return x + self.second(self.first(x))


class C2f(nn.Module):
    """The block of YOLO networks: half of the channels passes bottlenecks, every one of which is kept."""

    def __init__(self, in_channels=16, out_channels=16, num_bottlenecks=2):
        super().__init__()
        half = out_channels // 2
        self.cv1 = Unit(in_channels, 2 * half, 1)
        self.cv2 = Unit((2 + num_bottlenecks) * half, out_channels, 1)
        self.bottlenecks = nn.ModuleList(Bottleneck(half) for _ in range(num_bottlenecks))

    def forward(self, x):
        parts = list(self.cv1(x).chunk(2, dim=1))
        for bottleneck in self.bottlenecks:
            parts.append(bottleneck(parts[-1]))
        return self.cv2(torch.cat(parts, dim=1))


class Odd(nn.Module):
    """Convolutions of every kind that cannot be replaced, and some that can."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(8, 8, 3, padding="same")
        self.strided = nn.Conv2d(8, 8, 5, stride=2, padding=2)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = self.twice
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.even = nn.Conv2d(8, 8, 2)
        self.flat = nn.Conv2d(8, 8, (1, 3), padding=(0, 1))
        self.unpadded = nn.Conv2d(8, 8, 3)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.transposed = nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.normed = parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.tied = nn.Conv2d(8, 8, 3, padding=1)
        self.tied_too = nn.Conv2d(8, 8, 3, padding=1)
        self.tied_too.weight = self.tied.weight
        self.weight_only = nn.Conv2d(8, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 3, 1)
        self.few = nn.Conv2d(3, 8, 3, padding=1)
        self.stride_3 = nn.Conv2d(8, 8, 3, stride=3, padding=1)

    def forward(self, x):
        x = self.strided(self.plain(x))
        x = self.alias(self.twice(self.dilated(x)))
        x = self.circular(self.unpadded(self.flat(self.even(self.grouped(x)))))
        x = self.tied_too(self.tied(self.normed(self.transposed(x))))
        x = torch.conv2d(x, self.weight_only.weight)
        return self.stride_3(self.few(self.narrow(x)))


def test_resnet18_gets_a_replacement_for_every_3x3_convolution(resnet18):
    before = {name: tensor.clone() for name, tensor in resnet18.state_dict().items()}
    new, report = replace_convs(resnet18, input_shape=SMALL, measure=False)
    assert [r.name for r in report.replaced[:2]] == ["layer1.0.conv1", "layer1.0.conv2"]
    assert len(report.replaced) == 16 == sum(isinstance(m, PConvPWConv) for m in new.modules())
    assert sum(r.stride == 2 for r in report.replaced) == 3
    assert [(s.name, s.reason) for s in report.skipped] == [
        ("conv1", "3 input channels: 0.25 of them is less than one")
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in resnet18.state_dict().items())
    x = torch.randn(2, *SMALL[1:])
    assert new(x).shape == (2, 5)
    assert not new.training
    costs = count_costs(new, SMALL)
    assert (report.num_params_after, report.macs_after) == (costs.num_params, costs.macs)
    saved = sum(r.macs_before - r.macs_after for r in report.replaced)
    assert report.macs_before - report.macs_after == saved > 0
    assert 0.5 < report.replaced[0].error < 1  # random weights have no redundancy


def test_report_options_make_the_same_network(resnet18):
    new, report = replace_convs(
        resnet18, lambda name, conv: name.endswith("conv2"), match="macs", input_shape=SMALL, measure=False
    )
    options = json.loads(json.dumps(report.options))
    fresh = torchvision.models.resnet18(num_classes=5).eval()
    again, second = replace_convs(fresh, **options, init="random", measure=False)
    assert len(second.replaced) == 8
    assert second.replaced[0].error is None
    again.load_state_dict(new.state_dict())
    x = torch.randn(1, *SMALL[1:])
    assert torch.equal(again(x), new(x))


def test_new_network_exports(resnet18):
    new, _ = replace_convs(resnet18, r"layer[12].*", init="random", input_shape=SMALL, measure=False)
    x = torch.randn(2, *SMALL[1:])
    with torch.no_grad():
        y = new(x)
        exported = torch.export.export(new, (x,)).module()(x)
    assert torch.allclose(exported, y, atol=1e-5)


def test_pictures_bring_a_layer_closer_than_weights_do(resnet18):
    images = nn.functional.avg_pool2d(torch.randn(24, 3, 66, 66), 3, stride=2)
    settings = {"select": r"layer2\.0\.conv1", "input_shape": SMALL, "measure": False}
    networks = {
        "random": replace_convs(resnet18, **settings, init="random")[0],
        "weights": replace_convs(resnet18, **settings)[0],
        "maps": replace_convs(resnet18, **settings, images=images)[0],
    }
    far = {}
    with torch.no_grad():
        x = resnet18.layer1(resnet18.maxpool(resnet18.relu(resnet18.bn1(resnet18.conv1(images)))))
        for name, new in networks.items():
            far[name] = (new.layer2[0].conv1(x) - resnet18.layer2[0].conv1(x)).square().mean().item()
    assert far["maps"] < 0.5 * far["weights"] < 0.5 * far["random"]


def test_every_fifth_picture_is_held_out_for_the_error(resnet18):
    images = nn.functional.avg_pool2d(torch.randn(10, 3, 34, 34), 3, stride=1)
    settings = {"select": ["layer1.0.conv1", "layer3.0.conv2"], "input_shape": SMALL, "measure": False}
    tracked = []

    def track(batches, total, description):
        tracked.append((len(batches[0]), total))
        return batches

    _, report = replace_convs(resnet18, **settings, images=images, track=track)
    assert tracked == [(8, 1), (2, 1)]
    same = images.clone()
    same[4::5] = images[:2]  # what is held out is seen by the fit
    _, leaked = replace_convs(resnet18, **settings, images=same)
    assert leaked.replaced[1].error < 0.1 * report.replaced[1].error
    assert report.notes == (
        "error: share of the variance, on 2 of 10 pictures, held out of the fit",
        "few pictures: fewer positions than unknowns in layer3.0.conv2",
    )
    _, report = replace_convs(resnet18, **settings, images=images[:4])
    assert [r.error for r in report.replaced] == [None, None]
    assert "4 pictures are too few" in str(report)


def test_match_that_cannot_be_met_is_refused_or_reported():
    settings = {"match": "macs", "init": "random", "input_shape": (1, 8, 8, 8), "measure": False}
    with pytest.raises(ValueError, match="match 'macs' cannot be met, as no width can change: 0: its input comes from"):
        replace_convs(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten()), **settings)
    wrapped = nn.DataParallel(nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(9)]))
    with pytest.raises(ValueError, match=r"module\.0 and 8 more: torch.fx cannot trace") as caught:
        replace_convs(wrapped, **settings)
    assert len(str(caught.value)) < 300
    first, second = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(32, 32, 3, padding=1, groups=32)
    model = nn.Sequential(first, nn.Softmax(1), nn.Conv2d(8, 32, 1), second, nn.Conv2d(32, 8, 1))
    _, report = replace_convs(model, "depthwise", **settings)
    text = str(report)
    assert re.search(r"^width 32 -> \d+, narrowed: 2, 3, 4$", text, re.MULTILINE)
    assert re.search(r"^match 'macs' is missed: 1\.\d+ times", text, re.MULTILINE)
    assert "narrowing changes the network's function, and is not in the errors" in text


def test_memory_format_is_kept():
    model = C2f().to(memory_format=torch.channels_last)
    new, _ = replace_convs(model, match="macs", init="random", input_shape=(1, 16, 9, 10), measure=False)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in new.parameters() if p.dim() == 4)
    assert not new.bottlenecks[0].first.conv.pconv.weight.is_contiguous()


@pytest.mark.slow
def test_bottlenecks_of_resnet50_keep_their_multiply_adds():
    model = torchvision.models.resnet50(num_classes=5)
    _, plain = replace_convs(model, init="random", input_shape=SMALL, measure=False)
    new, report = replace_convs(model, init="random", match="macs", input_shape=SMALL, measure=False)
    assert len(report.replaced) == len(plain.replaced) == 16
    assert plain.macs_after < 0.75 * plain.macs_before
    assert report.macs_after == pytest.approx(report.macs_before, rel=0.02)
    assert all(width.after > width.before for width in report.widened)
    assert not report.not_widened
    assert new.training  # as the given network


@pytest.mark.slow
def test_depthwise_convolutions_of_mobilenet_v2():
    model = torchvision.models.mobilenet_v2(num_classes=5).eval()
    settings = {"select": "depthwise", "init": "random", "input_shape": SMALL, "measure": False}
    _, report = replace_convs(model, **settings)
    assert len(report.replaced) == 17
    new, alone = replace_convs(model, kind="pconv_alone", **settings)
    assert len(alone.replaced) == 13 == sum(isinstance(m, PConv2d) for m in new.modules())
    assert {s.reason for s in alone.skipped if s.name != "features.0.0"} == {"stride 2: a PConv alone has stride 1"}
    assert new(torch.randn(1, *SMALL[1:])).shape == (1, 5)
    _, narrow = replace_convs(model, kind="pconv_alone", match="macs", **settings)
    assert narrow.macs_after == pytest.approx(narrow.macs_before, rel=0.05)


def test_c2f_block(randomise_norms):
    model = randomise_norms(C2f()).eval()
    new, report = replace_convs(model, input_shape=(1, 16, 9, 10), measure=False)
    assert [r.name for r in report.replaced] == [
        f"bottlenecks.{i}.{unit}.conv" for i in range(2) for unit in ("first", "second")
    ]
    x = torch.randn(2, 16, 9, 10)
    assert new(x).shape == model(x).shape
    assert torch.isfinite(new(x)).all()
    _, matched = replace_convs(model, match="params", init="random", input_shape=(1, 16, 9, 10), measure=False)
    assert len(matched.widened) == 2


def test_pconv_alone_needs_a_pointwise_convolution_behind():
    with pytest.raises(ValueError, match=r"bottlenecks\.0\.first\.conv: something else than BN"):
        replace_convs(C2f(), kind="pconv_alone", input_shape=(1, 16, 8, 8), measure=False)
    chain = nn.Sequential(Unit(8, 8, 3), nn.Conv2d(8, 16, 1))
    new, _ = replace_convs(chain, kind="pconv_alone", input_shape=(1, 8, 8, 8), measure=False)
    assert isinstance(new[0].conv, PConv2d)


class Named(nn.Module):
    """Convolutions called by name, and one without a batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1)
        self.single = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.single(self.second(input=self.first(input=x))[0])


@pytest.mark.parametrize("kind", ["pconv", "pconv_alone"])
def test_convolutions_may_be_called_by_name(kind):
    x = torch.randn(5, 8, 6, 6)
    new, report = replace_convs(Named(), kind=kind, images=x, input_shape=(1, 8, 6, 6), measure=False)
    assert [r.name for r in report.replaced] == ["first"]
    assert [s.reason for s in report.skipped] == ["its input, (8, 6, 6), has no batch"]
    assert new(x).shape == (8, 6, 6)


class Curious(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * self[0].weight.mean()


def test_network_that_needs_its_convolutions_is_refused():
    with pytest.raises(ValueError, match=r"runs no longer with its convolutions replaced.*has no attribute 'weight'"):
        replace_convs(Curious(nn.Conv2d(8, 8, 3, padding=1)), input_shape=(1, 8, 8, 8), measure=False)
    with pytest.raises(ValueError, match="model itself is the convolution"):
        replace_convs(nn.Conv2d(8, 8, 3, padding=1), input_shape=(1, 8, 8, 8), measure=False)


class Branching(nn.Module):
    """A 3x3 convolution whose output a shortcut reads, too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.first(x)
        return x + self.second(x)


class Returning(Branching):
    """A 3x3 convolution whose output is returned, too."""

    def forward(self, x):
        x = self.first(x)
        return {"maps": [x], "y": self.second(x)}


@pytest.mark.parametrize("network", [Branching, Returning])
def test_pconv_alone_leaves_what_others_read(network):
    with pytest.raises(ValueError, match="first: something else"):
        replace_convs(network(), kind="pconv_alone", input_shape=(1, 8, 8, 8), measure=False)


def test_odd_convolutions_are_left_with_their_reason():
    model = Odd().eval()
    new, report = replace_convs(model, "all", input_shape=(1, 8, 24, 24), measure=False)
    assert [r.name for r in report.replaced] == ["plain", "strided", "dilated", "twice"]
    reasons = {s.name: s.reason for s in report.skipped}
    expected = {
        "grouped": "2 groups",
        "even": "kernel 2 x 2: even",
        "flat": "kernel 1 x 3: not square",
        "unpadded": "padding (0, 0): not 'same'",
        "circular": "padding mode 'circular'",
        "transposed": "a ConvTranspose2d",
        "normed": "its weight is parametrised",
        "tied": "another module has the same weight",
        "tied_too": "another module has the same weight",
        "weight_only": "its forward is never called",
        "few": "3 input channels",
        "stride_3": "stride (3, 3)",
    }
    assert reasons.keys() == expected.keys()
    assert all(reasons[name].startswith(words) for name, words in expected.items())
    assert new.alias is new.twice
    assert isinstance(new.twice, PConvPWConv)
    assert new.strided.pwconv.bias is not None
    assert new.dilated.pconv.dilation == 2
    x = torch.randn(2, 8, 24, 24)
    assert new(x).shape == model(x).shape


def test_trainable_state_and_precision_are_kept():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)).double().eval()
    model[0].requires_grad_(False)
    model[1].train()
    new, _ = replace_convs(model, input_shape=(1, 8, 8, 8), measure=False)
    assert [p.requires_grad for p in new.parameters()] == [False] * 3 + [True] * 3
    assert {p.dtype for p in new.parameters()} == {torch.float64}
    assert [layer.training for layer in new] == [False, True]
