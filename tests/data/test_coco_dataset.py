import dataclasses
import os
import pickle
import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fasternet.data.boxes import fit_size
from fasternet.data.coco import CocoData, CocoImage, Instance, decode_mask, find_coco, load_coco
from fasternet.data.coco_dataset import CocoDataset, DetectionTransform, ImageSizeError, crop, flip, merge_pictures
from fasternet.data.images import ImageError
from fasternet.data.loaders import TrainingLoader, create_loader

ORIENTATION = 0x0112


def draw(box: tuple[float, ...]) -> list[list[float]]:
    x0, y0, x1, y1 = box
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def create_data(folder: Path, count: int = 1, size: tuple[int, int] = (24, 16), *, masks: bool = True) -> CocoData:
    """Return pictures whose objects are rectangles of a colour of their own, with a crowd; the last has no object."""
    images = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 99, (size[1], size[0], 3)).astype(np.uint8)
        instances = []
        for label, box in enumerate(
            [(3, 2, 9, 8), (12, 4, 20, 15), (0, 10, 6, 16)] if number < max(count - 1, 1) else []
        ):
            x0, y0, x1, y1 = box
            pixels[y0:y1, x0:x1] = 100 + 50 * label
            instances.append(Instance(label + 1, label, box, draw(box) if masks else None, label == 2, 1.0))
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append(CocoImage(number + 40, folder / f"{number}.png", *size, tuple(instances)))
    return CocoData(folder / "file.json", ("a", "b", "c"), (1, 2, 3), tuple(images), {}, masks)


def are_equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(are_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(are_equal, one, other))
    return one == other


def test_a_target_holds_boxes_labels_and_masks_without_crowds(tmp_path: Path) -> None:
    dataset = CocoDataset(create_data(tmp_path, 2))
    assert dataset.paths == [Path("0.png"), Path("1.png")]
    image, target = dataset[0]
    assert image.shape == (3, 16, 24)
    assert image.dtype == torch.float32
    assert set(target) == {"boxes", "labels", "masks", "image_id"}
    assert target["boxes"].tolist() == [[3, 2, 9, 8], [12, 4, 20, 15]]
    assert target["labels"].tolist() == [1, 2]
    assert target["image_id"] == 40
    for mask, value in zip(target["masks"], (100, 150), strict=True):
        assert torch.equal(mask.bool(), (image * 255).round().eq(value).all(0))
    _, empty = dataset[1]
    assert {key: empty[key].shape for key in ("boxes", "labels", "masks")} == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, 16, 24),
    }
    assert (empty["labels"].dtype, empty["masks"].dtype) == (torch.int64, torch.uint8)


def test_masks_of_a_file_without_are_refused_and_boxes_alone_given(tmp_path: Path) -> None:
    data = create_data(tmp_path, masks=False)
    assert "masks" not in CocoDataset(data, masks=False)[0][1]
    with pytest.raises(ValueError, match=r"file\.json has no masks; a detector of boxes alone can learn from it$"):
        CocoDataset(data)


