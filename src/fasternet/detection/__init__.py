"""Mask R-CNN and Faster R-CNN over FasterNet (Section 4.4): from the builders to the deployed file.

Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasternet.detection.checkpoint import load_detector, save_detector
    from fasternet.detection.detector import Detector, DetectorConfig, create_faster_rcnn, create_mask_rcnn
    from fasternet.detection.draw import draw_detections
    from fasternet.detection.evaluate import evaluate_detector
    from fasternet.detection.export import export_onnx, load_onnx
    from fasternet.detection.mmdet import load_mmdet, save_mmdet
    from fasternet.detection.optimize import optimize_detector
    from fasternet.detection.predictor import DetectionPredictor
    from fasternet.detection.task import train_detector

_HOMES = {
    "DetectionPredictor": "predictor",
    "Detector": "detector",
    "DetectorConfig": "detector",
    "create_faster_rcnn": "detector",
    "create_mask_rcnn": "detector",
    "draw_detections": "draw",
    "evaluate_detector": "evaluate",
    "export_onnx": "export",
    "load_detector": "checkpoint",
    "load_mmdet": "mmdet",
    "load_onnx": "export",
    "optimize_detector": "optimize",
    "save_detector": "checkpoint",
    "save_mmdet": "mmdet",
    "train_detector": "task",
}

__all__ = [
    "DetectionPredictor",
    "Detector",
    "DetectorConfig",
    "create_faster_rcnn",
    "create_mask_rcnn",
    "draw_detections",
    "evaluate_detector",
    "export_onnx",
    "load_detector",
    "load_mmdet",
    "load_onnx",
    "optimize_detector",
    "save_detector",
    "save_mmdet",
    "train_detector",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fasternet.detection' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fasternet.detection.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
