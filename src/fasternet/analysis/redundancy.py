"""How much the channels of a layer repeat each other: the maps as a picture, and as numbers (Fig. 3, Section 3.2).

The paper shows the maps of one picture and lets the eye judge. PConv computes on the first quarter of the channels
because the others resemble it: so beside correlations and rank stands what that quarter knows of all channels.
Legend: N pictures, C channels, H x W positions, P = N * H * W; q = floor(C / 4), the first quarter.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from fasternet.analysis.reference import Reference, capture, find_stage, hash_pictures, load_pictures
from fasternet.environment import create_record
from fasternet.models.checkpoint import Preprocessing
from fasternet.ops import PConv2d, count_partial_channels
from fasternet.records import Record
from fasternet.timing import Track, silent

Array = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

PARTIAL_RATIO = 0.25
MIN_CORRELATION = 0.9  # from here on two channels count as copies of each other

_BATCH_SIZE = 16
_NUM_DRAWS = 8
_MIN_RELATIVE_VARIANCE = 1e-12  # of the mean square: below, a channel varies by the rounding of float32 alone
_MIN_RELATIVE_EIGENVALUE = 1e-10  # of the largest: below, a direction is rounding
_COLUMNS, _MAX_ROWS, _CELL = 16, 16, 64
_PICTURE_CELLS = 2  # the picture is so many cells wide and high
_GREYS = 64  # levels of a map: 252 maps of 56 x 56 pixels of pure noise are 0.6 MB. The picture has the other colours
_SEPARATOR = (64, 128, 208)  # no grey, which a map may end in


def measure_redundancy(
    reference: Reference,
    pictures: Sequence[Path],
    folder: Path,
    *,
    data: str,
    layers: Sequence[str] | None = None,
    picture: Path | None = None,
    input_size: int | None = None,
    num_workers: int = 0,
    known: Iterable[Record] = (),
    track: Track = silent,
) -> Iterator[Record]:
    """Measure how much the channels of layers repeat each other, over positions and pictures.

    All numbers come from the covariance of the channels in float64. A constant channel has no correlation: it is
    counted in ``num_dead``, and left out of correlations and the share of redundant channels. The covariance of P
    positions has at most rank P - 1: with fewer positions than channels, ranks and explained shares say little.

    Args:
        reference: The network.
        pictures: Over which the numbers are taken.
        folder: Grids of maps are written to ``pictures/<picture>-<layer>.png`` in it.
        data: What the records call the pictures.
        layers: Modules whose outputs (N, C, H, W) are looked at; default is ``find_blocks``.
        picture: Whose maps are drawn; None draws none.
        input_size: S; the network's own is the default.
        num_workers: Processes that load pictures.
        known: Records of an interrupted run; their layers are not measured again.
        track: Shows progress.

    Yields:
        A record of kind ``study`` for each layer.

    Raises:
        ValueError: A layer is unknown, returns no maps, or has fewer than two channels that vary.
        ImageError: A picture cannot be read.
    """
    if not pictures:
        raise ValueError("pictures must name at least one file")
    preprocessing = reference.preprocessing
    if input_size is not None:
        preprocessing = dataclasses.replace(preprocessing, input_size=input_size)
    size = preprocessing.input_size
    condition = {
        **reference.condition,
        "data": data,
        "input_size": size,
        "num_images": len(pictures),
        "pictures_hash": hash_pictures(pictures),
        "picture": picture.name if picture else None,
    }
    names = list(dict.fromkeys(layers)) if layers else find_blocks(reference.model, size)
    done = {record.subject for record in known if record.suite == "redundancy" and record.condition == condition}
    names = [name for name in names if name not in done]
    if not names:
        return
    grids = _save_grids(reference.model, names, picture, folder, preprocessing) if picture else {}
    moments = _gather_moments(reference.model, names, pictures, preprocessing, num_workers, track)
    for name, found in moments.items():
        values = {"stage": find_stage(size, found.height), **found.values(name)}
        if grid := grids.get(name):
            values |= {"num_shown": grid[1]}
        attachments = {"grid": grid[0]} if grid else {}
        yield create_record("redundancy", "study", name, condition=condition, values=values, attachments=attachments)


@torch.no_grad()
def find_blocks(model: nn.Module, input_size: int) -> list[str]:
    """Return the first block of each stage, 1 to 4, whose output is what the next block convolves.

    A block is an innermost module, other than a plain sequence, of several layers of which one is a convolution of at
    least 3 x 3: the residual block of a ResNet (its output is taken after the activation), the FasterNet block.

    Raises:
        ValueError: There is none, as in networks without blocks.
    """
    found = [name for name, module in model.named_modules() if name and _is_block(module)]
    found = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    first: dict[int, str] = {}
    with capture(model, found) as maps:
        model(torch.zeros(1, 3, input_size, input_size, device=next(model.parameters()).device))
    for name in found:
        if name in maps and isinstance(output := maps[name][1], Tensor) and output.dim() == 4:
            first.setdefault(find_stage(input_size, output.shape[2]), name)
    stages = [stage for stage in sorted(first) if 1 <= stage <= 4]
    if not stages:
        raise ValueError("layers must be given: the network has no blocks to take by default")
    return [first[stage] for stage in stages]


def _is_block(module: nn.Module) -> bool:
    weighted = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear | PConv2d)]
    sees_neighbours = any(part.weight.dim() == 4 and part.weight.shape[-1] >= 3 for part in weighted)
    return not isinstance(module, nn.Sequential | nn.ModuleList) and len(weighted) >= 2 and sees_neighbours


class Moments:
    """Sums over positions and pictures from which the covariance of C channels follows; maps are not kept.

    Values are taken relative to the first one of each channel: sums stay small, and a constant channel exactly zero.
    """

    def __init__(self) -> None:
        self.num_positions = self.height = self.width = 0

    @torch.no_grad()
    def add(self, maps: Tensor) -> None:
        """Add maps (N, C, H, W)."""
        if not self.num_positions:
            C = maps.shape[1]
            self.height, self.width = maps.shape[2:]
            self._origin = maps[0, :, :1, 0].double()  # (C, 1)
            self._sums, self._products = maps.new_zeros(C).double(), maps.new_zeros(C, C).double()
        for picture in maps:
            x = picture.double().flatten(1) - self._origin  # (C, H * W)
            self._sums += x.sum(1)
            self._products.addmm_(x, x.T)
            self.num_positions += x.shape[1]

    def values(self, name: str) -> dict[str, Any]:
        """Return what the record of layer ``name`` says.

        Raises:
            ValueError: Fewer than two channels vary.
        """
        mean = (self._sums / self.num_positions).cpu().numpy()
        covariance = (self._products / self.num_positions).cpu().numpy() - np.outer(mean, mean)
        mean_square = covariance.diagonal() + (mean + self._origin[:, 0].cpu().numpy()) ** 2
        alive = covariance.diagonal() > _MIN_RELATIVE_VARIANCE * mean_square
        if (num_alive := alive.sum()) < 2:
            where = f"{self.num_positions} positions of the pictures"
            raise ValueError(f"layer {name!r} has {num_alive} channels that vary over {where}, and two are needed")
        covariance[~alive] = covariance[:, ~alive] = 0
        return {
            "channels": len(covariance),
            "height": self.height,
            "width": self.width,
            "num_positions": self.num_positions,
            "num_dead": int((~alive).sum()),
            **_correlate(covariance[np.ix_(alive, alive)]),
            **_explain(covariance),
        }


def _correlate(covariance: Array) -> dict[str, float]:
    """Return mean and tail of the absolute correlations of channels that vary."""
    deviation = np.sqrt(covariance.diagonal())
    correlation = np.abs(covariance) / np.outer(deviation, deviation)
    np.fill_diagonal(correlation, 0)
    num_pairs = correlation.size - len(correlation)
    return {
        "mean_abs_correlation": float(correlation.sum() / num_pairs),
        "redundant_share": float((correlation.max(1) > MIN_CORRELATION).mean()),
    }


def _explain(covariance: Array) -> dict[str, float]:
    """Return the effective rank, and which share of all variance a quarter of the channels has or explains linearly."""
    C, variances = len(covariance), covariance.diagonal()
    q = count_partial_channels(C, PARTIAL_RATIO)
    eigenvalues = np.linalg.eigvalsh(covariance).clip(0)[::-1]
    shares = eigenvalues / eigenvalues.sum()
    shares_not_0 = shares[shares > 0]
    rng = np.random.default_rng(0)
    draws = [_explain_by(covariance, rng.permutation(C)[:q]) for _ in range(_NUM_DRAWS)]
    return {
        "effective_rank": float(np.exp(-(shares_not_0 * np.log(shares_not_0)).sum())),
        "first_quarter_variance_share": float(variances[:q].sum() / variances.sum()),
        "first_quarter_explained_share": _explain_by(covariance, np.arange(q)),
        "best_quarter_explained_share": float(shares[:q].sum()),
        "random_quarter_explained_share": float(np.mean(draws)),
    }


def _explain_by(covariance: Array, chosen: npt.NDArray[np.int64]) -> float:
    """Return the share of all variance that a linear function of the chosen channels explains."""
    eigenvalues, vectors = np.linalg.eigh(covariance[np.ix_(chosen, chosen)])
    kept = eigenvalues > _MIN_RELATIVE_EIGENVALUE * eigenvalues[-1]
    if eigenvalues[-1] <= 0:
        return 0.0
    projected = covariance[:, chosen] @ (vectors[:, kept] / np.sqrt(eigenvalues[kept]))  # (C, rank)
    return float((projected**2).sum() / covariance.trace())


@torch.no_grad()
def _gather_moments(
    model: nn.Module,
    names: Sequence[str],
    pictures: Sequence[Path],
    preprocessing: Preprocessing,
    num_workers: int,
    track: Track,
) -> dict[str, Moments]:
    device = next(model.parameters()).device
    moments = {name: Moments() for name in names}
    loader = load_pictures(pictures, preprocessing, batch_size=_BATCH_SIZE, num_workers=num_workers)
    with capture(model, names) as maps:
        for images in track(loader, len(loader), "pictures"):
            model(images.to(device))
            for name in names:
                moments[name].add(_take(maps, name))
    return moments


def _take(maps: Mapping[str, tuple[Any, Any]], name: str) -> Tensor:
    output = maps[name][1] if name in maps else None
    if not isinstance(output, Tensor) or output.dim() != 4:
        got = f"the shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"layer {name!r} must return maps (N, C, H, W), not {got if name in maps else 'nothing'}")
    return output


@torch.no_grad()
def _save_grids(
    model: nn.Module, names: Sequence[str], picture: Path, folder: Path, preprocessing: Preprocessing
) -> dict[str, tuple[str, int]]:
    """Draw the maps of one picture; return for each layer the path relative to ``folder``, and how many are shown."""
    found = {}
    (images,) = load_pictures([picture], preprocessing, batch_size=1)
    shown = _show_input(images[0], preprocessing)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    with capture(model, names) as maps:
        model(images.to(next(model.parameters()).device))
    for name in names:
        path = f"pictures/{re.sub(r'[^A-Za-z0-9_.-]', '_', f'{picture.stem}-{name}')}.png"
        grid, num_shown = draw_grid(_take(maps, name)[0].cpu().numpy(), shown)
        grid.save(folder / path, optimize=True)
        found[name] = (path, num_shown)
    return found


def _show_input(image: Tensor, preprocessing: Preprocessing) -> Image.Image:
    """Undo the normalisation of an input (3, S, S): what the network sees, as a picture."""
    mean, std = (np.asarray(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    pixels = (image.numpy() * std + mean).clip(0, 1) * 255
    return Image.fromarray(pixels.round().astype(np.uint8).transpose(1, 2, 0))


def draw_grid(maps: npt.NDArray[np.floating[Any]], picture: Image.Image) -> tuple[Image.Image, int]:
    """Draw channel maps as a grid in grey, each from its own minimum to its own maximum, the picture top left.

    Args:
        maps: (C, H, W). The first 252 are drawn; a constant one is black.
        picture: What they were computed from.

    Returns:
        A picture of mode ``P``, at most 1056 pixels wide and high, and how many maps it shows.
    """
    small = [_shrink(each) for each in maps[: _COLUMNS * _MAX_ROWS - _PICTURE_CELLS**2]]
    height, width = small[0].shape
    zoom = max(1, _CELL // max(height, width))
    height, width = zoom * height + 2, zoom * width + 2  # with a separator around
    places = [
        (row, column)
        for row in range(_MAX_ROWS)
        for column in range(_COLUMNS)
        if row >= _PICTURE_CELLS or column >= _PICTURE_CELLS
    ][: len(small)]
    num_rows = max(_PICTURE_CELLS, 1 + max(row for row, _ in places))
    grid = np.full((num_rows * height, _COLUMNS * width), _GREYS - 1, np.uint8)  # white
    for (row, column), each in zip(places, small, strict=True):
        cell = np.pad(each.repeat(zoom, 0).repeat(zoom, 1), 1, constant_values=_GREYS)
        grid[row * height : (row + 1) * height, column * width : (column + 1) * width] = cell
    box = (_PICTURE_CELLS * width - 2, _PICTURE_CELLS * height - 2)
    coloured = picture.resize(box, Image.Resampling.BICUBIC).quantize(256 - _GREYS - 1)
    grid[: box[1] + 2, : box[0] + 2] = np.pad(np.asarray(coloured) + _GREYS + 1, 1, constant_values=_GREYS)
    greys = np.linspace(0, 255, _GREYS).round().astype(int).repeat(3).tolist()
    result = Image.fromarray(grid).convert("P")
    result.putpalette([*greys, *_SEPARATOR, *(coloured.getpalette() or [])])
    return result, len(small)


def _shrink(each: npt.NDArray[np.floating[Any]]) -> Pixels:
    """Scale a map (H, W) to the grey levels, from its minimum to its maximum; a large one is averaged to a cell."""
    low, high = float(each.min()), float(each.max())
    scaled = (each - low) / (high - low) if high > low else np.zeros_like(each)
    image = Image.fromarray(scaled.astype(np.float32))
    image.thumbnail((_CELL, _CELL), Image.Resampling.BOX)
    return (np.asarray(image).clip(0, 1) * (_GREYS - 1)).round().astype(np.uint8)