def test_grey_pictures_become_rgb(tmp_path: Path) -> None:
    data = create_data(tmp_path)
    Image.fromarray(np.arange(384, dtype=np.uint8).reshape(16, 24)).save(tmp_path / "0.png")
    image, _ = CocoDataset(data)[0]
    assert image.shape == (3, 16, 24)
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize(
    ("annotated", "expected"),
    [((24, 16), "stored"), ((16, 24), "upright"), ((24, 24), None), ((12, 8), None)],
)
def test_the_annotated_size_tells_whether_a_turned_picture_is_meant(annotated, expected, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 24, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned by a quarter
    path = tmp_path / "0.png"
    Image.fromarray(pixels).save(path, exif=exif)
    data = CocoData(tmp_path / "f.json", ("a",), (1,), (CocoImage(1, path, *annotated, ()),), {}, True)
    if expected is None:
        with pytest.raises(ImageSizeError, match=rf"0\.png has 16x24 pixels, its annotation says {annotated[0]}x"):
            CocoDataset(data)[0]
        return
    right = pixels if expected == "stored" else np.rot90(pixels, -1)
    assert np.array_equal(np.asarray(CocoDataset(data).load(0)), right)


def test_a_picture_that_is_missing_or_of_another_size_is_an_image_error(tmp_path: Path) -> None:
    data = create_data(tmp_path)
    Image.new("RGB", (16, 24)).save(tmp_path / "0.png")  # sides exchanged, and no EXIF data
    name = f"{tmp_path.name}/0.png"  # no absolute path: records keep the sentence
    with pytest.raises(ImageSizeError, match=f"^picture {name} has 16x24 pixels, its annotation says 24x16$"):
        CocoDataset(data)[0]
    (tmp_path / "0.png").unlink()
    with pytest.raises(ImageError, match=f"^cannot read {name}: there is no such file$"):
        CocoDataset(data)[0]


def test_masks_of_a_picture_are_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[weakref.ref] = []

    def watch(*arguments):
        mask = decode_mask(*arguments)
        assert sum(one() is not None for one in drawn) <= 1
        drawn.append(weakref.ref(mask))
        return mask

    data = create_data(tmp_path)
    image = dataclasses.replace(data.images[0], instances=data.images[0].instances[:2] * 3)
    monkeypatch.setattr("fasternet.data.coco_dataset.decode_mask", watch)
    assert CocoDataset(dataclasses.replace(data, images=(image,)))[0][1]["masks"].shape == (6, 16, 24)
    assert len(drawn) == 6


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_flip_moves_all_alike_and_twice_is_none(axis: int, tmp_path: Path) -> None:
    sample = CocoDataset(create_data(tmp_path))[0]
    before = pickle.dumps(sample)
    flipped, target = flip(*sample, axis)
    for mask, box, value in zip(target["masks"], target["boxes"], (100, 150), strict=True):
        place = (flipped * 255).round().eq(value).all(0)
        rows, columns = torch.where(place)
        assert torch.equal(mask.bool(), place)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert not torch.equal(flipped, sample[0])
    assert are_equal(flip(flipped, target, axis), sample)
    assert pickle.dumps(sample) == before


def test_a_picture_is_resized_as_in_evaluation_with_its_boxes_and_masks(tmp_path: Path) -> None:
    sample = CocoDataset(create_data(tmp_path))[0]
    image, target = DetectionTransform(32, 100)(*sample)
    wanted = F.interpolate(sample[0][None], (32, 48), mode="bilinear", align_corners=False, antialias=True)[0]
    assert torch.equal(image, wanted)
    assert torch.equal(target["boxes"], sample[1]["boxes"] * 2)
    assert torch.equal(target["masks"], sample[1]["masks"].repeat_interleave(2, 1).repeat_interleave(2, 2))
    image, target = DetectionTransform(8, 100, antialias=False)(*sample)
    assert torch.equal(image, F.interpolate(sample[0][None], (8, 12), mode="bilinear", align_corners=False)[0])
    assert torch.equal(target["boxes"], sample[1]["boxes"] / 2)
    assert torch.equal(target["masks"], sample[1]["masks"][:, 1::2, 1::2])  # the pixel under the centre
    assert are_equal(DetectionTransform(16, 24)(*sample), sample)
    assert DetectionTransform(32, 36)(*sample)[0].shape == (3, 24, 36)


def test_a_picture_without_objects_passes_every_transform(tmp_path: Path) -> None:
    sample = CocoDataset(create_data(tmp_path, 2))[1]
    image, target = DetectionTransform(32, 40, flip=True, vertical_flip=True, scale_jitter=(2, 2))(*sample)
    assert image.shape == (3, 40, 40)
    assert target["masks"].shape == (0, 40, 40)
    assert target["boxes"].shape == (0, 4)


def test_a_crop_drops_what_is_outside_and_cuts_boxes_to_their_masks() -> None:
    image = torch.rand(3, 20, 20)
    boxes = torch.tensor([[1, 1, 4, 4], [2, 2, 18, 18], [7, 7, 12, 12], [0, 6, 5.5, 9]], dtype=torch.float32)
    masks = torch.zeros(4, 20, 20, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    masks[1] = torch.ones(20, 20, dtype=torch.uint8).triu() * masks[1]  # its upper right half
    target = {"boxes": boxes, "labels": torch.tensor([1, 2, 3, 4]), "image_id": 9}
    cut_image, cut = crop(image, target | {"masks": masks}, 6, 5, 10, 12)  # rows 6 to 15, columns 5 to 16
    assert torch.equal(cut_image, image[:, 6:16, 5:17])
    # The fourth object has half a column of its box left, and none of its mask.
    assert cut["labels"].tolist() == [2, 3]
    assert torch.equal(cut["masks"], masks[1:3, 6:16, 5:17])
    assert cut["boxes"].tolist() == [[1, 0, 12, 10], [2, 1, 7, 6]]
    assert cut["image_id"] == 9
    _, alone = crop(image, target, 6, 5, 10, 12)
    assert alone["labels"].tolist() == [2, 3]
    assert alone["boxes"].tolist() == [[0, 0, 12, 10], [2, 1, 7, 6]]
    assert boxes[1].tolist() == [2, 2, 18, 18]


def test_jitter_and_multi_scale_draw_sizes_within_their_ranges(tmp_path: Path) -> None:
    sample = CocoDataset(create_data(tmp_path))[0]
    for min_size in (16, 20):
        transform = DetectionTransform(min_size, 60, multi_scale=(0.75, 1.5))
        sizes = {transform(*sample)[0].shape[1:] for _ in range(200)}
        assert sizes == {fit_size(16, 24, side, 60) for side in range(min_size * 3 // 4, min_size * 3 // 2 + 1)}
    sizes = {DetectionTransform(16, 30, multi_scale=(1.5, 2))(*sample)[0].shape[1:] for _ in range(9)}
    assert sizes == {(20, 30)}
    sides = set()
    for _ in range(50):
        image, target = DetectionTransform(32, 48, scale_jitter=(0.5, 2.0))(*sample)
        sides.add(image.shape[1])
        assert image.shape[1] >= 16
        assert image.shape[2] <= 48
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            assert mask.shape == image.shape[1:]
            rows, columns = torch.where(mask)
            around = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (around - box).abs().max() <= 1
            if min(mask.any(0).sum(), mask.any(1).sum()) >= 5:  # a strip at the border is mixed with its surroundings
                inside = image[:, rows, columns].mean() * 255
                assert inside == pytest.approx(50 + 50 * int(label), abs=25)
    assert len(sides) > 15


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_size": 0}, "min_size=0 must be from 1 to max_size=100"),
        ({"min_size": 101}, "min_size=101 must be from 1 to max_size=100"),
        ({"multi_scale": (2, 0.5)}, r"multi_scale=\(2, 0.5\) must be factors above 0 that rise"),
        ({"scale_jitter": (0, 2)}, r"scale_jitter=\(0, 2\) must be factors above 0 that rise"),
        ({"multi_scale": (1, 2), "scale_jitter": (1, 2)}, "multi_scale and scale_jitter both draw the size"),
    ],
)
def test_impossible_sizes_are_refused(options, sentence) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        DetectionTransform(**{"min_size": 50, "max_size": 100} | options)


def test_batches_do_not_depend_on_workers_or_random_states(tmp_path: Path) -> None:
    transform = DetectionTransform(32, 48, flip=True, vertical_flip=True, scale_jitter=(0.5, 2.0))
    dataset = CocoDataset(create_data(tmp_path, 6), transform)
    found = []
    for num_workers in (0, 2):
        random.seed(num_workers)
        torch.manual_seed(num_workers)
        loader = TrainingLoader(dataset, 2, seed=3, num_workers=num_workers, merge=merge_pictures)
        found.append([batch for epoch in range(2) for batch in loader.batches(epoch)])
        assert loader.names(0, 0) == [f"{target['image_id'] - 40}.png" for target in found[-1][0][1]]
    assert are_equal(*found)
    assert len(found[0]) == 6
    assert not are_equal(sorted(map(str, found[0][:3])), sorted(map(str, found[0][3:])))


def test_evaluation_gives_each_picture_once_and_an_unreadable_one_is_reported(tmp_path: Path) -> None:
    dataset = CocoDataset(create_data(tmp_path, 5))
    loader = create_loader(dataset, 2, num_workers=2, merge=merge_pictures)
    assert [target["image_id"] for _, targets in loader for target in targets] == [40, 41, 42, 43, 44]
    (tmp_path / "2.png").write_text("text")
    errors: list[ImageError] = []
    loader = create_loader(dataset, 2, on_error=errors.append, merge=merge_pictures)
    assert [target["image_id"] for _, targets in loader for target in targets] == [40, 41, 43, 44]
    assert [str(error) for error in errors] == [
        f"cannot read {tmp_path.name}/2.png: it is no picture of a known format"
    ]


@pytest.mark.parametrize("name", ["coco128", "fruits_nuts"])
def test_real_pictures_are_augmented_with_their_objects(name: str) -> None:
    folder = os.environ.get("FASTERNET_DATA")
    if not folder:
        pytest.skip("FASTERNET_DATA does not name a folder of real pictures")
    data = load_coco(find_coco(Path(folder) / name)[0])
    dataset = CocoDataset(data, DetectionTransform(128, 213, flip=True, scale_jitter=(0.5, 2.0)))
    total = 0
    for index in range(0, len(dataset), max(1, len(dataset) // 12)):
        image, target = dataset[index]
        boxes, masks = target["boxes"], target["masks"]
        total += len(boxes)
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()
        assert masks.shape == (len(boxes), *image.shape[1:])
        for box, mask in zip(boxes, masks, strict=True):
            x0, y0, x1, y1 = box.tolist()
            outside = mask.clone()
            outside[max(int(y0) - 2, 0) : int(y1) + 3, max(int(x0) - 2, 0) : int(x1) + 3] = 0
            assert not outside.any()
    assert total > 50
