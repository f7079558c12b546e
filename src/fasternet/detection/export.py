"""A whole detector in one ONNX file, from a picture of any size to boxes, and the same face on ONNX Runtime.

The file holds resizing, normalisation, padding, network and post-processing. It is traced, by the older of PyTorch's
exporters: the newer one would need the number of proposals, on which torchvision's suppression of overlaps branches.
Resizing is two matrix products, one for each side, exactly as PyTorch resizes: ONNX Runtime's own antialiased resizing
differs by up to 5 % of the range.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasternet.deploy.cpu_engine import check_threads
from fasternet.deploy.runtime import prepare_network
from fasternet.detection.detector import MASK_SIZE, Detector, DetectorConfig, PyramidBackbone
from fasternet.detection.optimize import fold_norms
from fasternet.detection.transform import DetectorTransform
from fasternet.models.checkpoint import write_atomically

OPSET = 17
LIMITS = {"boxes": 1e-2, "scores": 1e-4, "masks": 1e-3}  # pixels, and probabilities
MIN_DETECTIONS = 5  # that a comparison should have; with fewer another is made below the threshold
_CANDIDATES = (20, 200)  # ranks, by score, of those that the threshold of the other comparison may lie between
_KEY = "fasternet"  # of the file's metadata


@dataclasses.dataclass(frozen=True, eq=False)
class OnnxDetector:
    """A detector from an ONNX file, on ONNX Runtime; ``load_onnx`` makes it.

    Attributes:
        config: What it is.
        class_names: By label, from label 1 on; None where the file has none.
        category_ids: The annotations' numbers of the same classes; None where the file has none.
        full_masks: Masks are those of the whole picture, (K, 1, H, W); else (K, 1, 28, 28), those in the boxes.
        fingerprint: A hash of the file.
    """

    config: DetectorConfig
    class_names: tuple[str, ...] | None
    category_ids: tuple[int, ...] | None
    full_masks: bool
    fingerprint: str
    _session: Any = dataclasses.field(repr=False)

    def __call__(self, images: Sequence[Tensor], *, score_threshold: float | None = None) -> list[dict[str, Tensor]]:
        """Detect objects, as a ``Detector`` in evaluation mode does, one picture after the other.

        Args:
            images: Pictures (3, H, W), float32 from 0 to 1, on the CPU; of any sizes.
            score_threshold: Detections below it are dropped; None takes the file's.

        Returns:
            Of each picture ``boxes``, ``labels``, ``scores`` and, with masks, ``masks``.

        Raises:
            ValueError: A picture does not fit.
        """
        names = [output.name for output in self._session.get_outputs()]
        threshold = {} if score_threshold is None else {"score_threshold": torch.tensor(score_threshold).numpy()}
        found = []
        for image in images:
            if image.dim() != 3 or image.shape[0] != 3 or (image.dtype, image.device.type) != (torch.float32, "cpu"):
                raise ValueError(
                    f"images must be float32 (3, H, W) on the CPU, got {image.dtype} {tuple(image.shape)} "
                    f"on {image.device}"
                )
            outputs = self._session.run(None, {"image": image.detach().numpy(), **threshold})
            found.append({name: torch.from_numpy(array) for name, array in zip(names, outputs, strict=True)})
        return found


def export_onnx(
    detector: Detector,
    path: Path | str,
    *,
    class_names: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
    full_masks: bool = False,
    example: Tensor | None = None,
    opset: int = OPSET,
) -> dict[str, float]:
    """Write a detector into one ONNX file, and compare the file in ONNX Runtime with it before the file gets its name.

    The input is ``image`` (3, H, W), float32 from 0 to 1, of any size; a second one, ``score_threshold``, has the
    detector's as its default. The outputs are ``boxes`` (n, 4), ``labels`` (n,) from 1 on, ``scores`` (n,) and, with
    masks, ``masks`` (n, 1, 28, 28), probabilities in the box.

    Args:
        detector: It is not modified.
        path: The file; one that exists is replaced.
        class_names: One for each class, from label 1 on; the file keeps them.
        category_ids: The annotations' numbers of the classes; the file keeps them.
        full_masks: Masks (n, 1, H, W) of the whole picture instead: simple to use, but large.
        example: A picture (3, H, W) to compare with, in its size and two thirds of it; None draws smooth noise.
        opset: Of ONNX, from 16, which aligns regions as the detector does, to 20.

    Returns:
        How far the file was from the detector, over two sizes: the number of detections compared (``num_detections``)
        and the largest difference of ``boxes`` in pixels, ``scores`` and ``masks``.

    Raises:
        ValueError: An argument does not fit, or the file does not compute what the detector does.
        FileNotFoundError: There is no such folder.
        ModuleNotFoundError: ONNX or ONNX Runtime is missing.
    """
    _require("onnx", "onnxruntime")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} for the ONNX file")
    if path.is_dir():
        raise ValueError(f"{path} is a directory: name a file in it")
    if not 16 <= opset <= 20:
        raise ValueError(f"opset={opset} must be from 16 to 20")
    config = detector.config
    for name, values in (("class_names", class_names), ("category_ids", category_ids)):
        if values is not None and len(values) != config.num_classes:
            raise ValueError(f"{name} has {len(values)} entries for {config.num_classes} classes")
    metadata = {
        "config": dataclasses.asdict(config) | {"backbone_options": dict(config.backbone_options)},
        "class_names": class_names and list(class_names),
        "category_ids": category_ids and list(category_ids),
        "full_masks": full_masks,
    }
    pictures = _draw_pictures(config) if example is None else _vary(example)
    reference = copy.deepcopy(detector).to("cpu", torch.float32).eval()
    reference.transform.full_masks = full_masks
    differences: dict[str, float] = {}

    def write(part: Path) -> None:
        _write(reference, part, pictures[0], opset, json.dumps(metadata))
        differences.update(_verify(load_onnx(part), reference, pictures))

    write_atomically(path, write)
    return differences


def load_onnx(path: Path | str, *, threads: int | None = None) -> OnnxDetector:
    """Load what ``export_onnx`` wrote.

    Args:
        path: The file.
        threads: That ONNX Runtime uses; None takes PyTorch's.

    Returns:
        A callable with a detector's face: a list of pictures to a list of dictionaries.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not such a file.
        ModuleNotFoundError: ONNX Runtime is missing.
    """
    _require("onnxruntime")
    import onnxruntime

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no ONNX file at {path}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else check_threads(threads)
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        content = json.loads(session.get_modelmeta().custom_metadata_map[_KEY])
        config = DetectorConfig(**content["config"])
        names, numbers = (content[key] and tuple(content[key]) for key in ("class_names", "category_ids"))
        full_masks = bool(content["full_masks"])
    except Exception as error:  # ONNX Runtime has many, of one base
        text = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no detector of detect export ({type(error).__name__}: {text})") from None
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    return OnnxDetector(config, names, numbers, full_masks, fingerprint, session)


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"a detector in ONNX needs {', '.join(missing)}: pip install 'fasternet[onnxruntime]'"
        )


class _TracedTransform(DetectorTransform):
    """Resizes by operations on tensors alone, so that a trace holds for every size."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Bring a picture (3, H, W) to its size."""
        from torch.onnx import operators

        sides = operators.shape_as_tensor(image)[1:].double()
        scale = torch.minimum(self.min_size[-1] / sides.min(), self.max_size / sides.max())
        fitted = (sides * scale + 0.5).floor().clamp(min=1)
        rows, columns = (_weigh(sides[i], fitted[i], antialias=self.antialias) for i in (0, 1))
        return rows @ image @ columns.T, target  # (h, H) (3, H, W) (W, w)


