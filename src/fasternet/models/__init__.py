"""The FasterNet family: networks by name, weights in and out of every format, the folder a trained model lives in."""

from fasternet.models.checkpoint import Checkpoint, Preprocessing, load_checkpoint, save_checkpoint
from fasternet.models.fasternet import TABLE5, VARIANTS, FasterNet, FasterNetBlock, FasterNetConfig
from fasternet.models.registry import WEIGHTS, create_ablation, create_model, list_ablations, list_models

__all__ = [
    "TABLE5",
    "VARIANTS",
    "WEIGHTS",
    "Checkpoint",
    "FasterNet",
    "FasterNetBlock",
    "FasterNetConfig",
    "Preprocessing",
    "create_ablation",
    "create_model",
    "list_ablations",
    "list_models",
    "load_checkpoint",
    "save_checkpoint",
]
