"""The FasterNet family: networks by name, weights in and out of every format, the folder a trained model lives in."""

from fasternet.models.checkpoint import Checkpoint, Preprocessing, load_checkpoint, save_checkpoint
from fasternet.models.fasternet import VARIANTS, FasterNet, FasterNetBlock, FasterNetConfig
from fasternet.models.registry import WEIGHTS, create_model, list_models

__all__ = [
    "VARIANTS",
    "WEIGHTS",
    "Checkpoint",
    "FasterNet",
    "FasterNetBlock",
    "FasterNetConfig",
    "Preprocessing",
    "create_model",
    "list_models",
    "load_checkpoint",
    "save_checkpoint",
]