def _weigh(size: Tensor, fitted: Tensor, *, antialias: bool) -> Tensor:
    """Return the weights (fitted, size) of the pixels of one side in those of the resized side."""
    scale = size / fitted
    centres, pixels = (torch.arange(cast(int, n.long()), dtype=torch.float64) + 0.5 for n in (fitted, size))
    centres = centres * scale
    if not antialias:
        centres = torch.minimum(centres.clamp(min=0.5), size - 0.5)
    reach = scale.clamp(min=1) if antialias else torch.ones_like(scale)
    weights = (1 - ((pixels - centres[:, None]) / reach).abs()).clamp(min=0)
    total: Tensor = weights.sum(dim=1, keepdim=True)
    return (weights / total).float()


class _Traced(nn.Module):
    """A detector that maps tensors to tensors, as an ONNX file does."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor, score_threshold: Tensor) -> tuple[Tensor, ...]:
        self.detector.roi_heads.score_thresh = score_threshold
        return tuple(self.detector([image])[0].values())


def _write(reference: Detector, file: Path, picture: Tensor, opset: int, metadata: str) -> None:
    """Trace a detector into a file, and put the default of the threshold and what describes it into the file."""
    import onnx

    detector = copy.deepcopy(reference).requires_grad_(False)
    backbone = cast(PyramidBackbone, detector.backbone)
    fold_norms(detector)
    backbone.body, _ = prepare_network(backbone.body, torch.zeros(1, 3, 64, 64), "onnxruntime")
    detector.transform.__class__ = _TracedTransform
    outputs = ["boxes", "labels", "scores", *(["masks"] if detector.config.kind == "mask_rcnn" else [])]
    axes: dict[str, dict[int, str]] = {"image": {1: "height", 2: "width"}} | {name: {0: "n"} for name in outputs}
    if "masks" in outputs and detector.transform.full_masks:
        axes["masks"] |= {2: "height", 3: "width"}
    threshold = torch.tensor(reference.config.score_threshold)
    with _explain_failure(), torch.no_grad():
        torch.onnx.export(
            _Traced(detector),
            (picture, threshold),
            str(file),
            dynamo=False,
            opset_version=opset,
            input_names=["image", "score_threshold"],
            output_names=outputs,
            dynamic_axes=axes,
        )
    model = onnx.load(file)
    model.graph.initializer.append(onnx.numpy_helper.from_array(threshold.numpy(), "score_threshold"))
    onnx.helper.set_model_props(model, {_KEY: metadata})
    onnx.save(model, file)


@contextlib.contextmanager
def _explain_failure() -> Iterator[None]:
    """Keep the exporter from talking, and turn what fails into one sentence."""
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise ValueError(f"this detector cannot be exported to ONNX: {type(error).__name__}: {text}") from error


def _draw_pictures(config: DetectorConfig) -> list[Tensor]:
    """Return two pictures of smooth noise: one that is enlarged, and an upright one that shrinks."""
    random = torch.Generator().manual_seed(0)
    short = config.min_size
    sizes = ((max(short * 3 // 4, 1), short), (short * 3 // 2, short * 5 // 4))
    coarse = [torch.rand(1, 3, 9, 9, generator=random) for _ in sizes]
    return [F.interpolate(x, size, mode="bicubic")[0].clamp(0, 1) for x, size in zip(coarse, sizes, strict=True)]


def _vary(example: Tensor) -> list[Tensor]:
    """Return a picture in its size and in two thirds of it, turned upright or lying."""
    if example.dim() != 3 or example.shape[0] != 3 or example.dtype != torch.float32:
        raise ValueError(f"example must be float32 (3, H, W), got {example.dtype} {tuple(example.shape)}")
    example = example.detach().cpu()
    return [example, F.interpolate(example[None], scale_factor=2 / 3, mode="bilinear")[0].transpose(1, 2).contiguous()]


@torch.no_grad()
def _verify(loaded: OnnxDetector, reference: Detector, pictures: Sequence[Tensor]) -> dict[str, float]:
    """Compare a file with the detector on pictures, below its threshold too where there is too little to compare."""
    names = [name for name in LIMITS if name != "masks" or reference.roi_heads.has_mask()]
    worst = {"num_detections": 0.0} | dict.fromkeys(names, 0.0)
    for picture in pictures:
        for choose in (lambda *_: reference.config.score_threshold, _find_threshold):
            reference.roi_heads.score_thresh = threshold = choose(reference, picture)
            expected = reference([picture])[0]
            found = loaded([picture], score_threshold=threshold)[0]
            _compare(found, expected, worst, f"on a picture of {picture.shape[1]} x {picture.shape[2]} pixels")
            if len(expected["scores"]) >= MIN_DETECTIONS:
                break
    return worst


def _find_threshold(reference: Detector, picture: Tensor) -> float:
    """Return a threshold that some tens of candidates exceed, where scores lie apart: rounding moves none across it."""
    logits: list[Tensor] = []
    hook = reference.roi_heads.box_predictor.register_forward_hook(lambda *args: logits.append(args[2][0]))
    reference.roi_heads.score_thresh = 1.0
    reference([picture])
    hook.remove()
    scores = logits[0].softmax(1)[:, 1:].flatten().sort(descending=True).values[slice(*_CANDIDATES)]
    if len(scores) < 2:
        return 0.0
    gap = int((scores[:-1] - scores[1:]).argmax())
    return float(scores[gap : gap + 2].mean())


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], worst: dict[str, float], where: str) -> None:
    """Add the differences of one picture to the worst so far, or raise; detections of one score may change places."""
    n, wanted = len(found["scores"]), len(expected["scores"])
    if n != wanted:
        raise ValueError(f"the exported detector is wrong: it finds {n} objects {where} instead of {wanted}")
    if not n:
        return
    apart = (found["boxes"][:, None] - expected["boxes"]).abs().amax(2)  # (found, expected)
    apart += (found["scores"][:, None] - expected["scores"]).abs()
    apart += torch.where(found["labels"][:, None] == expected["labels"], 0.0, torch.inf)
    order = apart.argmin(0)
    if len(set(order.tolist())) != n:
        raise ValueError(f"the exported detector is wrong: it finds other objects {where}")
    worst["num_detections"] += n
    moved = (found["boxes"][order] - expected["boxes"]).abs().amax(1)  # (n,)
    for name in [name for name in LIMITS if name in worst]:
        apart = (found[name][order] - expected[name]).abs().flatten(1 if name == "masks" else 0)
        if name == "masks" and expected[name].shape[-2:] != (2 * MASK_SIZE, 2 * MASK_SIZE):
            sides = expected["boxes"][:, 2:] - expected["boxes"][:, :2]
            apart = apart - (moved * 2 * MASK_SIZE / sides.amin(1))[:, None]  # a mask in the picture moves with its box
        difference = float(apart.max().clamp(min=0))
        if not difference <= LIMITS[name]:
            raise ValueError(f"the exported detector is wrong: {name} differ by {difference:.1e} {where}")
        worst[name] = max(worst[name], difference)
