import contextlib
import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pycocotools.coco
import pycocotools.cocoeval
import pytest
import torch
from PIL import Image
from torch import Tensor

from fasternet.data.coco import CocoData, CocoImage, Instance, decode_mask, load_coco, to_document
from fasternet.detection.detector import create_faster_rcnn, create_mask_rcnn
from fasternet.detection.evaluate import DetectionEvaluation, check_finite, evaluate_detector, score_results
from fasternet.detection.results import to_results

FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
NUM_IMAGES = 7
HEIGHT, WIDTH = 60, 90


def create_instance(number: int, label: int, box: tuple[float, ...], *, crowd: bool = False) -> Instance:
    x0, y0, x1, y1 = box
    polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
    return Instance(number, label, (x0, y0, x1, y1), [polygon], crowd, (x1 - x0) * (y1 - y0))


def create_data(folder: Path, *, files: bool = True) -> CocoData:
    """Draw pictures of rectangles of two classes, small and medium; there is a third class, and an empty picture."""
    images = []
    for number in range(NUM_IMAGES):
        boxes = [(3.0, 4.0 + number, 20.0, 30.0), (30.0, 5.0, 80.0, 50.0 - number), (5.0, 40.0, 22.0, 58.0)]
        found = tuple(create_instance(3 * number + i, i % 2, box) for i, box in enumerate(boxes) if number != 4)
        path = folder / f"{number}.png"
        images.append(CocoImage(10 * number + 3, path, WIDTH, HEIGHT, found))
        if files:
            # The number of the picture, which the stand-ins for a network read, is its colour.
            Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(path)
    return CocoData(folder / "some.json", ("a", "b", "c"), (9, 4, 7), tuple(images), {}, True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoData:
    return create_data(tmp_path_factory.mktemp("pictures"))


def copy_truth(image: CocoImage) -> dict[str, Tensor]:
    """Return the objects of a picture as a network would have found them."""
    found = [instance for instance in image.instances if not instance.crowd]
    size = image.height, image.width
    masks = [decode_mask(instance.segmentation, *size) for instance in found]
    return {
        "boxes": torch.tensor([instance.box for instance in found]).reshape(-1, 4),
        "labels": torch.tensor([instance.label + 1 for instance in found], dtype=torch.long),
        "scores": torch.linspace(0.9, 0.5, len(found)),
        "masks": torch.stack(masks)[:, None].float() if masks else torch.zeros(0, 1, *size),
    }


def predict_from(data: CocoData, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda found: found):
    """Return a stand-in for a network, which knows a picture by its colour."""

    def predict(images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [change(copy_truth(data.images[round(float(image[0, 0, 0]) * 255)])) for image in images]

    return predict


def shift(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move everything by two pixels; what was good becomes middling."""
    return found | {"boxes": found["boxes"] + 2, "masks": found["masks"].roll((2, 2), (2, 3))}


def results_of(data: CocoData, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda found: found) -> list:
    return [
        result
        for image in data.images
        for result in to_results(change(copy_truth(image)), image.id, (image.height, image.width), data.category_ids)
    ]


def test_a_perfect_prediction_has_an_ap_of_exactly_one(data: CocoData) -> None:
    found = evaluate_detector(predict_from(data), data, masks=True)
    for figures in (found.box, found.mask):
        assert figures == dict.fromkeys(FIGURES, 1.0) | {"ap_large": None}
    assert found.per_class == (
        {"class_name": "a", "num_objects": 12, "box_ap": 1.0, "mask_ap": 1.0},
        {"class_name": "b", "num_objects": 6, "box_ap": 1.0, "mask_ap": 1.0},
        {"class_name": "c", "num_objects": 0, "box_ap": None, "mask_ap": None},
    )
    assert len(found.results) == 18


def test_an_empty_prediction_has_an_ap_of_exactly_zero(data: CocoData) -> None:
    def predict(images: list[Tensor]) -> list[dict[str, Tensor]]:
        empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
        return [empty | {"masks": torch.zeros(0, 1, 28, 28)} for _ in images]

    found = evaluate_detector(predict, data, masks=True)
    assert found.box == found.mask == dict.fromkeys(FIGURES, 0.0) | {"ap_large": None}
    assert [row["box_ap"] for row in found.per_class] == [0.0, 0.0, None]
    assert found.results == []


def test_values_are_flat_and_survive_json(data: CocoData) -> None:
    values = score_results(data, results_of(data, shift), masks=True).values()
    assert set(values) == {
        "num_images", "per_class", *(f"{shape}_{name}" for shape in ("box", "mask") for name in FIGURES)
    }  # fmt: skip
    assert 0 < values["box_ap"] < 1
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    boxes = score_results(data, results_of(data, shift), masks=False).values()
    assert boxes["box_ap"] == values["box_ap"]
    assert not [name for name in boxes if name.startswith("mask")]
    assert set(boxes["per_class"][0]) == {"class_name", "num_objects", "box_ap"}


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong(data: CocoData) -> None:
    image = data.images[0]
    several = [(60.0, 52.0, 66.0, 58.0), (68.0, 51.0, 74.0, 57.0)]
    crowd = create_instance(100, 0, (55.0, 51.0, 85.0, 59.0), crowd=True)
    extra = {
        "boxes": torch.tensor(several),
        "labels": torch.tensor([1, 1]),
        "scores": torch.tensor([0.99, 0.98]),
        "masks": torch.stack([decode_mask(create_instance(0, 0, box).segmentation, 60, 90) for box in several])[
            :, None
        ],
    }
    results = results_of(data) + to_results(extra, image.id, (HEIGHT, WIDTH), data.category_ids)
    crowded = dataclasses.replace(image, instances=(*image.instances, crowd))
    found = score_results(dataclasses.replace(data, images=(crowded, *data.images[1:])), results, masks=True)
    assert found.box["ap"] == found.mask["ap"] == 1
    assert found.per_class[0]["num_objects"] == 12
    punished = score_results(data, results, masks=True)
    assert punished.box["ap"] < 1
    assert punished.mask["ap"] < 1


def test_nothing_to_score_is_said(data: CocoData, tmp_path: Path) -> None:
    empty = dataclasses.replace(data, images=(data.images[4],))
    only = dataclasses.replace(data.images[4], instances=(create_instance(1, 0, (1.0, 1.0, 5.0, 5.0), crowd=True),))
    for none in (empty, dataclasses.replace(data, images=(only,))):
        with pytest.raises(ValueError, match=r"some\.json has no objects in its 1 pictures: there is nothing to score"):
            score_results(none, [], masks=False)
        with pytest.raises(ValueError, match="has no objects"):
            evaluate_detector(predict_from(data), none, masks=False)
    with pytest.raises(ValueError, match=r"masks cannot be scored: .*some\.json has boxes alone"):
        evaluate_detector(predict_from(data), dataclasses.replace(data, has_masks=False), masks=True)
    results = [results_of(data)[0], {"image_id": 3, "category_id": 9, "score": 1.0, "bbox": [1, 2, 3, 4]}]
    with pytest.raises(ValueError, match="masks cannot be scored: detection 1 has none"):
        score_results(data, results, masks=True)


def test_a_broken_network_is_said_in_one_sentence(data: CocoData) -> None:
    def spoil(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return found | {"scores": found["scores"] / 0 - found["scores"] / 0}

    with pytest.raises(ValueError, match="detections are not finite: the weights of the network are damaged"):
        evaluate_detector(predict_from(data, spoil), data, masks=False)
    with pytest.raises(ValueError, match="the detector has a class 4, the data have 3"):
        evaluate_detector(predict_from(data, lambda found: found | {"labels": found["labels"] + 2}), data, masks=False)


def test_weights_that_are_not_finite_are_said(data: CocoData) -> None:
    small = {"width": 8, "depths": (1, 1, 1, 1)}
    detector = create_faster_rcnn("fasternet_t0", num_classes=3, fpn_channels=8, backbone_options=small).eval()
    check_finite(detector)
    for tensor in (detector.roi_heads.box_predictor.cls_score.weight, next(detector.buffers())):
        before = tensor.detach().clone()
        tensor.data.view(-1)[1] = float("nan")
        with pytest.raises(ValueError, match="the weights of the network are not finite"):
            evaluate_detector(detector, data, masks=False)
        with pytest.raises(ValueError, match=r"^the weights of some\.pth are not finite"):
            check_finite(detector, "some.pth")
        tensor.data.copy_(before)


def test_a_picture_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    data = create_data(tmp_path)
    data.images[2].path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2\.png"):
        evaluate_detector(predict_from(data), data, masks=False)


def test_evaluation_is_silent(data: CocoData, capfd: pytest.CaptureFixture[str]) -> None:
    score_results(data, results_of(data, shift), masks=True)
    assert capfd.readouterr() == ("", "")


def test_progress_is_shown_by_the_batch(data: CocoData) -> None:
    seen = []

    def track(iterable, total: int | None, description: str) -> Iterator:
        for item in iterable:
            yield item
            seen.append((total, description))

    evaluate_detector(predict_from(data), data, masks=False, batch_size=3, track=track)
    assert seen == [(3, "evaluating")] * 3


def test_batches_and_workers_change_nothing(data: CocoData) -> None:
    expected = score_results(data, results_of(data, shift), masks=True)
    for batch_size, num_workers in ((1, 0), (3, 0), (2, 1)):
        found = evaluate_detector(
            predict_from(data, shift), data, masks=True, batch_size=batch_size, num_workers=num_workers
        )
        assert found == expected


@pytest.mark.parametrize("kind", ["mask_rcnn", "faster_rcnn"])
def test_a_detector_is_evaluated_whether_or_not_its_masks_are_laid_into_the_picture(kind: str, data: CocoData) -> None:
    create = create_mask_rcnn if kind == "mask_rcnn" else create_faster_rcnn
    small = {"width": 8, "depths": (1, 1, 1, 1)}
    detector = create(
        "fasternet_t0", num_classes=3, min_size=64, max_size=128, fpn_channels=8, box_head_width=16,
        mask_head_channels=8, score_threshold=0.0, detections_per_image=10, backbone_options=small,
    ).eval()  # fmt: skip
    masks = kind == "mask_rcnn"
    whole = evaluate_detector(detector, data, masks=masks)
    detector.transform.full_masks = False
    parts = evaluate_detector(detector, data, masks=masks)
    assert len(whole.results) == 10 * NUM_IMAGES
    assert whole.box == parts.box
    for one, other in zip(whole.results, parts.results, strict=True):
        assert ("segmentation" in one) == masks
        assert {**one, "segmentation": None} == {**other, "segmentation": None}
    assert whole == parts


SHARE = """
import json, sys
from pathlib import Path
from test_evaluate import create_data, predict_from, shift
from fasternet.detection.evaluate import evaluate_detector
from fasternet.train.distributed import join_world

def spoil(found):
    return found | {"labels": found["labels"] + 2 * (found["boxes"][:, 1:2] == 9).any()}

with join_world() as world:
    data = create_data(Path(sys.argv[1]), files=False)
    found = evaluate_detector(predict_from(data, shift), data, masks=True, batch_size=2, world=world)
    try:
        evaluate_detector(predict_from(data, spoil), data, masks=False, world=world)
    except ValueError as error:
        said = str(error)
    Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps([found.values(), found.results, said]))
"""


@pytest.mark.multiprocess
def test_processes_share_the_pictures_out_and_agree_exactly(tmp_path: Path) -> None:
    data = create_data(tmp_path)
    script = tmp_path / "share.py"
    script.write_text(SHARE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([*command, script, tmp_path], check=True, timeout=120, capture_output=True, env=environment)
    alone = evaluate_detector(predict_from(data, shift), data, masks=True)
    # Picture 5, of the second process, has the spoilt object: both say so.
    expected = [alone.values(), alone.results, "the detector has a class 4, the data have 3"]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def perturb(image: CocoImage, draw: torch.Generator) -> dict[str, Tensor]:
    """Shift, scale, miss, double and mistake objects; find some in crowds; every second mask as a network makes it."""
    rows = []
    for instance in image.instances:
        for _ in range(1 + int(torch.randint(4, (), generator=draw) == 0) + 3 * instance.crowd):
            if float(torch.rand((), generator=draw)) < 0.15:
                continue
            x0, y0, x1, y1 = instance.box
            sides = torch.tensor([x1 - x0, y1 - y0])
            strength = 0.3 * torch.rand((), generator=draw) ** 2
            moved = torch.randn(2, 2, generator=draw) * sides * strength
            corners = torch.tensor([[x0, y0], [x1, y1]]) + moved
            mask = decode_mask(instance.segmentation, image.height, image.width).float()
            mask = mask.roll([int(step) for step in moved[0].flip(0)], (0, 1))
            label = instance.label
            if float(torch.rand((), generator=draw)) < 0.1:
                label = int(torch.randint(80, (), generator=draw))
            box = torch.cat([corners.amin(0), corners.amax(0) + 0.5])
            rows.append((box, label + 1, torch.rand((), generator=draw), mask))
    if not rows:
        return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    boxes, labels, scores, masks = zip(*rows, strict=True)
    prediction = {"boxes": torch.stack(boxes), "labels": torch.tensor(labels), "scores": torch.stack(scores)}
    small = torch.rand(len(rows), 1, 28, 28, generator=draw) + 0.4
    return prediction | {"masks": small if image.id % 2 else torch.stack(masks)[:, None]}


def score_by_reference(document: dict, results: list[dict], kind: str) -> tuple[list[float], list[float]]:
    """Return pycocotools' first six figures, and the AP of each category in ascending order; -1 is none."""
    left_out = "segmentation" if kind == "bbox" else "bbox"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = pycocotools.coco.COCO()
        truth.dataset = json.loads(json.dumps(document))
        truth.createIndex()
        detections = truth.loadRes([{k: v for k, v in result.items() if k != left_out} for result in results])
        scorer = pycocotools.cocoeval.COCOeval(truth, detections, kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    found = [scorer.eval["precision"][:, :, i, 0, -1] for i in range(len(scorer.params.catIds))]
    return scorer.stats[:6].tolist(), [values[values > -1].mean() if (values > -1).any() else -1 for values in found]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_figures_are_those_of_pycocotools(seed: int) -> None:
    folder = os.environ.get("FASTERNET_DATA")
    if folder is None:
        pytest.skip("FASTERNET_DATA does not name a folder of real pictures")
    data = load_coco(Path(folder) / "coco128" / "annotations" / "instances_train2017.json")
    assert sum(instance.crowd for image in data.images for instance in image.instances) == 10
    draw = torch.Generator().manual_seed(seed)
    results = [
        result
        for image in data.images
        for result in to_results(perturb(image, draw), image.id, (image.height, image.width), data.category_ids)
    ]
    found = score_results(data, results, masks=True)
    for kind, figures, name in (("bbox", found.box, "box_ap"), ("segm", found.mask, "mask_ap")):
        expected, by_class = score_by_reference(to_document(data), results, kind)
        assert [*figures.values()] == pytest.approx(expected, abs=1e-6)
        assert all(0.02 < value < 0.98 for value in expected), expected
        ordered = [row for _, row in sorted(zip(data.category_ids, found.per_class, strict=True))]
        assert [-1 if row[name] is None else row[name] for row in ordered] == pytest.approx(by_class, abs=1e-6)
    assert sum(row["box_ap"] is None for row in found.per_class) == 80 - 71
    assert all(math.isfinite(result["score"]) for result in found.results)
    assert isinstance(found, DetectionEvaluation)
