"""The published detectors' files: what ours computes from one is what its tensors mean, and both ways lose nothing."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fasternet.detection.detector import create_faster_rcnn, create_mask_rcnn
from fasternet.detection.mmdet import from_mmdet, load_mmdet, save_mmdet, to_mmdet
from fasternet.detection.optimize import optimize_detector
from fasternet.models import convert

_spec = importlib.util.spec_from_file_location("plain_mmdet", Path(__file__).with_name("plain_mmdet.py"))
plain_mmdet = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain_mmdet)

DEPTHS = (1, 2, 1, 1)
SMALL = {"width": 8, "depths": DEPTHS}
UNUSED = {"bbox_pred": 4, "mask_fcn_logits": 1}  # rows of ours that stand for the background


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("mmdet") / "mask_rcnn_fasternet.pth"
    torch.save({"meta": {"CLASSES": ("a", "b", "c")}, "state_dict": plain_mmdet.write_state(seed=2)}, path)
    return path


def load(path, **options):
    return load_mmdet(path, "fasternet_t0", backbone_options=SMALL, **options)


@pytest.mark.parametrize(
    ("variant", "act", "masks", "norms", "seed"),
    [
        ("fasternet_t0", F.gelu, True, True, 2),
        ("fasternet_s", F.relu, True, False, 1),
        ("fasternet_t0", F.gelu, False, True, 2),
    ],
)
def test_detections_are_those_of_a_plain_computation(tmp_path, variant, act, masks, norms, seed):
    state = plain_mmdet.write_state(seed=seed, masks=masks, norms=norms)
    torch.save({"state_dict": state}, tmp_path / "file.pth")
    model = load_mmdet(
        tmp_path / "file.pth", variant, backbone_options=SMALL, min_size=96, max_size=150, score_threshold=0.45
    )
    pixels = torch.randint(0, 256, (3, 120, 200), generator=torch.Generator().manual_seed(2))
    image = pixels.float()  # shrinks to 90 x 150, padded to 96 x 160
    with torch.no_grad():
        wanted = plain_mmdet.detect(state, image, size=(96, 150), act=act, score_thr=0.45, masks=masks)
        (found,) = model([image / 255])
    assert 20 <= len(wanted["scores"]) <= 100
    assert len(wanted["labels"].unique()) >= 2
    assert torch.equal(found["labels"], wanted["labels"] + 1)
    torch.testing.assert_close(found["scores"], wanted["scores"], rtol=0, atol=1e-4)
    torch.testing.assert_close(found["boxes"], wanted["boxes"], rtol=0, atol=1e-4)
    assert ("masks" in found) == masks
    if masks:
        assert wanted["masks"].max() > 0.6
        torch.testing.assert_close(found["masks"][:, 0], wanted["masks"], rtol=0, atol=1e-4)


def test_file_to_ours_to_file_is_bitwise(file, tmp_path):
    state = convert.read_state(file)
    for target in (tmp_path / "again.pth", tmp_path / "new" / "again.safetensors"):
        save_mmdet(target, load(file))
        again = convert.read_state(target)
        assert sorted(again) == sorted(state)
        assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("create", [create_mask_rcnn, create_faster_rcnn])
def test_ours_to_file_to_ours_is_bitwise(tmp_path, create):
    small = {"fpn_channels": 8, "box_head_width": 16, "mask_head_channels": 12}
    model = create("fasternet_t0", num_classes=2, feature_norm=False, backbone_options=SMALL, **small)
    save_mmdet(tmp_path / "file.pth", model)
    found = load(tmp_path / "file.pth")
    assert not found.training
    assert (found.config.kind, found.config.num_classes, found.config.antialias) == (model.config.kind, 2, False)
    own, other = model.state_dict(), found.state_dict()
    assert own.keys() == other.keys()
    for key, tensor in own.items():
        rows = UNUSED.get(key.split(".")[-2], 0) if key.startswith("roi_heads") else 0
        assert torch.equal(other[key][rows:] if rows else other[key], tensor[rows:] if rows else tensor), key
        assert not other[key][:rows].any() if rows else True


@torch.no_grad()
def test_norms_of_neck_and_mask_head_are_folded_and_the_detections_stay(tmp_path):
    fields = {"min_size": 64, "max_size": 128, "score_threshold": 0.0, "detections_per_image": 8, "antialias": False}
    small = {"fpn_channels": 8, "box_head_width": 16, "mask_head_channels": 8, "head_norm": "bn"}
    model = create_mask_rcnn("fasternet_t0", num_classes=3, backbone_options=SMALL, **small, **fields)
    model.roi_heads.box_predictor.cls_score.weight.mul_(10)
    for norm in [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]:
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.running_var.uniform_(0.5, 1.5)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.2, 0.2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_mmdet(tmp_path / "file.pth", model)
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    found = load(tmp_path / "file.pth", **fields)
    assert found.config.head_norm == "none"
    assert len(found.backbone.body.feature_norms) == 4  # which the format has
    picture = torch.rand(3, 64, 96)
    ours, theirs = model.eval()([picture])[0], found([picture])[0]
    assert len(ours["scores"]) == 8
    assert torch.equal(ours["labels"], theirs["labels"])
    for name in ("boxes", "scores", "masks"):
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"^head_norm=bn must be none: mmdet's detectors have no BN there$"):
        load(tmp_path / "file.pth", head_norm="bn")


def test_optimised_detector_is_refused(file):
    with pytest.raises(ValueError, match=r"^an optimised detector cannot be saved, its BN is folded: save the one"):
        to_mmdet(optimize_detector(load(file)))


def test_variant_and_sizes_are_read_off_the_tensors(tmp_path):
    state = plain_mmdet.write_state(width=40, depths=(1, 2, 8, 2), classes=5, norms=False)
    found = from_mmdet(state, score_threshold=0.2).config
    assert (found.backbone, found.num_classes, found.fpn_channels, found.box_head_width) == ("fasternet_t0", 5, 8, 16)
    assert (found.score_threshold, found.antialias, found.backbone_options["feature_norm"]) == (0.2, False, False)
    assert (found.min_size, found.max_size) == (800, 1333)


def test_what_does_not_fit_is_listed_in_the_files_names(file, tmp_path):
    state = convert.read_state(file)
    state["neck.fpn_convs.2.norm.weight"] = state.pop("neck.fpn_convs.2.conv.weight")
    state["rpn_head.rpn_reg.bias"] = torch.zeros(16)
    torch.save(state, tmp_path / "broken.pth")
    wanted = (
        f"{tmp_path / 'broken.pth'} (mmdet keys) does not fit the detector: "
        "missing: neck.fpn_convs.2.conv.weight; not known: neck.fpn_convs.2.norm.weight; "
        "of another shape: rpn_head.rpn_reg.bias is (16,) instead of (12,)"
    )
    with pytest.raises(ValueError, match=re.escape(wanted) + "$"):
        load(tmp_path / "broken.pth")
    del state["roi_head.bbox_head.fc_cls.bias"]
    with pytest.raises(ValueError, match=r"missing: .*roi_head.bbox_head.fc_cls.bias.*; not known"):
        from_mmdet(state, backbone="fasternet_t0", backbone_options=SMALL)


def test_what_is_no_detector_is_one_sentence(file, tmp_path):
    with pytest.raises(ValueError, match=r"width 8 and depths \(1, 2, 1, 1\) belong to none of .*: name the model$"):
        load_mmdet(file)
    with pytest.raises(ValueError, match="the state dict holds no detector of mmdet: the keys are of no known"):
        from_mmdet({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"missing: neck.lateral_convs.0.conv.weight, .* and \d+ more$"):
        from_mmdet(
            {k: v for k, v in convert.read_state(file).items() if k.startswith("backbone.")},
            backbone="fasternet_t0",
            backbone_options=SMALL,
        )
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_mmdet(tmp_path / "absent.pth")
    resnet = create_faster_rcnn("ResNet50", num_classes=2, fpn_channels=8, box_head_width=8)
    with pytest.raises(ValueError, match=r"known for FasterNet's backbones, and this is a ResNet50$"):
        to_mmdet(resnet)


@pytest.mark.parametrize("norms", [True, False])
def test_detector_file_and_official_file_are_backbone_checkpoints(tmp_path, norms):
    """An official file holds the backbone alone, with a classifier and without the norms of the maps."""
    state = plain_mmdet.write_state(norms=norms)
    official = {
        key.removeprefix("backbone."): tensor
        for key, tensor in state.items()
        if key.startswith("backbone.") and not key.startswith("backbone.norm")
    }
    official |= {"avgpool_pre_head.1.weight": torch.rand(16, 64, 1, 1), "head.weight": torch.rand(4, 16)}
    official |= {"head.bias": torch.rand(4)}
    for name, content in (("mmdet.pth", {"state_dict": state}), ("official.pth", official)):
        torch.save(content, tmp_path / name)
        model = create_mask_rcnn(
            "fasternet_t0", num_classes=3, backbone_checkpoint=tmp_path / name, backbone_options=SMALL
        )
        body = model.backbone.body
        assert torch.equal(body.embedding.conv.weight, state["backbone.patch_embed.proj.weight"])
        last = state["backbone.stages.4.blocks.0.mlp.3.weight"]
        assert torch.equal(body.stages[2].blocks[0].pwconv2.weight, last)
        assert torch.equal(body.stages[3].merging.norm.running_var, state["backbone.stages.5.norm.running_var"])
        norm = body.feature_norms["3"]
        fresh = name == "official.pth" or not norms
        assert torch.equal(norm.weight, torch.ones(64) if fresh else state["backbone.norm6.weight"])
        assert torch.equal(norm.running_mean, torch.zeros(64) if fresh else state["backbone.norm6.running_mean"])
