"""Evaluation of any detector as COCO does it: average precision of its boxes and masks, all in all and by class."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasternet.data.coco import CocoData, to_document
from fasternet.data.coco_dataset import CocoDataset, merge_pictures
from fasternet.data.coco_objects import import_masks
from fasternet.data.loaders import create_loader
from fasternet.detection.results import to_results
from fasternet.timing import Track, silent
from fasternet.train.distributed import World, gather
from fasternet.train.loop import NotFiniteError

ALONE = World()
DIGITS = 12  # COCO adds 2e-16 to each denominator: a perfect detector has an AP of 1, and not a little less


@dataclasses.dataclass(frozen=True)
class DetectionEvaluation:
    """What a detector found.

    Attributes:
        num_images: Pictures evaluated.
        box: Average precision of the boxes, from 0 to 1: ``ap`` (over overlaps of 0.5 to 0.95), ``ap50``, ``ap75``, and
            ``ap_small``, ``ap_medium``, ``ap_large`` by the area of the object in the picture as it came (limits at
            32^2 and 96^2 pixels). None where there is no object of that size.
        mask: The same of the masks; None where they were not asked for.
        per_class: ``class_name``, ``num_objects`` (crowds are not counted), ``box_ap`` and, with masks, ``mask_ap`` of
            each class; None for a class without objects.
        results: The detections in COCO's format.
    """

    num_images: int
    box: Mapping[str, float | None]
    mask: Mapping[str, float | None] | None
    per_class: tuple[dict[str, Any], ...]
    results: list[dict[str, Any]]

    def values(self) -> dict[str, Any]:
        """Return the figures as plain data, the detections left out: ``box_ap`` ... and, with masks, ``mask_ap`` ..."""
        return {
            "num_images": self.num_images,
            **{f"box_{name}": value for name, value in self.box.items()},
            **{f"mask_{name}": value for name, value in (self.mask or {}).items()},
            "per_class": [dict(row) for row in self.per_class],
        }


@torch.inference_mode()
def evaluate_detector(
    predict: Callable[[list[Tensor]], list[dict[str, Tensor]]],
    data: CocoData,
    *,
    masks: bool,
    batch_size: int = 1,
    num_workers: int = 0,
    world: World = ALONE,
    track: Track = silent,
) -> DetectionEvaluation:
    """Compare what a detector finds in all pictures with what is annotated.

    Args:
        predict: From pictures (3, H, W), floats from 0 to 1 on the CPU, to what a ``Detector`` returns, on any device;
            a module has to be in evaluation mode; see ``check_finite`` for what is none. Masks that are not laid into
            the picture cost the least memory.
        data: Pictures and objects.
        masks: Score masks too.
        batch_size: Pictures that ``predict`` takes at a time; a detector pads them to the largest, which may move the
            AP a little.
        num_workers: Processes that load pictures; 0 loads in this one.
        world: The processes that share the pictures out.
        track: Shows progress.

    Returns:
        The same in every process, each picture counted once, the detections in the order of the data.

    Raises:
        ValueError: There is nothing to score, a picture cannot be read, the detector has other classes, or its outputs
            are not finite.
        ModuleNotFoundError: faster-coco-eval is not installed.
    """
    _check_objects(data, masks=masks)
    if isinstance(predict, nn.Module):
        check_finite(predict)
    loader = create_loader(
        CocoDataset(data, masks=False),
        batch_size,
        num_workers=num_workers,
        rank=world.rank,
        world_size=world.size,
        merge=merge_pictures,
    )
    sizes = {image.id: (image.height, image.width) for image in data.images}
    own: dict[int, list[dict[str, Any]]] = {}
    problem: ValueError | None = None
    try:
        for images, targets in track(loader, len(loader), "evaluating"):
            for prediction, target in zip(predict(images), targets, strict=True):
                image_id = int(target["image_id"])
                wanted = {name: value for name, value in prediction.items() if masks or name != "masks"}
                own[image_id] = to_results(wanted, image_id, sizes[image_id], data.category_ids)
    except ValueError as error:
        problem = error
    # Raised after gathering, so that every process says so instead of waiting for one that failed.
    shares = gather(world, (own, problem))
    for _, found in shares:
        if found is not None:
            raise found
    by_image = {image_id: results for share, _ in shares for image_id, results in share.items()}
    results = [result for image in data.images for result in by_image[image.id]]
    return score_results(data, results, masks=masks)


def check_finite(model: nn.Module, name: object = "the network") -> None:
    """Refuse a network whose weights or statistics of BN are not finite.

    It would find nothing, and that in silence: torchvision drops what is not a number.

    Args:
        model: The network.
        name: What the message calls it.

    Raises:
        NotFiniteError: They are not.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        raise NotFiniteError(f"the weights of {name} are not finite: they are damaged or training diverged")


