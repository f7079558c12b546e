"""Rivals by the paper's names (Tables 3 and 4), each from the library that keeps it, and today's fast networks.

Parameters and multiply-adds agree with Table 3 to the printed digit when they are counted as the paper does:
without BN, which is folded, and with five multiply-adds for each element that leaves a layer or group
normalization. ``FOOTNOTES`` says why where they do not.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from fasternet.rivals import cyclemlp, pvt


@dataclass(frozen=True)
class Rival:
    """Where a network comes from.

    Attributes:
        name: As the paper prints it; timm's name for a network that the paper does not have.
        source: The library; ``"fasternet"`` is this one.
        builder: Its name there.
        input_size: Side of the pictures that it is made for.
    """

    name: str
    source: Literal["timm", "torchvision", "fasternet"]
    builder: str
    input_size: int = 224


TABLE3 = (
    Rival("ShuffleNetV2 x1.5", "torchvision", "shufflenet_v2_x1_5"),
    Rival("MobileNetV2", "timm", "mobilenetv2_100"),
    Rival("MobileViT-XXS", "timm", "mobilevit_xxs", 256),
    Rival("EdgeNeXt-XXS", "timm", "edgenext_xx_small", 256),
    Rival("GhostNet x1.3", "timm", "ghostnet_130"),
    Rival("ShuffleNetV2 x2", "torchvision", "shufflenet_v2_x2_0"),
    Rival("MobileNetV2 x1.4", "timm", "mobilenetv2_140"),
    Rival("MobileViT-XS", "timm", "mobilevit_xs", 256),
    Rival("EdgeNeXt-XS", "timm", "edgenext_x_small", 256),
    Rival("PVT-Tiny", "fasternet", "pvt_tiny"),
    Rival("CycleMLP-B1", "fasternet", "cyclemlp_b1"),
    Rival("PoolFormer-S12", "timm", "poolformer_s12"),
    Rival("MobileViT-S", "timm", "mobilevit_s", 256),
    Rival("EdgeNeXt-S", "timm", "edgenext_small", 256),
    Rival("ResNet50", "timm", "resnet50"),
    Rival("CycleMLP-B2", "fasternet", "cyclemlp_b2"),
    Rival("PoolFormer-S24", "timm", "poolformer_s24"),
    Rival("PoolFormer-S36", "timm", "poolformer_s36"),
    Rival("ConvNeXt-T", "timm", "convnext_tiny"),
    Rival("Swin-T", "timm", "swin_tiny_patch4_window7_224"),
    Rival("PVT-Small", "fasternet", "pvt_small"),
    Rival("PVT-Medium", "fasternet", "pvt_medium"),
    Rival("PoolFormer-M36", "timm", "poolformer_m36"),
    Rival("ConvNeXt-S", "timm", "convnext_small"),
    Rival("Swin-S", "timm", "swin_small_patch4_window7_224"),
    Rival("PVT-Large", "fasternet", "pvt_large"),
    Rival("PoolFormer-M48", "timm", "poolformer_m48"),
    Rival("ConvNeXt-B", "timm", "convnext_base"),
    Rival("Swin-B", "timm", "swin_base_patch4_window7_224"),
)

# What Table 4 takes as backbones and Table 3 does not have.
DETECTION = (
    Rival("ResNet101", "timm", "resnet101"),
    Rival("ResNeXt101-32x4d", "timm", "resnext101_32x4d"),
    Rival("ResNeXt101-64x4d", "timm", "resnext101_64x4d"),
)

TODAY = (
    Rival("mobilenetv4_conv_small", "timm", "mobilenetv4_conv_small"),
    Rival("mobilenetv4_conv_medium", "timm", "mobilenetv4_conv_medium", 256),
    Rival("shvit_s1", "timm", "shvit_s1"),
    Rival("shvit_s2", "timm", "shvit_s2"),
    Rival("shvit_s3", "timm", "shvit_s3"),
    Rival("shvit_s4", "timm", "shvit_s4", 256),
    Rival("repvit_m0_9", "timm", "repvit_m0_9"),
    Rival("starnet_s1", "timm", "starnet_s1"),
    Rival("mobileone_s0", "timm", "mobileone_s0"),
    Rival("efficientvit_m3", "timm", "efficientvit_m3"),
    Rival("efficientvit_m4", "timm", "efficientvit_m4"),
    Rival("efficientvit_m5", "timm", "efficientvit_m5"),
    Rival("fastvit_t8", "timm", "fastvit_t8", 256),
    Rival("hgnetv2_b0", "timm", "hgnetv2_b0"),
)

# Where counting in the paper's way does not give what Table 3 prints.
FOOTNOTES: Mapping[str, str] = MappingProxyType(
    {
        "PVT-Medium": (
            "6.68 G counted, 6.69 G printed: PVT's released code resizes the position embeddings of three stages to "
            "the size that they have and normalizes 49 tokens that nobody reads, 0.88 M operations without effect."
        ),
        "CycleMLP-B1": "2.13 G counted, 2.10 G printed: the 2.1 G of CycleMLP's own paper, with a zero behind it.",
        "CycleMLP-B2": "3.89 G counted, 3.90 G printed: the 3.9 G of CycleMLP's own paper, with a zero behind it.",
    }
)


def list_rivals() -> tuple[Rival, ...]:
    """Return the rivals of Table 3 in its order, Table 4's other backbones, then today's fast networks."""
    return TABLE3 + DETECTION + TODAY


def find_rival(name: str) -> Rival:
    """Return the rival of that name.

    Raises:
        ValueError: There is none; near names are offered.
    """
    rivals = {rival.name: rival for rival in list_rivals()}
    if name in rivals:
        return rivals[name]
    spelled = {known.lower(): known for known in rivals}
    near = [spelled[match] for match in difflib.get_close_matches(name.lower(), spelled, cutoff=0.5)]
    raise ValueError(f"rival {name!r} is unknown; near names are {', '.join(near or sorted(rivals))}")


def create_rival(name: str) -> nn.Module:
    """Build a rival with random weights, in evaluation mode.

    Args:
        name: As in ``list_rivals``.

    Raises:
        ValueError: There is no such rival; near names are offered.
    """
    rival = find_rival(name)
    model: nn.Module
    if rival.source == "fasternet":
        model = create_own(rival.builder)
    elif rival.source == "torchvision":
        import torchvision

        model = torchvision.models.get_model(rival.builder, weights=None)
    else:
        import timm

        model = timm.create_model(rival.builder, pretrained=False)
    return model.eval()


def create_own(builder: str, num_classes: int = 1000, **options: Any) -> nn.Module:
    """Build one of the networks that are written here: a name of ``pvt.DEPTHS`` or of ``cyclemlp.DEPTHS``."""
    if builder in pvt.DEPTHS:
        return pvt.PVT(pvt.DEPTHS[builder], num_classes, **options)
    return cyclemlp.CycleMLP(cyclemlp.DEPTHS[builder], num_classes, **options)
