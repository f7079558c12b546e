"""The variants of the ablation as data: those of Table 5 and those that the paper leaves out, and how each is built.

Legend: N C H W; C the width of a stage, Cp = r * C the channels that PConv convolves.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fasternet.complexity import count_costs
from fasternet.deploy import fold_batch_norm
from fasternet.models.fasternet import VARIANTS as NETWORKS
from fasternet.models.fasternet import FasterNet, FasterNetBlock, FasterNetConfig, Stage


class AblatedBlock(nn.Module):
    """A FasterNet block of other parts: ``mix``, then ``mlp``, added to the block's input or to what ``mix`` gave."""

    def __init__(self, mix: nn.Module, mlp: nn.Module, *, shortcut: Literal["input", "mixed"] = "input") -> None:
        super().__init__()
        self.mix, self.mlp, self.shortcut = mix, mlp, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        y = self.mix(x)
        return (x if self.shortcut == "input" else y) + cast(Tensor, self.mlp(y))


class FirstChannels(nn.Module):
    """Keeps the first channels alone."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_channels = num_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, num_channels, H, W), a view."""
        return x[:, : self.num_channels]


Change = Callable[[FasterNetBlock], nn.Module]


def _activate_between(block: FasterNetBlock) -> nn.Module:
    return AblatedBlock(nn.Sequential(block.pconv, copy.deepcopy(block.act)), _mlp(block))


def _normalize_everywhere(block: FasterNetBlock) -> nn.Module:
    mix, mlp = (
        nn.Sequential(part, nn.BatchNorm2d(block.pconv.channels), copy.deepcopy(block.act))
        for part in (block.pconv, _mlp(block))
    )
    return AblatedBlock(mix, mlp)


def _remove_untouched(block: FasterNetBlock) -> nn.Module:
    Cp, k = block.pconv.partial_channels, block.pconv.weight.shape[-1]
    mix = nn.Sequential(FirstChannels(Cp), _conv(Cp, Cp, k))  # (N, Cp, H, W)
    return AblatedBlock(mix, _mlp(block, expand=_conv(Cp, block.pwconv1.out_channels, 1)))


def _add_after_pconv(block: FasterNetBlock) -> nn.Module:
    return AblatedBlock(block.pconv, _mlp(block), shortcut="mixed")


def _leave_pconv_out(block: FasterNetBlock) -> nn.Module:
    return AblatedBlock(nn.Identity(), _mlp(block))


def _mix_depthwise(block: FasterNetBlock) -> nn.Module:
    C, k = block.pconv.channels, block.pconv.weight.shape[-1]
    return AblatedBlock(_conv(C, C, k, groups=C), _mlp(block))


def _mlp(block: FasterNetBlock, *, expand: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(expand or block.pwconv1, block.norm, block.act, block.pwconv2)


def _conv(in_channels: int, out_channels: int, kernel_size: int, *, groups: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
    nn.init.trunc_normal_(conv.weight, std=0.02)  # as the network's own
    return conv


@dataclasses.dataclass(frozen=True)
class Variant:
    """One difference from the base.

    Attributes:
        group: What is varied.
        differs: How, in words.
        fields: Of ``FasterNetConfig``, where it can say so.
        change: Makes the block that takes a fresh block's place, where it cannot; it may use that block's parts.
        equal_macs: Further fields by size, which bring the multiply-adds back to the base's: the nearest width, as in
            the paper's T0*, and where that misses by over 2 % the hidden width of the blocks too. Found by counting.
    """

    group: str
    differs: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    change: Change | None = None
    equal_macs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "base": Variant("base", "r = 1/4, BN, GELU, PConv of kernel 3 over the first channels"),
        "r=1/8": Variant(
            "partial ratio",
            "r = 1/8",
            {"partial_ratio": 1 / 8},
            equal_macs={"small": {"width": 17, "mlp_ratio": 1.88}, "full": {"width": 42}},
        ),
        "r=1/2": Variant(
            "partial ratio",
            "r = 1/2",
            {"partial_ratio": 1 / 2},
            equal_macs={"small": {"width": 14, "mlp_ratio": 2.15}, "full": {"width": 35}},
        ),
        "LN": Variant("normalization", "LayerNorm over the channels in place of every BN", {"norm": "ln"}),
        "ReLU": Variant("activation", "ReLU in place of GELU", {"activation": "relu"}),
        "last channels": Variant(
            "position",
            "PConv convolves the last channels: the base up to the order of the channels, so a control of the noise",
            {"position": "last"},
        ),
        "rotating channels": Variant(
            "position", "block j of a stage convolves quarter j mod 4 of the channels", {"position": "rotate"}
        ),
        "kernel 5": Variant("kernel size", "PConv of kernel 5", {"kernel_size": 5}),
        "kernel 7": Variant("kernel size", "PConv of kernel 7", {"kernel_size": 7}),
        "activation after PConv": Variant(
            "norm and activation", "an activation between PConv and PWConv", change=_activate_between
        ),
        "BN and activation everywhere": Variant(
            "norm and activation",
            "BN and activation after each of the block's three convolutions; the BN behind PConv cannot be folded",
            change=_normalize_everywhere,
        ),
        "untouched removed": Variant(
            "untouched channels", "the PWConv sees the convolved channels alone", change=_remove_untouched
        ),
        "untouched removed wider": Variant(
            "untouched channels",
            "the PWConv sees the convolved channels alone",
            change=_remove_untouched,
            equal_macs={"small": {"width": 18, "mlp_ratio": 2.19}, "full": {"width": 48}},
        ),
        "shortcut after PConv": Variant(
            "shortcut",
            "added to PConv's output instead of the block's input, as in-place code does",
            change=_add_after_pconv,
        ),
        "without PConv": Variant(
            "control", "no spatial mixing in the blocks: pointwise alone", change=_leave_pconv_out
        ),
        "DWConv": Variant("control", "a depthwise convolution in place of PConv", change=_mix_depthwise),
    }
)


