"""Making a trained network fast without changing its function."""

from fasternet.deploy.fold import fold_batch_norm
from fasternet.deploy.optimize import InferenceFasterNet, from_timm, optimize_for_inference
from fasternet.deploy.runtime import ENGINES, PRECISIONS, SPEED_ONLY, Runtime, create_runtime, explain_engine
from fasternet.deploy.verify import compare_outputs

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "SPEED_ONLY",
    "InferenceFasterNet",
    "Runtime",
    "compare_outputs",
    "create_runtime",
    "explain_engine",
    "fold_batch_norm",
    "from_timm",
    "optimize_for_inference",
]
