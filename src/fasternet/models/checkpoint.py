"""The folder that a trained model lives in: ``model.safetensors`` with timm's keys, ``config.json`` with all else.

timm and the Hugging Face hub read both files as they are, and the hub shows ``README.md``, a short model card. What
timm's network cannot express (LN, position ...) stands in ``config.json`` under ``fasternet``, beside the facts of the
training: recipe, metrics, versions, licence. ``timm`` there says why timm cannot build the network; ``architecture``
is then a name that timm does not know, so that it builds no other network in silence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from torch import Tensor, nn

from fasternet.models import convert
from fasternet.models.card import CARD_FILE, write_card
from fasternet.models.fasternet import VARIANTS, FasterNet, FasterNetConfig
from fasternet.ops import count_partial_channels

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PART_PREFIX = ".part-"  # of files that are being written

_UNKNOWN_TO_TIMM = "fasternet."  # before the variant, in "architecture"; timm would build another function of it
_OWN_KEYS = ("config", "timm", "name", "source")  # of "fasternet" in config.json; the others there are facts


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
    """A model with all that is needed to use it.

    Attributes:
        name: Its variant, or the name of another network.
        model: A ``FasterNet``, or another classifier that has ``num_classes``.
        class_names: None where nobody named the classes.
        preprocessing: How a picture becomes its input.
        facts: What was saved with it: recipe, metrics, versions, license.
    """

    name: str
    model: nn.Module
    class_names: tuple[str, ...] | None
    preprocessing: Preprocessing
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """How many classes the model tells apart."""
        model = self.model
        return model.config.num_classes if isinstance(model, FasterNet) else int(cast(int, model.num_classes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FasterNetCheckpoint(Checkpoint):
    """A checkpoint that is known to hold a FasterNet; ``name`` is its variant."""

    model: FasterNet


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """The content of a model folder, before a model is built from it."""

    name: str
    config: FasterNetConfig
    weights: Mapping[str, Tensor]
    class_names: tuple[str, ...] | None
    preprocessing: Preprocessing
    facts: Mapping[str, Any]


def save_checkpoint(
    folder: Path | str,
    model: FasterNet,
    *,
    name: str,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a classifier into a model folder; a file that is there is replaced only by a complete one.

    Args:
        folder: Created where it is absent.
        model: A classifier as ``create_model`` returns it.
        name: Its variant, for example ``fasternet_t0``.
        class_names: One name per class.
        preprocessing: Default: the paper's.
        facts: Plain data to keep with the model: ``recipe``, ``metrics``, ``license`` (of the weights, which are
            yours) ... The versions of this package, PyTorch and timm are added.

    Raises:
        ValueError: ``name`` is no variant, the model no classifier, the number of names not that of the classes, or
            a fact no plain data.
        OSError: The disk is full or not writable; what the folder held before stays valid.
    """
    if name not in VARIANTS:
        raise ValueError(f"name {name!r} is not one of {', '.join(VARIANTS)}")
    if model.head is None:
        raise ValueError("a model folder holds a classifier, and this is a backbone (features_only)")
    document = _describe(model.config, name, class_names, preprocessing or Preprocessing(), facts)
    write_model_folder(Path(folder), convert.to_format(model, "timm"), document)


def load_checkpoint(path: Path | str) -> FasterNetCheckpoint:
    """Build the model of a model folder, or of a run folder (its ``best``), in evaluation mode.

    Raises:
        FileNotFoundError: There is no model folder.
        ValueError: A file in it is truncated, or does not fit; the message says what.
    """
    folder = read_model_folder(Path(path))
    model = FasterNet(folder.config)
    convert.load_state(model, folder.weights, source=str(path))
    return FasterNetCheckpoint(
        name=folder.name,
        model=model.eval(),
        class_names=folder.class_names,
        preprocessing=folder.preprocessing,
        facts=folder.facts,
    )


def read_model_folder(path: Path) -> ModelFolder:
    """Read a model folder, or the ``best`` of a run folder; raises what ``load_checkpoint`` raises."""
    path, document = read_config(path)
    if "fasternet" not in document:
        raise ValueError(f"{path / CONFIG_FILE} is of another package: give the weight file beside it")
    if "name" in document["fasternet"]:
        raise ValueError(f"{path} holds a {document['fasternet']['name']}, which is no FasterNet")
    with explain_damage(path):
        config = dict(document["fasternet"]["config"])
        if "kind" in config:
            raise ValueError(f"{path} holds a {config['kind']}, which is a detector: `fasternet detect` reads it")
        config["depths"] = tuple(config["depths"])
        return ModelFolder(
            name=document["architecture"].removeprefix(_UNKNOWN_TO_TIMM),
            config=FasterNetConfig(**config),
            weights=convert.read_state(path / WEIGHTS_FILE),
            class_names=read_class_names(path, document, config["num_classes"]),
            preprocessing=read_preprocessing(document),
            facts=read_facts(document),
        )


def read_config(path: Path) -> tuple[Path, dict[str, Any]]:
    """Find a model folder, which may be the ``best`` of a run folder, and read its ``config.json``.

    Raises:
        FileNotFoundError: There is no model folder.
        ValueError: The file is truncated.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no model folder at {path}")
    if not (path / CONFIG_FILE).is_file() and (path / "best" / CONFIG_FILE).is_file():
        path = path / "best"
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        if not (path / file).is_file():
            raise FileNotFoundError(f"{path} is no model folder: it holds no {file}")
    with explain_damage(path):
        document = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        return path, {**document}  # what is no mapping is damage


@contextlib.contextmanager
def explain_damage(folder: Path) -> Iterator[None]:
    """Turn what comes up while a damaged ``config.json`` is read into one sentence."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is truncated or was edited ({error!r})") from None


