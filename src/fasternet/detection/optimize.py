"""Detectors made fast: the same function, in eager PyTorch, the C++ engine or another runtime for the backbone.

BN is folded into the convolutions before it; the BN on a FasterNet's map, which no convolution of its own precedes,
into the pyramid's 1 x 1 convolution that reads it.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import Conv2dNormActivation

from fasternet.data.boxes import fit_size
from fasternet.deploy import choose_engine, optimize_for_inference
from fasternet.deploy.runtime import InPrecision, Runtime, check_arguments, create_runtime, prepare_network
from fasternet.detection.detector import Detector, PyramidBackbone
from fasternet.detection.transform import SIZE_DIVISOR
from fasternet.models.fasternet import FasterNet

MAX_SIZES = 8  # runtimes of a fixed size that are kept: each holds the backbone's weights
_TRIAL_ASPECT = 4 / 3  # longer over shorter side, of most photographs


class OptimizedDetector(Detector):
    """A detector for inference only; ``reasons`` says why it computes as it does."""

    reasons: dict[str, str]

    def train(self, mode: bool = True) -> OptimizedDetector:
        """Refuse training: the folded network has no BN left to train."""
        if mode:
            raise ValueError("an optimised detector is for inference only: train the detector that it was made from")
        nn.Module.train(self, False)
        return self


class SizedBody(nn.Module):
    """A backbone in a runtime that takes one size of pictures: one for each size that occurs, at its first occurrence.

    Args:
        body: The backbone.
        engine: See ``create_runtime``.
        precision: See ``create_runtime``.
        threads: See ``create_runtime``.
    """

    def __init__(self, body: nn.Module, engine: str, precision: str, threads: int | None) -> None:
        super().__init__()
        self.body = body
        device = next(body.parameters()).device

        def create(shape: torch.Size) -> Runtime:
            example = torch.zeros(shape, device=device)
            return create_runtime(body, example, engine=engine, precision=precision, threads=threads)

        self._get_runtime = functools.lru_cache(MAX_SIZES)(create)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (N, 3, H, W) to four maps."""
        return cast(list[Tensor], self._get_runtime(x.shape)(x))


def optimize_detector(
    detector: Detector,
    *,
    engine: str = "eager",
    precision: str = "fp32",
    threads: int | None = None,
    size: tuple[int, int] | None = None,
) -> OptimizedDetector:
    """Return a new detector that computes the same function faster.

    Args:
        detector: It is not modified.
        engine: Of the backbone; neck, heads and post-processing run in PyTorch. ``"eager"`` and, for a FasterNet on the
            CPU, ``"cpu"``, the C++ engine, take pictures of any size as they come. ``"compile"``, ``"onnxruntime"`` and
            ``"openvino"`` are prepared, in seconds to minutes, for each padded size that occurs, and the last
            ``MAX_SIZES`` are kept. ``"auto"`` is the fastest here, without compile, for ``size``.
        precision: Of the backbone: ``"fp32"`` or ``"bf16"``.
        threads: Of the backbone, for engines that have their own; None takes PyTorch's.
        size: Height and width of the pictures that ``"auto"`` chooses for; None: 3 to 4, as most photographs.

    Returns:
        A detector for inference only, in evaluation mode, with ``reasons``: for each choice, why. In fp32 the feature
        maps of a FasterNet differ by at most 1e-5 of the largest value from those of ``detector`` (1e-4 for other
        engines than eager and cpu); those of deep rivals by up to 6e-4 (ResNet101 with random weights), which is
        rounding: in float64 it is 1e-12.

    Raises:
        ValueError: An argument does not fit, or the engine cannot run this backbone here.
        ModuleNotFoundError: The engine's package is missing.
    """
    optimized = copy.deepcopy(detector)
    optimized.freeze_stages = 0  # whose modules may be gone
    optimized.__class__ = OptimizedDetector  # the copy is ours: same modules, but for inference only
    optimized = cast(OptimizedDetector, optimized.requires_grad_(False).eval())
    backbone = cast(PyramidBackbone, optimized.backbone)
    device = next(backbone.body.parameters()).device
    if precision == "int8":
        raise ValueError(
            "precision int8 is calibrated on random pictures, for speed only: a detector takes fp32 or bf16"
        )
    check_arguments(torch.zeros(1, 3, 64, 64, device=device), engine, precision, threads)
    reasons = fold_norms(optimized)
    if engine == "auto":
        example = torch.zeros(1, 3, *_find_padded_size(detector, size), device=device)
        choice = choose_engine(backbone.body, example, precision=precision, threads=threads)
        engine, reasons["choice"] = choice.engine, choice.reason
        threads = None if engine == "eager" else threads
    backbone.body, found = _optimize_body(backbone.body, engine, precision, threads)
    optimized.to(memory_format=torch.channels_last)
    reasons["heads"] = "neck and heads in channels_last: their convolutions take 2 to 15 % less time in it on a CPU"
    optimized.reasons = {**found, **reasons}
    return optimized


