"""Backbones by name: four maps at strides of 4 to 32 for pictures of any size, or one sentence that says why not."""

import pytest
import timm
import torch

from fasternet.rivals.backbone import STRIDES, create_backbone


@pytest.mark.parametrize("name", ["fasternet_t0", "PVT-Small", "PoolFormer-S24", "convnext_tiny", "resnet50.a1_in1k"])
def test_backbone_gives_four_maps(name):
    with torch.device("meta"):
        backbone = create_backbone(name)
        maps = backbone(torch.empty(2, 3, 96, 160))
    sizes = [(2, c, 96 // s, 160 // s) for c, s in zip(backbone.feature_channels, STRIDES, strict=True)]
    assert [tuple(x.shape) for x in maps] == sizes
    assert backbone.feature_strides == STRIDES
    assert backbone.training


def test_maps_are_the_networks_own_and_follow_from_the_seed():
    torch.manual_seed(1)
    backbone = create_backbone("mobilenetv4_conv_small").eval()
    theirs = timm.create_model("mobilenetv4_conv_small", features_only=True).eval()
    assert [*backbone.feature_channels] == theirs.feature_info.channels()[1:]
    theirs.load_state_dict(backbone.state_dict())
    pictures = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert all(
            torch.equal(ours, other) for ours, other in zip(backbone(pictures), theirs(pictures)[1:], strict=True)
        )
    torch.manual_seed(1)
    again = create_backbone("mobilenetv4_conv_small").state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in backbone.state_dict().items())


def test_options_reach_the_network():
    plain, dropping = (create_backbone("PVT-Small", **options) for options in ({}, {"drop_path_rate": 0.3}))
    assert plain.stages[3].blocks[-1].drop_path.p == 0
    assert dropping.stages[3].blocks[-1].drop_path.p == pytest.approx(0.3)
    assert len(create_backbone("fasternet_t0", feature_norm=True, width=8).feature_norms) == 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet_50", {}, r"^unknown network 'resnet_50': did you mean .*resnet50"),
        ("fasternet_x", {}, r"^unknown network 'fasternet_x': did you mean fasternet_"),
        ("shvit_s1", {}, r"^shvit_s1 cannot be a backbone: it has no map at stride 4$"),
        ("Swin-T", {}, r"^Swin-T cannot be a backbone: .*doesn't match"),
        ("CycleMLP-B1", {}, r"^CycleMLP-B1 cannot be a backbone: it returns no maps$"),
        ("ShuffleNetV2 x2", {}, r"^ShuffleNetV2 x2 cannot be a backbone: it returns no maps$"),
        ("ResNet50", {"colour": 1}, r"^ResNet50 cannot be built with .*'colour'"),
        ("fasternet_t0", {"colour": 1}, r"^unknown option colour: a model takes width"),
        (
            "ResNet50",
            {"checkpoint_path": "x"},
            r"is for a FasterNet, and the backbone ResNet50 was asked",
        ),
        ("PVT-Small", {"pretrained": True}, r"^PVT-Small cannot be built: there are no pretrained weights"),
    ],
)
def test_what_cannot_be_a_backbone_is_one_sentence(name, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        create_backbone(name, **options)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_downloaded_are_one_sentence(monkeypatch):
    def create(*args, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host\nmore")
        return build(*args, **options)

    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(ConnectionError, match=r"^cannot download the weights of ResNet50 \(no route to host\)"):
        create_backbone("ResNet50", pretrained=True)
