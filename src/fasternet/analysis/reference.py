"""The network that a study looks at, its convolutions in the order that they run, and its maps as pictures pass.

Legend: N pictures, S their side; a stage is named by its output stride: 4, 8, 16, 32 are stages 1 to 4, finer is 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fasternet.data.images import ImageError, load_image
from fasternet.data.loaders import collate, obey_parent_alone, watch_errors
from fasternet.data.transforms import Transform, create_transform
from fasternet.environment import describe_machine
from fasternet.models.checkpoint import Checkpoint, Preprocessing
from fasternet.models.registry import create_model
from fasternet.ops import PConv2d
from fasternet.records import load_records
from fasternet.rivals import is_fasternet, load_network, load_rival
from fasternet.train.classification import train
from fasternet.train.loop import Hooks
from fasternet.train.recipes import RECIPES

TRAINED_NETWORK = "resnet18"  # where published weights are out of reach; at 64 px it learns in minutes on two cores
TRAINED_RECIPE = dataclasses.replace(RECIPES["small"], input_size=64)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A trained network that a study looks at.

    Attributes:
        model: The network, float32, in evaluation mode, without gradients.
        name: Its name: ``ResNet50``, ``resnet18``, ``fasternet_t0``.
        weights: ``published``, ``published (<tag>)``, ``trained here on <data>``, or the name of the checkpoint.
        preprocessing: How a picture becomes its input.
    """

    model: nn.Module
    name: str
    weights: str
    preprocessing: Preprocessing

    @functools.cached_property
    def weights_hash(self) -> str:
        """Eight hexadecimal digits that tell networks of one name apart: of all names and values of the weights."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:8]

    @property
    def condition(self) -> dict[str, Any]:
        """What the records of a study say of it."""
        return {"model": self.name, "weights": self.weights, "weights_hash": self.weights_hash}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution of a network.

    Attributes:
        name: Path of the module.
        module: The convolution.
        stage: 1 to 4 by the stride of its output; 0 where that is finer than 4.
        height: Of its output, in pixels.
        width: Likewise.
    """

    name: str
    module: nn.Conv2d | PConv2d
    stage: int
    height: int
    width: int


def load_reference(
    name: str,
    *,
    checkpoint: Path | None = None,
    data: str | None = None,
    folder: Path | None = None,
    hooks: Hooks | None = None,
) -> Reference:
    """Load the network that a study looks at.

    Args:
        name: A FasterNet, a rival by the paper's name, or timm's name.
        checkpoint: A model or run folder; its network is taken, whatever ``name`` is.
        data: Where the published weights of ``name`` cannot be downloaded, a ``resnet18`` is trained on these pictures,
            in folders of classes as ``fasternet train`` takes them. None trains nothing.
        folder: Where that training has its run folder; one that was interrupted there goes on, one that ended is taken.
        hooks: Take sentences about which network it is, and the progress of that training.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The name is not known, or the checkpoint is damaged.
        ConnectionError: The weights cannot be downloaded, and there is nothing to train on.
    """
    hooks = hooks or Hooks()
    if checkpoint is not None:
        found = checkpoint.resolve()
        is_part = found.name in ("best", "last")  # of a run folder
        return _refer(load_network(checkpoint), f"{found.parent.name}/{found.name}" if is_part else found.name, hooks)
    hooks.say(f"looking for the published weights of {name}")
    try:
        published = _load_published(name)
    except ConnectionError as error:
        if data is None or folder is None:
            raise ConnectionError(f"{error}, or name a trained network with --checkpoint") from None
        hooks.say(f"{error}; a {TRAINED_NETWORK} that is trained on {data} stands in, its run folder is {folder}")
        return _train(data, folder, hooks)
    tag = name.partition(".")[2]
    return _refer(published, f"published ({tag})" if tag else "published", hooks)


def _load_published(name: str) -> Checkpoint:
    if is_fasternet(name):
        model = create_model(name, pretrained=True).eval()
        return Checkpoint(name=name, model=model, class_names=None, preprocessing=Preprocessing())
    return load_rival(name)


def _train(data: str, folder: Path, hooks: Hooks) -> Reference:
    log = folder / "log.jsonl"
    if not (log.is_file() and any(record.kind == "evaluation" for record in load_records(log))):
        resume = (folder / "recipe.yaml").is_file()
        train(TRAINED_NETWORK, data, folder, recipe=TRAINED_RECIPE, resume=resume, hooks=hooks)
    return _refer(load_network(folder), f"trained here on {Path(data).resolve().name}", hooks)


def _refer(checkpoint: Checkpoint, weights: str, hooks: Hooks) -> Reference:
    hooks.say(f"reference: {checkpoint.name}, weights: {weights}")
    model = checkpoint.model.float().eval().requires_grad_(False)
    return Reference(model, checkpoint.name, weights, checkpoint.preprocessing)


