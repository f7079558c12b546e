"""FasterNet (Section 3.4, Fig. 4, Table 8): embedding, four stages of FasterNet blocks, head.

Training computes exactly the published function: the shortcut is the block's input before PConv. Where the paper's
text and its weights differ, this follows the weights: there is no activation after embedding and merging.

Shapes: input (N, 3, H, W); stage i works on (N, C * 2^i, H / 2^(i+2), W / 2^(i+2)); C is ``width``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from fasternet.models.features import FeatureInfo
from fasternet.ops import PConv2d, count_partial_channels
from fasternet.ops.pconv import Position

Activation = Literal["gelu", "relu"]
Norm = Literal["bn", "ln"]

MIN_INPUT_SIZE = 32  # product of the strides: 4 * 2 * 2 * 2


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FasterNetConfig:
    """What defines a FasterNet.

    Attributes:
        width: C, channels after the embedding; each merging doubles them.
        depths: Blocks per stage, b1 to b4.
        activation: Exact GELU or ReLU, in blocks and head.
        norm: ``"bn"``, or ``"ln"`` (Table 5): LayerNorm over the channels, eps 1e-6, in place of every BN.
        partial_ratio: r = Cp / C.
        position: Which channels PConv convolves; see ``PConv2d``.
        kernel_size: k of PConv.
        mlp_ratio: Hidden width of a block divided by C.
        head_width: Channels between pooling and classifier.
        layer_scale: Initial value of a learned scale on each block's branch; None is without, as published.
        in_chans: Channels of the input picture.
        num_classes: 0 leaves the classifier out.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 over all blocks.

    Raises:
        ValueError: A field is out of range; the message names it.
    """

    width: int
    depths: tuple[int, ...]
    activation: Activation
    norm: Norm = "bn"
    partial_ratio: float = 0.25
    position: Position = "first"
    kernel_size: int = 3
    mlp_ratio: float = 2.0
    head_width: int = 1280
    layer_scale: float | None = None
    in_chans: int = 3
    num_classes: int = 1000
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        """Check every field that the layers themselves would not name."""
        for name, choices in (("activation", Activation), ("norm", Norm), ("position", Position)):
            if getattr(self, name) not in get_args(choices):
                allowed = ", ".join(get_args(choices))
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {allowed}")
        for name in ("width", "head_width", "in_chans", "kernel_size"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        for name in ("drop_rate", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not isinstance(self.depths, Sequence) or len(self.depths) != 4 or not all(map(_is_count, self.depths)):
            raise ValueError(f"depths must be four positive integers, got {self.depths!r}")
        object.__setattr__(self, "depths", tuple(self.depths))  # YAML and JSON give lists
        if self.num_classes != 0 and not _is_count(self.num_classes):
            raise ValueError(f"num_classes must be an integer of at least 0, got {self.num_classes!r}")
        if self.layer_scale is not None and not self.layer_scale > 0:
            raise ValueError(f"layer_scale must be positive or None, got {self.layer_scale}")
        if self.mlp_ratio * self.width < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves no hidden channel at width {self.width}")
        count_partial_channels(self.width, self.partial_ratio)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of the four stages: C, 2C, 4C, 8C."""
        return tuple(self.width * 2**i for i in range(4))


# Table 8.
VARIANTS: Mapping[str, FasterNetConfig] = MappingProxyType(
    {
        "fasternet_t0": FasterNetConfig(width=40, depths=(1, 2, 8, 2), activation="gelu"),
        "fasternet_t1": FasterNetConfig(width=64, depths=(1, 2, 8, 2), activation="gelu"),
        "fasternet_t2": FasterNetConfig(width=96, depths=(1, 2, 8, 2), activation="relu"),
        "fasternet_s": FasterNetConfig(width=128, depths=(1, 2, 13, 2), activation="relu"),
        "fasternet_m": FasterNetConfig(width=144, depths=(3, 4, 18, 3), activation="relu"),
        "fasternet_l": FasterNetConfig(width=192, depths=(3, 4, 18, 3), activation="relu"),
    }
)

