"""Whether modules are the published ones, which a fast form may stand for: anything else is refused, never dropped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasternet.ops import PConv2d

NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm2d, nn.SyncBatchNorm)


def check_calls(module: nn.Module) -> None:
    """Refuse hooks and replaced methods anywhere in a module: a fast form would not call them.

    Raises:
        ValueError: There are some.
    """
    for name, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:
            raise ValueError(f"{name or 'it'} has hooks, which would not be called")
        forward = vars(part).get("forward")  # timm's Partial_conv3 chooses one of its methods
        if forward is not None and getattr(forward, "__func__", None) not in vars(type(part)).values():
            raise ValueError(f"the forward of {name or type(part).__name__} was replaced, and would not be called")


def check_type(place: str, module: object, *allowed: type) -> None:
    """Refuse what is not exactly of a class: a subclass may compute something else.

    Raises:
        ValueError: It is not.
    """
    if type(module) not in allowed:
        raise ValueError(f"{type(module).__name__} has taken the place of its {place}")


def check_conv(conv: nn.Module, kernel_size: int, stride: int = 1) -> None:
    """Refuse a convolution that somebody has put in the place of the published one.

    Raises:
        ValueError: It is another.
    """
    k, names = kernel_size, ("kernel_size", "padding", "stride", "dilation", "groups", "padding_mode")
    padding = k // 2 if stride == 1 else 0
    wanted = ((k, k), (padding, padding), (stride, stride), (1, 1), 1, "zeros")
    if type(conv) is not nn.Conv2d or tuple(getattr(conv, name) for name in names) != wanted:
        raise ValueError(f"{conv} is not the published {k} x {k} convolution of stride {stride}")


def check_block(block: Any) -> None:
    """Refuse a block with a part that is not the published one; norm and activation are for its user to check.

    Args:
        block: A ``FasterNetBlock``, or what ``read_timm_block`` returns.

    Raises:
        ValueError: A part is another.
    """
    check_type("PConv", block.pconv, PConv2d)
    for conv in (block.pwconv1, block.pwconv2):
        check_conv(conv, 1)


def read_timm_block(block: Any) -> Any:
    """Return the parts of timm's block by our names.

    Raises:
        ValueError: A part is not timm's own.
    """
    check_type("mlp", block.mlp, nn.Sequential)
    if len(block.mlp) != 4:
        raise ValueError(f"its mlp has {len(block.mlp)} parts, not 4")
    expand, norm, act, project = block.mlp
    pconv, scale = read_timm_pconv(block.spatial_mixing), block.layer_scale
    return SimpleNamespace(pconv=pconv, pwconv1=expand, norm=norm, act=act, pwconv2=project, layer_scale=scale)


def read_timm_pconv(module: Any) -> PConv2d:
    """Return timm's PConv as ours, with the same weight.

    Raises:
        ValueError: A part is not timm's own.
    """
    from timm.models.fasternet import Partial_conv3

    check_type("PConv", module, Partial_conv3)
    conv, partial = module.partial_conv3, module.dim_conv3
    check_conv(conv, 3)
    if conv.bias is not None:
        raise ValueError("its partial convolution has a bias")
    pconv = PConv2d(partial + module.dim_untouched, partial_channels=partial, device="meta").eval()
    pconv.weight = conv.weight
    return pconv


def check_timm(model: nn.Module) -> None:
    """Refuse a FasterNet of timm's, or its feature maps, in which anything has been replaced.

    Raises:
        ValueError: Something has.
    """
    from timm.models import FeatureListNet
    from timm.models import fasternet as timm

    check_calls(model)
    check_type("network", model, timm.FasterNet, FeatureListNet)
    activations = set()
    for module in model.modules():
        if isinstance(module, timm.Block):
            check_type("stage", module, timm.Block)
            for block in module.blocks:
                check_type("block", block, timm.MLPBlock)
                parts = read_timm_block(block)
                check_block(parts)
                activations.add((type(parts.act), getattr(parts.act, "approximate", "none")))
        elif isinstance(module, timm.PatchEmbed | timm.PatchMerging):
            check_type("patch embedding or merging", module, timm.PatchEmbed, timm.PatchMerging)
            conv = module.proj if isinstance(module, timm.PatchEmbed) else module.reduction
            check_conv(conv, *(2 * (4 if isinstance(module, timm.PatchEmbed) else 2,)))
        elif isinstance(module, _BatchNorm) and (type(module) not in NORMS or module.eps != 1e-5):
            raise ValueError(f"timm's model must have the published BN, got {module}")
    if isinstance(model, timm.FasterNet):
        check_conv(model.conv_head, 1)
        check_type("classifier", model.classifier, timm.Linear, nn.Linear, nn.Identity)
        activations.add((type(model.act), getattr(model.act, "approximate", "none")))
    if len(activations) > 1 or not activations <= {(nn.GELU, "none"), (nn.ReLU, "none")}:
        names = ", ".join(sorted(f"{kind.__name__} ({how})" for kind, how in activations))
        raise ValueError(f"timm's model must have exact GELU or ReLU throughout, got {names}")
