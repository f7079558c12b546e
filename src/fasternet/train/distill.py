"""Distillation as DeiT does it and the published code offers it: a frozen teacher beside the labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasternet.models.checkpoint import Checkpoint, Preprocessing
from fasternet.models.registry import create_model
from fasternet.rivals import is_fasternet, load_network, load_rival
from fasternet.train.recipe import Recipe


class Teacher(nn.Module):
    """A network in evaluation mode for good, without gradients, that takes the student's pictures.

    Args:
        network: The network.
        own: How its pictures are normalised.
        student: How the student's are.
    """

    def __init__(self, network: nn.Module, own: Preprocessing, student: Preprocessing) -> None:
        super().__init__()
        self.network = network
        std = torch.tensor(own.std)
        self.scale = nn.Buffer((torch.tensor(student.std) / std)[:, None, None])  # (C, 1, 1)
        self.shift = nn.Buffer(((torch.tensor(student.mean) - torch.tensor(own.mean)) / std)[:, None, None])
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map the student's pictures (N, C, S, S) to logits (N, K)."""
        logits: Tensor = self.network(images * self.scale + self.shift)
        return logits


def create_teacher(recipe: Recipe, class_names: Sequence[str], student: Preprocessing) -> Teacher | None:
    """Return the recipe's teacher, or None.

    Args:
        recipe: ``teacher``, and the sizes of the training pictures.
        class_names: The classes of the data.
        student: How the student's pictures are normalised.

    Raises:
        ValueError: There is no such network, it has other classes, or it cannot take the pictures.
        ConnectionError: Its published weights cannot be downloaded.
    """
    if recipe.teacher is None:
        return None
    field = f"recipe field teacher={recipe.teacher}"
    path = Path(recipe.teacher.removeprefix("local-dir:"))
    if path.is_file() or recipe.teacher.startswith("hf-hub:"):
        raise ValueError(
            f"{field}: give a model folder; timm's save_for_hf writes one, "
            "`hf download USER/NAME --local-dir FOLDER` fetches one"
        )
    try:
        found = load_network(path) if path.is_dir() else _fetch(recipe.teacher)
    except ConnectionError as error:
        reason = str(error).partition(": without a network")[0]  # what follows is for the student's weights
        raise ConnectionError(f"{field}: {reason}: without a network, give a model folder") from None
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"{field} is no model or run folder, and no classifier with published weights: {error}"
        ) from None
    if found.num_classes != len(class_names):
        raise ValueError(f"{field} has {found.num_classes} classes, the data {len(class_names)}")
    if found.class_names not in (None, tuple(class_names)):
        raise ValueError(f"{field} knows other classes than the data has")
    teacher = Teacher(found.model, found.preprocessing, student)
    for size in sorted({recipe.size_of(epoch) for epoch in range(recipe.epochs)}):
        try:
            teacher(torch.zeros(1, len(student.mean), size, size))
        except Exception as error:  # each network has its own
            raise ValueError(f"{field} cannot take pictures of {size} pixels: {str(error).splitlines()[0]}") from None
    return teacher


def _fetch(name: str) -> Checkpoint:
    """Return a network with its published weights and classifier, and how its pictures are normalised."""
    if not is_fasternet(name):
        return load_rival(name)
    model = create_model(name, pretrained=True)
    return Checkpoint(name=name, model=model, class_names=None, preprocessing=Preprocessing())


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
