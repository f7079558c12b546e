"""Operators that learn what layers of a network compute, all at once, as pictures stream through it (Section 4.1).

Legend: N C H W of a map; x and y input and target of a layer. An operator lives on divided maps, x / ``x_scale`` and
y / ``y_scale``, where a scale is a scalar or (C, 1, 1).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fasternet.analysis.reference import Layer, capture
from fasternet.timing import Track

Normalize = Literal["none", "layer", "channel"]

_NUM_SCALE_BATCHES = 16  # that the standard deviations are taken of
_WEAKEST = 0.01  # a channel is divided as if it had at least this share of its layer's standard deviation


@dataclasses.dataclass(frozen=True)
class LayerMap:
    """What operators learn: from a convolution's input to its output, or to that after its batch normalization.

    Attributes:
        layer: A regular convolution.
        norm: The batch normalization, where it belongs to the target.
        has_bias: Whether the operators have one.
    """

    layer: Layer
    norm: nn.BatchNorm2d | None
    has_bias: bool

    @property
    def is_plain(self) -> bool:
        """Whether the target is what the convolution itself computes, with a bias where it has one."""
        return self.norm is None and self.has_bias == (self.layer.module.bias is not None)

    @property
    def channels(self) -> tuple[int, int]:
        """Of x and of y."""
        module = self.layer.module
        assert isinstance(module, nn.Conv2d)
        return module.in_channels, module.out_channels

    def read(self, maps: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return x and y of a forward pass, both (N, C, H, W)."""
        x, y = maps[self.layer.name]
        if (norm := self.norm) is not None:  # computed here: in some networks the module holds an activation too
            y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return x, y


@dataclasses.dataclass(frozen=True)
class Errors:
    """Mean errors over a part of the pictures.

    Attributes:
        loss: As trained on, of divided maps.
        mse: In the maps' own units.
        variance: Of y around its channels' means, in its own units.
    """

    loss: float
    mse: float
    variance: float

    @property
    def relative_mse(self) -> float:
        """The error relative to the variance; 1 is that of the channels' means, 0 of the layer itself."""
        return self.mse / self.variance if self.variance else math.inf


@dataclasses.dataclass(eq=False)
class Fit:
    """An operator on its way.

    Attributes:
        label: Its name.
        map: What it learns.
        operator: The module; on divided maps.
        x_scale: What x is divided by.
        y_scale: What y is divided by.
        best: Its weights at the best epoch.
        validation: Its errors there; None before the first.
        best_epoch: From 1; 0 before the first.
        num_epochs: Epochs that it trained.
    """

    label: str
    map: LayerMap
    operator: nn.Module
    x_scale: Tensor
    y_scale: Tensor
    best: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    validation: Errors | None = None
    best_epoch: int = 0
    num_epochs: int = 0

    def find_squares(self, maps: Mapping[LayerMap, tuple[Tensor, Tensor]]) -> Tensor:
        """Return its squared errors of divided maps, (N, C, H, W)."""
        x, y = maps[self.map]
        squares: Tensor = (self.operator(x / self.x_scale) - y / self.y_scale).square()
        return squares

    def note(self, epoch: int, errors: Errors) -> None:
        """Keep the weights where the validation loss is the best so far."""
        self.num_epochs = epoch
        if errors.loss < (self.validation.loss if self.validation else math.inf):
            self.validation, self.best_epoch = errors, epoch
            self.best = {name: tensor.clone() for name, tensor in self.operator.state_dict().items()}


