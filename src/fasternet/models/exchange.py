"""Converts weight files, and proves it: what was written is read back and compared bitwise."""

from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

import torch

from fasternet.models import convert
from fasternet.models.checkpoint import CONFIG_FILE, load_checkpoint, save_checkpoint
from fasternet.models.fasternet import FasterNet
from fasternet.models.registry import create_model


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
        ValueError: An argument or the file's content does not fit.
        FileNotFoundError: There is no ``source``.
        FileExistsError: ``target`` exists, and ``overwrite`` is off.
    """
    if to not in get_args(convert.Format):
        raise ValueError(f"to {to!r} is not one of {', '.join(get_args(convert.Format))}")
    if target.exists() and (not overwrite or target.is_dir() != (to == "fasternet")):
        raise FileExistsError(f"{target} exists already")
    format = cast(convert.Format, to)
    name, network = _load(source, model)
    if format == "fasternet":
        if network.head is None:
            raise ValueError("a model folder holds a classifier, and this is a backbone")
        save_checkpoint(target, network, name=name)
        written = load_checkpoint(target).model
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        convert.write_state(target, convert.to_format(network, format), format)
        _, written = _load(target, name)
    kept = written.state_dict()
    expected = {key: tensor for key, tensor in network.state_dict().items() if key in kept}
    if not all(torch.equal(tensor, kept[key]) for key, tensor in expected.items()):
        raise ValueError(f"{target} does not hold what {source} held")
    return f"{name}: {len(expected)} tensors in {to} format, read back and equal"


def _load(path: Path, model: str | None) -> tuple[str, FasterNet]:
    """Return the variant's name and the network of a file or a model folder; an mmdet file is a backbone."""
    if (path / CONFIG_FILE).is_file() or (path / "best" / CONFIG_FILE).is_file():
        checkpoint = load_checkpoint(path)
        return checkpoint.name, checkpoint.model
    state = convert.read_state(path)
    name = model or convert.identify_variant(state)
    has_head = any(key.endswith(("classifier.weight", "head.weight", "head.fc.weight")) for key in state)
    has_norms = any(key.removeprefix("backbone.").startswith(("norm0.", "feature_norms.")) for key in state)
    return name, create_model(name, checkpoint_path=path, features_only=not has_head, feature_norm=has_norms)
