import json
import sys
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
import torch
from torch import Tensor

from fasternet.data.coco import CocoData, CocoImage
from fasternet.detection import results as module
from fasternet.detection.layers import paste_masks
from fasternet.detection.results import load_results, save_results, to_results

SIZE = (40, 60)


def encode(mask: Tensor) -> dict:
    """Return what the reference makes of a whole mask."""
    rle = pycocotools.mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def predict(num_objects: int = 6, masks: bool = True) -> dict[str, Tensor]:
    corners = torch.rand(num_objects, 4) * torch.tensor([60, 40, 40, 30]) - torch.tensor([10.0, 10, 0, 0])
    prediction = {
        "boxes": torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:] + 0.5], dim=1),
        "labels": torch.arange(num_objects) % 3 + 1,
        "scores": torch.rand(num_objects),
    }
    return prediction | ({"masks": torch.rand(num_objects, 1, 28, 28)} if masks else {})


def create_data() -> CocoData:
    images = tuple(CocoImage(number, Path(f"{number}.png"), SIZE[1], SIZE[0], ()) for number in (5, 7))
    return CocoData(Path("some.json"), ("a", "b", "c"), (2, 3, 9), images, {}, True)


@pytest.mark.parametrize("strip", [1, 7 * 40, 2**22])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 0.98, 1.0])
def test_masks_are_encoded_as_the_reference_does(density: float, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRIP_PIXELS", strip)
    picture = torch.rand(*SIZE) < density
    prediction = predict(1) | {"masks": picture[None, None].float()}
    assert to_results(prediction, 1, SIZE, (1, 2, 3))[0]["segmentation"] == encode(picture)


@pytest.mark.parametrize("pasted", [None, False])
def test_a_picture_may_have_the_size_of_the_networks_masks(pasted: bool | None) -> None:
    prediction = predict(5)
    whole = paste_masks(prediction["masks"][:, 0], prediction["boxes"], 28, 28)
    results = to_results(prediction, 1, (28, 28), (1, 2, 3), pasted=pasted)
    assert [result["segmentation"] for result in results] == [encode(mask >= 0.5) for mask in whole]
    assert to_results(prediction | {"masks": whole[:, None]}, 1, (28, 28), (1, 2, 3), pasted=True) == results


@pytest.mark.parametrize("strip", [40 * 5, 2**22])
def test_results_are_the_detections_in_the_picture(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRIP_PIXELS", strip)
    prediction = predict(12)
    whole = paste_masks(prediction["masks"][:, 0], prediction["boxes"], *SIZE)
    results = to_results(prediction, 7, SIZE, (2, 3, 9))
    assert len(results) == 12
    for i, result in enumerate(results):
        x, y, width, height = result["bbox"]
        assert [x, y, x + width, y + height] == pytest.approx(prediction["boxes"][i].tolist())
        assert result["score"] == prediction["scores"][i].item()
        assert (result["image_id"], result["category_id"]) == (7, (2, 3, 9)[i % 3])
        assert result["segmentation"] == encode(whole[i] > 0.5)
    assert to_results(prediction | {"masks": whole[:, None]}, 7, SIZE, (2, 3, 9)) == results
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_boxes_alone_and_nothing_at_all_are_results_too() -> None:
    assert all("segmentation" not in result for result in to_results(predict(masks=False), 1, SIZE, (1, 2, 3)))
    assert to_results(predict(0), 1, SIZE, (1,)) == []


def test_half_precision_gives_plain_numbers() -> None:
    prediction = {name: x.bfloat16() if x.is_floating_point() else x for name, x in predict().items()}
    for result in to_results(prediction, 1, SIZE, (1, 2, 3)):
        assert all(isinstance(value, float) for value in (*result["bbox"], result["score"]))
        assert set(result["segmentation"]) == {"size", "counts"}


def test_a_mask_of_a_huge_picture_is_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    size = (13000, 13700)
    areas = []

    def paste(*arguments: object) -> tuple[Tensor, int, int]:
        found = paste_mask(*arguments)
        areas.append(found[0].numel())
        return found

    paste_mask = module.paste_mask
    monkeypatch.setattr(module, "paste_mask", paste)
    prediction = predict(1) | {"boxes": torch.tensor([[2000.0, 100.0, 8000.0, 12000.0]])}
    prediction["masks"] = torch.ones(1, 1, 28, 28)
    rle = to_results(prediction, 1, size, (1, 2, 3))[0]["segmentation"]
    assert pycocotools.mask.area(rle) == pytest.approx(6000 * 11900, rel=1e-3)  # its corners are round
    assert pycocotools.mask.toBbox(rle).tolist() == [2000, 100, 6000, 11900]
    assert max(areas) <= module.STRIP_PIXELS


@pytest.mark.parametrize("name", ["boxes", "scores", "masks"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_detections_that_are_not_finite_are_said(name: str, value: float) -> None:
    prediction = predict()
    prediction[name].view(-1)[3] = value
    with pytest.raises(ValueError, match="not finite"):
        to_results(prediction, 1, SIZE, (1, 2, 3))


@pytest.mark.parametrize(("label", "said"), [(4, "class 4, the data have 3"), (0, "class 0, the data have 3")])
def test_other_classes_are_said(label: int, said: str) -> None:
    prediction = predict()
    prediction["labels"][2] = label
    with pytest.raises(ValueError, match=said):
        to_results(prediction, 1, SIZE, (1, 2, 3))


def test_a_missing_package_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    with pytest.raises(ModuleNotFoundError, match=r"need faster-coco-eval: pip install 'fasternet\[detection\]'"):
        to_results(predict(), 1, SIZE, (1, 2, 3))


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    results = to_results(predict(), 5, SIZE, (2, 3, 9)) + to_results(predict(masks=False), 7, SIZE, (2, 3, 9))
    save_results(tmp_path / "new" / "results.json", results)
    assert load_results(tmp_path / "new" / "results.json", create_data()) == results
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]


def test_results_of_other_programs_are_read(tmp_path: Path) -> None:
    plain = {"size": [*SIZE], "counts": [45, 10, 30, 10, 40 * 60 - 95]}
    rle = pycocotools.mask.frPyObjects(plain, *SIZE)
    entry = {"image_id": 5, "category_id": 9, "score": 1}
    file = tmp_path / "results.json"
    file.write_text(json.dumps([entry | {"segmentation": plain}, entry | {"bbox": [1, 2, 3, 4], "area": 12}]))
    mask, box = load_results(file, create_data())
    assert mask["segmentation"]["counts"] == rle["counts"].decode()
    assert mask["bbox"] == pycocotools.mask.toBbox(rle).tolist()
    assert box == entry | {"bbox": [1, 2, 3, 4]}


GOOD = {"image_id": 5, "category_id": 9, "score": 0.5, "bbox": [1, 2, 3, 4]}
BROKEN = {
    "no JSON": ("[{", "is not JSON"),
    "no text": (b"\xff\xfe\x00", "is not JSON"),
    "no list": ({"annotations": []}, "must be a list of detections, as COCO's results are, got dict"),
    "no object": ([3], "detection 0: must be an object with image_id"),
    "no score": ([GOOD, {"image_id": 5, "category_id": 9, "bbox": [1, 2, 3, 4]}], "detection 1: score is missing"),
    "neither box nor mask": ([{"image_id": 5, "category_id": 9, "score": 1}], "bbox or segmentation is missing"),
    "another picture": ([GOOD | {"image_id": 6}], "image_id 6 is none of the 2 pictures"),
    "a picture's name": ([GOOD | {"image_id": [5]}], r"image_id \[5\] is none"),
    "another class": ([GOOD | {"category_id": 1}], "category_id 1 is none of 2, 3, 9"),
    "NaN": ([GOOD | {"score": float("nan")}], "score must be a finite number, got nan"),
    "score as text": ([GOOD | {"score": "0.5"}], "score must be a finite number, got '0.5'"),
    "three numbers": ([GOOD | {"bbox": [1, 2, 3]}], "bbox must be x, y, width and height"),
    "negative width": ([GOOD | {"bbox": [1, 2, -3, 4]}], "bbox must be x, y, width and height"),
    "infinite box": ([GOOD | {"bbox": [1, 2, float("inf"), 4]}], "bbox must be x, y, width and height"),
    "polygon": ([GOOD | {"segmentation": [[1, 2, 3, 4, 5, 6]]}], "segmentation must be run lengths"),
    "another size": (
        [GOOD | {"segmentation": {"size": [4, 6], "counts": [24]}}],
        r"of size \[4, 6\], its picture of \[40",
    ),
    "too few pixels": ([GOOD | {"segmentation": {"size": [*SIZE], "counts": [24]}}], "must count all 2400 pixels"),
    "negative run": ([GOOD | {"segmentation": {"size": [*SIZE], "counts": [-1, 2401]}}], "must count all 2400 pixels"),
    "damaged string": ([GOOD | {"segmentation": {"size": [*SIZE], "counts": "Rn2:j20f"}}], "cannot be decoded"),
    "empty string": ([GOOD | {"segmentation": {"size": [*SIZE], "counts": ""}}], "must count all 2400 pixels"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_results_file_is_said_in_one_sentence(name: str, tmp_path: Path) -> None:
    content, said = BROKEN[name]
    file = tmp_path / "results.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=said) as caught:
        load_results(file, create_data())
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_results_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no results file"):
        load_results(tmp_path / "none.json", create_data())
