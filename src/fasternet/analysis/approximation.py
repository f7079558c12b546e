"""Approximation of a regular convolution by cheaper operators (Table 2, Section 4.1).

Pictures stream through a reference network, and every operator of every layer learns the layer's map from the same
batches, by the mean squared error; nothing of the maps outlives its batch. The pictures, not the maps, are split:
70 % train, 10 % validate, 20 % test. What the paper leaves open, and what is done here:

* layer (``layers``): of each stage the first regular 3x3 convolution with stride 1, because PConv has stride 1;
* map (``target``): what the convolution computes (``conv``), or that after the batch normalization that reads it;
* normalization (``normalize``): input and target are divided by their standard deviation, one scalar per layer each
  (``layer``), one per channel (``channel``), or not (``none``); no mean is taken off. The first batches of the training
  part decide. Every operator can undo such a scaling, but with ``channel`` weak channels count as much as strong ones;
* bias (``bias``): the last layer of an operator has one where the target has one;
* width: GConv, DWConv and PConv keep the channels and the PWConv changes their number; T-shaped maps directly;
* budget: for all operators the same pictures in the same order, Adam without weight decay, the learning rate on a
  cosine to 0 (``epochs``, ``batch_size``, ``lr``). At 0.003 DWConv and GConv learn too slowly, at 0.03 most operators
  get worse. An operator that has not improved on the validation part for ``patience`` epochs stops there; its best
  weights are tested;
* closed form: what PConv + PWConv can reach at all is least squares on the training part's maps (``LEAST_SQUARES``),
  for targets before batch normalization, without normalization by channel;
* loss: the test error in the maps' own units, and relative to the variance of the targets, where 1 is the error of the
  channels' means;
* what is unseen: the operators have not seen the test part. A reference that was trained on the same pictures has: its
  maps of them are those of training pictures. Pictures that it was not trained on, such as those of its validation,
  give maps of unseen ones.

Legend: N C H W of a map; x and y input and target of a layer.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fasternet.analysis.fitting import Errors, Fit, LayerMap, Normalize, evaluate, fit_operators, measure_scales
from fasternet.analysis.operators import OPERATORS
from fasternet.analysis.reference import (
    Layer,
    Reference,
    capture,
    find_first_convs,
    hash_pictures,
    list_layers,
    load_pictures,
)
from fasternet.complexity import count_costs
from fasternet.environment import create_record
from fasternet.models.approximate import approximate_conv, copy_approximation, measure_moments
from fasternet.ops import PConvPWConv, count_partial_channels
from fasternet.records import Record
from fasternet.timing import Track, silent

Target = Literal["conv", "norm"]

_SPLIT = (0.7, 0.1)  # training and validation; the rest tests (Section 4.1)


LEAST_SQUARES = "PConv + PWConv (least squares)"
"""PConv + PWConv in closed form: nothing is trained."""


def measure_approximation(
    reference: Reference,
    pictures: Sequence[Path],
    *,
    data: str,
    layers: Sequence[str] | None = None,
    operators: Sequence[str] | None = None,
    target: Target = "conv",
    normalize: Normalize = "layer",
    bias: bool | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 20,
    patience: int = 3,
    batch_size: int = 16,
    lr: float = 0.01,
    input_size: int | None = None,
    num_workers: int = 0,
    known: Iterable[Record] = (),
    track: Track = silent,
    say: Callable[[str], object] = lambda sentence: None,
) -> Iterator[Record]:
    """Train operators to compute what convolutions of a network do, and test them (Table 2).

    A seed decides the split, the operators' first weights and the order of the pictures, so that the same seed gives
    the same numbers, bit by bit, whichever other operators are trained beside. The module says what else is decided.

    Args:
        reference: The network whose convolutions are approximated; it is not changed.
        pictures: Files, at least ten.
        data: What the records call the pictures.
        layers: Paths of regular 3x3 convolutions with stride 1; None takes the first of each stage.
        operators: Labels of ``OPERATORS``, and ``LEAST_SQUARES``; None takes all that there are for this target.
        target: ``"conv"``: the convolution's output; ``"norm"``: that after its batch normalization.
        normalize: Divide the maps by a standard deviation per layer, per channel, or not.
        bias: Whether the last layer of each operator has a bias; None: where the target has one.
        seeds: One repetition each.
        epochs: Passes over the training part, at most.
        patience: Epochs without a better validation loss after which an operator stops.
        batch_size: Pictures per step.
        lr: Peak of Adam's learning rate.
        input_size: Side of the pictures; None takes the network's own.
        num_workers: Processes that load pictures; 0 loads in this one.
        known: Records of an interrupted run; what they cover is not trained again.
        track: Shows progress.
        say: Takes a sentence about the layers, and one about each epoch and each seed.

    Yields:
        After each seed a record for each layer and operator: suite ``approximation``, kind ``study``. Its
        ``reference_trained_on_data`` says whether the reference names these pictures as those that it was trained on.

    Raises:
        ValueError: An argument does not fit, or an operator's loss is not finite.
        ImageError: A picture cannot be read.
    """
    size = reference.preprocessing.input_size if input_size is None else input_size
    settings = {"epochs": epochs, "patience": patience, "batch_size": batch_size, "lr": lr, "input_size": size}
    check_options(len(pictures), operators, target=target, normalize=normalize)
    _check(seeds, settings)
    maps = _choose_maps(reference.model, size, layers, target, bias)
    labels = _choose_operators(operators, has_closed_form=normalize != "channel" and all(map.is_plain for map in maps))
    _check_operators(maps, labels)
    chosen = ", ".join(f"{map.layer.name} (stage {map.layer.stage})" for map in maps)
    say(f"{len(labels)} operators learn the maps of {chosen} from {len(pictures)} pictures")
    preprocessing = dataclasses.replace(reference.preprocessing, input_size=size)
    study = functools.partial(
        _measure_seed,
        model=reference.model,
        load=functools.partial(
            load_pictures, preprocessing=preprocessing, batch_size=batch_size, num_workers=num_workers
        ),
        normalize=normalize,
        fit=functools.partial(fit_operators, epochs=epochs, patience=patience, lr=lr, track=track),
        say=say,
    )
    shared = {**reference.condition, "data": data, "pictures_hash": hash_pictures(pictures)}
    shared |= {"target": target, "normalize": normalize, **settings}
    seen = reference.weights in {f"trained here on {name}" for name in (data, data.removesuffix("/train"))}
    done = [(record.subject, record.condition) for record in known if record.suite == "approximation"]
    for number, seed in enumerate(seeds, start=1):
        parts = split_pictures(pictures, seed)
        sizes = {f"num_{name}": len(part) for name, part in zip(("train", "validation", "test"), parts, strict=True)}
        conditions = {
            map: {**shared, "stage": map.layer.stage, "layer": map.layer.name, "bias": map.has_bias, "seed": seed}
            | sizes
            for map in maps
        }
        missing = [pair for pair in itertools.product(maps, labels) if (pair[1], conditions[pair[0]]) not in done]
        if missing:
            tell = _create_teller(say, seed, epochs, num_more=len(seeds) - number)
            for fit, errors in study(parts, seed, missing, tell=tell).items():
                yield _record(fit, errors, conditions[fit.map], seen)


def split_pictures(pictures: Sequence[Path], seed: int) -> tuple[list[Path], list[Path], list[Path]]:
    """Shuffle pictures and split them: 70 % to train with, 10 % to validate, 20 % to test (Section 4.1)."""
    shuffled = list(pictures)
    random.Random(f"split {seed}").shuffle(shuffled)
    num_train, num_validation = (round(share * len(shuffled)) for share in _SPLIT)
    return (
        shuffled[:num_train],
        shuffled[num_train : num_train + num_validation],
        shuffled[num_train + num_validation :],
    )


def check_options(
    num_pictures: int, operators: Sequence[str] | None = None, *, target: str = "conv", normalize: str = "layer"
) -> None:
    """Check what can be checked before there is a network.

    Raises:
        ValueError: An argument of ``measure_approximation`` is not allowed, or there are too few pictures.
    """
    if num_pictures < 10:
        raise ValueError(f"pictures must be at least 10, to train, validate and test with, got {num_pictures}")
    for name, word, allowed in (("target", target, Target), ("normalize", normalize, Normalize)):
        if word not in get_args(allowed):
            raise ValueError(f"{name} {word!r} is not one of {', '.join(get_args(allowed))}")
    _choose_operators(operators, has_closed_form=target == "conv" and normalize != "channel")


def _check(seeds: Sequence[int], counts: Mapping[str, float]) -> None:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different numbers, at least one, got {list(seeds)}")
    for name, number in counts.items():
        if not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")


def _choose_operators(operators: Sequence[str] | None, *, has_closed_form: bool) -> list[str]:
    allowed = [*OPERATORS, *([LEAST_SQUARES] if has_closed_form else [])]
    labels = list(dict.fromkeys(allowed if operators is None else operators))
    if not labels:
        raise ValueError(f"operators must name at least one of {', '.join(allowed)}")
    for label in labels:
        if label not in allowed:
            raise ValueError(f"operator {label!r} is not one of {', '.join(allowed)}")
    return labels


def _check_operators(maps: Iterable[LayerMap], labels: Iterable[str]) -> None:
    for map, label in itertools.product(maps, labels):
        try:
            with torch.device("meta"):
                if label in OPERATORS:
                    OPERATORS[label](*map.channels, map.has_bias)
        except ValueError as error:
            where = f"layer {map.layer.name!r} with {map.channels[0]} channels"
            raise ValueError(f"operator {label!r} does not fit {where}: {error}") from None


def _choose_maps(
    model: nn.Module, input_size: int, names: Sequence[str] | None, target: Target, bias: bool | None
) -> tuple[LayerMap, ...]:
    known = {layer.name: layer for layer in list_layers(model, input_size)}
    regular = [name for name, layer in known.items() if find_first_convs([dataclasses.replace(layer, stage=1)])]
    if names is None:
        names = [layer.name for layer in find_first_convs(known.values())]
    if not names:
        advice = f"; give layers, of {', '.join(regular)}" if regular else ", and nothing else is approximated"
        raise ValueError(f"the network has no regular 3x3 convolution with stride 1 in its stages 1 to 4{advice}")
    for name in names:
        if name not in regular:
            allowed = ", ".join(regular) or "none in this network"
            raise ValueError(f"layer {name!r} is no regular 3x3 convolution with stride 1; those are: {allowed}")
    chosen = [known[name] for name in dict.fromkeys(names)]
    norms = _find_norms(model, chosen, input_size) if target == "norm" else {}
    return tuple(
        LayerMap(layer, norms.get(layer.name), (bool(norms) or layer.module.bias is not None) if bias is None else bias)
        for layer in chosen
    )


@torch.no_grad()
def _find_norms(model: nn.Module, layers: Sequence[Layer], input_size: int) -> dict[str, nn.BatchNorm2d]:
    """Find the batch normalization that reads each layer: the one whose input is the layer's output."""
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
    }
    parameter = next(model.parameters())
    picture = torch.rand(1, 3, input_size, input_size, generator=torch.Generator().manual_seed(0)).to(parameter)
    found = {}
    with capture(model, [*norms, *(layer.name for layer in layers)]) as maps:
        model(picture)
    for layer in layers:
        readers = (name for name in norms if name in maps and torch.equal(maps[name][0], maps[layer.name][1]))
        if (reader := next(readers, None)) is None:
            raise ValueError(f"target 'norm': no batch normalization reads layer {layer.name!r}; take target 'conv'")
        found[layer.name] = norms[reader]
    return found


