"""Batch normalization as training would leave it: in a fresh one, a wrong folding would change nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def randomize_batch_norm(model: nn.Module, x: Tensor, *, seed: int = 0) -> nn.Module:
    """Give every BN a random scale and shift, and the statistics of what reaches it, in place.

    With statistics of its own data a network keeps its activations at a sane scale, however deep it is.

    Args:
        model: Any network; it is changed.
        x: A batch that it takes, of at least two pictures; noise will do.
        seed: Of scale and shift.

    Returns:
        The same network, every module in the mode that it was in.
    """
    random = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        for parameter, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -0.2, 0.2)):
            if parameter is not None:
                values = torch.empty(parameter.shape).uniform_(low, high, generator=random)
                parameter.data.copy_(values)
        norm.momentum = 1.0  # the running statistics become those of the next batch
        norm.train()
    try:
        if norms:
            with torch.no_grad():
                model(x)
    finally:
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)
    return model
