"""Evaluation of any callable that returns logits: top-1, top-5, loss, calibration, and the same class by class.

Shapes: N pictures, K classes, k = min(5, K) best classes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasternet.train.distributed import World, gather

NUM_BINS = 15  # of the calibration, as in Guo et al., 2017
MAX_MATRIX = 100  # classes up to which all confusions are listed
NUM_CONFUSIONS = 50
ALONE = World()


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
        truths: Label of each picture, (N,); of several right labels the one that the network ranked best.
        labels: The k best labels of each picture, best first, (N, k).
        probabilities: Their probabilities, (N, k).
        losses: Cross-entropy of each picture, (N,).
    """

    top1: float
    top5: float
    loss: float
    num_images: int
    per_class: tuple[ClassResult, ...]
    truths: Tensor
    labels: Tensor
    probabilities: Tensor
    losses: Tensor

    def values(self) -> dict[str, Any]:
        """Return the figures as plain data, the pictures left out.

        ``calibration`` has a row ``[count, mean confidence, accuracy]`` for each of 15 equal bins of confidence, and
        ``ece`` is the mean distance of the two, all from 0 to 1. ``confusion`` counts pictures by truth (rows) and
        prediction (columns); beyond 100 classes it lists the most frequent ``[truth, prediction, count]``.
        """
        calibration = _calibrate(self.probabilities[:, 0], self.labels[:, 0] == self.truths)
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "num_images": self.num_images,
            "ece": sum(row[0] * abs(row[1] - row[2]) for row in calibration if row[0]) / self.num_images,
            "calibration": calibration,
            "per_class": [dataclasses.asdict(result) for result in self.per_class],
            "confusion": _confuse(self.truths, self.labels[:, 0], [result.name for result in self.per_class]),
        }


@torch.inference_mode()
def evaluate(
    logits_fn: Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    class_names: Sequence[str],
    world: World = ALONE,
) -> Evaluation:
    """Compare the predictions of a network with the labels.

    Args:
        logits_fn: From pictures (N, C, H, W), as the loader gives them, to logits (N, K) on any device; a
            module has to be in evaluation mode.
        loader: Batches of pictures and labels: (N,), or booleans (N, K) where a picture has several right labels,
            at least one. It gives this process's share: pictures ``rank``, ``rank + size``, ...
        class_names: Names of the K classes, in the order of the labels.
        world: The processes that share the pictures out.

    Returns:
        The same in every process, each picture counted once, in the order of the data set. (Pictures that the loader
        leaves out move those behind them, of its own process alone.)

    Raises:
        ValueError: There are no pictures, the network has other classes, or its outputs are not finite.
    """
    best = min(5, len(class_names))
    batches = []
    for images, truth in loader:
        logits = logits_fn(images).float().cpu()  # (N, K)
        if logits.shape[1] != len(class_names):
            raise ValueError(f"the network has {logits.shape[1]} classes, the data {len(class_names)}")
        batches.append(_judge(logits, truth, best))
    # Lists of one tensor a field: processes without a picture have no tensor to send.
    shares = gather(world, [torch.cat(field) for field in zip(*batches, strict=True)])
    if not any(shares):
        raise ValueError("there are no pictures to evaluate")
    truths, labels, probabilities, losses = (_interleave(shares, field) for field in range(4))
    # Judged after gathering, so that every process says so instead of waiting for one that failed.
    if not losses.isfinite().all():
        raise ValueError("the outputs of the network are not finite: its weights are damaged or training diverged")
    return _summarise(truths, labels, probabilities, losses, class_names)


def _judge(logits: Tensor, truth: Tensor, best: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return truths (N,), the best labels (N, k), their probabilities (N, k), and losses (N,)."""
    log_probabilities = logits.log_softmax(dim=1)
    best_values, labels = log_probabilities.topk(best, dim=1)
    if truth.ndim == 1:
        losses = -log_probabilities.gather(1, truth[:, None]).squeeze(1)
        return truth, labels, best_values.exp(), losses
    masked = log_probabilities.masked_fill(~truth, -torch.inf)
    # Any of the right labels will do: the loss is that of their joint probability.
    return masked.argmax(dim=1), labels, best_values.exp(), -masked.logsumexp(dim=1)


def _interleave(shares: Sequence[list[Tensor]], field: int) -> Tensor:
    """Put picture i of process r in place i * size + r; the shares may differ in length."""
    filled = [(rank, share[field]) for rank, share in enumerate(shares) if share]
    places = torch.cat([torch.arange(len(values)) * len(shares) + rank for rank, values in filled])
    return torch.cat([values for _, values in filled])[places.argsort()]


def _summarise(
    truths: Tensor, labels: Tensor, probabilities: Tensor, losses: Tensor, class_names: Sequence[str]
) -> Evaluation:
    hits = labels == truths[:, None]  # (N, k)
    first = hits[:, 0]
    totals = torch.bincount(truths, minlength=len(class_names)).tolist()
    rights = torch.bincount(truths[first], minlength=len(class_names)).tolist()
    return Evaluation(
        top1=100 * int(first.sum()) / len(truths),
        top5=100 * int(hits.any(dim=1).sum()) / len(truths),
        loss=losses.double().mean().item(),
        num_images=len(truths),
        per_class=tuple(
            ClassResult(name, total, 100 * right / total if total else None)
            for name, total, right in zip(class_names, totals, rights, strict=True)
        ),
        truths=truths,
        labels=labels,
        probabilities=probabilities,
        losses=losses,
    )


def _calibrate(confidences: Tensor, hits: Tensor) -> list[list[Any]]:
    """Return [count, mean confidence, accuracy] of each bin; bin b holds confidences in (b / 15, (b + 1) / 15]."""
    confidences = confidences.double()
    bins = (confidences * NUM_BINS).ceil().long().sub(1).clamp(0, NUM_BINS - 1)
    counts = torch.bincount(bins, minlength=NUM_BINS)
    sums = torch.bincount(bins, weights=confidences, minlength=NUM_BINS)
    rights = torch.bincount(bins, weights=hits.double(), minlength=NUM_BINS)
    return [
        [count, total / count, right / count] if count else [0, None, None]
        for count, total, right in zip(counts.tolist(), sums.tolist(), rights.tolist(), strict=True)
    ]


def _confuse(truths: Tensor, predictions: Tensor, names: Sequence[str]) -> list[list[Any]]:
    num_classes = len(names)
    cells = truths * num_classes + predictions
    if num_classes <= MAX_MATRIX:
        matrix: list[list[Any]] = torch.bincount(cells, minlength=num_classes**2).view(num_classes, -1).tolist()
        return matrix
    counted = Counter(cells[truths != predictions].tolist()).most_common(NUM_CONFUSIONS)
    return [[names[cell // num_classes], names[cell % num_classes], count] for cell, count in counted]