def read_class_names(folder: Path, document: Mapping[str, Any], num_classes: int) -> tuple[str, ...] | None:
    """Return the names of the classes, or None; raises ValueError where their number is not that of the classes."""
    names = document.get("label_names")
    if names is not None and len(names) != num_classes:
        raise ValueError(f"{folder / CONFIG_FILE} has {len(names)} label_names for {num_classes} classes")
    return None if names is None else tuple(names)


def read_preprocessing(document: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing that a ``config.json`` states."""
    cfg = document["pretrained_cfg"]
    return Preprocessing(
        input_size=cfg["input_size"][-1],
        crop_ratio=cfg["crop_pct"],
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg["interpolation"],
    )


def read_facts(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a ``config.json`` keeps of the training."""
    return {key: value for key, value in document.get("fasternet", {}).items() if key not in _OWN_KEYS}


def write_model_folder(
    folder: Path, weights: Mapping[str, Tensor], document: Mapping[str, Any], *, card: str | None = None
) -> None:
    """Write the files of a model folder; each is replaced only by a complete one.

    Args:
        folder: Created where it is absent.
        weights: Contiguous tensors.
        document: ``config.json``.
        card: Model card; default: that of a classifier.

    Raises:
        ValueError: The document is no plain data.
        OSError: The disk is full or not writable.
    """
    try:
        config = json.dumps(document, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"facts must be plain data that JSON can hold, without NaN ({error})") from None
    folder.mkdir(parents=True, exist_ok=True)
    content = safetensors.torch.save(dict(weights), metadata={"format": "pt"})
    write_atomically(folder / WEIGHTS_FILE, lambda path: path.write_bytes(content))
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(config, encoding="utf-8"))
    text = write_card(document) if card is None else card
    write_atomically(folder / CARD_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object], *, keep: Path | None = None) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk, and put it in ``path``'s place.

    Args:
        path: What to write.
        write: Takes the temporary file.
        keep: Where the file that was at ``path`` goes; None: it is replaced.

    Raises:
        OSError: Whatever ``write`` raised; the temporary file is gone, and ``path`` is what it was.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{PART_PREFIX}{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what ``write_atomically`` left in a folder and below when it was killed; nobody may be writing there."""
    for part in folder.rglob(f"{PART_PREFIX}*"):
        part.unlink(missing_ok=True)


def _describe(
    config: FasterNetConfig,
    name: str,
    class_names: Sequence[str] | None,
    preprocessing: Preprocessing,
    facts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    obstacle = find_obstacle(config, name)
    return describe_model(
        architecture=_UNKNOWN_TO_TIMM + name if obstacle else name,
        num_classes=config.num_classes,
        num_features=config.stage_channels[-1],
        class_names=class_names,
        model_args={
            "embed_dim": config.width,
            "depths": list(config.depths),
            "n_div": round(1 / config.partial_ratio),
            "mlp_ratio": config.mlp_ratio,
            "feature_dim": config.head_width,
            "in_chans": config.in_chans,
            "layer_scale_init_value": config.layer_scale or 0.0,
        },
        timm_cfg={
            "input_size": [config.in_chans, preprocessing.input_size, preprocessing.input_size],
            "first_conv": "patch_embed.proj",
            "classifier": "classifier",
        },
        preprocessing=preprocessing,
        own={
            "config": dataclasses.asdict(config),
            "timm": f"cannot build it: it knows no {obstacle}" if obstacle else "builds it",
        },
        facts=facts,
    )


def describe_model(
    *,
    architecture: str,
    num_classes: int,
    num_features: int,
    class_names: Sequence[str] | None,
    model_args: Mapping[str, Any],
    timm_cfg: Mapping[str, Any],
    preprocessing: Preprocessing,
    own: Mapping[str, Any],
    facts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return ``config.json`` in the form that timm and the hub read.

    Args:
        architecture: timm's name of the network, or one that timm does not know.
        num_classes: Classes of its head.
        num_features: Channels of its last feature map.
        class_names: One name per class, or None.
        model_args: What timm builds it with.
        timm_cfg: What timm's ``pretrained_cfg`` says beside classes and preprocessing.
        preprocessing: How a picture becomes its input.
        own: What this package needs to build it.
        facts: See ``save_checkpoint``.

    Raises:
        ValueError: ``class_names`` are not as many as the classes.
    """
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"class_names has {len(class_names)} names for {num_classes} classes")
    facts = {"license": None, "versions": list_versions(), **(facts or {})}
    return {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": num_features,
        "label_names": None if class_names is None else list(class_names),
        "model_args": dict(model_args),
        "pretrained_cfg": {
            "crop_pct": preprocessing.crop_ratio,
            "interpolation": preprocessing.interpolation,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": num_classes,
            **({"license": facts["license"]} if facts["license"] else {}),
            **timm_cfg,
        },
        "fasternet": {**facts, **own},
    }


def list_versions() -> dict[str, str]:
    """Return the versions of the packages that a model was made with."""
    return {name: importlib.metadata.version(name) for name in ("fasternet", "torch", "torchvision", "timm")}


def find_obstacle(config: FasterNetConfig, name: str) -> str | None:
    """Return what of a configuration other packages' FasterNets cannot compute and weights do not show, or None."""
    divisor = round(1 / config.partial_ratio)
    if any(c // divisor != count_partial_channels(c, config.partial_ratio) for c in config.stage_channels):
        return f"partial_ratio {config.partial_ratio}"
    for field in ("norm", "position", "kernel_size", "activation"):
        if (value := getattr(config, field)) != getattr(VARIANTS[name], field):
            return f"{field} {value!r} in {name}"
    return None
