"""The model folder of a detector: ``model.safetensors`` with our own keys, ``config.json`` with all else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

from fasternet.detection.detector import Detector, DetectorConfig, Kind, build_detector
from fasternet.detection.optimize import check_unoptimized
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
from fasternet.models.fasternet import FasterNet
from fasternet.rivals.network import is_fasternet, load_state, resolve_network

OF_CLASSES = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
OF_RECIPE = ("fpn_channels", "box_head_width", "mask_head_channels", "head_norm")  # fields that weights depend on
UNSEEN = ("drop_path_rate", "drop_rate", "head_width", "num_classes")  # options that a backbone's weights do not show


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
        ValueError: It is an optimised one, names or numbers are not as many as the classes, or a fact is no plain data.
        OSError: The disk is full or not writable; what the folder held before stays valid.
    """
    check_unoptimized(model)
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


def load_weights(model: Detector, path: Path, class_names: Sequence[str] | None = None) -> str | None:
    """Start a detector from another one; what tells classes stays fresh where the classes are others.

    Args:
        model: The detector to fill; nothing is written to it unless all fits.
        path: A model or run folder of a detector, or a published file.
        class_names: Of the data, from label 1 on.

    Returns:
        What stays fresh and why, in a sentence; None: nothing does.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: It is a detector of another kind, backbone or width; the message says what would fit.
    """
    loaded = load_detector(path) if path.is_dir() else _load_file(path, model)
    _check_fit(path, loaded.model, model)
    found, wanted, reason = loaded.model.config.num_classes, model.config.num_classes, None
    if found != wanted:
        reason = f"{path} has {found} classes and the data {wanted}"
    elif class_names is not None and loaded.class_names not in (None, tuple(class_names)):
        pairs = zip(cast(Sequence[str], loaded.class_names), class_names, strict=True)
        theirs, ours = next(pair for pair in pairs if pair[0] != pair[1])
        reason = f"{path} has the class {theirs!r} where the data have {ours!r}"
    state = loaded.model.state_dict()
    fresh = OF_CLASSES if reason else ()
    model.load_state_dict({k: tensor for k, tensor in state.items() if not k.startswith(fresh)}, strict=False)
    return f"{reason}: the layers that tell classes start fresh" if reason else None


def is_detector(path: Path) -> bool:
    """Whether weights are those of a whole detector: a model or run folder, or a published file."""
    if path.is_dir():
        return read_config(path)[1].get("architecture") in get_args(Kind)
    return any(key.startswith("roi_head.") for key in convert.read_state(path))


def _load_file(path: Path, model: Detector) -> DetectorCheckpoint:
    """Read a published file as a detector over another one's backbone: a width of its own has no name in the file."""
    from fasternet.detection.mmdet import load_mmdet

    config, body = model.config, model.backbone.body
    if not isinstance(body, FasterNet):
        raise ValueError(f"{path} is a detector over a FasterNet, and the backbone {config.backbone} is to be trained")
    state = convert.read_state(path)
    try:
        variant = convert.identify_variant(state)
    except (ValueError, IndexError):
        variant = config.backbone
    _check_backbone(path, variant, config.backbone)
    embedding = state.get("backbone.patch_embed.proj.weight")
    if embedding is not None and len(embedding) != body.config.width:
        _refuse_options(path, {"width": len(embedding)})
    options = {name: value for name, value in config.backbone_options.items() if name not in (*UNSEEN, "feature_norm")}
    loaded = load_mmdet(path, config.backbone, backbone_options=options)
    return DetectorCheckpoint(model=loaded, class_names=None, category_ids=None)


def _check_fit(path: Path, found: Detector, wanted: Detector) -> None:
    """Refuse weights of a detector that is configured otherwise than the one to train."""
    theirs, ours = found.config, wanted.config
    if theirs.kind != ours.kind:
        remedy = "which the data need masks for" if theirs.kind == "mask_rcnn" else "which is --boxes-only"
        raise ValueError(
            f"{path} is a {theirs.kind}, and a {ours.kind} is to be trained: take kind={theirs.kind}, {remedy}"
        )
    _check_backbone(path, theirs.backbone, ours.backbone)
    options, own = _list_options(found), _list_options(wanted)
    if others := {name: options.get(name) for name in options | own if options.get(name) != own.get(name)}:
        _refuse_options(path, others)
    names = [name for name in OF_RECIPE if name != "mask_head_channels" or theirs.kind == "mask_rcnn"]
    fields = {name: getattr(theirs, name) for name in names if getattr(theirs, name) != getattr(ours, name)}
    norms = [bool(config.backbone_options.get("feature_norm")) for config in (theirs, ours)]
    fields |= {} if norms[0] == norms[1] else {"feature_norm": norms[0]}
    if fields:
        values = [f"{name}={str(value).lower()}" for name, value in fields.items()]
        changes = " ".join(f"--set {value}" for value in values)
        raise ValueError(f"{path} has {', '.join(values)}, and the recipe has not: add {changes}")


def _check_backbone(path: Path, found: str, wanted: str) -> None:
    theirs, ours = (
        name.partition(".")[0] if is_fasternet(name) else resolve_network(name).builder for name in (found, wanted)
    )
    if theirs != ours:
        raise ValueError(f"{path} has the backbone {found}, and {wanted} is to be trained: name {found}")


def _list_options(model: Detector) -> dict[str, Any]:
    """Return what a backbone is built with, as far as weights and function depend on it."""
    body = model.backbone.body
    options = dataclasses.asdict(body.config) if isinstance(body, FasterNet) else dict(model.config.backbone_options)
    return {name: value for name, value in options.items() if name not in UNSEEN}


def _refuse_options(path: Path, options: Mapping[str, Any]) -> NoReturn:
    listed = ", ".join(f"{name}={value}" for name, value in options.items())
    raise ValueError(f"{path} has a backbone with {listed}: give it the same (--width, or backbone_options)")


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