def _measure_seed(
    parts: tuple[list[Path], list[Path], list[Path]],
    seed: int,
    wanted: Sequence[tuple[LayerMap, str]],
    *,
    model: nn.Module,
    load: Callable[..., DataLoader[Tensor]],
    normalize: Normalize,
    fit: Callable[..., None],
    say: Callable[[str], object],
    tell: Callable[[int, Sequence[Fit]], object],
) -> dict[Fit, Errors]:
    train, validation, test = parts
    maps = list(dict.fromkeys(map for map, _ in wanted))
    scales = measure_scales(model, maps, load(train), normalize)
    trained = [
        Fit(label, map, _create(label, map, seed, scales[map][0].device), *scales[map])
        for map, label in wanted
        if label in OPERATORS
    ]
    if trained:
        fit(model, trained, load(train, shuffle_seed=seed), load(validation), description=f"seed {seed}", tell=tell)
    fits = list(trained)
    if open_maps := [map for map, label in wanted if label == LEAST_SQUARES]:
        fits += (solved := _solve(model, open_maps, load(train)))
        for found, errors in evaluate(model, solved, load(validation)).items():
            found.validation = errors
    tested = evaluate(model, fits, load(test))
    losses = {label: [tested[fit].relative_mse for fit in fits if fit.label == label] for _, label in wanted}
    listing = ", ".join(f"{label} {statistics.fmean(found):.4f}" for label, found in losses.items())
    num_epochs = max(fit.num_epochs for fit in fits)
    say(f"seed {seed}, {num_epochs} epochs: test error relative to the variance, mean of the layers: {listing}")
    return tested


