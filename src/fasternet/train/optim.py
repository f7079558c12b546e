"""AdamW and the learning rate of Table 6: a linear warm-up, then half a cosine; rates by layer for fine-tuning."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn

from fasternet.models.fasternet import FasterNet, Stage
from fasternet.train.recipe import Recipe

BETAS = (0.9, 0.999)  # Table 6


def create_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Create AdamW over every parameter that is trained; the decay falls on all of them, as published.

    Each group of parameters carries ``lr_scale``, its share of the rate.
    """
    return torch.optim.AdamW(
        _group_parameters(model, recipe.layer_decay),
        lr=recipe.effective_lr,
        betas=BETAS,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def compute_lr(recipe: Recipe, epoch: int, done: float = 0.0) -> float:
    """Return the learning rate.

    Args:
        recipe: Where the rates, the lengths and the schedule stand.
        epoch: Counted from 0.
        done: Share of this epoch's steps that lie behind; the ``epoch`` schedule does not look at it.
    """
    peak = recipe.effective_lr
    if recipe.lr_schedule == "epoch":  # the published one: the last warm-up epoch already runs at the peak
        position, ramp = float(epoch), max(recipe.warmup_epochs - 1, 0)
    else:
        position, ramp = epoch + done, recipe.warmup_epochs
    if position < ramp:
        return recipe.warmup_lr + (peak - recipe.warmup_lr) * position / ramp
    length = max(recipe.epochs - recipe.warmup_epochs, 1)
    position = min(max(position - recipe.warmup_epochs, 0.0), length)
    return recipe.min_lr + (peak - recipe.min_lr) * (1 + math.cos(math.pi * position / length)) / 2


def freeze_stages(model: nn.Module, num_stages: int) -> None:
    """Stop training the embedding and the first stages; 0 freezes nothing.

    Raises:
        ValueError: The network has no stages of FasterNet.
    """
    for module in _list_frozen(model, num_stages):
        module.requires_grad_(False)


def set_training(model: nn.Module, recipe: Recipe) -> None:
    """Switch to training mode, all but the frozen stages and, with ``batch_norm=frozen``, every BN."""
    model.train()
    for module in _list_frozen(model, recipe.freeze):
        module.eval()
    if recipe.batch_norm == "frozen":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _list_frozen(model: nn.Module, num_stages: int) -> list[nn.Module]:
    if not num_stages:
        return []
    if not isinstance(model, FasterNet):
        raise ValueError(f"recipe field freeze={num_stages} needs a FasterNet; other networks take freeze=0")
    return [model.embedding, *model.stages[:num_stages]]


def _group_parameters(model: nn.Module, layer_decay: float | None) -> list[dict[str, object]]:
    if layer_decay is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [{"params": trained, "lr_scale": 1.0}]
    groups = []
    for distance, layer in enumerate(reversed(_list_layers(model))):
        if trained := [parameter for parameter in layer.parameters() if parameter.requires_grad]:
            groups.append({"params": trained, "lr_scale": layer_decay**distance})
    return groups


def _list_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers in order: embedding, then each merging and each block, then the head."""
    if not isinstance(model, FasterNet) or model.head is None:
        raise ValueError("recipe field layer_decay needs a FasterNet classifier; other networks take layer_decay=none")
    layers: list[nn.Module] = [model.embedding]
    for stage in model.stages:
        layers += [cast(Stage, stage).merging, *cast(Stage, stage).blocks]
    return [*(layer for layer in layers if any(True for _ in layer.parameters())), model.head]
