"""Who reads what in a network, observed in one forward pass, so that it does not matter how the network is written."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ACTIVATIONS = (  # modules that read each value by itself
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh),
)


@torch.no_grad()
def count_reads(model: nn.Module, x: Tensor) -> Counter[int]:
    """Count the readers of each tensor in a forward pass: the operators, and the caller if the network returns it.

    Args:
        model: The network; hooks of its modules see the tensors, and have to keep those that they will ask for.
        x: Its input.

    Returns:
        Number of readers by the tensor's ``id``.
    """
    counter = _CountReads()
    with counter:
        returned = model(x)
    counter.reads.update({id(value) for value in torch.utils._pytree.tree_leaves(returned)})
    return counter.reads


class _CountReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads: Counter[int] = Counter()
        self._alive: list[Any] = []  # ids must not be used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.reads[id(value)] += 1
                self._alive.append(value)
        return func(*args, **(kwargs or {}))
