"""Builders: every backbone of Table 4, its parameters, what is frozen, how it starts."""

import math

import pytest
import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList

from fasternet.detection.detector import (
    DROP_PATH_RATES,
    DetectorConfig,
    build_detector,
    create_detector,
    create_faster_rcnn,
    create_mask_rcnn,
)
from fasternet.paper import load_table

SMALL = {
    "min_size": 64,
    "max_size": 128,
    "fpn_channels": 8,
    "box_head_width": 16,
    "mask_head_channels": 8,
    "backbone_options": {"width": 8, "depths": (1, 1, 1, 1)},
}
TABLE4 = load_table("table4_coco")
LARGE = ("ResNet101", "ResNeXt101-32x4d", "ResNeXt101-64x4d", "PoolFormer-S36", "PVT-Medium", "PVT-Large")


def name_backbone(printed):
    return printed.lower().replace("-", "_") if printed.startswith("FasterNet") else printed


def make_batch():
    images = [torch.rand(3, 64, 96), torch.rand(3, 80, 64)]
    boxes = [torch.tensor([[4.0, 8, 40, 50], [30, 10, 90, 60]]), torch.tensor([[10.0, 10, 60, 70]])]
    targets = []
    for image, box in zip(images, boxes, strict=True):
        masks = torch.zeros(len(box), *image.shape[1:], dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, box.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        targets.append({"boxes": box, "labels": torch.arange(len(box)) + 1, "masks": masks})
    return images, targets


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row["backbone"], marks=[pytest.mark.slow] if row["backbone"] in LARGE else [])
        for row in TABLE4
    ],
)
def test_detector_of_table4_has_its_parameters_and_levels(row):
    with torch.device("meta"):
        detector = create_mask_rcnn(name_backbone(row["backbone"]), num_classes=80)
        levels = detector.backbone(torch.empty(1, 3, 128, 160))
    assert sum(p.numel() for p in detector.parameters()) == pytest.approx(float(row["params_m"]) * 1e6, rel=0.01)
    sizes = [(1, 256, math.ceil(128 / s), math.ceil(160 / s)) for s in (4, 8, 16, 32, 64)]
    assert [tuple(x.shape) for x in levels.values()] == sizes
    assert detector.training


def test_table4_has_twelve_backbones():
    assert len({row["backbone"] for row in TABLE4}) == 12


@pytest.mark.parametrize(("name", "rate"), [("fasternet_s", 0.15), ("fasternet_m", 0.2), ("fasternet_l", 0.3)])
def test_published_variants_drop_paths_as_published(name, rate):
    def read(**options):
        with torch.device("meta"):
            body = create_faster_rcnn(name, num_classes=1, **options).backbone.body
        return body.stages[3].blocks[-1].drop_path.p

    assert read() == pytest.approx(rate)
    assert read(drop_path_rate=0.0) == 0
    assert read(drop_path_rate=0.05) == pytest.approx(0.05)
    assert DROP_PATH_RATES[name] == rate


def test_feature_norm_is_on_for_a_fasternet_and_can_be_off():
    on = create_mask_rcnn("fasternet_t0", num_classes=3, **SMALL)
    off = create_mask_rcnn("fasternet_t0", num_classes=3, feature_norm=False, **SMALL)
    assert [norm.num_features for norm in on.backbone.body.feature_norms.values()] == [8, 16, 32, 64]
    assert not off.backbone.body.feature_norms
    again = build_detector(on.config).state_dict()
    assert again.keys() == on.state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (False, 0.1)),
        ({"feature_norm": True}, (True, 0.1)),
        ({"drop_path_rate": 0.0}, (False, 0)),
        ({"drop_path_rate": 0.05, "feature_norm": False}, (False, 0.05)),
    ],
)
def test_arguments_come_before_backbone_options_and_these_before_the_defaults(arguments, expected):
    options = SMALL["backbone_options"] | {"feature_norm": False, "drop_path_rate": 0.1}
    detector = create_mask_rcnn("fasternet_s", num_classes=1, **SMALL | {"backbone_options": options}, **arguments)
    body = detector.backbone.body
    assert (bool(body.feature_norms), body.stages[3].blocks[-1].drop_path.p) == pytest.approx(expected)
    again = build_detector(detector.config).backbone.body
    assert (bool(again.feature_norms), again.stages[3].blocks[-1].drop_path.p) == pytest.approx(expected)


def test_small_object_that_no_anchor_suits_takes_none():
    """Twelve pixels overlap each anchor of 32 around them by 0.14; 40 pixels overlap the best by 0.64."""
    rpn = create_mask_rcnn("fasternet_t0", num_classes=3, **SMALL).rpn
    maps = [torch.zeros(1, 8, side, side) for side in (16, 8, 4, 2, 1)]
    anchors = rpn.anchor_generator(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), maps)
    small, medium = [20.0, 20, 32, 32], [12.0, 12, 52, 52]
    (labels,), _ = rpn.assign_targets_to_anchors(anchors, [{"boxes": torch.tensor([small])}])
    assert not labels.any()
    (labels,), (boxes,) = rpn.assign_targets_to_anchors(anchors, [{"boxes": torch.tensor([small, medium])}])
    assert boxes[labels == 1].tolist() == [medium] * 9  # the square anchors of 32 that lie in it


