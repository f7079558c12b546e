"""Anchors, box coder and regions, each against numbers worked out by hand or a plain computation."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from fasternet.detection.layers import Anchors, RegionAlign, SymmetricBoxCoder

_spec = importlib.util.spec_from_file_location("plain_mmdet", Path(__file__).with_name("plain_mmdet.py"))
plain_mmdet = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain_mmdet)

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def make_anchors(anchors, dtype=torch.float32, sizes=((9, 7), (5, 4), (3, 2), (2, 1), (1, 1))):
    """Maps of sizes that no stride divides: torchvision would guess 3 for 4."""
    maps = [torch.zeros(2, 8, *size, dtype=dtype) for size in sizes]
    images = ImageList(torch.zeros(2, 3, 32, 27), [(32, 27), (30, 20)])
    return anchors(images, maps)


def test_anchors_stand_on_the_grid_of_their_level_unrounded():
    first, second = make_anchors(Anchors())
    assert torch.equal(first, second)
    assert first.shape == (3 * (63 + 20 + 6 + 2 + 1), 4)
    root = 2**0.5
    wanted = [
        [-16 * root, -8 * root, 16 * root, 8 * root],
        [-16, -16, 16, 16],
        [-8 * root, -16 * root, 8 * root, 16 * root],
    ]
    torch.testing.assert_close(first[:3], torch.tensor(wanted), rtol=0, atol=1e-5)
    torch.testing.assert_close(first[3:6] - first[:3], torch.tensor([4.0, 0, 4, 0]).expand(3, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(first[21:24] - first[:3], torch.tensor([0, 4.0, 0, 4]).expand(3, 4), rtol=0, atol=1e-5)
    level = first[3 * 63 :][:3]  # the next one
    torch.testing.assert_close(level, 2 * torch.tensor(wanted), rtol=0, atol=1e-5)
    assert first[-2].tolist() == [-256, -256, 256, 256]


def test_anchors_keep_their_fractions_where_maps_are_bf16():
    """bf16 has 8 bits: an anchor at 1000 pixels would move by up to 4."""
    anchors = Anchors()
    sizes = ((2, 300), (1, 150), (1, 75), (1, 38), (1, 19))
    exact = make_anchors(Anchors(), sizes=sizes)[0]
    assert torch.equal(make_anchors(anchors, torch.bfloat16, sizes)[0], exact)
    assert torch.equal(make_anchors(anchors, torch.float32, sizes)[0], exact)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), WEIGHTS])
def test_box_coder_limits_both_directions(weights):
    coder = SymmetricBoxCoder(weights)
    boxes = torch.tensor([[100.0, 100, 200, 300]]).expand(3, 4)
    scale = torch.tensor(weights)
    offsets = torch.tensor([[0.0, 0, 50, -50], [0.1, -0.2, 4.0, -4.0], [0, 0, 0, 0]]) * scale
    found = coder.decode(torch.cat([offsets, 0 * offsets], dim=1), [boxes])
    assert found.shape == (3, 2, 4)
    torch.testing.assert_close(found[:, 1], boxes)
    sides = found[:, 0, 2:] - found[:, 0, :2]
    wanted = [[100 * 62.5, 200 / 62.5], [100 * 54.59815, 200 / 54.59815], [100, 200]]
    torch.testing.assert_close(sides, torch.tensor(wanted), rtol=1e-4, atol=0)
    torch.testing.assert_close(found[1, 0, :2] + sides[1] / 2, torch.tensor([160.0, 160]), rtol=1e-4, atol=0)


def test_box_coder_inverts_its_encoding():
    coder = SymmetricBoxCoder(WEIGHTS)
    boxes, proposals = (torch.rand(20, 4) * 50 + torch.tensor([0.0, 0, 60, 60]) for _ in range(2))
    (offsets,) = coder.encode([boxes], [proposals])
    torch.testing.assert_close(coder.decode(offsets, [proposals])[:, 0], boxes)


def test_box_coder_takes_no_box_at_all():
    """A picture may leave no proposal."""
    assert SymmetricBoxCoder(WEIGHTS).decode(torch.zeros(0, 12), [torch.zeros(0, 4)]).numel() == 0


@pytest.mark.parametrize("side", [7, 14])
def test_regions_are_those_of_a_plain_computation(side):
    maps = {str(i): torch.randn(2, 3, 256 // s, 320 // s) for i, s in enumerate((4, 8, 16, 32))}
    corners = [[3.3, 4.4, 20, 11], [0, 0, 112, 112], [0, 0, 111.9, 112], [-20, -9, 40, 30], [5, 5, 315, 250]]
    corners += [[10, 10, 12, 11.5], [200, 100, 320, 256], [0, 0, 448, 448], [300, 240, 330, 280], [1, 1, 226, 226]]
    boxes = [torch.tensor(corners), torch.tensor(corners[::-1])[:7]]
    found = RegionAlign(side)(maps, boxes, [(256, 320)] * 2)
    assert found.shape == (17, 3, side, side)
    levels = [x[:1] for x in maps.values()], [x[1:] for x in maps.values()]
    wanted = torch.cat([plain_mmdet.align(x, b, side) for x, b in zip(levels, boxes, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_no_region_is_an_empty_tensor():
    maps = {str(i): torch.randn(1, 3, 64 // s, 64 // s) for i, s in enumerate((4, 8, 16, 32))}
    assert RegionAlign(7)(maps, [torch.zeros(0, 4)], [(64, 64)]).shape == (0, 3, 7, 7)
