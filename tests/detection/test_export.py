"""export_onnx and load_onnx: the file against the detector, what it refuses, and that a wrong file never stays."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor

from fasternet.detection import export
from fasternet.detection.detector import create_faster_rcnn, create_mask_rcnn
from fasternet.detection.export import export_onnx, load_onnx
from fasternet.detection.predictor import DetectionPredictor
from fasternet.rivals import randomize_batch_norm

pytest.importorskip("onnxruntime", reason="needs fasternet[onnxruntime]")
SMALL = {
    **{"num_classes": 3, "min_size": 64, "max_size": 128, "score_threshold": 0.25, "fpn_channels": 8},
    **{"box_head_width": 16, "backbone_options": {"width": 8, "depths": (1, 1, 1, 1)}},
}


def create(build=create_mask_rcnn, backbone="fasternet_t0", *, spread=1.0, **options):
    """Return a detector in evaluation mode that a wrong fold would show, with scores that differ."""
    heads = {"mask_head_channels": 8} if build is create_mask_rcnn else {}
    detector = build(backbone, **SMALL | heads | options)
    scale = 0.1 * spread * (16 / detector.config.box_head_width) ** 0.5
    for name, weight in detector.roi_heads.box_predictor.named_parameters():
        nn.init.normal_(weight, std=scale if name.startswith("cls") else scale / 4)
    randomize_batch_norm(detector.backbone.body, torch.randn(4, 3, 64, 96))
    return detector.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    detector = create()
    path = tmp_path_factory.mktemp("export") / "detector.onnx"
    names = {"class_names": ("nut", "fig", "date"), "category_ids": (1, 5, 7)}
    return detector, path, export_onnx(detector, path, **names)


@torch.no_grad()
def check_alike(loaded, detector, pictures):
    one_by_one = [detector([picture])[0] for picture in pictures]  # in a batch they would be padded alike
    pairs = list(zip(loaded(pictures), one_by_one, strict=True))
    for (found, expected), picture in zip(pairs, pictures, strict=True):
        assert {name: tuple(x.shape) for name, x in found.items()} == {
            name: tuple(x.shape) for name, x in expected.items()
        }
        worst = dict.fromkeys(["num_detections", *(set(export.LIMITS) & set(expected))], 0.0)
        export._compare(found, expected, worst, f"on {tuple(picture.shape)}")
    return sum(len(expected["scores"]) for _, expected in pairs)


def test_file_finds_what_the_detector_finds_at_any_size(exported):
    detector, path, differences = exported
    assert set(differences) == {"num_detections", "boxes", "scores", "masks"}
    assert differences["num_detections"] >= 10
    assert all(0 < differences[name] <= limit for name, limit in export.LIMITS.items())
    loaded = load_onnx(path, threads=1)
    assert loaded.class_names == ("nut", "fig", "date")
    assert loaded.category_ids == (1, 5, 7)
    assert (loaded.config.num_classes, loaded.config.score_threshold, loaded.full_masks) == (3, 0.25, False)
    detector.transform.full_masks = False
    torch.manual_seed(2)  # of some pictures two objects on a limit are a rounding apart
    sizes = ((64, 96), (100, 75), (333, 500), (40, 200), (20, 31))
    assert check_alike(loaded, detector, [torch.rand(3, *size) for size in sizes]) > 20


def test_fingerprint_is_that_of_the_file(exported):
    predictor = DetectionPredictor.from_detector(load_onnx(exported[1]))
    assert predictor.fingerprint == hashlib.sha256(exported[1].read_bytes()).hexdigest()


def test_picture_without_detections_gives_empty_tensors(exported):
    found = load_onnx(exported[1])([torch.rand(3, 64, 96)], score_threshold=1.0)[0]
    assert [tuple(x.shape) for x in found.values()] == [(0, 4), (0,), (0,), (0, 1, 28, 28)]
    assert found["labels"].dtype == torch.int64


def test_full_masks_and_no_antialias(tmp_path):
    detector = create(antialias=False).train()
    differences = export_onnx(detector, tmp_path / "a.onnx", full_masks=True, example=torch.rand(3, 120, 90))
    assert differences["num_detections"] > 0
    assert detector.training
    loaded = load_onnx(tmp_path / "a.onnx")
    assert loaded.full_masks
    assert check_alike(loaded, detector.eval(), [torch.rand(3, 70, 90), torch.rand(3, 200, 100)]) > 0


def test_boxes_alone_and_few_detections_are_compared_below_the_threshold(tmp_path):
    detector = create(create_faster_rcnn, score_threshold=1.0)
    differences = export_onnx(detector, tmp_path / "a.onnx")
    assert set(differences) == {"num_detections", "boxes", "scores"}
    assert differences["num_detections"] >= 5
    assert "masks" not in load_onnx(tmp_path / "a.onnx")([torch.rand(3, 64, 64)], score_threshold=0.0)[0]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["ResNet50", "PoolFormer-S24"])
def test_rival_is_exported(backbone, tmp_path):
    detector = create(backbone=backbone, backbone_options={})
    for weight in detector.backbone.fpn.parameters():
        weight.data *= 0.2  # the maps of a deep network are large, and offsets of boxes that follow from them huge
    assert export_onnx(detector, tmp_path / "a.onnx", example=torch.rand(3, 64, 96))["num_detections"] > 0


@pytest.mark.slow
def test_whole_network_at_full_size(tmp_path):
    """Thousands of proposals, of which torchvision suppresses overlaps in another way than a trace does."""
    detector = create(num_classes=20, min_size=480, max_size=800, box_head_width=64, backbone_options={})
    assert export_onnx(detector, tmp_path / "a.onnx")["num_detections"] >= 10


@pytest.mark.slow
def test_real_pictures_give_the_same_boxes_scores_and_masks(tmp_path):
    folder = os.environ.get("FASTERNET_DATA")
    if not folder:
        pytest.skip("FASTERNET_DATA names no folder with the pictures")
    files = sorted(Path(folder).glob("coco128/train2017/*.jpg"))[:6]
    assert len(files) == 6
    pictures = [to_tensor(Image.open(file).convert("RGB")) for file in files]
    detector = create(num_classes=10, min_size=320, max_size=533, score_threshold=0.05, spread=0.3, backbone_options={})
    detector.transform.full_masks = False
    export_onnx(detector, tmp_path / "a.onnx", example=pictures[0])
    assert check_alike(load_onnx(tmp_path / "a.onnx"), detector, pictures) > 50


@pytest.mark.parametrize("name", [*export.LIMITS, "labels", "count"])
def test_wrong_file_raises_and_does_not_stay(name, exported, tmp_path, monkeypatch):
    (tmp_path / "a.onnx").write_text("what was there")
    monkeypatch.setattr(export, "_write", lambda _, file, *__: shutil.copy(exported[1], file))
    load = export.load_onnx

    def load_wrong(path):
        loaded = load(path)

        def detect(pictures, **options):
            found = loaded(pictures, **options)
            for one in found:
                if name == "count":
                    one.update({key: x[:-1] for key, x in one.items()})
                else:
                    one[name] = one[name] + (1 if name == "labels" else 2 * export.LIMITS[name])
            return found

        return detect

    monkeypatch.setattr(export, "load_onnx", load_wrong)
    with pytest.raises(ValueError, match="the exported detector is wrong: ") as caught:
        export_onnx(exported[0], tmp_path / "a.onnx")
    assert "\n" not in str(caught.value)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["what was there"]


def test_trace_that_fails_is_one_sentence(tmp_path):
    detector = create()
    detector.roi_heads.box_head.forward = None
    detector.roi_heads.box_head = nn.Sequential(detector.roi_heads.box_head)
    with pytest.raises(ValueError, match="this detector cannot be exported to ONNX: TypeError") as caught:
        export_onnx(detector, tmp_path / "a.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"path": "none/a.onnx"}, FileNotFoundError, "no folder .*none for the ONNX file"),
        ({"path": "."}, ValueError, "is a directory"),
        ({"opset": 11}, ValueError, "opset=11 must be from 16 to 20"),
        ({"class_names": ["a"]}, ValueError, "class_names has 1 entries for 3 classes"),
        ({"category_ids": [1, 2, 3, 4]}, ValueError, "category_ids has 4 entries for 3 classes"),
        ({"example": torch.zeros(1, 3, 64, 64)}, ValueError, r"example must be float32 \(3, H, W\)"),
    ],
    ids=str,
)
def test_wrong_arguments_are_one_sentence(options, error, match, tmp_path):
    with pytest.raises(error, match=match):
        export_onnx(create(), tmp_path / options.pop("path", "a.onnx"), **options)


def test_other_files_and_pictures_are_refused(exported, tmp_path):
    with pytest.raises(FileNotFoundError, match="no ONNX file at"):
        load_onnx(tmp_path / "none.onnx")
    (tmp_path / "a.onnx").write_text("no ONNX")
    with pytest.raises(ValueError, match=r"a\.onnx is no detector of detect export") as caught:
        load_onnx(tmp_path / "a.onnx")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"images must be float32 \(3, H, W\) on the CPU, got torch.uint8"):
        load_onnx(exported[1])([torch.zeros(3, 64, 64, dtype=torch.uint8)])


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"onnx, onnxruntime: pip install 'fasternet\[onnxruntime\]'"):
        export_onnx(create(), tmp_path / "a.onnx")
