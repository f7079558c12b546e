"""Evaluation of any callable that returns logits: top-1, top-5, loss, and the same class by class.

Shapes: N pictures, K classes, k = min(5, K) best classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class ClassResult:
    """One class: how many pictures it had, and the percentage recognised (None without pictures)."""

    name: str
    num_images: int
    top1: float | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a network got right.

    Attributes:
        top1: Percentage of pictures whose class came first.
        top5: Percentage of pictures whose class was among the k first; 100 where there are no more than five.
        loss: Mean cross-entropy, without label smoothing.
        num_images: Pictures evaluated.
        per_class: One result a class, in the order of the labels.
        truths: Label of each picture, (N,).
        labels: The k best labels of each picture, best first, (N, k).
        probabilities: Their probabilities, (N, k).
    """

    top1: float
    top5: float
    loss: float
    num_images: int
    per_class: tuple[ClassResult, ...]
    truths: Tensor
    labels: Tensor
    probabilities: Tensor

    def values(self) -> dict[str, Any]:
        """Return the figures as plain data, the pictures left out."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "num_images": self.num_images,
            "per_class": [dataclasses.asdict(result) for result in self.per_class],
        }


@torch.inference_mode()
def evaluate(
    logits_fn: Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    class_names: Sequence[str],
) -> Evaluation:
    """Compare the predictions of a network with the labels.

    Args:
        logits_fn: From pictures (N, C, H, W), as the loader gives them, to logits (N, K) on any device; a
            module has to be in evaluation mode.
        loader: Batches of pictures and labels (N,).
        class_names: Names of the K classes, in the order of the labels.

    Raises:
        ValueError: There are no pictures, the network has other classes, or its outputs are not finite.
    """
    best = min(5, len(class_names))
    loss = 0.0
    truths, labels, probabilities = [], [], []
    for images, truth in loader:
        logits = logits_fn(images).float().cpu()  # (N, K)
        if logits.shape[1] != len(class_names):
            raise ValueError(f"the network has {logits.shape[1]} classes, the data {len(class_names)}")
        loss += F.cross_entropy(logits, truth, reduction="sum").item()
        probability, label = logits.softmax(dim=1).topk(best, dim=1)  # (N, k)
        truths.append(truth)
        labels.append(label)
        probabilities.append(probability)
    if not truths:
        raise ValueError("there are no pictures to evaluate")
    if not math.isfinite(loss):
        raise ValueError("the outputs of the network are not finite: its weights are damaged or training diverged")
    return _summarise(loss, torch.cat(truths), torch.cat(labels), torch.cat(probabilities), class_names)


def _summarise(
    loss: float, truths: Tensor, labels: Tensor, probabilities: Tensor, class_names: Sequence[str]
) -> Evaluation:
    hits = labels == truths[:, None]  # (N, k)
    first = hits[:, 0]
    totals = torch.bincount(truths, minlength=len(class_names)).tolist()
    rights = torch.bincount(truths[first], minlength=len(class_names)).tolist()
    return Evaluation(
        top1=100 * int(first.sum()) / len(truths),
        top5=100 * int(hits.any(dim=1).sum()) / len(truths),
        loss=loss / len(truths),
        num_images=len(truths),
        per_class=tuple(
            ClassResult(name, total, 100 * right / total if total else None)
            for name, total, right in zip(class_names, totals, rights, strict=True)
        ),
        truths=truths,
        labels=labels,
        probabilities=probabilities,
    )