def _create_teller(
    say: Callable[[str], object], seed: int, epochs: int, *, num_more: int
) -> Callable[[int, Sequence[Fit]], None]:
    """Return what says after each epoch of a seed how far it is, with ``num_more`` seeds still to come."""
    started = time.perf_counter()

    def tell(epoch: int, fits: Sequence[Fit]) -> None:
        own = [fit for fit in fits if fit.label == "PConv + PWConv"]
        errors = [fit.validation.relative_mse if fit.validation else math.inf for fit in own or fits]
        error = f"{statistics.fmean(errors):.4f} ({'PConv + PWConv' if own else 'mean of the operators'})"
        minutes = (time.perf_counter() - started) / epoch * (epochs - epoch + epochs * num_more) / 60
        say(f"seed {seed}, epoch {epoch}/{epochs}: validation error {error}, at most {minutes:.1f} min left")

    return tell


def _solve(model: nn.Module, maps: Sequence[LayerMap], batches: Iterable[Tensor]) -> list[Fit]:
    """Return PConv + PWConv by least squares on the maps of pictures, for each layer."""
    num_partial = {map.layer.name: count_partial_channels(map.channels[0], 1 / 4) for map in maps}
    device = next(model.parameters()).device
    moments = measure_moments(model, num_partial, (batch.to(device) for batch in batches))
    fits = []
    for map in maps:
        conv, operator = map.layer.module, PConvPWConv(*map.channels, bias=map.has_bias)
        assert isinstance(conv, nn.Conv2d)
        copy_approximation(approximate_conv(conv, num_partial[map.layer.name], moments[map.layer.name]), operator)
        one = torch.ones((), device=device)
        fits.append(Fit(LEAST_SQUARES, map, operator.to(device), one, one))
    return fits


def _create(label: str, map: LayerMap, seed: int, device: torch.device) -> nn.Module:
    """Create an operator with weights of its own, whatever else is trained beside it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(f"{seed} {map.layer.name} {label}".encode()))
        return OPERATORS[label](*map.channels, map.has_bias).to(device).to(memory_format=torch.channels_last)


def _record(fit: Fit, errors: Errors, condition: Mapping[str, Any], seen: bool) -> Record:
    assert fit.validation is not None
    in_channels, out_channels = fit.map.channels
    layer = fit.map.layer
    costs = count_costs(fit.operator, (1, in_channels, layer.height, layer.width))
    values = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "height": layer.height,
        "width": layer.width,
        "num_params": costs.num_params,
        "macs": costs.macs,
        "mse": errors.mse,
        "relative_mse": errors.relative_mse,
        "validation_relative_mse": fit.validation.relative_mse,
        "best_epoch": fit.best_epoch,
        "num_epochs": fit.num_epochs,
        "target_variance": errors.variance,
        "reference_trained_on_data": seen,
    }
    return create_record("approximation", "study", fit.label, condition=condition, values=values)