@torch.no_grad()
def list_layers(model: nn.Module, input_size: int) -> list[Layer]:
    """List the convolutions of a network, PConv among them, in the order that they first run.

    Args:
        model: In evaluation mode.
        input_size: S.
    """
    found: dict[str, Layer] = {}
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | PConv2d)}

    def note(module: Any, _: object, output: Tensor) -> None:
        height, width = output.shape[2:]
        stage = find_stage(input_size, height)
        found.setdefault(names[module], Layer(names[module], module, stage, height, width))

    hooks = [module.register_forward_hook(note) for module in names]
    try:
        parameter = next(model.parameters())
        model(torch.zeros(1, 3, input_size, input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def find_stage(input_size: int, height: int) -> int:
    """Return the stage, 1 to 4, whose output stride gives maps of this height; 0 for a finer one."""
    return max(0, round(math.log2(input_size / height)) - 1)


def find_first_convs(layers: Iterable[Layer]) -> list[Layer]:
    """Return of each stage, 1 to 4, the first regular 3x3 convolution with stride 1 and "same" padding.

    The paper takes the first 3x3 convolution; in stages 2 to 4 of a residual network that one has stride 2, which
    PConv has not.
    """
    first: dict[int, Layer] = {}
    for layer in layers:
        if 1 <= layer.stage <= 4 and _is_plain(layer.module):
            first.setdefault(layer.stage, layer)
    return [first[stage] for stage in sorted(first)]


def _is_plain(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.dilation, module.groups) == ((3, 3), (1, 1), (1, 1), 1)
        and module.padding in ((1, 1), "same")
    )


def find_modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return modules of a network by their paths.

    Raises:
        ValueError: It has no such module; near ones are offered.
    """
    known = dict(model.named_modules())
    for name in names:
        if not name or name not in known:
            near = difflib.get_close_matches(name, known) or [path for path in known if path][:5]
            raise ValueError(f"layer {name!r} is not a module of the network; near: {', '.join(near)}")
    return {name: known[name] for name in names}


@contextlib.contextmanager
def capture(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Catch what enters and leaves modules inside the ``with`` block.

    Yields:
        A dictionary, filled anew by each forward pass: module's path to (first input, a copy of its output). What is
        no tensor, such as the pair that an attention returns, stands there as it is.

    Raises:
        ValueError: The network has no such module.
    """
    maps: dict[str, tuple[Any, Any]] = {}

    def catch(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = next(iter((*args, *kwargs.values())), None)
            # An activation behind may write in place.
            maps[name] = (x, output.clone() if isinstance(output, Tensor) else output)

        return note

    hooks = [
        module.register_forward_hook(catch(name), with_kwargs=True)
        for name, module in find_modules(model, names).items()
    ]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


class _Pictures(Dataset[Any]):
    """Returns errors as values, as ``watch_errors`` takes them: PyTorch would put a worker's traceback into them."""

    def __init__(self, paths: Sequence[Path], transform: Transform) -> None:
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor | None, list[ImageError]]:
        try:
            return self._transform(load_image(self._paths[index])), []
        except ImageError as error:
            return None, [error]


class _Loader(DataLoader[Tensor]):
    """Raises the first error of a picture."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return watch_errors(super().__iter__(), None)


def hash_pictures(paths: Iterable[Path]) -> str:
    """Return eight hexadecimal digits that tell drawn pictures apart: of their names with those of their folders."""
    names = "\n".join("/".join(path.absolute().parts[-2:]) for path in paths)
    return hashlib.sha256(names.encode()).hexdigest()[:8]


def load_pictures(
    paths: Sequence[Path],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    num_workers: int = 0,
    shuffle_seed: int | None = None,
) -> DataLoader[Tensor]:
    """Make a loader of pictures as a network evaluates them.

    Args:
        paths: Picture files; one that cannot be read raises ``ImageError`` when its batch comes.
        preprocessing: The network's; ``dataclasses.replace(..., input_size=S)`` for another size.
        batch_size: N.
        num_workers: Processes that load pictures, at most one per processor core; 0 loads in this one.
        shuffle_seed: Decides the order, which differs from pass to pass; None keeps that of ``paths``.

    Returns:
        A loader of batches (N, 3, S, S), float32; the last one may be smaller.
    """
    num_workers = min(num_workers, describe_machine().cores)
    return _Loader(
        _Pictures(paths, create_transform(preprocessing, training=False)),
        batch_size=batch_size,
        shuffle=shuffle_seed is not None,
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(shuffle_seed or 0),
        persistent_workers=num_workers > 0,
        worker_init_fn=obey_parent_alone,
    )
