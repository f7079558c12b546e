"""Weights in and out of every format in use: official, Lightning, mmdet backbone, timm, and our own names.

A format is a naming of the same tensors. ``_MODULES`` lays the names side by side; every conversion is read off it. On
disk, Lightning and mmdet wrap the official names in ``state_dict`` and a prefix.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fasternet.models.fasternet import VARIANTS, FasterNet

Format = Literal["official", "lightning", "mmdet", "timm", "fasternet"]
State = Mapping[str, Tensor]

# Our module, timm's, the official one; i is the stage, j the block. Official stages and mergings share one numbering.
_MODULES = (
    ("embedding.conv", "patch_embed.proj", "patch_embed.proj"),
    ("embedding.norm", "patch_embed.norm", "patch_embed.norm"),
    ("stages.{i}.merging.conv", "stages.{i}.downsample.reduction", "stages.{merging}.reduction"),
    ("stages.{i}.merging.norm", "stages.{i}.downsample.norm", "stages.{merging}.norm"),
    ("stages.{i}.blocks.{j}.pconv", *2 * ("stages.{stage}.blocks.{j}.spatial_mixing.partial_conv3",)),
    ("stages.{i}.blocks.{j}.pwconv1", *2 * ("stages.{stage}.blocks.{j}.mlp.0",)),
    ("stages.{i}.blocks.{j}.norm", *2 * ("stages.{stage}.blocks.{j}.mlp.1",)),
    ("stages.{i}.blocks.{j}.pwconv2", *2 * ("stages.{stage}.blocks.{j}.mlp.3",)),
    ("stages.{i}.blocks.{j}", *2 * ("stages.{stage}.blocks.{j}",)),  # layer_scale is the block's own
    ("feature_norms.{i}", "feature_norms.{i}", "norm{stage}"),
    ("head.pwconv", "conv_head", "avgpool_pre_head.1"),
    ("head.fc", "classifier", "head"),
)


def _compile(ours: str) -> re.Pattern[str]:
    pattern = re.escape(ours).replace(r"\{i\}", r"(?P<i>\d)").replace(r"\{j\}", r"(?P<j>\d+)")
    return re.compile(pattern + r"\.(?P<tensor>[a-z_]+)")


_PATTERNS = tuple((_compile(ours), timm, official) for ours, timm, official in _MODULES)
_PREFIX = {"official": "", "lightning": "model.", "mmdet": "backbone.", "timm": "", "fasternet": ""}


def rename_key(key: str, format: Format) -> str:
    """Return the name that one of our parameters or buffers has in another format, without the format's prefix."""
    if format == "fasternet":
        return key
    for pattern, timm, official in _PATTERNS:
        if match := pattern.fullmatch(key):
            groups = match.groupdict()
            i = int(groups.get("i", 0))
            stage = i if format == "timm" else 2 * i
            template = (timm if format == "timm" else official) + ".{tensor}"
            return template.format(**{**groups, "stage": stage, "merging": 2 * i - 1})
    raise ValueError(f"{key!r} is not a parameter of FasterNet")


def detect_format(keys: Iterable[str]) -> Format:
    """Tell a format by its keys.

    Raises:
        ValueError: The keys are of no known format.
    """
    names = set(keys)
    if "model.patch_embed.proj.weight" in names:
        return "lightning"
    if "backbone.patch_embed.proj.weight" in names:
        return "mmdet"
    if "embedding.conv.weight" in names:
        return "fasternet"
    if "patch_embed.proj.weight" in names:
        return "timm" if any(".downsample." in name for name in names) else "official"
    found = ", ".join(sorted(names)[:3]) or "nothing"
    raise ValueError(f"the keys are of no known FasterNet format: {found} ...")


