"""Finds the objects in pictures of any size: picture files in, boxes, classes, scores and masks out.

Shapes: K detections of a picture, (H, W) its size in pixels, (m, m) a mask as the network makes it, (h, w) the part of
a picture that a mask covers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast, overload

import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection.transform import resize_boxes
from torchvision.transforms.functional import to_tensor

from fasternet.data.boxes import fit_size
from fasternet.data.images import ImageError, find_images, load_image
from fasternet.detection.detector import Detector
from fasternet.detection.layers import paste_mask
from fasternet.detection.results import MASK_THRESHOLD

if TYPE_CHECKING:
    from fasternet.detection.export import OnnxDetector

# Larger pictures (as floats, 200 MB and more) are shrunk as they are, in bytes, before the network's own resizing.
LARGE_PIXELS = 2**24


@dataclasses.dataclass(frozen=True)
class Detection:
    """An object in a picture.

    Attributes:
        label: Number of its class, from 0.
        class_name: Name of its class.
        score: From 0 to 1.
        box: x0, y0, x1, y1 in pixels of the picture.
        mask: (h, w), booleans: the part of the picture outside of which the object is not; None: boxes alone.
        offset: First row and column of that part.
    """

    label: int
    class_name: str
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = None
    offset: tuple[int, int] = (0, 0)


class Detections(Sequence[Detection]):
    """What was found in a picture, the strongest first; a mask is made whenever its detection is asked for.

    So it takes a few kilobytes, where a hundred masks of a large picture would take gigabytes.

    Args:
        found: ``boxes`` (K, 4) in pixels of the picture, ``labels`` (K,) from 1 on, ``scores`` (K,) and perhaps
            ``masks`` (K, 1, m, m), not laid into the picture: what ``results.to_results`` takes.
        size: Height and width of the picture.
        class_names: Names from label 1 on.
    """

    def __init__(self, found: Mapping[str, Tensor], size: tuple[int, int], class_names: Sequence[str]) -> None:
        self.found = found
        self.size = size
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.found["scores"])

    @overload
    def __getitem__(self, index: int) -> Detection: ...

    @overload
    def __getitem__(self, index: slice) -> Detections: ...

    def __getitem__(self, index: int | slice) -> Detection | Detections:
        if isinstance(index, slice):
            part = {name: value[index] for name, value in self.found.items()}
            return Detections(part, self.size, self.class_names)
        label = int(self.found["labels"][index]) - 1
        box = self.found["boxes"][index]
        x0, y0, x1, y1 = box.tolist()
        mask, top, left = None, 0, 0
        if "masks" in self.found:
            pasted, top, left = paste_mask(self.found["masks"][index, 0], box, *self.size)
            mask = pasted >= MASK_THRESHOLD
        score = float(self.found["scores"][index])
        return Detection(label, self.class_names[label], score, (x0, y0, x1, y1), mask, (top, left))

    def resize(self, height: int, width: int) -> Detections:
        """Return the same of the picture in another size."""
        found = {**self.found, "boxes": resize_boxes(self.found["boxes"], self.size, (height, width))}
        return Detections(found, (height, width), self.class_names)


@dataclasses.dataclass(frozen=True)
class DetectionPrediction:
    """What was found in a picture file.

    Attributes:
        path: The file.
        size: Height and width of the picture, upright.
        detections: The strongest first.
    """

    path: Path
    size: tuple[int, int]
    detections: Detections


@dataclasses.dataclass(frozen=True)
class DetectionPredictor:
    """Finds objects; ``DetectionPredictor.from_detector`` makes one of a detector.

    Attributes:
        predict: From a list of pictures (3, H, W), floats from 0 to 1 on the CPU, to a list of what a ``Detector``
            returns, with masks that are not laid into the picture.
        class_names: Names from label 1 on.
        category_ids: COCO's numbers of the classes.
        min_size: What ``predict`` makes of the shorter side of a picture.
        max_size: What it makes of the longer side at most.
        antialias: It averages where it shrinks.
        fingerprint: By which a resumed run knows the detector: a hash of its weights, or of an ONNX file.
    """

    predict: Callable[[list[Tensor]], list[dict[str, Tensor]]]
    class_names: Sequence[str]
    category_ids: Sequence[int]
    min_size: int
    max_size: int
    antialias: bool = True
    fingerprint: str = ""

    @classmethod
    def from_detector(
        cls,
        detector: Detector | OnnxDetector,
        class_names: Sequence[str] | None = None,
        category_ids: Sequence[int] | None = None,
    ) -> DetectionPredictor:
        """Make a predictor of a detector, which is not modified.

        Args:
            detector: In evaluation mode, on any device; an optimised one, or one from an ONNX file, too.
            class_names: Names from label 1 on; None: those of the ONNX file, else ``class 1`` and so on.
            category_ids: COCO's numbers of the classes; None: those of the ONNX file, else 1 and so on.

        Raises:
            ValueError: The detector is in training mode or lays its masks into the picture, or there are more or fewer
                names than classes.
        """
        config = detector.config
        labels = range(1, config.num_classes + 1)
        predict: Callable[[list[Tensor]], list[dict[str, Tensor]]]
        if isinstance(detector, Detector):
            if detector.training:
                raise ValueError("the detector is in training mode: call eval() first")
            predict, fingerprint = functools.partial(_predict, detector), _hash_state(detector)
        else:
            if detector.full_masks:
                raise ValueError("the ONNX file lays masks into the picture: export it with full_masks=False")
            predict, fingerprint = detector, detector.fingerprint
            class_names, category_ids = class_names or detector.class_names, category_ids or detector.category_ids
        names = tuple(class_names or (f"class {label}" for label in labels))
        numbers = tuple(category_ids or labels)
        for name, values in (("class_names", names), ("category_ids", numbers)):
            if len(values) != len(labels):
                raise ValueError(f"{name} has {len(values)} entries, and the detector {len(labels)} classes")
        return cls(predict, names, numbers, config.min_size, config.max_size, config.antialias, fingerprint)

    def __call__(
        self,
        images: Iterable[Path | str],
        *,
        score_threshold: float = 0.5,
        on_error: Callable[[ImageError], object] | None = None,
    ) -> list[DetectionPrediction]:
        """Find objects in picture files, and in the pictures in and below folders; see ``stream``.

        Raises:
            FileNotFoundError: A folder holds no picture.
        """
        return list(self.stream(find_images(map(Path, images)), score_threshold=score_threshold, on_error=on_error))

    def stream(
        self,
        paths: Iterable[Path],
        *,
        score_threshold: float = 0.5,
        on_error: Callable[[ImageError], object] | None = None,
    ) -> Iterator[DetectionPrediction]:
        """Yield what is in picture files as they come, one picture in memory at a time.

        Args:
            paths: Files.
            score_threshold: Weaker detections are left out; so are those below the detector's own threshold.
            on_error: Called with the error of each picture that cannot be read, which is then left out. None: the
                first such picture raises its error.

        Raises:
            ImageError: A picture cannot be read, and there is no ``on_error``.
            ValueError: ``score_threshold`` is not from 0 to 1.
        """
        for path in paths:
            try:
                image = load_image(path)
            except ImageError as error:
                if on_error is None:
                    raise
                on_error(error)
                continue
            found = self.predict_image(image, score_threshold=score_threshold)
            del image  # before the next one is read: each may take gigabytes
            yield DetectionPrediction(path, found.size, found)

    @torch.inference_mode()
    def predict_image(self, image: Image.Image, *, score_threshold: float = 0.5) -> Detections:
        """Find objects in a picture of mode ``RGB``, as ``load_image`` returns it, of up to 179 megapixels.

        Raises:
            ValueError: ``score_threshold`` is not from 0 to 1, or not all is finite that the detector returns.
        """
        check_threshold(score_threshold)
        size = image.height, image.width
        seen = self._shrink(image) if image.width * image.height > LARGE_PIXELS else image
        found = self.predict([to_tensor(seen)])[0]
        if not all(value.isfinite().all() for value in found.values()):
            raise ValueError("the detections are not finite: the detector's weights are damaged or did not converge")
        chosen = found["scores"] >= score_threshold
        found = {name: value[chosen].cpu() for name, value in found.items()}
        if seen is not image:
            found["boxes"] = resize_boxes(found["boxes"], (seen.height, seen.width), size)
        return Detections(found, size, self.class_names)

    def _shrink(self, image: Image.Image) -> Image.Image:
        """Bring a picture to the size that the network sees, as the network would, but in bytes."""
        height, width = fit_size(image.height, image.width, self.min_size, self.max_size)
        if self.antialias:
            return image.resize((width, height), Image.Resampling.BILINEAR)
        steps = (image.width / width, 0, 0, 0, image.height / height, 0)
        return image.transform((width, height), Image.Transform.AFFINE, steps, Image.Resampling.BILINEAR)


def check_threshold(score_threshold: float) -> None:
    """Check a threshold.

    Raises:
        ValueError: It is not from 0 to 1.
    """
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold={score_threshold} must be from 0 to 1")


def _predict(detector: Detector, images: list[Tensor]) -> list[dict[str, Tensor]]:
    """Run a detector where it is, and have its masks not laid into the picture."""
    device = next(detector.parameters()).device
    with detector.transform.keep_masks_small():
        return cast(list[dict[str, Tensor]], detector([image.to(device) for image in images]))


def _hash_state(detector: Detector) -> str:
    digest = hashlib.sha256(repr(detector.config).encode())
    for name, value in detector.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
