"""AdamW (Tables 6 and 7), its rates by layer for fine-tuning, and the parts of a network that are not trained."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from fasternet.models.fasternet import FasterNet, Stage
from fasternet.train.recipe import BaseRecipe

BETAS = (0.9, 0.999)  # Table 6


def create_optimizer(model: nn.Module, recipe: BaseRecipe) -> torch.optim.AdamW:
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


def freeze_stages(model: nn.Module, num_stages: int) -> None:
    """Stop training the embedding and the first stages; 0 freezes nothing.

    Raises:
        ValueError: The network has no stages of FasterNet.
    """
    for module in list_frozen(model, num_stages):
        module.requires_grad_(False)


def set_training(model: nn.Module, recipe: BaseRecipe) -> None:
    """Switch to training mode, all but the frozen stages and, with ``batch_norm=frozen``, every BN."""
    model.train()
    keep_frozen(model, recipe.freeze, batch_norm=recipe.batch_norm == "frozen")


def keep_frozen(model: nn.Module, num_stages: int, *, batch_norm: bool) -> None:
    """Bring frozen stages, and with ``batch_norm`` every BN, back to evaluation mode."""
    frozen = list_frozen(model, num_stages)
    if batch_norm:
        frozen += [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in frozen:
        module.eval()


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """Return a network whose BN takes its statistics over all processes.

    Raises:
        ValueError: There is no GPU, which that needs.
    """
    if not torch.cuda.is_available():
        raise ValueError("recipe field batch_norm=sync needs GPUs; on a CPU take train or frozen")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call, no-any-return]


def list_frozen(model: nn.Module, num_stages: int) -> list[nn.Module]:
    """Return the embedding and the first stages of the FasterNet that a network is or holds; 0 is none of them.

    Raises:
        ValueError: There is no FasterNet, or it has fewer stages.
    """
    if not num_stages:
        return []
    trunk = find_trunk(model)
    if trunk is None or not 0 < num_stages <= len(trunk.stages):
        raise ValueError(
            f"freezing stages (freeze={num_stages}) needs a FasterNet, at most its 4; other networks take 0"
        )
    return [trunk.embedding, *trunk.stages[:num_stages]]


def find_trunk(model: nn.Module) -> FasterNet | None:
    """Return the FasterNet that a network is or holds."""
    return next((module for module in model.modules() if isinstance(module, FasterNet)), None)


def _group_parameters(model: nn.Module, layer_decay: float | None) -> list[dict[str, object]]:
    if layer_decay is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [{"params": trained, "lr_scale": 1.0}]
    groups = []
    for distance, layer in enumerate(reversed(_list_layers(model))):
        if trained := [parameter for parameter in layer if parameter.requires_grad]:
            groups.append({"params": trained, "lr_scale": layer_decay**distance})
    return groups


def _list_layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of the layers in order: embedding, each merging and each block, then all that follows."""
    trunk = find_trunk(model)
    if trunk is None:
        raise ValueError("recipe field layer_decay needs a FasterNet; other networks take layer_decay=none")
    modules: list[nn.Module] = [trunk.embedding]
    for stage in trunk.stages:
        modules += [cast(Stage, stage).merging, *cast(Stage, stage).blocks]
    layers = [own for module in modules if (own := list(module.parameters()))]
    listed = {id(parameter) for own in layers for parameter in own}
    return [*layers, [parameter for parameter in model.parameters() if id(parameter) not in listed]]
