"""Batches of one epoch: order and augmentation follow from seed, epoch and picture, whatever loads them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from fasternet.data.datasets import ImageDataset
from fasternet.data.images import ImageError
from fasternet.environment import describe_machine


def create_loader(
    dataset: ImageDataset,
    batch_size: int,
    *,
    training: bool,
    num_workers: int = 0,
    seed: int = 0,
    epoch: int = 0,
) -> DataLoader[Any]:
    """Make a loader for one epoch; it leaves the process's random states as they are.

    Args:
        dataset: Pictures with a transform that makes tensors of equal shape.
        batch_size: Pictures per batch.
        training: Shuffle, augment reproducibly, and leave out a last batch that is not full (unless it is the
            only one); else every picture in order.
        num_workers: Processes that load pictures, at most one per processor core; 0 loads in this one.
        seed: Decides order and augmentation, together with ``epoch``.
        epoch: Number of the epoch.

    Returns:
        A loader of (pictures (N, 3, S, S), labels (N,)).

    Raises:
        ValueError: ``batch_size`` or ``num_workers`` is too small.
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(f"batch_size={batch_size} must be at least 1, num_workers={num_workers} at least 0")
    order: Sequence[int] = range(len(dataset))
    if training:
        order = random.Random(f"{seed} {epoch}").sample(order, len(order))
    return _Loader(
        _SeededDataset(dataset, f"{seed} {epoch}"),
        batch_size=batch_size,
        sampler=order,
        collate_fn=_collate,
        drop_last=training and len(dataset) >= batch_size,
        num_workers=min(num_workers, describe_machine().cores),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # without one, each epoch would draw from PyTorch's own
    )


class _SeededDataset(Dataset[Any]):
    """Seeds all random states anew for each picture, as transforms draw from several; returns errors as values."""

    def __init__(self, dataset: ImageDataset, seed: str) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, index: int) -> Any:
        try:
            with _seeded(f"{self.seed} {index}"):
                return self.dataset[index]
        except ImageError as error:
            return error


class _Loader(DataLoader[Any]):
    """Raises the error of a worker as it was: PyTorch would put the worker's traceback into its message."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, ImageError):
                raise batch
            yield batch


def _collate(samples: list[Any]) -> Any:
    errors = (sample for sample in samples if isinstance(sample, ImageError))
    return next(errors, None) or default_collate(samples)


@contextlib.contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Seed Python, NumPy and PyTorch (on the CPU), and give them their states back in the end."""
    # timm's RandAugment draws from NumPy's global state.
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(random.getrandbits(32))  # noqa: NPY002
    torch.default_generator.manual_seed(random.getrandbits(63))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
