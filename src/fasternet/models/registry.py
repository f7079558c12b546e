"""Creates networks by name, those of Table 5 too, and knows the published weights as facts (Tables 3 and 6)."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from torch import Tensor

from fasternet.models import convert, download
from fasternet.models.checkpoint import read_model_folder
from fasternet.models.fasternet import TABLE5, VARIANTS, FasterNet, FasterNetConfig

Source = Literal["timm", "official"]

_RELEASE = "https://github.com/JierunChen/FasterNet/releases/download/v1.0/"


@dataclasses.dataclass(frozen=True)
class Weights:
    """Facts about published weights.

    Attributes:
        tag: Their name behind the variant's: ``fasternet_t0.in1k``.
        top1: ImageNet-1k top-1 in percent, at resize 248 bicubic and centre crop 224 (crop ratio 0.9).
        hub: Repository on the Hugging Face hub (timm's copy).
        url: Official file; no hash is published for it.
        num_classes: Classes of the head.
    """

    tag: str
    top1: float
    hub: str
    url: str
    num_classes: int = 1000


def _facts(name: str, top1: float, file: str) -> Weights:
    return Weights("in1k", top1, f"timm/{name}.in1k", _RELEASE + file)


WEIGHTS: Mapping[str, Weights] = MappingProxyType(
    {
        "fasternet_t0": _facts("fasternet_t0", 71.904, "fasternet_t0-epoch.281-val_acc1.71.9180.pth"),
        "fasternet_t1": _facts("fasternet_t1", 76.210, "fasternet_t1-epoch.291-val_acc1.76.2180.pth"),
        "fasternet_t2": _facts("fasternet_t2", 78.896, "fasternet_t2-epoch.289-val_acc1.78.8860.pth"),
        "fasternet_s": _facts("fasternet_s", 81.290, "fasternet_s-epoch.299-val_acc1.81.2840.pth"),
        "fasternet_m": _facts("fasternet_m", 82.966, "fasternet_m-epoch.291-val_acc1.82.9620.pth"),
        "fasternet_l": _facts("fasternet_l", 83.506, "fasternet_l-epoch.299-val_acc1.83.5060.pth"),
    }
)


def list_models(filter: str = "") -> list[str]:
    """List the variants whose name contains ``filter``, in which ``*`` stands for anything; smallest first."""
    return fnmatch.filter(VARIANTS, f"*{filter}*")


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    source: Source = "timm",
    checkpoint_path: Path | str | None = None,
    num_classes: int | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] = (0, 1, 2, 3),
    feature_norm: bool = False,
    **fields: Any,
) -> FasterNet:
    """Create a FasterNet.

    Args:
        name: A name of ``list_models``, with or without its weights' tag (``fasternet_t0.in1k``).
        pretrained: Load the published ImageNet-1k weights, downloading them once. With another ``num_classes`` the
            classifier alone stays fresh.
        source: Whose files: timm's copies on the Hugging Face hub, or the ``"official"`` release.
        checkpoint_path: Load this instead: a model folder, or a file in any format of ``convert``.
        num_classes: Default: that of the weights, else 1000. 0 leaves the classifier out.
        features_only: Build a backbone whose ``forward`` returns the feature maps of ``out_indices``.
        out_indices: Stages, 0 to 3.
        feature_norm: BN on each returned map, as in the published detection backbones.
        **fields: Any field of ``FasterNetConfig``: ``in_chans``, ``drop_path_rate``, ``width``, ``norm`` ...

    Returns:
        The model in training mode, as every new module.

    Raises:
        ValueError: A name, an option or a checkpoint does not fit; the message says what is allowed.
        FileNotFoundError: There is no such checkpoint.
        ConnectionError: The weights are not cached and cannot be downloaded.
    """
    variant = _parse_name(name)
    if pretrained and checkpoint_path is not None:
        raise ValueError("give pretrained=True or checkpoint_path, not both")
    config = dataclasses.replace(VARIANTS[variant], **_check_fields(fields))
    weights: Mapping[str, Tensor] | None = None
    where = ""
    if pretrained:
        path = _download(variant, source)
        weights, where = convert.read_state(path), path.name
    elif checkpoint_path is not None:
        config, weights, where = _read(variant, config, fields, Path(checkpoint_path))
    found = None if weights is None else _count_classes(weights)
    if found is not None and num_classes and num_classes != found and not pretrained:
        raise ValueError(f"{where} has {found} classes, and num_classes={num_classes} was asked for")
    if (classes := found if found is not None else num_classes) is not None:
        config = dataclasses.replace(config, num_classes=classes)
    model = FasterNet(config, out_indices=out_indices if features_only else None, feature_norm=feature_norm)
    if weights is not None:
        convert.load_state(model, weights, source=where)
    if num_classes is not None and num_classes != config.num_classes and model.head is not None:
        model.reset_classifier(num_classes)
    return model


def list_ablations() -> list[str]:
    """List the variants of Table 5 that can be built and that no name of ``list_models`` stands for."""
    return [variant for variant, config in TABLE5.items() if config not in VARIANTS.values()]


def create_ablation(variant: str, **fields: Any) -> FasterNet:
    """Create a network of Table 5, with random weights.

    Args:
        variant: As in the table's column "variant": ``T0* r=1/8``, ``T0 LN`` ...
        **fields: Any field of ``FasterNetConfig``: ``num_classes``, ``drop_path_rate`` ...

    Returns:
        The model in training mode, as every new module.

    Raises:
        ValueError: The table has no such variant, or its definition was never published.
    """
    if variant == "T0* ReLU":
        raise ValueError("variant 'T0* ReLU' of Table 5 cannot be built: its width was never published")
    if variant not in TABLE5:
        raise ValueError(f"variant {variant!r} is not one of Table 5: {', '.join(TABLE5)}")
    classes = {"num_classes": fields.pop("num_classes")} if "num_classes" in fields else {}
    return FasterNet(dataclasses.replace(TABLE5[variant], **classes, **_check_fields(fields)))


def _parse_name(name: str) -> str:
    """Return the variant of ``fasternet_t0`` or ``fasternet_t0.in1k``; near names are offered for anything else."""
    variant, _, tag = name.partition(".")
    if variant in VARIANTS and (not tag or tag == WEIGHTS[variant].tag):
        return variant
    near = difflib.get_close_matches(name, [*VARIANTS, *(f"{v}.{w.tag}" for v, w in WEIGHTS.items())])
    offer = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(VARIANTS)}"
    raise ValueError(f"unknown model {name!r}: {offer}")


def _check_fields(fields: dict[str, Any]) -> dict[str, Any]:
    allowed = [field.name for field in dataclasses.fields(FasterNetConfig) if field.name != "num_classes"]
    if unknown := sorted(set(fields) - set(allowed)):
        raise ValueError(f"unknown option {', '.join(unknown)}: a model takes {', '.join(allowed)}")
    return fields


def _download(variant: str, source: Source) -> Path:
    if source not in get_args(Source):
        raise ValueError(f"source {source!r} is not one of {', '.join(get_args(Source))}")
    facts = WEIGHTS[variant]
    if source == "official":
        return download.download_url(facts.url)
    return download.download_from_hub(facts.hub, "model.safetensors")


def _read(
    variant: str, config: FasterNetConfig, asked: Iterable[str], path: Path
) -> tuple[FasterNetConfig, Mapping[str, Tensor], str]:
    """Read a checkpoint: a folder brings its configuration, in which what was ``asked`` for has to stand."""
    if path.is_dir():
        folder = read_model_folder(path)
        if folder.name != variant:
            raise ValueError(f"{path} holds a {folder.name}, and {variant} was asked for")
        kept = {name: getattr(config, name) for name in ("drop_rate", "drop_path_rate")}
        merged = dataclasses.replace(folder.config, **kept)
        for name in asked:
            if (value := getattr(config, name)) != (there := getattr(merged, name)):
                raise ValueError(f"{path} has {name} {there!r}, and {value!r} was asked for")
        return merged, folder.weights, str(path)
    weights = convert.read_state(path)
    if config.width == VARIANTS[variant].width and config.depths == VARIANTS[variant].depths:
        try:
            holds = convert.identify_variant(weights)
        except ValueError:
            holds = variant  # no published width: loading says what does not fit
        if holds != variant:
            raise ValueError(f"{path} holds a {holds}, and {variant} was asked for")
    return config, weights, str(path)


def _count_classes(weights: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes of a state dict's classifier, or None where it has none."""
    for key, tensor in weights.items():
        if key.endswith(("classifier.bias", "head.bias", "head.fc.bias")):
            return tensor.shape[0]
    return None
