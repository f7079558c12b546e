"""Distillation as DeiT does it and the published code offers it: a frozen teacher beside the labels."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasternet.rivals import create_network, load_network
from fasternet.train.recipe import Recipe

PUBLISHED_CLASSES = 1000  # of the weights that a name stands for


def create_teacher(recipe: Recipe, num_classes: int) -> nn.Module | None:
    """Return the recipe's teacher, in evaluation mode for good and without gradients, or None.

    Raises:
        ValueError: There is no such network, or it has other classes.
        ConnectionError: Its published weights cannot be downloaded.
    """
    if recipe.teacher is None:
        return None
    path = Path(recipe.teacher)
    if path.is_dir():
        network = load_network(path).model
    else:
        network = create_network(recipe.teacher, num_classes=PUBLISHED_CLASSES, pretrained=True)
    with torch.inference_mode():
        size = recipe.input_size
        found = network.eval()(torch.zeros(1, 3, size, size)).shape[1]
    if found != num_classes:
        raise ValueError(f"recipe field teacher={recipe.teacher} has {found} classes, the data {num_classes}")
    return network.requires_grad_(False)


def compute_distillation(recipe: Recipe, loss: Tensor, logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return DeiT's loss: ``(1 - alpha) loss + alpha distance``.

    Args:
        recipe: ``distillation``, ``distillation_alpha`` and ``distillation_tau``.
        loss: The loss against the labels, a scalar.
        logits: The student's, (N, K).
        teacher_logits: The teacher's, (N, K).

    Returns:
        A scalar. The distance of ``soft`` is ``tau^2 KL / (N K)``, divided by the classes as in the published code;
        that of ``hard`` the cross-entropy with the teacher's first class.
    """
    if recipe.distillation == "soft":
        student, teacher = (F.log_softmax(x.float() / recipe.distillation_tau, dim=1) for x in (logits, teacher_logits))
        divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
        distance = divergence * recipe.distillation_tau**2 / logits.numel()
    else:
        distance = F.cross_entropy(logits.float(), teacher_logits.argmax(dim=1))
    return (1 - recipe.distillation_alpha) * loss + recipe.distillation_alpha * distance
