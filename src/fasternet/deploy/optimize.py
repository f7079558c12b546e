"""Exact fast inference in plain PyTorch: the same function, without BN and without full copies of the activation.

What the published code made fast by changing the function (Table 9, "slicing"), this makes fast without changing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasternet.deploy.fold import fold_batch_norm
from fasternet.deploy.published import check_timm
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

if TYPE_CHECKING:
    from fasternet.deploy.cpu_module import CpuModule

ModuleEngine = Literal["eager", "cpu", "auto"]  # those of ``deploy.ENGINES`` that give a module
TRIAL_SIZE = 224  # pixels; the paper's


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


@overload
def optimize_for_inference(
    model: nn.Module, *, batch_size: int = 1, engine: Literal["eager"] = "eager"
) -> InferenceFasterNet: ...
@overload
def optimize_for_inference(
    model: nn.Module,
    *,
    batch_size: int = 1,
    engine: Literal["cpu"],
    precision: str = "fp32",
    threads: int | None = None,
) -> CpuModule: ...
@overload
def optimize_for_inference(
    model: nn.Module, *, batch_size: int = 1, engine: str, precision: str = "fp32", threads: int | None = None
) -> nn.Module: ...
def optimize_for_inference(
    model: nn.Module,
    *,
    batch_size: int = 1,
    engine: str = "eager",
    precision: str = "fp32",
    threads: int | None = None,
) -> nn.Module:
    """Return a new model that computes the same function faster.

    Args:
        model: A ``FasterNet`` or timm's, as a classifier or for its feature maps; it is not modified.
        batch_size: What the model will mostly be run with; it takes any. At 1, ``eager`` runs pointwise convolutions
            and mergings as matrix products, above as convolutions.
        engine: ``"eager"``, plain PyTorch; ``"cpu"``, the C++ engine, which runs on the CPU alone; or ``"auto"``, the
            faster of these two, of which alone a module can be made, for ``batch_size`` pictures of 224 pixels here
            (classifiers only); in bf16 it is ``"cpu"``, and there is no choice. See ``choose_engine`` for all engines.
        precision: Of the engine ``cpu``: ``"fp32"`` or ``"bf16"``; what goes in and out is float32. ``eager`` computes
            in the model's own.
        threads: Of the engine ``cpu``; None takes PyTorch's at each call, as ``eager`` does.

    Returns:
        A model for inference only, in evaluation mode, with ``reasons``: for each choice, why. The difference from
        ``model`` is at most 1e-5 of the largest output in fp32, 2e-2 in bf16.

    Raises:
        ValueError: ``model`` is no FasterNet, an option is not known, or the engine cannot run here.
    """
    if engine not in get_args(ModuleEngine):
        raise ValueError(f"engine {engine!r} is not one of {', '.join(get_args(ModuleEngine))}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if engine == "cpu":
        from fasternet.deploy.cpu_engine import CpuEngine
        from fasternet.deploy.cpu_module import CpuModule

        return CpuModule(CpuEngine.from_model(model, precision=precision), threads)
    if engine == "auto":
        return _optimize_auto(model, batch_size, precision, threads)
    if precision != "fp32" or threads is not None:
        raise ValueError("precision and threads are options of engine cpu: eager takes the model's and PyTorch's own")
    return _optimize_eager(model, batch_size)


def _optimize_auto(model: nn.Module, batch_size: int, precision: str, threads: int | None) -> nn.Module:
    from fasternet.deploy.auto import choose_engine

    model = model if isinstance(model, FasterNet) else from_timm(model)
    options: dict[str, Any] = {"precision": precision, "threads": threads}
    if precision != "fp32":
        engine, reason = "cpu", f"no choice: in {precision} the engine cpu alone gives a module"
    else:
        device = model.embedding.conv.weight.device
        example = torch.zeros(batch_size, model.config.in_chans, TRIAL_SIZE, TRIAL_SIZE, device=device)
        choice = choose_engine(model, example, threads=threads, candidates=("eager", "cpu"))
        engine, reason = choice.engine, choice.reason
    options = options if engine == "cpu" else {}
    optimized = cast(Any, optimize_for_inference(model, batch_size=batch_size, engine=engine, **options))
    optimized.reasons = {**optimized.reasons, "choice": reason}
    return cast(nn.Module, optimized)


def _optimize_eager(model: nn.Module, batch_size: int) -> InferenceFasterNet:
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
    """Return our FasterNet with the weights of timm's, in its mode: a classifier, or with ``features_only`` its maps.

    Raises:
        ValueError: ``model`` is not timm's FasterNet, or one that ours cannot express, such as with hooks.
    """
    from timm.models import FeatureListNet
    from timm.models.fasternet import FasterNet as TimmFasterNet

    stages: list[Any]
    if isinstance(model, TimmFasterNet):
        stages, out_indices = list(model.stages), None
        head = {"head_width": model.head_hidden_size, "num_classes": model.num_classes}
        if model.global_pool.pool_type != "avg":
            raise ValueError("timm's model must have average pooling")
    elif isinstance(model, FeatureListNet) and "stages_0" in model._modules:
        stages = [stage for name, stage in model._modules.items() if name.startswith("stages_")]
        out_indices, head = tuple(model.feature_info.out_indices), {}
    else:
        raise ValueError(f"model must be a FasterNet of this package or of timm, got {type(model).__name__}")
    check_timm(model)
    config = _read_config(model.patch_embed, stages, **head)
    ours = FasterNet(config, out_indices=out_indices)
    state = {key.replace("stages_", "stages."): tensor for key, tensor in model.state_dict().items()}
    if len(stages) < len(config.depths):  # timm leaves out what follows the last map; ours has it, and never runs it
        state = convert.to_format(ours, "timm") | state
    convert.load_state(ours, state, source="timm's model")
    return ours.to(model.patch_embed.proj.weight).train(model.training)


def _read_config(embedding: nn.Module, stages: list[Any], **head: Any) -> FasterNetConfig:
    """Return the configuration of timm's modules; stages that are missing at the end get one block."""
    from timm.models.fasternet import Block, PatchEmbed

    if not isinstance(embedding, PatchEmbed) or not all(isinstance(stage, Block) for stage in stages):
        raise ValueError("model must be a FasterNet of this package or of timm, got other modules")
    first = stages[0].blocks[0]
    activation = {nn.GELU: "gelu", nn.ReLU: "relu"}[type(first.mlp[2])]
    return FasterNetConfig(
        width=embedding.proj.out_channels,
        depths=(*(len(stage.blocks) for stage in stages), *[1] * (4 - len(stages))),
        activation=cast(Any, activation),
        partial_ratio=first.spatial_mixing.dim_conv3 / first.mlp[0].in_channels,
        mlp_ratio=first.mlp[0].out_channels / first.mlp[0].in_channels,
        layer_scale=None if first.layer_scale is None else 1.0,
        in_chans=embedding.proj.in_channels,
        **head,
    )


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
