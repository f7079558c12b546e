"""Exact fast inference in plain PyTorch: the same function, without BN and without full copies of the activation.

What the published code made fast by changing the function (Table 9, "slicing"), this makes fast without changing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasternet.deploy.fold import fold_batch_norm
from fasternet.models import convert
from fasternet.models.fasternet import (
    MIN_INPUT_SIZE,
    ConvNorm,
    FasterNet,
    FasterNetBlock,
    FasterNetConfig,
    Stage,
)
from fasternet.ops.block import BlockWeights, Pointwise, block_restore_

Engine = Literal["eager"]


class InferenceBlock(nn.Module):
    """A FasterNet block as ``block_restore_`` computes it; it overwrites its input, which the stage owns."""

    def __init__(self, block: FasterNetBlock, pointwise: Pointwise) -> None:
        super().__init__()
        self.pointwise = pointwise
        project = block.pwconv2.weight
        if block.layer_scale is not None:
            project = nn.Parameter(project * block.layer_scale[:, None, None, None])
        self.partial, self.expand, self.project = block.pconv.weight, block.pwconv1.weight, project
        self.expand_bias = block.pwconv1.bias
        self.start = block.pconv.start
        self.norm = block.norm
        self.act = _activate_in_place(block.act)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W), in place."""
        weights = BlockWeights(self.partial, self.expand, self.expand_bias, self.project, self.start)
        return block_restore_(x, weights, lambda h: self.act(self.norm(h)), pointwise=self.pointwise)


class InferenceMerging(nn.Module):
    """A merging, whose patches do not overlap, as one matrix product over them; its output is channels_last."""

    def __init__(self, merging: ConvNorm) -> None:
        super().__init__()
        conv = merging.conv
        self.kernel_size = conv.kernel_size[0]
        self.weight = nn.Parameter(conv.weight.permute(0, 2, 3, 1).flatten(1).contiguous())  # (2C, k * k * C)
        self.bias = conv.bias
        self.norm = merging.norm

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, 2C, H / k, W / k)."""
        k = self.kernel_size
        n, c, height, width = x.shape[0], x.shape[1], x.shape[2] // k, x.shape[3] // k
        patches = x.permute(0, 2, 3, 1)[:, : height * k, : width * k].reshape(n, height, k, width, k * c)
        patches = patches.transpose(2, 3).reshape(n, height, width, k * k * c)
        return cast(Tensor, self.norm(F.linear(patches, self.weight, self.bias).permute(0, 3, 1, 2)))


class InferenceFasterNet(FasterNet):
    """A FasterNet for inference only; ``reasons`` says why it computes as it does."""

    reasons: dict[str, str]

    @torch.no_grad()
    def forward_features(self, x: Tensor) -> Tensor:
        """See ``FasterNet``; no gradient is recorded."""
        return super().forward_features(x)

    @torch.no_grad()
    def forward_intermediates(self, x: Tensor, indices: Any = None) -> list[Tensor]:
        """See ``FasterNet``; no gradient is recorded."""
        return super().forward_intermediates(x, indices)

    def _embed(self, x: Tensor) -> Tensor:
        return super()._embed(x).contiguous(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> InferenceFasterNet:
        """Refuse training: the folded network has no BN left to train."""
        if mode:
            raise ValueError("an optimised model is for inference only: train the model that it was made from")
        super().train(False)
        return self


def optimize_for_inference(model: nn.Module, *, batch_size: int = 1, engine: str = "eager") -> InferenceFasterNet:
    """Return a new model that computes the same function faster.

    Args:
        model: A ``FasterNet`` or timm's; it is not modified.
        batch_size: What the model will mostly be run with; it takes any. At 1, pointwise convolutions and mergings
            run as matrix products, above as convolutions.
        engine: ``"eager"``, plain PyTorch.

    Returns:
        A model for inference only, in evaluation mode, with ``reasons``: for each choice, why. The difference from
        ``model`` is at most 1e-5 of the largest output in fp32.

    Raises:
        ValueError: ``model`` is no FasterNet, or an option is not known.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine {engine!r} is not one of {', '.join(get_args(Engine))}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if not isinstance(model, FasterNet):
        model = from_timm(model)
    weight = model.embedding.conv.weight
    example = torch.zeros(1, model.config.in_chans, MIN_INPUT_SIZE, MIN_INPUT_SIZE).to(weight.device, weight.dtype)
    folded = cast(FasterNet, fold_batch_norm(model, example))
    pointwise: Pointwise = "matmul" if batch_size == 1 else "conv"
    for stage in cast(Iterable[Stage], folded.stages):
        stage.blocks = nn.Sequential(*(InferenceBlock(cast(FasterNetBlock, b), pointwise) for b in stage.blocks))
        if pointwise == "matmul" and isinstance(stage.merging, ConvNorm):
            stage.merging = InferenceMerging(stage.merging)
    folded.__class__ = InferenceFasterNet  # the copy is ours: same modules, but for inference only
    optimized = cast(InferenceFasterNet, folded.requires_grad_(False).to(memory_format=torch.channels_last))
    optimized.reasons = _explain(optimized, pointwise)
    return optimized


