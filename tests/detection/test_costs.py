"""Costs of detectors: every row of Table 4 to 1 %, or to 1 % of what its footnote says."""

import functools
import re

import pytest
import torch

from fasternet.detection.costs import FOOTNOTES, PARTS, count_detector, name_backbone
from fasternet.detection.detector import create_faster_rcnn, create_mask_rcnn
from fasternet.paper import load_table

TABLE4 = {row["backbone"]: row for row in load_table("table4_coco")}
count_row = functools.cache(count_detector)
SMALL = {"fpn_channels": 8, "box_head_width": 16, "backbone_options": {"width": 8, "depths": (1, 1, 1, 1)}}


@pytest.mark.parametrize("name", TABLE4)
def test_costs_are_those_of_table_4(name: str) -> None:
    costs, row = count_row(name), TABLE4[name]
    assert costs.num_params_without_batch_norm / 1e6 == pytest.approx(float(row["params_m"]), rel=0.01)
    printed = pytest.approx(float(row["macs_g_1280x800"]), rel=0.01)
    assert (costs.macs / 1e9 == printed) == (name not in FOOTNOTES)
    assert (costs.macs - costs.attention_macs) / 1e9 == printed
    if name in FOOTNOTES:
        counted, _, without = map(float, re.findall(r"[\d.]+(?= G)", FOOTNOTES[name]))
        assert counted == round(costs.macs / 1e9, 1)
        assert without == round((costs.macs - costs.attention_macs) / 1e9, 1)


@pytest.mark.parametrize(
    ("name", "macs_g"), [("FasterNet-S", 258.0), ("FasterNet-M", 343.7), ("FasterNet-L", 483.3), ("ResNet50", 252.6)]
)
def test_multiply_adds_are_known_to_the_digit(name: str, macs_g: float) -> None:
    assert round(count_row(name).macs / 1e9, 1) == macs_g


def test_parts_are_what_their_layers_compute() -> None:
    with torch.device("meta"):
        detector = create_mask_rcnn("fasternet_t0", num_classes=3, mask_head_channels=12, **SMALL)
    costs = count_detector(detector, (64, 96))
    assert tuple(costs.part_macs) == PARTS
    assert costs.num_params == sum(p.numel() for p in detector.parameters())
    pixels = [64 * 96 // stride**2 for stride in (4, 8, 16, 32)]
    assert costs.part_macs["neck"] == sum(n * (8 * c + 9 * 8 * 8) for n, c in zip(pixels, (8, 16, 32, 64), strict=True))
    assert costs.part_macs["rpn_head"] == (sum(pixels) + 2) * (9 * 8 * 8 + 8 * 15)  # the pooled level has 1 x 2
    assert costs.part_macs["box_head"] == 1000 * (49 * 8 * 16 + 16 * 16 + 16 * (4 + 16))
    assert costs.part_macs["mask_head"] == 100 * 14 * 14 * 9 * (8 * 12 + 3 * 12 * 12)


def test_detector_without_masks_has_no_mask_head() -> None:
    with torch.device("meta"):
        detector = create_faster_rcnn("fasternet_t0", num_classes=3, **SMALL)
    assert count_detector(detector, (64, 64)).part_macs["mask_head"] == 0


def test_names_of_the_paper_and_of_the_code_are_one() -> None:
    assert name_backbone("FasterNet-T0") == "fasternet_t0"
    assert name_backbone("PVT-Small") == "PVT-Small"
    with pytest.raises(ValueError, match="ResNet5O"):
        count_detector("ResNet5O")
