"""Creates any classifier by name: FasterNet, a rival by the paper's name, or any network of timm."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fasternet.models import convert
from fasternet.models.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_config
from fasternet.models.fasternet import VARIANTS
from fasternet.models.registry import create_model
from fasternet.rivals.registry import Rival, create_own, list_rivals

if TYPE_CHECKING:
    from fasternet.models.surgery import Init


_OF_TRAINING = {"num_classes", "drop_rate", "drop_path_rate"}  # a checkpoint does not bring these


def is_fasternet(name: str) -> bool:
    """Whether a name is that of one of our own variants, with or without the tag of its weights."""
    return name.partition(".")[0] in VARIANTS


def resolve_network(name: str) -> Rival:
    """Return where a network that is no FasterNet comes from.

    Args:
        name: As in ``list_rivals``, or timm's name, with or without a tag (``mobilenetv2_100.ra_in1k``).

    Returns:
        The rival, whose ``name`` is the paper's where the paper has it.

    Raises:
        ValueError: There is none; near names are offered.
    """
    import timm

    architecture = name.partition(".")[0]
    for rival in list_rivals():
        if name == rival.name:
            return rival
        if architecture == rival.builder and (rival.source == "timm" or name == architecture):
            if rival.source == "timm":
                try:
                    timm.get_pretrained_cfg(name)
                except RuntimeError as error:  # a tag that there is not
                    raise ValueError(f"unknown network {name!r}: {error}") from None
            return dataclasses.replace(rival, builder=name)
    if timm.is_model(name):
        return Rival(architecture, "timm", name, timm.get_pretrained_cfg(name).input_size[-1])
    known = {known.lower(): known for known in (*timm.list_models(), *VARIANTS, *(r.name for r in list_rivals()))}
    near = [known[match] for match in difflib.get_close_matches(name.lower(), known)]
    offer = f"did you mean {' or '.join(near)}?" if near else "take a name of `fasternet list`, or one of timm"
    raise ValueError(f"unknown network {name!r}: {offer}")


def create_network(
    name: str,
    *,
    num_classes: int,
    checkpoint_path: Path | str | None = None,
    pretrained: bool = False,
    **options: Any,
) -> nn.Module:
    """Create a classifier; what is random in it follows from ``torch.manual_seed``.

    Args:
        name: A FasterNet (``fasternet_t0``), a rival by the paper's name (``MobileNetV2``), or timm's name.
        num_classes: Where the weights have another number of classes, the classifier stays fresh.
        checkpoint_path: Weights to start from: a model folder, a run folder (its ``best``), or a weights file.
        pretrained: Start from published weights, downloading them once.
        **options: What the network's builder takes: fields of ``FasterNetConfig``, or options of timm's network;
            ``surgery``, a list of options of ``replace_convs`` that are applied in turn, puts PConv into a network
            that is no FasterNet: fitted to published weights, else at random. A checkpoint that has it brings it.

    Returns:
        The network in training mode.

    Raises:
        ValueError: A name, an option or a checkpoint does not fit; the message says what is allowed.
        FileNotFoundError: There is no such checkpoint.
        ConnectionError: The published weights cannot be downloaded.
    """
    if pretrained and checkpoint_path is not None:
        raise ValueError("give pretrained=True or checkpoint_path, not both")
    if is_fasternet(name):
        if checkpoint_path is None:
            return create_model(name, num_classes=num_classes, pretrained=pretrained, **options)
        fasternet = create_model(name, checkpoint_path=checkpoint_path, **options)
        if fasternet.config.num_classes != num_classes:
            fasternet.reset_classifier(num_classes)
        return fasternet
    rival = resolve_network(name)
    if checkpoint_path is None:
        return build_network(rival, num_classes, options, pretrained=pretrained).train()
    state, where = _read_weights(Path(checkpoint_path), rival)
    model = build_network(rival, num_classes, {**options, **read_options(name, Path(checkpoint_path))})
    load_state(model, state, source=where, replace_classifier=True)
    return model.train()


def read_options(name: str, path: Path) -> dict[str, Any]:
    """Return the options with which a checkpoint's network differs from the one of its name.

    Args:
        name: The network.
        path: A model or run folder, also of a detector over the network; anything else brings no options.

    Returns:
        Of a FasterNet: fields of ``FasterNetConfig``, without those of training. Of another network: ``surgery``. Of a
        detector: what its backbone was built with.
    """
    if not any((folder / CONFIG_FILE).is_file() for folder in (path, path / "best")):
        return {}
    document = read_config(path)[1]
    config = document.get("fasternet", {}).get("config", {})
    if "kind" in config:
        is_same = config.get("backbone", "").partition(".")[0] == name.partition(".")[0]
        options = config.get("backbone_options", {}) if is_same else {}
        chosen = {key: value for key, value in options.items() if key not in (*_OF_TRAINING, "feature_norm")}
        return {key: tuple(value) if isinstance(value, list) else value for key, value in chosen.items()}
    if not is_fasternet(name):
        options = document.get("model_args", {})
        return {"surgery": options["surgery"]} if "surgery" in options else {}
    published = json.loads(json.dumps(dataclasses.asdict(VARIANTS[name.partition(".")[0]])))
    differing = (key for key, value in published.items() if config.get(key, value) != value)
    return {key: config[key] for key in differing if key not in _OF_TRAINING}


def build_network(rival: Rival, num_classes: int, options: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """Build a network that is no FasterNet; raises what ``create_network`` raises.

    Returns:
        The network, with ``num_classes`` and ``build_options``, which a model folder keeps.
    """
    rest = {key: value for key, value in options.items() if key != "surgery"}
    model = _build_original(rival, num_classes, rest, pretrained=pretrained)
    for operation in options.get("surgery") or ():
        model = _operate(rival, model, operation, init="approximate" if pretrained else "random")
    model.num_classes = num_classes  # type: ignore[assignment]
    model.build_options = dict(options)  # type: ignore[assignment]
    return model


def _operate(rival: Rival, model: nn.Module, operation: Mapping[str, Any], init: Init) -> nn.Module:
    from fasternet.models.surgery import replace_convs

    try:
        operation = {"seed": int(torch.randint(2**31, ())), **operation}
        return replace_convs(model, **operation, init=init, measure=False)[0]
    except TypeError as error:
        raise ValueError(f"{rival.name} cannot be built with surgery {operation}: {error}") from None


def _build_original(rival: Rival, num_classes: int, options: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    try:
        if rival.source == "fasternet":
            if pretrained:
                raise ValueError(
                    "there are no pretrained weights of it: give a file (checkpoint_path, or --checkpoint)"
                )
            return create_own(rival.builder, num_classes, **options)
        if rival.source == "torchvision":
            return _build_torchvision(rival.builder, num_classes, pretrained, options)
        import timm

        model = timm.create_model(rival.builder, pretrained=pretrained, num_classes=num_classes, **options)
        return cast(nn.Module, model)
    except TypeError as error:
        raise ValueError(f"{rival.name} cannot be built with {options}: {error}") from None
    except Exception as error:  # the hub, timm and torchvision each have their own
        if not pretrained or "no pretrained weights" in str(error).lower():
            raise ValueError(f"{rival.name} cannot be built: {_first_line(error)}") from None
        raise ConnectionError(
            f"cannot download the weights of {rival.name} ({_first_line(error)}): "
            "without a network, give a file (checkpoint_path, or --checkpoint)"
        ) from None


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str, replace_classifier: bool = False) -> None:
    """Load tensors into a network that is no FasterNet, strictly.

    Args:
        model: The network to fill; nothing is written to it unless everything fits.
        state: Its tensors, by its own names.
        source: Where they come from, for messages.
        replace_classifier: Leave the classifier as it is where the tensors have other classes.

    Raises:
        ValueError: Keys are missing or extra, or shapes differ.
    """
    own = model.state_dict()
    head = tuple(f"{name}." for name in name_classifiers(model))
    wrong = [key for key, tensor in own.items() if key in state and state[key].shape != tensor.shape]
    kept = set()
    if replace_classifier and any(key.startswith(head) for key in wrong):
        kept = {key for key in own if key.startswith(head)}
    problems = {
        "missing": [key for key in own if key not in state and key not in kept],
        "not known": [key for key in state if key not in own],
        "of another shape": [key for key in wrong if key not in kept],
    }
    if any(problems.values()):
        listing = "; ".join(f"{what}: {_shorten(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"{source} does not fit the network: {listing}")
    model.load_state_dict({key: tensor for key, tensor in state.items() if key not in kept}, strict=False)


def _build_torchvision(builder: str, num_classes: int, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    import torchvision

    if not pretrained:
        return cast(nn.Module, torchvision.models.get_model(builder, weights=None, num_classes=num_classes, **options))
    model: nn.Module = torchvision.models.get_model(builder, weights="DEFAULT", **options)
    (name,) = name_classifiers(model)
    classifier = cast(nn.Linear, model.get_submodule(name))
    if classifier.out_features != num_classes:
        model.set_submodule(name, nn.Linear(classifier.in_features, num_classes))
    return model


def name_classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that make logits: timm states them, elsewhere it is the last linear one."""
    stated = getattr(model, "pretrained_cfg", {}).get("classifier")
    if stated:
        return (stated,) if isinstance(stated, str) else tuple(stated)
    return ([name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1],)


def _read_weights(path: Path, rival: Rival) -> tuple[Mapping[str, Tensor], str]:
    if not path.is_dir():
        return convert.read_state(path), str(path)
    folder, document = read_config(path)
    found = document.get("architecture")
    if found != rival.builder.partition(".")[0]:
        raise ValueError(f"{path} holds a {found}, and {rival.name} was asked for")
    return convert.read_state(folder / WEIGHTS_FILE), str(folder)


def _shorten(keys: list[str], limit: int = 6) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
