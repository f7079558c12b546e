"""The backbone under heads of others, which speak the protocol of timm: FPN, segmentation_models_pytorch, a U-Net."""

import copy
import itertools
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

import fasternet

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
NO_SMP = "segmentation_models_pytorch is not installed"


class UNet(nn.Module):
    """A decoder as somebody would write it who knows timm's protocol only."""

    def __init__(self, backbone, num_classes):
        super().__init__()
        self.backbone = backbone
        channels, strides = backbone.feature_info.channels(), backbone.feature_info.reduction()
        self.merge = nn.ModuleList(
            nn.Conv2d(deep + fine, fine, 3, padding=1) for fine, deep in itertools.pairwise(channels)
        )
        self.stride = strides[0]
        self.head = nn.Conv2d(channels[0], num_classes, 1)

    def forward(self, x):
        *finer, y = self.backbone(x)
        for skip, merge in zip(reversed(finer), reversed(self.merge), strict=True):
            y = F.relu(merge(torch.cat([F.interpolate(y, size=skip.shape[2:]), skip], 1)))
        return F.interpolate(self.head(y), scale_factor=self.stride)


class Pyramid(nn.Module):
    """torchvision's FPN, and a classifier of the pixels of its finest level."""

    def __init__(self, backbone, num_classes):
        super().__init__()
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(backbone.feature_info.channels(), 16)
        self.head = nn.Conv2d(16, num_classes, 1)
        self.stride = backbone.feature_info.reduction()[0]

    def forward(self, x):
        levels = self.fpn(OrderedDict(enumerate(self.backbone(x))))
        return F.interpolate(self.head(levels[0]), scale_factor=self.stride)


class Decoded(nn.Module):
    """A decoder of segmentation_models_pytorch, which wants the picture and an empty map at stride 2 as well."""

    def __init__(self, backbone, num_classes):
        super().__init__()
        decoder = pytest.importorskip("segmentation_models_pytorch.decoders.unet.decoder", reason=NO_SMP)
        self.backbone = backbone
        widths = (32, 16, 16, 8, 8)
        self.decoder = decoder.UnetDecoder([3, 0, *backbone.feature_info.channels()], widths, n_blocks=5)
        self.head = nn.Conv2d(widths[-1], num_classes, 1)

    def forward(self, x):
        half = x.new_empty(len(x), 0, x.shape[2] // 2, x.shape[3] // 2)
        return self.head(self.decoder([x, half, *self.backbone(x)]))


def create_backbone(**options):
    return fasternet.create_model("fasternet_t0", features_only=True, **{"width": 8, "depths": (1, 1, 2, 1), **options})


def learn(model, num_steps=20):
    """Train on squares that are brighter than their background, and return the loss of each step."""
    generator = torch.Generator().manual_seed(0)
    target = torch.zeros(4, 64, 64, dtype=torch.long)
    for i, (row, column) in enumerate([(0, 0), (32, 0), (0, 32), (16, 16)]):
        target[i, row : row + 32, column : column + 32] = 1
    x = 0.1 * torch.randn(4, 3, 64, 64, generator=generator) + target[:, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(num_steps):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_learning(model, backbone):
    before = copy.deepcopy(backbone.state_dict())
    losses = learn(model)
    assert losses[-1] < 0.5 * losses[0], losses
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("head", [UNet, Pyramid, Decoded])
def test_head_of_others_learns_with_the_backbone(head):
    backbone = create_backbone()
    check_learning(head(backbone, 2), backbone)


def test_head_takes_other_stages_and_the_norm_beside_the_trunk():
    backbone = create_backbone(out_indices=(1, 3), feature_norm=True)
    model = UNet(backbone, 2)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 2, 64, 64)
    assert len(model.merge) == 1


def test_encoder_for_timms_networks_takes_ours_as_it_is(monkeypatch):
    smp = pytest.importorskip("segmentation_models_pytorch", reason=NO_SMP)
    universal = pytest.importorskip("segmentation_models_pytorch.encoders.timm_universal", reason=NO_SMP)
    made = []

    class OurTimm:
        @staticmethod
        def create_model(name, **options):
            made.append(fasternet.create_model(name, **({"width": 8, "depths": (1, 1, 2, 1)} | options)))
            return made[-1]

    monkeypatch.setattr(universal, "timm", OurTimm)
    model = smp.Unet("tu-fasternet_t0", encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8), classes=2)
    assert model.encoder.out_channels == [3, 0, 8, 16, 32, 64]
    assert model.encoder.model is made[-1]
    check_learning(model, made[-1])


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (2,)])
def test_feature_info_says_what_timms_says(out_indices):
    ours = fasternet.create_model("fasternet_t0", features_only=True, out_indices=out_indices)
    theirs = timm.create_model("fasternet_t0", features_only=True, out_indices=out_indices)
    a, b = ours.feature_info, theirs.feature_info
    assert (a.out_indices, len(a), a[1]) == (b.out_indices, len(b), b[1])
    for idx in (None, 2, [3, 0]):
        for method in ("channels", "reduction", "module_name", "get_dicts"):
            assert getattr(a, method)(idx=idx) == getattr(b, method)(idx=idx)
        assert a.get_dicts(["num_chs", "module"], idx) == b.get_dicts(["num_chs", "module"], idx)
        assert a.get("reduction", idx) == b.get("reduction", idx)
    maps = ours.eval()(torch.randn(1, 3, 64, 96))
    assert [x.shape[1] for x in maps] == a.channels()
    assert [(64 // x.shape[2], 96 // x.shape[3]) for x in maps] == [(stride, stride) for stride in a.reduction()]


@pytest.mark.parametrize("feature_norm", [False, True])
def test_feature_info_names_the_modules_that_make_the_maps(feature_norm):
    model = create_backbone(feature_norm=feature_norm, out_indices=(1, 2)).eval()
    seen = []
    for name in model.feature_info.module_name():
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    maps = model(torch.randn(1, 3, 64, 64))
    assert all(a is b for a, b in zip(maps, seen, strict=True))
    assert model.get_submodule(model.feature_info.module_name(0)) is model.stages[0]


def test_feature_info_of_a_classifier_and_of_copies():
    classifier = fasternet.create_model("fasternet_t0", width=8, depths=(1, 1, 1, 1))
    assert (classifier.feature_info.channels(), classifier.feature_info[3]["num_chs"]) == ([], 64)
    for model in (copy.deepcopy(create_backbone(out_indices=(0, 2))), create_backbone(out_indices=(0, 2))):
        assert (model.feature_info.channels(), model.feature_info.reduction()) == ([8, 32], [4, 16])


def test_page_shows_segmentation_models_pytorch():
    pytest.importorskip("segmentation_models_pytorch", reason=NO_SMP)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "segmentation_models_pytorch" in block]
    names = {}
    exec(block, names)
    assert names["masks"].shape == (1, 3, 224, 224)
    assert names["unet"].encoder.model is names["backbone"]