# Table 5, by its column "variant". T0* is a T0 of another width, which brings its multiply-adds back to T0's. The one
# with r = 1/2 was never published: this is a stand-in of 336 M. Nor was T0* with ReLU, which has no stand-in.
TABLE5: Mapping[str, FasterNetConfig] = MappingProxyType(
    {
        "T0* r=1/2": FasterNetConfig(width=36, depths=(1, 2, 7, 2), activation="gelu", partial_ratio=1 / 2),
        "T0 r=1/4": VARIANTS["fasternet_t0"],
        "T0* r=1/8": FasterNetConfig(width=42, depths=(1, 2, 8, 2), activation="gelu", partial_ratio=1 / 8),
        "T0 BN": VARIANTS["fasternet_t0"],
        "T0 LN": dataclasses.replace(VARIANTS["fasternet_t0"], norm="ln"),
        "T0 ReLU": dataclasses.replace(VARIANTS["fasternet_t0"], activation="relu"),
        "T0 GELU": VARIANTS["fasternet_t0"],
        "T2 ReLU": VARIANTS["fasternet_t2"],
        "T2 GELU": dataclasses.replace(VARIANTS["fasternet_t2"], activation="gelu"),
    }
)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each position by itself."""
        x = input.permute(0, 2, 3, 1)  # (N, H, W, C)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)  # (N, C, H, W)


class ConvNorm(nn.Module):
    """Embedding (k = 4) or merging (k = 2): a k x k convolution with stride k, then a norm; no activation."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=kernel_size, bias=False)
        self.norm = _create_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H / k, W / k)."""
        return cast(Tensor, self.norm(self.conv(x)))


class FasterNetBlock(nn.Module):
    """PConv, PWConv C -> 2C, norm, activation, PWConv 2C -> C, added to the block's input (Fig. 4)."""

    def __init__(self, channels: int, index: int, drop_path: float, config: FasterNetConfig) -> None:
        super().__init__()
        hidden = int(channels * config.mlp_ratio)
        self.pconv = PConv2d(
            channels, config.partial_ratio, kernel_size=config.kernel_size, position=config.position, index=index
        )
        self.pwconv1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm = _create_norm(config.norm, hidden)
        self.act = _create_activation(config.activation)
        self.pwconv2 = nn.Conv2d(hidden, channels, 1, bias=False)
        self.layer_scale = (
            None if config.layer_scale is None else nn.Parameter(torch.full((channels,), config.layer_scale))
        )
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        y = self.pwconv1(self.pconv(x))  # (N, 2C, H, W)
        y = self.pwconv2(self.act(self.norm(y)))  # (N, C, H, W)
        if self.layer_scale is not None:
            y = y * self.layer_scale[:, None, None]
        return x + cast(Tensor, self.drop_path(y))


class Stage(nn.Module):
    """A merging (identity in the first stage) and a stack of blocks."""

    def __init__(self, index: int, drop_paths: Sequence[float], config: FasterNetConfig) -> None:
        super().__init__()
        channels = config.stage_channels[index]
        self.merging: nn.Module = nn.Identity() if index == 0 else ConvNorm(channels // 2, channels, 2, config.norm)
        self.blocks = nn.Sequential(*(FasterNetBlock(channels, j, p, config) for j, p in enumerate(drop_paths)))
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C / 2, 2H, 2W), in the first stage (N, C, H, W), to (N, C, H, W)."""
        x = self.merging(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = _checkpoint(cast(FasterNetBlock, block), x)
            else:
                x = block(x)
        return x


class Head(nn.Module):
    """Global average pooling, PWConv 8C -> 1280, activation, classifier (Table 8, "Classifier")."""

    def __init__(self, config: FasterNetConfig) -> None:
        super().__init__()
        self.pwconv = nn.Conv2d(config.stage_channels[-1], config.head_width, 1, bias=False)
        self.act = _create_activation(config.activation)
        self.drop = nn.Dropout(config.drop_rate)
        self.fc = _create_classifier(config)

    def forward(self, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Map (N, 8C, h, w) to (N, num_classes), or with ``pre_logits`` to (N, head_width)."""
        x = x.mean(dim=(2, 3), keepdim=True)  # (N, 8C, 1, 1)
        x = self.drop(self.act(self.pwconv(x)).flatten(1))  # (N, head_width)
        return x if pre_logits else cast(Tensor, self.fc(x))


