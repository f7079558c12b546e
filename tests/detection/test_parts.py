"""Parts of a detector: together they are the detector, and their work does not hang on its weights."""

from typing import Any

import pytest
import torch

from fasternet.detection.detector import Detector, create_faster_rcnn, create_mask_rcnn
from fasternet.detection.layers import paste_masks
from fasternet.detection.parts import list_parts

SIZE = (64, 96)
NAMES = ["backbone", "neck", "heads", "post-processing", "whole"]


def create_small(create: Any = create_mask_rcnn, seed: int = 0) -> Detector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create(
            "fasternet_t0", num_classes=3, fpn_channels=8, box_head_width=16, mask_head_channels=8,
            backbone_options={"width": 8, "depths": (1, 1, 1, 1)},
        ).eval()  # fmt: skip


def run(detector: Detector, image: Any = SIZE, **options: Any) -> dict[str, Any]:
    with torch.inference_mode():
        return {name: part() for name, part in list_parts(detector, image, **options).items()}


def test_parts_are_those_of_the_detector_on_as_many_regions_as_asked() -> None:
    detector, image = create_small(), torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        levels = detector.backbone(image)
        objectness, _ = detector.rpn.head([*levels.values()])
    outputs = run(detector, image, num_proposals=30, num_masks=7)
    assert list(outputs) == NAMES
    assert [tuple(x.shape[1:]) for x in outputs["backbone"]] == [(8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3)]
    assert all(torch.equal(outputs["neck"][name], x) for name, x in levels.items())
    heads = outputs["heads"]
    assert all(map(torch.equal, heads.objectness, objectness))
    assert heads.class_logits.shape == (30, 4)
    assert heads.box_offsets.shape == (30, 16)
    assert heads.mask_logits.shape == (7, 4, 28, 28)
    proposals, detections, masks = outputs["post-processing"]
    assert 0 < len(proposals) <= 1000
    assert 0 < len(detections["boxes"]) <= 100
    assert masks.shape == (7, *SIZE)
    assert torch.equal(outputs["whole"][2], masks)


def test_post_processing_gets_every_anchor_and_lays_masks_into_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = create_small()
    seen: dict[str, Any] = {}
    finish = detector.roi_heads.postprocess_detections

    def watch(*args: Any) -> Any:
        seen["detections"] = args
        return finish(*args)

    monkeypatch.setattr(detector.roi_heads, "postprocess_detections", watch)
    filter_proposals = detector.rpn.filter_proposals
    monkeypatch.setattr(
        detector.rpn, "filter_proposals", lambda *args: seen.update(proposals=args) or filter_proposals(*args)
    )
    with torch.inference_mode():
        parts = list_parts(detector, SIZE, num_proposals=20, num_masks=5)
        proposals, detections, masks = parts["post-processing"]()  # type: ignore[misc]
    boxes, _, sizes, numbers = seen["proposals"]
    assert boxes.shape == (1, sum(numbers), 4)
    assert sizes == [SIZE]
    assert numbers == [3 * n for n in (16 * 24, 8 * 12, 4 * 6, 2 * 3, 1 * 2)]
    regions = seen["detections"][2][0]
    assert (regions[:, :2] >= 0).all()
    assert (regions[:, 2] <= SIZE[1] + 1e-3).all()
    assert (regions[:, 3] <= SIZE[0] + 1e-3).all()
    assert (regions[:, 2:] > regions[:, :2]).all()
    inside = paste_masks(torch.ones(5, 28, 28), regions[:5], *SIZE) > 0
    assert not masks[~inside].any()
    assert (proposals[:, 2] <= SIZE[1]).all()
    assert set(detections) == {"boxes", "scores", "labels"}


def test_work_after_the_heads_does_not_hang_on_weights() -> None:
    first, second = (run(create_small(seed=seed), seed=3)["post-processing"] for seed in (0, 1))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    other = run(create_small(), seed=4)["post-processing"]
    assert not torch.equal(first[2], other[2])


def test_detector_without_masks_has_the_same_parts() -> None:
    outputs = run(create_small(create_faster_rcnn), num_proposals=10)
    assert list(outputs) == NAMES
    assert outputs["heads"].mask_logits is None
    assert outputs["whole"][2] is None


def test_usual_number_of_detections_passes_the_threshold() -> None:
    detector = create_mask_rcnn(
        "fasternet_t0", num_classes=80, fpn_channels=8, box_head_width=16, mask_head_channels=8,
        backbone_options={"width": 8, "depths": (1, 1, 1, 1)},
    ).eval()  # fmt: skip
    _, detections, masks = run(detector, (128, 160))["post-processing"]
    assert len(detections["boxes"]) == len(masks) == 100
    detector.roi_heads.detections_per_img = 10000
    assert 150 < len(run(detector, (128, 160))["post-processing"][1]["boxes"]) < 600
