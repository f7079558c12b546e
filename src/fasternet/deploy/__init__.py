"""Making a trained network fast without changing its function."""

from fasternet.deploy.fold import fold_batch_norm
from fasternet.deploy.optimize import InferenceFasterNet, from_timm, optimize_for_inference
from fasternet.deploy.verify import compare_outputs

__all__ = ["InferenceFasterNet", "compare_outputs", "fold_batch_norm", "from_timm", "optimize_for_inference"]