def score_results(data: CocoData, results: Sequence[Mapping[str, Any]], *, masks: bool) -> DetectionEvaluation:
    """Score detections as COCO does: the hundred best of each picture, crowds neither required nor punished.

    Args:
        data: Pictures and objects.
        results: Detections in these pictures, as ``to_results`` and ``load_results`` return them; none is allowed.
        masks: Score masks too.

    Raises:
        ValueError: The data have no objects or no masks, or a detection has no mask.
        ModuleNotFoundError: faster-coco-eval is not installed.
    """
    _check_objects(data, masks=masks)
    for number, result in enumerate(results):
        if masks and "segmentation" not in result:
            raise ValueError(f"masks cannot be scored: detection {number} has none (segmentation)")
    document = to_document(data)
    box, box_by_class = _score(document, results, "bbox")
    mask, mask_by_class = _score(document, results, "segmentation") if masks else (None, {})
    totals = Counter(found.label for image in data.images for found in image.instances if not found.crowd)
    rows = []
    for label, (name, category) in enumerate(zip(data.class_names, data.category_ids, strict=True)):
        row = {"class_name": name, "num_objects": totals[label], "box_ap": box_by_class[category]}
        rows.append(row | ({"mask_ap": mask_by_class[category]} if masks else {}))
    return DetectionEvaluation(len(data.images), box, mask, tuple(rows), [dict(result) for result in results])


def _check_objects(data: CocoData, *, masks: bool) -> None:
    if not any(not found.crowd for image in data.images for found in image.instances):
        raise ValueError(f"{data.source} has no objects in its {len(data.images)} pictures: there is nothing to score")
    if masks and not data.has_masks:
        raise ValueError(f"masks cannot be scored: {data.source} has boxes alone")


def _score(
    document: dict[str, Any], results: Sequence[Mapping[str, Any]], shape: str
) -> tuple[dict[str, float | None], dict[int, float | None]]:
    """Return the six figures, and the AP of each category, of boxes (``bbox``) or masks (``segmentation``)."""
    import_masks()
    from faster_coco_eval.core.coco import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    truth = COCO(document)
    # One shape alone: beside a box, COCO would take the area of a mask from the box.
    fields = ("image_id", "category_id", "score", shape)
    detections = truth.loadRes([{name: result[name] for name in fields} for result in results])
    scorer = COCOeval_faster(truth, detections, "bbox" if shape == "bbox" else "segm")
    scorer.evaluate()
    scorer.accumulate()
    # (overlaps, recalls, categories, sizes), of the hundred best; -1 where there is no object
    precision = torch.from_numpy(scorer.eval["precision"])[..., -1]
    figures = {
        "ap": _average(precision[..., 0]),
        "ap50": _average(precision[0, ..., 0]),
        "ap75": _average(precision[5, ..., 0]),
        "ap_small": _average(precision[..., 1]),
        "ap_medium": _average(precision[..., 2]),
        "ap_large": _average(precision[..., 3]),
    }
    by_category = {int(category): _average(precision[:, :, i, 0]) for i, category in enumerate(scorer.params.catIds)}
    return figures, by_category


def _average(precision: Tensor) -> float | None:
    found = precision[precision > -1]
    return round(float(found.mean()), DIGITS) if len(found) else None