def fit_operators(
    model: nn.Module,
    fits: Sequence[Fit],
    batches: DataLoader[Tensor],
    validation: Iterable[Tensor],
    *,
    epochs: int,
    patience: int,
    lr: float,
    track: Track,
    description: str,
    tell: Callable[[int, Sequence[Fit]], object] = lambda epoch, fits: None,
) -> None:
    """Train operators at once, each until it stops; at the end each has its best weights.

    They share no weights, so the gradient of the sum of their losses is each one's own, and so is Adam's step.

    Args:
        model: The network whose layers they learn, in evaluation mode.
        fits: The operators, as they start.
        batches: Pictures to train with, in another order from pass to pass.
        validation: Pictures that decide which epoch was the best, and when an operator stops.
        epochs: Passes at most; the learning rate falls on a cosine to 0 at their end.
        patience: Epochs without a better validation loss after which an operator stops.
        lr: Peak of Adam's learning rate.
        track: Shows progress.
        description: What it shows.
        tell: Takes the number of each epoch that has ended, and the operators.

    Raises:
        ValueError: The loss of an operator was never finite.
    """
    optimizer = torch.optim.Adam([weight for fit in fits for weight in fit.operator.parameters()], lr=lr, fused=True)
    num_steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    active, maps_of_all = list(fits), _list_maps(fits)
    steps = ((epoch, maps) for epoch in range(1, epochs + 1) for maps in stream(model, maps_of_all, batches))
    for epoch, group in itertools.groupby(track(steps, num_steps, description), key=lambda step: step[0]):
        for _, maps in group:
            optimizer.zero_grad()
            loss = torch.stack([fit.find_squares(maps).mean() for fit in active]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()  # what has stopped has no gradient, and stays as it is
            schedule.step()
        for fit, errors in evaluate(model, active, validation).items():
            fit.note(epoch, errors)
        tell(epoch, fits)
        active = [fit for fit in active if epoch - fit.best_epoch < patience]
        if not active:
            break
    for fit in fits:
        if not fit.best:
            raise ValueError(f"{fit.label} on {fit.map.layer.name}: the loss is not finite; lr {lr} is too large")
        fit.operator.load_state_dict(fit.best)


@torch.no_grad()
def evaluate(model: nn.Module, fits: Sequence[Fit], batches: Iterable[Tensor]) -> dict[Fit, Errors]:
    """Return the errors of operators over pictures."""
    maps_of_all = _list_maps(fits)
    squares = {fit: torch.zeros((), dtype=torch.float64) for fit in fits}  # (C,): sum of squared errors
    moments = {map: torch.zeros((), dtype=torch.float64) for map in maps_of_all}  # (3, C): sums of 1, y, y^2
    for maps in stream(model, maps_of_all, batches):
        for map, (_, y) in maps.items():
            moments[map] = moments[map] + torch.stack([_sum(torch.ones_like(y)), _sum(y), _sum(y.square())])
        for fit in fits:
            squares[fit] = squares[fit] + _sum(fit.find_squares(maps))
    return {fit: _find_errors(squares[fit], moments[fit.map], fit.y_scale) for fit in fits}


def _find_errors(squares: Tensor, moments: Tensor, y_scale: Tensor) -> Errors:
    count, total, square = moments
    loss = squares / count  # (C,), of divided maps
    mse = loss * y_scale.double().flatten().square()
    variance = (square / count - (total / count).square()).clamp_min(0)
    return Errors(loss.mean().item(), mse.mean().item(), variance.mean().item())


def stream(
    model: nn.Module, maps: Sequence[LayerMap], batches: Iterable[Tensor]
) -> Iterator[dict[LayerMap, tuple[Tensor, Tensor]]]:
    """Yield x and y of every layer, batch after batch of pictures."""
    device = next(model.parameters()).device
    with capture(model, [map.layer.name for map in maps]) as caught:
        for images in batches:
            with torch.no_grad():
                # channels_last: operators trained 2.5 times as fast on a CPU, at 64 px
                model(images.to(device, memory_format=torch.channels_last))
                read = {map: map.read(caught) for map in maps}
            yield read


def measure_scales(
    model: nn.Module, maps: Sequence[LayerMap], batches: Iterable[Tensor], normalize: Normalize
) -> dict[LayerMap, tuple[Tensor, Tensor]]:
    """Return what x and y of each layer are divided by: their standard deviations over the first batches.

    Args:
        model: The network.
        maps: Its layers.
        batches: Pictures.
        normalize: ``"layer"``: one scalar each; ``"channel"``: one per channel, (C, 1, 1); ``"none"``: 1.
    """
    seen: dict[LayerMap, list[tuple[Tensor, Tensor]]] = {map: [] for map in maps}
    for found in itertools.islice(stream(model, maps, batches), _NUM_SCALE_BATCHES):
        for map, (x, y) in found.items():
            seen[map].append((_describe(x), _describe(y)))
    return {
        map: (_find_scale([x for x, _ in pairs], normalize), _find_scale([y for _, y in pairs], normalize))
        for map, pairs in seen.items()
    }


def _find_scale(described: list[Tensor], normalize: Normalize) -> Tensor:
    mean, square = torch.stack(described).mean(0)  # (C,), (C,)
    whole: Tensor = (square.mean() - mean.mean().square()).clamp_min(0).sqrt()
    if normalize == "none" or not whole:  # a layer that is constant cannot be divided
        return torch.ones_like(whole)
    if normalize == "layer":
        return whole
    single: Tensor = (square - mean.square()).clamp_min(0).sqrt().clamp_min(_WEAKEST * whole.item())  # (C,)
    return single[:, None, None]


def _describe(maps: Tensor) -> Tensor:
    """Return mean and mean square of each channel, (2, C)."""
    return torch.stack([maps.mean((0, 2, 3)), maps.square().mean((0, 2, 3))])


def _sum(maps: Tensor) -> Tensor:
    """Sum by channel, in float64: (N, C, H, W) to (C,)."""
    return maps.sum((0, 2, 3), dtype=torch.float64)


def _list_maps(fits: Iterable[Fit]) -> list[LayerMap]:
    return list(dict.fromkeys(fit.map for fit in fits))
