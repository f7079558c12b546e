"""Folds BN into the convolution or linear layer before it (Section 3.4), in any network."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from fasternet.models.reads import count_reads

_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norm(model: nn.Module, example: Tensor) -> nn.Module:
    """Fold every BN that is the only reader of a convolution's or linear layer's output.

    What reads what is observed in one forward pass, so that it does not matter how a network is written.

    Args:
        model: Any network; it is not modified.
        example: An input that the network takes, for the one pass.

    Returns:
        A new model in evaluation mode that computes the same function, up to rounding.
    """
    model = copy.deepcopy(model).eval()
    names = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    for layer, norm in _observe_pairs(model, example):
        fuse: Callable[[Any, Any], nn.Module] = (
            fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        )
        for module, replacement in ((layer, fuse(layer, norm)), (norm, _rest_of(norm))):
            for name in names[module]:
                model.set_submodule(name, replacement)
    return model.eval()


def _observe_pairs(model: nn.Module, example: Tensor) -> list[tuple[nn.Module, nn.Module]]:
    """Return the pairs (layer, norm) in which the norm alone reads the layer's output, and each runs once."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor is kept, so that its id stays its own
    pairs: list[tuple[nn.Module, nn.Module, int]] = []
    calls: Counter[nn.Module] = Counter()

    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[module] += 1
        x = args[0] if args else kwargs["input"]
        if isinstance(module, _FOLDABLE):
            made[id(output)] = (module, output)
        elif id(x) in made and module.track_running_stats:
            layer = made[id(x)][0]
            if x.dim() == 2 or not isinstance(layer, nn.Linear):  # of (N, L, features) a norm takes another dimension
                pairs.append((layer, module, id(x)))

    watched = [module for module in model.modules() if isinstance(module, _FOLDABLE + _NORMS)]
    hooks = [module.register_forward_hook(observe, with_kwargs=True) for module in watched]
    reads = count_reads(model, example)
    for hook in hooks:
        hook.remove()
    return [(layer, norm) for layer, norm, tensor in pairs if reads[tensor] == 1 and calls[layer] == calls[norm] == 1]


def _rest_of(norm: nn.Module) -> nn.Module:
    """Return what a norm layer does beside normalising: timm's norms carry dropout and activation."""
    rest = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    return nn.Sequential(*rest) if rest else nn.Identity()
