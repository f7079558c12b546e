import pytest
import torch
import torch.nn.functional as F

from fasternet.detection.layers import paste_masks
from fasternet.detection.transform import DetectorTransform
from fasternet.models.checkpoint import Preprocessing

MEAN, STD = (torch.tensor(values)[:, None, None] for values in (Preprocessing().mean, Preprocessing().std))


def evaluating(min_size: int = 64, max_size: int = 96, **options: bool) -> DetectorTransform:
    return DetectorTransform(min_size, max_size, **options).eval()


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((100, 80), (80, 64)), ((80, 100), (64, 80)), ((40, 400), (10, 96)), ((32, 32), (64, 64)), ((1, 1), (64, 64))],
)
def test_the_shorter_side_is_fitted_and_the_longer_one_limited(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    images, targets = evaluating()([torch.rand(3, *size)])
    assert images.image_sizes == [fitted]
    assert images.tensors.shape[-2:] == tuple(-(-side // 32) * 32 for side in fitted)
    assert targets is None


@pytest.mark.parametrize("antialias", [True, False])
def test_pictures_are_normalized_resized_and_padded_with_zeros(antialias: bool) -> None:
    image = torch.rand(3, 200, 150)
    images, _ = evaluating(antialias=antialias)([image])
    assert images.image_sizes == [(85, 64)]
    expected = F.interpolate(
        ((image - MEAN) / STD)[None], (85, 64), mode="bilinear", align_corners=False, antialias=antialias
    )[0]
    assert torch.allclose(images.tensors[0, :, :85, :64], expected, atol=1e-5)
    assert not images.tensors[0, :, 85:].any()
    # The two ways differ on noise, so each must have been taken.
    other = F.interpolate(((image - MEAN) / STD)[None], (85, 64), mode="bilinear", antialias=not antialias)[0]
    assert (images.tensors[0, :, :85] - other).abs().max() > 0.1


def test_a_picture_of_the_right_size_keeps_its_pixels() -> None:
    image = torch.rand(3, 64, 96)
    images, _ = evaluating()([image])
    assert torch.allclose(images.tensors[0] * STD + MEAN, image, atol=1e-6)


def test_training_takes_pictures_and_targets_as_they_come() -> None:
    sizes = [(50, 30), (20, 70)]
    given = [{"boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "masks": torch.ones(1, *size)} for size in sizes]
    images, targets = DetectorTransform(64, 96)([torch.rand(3, *size) for size in sizes], given)
    assert images.image_sizes == sizes
    assert images.tensors.shape == (2, 3, 64, 96)
    for found, target, size in zip(targets, given, sizes, strict=True):
        assert torch.equal(found["boxes"], target["boxes"])
        assert found["masks"].shape[-2:] == size


def test_boxes_and_masks_come_back_to_the_picture_as_it_came() -> None:
    boxes, masks = torch.tensor([[8.0, 16.0, 32.0, 48.0], [0.0, 0.0, 64.0, 80.0]]), torch.rand(2, 1, 28, 28)
    prediction = {"boxes": boxes.clone(), "masks": masks.clone()}
    found = evaluating().postprocess([prediction], [(80, 64)], [(200, 160)])[0]
    assert torch.allclose(found["boxes"], boxes * 2.5)
    assert found["masks"].shape == (2, 1, 200, 160)
    assert torch.equal(found["masks"][:, 0], paste_masks(masks[:, 0], boxes * 2.5, 200, 160))


def test_masks_stay_as_they_are_where_they_are_pasted_later() -> None:
    transform = evaluating()
    transform.full_masks = False
    boxes, masks = torch.tensor([[8.0, 16.0, 32.0, 48.0]]), torch.rand(1, 1, 28, 28)
    found = transform.postprocess([{"boxes": boxes, "masks": masks}], [(80, 64)], [(200, 160)])[0]
    assert torch.equal(found["masks"], masks)
    assert torch.allclose(found["boxes"], torch.tensor([[20.0, 40.0, 80.0, 120.0]]))


def test_boxes_without_masks_and_pictures_without_objects_come_back_too() -> None:
    found = evaluating().postprocess([{"boxes": torch.zeros(0, 4)}], [(80, 64)], [(200, 160)])[0]
    assert set(found) == {"boxes"}
    empty = {"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 1, 28, 28)}
    assert evaluating().postprocess([empty], [(80, 64)], [(200, 160)])[0]["masks"].shape == (0, 1, 200, 160)


def test_training_leaves_what_the_heads_say_alone() -> None:
    boxes = torch.tensor([[8.0, 16.0, 32.0, 48.0]])
    found = DetectorTransform(64, 96).postprocess([{"boxes": boxes.clone()}], [(80, 64)], [(200, 160)])[0]
    assert torch.equal(found["boxes"], boxes)