def from_timm(model: nn.Module) -> FasterNet:
    """Return our FasterNet with the weights of timm's, in its mode.

    Raises:
        ValueError: ``model`` is not timm's FasterNet, or one that ours cannot express.
    """
    from timm.models.fasternet import FasterNet as TimmFasterNet

    if not isinstance(model, TimmFasterNet):
        raise ValueError(f"model must be a FasterNet of this package or of timm, got {type(model).__name__}")
    blocks = [stage.blocks for stage in model.stages]
    first = blocks[0][0]
    acts = {nn.GELU: "gelu", nn.ReLU: "relu"}
    activation = acts.get(type(first.mlp[2]))
    if activation is None or model.global_pool.pool_type != "avg":
        raise ValueError("timm's model must have GELU or ReLU and average pooling")
    ours = FasterNet(
        FasterNetConfig(
            width=model.patch_embed.proj.out_channels,
            depths=tuple(len(stage) for stage in blocks),
            activation=cast(Any, activation),
            partial_ratio=first.spatial_mixing.dim_conv3 / first.mlp[0].in_channels,
            mlp_ratio=first.mlp[0].out_channels / first.mlp[0].in_channels,
            head_width=model.head_hidden_size,
            layer_scale=None if first.layer_scale is None else 1.0,
            in_chans=model.in_chans,
            num_classes=model.num_classes,
        )
    )
    convert.load_state(ours, model.state_dict(), source="timm's model")
    return ours.to(model.patch_embed.proj.weight).train(model.training)


def _activate_in_place(act: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the activation as a function that reuses its input: a second hidden map would be a fresh allocation."""
    return torch.ops.aten.gelu_ if isinstance(act, nn.GELU) else F.relu_


def _explain(model: InferenceFasterNet, pointwise: Pointwise) -> dict[str, str]:
    """Say for each choice why it was made."""
    folded = model.config.norm == "bn"
    return {
        "norm": "BN folded into the convolution before it"
        if folded
        else "LayerNorm kept: it depends on the input and cannot be folded",
        "block": "PConv writes into the block's input, whose quarter is kept and put back before the shortcut: "
        "no concatenation and no clone",
        "pointwise": "matrix products over the pixels, mergings too: at batch size 1 libraries prepare a "
        "convolution's weights anew in each call"
        if pointwise == "matmul"
        else "convolutions: above batch size 1 their blocking gains more than preparing the weights costs",
        "shortcut": "the second pointwise convolution is added to the block's input in place",
        "activation": "in place: a second hidden map would be allocated for nothing",
        "memory_format": "channels_last: pointwise convolutions are plain matrix products in it",
    }
