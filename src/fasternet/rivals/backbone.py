"""Backbones by name: FasterNet, the rivals of Table 4, or a network of timm, as four feature maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasternet.models.registry import create_model
from fasternet.rivals import pvt
from fasternet.rivals.network import build_network, is_fasternet, resolve_network
from fasternet.rivals.registry import Rival

STRIDES = (4, 8, 16, 32)
_PROBE = (256, 320)  # the size of no network: one that is bound to its own cannot see pictures of any size


def create_backbone(
    name: str, *, pretrained: bool = False, checkpoint_path: Path | str | None = None, **options: Any
) -> nn.Module:
    """Create a backbone; what is random in it follows from ``torch.manual_seed``.

    Args:
        name: A FasterNet, a rival by the paper's name (``ResNet50``), or a network of timm with maps at four strides.
        pretrained: Start from published ImageNet weights, downloading them once.
        checkpoint_path: Start from these: a model or run folder, or a file in any format of ``convert``.
        **options: What the network's builder takes, for example ``feature_norm``, ``drop_path_rate``, ``width``.

    Returns:
        A module in training mode that maps pictures (N, 3, H, W) to four maps, finest first, with their
        ``feature_channels`` and ``feature_strides`` (4, 8, 16, 32).

    Raises:
        ValueError: A name, an option or a checkpoint does not fit, or there are no maps at strides of 4 to 32.
        FileNotFoundError: There is no such checkpoint.
        ConnectionError: The published weights cannot be downloaded.
    """
    if is_fasternet(name):
        return create_model(name, pretrained=pretrained, checkpoint_path=checkpoint_path, features_only=True, **options)
    rival = resolve_network(name)
    if checkpoint_path is not None:
        raise ValueError(f"checkpoint {checkpoint_path} is for a FasterNet, and the backbone {name} was asked for")
    if rival.source != "timm" and rival.builder not in pvt.DEPTHS:
        raise ValueError(f"{name} cannot be a backbone: it returns no maps")
    options["features_only"] = True
    indices, channels = _find_maps(rival, options)
    if rival.source == "timm":
        options["out_indices"] = indices
    network = build_network(rival, 0, options, pretrained=pretrained)
    network.feature_channels, network.feature_strides = channels, STRIDES  # type: ignore[assignment]
    return network


def _find_maps(rival: Rival, options: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return which of a network's maps have our strides, and their channels, from a run without data."""
    with torch.device("meta"):
        network = build_network(rival, 0, options)
        try:
            shapes = [tuple(x.shape[1:]) for x in network(torch.empty(1, 3, *_PROBE))]
        except Exception as error:  # each network refuses a size in its own way
            raise ValueError(f"{rival.name} cannot be a backbone: {error}") from None
    places = {(height, width): i for i, (_, height, width) in enumerate(shapes)}  # the last one where a stride repeats
    sizes = [(_PROBE[0] // stride, _PROBE[1] // stride) for stride in STRIDES]
    if missing := [stride for stride, size in zip(STRIDES, sizes, strict=True) if size not in places]:
        raise ValueError(f"{rival.name} cannot be a backbone: it has no map at stride {missing[0]}")
    indices = tuple(places[size] for size in sizes)
    return indices, tuple(shapes[i][0] for i in indices)
