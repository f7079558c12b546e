"""optimize_detector: every engine that is ready here against the plain detector, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from fasternet.deploy import explain_engine
from fasternet.detection import optimize
from fasternet.detection.detector import create_mask_rcnn
from fasternet.detection.optimize import optimize_detector
from fasternet.rivals import randomize_batch_norm

LIMITS = {"eager": 1e-5, "cpu": 1e-5, "compile": 1e-4, "onnxruntime": 1e-4, "openvino": 1e-4}
SIZES = ((64, 96), (100, 75))


def create(backbone="fasternet_t0", **options):
    """Return a detector that a wrong fold would show, in evaluation mode."""
    if backbone == "fasternet_t0":
        options = {"backbone_options": {"width": 8, "depths": (1, 1, 1, 1)}} | options
    detector = create_mask_rcnn(
        backbone,
        **{"num_classes": 3, "min_size": 64, "max_size": 128, "score_threshold": 0.0, "detections_per_image": 20},
        **{"fpn_channels": 8, "box_head_width": 16, "mask_head_channels": 8},
        **options,
    )
    for name, weight in detector.roi_heads.box_predictor.named_parameters():
        nn.init.normal_(weight, std=0.3 if name.startswith("cls") else 0.1)  # scores that differ
    randomize_batch_norm(detector.backbone.body, torch.randn(4, 3, 64, 96))
    detector.transform.full_masks = False
    return detector.eval()


def draw_pictures(sizes=SIZES):
    return [torch.rand(3, *size) for size in sizes]


@torch.no_grad()
def check_alike(fast, detector, pictures, limit):
    for picture in pictures:
        x = detector.transform([picture])[0].tensors
        maps, expected = fast.backbone(x), detector.backbone(x)
        assert list(maps) == list(expected)
        for key, value in expected.items():
            assert (maps[key] - value).abs().max() <= limit * value.abs().max()
        found, right = fast([picture])[0], detector([picture])[0]
        assert len(right["scores"]) > 5
        assert torch.equal(found["labels"], right["labels"])
        assert (found["boxes"] - right["boxes"]).abs().max() < 0.05
        assert (found["scores"] - right["scores"]).abs().max() < 1e-3
        assert (found["masks"] - right["masks"]).abs().max() < 1e-2


@pytest.mark.parametrize(
    "engine", ["eager", "cpu", "onnxruntime", "openvino", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_engine_computes_the_detectors_function(engine):
    if reason := explain_engine(engine):
        pytest.skip(reason)
    detector = create(freeze_stages=1)
    state = copy.deepcopy(detector.state_dict())
    fast = optimize_detector(detector, engine=engine)
    any_size = engine in ("eager", "cpu")
    check_alike(fast, detector, draw_pictures(SIZES if any_size else SIZES[1:]), LIMITS[engine])
    if any_size:
        assert not [module for module in fast.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(torch.equal(tensor, state[key]) for key, tensor in detector.state_dict().items())
    assert "folded into the pyramid" in fast.reasons["feature_norm"]
    assert {"engine", "block"} & set(fast.reasons)


def test_norms_of_neck_and_heads_are_folded():
    detector = create(head_norm="bn")
    norms = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.2, 0.2)
    fast = optimize_detector(detector)
    check_alike(fast, detector, draw_pictures(), 1e-5)
    assert len(norms) == 8 + len([m for m in detector.backbone.body.modules() if isinstance(m, nn.BatchNorm2d)]) + 4
    assert not [module for module in fast.modules() if isinstance(module, nn.BatchNorm2d)]
    assert "folded" in fast.reasons["head_norm"]


@pytest.mark.parametrize("backbone", ["ResNet50", pytest.param("PVT-Small", marks=pytest.mark.slow)])
def test_rivals_are_folded(backbone):
    detector = create(backbone)
    fast = optimize_detector(detector)
    check_alike(fast, detector, draw_pictures(), 1e-4 if backbone == "ResNet50" else 1e-5)
    assert not [module for module in fast.modules() if isinstance(module, nn.BatchNorm2d)]


def test_detector_without_feature_norm_and_pictures_in_a_batch():
    detector = create(feature_norm=False)
    fast = optimize_detector(detector)
    pictures = draw_pictures()
    with torch.no_grad():
        pairs = list(zip(fast(pictures), detector(pictures), strict=True))
    assert all(torch.allclose(a["boxes"], b["boxes"], atol=1e-2) for a, b in pairs)
    assert "feature_norm" not in fast.reasons


@pytest.mark.slow
def test_auto_says_what_it_took():
    detector = create()
    fast = optimize_detector(detector, engine="auto", size=(64, 96))
    check_alike(fast, detector, draw_pictures(), 1e-4)
    assert "ms a call" in fast.reasons["choice"]


def test_bf16_of_the_backbone():
    if reason := explain_engine("eager", "bf16"):
        pytest.skip(reason)
    detector = create()
    x = torch.rand(1, 3, 64, 96)
    for engine in ("eager", "cpu"):
        if explain_engine(engine, "bf16") is None:
            maps = optimize_detector(detector, engine=engine, precision="bf16").backbone(x)
            for key, value in detector.backbone(x).items():
                assert maps[key].dtype == torch.float32
                difference = (maps[key] - value).abs().max() / value.abs().max()
                assert 1e-4 < difference < 5e-2


def test_engines_of_one_size_keep_the_last_ones(monkeypatch):
    made = []
    monkeypatch.setattr(optimize, "MAX_SIZES", 2)
    monkeypatch.setattr(optimize, "create_runtime", lambda body, x, **_: made.append(x.shape[3]) or body)
    body = optimize.SizedBody(create().backbone.body, "onnxruntime", "fp32", None)
    for width in (32, 64, 32, 96, 32, 64):
        assert body(torch.zeros(1, 3, 32, width))[0].shape[3] == width // 4
    assert made == [32, 64, 96, 64]


def test_optimised_detector_refuses_training():
    fast = optimize_detector(create().train())
    assert not fast.training
    with pytest.raises(ValueError, match="is for inference only: train the detector that it was made from"):
        fast.train()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"engine": "magic"}, "engine 'magic' is not one of eager"),
        ({"precision": "int8"}, "precision int8 is calibrated on random pictures"),
        ({"precision": "fp8"}, "precision 'fp8' is not one of"),
        ({"engine": "onnxruntime", "precision": "bf16"}, "no bf16|pip install"),
        ({"threads": torch.get_num_threads() + 1}, "set them with fasternet.environment.set_threads"),
        ({"backbone": "ResNet50", "engine": "cpu"}, "engine cpu runs a FasterNet alone|library"),
        ({"engine": "auto", "size": (0, 5)}, r"size=\(0, 5\) must be a height and a width"),
    ],
    ids=str,
)
def test_wrong_use_is_one_sentence(options, match):
    options = dict(options)
    detector = create(options.pop("backbone", "fasternet_t0"))
    with pytest.raises((ValueError, ModuleNotFoundError), match=match) as caught:
        optimize_detector(detector, **options)
    assert "\n" not in str(caught.value)