def test_proposals_of_half_precision_keep_their_order():
    """The probabilities of 7 and 9 are both 1 in bf16."""
    rpn = create_mask_rcnn("fasternet_t0", num_classes=3, **SMALL).rpn.eval()
    proposals = torch.tensor([[[0.0, 0, 20, 20], [30, 30, 60, 60]]])
    objectness = torch.tensor([[7.0], [9.0]], dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        (boxes,), (scores,) = rpn.filter_proposals(proposals, objectness, [(64, 64)], [2])
    assert boxes.tolist() == [[30, 30, 60, 60], [0, 0, 20, 20]]
    assert scores[0] > scores[1]


@pytest.mark.parametrize("create", [create_mask_rcnn, create_faster_rcnn])
def test_what_is_added_to_the_backbone_is_xavier_initialized(create):
    options = SMALL | {"fpn_channels": 32, "box_head_width": 64, "mask_head_channels": 32}
    detector = create("fasternet_t0", num_classes=3, **options)
    layers = {
        name: module
        for name, module in detector.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and not name.startswith("backbone.body.")
    }
    assert len(layers) == (21 if create is create_mask_rcnn else 15)
    for name, layer in layers.items():
        weight = layer.weight
        fans = weight.numel() / weight.shape[0] + weight.numel() / weight.shape[1]
        bound = math.sqrt(6 / fans)
        assert weight.abs().max() <= bound, name
        assert weight.abs().max() > 0.9 * bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2), name
        assert not layer.bias.any(), name


def test_both_modes_have_torchvisions_face():
    detector = create_mask_rcnn("fasternet_t0", num_classes=3, score_threshold=0.0, **SMALL)
    images, targets = make_batch()
    losses = detector(images, targets)
    assert sorted(losses) == ["loss_box_reg", "loss_classifier", "loss_mask", "loss_objectness", "loss_rpn_box_reg"]
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        found = detector.eval()(images)
    for image, one in zip(images, found, strict=True):
        count = len(one["scores"])
        assert 0 < count <= 100
        assert one["masks"].shape == (count, 1, *image.shape[1:])
        assert set(one["labels"].tolist()) <= {1, 2, 3}
        assert one["scores"].diff().max() <= 0
        assert one["boxes"].min() >= 0
        assert (one["boxes"].amax(0)[2:] <= torch.tensor(image.shape[:0:-1]) + 1e-3).all()


@pytest.mark.parametrize(("stages", "frozen_norm"), [(0, False), (2, False), (0, True), (4, True)])
def test_what_is_frozen_stays_bitwise_and_all_else_moves(stages, frozen_norm):
    detector = create_mask_rcnn(
        "fasternet_t0", num_classes=3, freeze_stages=stages, frozen_batch_norm=frozen_norm, **SMALL
    )
    before = {key: tensor.clone() for key, tensor in detector.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(2):
        detector.eval()
        detector.train()  # what every epoch does after its evaluation
        optimizer.zero_grad()
        sum(detector(*make_batch()).values()).backward()
        optimizer.step()
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    names = ["embedding", *(f"stages.{i}" for i in range(stages))] if stages else []
    parts = tuple(f"backbone.body.{name}." for name in names)
    for key, tensor in detector.state_dict().items():
        frozen = key.startswith(parts) or (frozen_norm and key.endswith(statistics))
        assert torch.equal(tensor, before[key]) == frozen, key


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("fasternet_x", {}, r"^unknown network 'fasternet_x': did you mean fasternet_"),
        ("fasternet_t0", {"colour": 1}, r"^unknown option colour: a detector takes num_classes, min_size"),
        ("fasternet_t0", {"backbone_options": {"colour": 1}}, r"^unknown option colour: a model takes width"),
        (
            "ResNet50",
            {"feature_norm": True},
            r"^feature_norm=True is for FasterNet's maps, and the backbone is ResNet50$",
        ),
        (
            "fasternet_t0",
            {"freeze_stages": 5},
            r"^freezing stages .*=5\) needs a FasterNet, at most its 4; other networks take 0$",
        ),
        (
            "fasternet_t0",
            {"freeze_stages": -1},
            r"^freezing stages .*=-1\) needs a FasterNet, at most its 4; other networks take 0$",
        ),
        ("mobilenetv4_conv_small", {"freeze_stages": 1}, r"^freezing stages .*=1\) needs a FasterNet"),
        ("fasternet_t0", {"num_classes": 0}, r"^num_classes must be a positive integer, got 0$"),
        ("fasternet_t0", {"fpn_channels": 2.5}, r"^fpn_channels must be a positive integer, got 2.5$"),
        ("fasternet_t0", {"min_size": 900, "max_size": 800}, r"^max_size=800 must be at least min_size=900$"),
        ("fasternet_t0", {"score_threshold": 1.5}, r"^score_threshold must be in \[0, 1\], got 1.5$"),
        ("fasternet_t0", {"drop_path_rate": 1.0}, r"^drop_path_rate must be in \[0, 1\), got 1.0$"),
    ],
)
def test_what_does_not_fit_is_one_sentence(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        create_mask_rcnn(backbone, **{"num_classes": 3, **options})


def test_kind_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match=r"^kind 'retinanet' is not one of mask_rcnn, faster_rcnn$"):
        create_detector("retinanet", "fasternet_t0", num_classes=3, **SMALL)
    with pytest.raises(ValueError, match=r"^kind 'yolo' is not one of"):
        DetectorConfig(kind="yolo", backbone="fasternet_t0", num_classes=3)
