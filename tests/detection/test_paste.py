import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasternet.detection.layers import paste_mask, paste_masks

HEIGHT, WIDTH = 37, 53
BOXES = {
    "inside": (10.3, 5.7, 40.1, 30.2),
    "whole picture": (0.0, 0.0, 53.0, 37.0),
    "beyond every side": (-20.5, -10.25, 80.0, 60.5),
    "upper left corner": (-8.4, -6.1, 7.7, 9.3),
    "lower right corner": (45.2, 30.6, 70.9, 44.0),
    "left of the picture": (-30.0, 5.0, -10.0, 20.0),
    "below the picture": (5.0, 50.0, 20.0, 60.0),
    "one pixel": (12.0, 9.0, 13.0, 10.0),
    "less than a pixel": (12.3, 9.4, 12.6, 9.55),
    "less than a pixel, far from a centre": (12.05, 9.05, 12.1, 9.1),
    "thin": (3.2, 8.4, 50.7, 8.6),
    "on the border": (52.6, 36.7, 53.0, 37.0),
}


def sample(mask: Tensor, box: Tensor, height: int, width: int) -> Tensor:
    """Return what bilinear sampling at the centres of the pixels gives, 0 around the mask, in double precision."""
    x0, y0, x1, y1 = box.double()
    x = (torch.arange(width).double() + 0.5 - x0) / (x1 - x0) * 2 - 1  # -1 and 1 are the sides of the box
    y = (torch.arange(height).double() + 0.5 - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]  # (1, H, W, 2)
    return F.grid_sample(mask.double()[None, None], grid, padding_mode="zeros", align_corners=False)[0, 0].float()


@pytest.mark.parametrize("side", [1, 5, 28])
def test_masks_are_sampled_at_the_centres_of_pixels(side: int) -> None:
    masks = torch.rand(len(BOXES), side, side)
    boxes = torch.tensor([*BOXES.values()])
    pasted = paste_masks(masks, boxes, HEIGHT, WIDTH)
    assert pasted.shape == (len(BOXES), HEIGHT, WIDTH)
    for name, mask, box, found in zip(BOXES, masks, boxes, pasted, strict=True):
        # A box of 0.05 pixels has 28 cells: the place of a centre among them is known to 1e-3 in single precision.
        tolerance = 1e-5 * side / min(1, *(box[2:] - box[:2]).tolist())
        difference = (found - sample(mask, box, HEIGHT, WIDTH)).abs().max()
        assert difference <= tolerance, f"{name}: {difference:.1e} > {tolerance:.1e}"


def test_masks_of_other_proportions_are_sampled_so_too() -> None:
    masks, boxes = torch.rand(2, 4, 9), torch.tensor([BOXES["inside"], BOXES["upper left corner"]])
    for mask, box, found in zip(masks, boxes, paste_masks(masks, boxes, HEIGHT, WIDTH), strict=True):
        assert torch.allclose(found, sample(mask, box, HEIGHT, WIDTH), atol=1e-5)


def test_a_mask_of_ones_fills_its_box_and_nothing_else() -> None:
    pasted = paste_masks(torch.ones(1, 28, 28), torch.tensor([[10.0, 5.0, 40.0, 30.0]]), HEIGHT, WIDTH)[0] > 0.5
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    expected[5:30, 10:40] = True
    assert torch.equal(pasted, expected)


@pytest.mark.parametrize("box", [(12.0, 9.0, 12.0, 9.0), (12.5, 9.5, 12.5, 9.5), (3.0, 8.5, 50.0, 8.5), (0.0,) * 4])
def test_a_box_without_area_gives_finite_values_below_the_threshold_or_one_line(box: tuple[float, ...]) -> None:
    pasted = paste_masks(torch.ones(1, 28, 28), torch.tensor([box]), HEIGHT, WIDTH)
    assert pasted.isfinite().all()
    assert pasted.max() <= 0.5
    part, top, left = paste_mask(torch.ones(28, 28), torch.tensor(box), HEIGHT, WIDTH)
    assert torch.equal(_lay(part, top, left), pasted[0])


@pytest.mark.parametrize("side", [1, 28])
@pytest.mark.parametrize("name", BOXES)
def test_a_single_mask_is_the_part_of_the_picture_where_it_can_be(name: str, side: int) -> None:
    mask, box = torch.rand(side, side) + 0.1, torch.tensor(BOXES[name])
    part, top, left = paste_mask(mask, box, HEIGHT, WIDTH)
    expected = paste_masks(mask[None], box[None], HEIGHT, WIDTH)[0]
    # Outside the part everything is exactly 0, inside it differs by the order of additions at most.
    assert torch.equal(_lay(torch.ones_like(part), top, left) * expected, expected)
    assert torch.allclose(_lay(part, top, left), expected, atol=1e-6)


def test_a_single_mask_of_a_large_picture_takes_its_box_alone() -> None:
    box = torch.tensor([12000.3, 11000.2, 12020.9, 11030.4])
    part, top, left = paste_mask(torch.ones(28, 28), box, 13000, 13000)
    assert part.numel() < 1000
    assert (part > 0.5).sum() == pytest.approx(21 * 30, abs=31)
    assert 10998 <= top <= 11000
    assert 11998 <= left <= 12000


def test_masks_are_pasted_in_single_precision_under_autocast() -> None:
    masks, box = torch.rand(1, 28, 28), torch.tensor([BOXES["inside"]])
    expected = paste_masks(masks, box, HEIGHT, WIDTH)
    part, *_ = paste_mask(masks[0], box[0], HEIGHT, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(paste_masks(masks, box, HEIGHT, WIDTH), expected)
        assert torch.equal(paste_mask(masks[0], box[0], HEIGHT, WIDTH)[0], part)
        assert paste_masks(masks.bfloat16(), box.bfloat16(), HEIGHT, WIDTH).dtype == torch.float32


def test_no_masks_are_none() -> None:
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), HEIGHT, WIDTH).shape == (0, HEIGHT, WIDTH)


def _lay(part: Tensor, top: int, left: int) -> Tensor:
    picture = torch.zeros(HEIGHT, WIDTH)
    if part.numel():
        picture[top : top + part.shape[0], left : left + part.shape[1]] = part
    return picture