def identify_variant(state: State) -> str:
    """Name the published variant that a state dict of any format belongs to, by its width and depths.

    Raises:
        ValueError: It is none of them.
    """
    format = detect_format(state)
    width = next(
        tensor.shape[0]
        for key, tensor in state.items()
        if key.endswith(("patch_embed.proj.weight", "embedding.conv.weight"))
    )
    blocks = {match[0] for key in state if (match := re.search(r"stages\.(\d)\.blocks\.(\d+)", key))}
    stages = [int(block.split(".")[1]) for block in blocks]
    step = 1 if format in ("timm", "fasternet") else 2
    depths = tuple(stages.count(step * i) for i in range(4))
    for name, config in VARIANTS.items():
        if (config.width, config.depths) == (width, depths):
            return name
    raise ValueError(f"width {width} and depths {depths} belong to none of {', '.join(VARIANTS)}: name the model")


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file, its own names kept; code in it is never run.

    Args:
        path: ``.safetensors``, or whatever ``torch.save`` wrote (``.pth``, ``.pt``, ``.ckpt``, ``.bin``).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, holds pickled code, or holds no state dict.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory, not a checkpoint file")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(map(_is_entry, content.items())):
        raise ValueError(f"{path} holds no state dict of tensors")
    return {key.removeprefix("module."): tensor for key, tensor in content.items()}


def _is_entry(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def to_format(model: FasterNet, format: Format) -> dict[str, Tensor]:
    """Return a model's tensors under another format's names, contiguous.

    Raises:
        ValueError: The format cannot express the model.
    """
    if format not in get_args(Format):
        raise ValueError(f"format {format!r} is not one of {', '.join(get_args(Format))}")
    if format == "timm" and model.feature_norms:
        raise ValueError("timm's format has no BN on the feature maps (feature_norm)")
    state = model.state_dict()
    if format == "mmdet":
        state = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    return {_PREFIX[format] + rename_key(key, format): tensor.contiguous() for key, tensor in state.items()}


def write_state(path: Path, state: State, format: Format) -> None:
    """Write tensors as a file of a format: safetensors by suffix, else what ``torch.load(weights_only=True)`` reads."""
    content: dict[str, Any] = dict(state)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path, metadata={"format": "pt"})
    elif format in ("lightning", "mmdet"):
        torch.save({"state_dict": content}, path)
    else:
        torch.save(content, path)


def load_state(model: FasterNet, state: State, *, source: str) -> None:
    """Load tensors of any format into a model, strictly.

    Two differences are meant and allowed: a model without a head ignores a classifier's head, and its feature norms
    stay fresh where a file has none. Whole detectors are read for their backbone, Lightning modules for their model.

    Args:
        model: The model to fill; nothing is written to it unless everything fits.
        state: As ``read_state`` returns it.
        source: Where the tensors come from, for messages.

    Raises:
        ValueError: Keys are missing or extra, or shapes differ; the message lists them in the file's names.
    """
    try:
        format = detect_format(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    state = {key: tensor for key, tensor in state.items() if key.startswith(_PREFIX[format])}
    own = model.state_dict()
    wanted = {_PREFIX[format] + rename_key(key, format): key for key in own}
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    if model.head is None:
        head = _head_names(format)
        extra = [name for name in extra if not name.startswith(head)]
        norms = [name for name, key in wanted.items() if key.startswith("feature_norms.")]
        if not any(name in state for name in norms):
            missing = [name for name in missing if name not in norms]
    wrong = [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(own[key].shape)}"
        for name, key in wanted.items()
        if name in state and state[name].shape != own[key].shape
    ]
    problems = [_listing("missing", missing), _listing("not known", extra), _listing("of another shape", wrong)]
    if any(problems):
        raise ValueError(f"{source} ({format} keys) does not fit the model: {'; '.join(filter(None, problems))}")
    model.load_state_dict({key: state[name] for name, key in wanted.items() if name in state}, strict=False)


def _head_names(format: Format) -> tuple[str, ...]:
    if format == "fasternet":
        return ("head.",)
    return tuple(
        _PREFIX[format] + rename_key(f"head.{layer}.weight", format)[: -len("weight")] for layer in ("pwconv", "fc")
    )


def _listing(label: str, names: list[str], limit: int = 6) -> str:
    if not names:
        return ""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{label}: {', '.join(names[:limit])}{more}"


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error})") from None


def _load_pickle(path: Path) -> Any:
    # Lightning keeps hyperparameters in a Namespace, which is a bare container.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle fails in a dozen ways
            if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL:? (\S+)", str(error))):
                raise ValueError(f"{path} is refused: beside tensors it holds {found[1]}, which can run code") from None
            raise ValueError(f"{path} is truncated, or is no checkpoint of plain tensors") from None
