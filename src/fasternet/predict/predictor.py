"""Predicts the class of pictures: files in, (label, probability) out, with the transform that the weights ask for.

Legend: N = pictures in a batch, K = classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fasternet.data.images import ImageError, find_images, load_image
from fasternet.data.transforms import Transform, create_transform
from fasternet.deploy import Runtime, create_runtime
from fasternet.models.checkpoint import Checkpoint, Preprocessing
from fasternet.models.convert import identify_variant, read_state
from fasternet.models.registry import create_model
from fasternet.rivals import is_fasternet, load_network, load_rival, resolve_network


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a picture.

    Attributes:
        path: The picture.
        top: (label, probability) of the best classes, best first.
    """

    path: Path
    top: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Classifies picture files; ``Predictor.from_checkpoint`` makes one that is ready.

    Attributes:
        logits_fn: From pictures (N, 3, S, S) to logits (N, K).
        transform: From a picture to a tensor (3, S, S).
        class_names: The K labels.
        batch_size: Pictures that go through the network at once.
        fingerprint: A hash of weights, classes and preprocessing, and the precision where it is not fp32.
        runtime: What runs the network, where ``from_checkpoint`` made it; its ``reasons`` say why.
    """

    logits_fn: Callable[[Tensor], Tensor]
    transform: Transform
    class_names: Sequence[str]
    batch_size: int = 16
    fingerprint: str = ""
    runtime: Runtime | None = None

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Path | Checkpoint,
        *,
        engine: str = "eager",
        precision: str = "fp32",
        batch_size: int = 16,
        device: torch.device | str = "cpu",
    ) -> Predictor:
        """Make a predictor of trained weights, optimised for inference.

        Args:
            checkpoint: A model folder or a run folder, or what ``load_network`` or ``load_weights`` returned.
            engine: See ``deploy.create_runtime``.
            precision: See ``deploy.create_runtime``.
            batch_size: Pictures that go through the network at once.
            device: Where the network computes.

        Raises:
            FileNotFoundError: There is no such checkpoint.
            ValueError: The checkpoint is damaged, ``batch_size`` is no positive number, or the engine cannot run here.
            ModuleNotFoundError: The engine's package is missing.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = load_network(Path(checkpoint))
        network = create_inference_model(
            checkpoint, batch_size=batch_size, engine=engine, precision=precision, device=device
        )
        return cls(
            lambda images: network(images.to(device)).cpu(),
            create_transform(checkpoint.preprocessing, training=False),
            checkpoint.class_names or _name_classes(checkpoint.num_classes),
            batch_size,
            _hash_checkpoint(checkpoint) + (f" {precision}" if precision != "fp32" else ""),
            network,
        )

    def __call__(
        self,
        images: Iterable[Path | str],
        *,
        top_k: int = 5,
        on_error: Callable[[ImageError], object] | None = None,
    ) -> list[Prediction]:
        """Classify pictures.

        Args:
            images: Picture files, and folders, which stand for the pictures in them and below them.
            top_k: Classes to report for each picture; at most all.
            on_error: Called with the error of each picture that cannot be read, which is then left out. None: the
                first such picture raises its error.

        Returns:
            The predictions, in the order of the pictures.

        Raises:
            ImageError: A picture cannot be read, and there is no ``on_error``.
            FileNotFoundError: A folder holds no picture.
            ValueError: ``top_k`` is no positive number, or the network's outputs are not finite.
        """
        return list(self.stream(find_images(map(Path, images)), top_k=top_k, on_error=on_error))

    def stream(
        self,
        paths: Iterable[Path],
        *,
        top_k: int = 5,
        on_error: Callable[[ImageError], object] | None = None,
    ) -> Iterator[Prediction]:
        """Yield the predictions for picture files as they come, batch by batch; see ``__call__``."""
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1")
        readable = self._read(paths, on_error)
        while batch := list(itertools.islice(readable, self.batch_size)):
            images = torch.stack([image for _, image in batch])  # (N, 3, S, S)
            for (path, _), top in zip(batch, self.classify(images, top_k), strict=True):
                yield Prediction(path, top)

    def _read(
        self, paths: Iterable[Path], on_error: Callable[[ImageError], object] | None
    ) -> Iterator[tuple[Path, Tensor]]:
        for path in paths:
            try:
                yield path, self.transform(load_image(path))
            except ImageError as error:
                if on_error is None:
                    raise
                on_error(error)

    @torch.inference_mode()
    def classify(self, images: Tensor, top_k: int) -> list[tuple[tuple[str, float], ...]]:
        """Return the (label, probability) of the best classes of each transformed picture, (N, 3, S, S)."""
        logits = torch.cat([self.logits_fn(batch).float() for batch in torch.split(images, self.batch_size)])  # (N, K)
        if not logits.isfinite().all():
            raise ValueError("the network's outputs are not finite: its weights are damaged or did not converge")
        best = logits.softmax(dim=1).topk(min(top_k, logits.shape[1]))
        return [
            tuple((self.class_names[label], probability) for label, probability in zip(*row, strict=True))
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def create_inference_model(
    checkpoint: Checkpoint,
    *,
    batch_size: int = 1,
    engine: str = "eager",
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> Runtime:
    """Make a checkpoint's network ready to run fast.

    Args:
        checkpoint: Of any network; it is not modified.
        batch_size: Pictures that a call takes at most.
        engine: See ``deploy.create_runtime``.
        precision: See ``deploy.create_runtime``.
        device: Where the network computes.

    Returns:
        From pictures of the checkpoint's size, (N, C, S, S), to logits (N, K).

    Raises:
        ValueError: The engine is not known, or cannot run here.
        ModuleNotFoundError: Its package is missing.
    """
    size, channels = checkpoint.preprocessing.input_size, len(checkpoint.preprocessing.mean)
    example = torch.zeros(batch_size, channels, size, size, device=device)
    return create_runtime(checkpoint.model, example, engine=engine, precision=precision)


def load_weights(model: str | None = None, checkpoint: Path | None = None) -> Checkpoint:
    """Load trained weights of any kind; never random ones.

    Args:
        model: Name of the network: a FasterNet, a rival, or timm's. Alone, it stands for its published weights.
        checkpoint: A model folder, a run folder, or a weights file: of a FasterNet in any format that
            ``create_model`` reads, of another network with its own keys.

    Returns:
        The network in evaluation mode. A weights file says nothing of classes and transform: assumed is the paper's
        evaluation at 224 pixels, for other networks that of the library that keeps them.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: Neither is given, they do not agree, or the checkpoint is damaged.
        ConnectionError: The published weights cannot be downloaded.
    """
    if checkpoint is not None and checkpoint.is_dir():
        found = load_network(checkpoint)
        if model is not None and _spell(model) != found.name:
            raise ValueError(f"checkpoint {checkpoint} holds {found.name}, not {model}")
        return found
    if checkpoint is not None and model is None:
        state = read_state(checkpoint)
        try:
            model = identify_variant(state)
        except ValueError as error:
            raise ValueError(f"{checkpoint}: {error}") from None
    if model is None:
        raise ValueError("name a network, for its published weights, or a checkpoint")
    if not is_fasternet(model):
        return load_rival(model, checkpoint)
    network = create_model(model, pretrained=checkpoint is None, checkpoint_path=checkpoint)
    return Checkpoint(name=model, model=network.eval(), class_names=None, preprocessing=Preprocessing())


def _spell(name: str) -> str:
    """Return the name that checkpoints bear for a name that users write."""
    return name.partition(".")[0] if is_fasternet(name) else resolve_network(name).name


def _name_classes(num_classes: int) -> Sequence[str]:
    """Return the names of ImageNet-1k for a network of 1000 classes, else the numbers of the classes."""
    from timm.data import ImageNetInfo

    if num_classes == 1000:
        names: list[str] = ImageNetInfo().label_descriptions()
        return names
    return [str(label) for label in range(num_classes)]


def _hash_checkpoint(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256(repr((checkpoint.name, checkpoint.class_names, checkpoint.preprocessing)).encode())
    for tensor in checkpoint.model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