def fold_norms(detector: Detector) -> dict[str, str]:
    """Fold the BN of neck and mask head, then that of a FasterNet's maps, into convolutions, in place.

    Returns:
        Why, by what was folded.
    """
    return fold_head_norms(detector) | _fold_feature_norms(cast(PyramidBackbone, detector.backbone))


def fold_head_norms(detector: Detector) -> dict[str, str]:
    """Fold the BN of neck and mask head of a detector in evaluation mode into convolutions, in place.

    Returns:
        Why, under ``"head_norm"``; nothing where there is no such BN.
    """
    if detector.config.head_norm == "none":
        return {}
    for layer in [*detector.backbone.fpn.modules(), *(detector.roi_heads.mask_head or nn.Identity()).modules()]:
        if isinstance(layer, Conv2dNormActivation):
            layer[0] = fuse_conv_bn_eval(cast(Any, layer[0]), cast(Any, layer[1]))
            del layer[1]
    return {"head_norm": "the BN of neck and mask head is folded into the convolution before it"}


def check_unoptimized(detector: Detector) -> None:
    """Check that a detector has all that a file of its weights holds.

    Raises:
        ValueError: It is an optimised one.
    """
    if isinstance(detector, OptimizedDetector):
        raise ValueError("an optimised detector cannot be saved, its BN is folded: save the one that it was made from")


@torch.no_grad()
def _fold_feature_norms(backbone: PyramidBackbone) -> dict[str, str]:
    """Fold the BN on each map of a FasterNet into the lateral convolution that reads it, in place and in float64.

    Returns:
        Why, under ``"feature_norm"``; nothing where there is no such BN.
    """
    body = backbone.body
    if not isinstance(body, FasterNet) or not body.feature_norms:
        return {}
    for norm, lateral in zip(body.feature_norms.values(), backbone.fpn.inner_blocks, strict=True):
        conv = cast(nn.Conv2d, cast(nn.Sequential, lateral)[0])
        mean, variance, scale, shift = (
            cast(Tensor, x).double() for x in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        scale = scale / (variance + cast(float, norm.eps)).sqrt()
        weight = conv.weight.double()  # (O, C, 1, 1)
        assert conv.bias is not None
        conv.bias += (weight.flatten(1) @ (shift - mean * scale)).to(conv.bias)
        conv.weight.copy_(weight * scale[:, None, None])
    body.feature_norms = nn.ModuleDict()
    return {"feature_norm": "the BN on each map is folded into the pyramid's 1 x 1 convolution that reads it"}


def _optimize_body(
    body: nn.Module, engine: str, precision: str, threads: int | None
) -> tuple[nn.Module, dict[str, str]]:
    """Return a backbone in an engine, and for each choice why."""
    if engine == "cpu":
        if not isinstance(body, FasterNet):
            raise ValueError(
                "engine cpu runs a FasterNet alone, and the backbone is another network: "
                "take eager, compile, onnxruntime or openvino"
            )
        native = optimize_for_inference(body, engine="cpu", precision=precision, threads=threads)
        return native, dict(native.reasons)
    if engine != "eager":
        kept = f"one runtime for each padded size, made when it first occurs; the last {MAX_SIZES} are kept"
        return SizedBody(body, engine, precision, threads), {"engine": f"{engine}: {kept}"}
    network, reasons = prepare_network(body, torch.zeros(1, 3, 64, 64, device=next(body.parameters()).device), engine)
    return (InPrecision(network, torch.bfloat16) if precision == "bf16" else network), reasons


def _find_padded_size(detector: Detector, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return height and width of what the backbone sees of a picture."""
    config = detector.config
    height, width = size or (config.min_size, round(config.min_size * _TRIAL_ASPECT))
    if min(height, width) < 1:
        raise ValueError(f"size={size} must be a height and a width in pixels")
    fitted = fit_size(height, width, config.min_size, config.max_size)
    return cast(tuple[int, int], tuple(-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in fitted))
