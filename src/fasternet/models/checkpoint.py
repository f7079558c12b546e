"""The folder that a trained model lives in: ``model.safetensors`` with timm's keys, ``config.json`` with all else.

timm and the Hugging Face hub read both files as they are. What timm's network cannot express (LN, position ...) stands
in ``config.json`` under ``fasternet``, and ``timm`` there says why timm cannot build it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fasternet.models import convert
from fasternet.models.fasternet import VARIANTS, FasterNet, FasterNetConfig
from fasternet.ops import count_partial_channels

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes a model's input; the defaults are the paper's evaluation (Table 6).

    Attributes:
        input_size: Height and width of the centre crop.
        crop_ratio: Crop divided by the resized shorter side: 0.9 resizes to 248 for 224.
        mean: Subtracted, per channel, from values in [0, 1].
        std: Divided by, per channel.
        interpolation: Of the resize.
    """

    input_size: int = 224
    crop_ratio: float = 0.9
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model with all that is needed to use it; ``class_names`` is None where nobody named the classes."""

    name: str
    model: FasterNet
    class_names: tuple[str, ...] | None
    preprocessing: Preprocessing


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """The content of a model folder, before a model is built from it."""

    name: str
    config: FasterNetConfig
    weights: Mapping[str, Tensor]
    class_names: tuple[str, ...] | None
    preprocessing: Preprocessing


def save_checkpoint(
    folder: Path | str,
    model: FasterNet,
    *,
    name: str,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Write a classifier into a model folder; a file that is there is replaced only by a complete one.

    Args:
        folder: Created where it is absent.
        model: A classifier as ``create_model`` returns it.
        name: Its variant, for example ``fasternet_t0``.
        class_names: One name per class.
        preprocessing: Default: the paper's.

    Raises:
        ValueError: ``name`` is no variant, the model no classifier, or the number of names not that of the classes.
        OSError: The disk is full or not writable; what the folder held before stays valid.
    """
    if name not in VARIANTS:
        raise ValueError(f"name {name!r} is not one of {', '.join(VARIANTS)}")
    if model.head is None:
        raise ValueError("a model folder holds a classifier, and this is a backbone (features_only)")
    if class_names is not None and len(class_names) != model.config.num_classes:
        raise ValueError(f"class_names has {len(class_names)} names for {model.config.num_classes} classes")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    document = _describe(model.config, name, class_names, preprocessing or Preprocessing())
    weights = safetensors.torch.save(convert.to_format(model, "timm"), metadata={"format": "pt"})
    write_atomically(folder / WEIGHTS_FILE, lambda path: path.write_bytes(weights))
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(json.dumps(document, indent=2) + "\n"))


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Build the model of a model folder, or of a run folder (its ``best``), in evaluation mode.

    Raises:
        FileNotFoundError: There is no model folder.
        ValueError: A file in it is truncated, or does not fit; the message says what.
    """
    folder = read_model_folder(Path(path))
    model = FasterNet(folder.config)
    convert.load_state(model, folder.weights, source=str(path))
    return Checkpoint(
        name=folder.name, model=model.eval(), class_names=folder.class_names, preprocessing=folder.preprocessing
    )


def read_model_folder(path: Path) -> ModelFolder:
    """Read a model folder, or the ``best`` of a run folder; raises what ``load_checkpoint`` raises."""
    if not path.is_dir():
        raise FileNotFoundError(f"no model folder at {path}")
    if not (path / CONFIG_FILE).is_file() and (path / "best" / CONFIG_FILE).is_file():
        path = path / "best"
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        if not (path / file).is_file():
            raise FileNotFoundError(f"{path} is no model folder: it holds no {file}")
    try:
        document = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        if "fasternet" not in document:
            raise ValueError(f"{path / CONFIG_FILE} is of another package: give the weight file beside it")
        config = dict(document["fasternet"]["config"])
        config["depths"] = tuple(config["depths"])
        cfg, names = document["pretrained_cfg"], document.get("label_names")
        if names is not None and len(names) != config["num_classes"]:
            raise ValueError(f"{path / CONFIG_FILE} has {len(names)} label_names for {config['num_classes']} classes")
        return ModelFolder(
            name=document["architecture"],
            config=FasterNetConfig(**config),
            weights=convert.read_state(path / WEIGHTS_FILE),
            class_names=None if names is None else tuple(names),
            preprocessing=Preprocessing(
                input_size=cfg["input_size"][-1],
                crop_ratio=cfg["crop_pct"],
                mean=tuple(cfg["mean"]),
                std=tuple(cfg["std"]),
                interpolation=cfg["interpolation"],
            ),
        )
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / CONFIG_FILE} is truncated or was edited ({error!r})") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk, and put it in ``path``'s place.

    Raises:
        OSError: Whatever ``write`` raised; the temporary file is gone, and ``path`` is what it was.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _describe(
    config: FasterNetConfig, name: str, class_names: Sequence[str] | None, preprocessing: Preprocessing
) -> dict[str, Any]:
    """Return ``config.json`` in the form that timm and the hub read."""
    size = preprocessing.input_size
    obstacle = find_obstacle(config, name)
    return {
        "architecture": name,
        "num_classes": config.num_classes,
        "num_features": config.stage_channels[-1],
        "label_names": None if class_names is None else list(class_names),
        "model_args": {
            "embed_dim": config.width,
            "depths": list(config.depths),
            "n_div": round(1 / config.partial_ratio),
            "mlp_ratio": config.mlp_ratio,
            "feature_dim": config.head_width,
            "in_chans": config.in_chans,
            "layer_scale_init_value": config.layer_scale or 0.0,
        },
        "pretrained_cfg": {
            "input_size": [config.in_chans, size, size],
            "pool_size": [size // 32, size // 32],
            "crop_pct": preprocessing.crop_ratio,
            "interpolation": preprocessing.interpolation,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": config.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "classifier",
        },
        "fasternet": {
            "config": dataclasses.asdict(config),
            "timm": f"cannot build it: it knows no {obstacle}" if obstacle else "builds it",
        },
    }


def find_obstacle(config: FasterNetConfig, name: str) -> str | None:
    """Return what of a configuration other packages' FasterNets cannot compute and weights do not show, or None."""
    divisor = round(1 / config.partial_ratio)
    if any(c // divisor != count_partial_channels(c, config.partial_ratio) for c in config.stage_channels):
        return f"partial_ratio {config.partial_ratio}"
    for field in ("norm", "position", "kernel_size", "activation"):
        if (value := getattr(config, field)) != getattr(VARIANTS[name], field):
            return f"{field} {value!r} in {name}"
    return None
