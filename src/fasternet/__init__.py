"""PConv and FasterNet: vision backbones that are fast on your own machine, and the measurements that prove it.

Names are imported when they are first used, so that ``import fasternet`` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasternet.complexity import count_costs
    from fasternet.deploy import (
        CpuEngine,
        choose_engine,
        create_runtime,
        fold_batch_norm,
        optimize_for_inference,
        use_native_blocks,
    )
    from fasternet.detection import (
        DetectionPredictor,
        create_faster_rcnn,
        create_mask_rcnn,
        load_detector,
        optimize_detector,
    )
    from fasternet.models import (
        FasterNet,
        FasterNetConfig,
        create_model,
        list_models,
        load_checkpoint,
        save_checkpoint,
    )
    from fasternet.models.surgery import replace_convs
    from fasternet.ops import PConv1d, PConv2d, PConv3d, PConvPWConv, list_impls, pconv2d, pconv2d_
    from fasternet.predict import Predictor
    from fasternet.rivals import create_backbone, create_network

_HOMES = {
    "CpuEngine": "deploy",
    "DetectionPredictor": "detection",
    "FasterNet": "models",
    "FasterNetConfig": "models",
    "PConv1d": "ops",
    "PConv2d": "ops",
    "PConv3d": "ops",
    "PConvPWConv": "ops",
    "Predictor": "predict",
    "choose_engine": "deploy",
    "count_costs": "complexity",
    "create_backbone": "rivals",
    "create_faster_rcnn": "detection",
    "create_mask_rcnn": "detection",
    "create_model": "models",
    "create_network": "rivals",
    "create_runtime": "deploy",
    "fold_batch_norm": "deploy",
    "list_impls": "ops",
    "list_models": "models",
    "load_checkpoint": "models",
    "load_detector": "detection",
    "optimize_detector": "detection",
    "optimize_for_inference": "deploy",
    "pconv2d": "ops",
    "pconv2d_": "ops",
    "replace_convs": "models.surgery",
    "save_checkpoint": "models",
    "use_native_blocks": "deploy",
}

__version__ = "0.6.0"

__all__ = [
    "CpuEngine",
    "DetectionPredictor",
    "FasterNet",
    "FasterNetConfig",
    "PConv1d",
    "PConv2d",
    "PConv3d",
    "PConvPWConv",
    "Predictor",
    "choose_engine",
    "count_costs",
    "create_backbone",
    "create_faster_rcnn",
    "create_mask_rcnn",
    "create_model",
    "create_network",
    "create_runtime",
    "fold_batch_norm",
    "list_impls",
    "list_models",
    "load_checkpoint",
    "load_detector",
    "optimize_detector",
    "optimize_for_inference",
    "pconv2d",
    "pconv2d_",
    "replace_convs",
    "save_checkpoint",
    "use_native_blocks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fasternet' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fasternet.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
