"""The model folder of a detector: ``model.safetensors`` with our own keys, ``config.json`` with all else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from fasternet.detection.detector import Detector, DetectorConfig, Kind, build_detector
from fasternet.models import convert
from fasternet.models.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    explain_damage,
    list_versions,
    read_class_names,
    read_config,
    read_facts,
    write_model_folder,
)
from fasternet.rivals.network import load_state

OF_CLASSES = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorCheckpoint:
    """A detector with all that is needed to use it.

    Attributes:
        model: The detector; its ``config`` says what it is.
        class_names: From label 1 on; None where nobody named the classes.
        category_ids: The data set's numbers of the classes, from label 1 on; None where there was none.
        facts: What was saved with it: recipe, metrics, versions, license.
    """

    model: Detector
    class_names: tuple[str, ...] | None
    category_ids: tuple[int, ...] | None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def save_detector(
    folder: Path | str,
    model: Detector,
    *,
    class_names: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a detector into a model folder; a file that is there is replaced only by a complete one.

    Args:
        folder: Created where it is absent.
        model: As ``create_detector`` returns it.
        class_names: One name per class, from label 1 on.
        category_ids: One number per class, as results in COCO's format give it.
        facts: Plain data to keep with the model: ``recipe``, ``metrics``, ``license`` (of the weights) ... The versions
            of this package, PyTorch and timm are added.

    Raises:
        ValueError: Names or numbers are not as many as the classes, or a fact is no plain data.
        OSError: The disk is full or not writable; what the folder held before stays valid.
    """
    config = model.config
    for argument, values in (("class_names", class_names), ("category_ids", category_ids)):
        if values is not None and len(values) != config.num_classes:
            raise ValueError(f"{argument} has {len(values)} entries for {config.num_classes} classes")
    own = {"license": None, "versions": list_versions(), **(facts or {}), "config": dataclasses.asdict(config)}
    document = {
        "architecture": config.kind,
        "num_classes": config.num_classes,
        "label_names": None if class_names is None else list(class_names),
        "category_ids": None if category_ids is None else list(category_ids),
        "fasternet": own,
    }
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    write_model_folder(Path(folder), weights, document, card=_write_card(config, own))


def load_detector(path: Path | str) -> DetectorCheckpoint:
    """Build the detector of a model folder, or of a run folder (its ``best``), in evaluation mode.

    Raises:
        FileNotFoundError: There is no model folder.
        ValueError: It holds no detector, or a file in it is truncated or does not fit; the message says what.
    """
    folder, document = read_config(Path(path))
    with explain_damage(folder):
        fields = document.get("fasternet", {}).get("config", {})
        if "kind" not in fields:
            raise ValueError(f"{folder} holds a {document['architecture']}, which is no detector")
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in fields["backbone_options"].items()}
        names, numbers = read_class_names(folder, document, fields["num_classes"]), document["category_ids"]
        if numbers is not None and len(numbers) != fields["num_classes"]:
            raise ValueError(
                f"{folder / CONFIG_FILE} has {len(numbers)} category_ids for {fields['num_classes']} classes"
            )
        try:
            model = build_detector(DetectorConfig(**{**fields, "backbone_options": options}))
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG_FILE} was edited: {error}") from None
    load_state(model, convert.read_state(folder / WEIGHTS_FILE), source=str(folder))
    return DetectorCheckpoint(
        model=model.eval(),
        class_names=names,
        category_ids=None if numbers is None else tuple(numbers),
        facts=read_facts(document),
    )


def load_weights(model: Detector, path: Path) -> list[str]:
    """Start a detector from another one; where the number of classes differs, what tells classes stays fresh.

    Args:
        model: The detector to fill.
        path: A model or run folder of a detector, or a published file.

    Returns:
        The names of what stays fresh.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: It does not fit.
    """
    from fasternet.detection.mmdet import load_mmdet

    state = (load_detector(path).model if path.is_dir() else load_mmdet(path)).state_dict()
    own = model.state_dict()
    fresh = [
        name for name in own if name.startswith(OF_CLASSES) and name in state and state[name].shape != own[name].shape
    ]
    missing = [name for name in own if name not in state]
    wrong = [name for name in own if name in state and name not in fresh and state[name].shape != own[name].shape]
    extra = [name for name in state if name not in own]
    for problem, names in (("missing", missing), ("of another shape", wrong), ("not known", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{path} does not fit the detector: {problem}: {', '.join(names[:3])}{more}")
    model.load_state_dict({name: tensor for name, tensor in state.items() if name not in fresh}, strict=False)
    return fresh


def is_detector(path: Path) -> bool:
    """Whether weights are those of a whole detector: a model or run folder, or a published file."""
    if path.is_dir():
        return read_config(path)[1].get("architecture") in get_args(Kind)
    return any(key.startswith("roi_head.") for key in convert.read_state(path))


def _write_card(config: DetectorConfig, own: Mapping[str, Any]) -> str:
    """Return the model card: what the hub shows of a model, and sorts it by."""
    task = "image-segmentation" if config.kind == "mask_rcnn" else "object-detection"
    head = [f"license: {own['license']}"] if own["license"] else []
    head += ["library_name: fasternet", f"pipeline_tag: {task}", "tags:", f"- {task}", "- fasternet"]
    lines = ["---", *head, "---", f"# {config.kind} over {config.backbone}", ""]
    lines += [
        f"A detector of {config.num_classes} classes for pictures with a shorter side of {config.min_size} pixels."
    ]
    lines += [f"{key} = {value:.4g}" for key, value in own.get("metrics", {}).items() if isinstance(value, int | float)]
    lines += ["", "```sh", "fasternet detect predict picture.jpg --checkpoint FOLDER -o found", "```", ""]
    lines += ["`config.json` holds the names of the classes, the configuration and the recipe of the training."]
    return "\n".join(lines) + "\n"
