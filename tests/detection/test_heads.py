"""The losses of the heads: pictures without objects, targets of masks, a detector without masks."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fasternet.detection.detector import create_faster_rcnn, create_mask_rcnn
from fasternet.detection.heads import cut_masks

_spec = importlib.util.spec_from_file_location("plain_mmdet", Path(__file__).with_name("plain_mmdet.py"))
plain_mmdet = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain_mmdet)

SMALL = {
    **{"num_classes": 3, "min_size": 64, "max_size": 128, "fpn_channels": 8, "box_head_width": 16},
    **{"mask_head_channels": 8, "backbone_options": {"width": 8, "depths": (1, 1, 1, 1)}},
}
EMPTY = {
    "boxes": torch.zeros(0, 4),
    "labels": torch.zeros(0, dtype=torch.int64),
    "masks": torch.zeros(0, 64, 96, dtype=torch.uint8),
}


def draw_target():
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    masks[0, 10:40, 20:70] = 1
    return {"boxes": torch.tensor([[20.0, 10, 70, 40]]), "labels": torch.tensor([2]), "masks": masks}


def train(detector, targets):
    """Do a training step, check that it leaves the network finite, and return the losses."""
    losses = detector([torch.rand(3, 64, 96) for _ in targets], targets)
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(buffer.isfinite().all() for buffer in detector.buffers())
    return losses


@pytest.mark.parametrize("head_norm", ["none", "bn"])
def test_pictures_without_objects_teach_no_masks_and_reach_every_parameter(head_norm):
    detector = create_mask_rcnn("fasternet_t0", head_norm=head_norm, **SMALL)
    losses = train(detector, [EMPTY, EMPTY])
    assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    assert losses["loss_classifier"] > 0
    assert losses["loss_objectness"] > 0
    assert not any(parameter.grad.any() for parameter in detector.roi_heads.mask_head.parameters())


@pytest.mark.parametrize("head_norm", ["none", "bn"])
def test_a_picture_without_objects_stands_beside_one_with(head_norm):
    detector = create_mask_rcnn("fasternet_t0", head_norm=head_norm, **SMALL)
    losses = train(detector, [EMPTY, draw_target()])
    assert losses["loss_mask"] > 0
    assert losses["loss_box_reg"] > 0
    assert any(parameter.grad.any() for parameter in detector.roi_heads.mask_head.parameters())


def test_mask_targets_are_binary_and_those_of_a_plain_crop():
    masks = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 12), (64, 96), mode="bilinear")[0] > 0.5
    boxes = torch.rand(12, 4) * torch.tensor([50.0, 30, 40, 30])
    boxes[:, 2:] += boxes[:, :2] + 2
    matches = torch.arange(12) % 3
    found = cut_masks(masks, boxes, matches)
    assert found.shape == (12, 28, 28)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    for target, (x0, y0, x1, y1), match in zip(found, boxes.tolist(), matches.tolist(), strict=True):
        rows = plain_mmdet.sample(y0 - 0.5, y1 - 0.5, 28, 64, torch.float64)
        columns = plain_mmdet.sample(x0 - 0.5, x1 - 0.5, 28, 96, torch.float64)
        share = rows @ masks[match].double() @ columns.T  # (28, 28)
        clear = (share - 0.5).abs() > 1e-4
        assert torch.equal(target[clear] == 1, share[clear] > 0.5)
        assert clear.float().mean() > 0.9
    assert cut_masks(masks, boxes[:0], matches[:0]).shape == (0, 28, 28)


def test_faster_rcnn_has_no_loss_of_masks():
    targets = [{name: draw_target()[name] for name in ("boxes", "labels")}]
    losses = train(create_faster_rcnn("fasternet_t0", **SMALL), targets)
    assert sorted(losses) == ["loss_box_reg", "loss_classifier", "loss_objectness", "loss_rpn_box_reg"]
