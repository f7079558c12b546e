"""No speed without green: how far a fast form is from the network that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def compare_outputs(fast: nn.Module, model: nn.Module, images: Tensor, *, batch_size: int = 32) -> dict[str, float]:
    """Run two classifiers on the same pictures and compare what they say.

    Args:
        fast: The form to judge.
        model: The one that it stands for, in evaluation mode.
        images: (N, C, H, W).
        batch_size: Pictures at a time.

    Returns:
        ``max_relative_difference`` (max |a - b| / max |b| over all logits), ``changed_predictions`` and ``num_images``.
    """
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    expected = torch.cat([model(batch) for batch in batches])
    output = torch.cat([fast(batch) for batch in batches])
    return describe_difference(output, expected)


def describe_difference(output: Tensor, expected: Tensor) -> dict[str, float]:
    """Return what ``compare_outputs`` returns, of logits (N, K) that are there already."""
    return {
        "max_relative_difference": float((output - expected).abs().max() / expected.abs().max()),
        "changed_predictions": int((output.argmax(1) != expected.argmax(1)).sum()),
        "num_images": len(expected),
    }


def measure_correlation(output: Tensor, expected: Tensor) -> float:
    """Return how far outputs point the same way: 1 where one is a multiple of the other, NaN where one is constant."""
    return float(torch.corrcoef(torch.stack([output.flatten().float(), expected.flatten().float()]))[0, 1])