class FasterNet(nn.Module):
    """The network of Fig. 4, as a classifier or, with ``out_indices``, as a backbone that returns feature maps.

    Args:
        config: What to build; ``VARIANTS`` holds the published ones.
        out_indices: None builds a classifier. Stages (0 to 3) build a backbone: ``forward`` returns their outputs.
        feature_norm: A BN on each returned map, beside the trunk, as in the published detection backbones.

    Attributes:
        config: The configuration.
        out_indices: The argument.
        feature_info: The same with timm's face, for the heads of others.
        feature_channels: Channels of the returned maps.
        feature_strides: Their strides.
    """

    def __init__(
        self, config: FasterNetConfig, *, out_indices: Sequence[int] | None = None, feature_norm: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.out_indices = None if out_indices is None else _check_out_indices(out_indices)
        self.embedding = ConvNorm(config.in_chans, config.width, 4, config.norm)
        rates = iter(torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            Stage(i, list(itertools.islice(rates, depth)), config) for i, depth in enumerate(config.depths)
        )
        self.head = None if self.out_indices is not None else Head(config)
        indices = self.out_indices or ()
        self.feature_info = FeatureInfo(config.stage_channels, indices, normed=feature_norm)
        self.feature_channels = tuple(self.feature_info.channels())
        self.feature_strides = tuple(self.feature_info.reduction())
        self.feature_norms = nn.ModuleDict(
            {str(i): nn.BatchNorm2d(config.stage_channels[i]) for i in indices if feature_norm}
        )
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Map pictures (N, in_chans, H, W) to logits (N, num_classes), or to the feature maps of ``out_indices``.

        Raises:
            ValueError: The input is not (N, in_chans, H, W) with H and W of at least 32.
        """
        if self.head is None:
            return self.forward_intermediates(x)
        return cast(Tensor, self.head(self.forward_features(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map pictures to the last stage's output, (N, 8C, H / 32, W / 32)."""
        x = self._embed(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the last stage's output to logits, or to what the classifier sees."""
        if self.head is None:
            raise ValueError("a model with features_only has no head")
        return cast(Tensor, self.head(x, pre_logits=pre_logits))

    def forward_intermediates(self, x: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """Map pictures to the outputs of the stages ``indices`` (default: ``out_indices``, else all four)."""
        wanted = _check_out_indices(indices if indices is not None else self.out_indices or (0, 1, 2, 3))
        x = self._embed(x)
        maps = []
        for i, stage in enumerate(self.stages[: wanted[-1] + 1]):
            x = stage(x)
            if i in wanted:
                maps.append(self.feature_norms[str(i)](x) if str(i) in self.feature_norms else x)
        return maps

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one for ``num_classes``; 0 leaves it out."""
        if self.head is None:
            raise ValueError("a model with features_only has no classifier")
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        reference = self.head.pwconv.weight
        self.head.fc = _create_classifier(self.config).to(reference.device, reference.dtype)
        self.head.fc.apply(_init_weights)
        self.head.train(self.training)

    def get_classifier(self) -> nn.Module | None:
        """Return the last layer, or None where there is no head."""
        return None if self.head is None else self.head.fc

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of storing them."""
        for stage in self.stages:
            cast(Stage, stage).grad_checkpointing = enable

    def _embed(self, x: Tensor) -> Tensor:
        channels = self.config.in_chans
        if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < MIN_INPUT_SIZE:
            raise ValueError(
                f"the input must have the shape (N, {channels}, H, W) with H and W of at least {MIN_INPUT_SIZE}, "
                f"got {tuple(x.shape)}"
            )
        return cast(Tensor, self.embedding(x))


def _create_norm(norm: Norm, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == "bn" else LayerNorm2d(channels, eps=1e-6)


def _create_activation(activation: Activation) -> nn.Module:
    return nn.GELU() if activation == "gelu" else nn.ReLU(inplace=True)


def _create_classifier(config: FasterNetConfig) -> nn.Module:
    return nn.Linear(config.head_width, config.num_classes) if config.num_classes else nn.Identity()


def _checkpoint(block: FasterNetBlock, x: Tensor) -> Tensor:
    """Run a block that recomputes its activations in the backward pass."""
    if torch.compiler.is_compiling():  # a compiled recomputation has no side effects
        return cast(Tensor, checkpoint(block, x, use_reentrant=False))
    runs = itertools.count()

    def run(x: Tensor) -> Tensor:
        with _keep_statistics(block.norm) if next(runs) else contextlib.nullcontext():
            return cast(Tensor, block(x))

    return checkpoint(run, x, use_reentrant=False)


@contextlib.contextmanager
def _keep_statistics(norm: nn.Module) -> Iterator[None]:
    """Leave a BN's running statistics alone: recomputing would move them a second time."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        yield
        return
    kept = norm.momentum, norm.num_batches_tracked
    norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        norm.momentum, norm.num_batches_tracked = kept


def _init_weights(module: nn.Module) -> None:
    """Draw every convolution's and linear layer's weights from a truncated normal, std 0.02; biases are 0."""
    if isinstance(module, nn.Conv2d | nn.Linear | PConv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def _check_out_indices(indices: Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(indices)
    if not chosen or sorted(set(chosen)) != list(chosen) or chosen[0] < 0 or chosen[-1] > 3:
        raise ValueError(f"out_indices must be increasing stages from 0 to 3, got {chosen}")
    return chosen
