"""Converts weight files, and proves it: what was written is read back and compared bitwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast, get_args

import torch

from fasternet.models import convert
from fasternet.models.checkpoint import (
    CONFIG_FILE,
    FasterNetCheckpoint,
    Preprocessing,
    find_obstacle,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from fasternet.models.fasternet import FasterNet
from fasternet.models.registry import create_model

_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


def convert_file(source: Path, target: Path, *, to: str, model: str | None = None, overwrite: bool = False) -> str:
    """Write the weights of ``source`` to ``target`` in another format.

    Args:
        source: A weight file of any format, or a model folder.
        target: A file (safetensors by suffix, else what ``torch.save`` writes), or for ``to="fasternet"`` a folder.
        to: A format of ``convert``.
        model: Variant of ``source``; default: told by its width and depths.
        overwrite: Replace ``target`` where it exists.

    Returns:
        One sentence: what was written.

    Raises:
        ValueError: An argument or the file's content does not fit, or the format cannot say what the model is.
        FileNotFoundError: There is no ``source``.
        FileExistsError: ``target`` exists, and ``overwrite`` is off or would replace a folder by a file.
    """
    if to not in get_args(convert.Format):
        raise ValueError(f"to {to!r} is not one of {', '.join(get_args(convert.Format))}")
    format = cast(convert.Format, to)
    _check_target(target, format, overwrite)
    found = _load(source, model)
    if format == "fasternet":
        save_checkpoint(
            target, found.model, name=found.name, class_names=found.class_names, preprocessing=found.preprocessing
        )
        _check_equal(load_checkpoint(target).model, found.model, target)
        num_tensors = len(found.model.state_dict())
    else:
        num_tensors = _write_file(target, found, format)
    return f"{found.name}: {num_tensors} tensors in {to} format, read back and equal"


def _check_target(target: Path, format: convert.Format, overwrite: bool) -> None:
    folder = format == "fasternet"
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already, and overwrite is off")
    if target.exists() and target.is_dir() != folder:
        raise FileExistsError(f"{target} is a {'file' if folder else 'folder'}, which {format} cannot replace")
    if folder and target.suffix in _FILE_SUFFIXES:
        raise ValueError(f"the format fasternet is a model folder, and {target} is named like a file")


def _write_file(target: Path, found: FasterNetCheckpoint, format: convert.Format) -> int:
    """Write a weight file, which appears once it is read back and equal; return the number of tensors."""
    if obstacle := find_obstacle(found.model.config, found.name):
        raise ValueError(f"the format {format} cannot say that the model has {obstacle}: a model folder can")
    state = convert.to_format(found.model, format)
    options = dataclasses.asdict(found.model.config)
    del options["num_classes"]  # the file says it

    def write(path: Path) -> None:
        convert.write_state(path, state, format)
        _check_equal(_load(path, found.name, **options).model, found.model, target)

    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, write)
    return len(state)


def _check_equal(written: FasterNet, model: FasterNet, target: Path) -> None:
    kept = model.state_dict()
    if not all(torch.equal(tensor, kept[key]) for key, tensor in written.state_dict().items()):
        raise ValueError(f"{target} would not hold what was read")


def _load(path: Path, model: str | None, **options: Any) -> FasterNetCheckpoint:
    """Read a file or a model folder; a file without a head is a backbone."""
    if (path / CONFIG_FILE).is_file() or (path / "best" / CONFIG_FILE).is_file():
        checkpoint = load_checkpoint(path)
        if model not in (None, checkpoint.name):
            raise ValueError(f"{path} holds a {checkpoint.name}, and {model} was asked for")
        return checkpoint
    state = convert.read_state(path)
    name = model or convert.identify_variant(state)
    has_head = any(key.endswith(("classifier.weight", "head.weight", "head.fc.weight")) for key in state)
    has_norms = any(key.removeprefix("backbone.").startswith(("norm0.", "feature_norms.")) for key in state)
    network = create_model(name, checkpoint_path=path, features_only=not has_head, feature_norm=has_norms, **options)
    return FasterNetCheckpoint(name=name, model=network, class_names=None, preprocessing=Preprocessing())
