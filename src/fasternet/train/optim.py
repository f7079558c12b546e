"""AdamW and the learning rate of Table 6: a linear warm-up, then half a cosine."""

from __future__ import annotations

import math

import torch
from torch import nn

from fasternet.train.recipes import Recipe


def create_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Create AdamW over every parameter that is trained; the decay falls on all of them, as published."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def compute_lr(recipe: Recipe, epoch: int, done: float = 0.0) -> float:
    """Return the learning rate.

    Args:
        recipe: Where the rates, the lengths and the schedule stand.
        epoch: Counted from 0.
        done: Share of this epoch's steps that lie behind; the ``epoch`` schedule does not look at it.
    """
    if recipe.lr_schedule == "epoch":  # the published one: the last warm-up epoch already runs at the peak
        position, ramp = float(epoch), max(recipe.warmup_epochs - 1, 0)
    else:
        position, ramp = epoch + done, recipe.warmup_epochs
    if position < ramp:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * position / ramp
    length = max(recipe.epochs - recipe.warmup_epochs, 1)
    position = min(max(position - recipe.warmup_epochs, 0.0), length)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * position / length)) / 2
