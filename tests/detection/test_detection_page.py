"""docs/detection.md: its Python runs as it stands, on small detectors; its numbers are those of the code."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fasternet.detection import DetectionPredictor, create_mask_rcnn, export_onnx, save_detector, save_mmdet
from fasternet.detection.checkpoint import OF_RECIPE
from fasternet.detection.detector import DetectorConfig
from fasternet.detection.export import LIMITS
from fasternet.detection.layers import STRIDES
from fasternet.detection.optimize import MAX_SIZES
from fasternet.detection.predictor import LARGE_PIXELS
from fasternet.train.detection_recipe import DETECTION_RECIPES, PAPER_DETECTION_RECIPES

TEXT = (Path(__file__).parents[2] / "docs" / "detection.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
HEADS = {"min_size": 64, "max_size": 128, "fpn_channels": 8, "box_head_width": 16, "mask_head_channels": 8}
SMALL = HEADS | {"backbone_options": {"width": 8, "depths": (1, 1, 1, 1)}}


def run(block: str, names: dict[str, Any]) -> None:
    """Run a block, its detectors of three classes small, and the rival's heads too."""
    exec(re.sub("num_classes=(3|80)", lambda m: f"{m[0]}, **{'SMALL' if m[1] == '3' else 'HEADS'}", block), names)


@pytest.fixture
def folder(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the page names: a run, its data, a picture, a published file."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes, "fruits_nuts")
    Path("fruits_nuts/shapes.json").rename("fruits_nuts/trainval.json")
    Image.effect_noise((96, 64), 50).convert("RGB").save("photo.jpg")
    torch.manual_seed(0)
    model = create_mask_rcnn("fasternet_t0", num_classes=2, **SMALL, score_threshold=0)
    save_detector("outputs/fruits", model, class_names=("red", "blue"), category_ids=(1, 2))
    save_mmdet("published.pth", create_mask_rcnn("fasternet_t0", num_classes=2, **HEADS))
    return tmp_path


def test_python_of_the_page_runs(folder: Path) -> None:
    local = [block for block in BLOCKS if "onnxruntime" not in block]
    assert (len(BLOCKS), len(local)) == (7, 6)
    names: dict[str, Any] = {"SMALL": SMALL, "HEADS": HEADS}
    run(local[0], names)
    assert len(names["losses"]) == 5
    assert set(names["found"]) == {"boxes", "labels", "scores", "masks"}
    assert names["found"]["masks"].shape[1:] == (1, 240, 320)
    for block in local[1:]:
        run(block, names)
    assert names["boxes_only"].freeze_stages == 2
    assert names["rival"].config.backbone == "ResNet50"
    assert isinstance(names["predictor"], DetectionPredictor)
    assert names["evaluation"].per_class[0]["class_name"] == "red"
    assert 0 <= names["evaluation"].mask["ap50"] <= 1
    assert Path("drawn.jpg").is_file()
    assert "feature_norm" in names["fast"].reasons
    again = torch.load("again.pth", weights_only=True)["state_dict"]
    given = torch.load("published.pth", weights_only=True)["state_dict"]
    assert again.keys() == given.keys()
    assert all(torch.equal(again[name], given[name]) for name in given)
    assert names["published"].config.antialias is False
    assert (names["published"].config.min_size, names["published"].config.max_size) == (800, 1333)
    assert names["smaller"].config.min_size == 320


def test_exported_file_runs_as_the_page_says(folder: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs fasternet[onnxruntime]")
    torch.manual_seed(0)
    export_onnx(create_mask_rcnn("fasternet_t0", num_classes=3, **SMALL).eval(), "fruits.onnx")
    names: dict[str, Any] = {"images": [torch.rand(3, 240, 320)]}
    (block,) = (block for block in BLOCKS if "onnxruntime" in block)
    run(block, names)
    assert names["masks"].shape[1:] == (1, 28, 28)
    assert len(names["more"]) == 4
    assert len(names["more"][2]) >= len(names["scores"])


def test_numbers_of_the_page_are_those_of_the_code() -> None:
    small, paper = DETECTION_RECIPES["small"], PAPER_DETECTION_RECIPES["fasternet_s"]
    assert f"{small.epochs} epochs, batch {small.batch_size}" in TEXT
    assert all(f"{recipe.min_size}/{recipe.max_size} px" in TEXT for recipe in (small, paper))
    assert (small.flip, small.vertical_flip, small.validation_share, small.head_norm) == (True, True, 0.2, "bn")
    assert "{:g} to {:g} times the size".format(*small.multi_scale or ()) in TEXT
    published = DetectorConfig(backbone="fasternet_s", num_classes=80)
    assert all(getattr(paper, name) == getattr(published, name) for name in OF_RECIPE)
    assert f"batch {paper.batch_size}" in TEXT
    assert "strides " + ", ".join(map(str, STRIDES)) in TEXT
    assert LIMITS == {"boxes": 0.01, "scores": 1e-4, "masks": 1e-3}
    assert (MAX_SIZES, round(LARGE_PIXELS / 1e6)) == (8, 17)