@dataclasses.dataclass(frozen=True)
class Size:
    """The base network of a study, without its number of classes, and the side of its pictures in pixels."""

    config: FasterNetConfig
    input_size: int


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "small": Size(FasterNetConfig(width=16, depths=(1, 1, 2, 1), activation="gelu", num_classes=0), 64),
        "full": Size(dataclasses.replace(NETWORKS["fasternet_t0"], num_classes=0), 224),
    }
)


def choose_variants(labels: Sequence[str] | None, size: str) -> list[str]:
    """Return the variants asked for, in the order of ``VARIANTS``: the base always, None for all.

    Raises:
        ValueError: There is no such variant or size.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
    for label in labels or ():
        if label not in VARIANTS:
            raise ValueError(f"variant {label!r} is not one of {', '.join(VARIANTS)}")
    return [label for label in VARIANTS if labels is None or label in ("base", *labels)]


def create_variant(label: str, *, size: str = "small", num_classes: int = 10) -> FasterNet:
    """Create the network of a variant, with random weights as the network itself draws them.

    Args:
        label: One of ``VARIANTS``.
        size: One of ``SIZES``.
        num_classes: Of the data.

    Returns:
        The network in training mode. Its ``config`` is the base's in what another block does differently.

    Raises:
        ValueError: There is no such variant or size.
    """
    choose_variants([label], size)
    network = FasterNet(dataclasses.replace(_configure(label, size), num_classes=num_classes))
    if change := VARIANTS[label].change:
        for stage in network.stages:
            blocks = cast(Stage, stage).blocks
            cast(Stage, stage).blocks = nn.Sequential(*(change(cast(FasterNetBlock, block)) for block in blocks))
    return network


def describe_variant(label: str, *, size: str = "small") -> str:
    """Say in words how a variant differs from the base, with the width that makes its multiply-adds equal."""
    choose_variants([label], size)
    variant, base, config = VARIANTS[label], SIZES[size].config, _configure(label, size)
    if config.position == "rotate":
        num_rotated = sum(block % 4 > 0 for depth in config.depths for block in range(depth))
        return f"{variant.differs}: other than the first in {num_rotated} of {sum(config.depths)} blocks"
    if not variant.equal_macs:
        return variant.differs
    hidden = f" and hidden width {config.mlp_ratio:g} C" if config.mlp_ratio != base.mlp_ratio else ""
    return f"{variant.differs}, equal multiply-adds by width {config.width} (base {base.width}){hidden}"


def summarize_variant(label: str, network: nn.Module, *, size: str) -> dict[str, Any]:
    """Return what the records of a variant say of it: how it differs, its costs, and the BN that folding leaves.

    Args:
        label: One of ``VARIANTS``.
        network: What ``create_variant`` made of it; it is not modified.
        size: One of ``SIZES``.
    """
    example = torch.zeros(1, 3, SIZES[size].input_size, SIZES[size].input_size)
    costs = count_costs(network, tuple(example.shape))
    with torch.no_grad():
        folded = fold_batch_norm(network, example)
    return {
        "group": VARIANTS[label].group,
        "differs": describe_variant(label, size=size),
        "num_params": costs.num_params,
        "macs": costs.macs,
        "num_batch_norms_left": sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()),
    }


def _configure(label: str, size: str) -> FasterNetConfig:
    variant = VARIANTS[label]
    return dataclasses.replace(SIZES[size].config, **variant.fields, **variant.equal_macs.get(size, {}))
