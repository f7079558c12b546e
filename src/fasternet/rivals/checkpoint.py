"""Any network in a model folder: FasterNet as ``fasternet.models`` writes it, others as timm reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasternet.models import convert
from fasternet.models.checkpoint import (
    WEIGHTS_FILE,
    Checkpoint,
    Preprocessing,
    describe_model,
    explain_damage,
    load_checkpoint,
    read_class_names,
    read_config,
    read_facts,
    read_preprocessing,
    save_checkpoint,
    write_model_folder,
)
from fasternet.models.fasternet import FasterNet
from fasternet.rivals.network import build_network, load_state, name_classifiers, resolve_network
from fasternet.rivals.registry import Rival

_TIMM_CFG = ("first_conv", "classifier", "fixed_input_size")


def save_network(
    folder: Path | str,
    model: nn.Module,
    *,
    name: str,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a classifier into a model folder; a file that is there is replaced only by a complete one.

    Args:
        folder: Created where it is absent.
        model: As ``create_network`` returns it.
        name: Its name there.
        class_names: One name per class.
        preprocessing: Default: the paper's.
        facts: See ``save_checkpoint``.

    Raises:
        ValueError: The name is not known, or the number of class names is not that of the classes.
        OSError: The disk is full or not writable; what the folder held before stays valid.
    """
    if isinstance(model, FasterNet):
        save_checkpoint(folder, model, name=name, class_names=class_names, preprocessing=preprocessing, facts=facts)
        return
    rival, preprocessing = resolve_network(name), preprocessing or Preprocessing()
    timm_cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    size = preprocessing.input_size
    document = describe_model(
        architecture=rival.builder.partition(".")[0],
        num_classes=int(model.num_classes),  # type: ignore[arg-type]
        num_features=int(getattr(model, "num_features", 0)),
        class_names=class_names,
        model_args=getattr(model, "build_options", {}),
        timm_cfg={
            "input_size": [len(preprocessing.mean), size, size],
            **{key: timm_cfg[key] for key in _TIMM_CFG if timm_cfg.get(key)},
        },
        preprocessing=preprocessing,
        own={
            "name": rival.name,
            "timm": _tell_timm(rival, model),
        },
        facts=facts,
    )
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    write_model_folder(Path(folder), weights, document)


def _tell_timm(rival: Rival, model: nn.Module) -> str:
    """Say whether timm can build a network from its folder."""
    if "surgery" in getattr(model, "build_options", {}):
        return "cannot build it: PConv took the place of convolutions"
    return "builds it" if rival.source == "timm" else f"cannot build it: it is of {rival.source}"


def load_network(path: Path | str) -> Checkpoint:
    """Build the network of a model folder, or of a run folder (its ``best``), in evaluation mode.

    Args:
        path: A folder that ``save_network``, ``save_checkpoint`` or timm wrote.

    Raises:
        FileNotFoundError: There is no model folder.
        ValueError: A file in it is truncated, or does not fit; the message says what.
    """
    folder, document = read_config(Path(path))
    own = document.get("fasternet", {})
    if "config" in own:
        return load_checkpoint(folder)
    with explain_damage(folder):
        rival = resolve_network(own.get("name", document["architecture"]))
        names = read_class_names(folder, document, document["num_classes"])
        options = {key: value for key, value in document.get("model_args", {}).items() if key != "num_classes"}
        preprocessing = read_preprocessing(document)
    model = build_network(rival, document["num_classes"], options)
    load_state(model, convert.read_state(folder / WEIGHTS_FILE), source=str(folder))
    return Checkpoint(
        name=rival.name,
        model=model.eval(),
        class_names=names,
        preprocessing=preprocessing,
        facts=read_facts(document),
    )


def load_rival(name: str, path: Path | None = None) -> Checkpoint:
    """Build a network that is no FasterNet with its published weights, or those of a file, in evaluation mode.

    Args:
        name: As in ``list_rivals``, or timm's name.
        path: A weights file with the network's own keys; None downloads the published weights once.

    Returns:
        The network, with the preprocessing of the published weights.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The name is not known, or the file does not fit.
        ConnectionError: The published weights cannot be downloaded.
    """
    rival = resolve_network(name)
    if path is None:
        model = build_network(rival, _count_published_classes(rival), {}, pretrained=True)
    else:
        state = convert.read_state(path)
        with torch.device("meta"):
            head = f"{name_classifiers(build_network(rival, 1000, {}))[0]}.weight"
        if head not in state:
            raise ValueError(f"{path} does not fit the network: missing: {head}")
        model = build_network(rival, len(state[head]), {})
        load_state(model, state, source=str(path))
    return Checkpoint(
        name=rival.name, model=model.eval(), class_names=None, preprocessing=_find_preprocessing(rival, model)
    )


def _count_published_classes(rival: Rival) -> int:
    """Return the classes of published weights; any other number would get a random classifier."""
    if rival.source != "timm":
        return 1000
    import timm

    num_classes = int(timm.get_pretrained_cfg(rival.builder).num_classes)
    if not num_classes:
        raise ValueError(f"the published weights of {rival.name} have no classifier")
    return num_classes


def _find_preprocessing(rival: Rival, model: nn.Module) -> Preprocessing:
    """Return how the library that keeps a network evaluates it."""
    if rival.source == "timm":
        return read_preprocessing({"pretrained_cfg": model.pretrained_cfg})
    if rival.source == "fasternet":
        return Preprocessing()
    import torchvision

    transform = torchvision.models.get_model_weights(rival.builder).DEFAULT.transforms()
    return Preprocessing(
        input_size=transform.crop_size[0],
        crop_ratio=transform.crop_size[0] / transform.resize_size[0],
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=transform.interpolation.value,
    )
