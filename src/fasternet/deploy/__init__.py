"""Making a trained network fast without changing its function.

Names are imported when they are first used: a saved ``CpuEngine`` runs without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasternet.deploy.auto import Choice, Trial, choose_engine
    from fasternet.deploy.blocks import use_native_blocks
    from fasternet.deploy.cpu_engine import CpuEngine
    from fasternet.deploy.cpu_layers import to_layers
    from fasternet.deploy.cpu_module import CpuModule
    from fasternet.deploy.engines import ENGINES, PRECISIONS, SPEED_ONLY, explain_engine
    from fasternet.deploy.fold import fold_batch_norm
    from fasternet.deploy.optimize import InferenceFasterNet, from_timm, optimize_for_inference
    from fasternet.deploy.runtime import Runtime, create_runtime
    from fasternet.deploy.verify import compare_outputs

_HOMES = {
    "ENGINES": "engines",
    "PRECISIONS": "engines",
    "SPEED_ONLY": "engines",
    "Choice": "auto",
    "CpuEngine": "cpu_engine",
    "CpuModule": "cpu_module",
    "InferenceFasterNet": "optimize",
    "Runtime": "runtime",
    "Trial": "auto",
    "choose_engine": "auto",
    "compare_outputs": "verify",
    "create_runtime": "runtime",
    "explain_engine": "engines",
    "fold_batch_norm": "fold",
    "from_timm": "optimize",
    "optimize_for_inference": "optimize",
    "to_layers": "cpu_layers",
    "use_native_blocks": "blocks",
}

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "SPEED_ONLY",
    "Choice",
    "CpuEngine",
    "CpuModule",
    "InferenceFasterNet",
    "Runtime",
    "Trial",
    "choose_engine",
    "compare_outputs",
    "create_runtime",
    "explain_engine",
    "fold_batch_norm",
    "from_timm",
    "optimize_for_inference",
    "to_layers",
    "use_native_blocks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fasternet.deploy' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fasternet.deploy.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
