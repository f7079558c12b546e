"""Drawings of detections: where ink falls, and where it must not."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from fasternet.detection.draw import (
    FILL_OPACITY,
    PALETTE,
    _choose_ink,
    _erode,
    _fit_label,
    choose_color,
    choose_style,
    draw_detections,
    place_labels,
)
from fasternet.detection.predictor import Detection

GREY = (120, 120, 120)


def _detect(box, *, label=0, score=0.9, mask=None, name="apple", offset=(0, 0)):
    return Detection(label, name, score, box, mask, offset)


def _canvas(size=(400, 300), color=GREY):
    return Image.new("RGB", size, color)


def test_mask_fills_its_part_alone_with_a_solid_outline():
    mask = torch.ones(60, 80, dtype=torch.bool)
    detection = _detect((150.0, 100.0, 230.0, 160.0), label=1, mask=mask, offset=(100, 150))
    drawing = draw_detections(_canvas(), [detection])
    color = choose_color(1)
    mixed = tuple(round(g + (c - g) * FILL_OPACITY) for g, c in zip(GREY, color, strict=True))
    assert drawing.getpixel((190, 130)) == pytest.approx(mixed, abs=2)
    assert drawing.getpixel((150, 130)) == color
    assert drawing.getpixel((229, 130)) == color
    assert drawing.getpixel((148, 130)) == GREY
    assert drawing.getpixel((231, 130)) == GREY


def test_mask_of_any_shape_follows_the_oracle():
    mask = torch.rand(37, 23) > 0.2
    for radius in (1, 2, 5):
        padded = torch.nn.functional.pad((~mask).float(), [radius] * 4, value=1.0)
        expected = torch.nn.functional.max_pool2d(padded[None], 2 * radius + 1, 1)[0] == 0
        assert torch.equal(_erode(mask, radius), expected)
    assert not _erode(torch.ones(4, 90, dtype=torch.bool), 2).any()


def test_strongest_is_on_top():
    mask = torch.ones(50, 50, dtype=torch.bool)
    strong = _detect((100.0, 100.0, 150.0, 150.0), label=0, score=0.9, mask=mask, offset=(100, 100))
    weak = _detect((125.0, 125.0, 175.0, 175.0), label=1, score=0.6, mask=mask, offset=(125, 125))
    assert draw_detections(_canvas(), [strong, weak]).getpixel((149, 140)) == choose_color(0)


def test_boxes_alone_are_outlined_and_not_filled():
    drawing = draw_detections(_canvas(), [_detect((100.0, 100.0, 200.0, 200.0), label=2)])
    assert drawing.getpixel((100, 150)) == choose_color(2) == drawing.getpixel((199, 150))
    assert drawing.getpixel((150, 150)) == GREY


def test_no_detections_leave_the_picture():
    canvas = _canvas()
    drawing = draw_detections(canvas, [])
    assert drawing is not canvas
    assert drawing.tobytes() == canvas.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_every_mode_is_drawn_in_color_and_left_alone(mode):
    image = Image.new("L", (200, 100), 200).convert(mode)
    before = image.tobytes()
    drawing = draw_detections(image, [_detect((50.0, 40.0, 120.0, 90.0))])
    assert drawing.mode == "RGB"
    assert drawing.size == image.size
    assert drawing.getpixel((50, 60)) == choose_color(0)
    assert image.tobytes() == before
    assert image.mode == mode


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert draw_detections(image, []).getpixel((3, 3)) == (255, 255, 255)


def test_grey_values_of_16_bits_are_rescaled():
    image = Image.fromarray(np.full((64, 64), 120 * 257, dtype=np.uint16))
    assert draw_detections(image, []).getpixel((3, 3)) == GREY[:1] * 3


@pytest.mark.parametrize("size", [(1, 1), (10, 2000), (2000, 10), (30, 30), (64, 48), (3000, 2000)])
def test_labels_stay_in_the_picture(size):
    boxes = [(0.0, 0.0, *size), (-5.0, -5.0, 3.0, 3.0), (size[0] - 2.0, size[1] - 2.0, size[0] + 9.0, size[1] + 9.0)]
    style = choose_style(size)
    labels = [_fit_label("hazelnut 0.98", GREY, box, style.font_size, size) for box in boxes]
    labels = [label for label in labels if label]
    for label, place in zip(labels, place_labels(labels, size), strict=True):
        if place is not None:
            assert 0 <= place[0] <= size[0] - label.width
            assert 0 <= place[1] <= size[1] - label.height
    assert bool(labels) == (min(size) >= 48)
    assert draw_detections(_canvas(size), [_detect(box) for box in boxes]).size == size


def test_labels_keep_clear_of_one_another_and_of_small_objects():
    size = (800, 600)
    boxes = [(x, y, x + 30.0, y + 24.0) for x, y in itertools.product((300.0, 420.0, 540.0), (200.0, 300.0, 400.0))]
    labels = [_fit_label("apple 0.98", GREY, box, choose_style(size).font_size, size) for box in boxes]
    places = place_labels(labels, size)
    assert None not in places
    chips = [(x, y, x + label.width, y + label.height) for (x, y), label in zip(places, labels, strict=True)]
    for a, b in [*itertools.combinations(chips, 2), *itertools.product(chips, boxes)]:
        assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_labels_that_would_hide_others_are_left_out():
    label = _fit_label("apple 0.98", GREY, (2.0, 2.0, 60.0, 40.0), 14, (90, 44))
    places = place_labels([label] * 20, (90, 44))
    assert places[0] is not None
    assert None in places


def test_ink_is_readable_on_every_class():
    def measure(color):
        linear = [(v / 255 / 12.92) if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for color in {choose_color(label) for label in range(100)}:
        low, high = sorted((measure(color), measure(_choose_ink(color))))
        assert (high + 0.05) / (low + 0.05) >= 4.5, color  # WCAG's AA


def test_colors_are_stable_and_distinct():
    colors = [choose_color(label) for label in range(3 * len(PALETTE))]
    assert len(set(colors)) == len(colors)
    assert choose_color(3 * len(PALETTE)) == colors[0]


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
VISION = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    "all colours": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
}


@pytest.mark.parametrize("vision", VISION)
def test_colors_are_told_apart_with_every_vision(vision):
    """In CIELAB, where a difference of 2.3 is just seen."""
    linear = (torch.tensor(PALETTE) / 255).pow(2.2) @ torch.tensor(VISION[vision]).T
    to_xyz = torch.tensor([[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8729]])
    x, y, z = (linear.clamp(0, 1) @ to_xyz.T).pow(1 / 3).T
    lab = torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
    assert torch.pdist(lab).min() > 12


def test_widths_follow_the_picture():
    assert choose_style((800, 600)) == (2, 14)
    assert choose_style((13000, 13000)).line > 20 * choose_style((800, 600)).line
    assert choose_style((10000, 10)).line == 1


def test_scores_can_be_left_out():
    detection = _detect((100.0, 100.0, 200.0, 200.0))
    with_score, without = draw_detections(_canvas(), [detection]), draw_detections(_canvas(), [detection], scores=False)
    assert with_score.tobytes() != without.tobytes()
