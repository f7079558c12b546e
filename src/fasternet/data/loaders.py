"""Batches of pictures: order and augmentation follow from seed, epoch and picture, whatever process loads them.

A step of the optimizer takes ``batch_size`` pictures. It is cut into parts of equal size: each of ``world_size``
processes takes ``accumulate`` of them, one after the other. What a part holds does not depend on who takes it.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from fasternet.data.datasets import ImageDataset
from fasternet.data.images import ImageError
from fasternet.environment import describe_machine

if TYPE_CHECKING:
    from fasternet.data.coco_dataset import CocoDataset

OnError = Callable[[ImageError], object]
Merge = Callable[[list[Any]], Any]  # of a batch's pictures with their labels or targets
MAX_ATTEMPTS = 16  # to find a picture in the place of one that cannot be read


class TrainingLoader:
    """Shuffled and augmented batches of one process, epoch by epoch; the processes that load live on between epochs.

    Args:
        dataset: Pictures with a transform that makes tensors of equal shape, or what ``merge`` takes.
        batch_size: Pictures of a step, over all processes.
        num_workers: Processes that load pictures, at most one per processor core; 0 loads in this one.
        seed: Decides order and augmentation, together with the epoch.
        rank: Number of this process.
        world_size: How many processes share a step.
        accumulate: Parts of a step that each process takes.
        on_error: Called with the error of each picture that cannot be read; the next one takes its place. None: the
            first such picture raises its error.
        merge: Makes a batch of its pictures; must be picklable.

    Attributes:
        num_steps: Steps of an epoch; a last one that is not full is left out, unless it is the only one.

    Raises:
        ValueError: The pictures of a step cannot be cut into that many parts.
    """

    def __init__(
        self,
        dataset: ImageDataset | CocoDataset,
        batch_size: int,
        *,
        num_workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        on_error: OnError | None = None,
        merge: Merge = default_collate,
    ) -> None:
        self._num_images = len(dataset)
        self._dataset, self._seed = dataset, seed
        self._parts = range(rank * accumulate, (rank + 1) * accumulate)
        self._part_size = divide_batch(min(batch_size, len(dataset)), batch_size, world_size * accumulate)
        self._step_size = self._part_size * world_size * accumulate
        self.num_steps = max(1, len(dataset) // batch_size)
        self._plan: list[list[tuple[int, int]]] = []  # of the epoch that is loaded: (epoch, picture) by batch
        self._on_error = on_error
        num_workers = min(num_workers, describe_machine().cores)
        self._loader = DataLoader[Any](
            _SeededDataset(dataset, str(seed), skip=on_error is not None),
            batch_sampler=self._plan,
            collate_fn=partial(collate, merge=merge),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # without one, each epoch would draw from PyTorch's own
            worker_init_fn=obey_parent_alone,
        )

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, Any]]:
        """Yield this process's parts, (pictures (n, 3, S, S), labels (n,)), from step ``start`` of an epoch on."""
        order = self._shuffle(epoch)
        steps = range(start, self.num_steps)
        self._plan[:] = [
            [(epoch, i) for i in self._select(order, step, part)] for step in steps for part in self._parts
        ]
        yield from watch_errors(self._loader, self._on_error, required=True)

    def names(self, epoch: int, step: int) -> list[str]:
        """Return the names of the pictures that this process takes in a step."""
        order = self._shuffle(epoch)
        return [self._dataset.paths[i].as_posix() for part in self._parts for i in self._select(order, step, part)]

    def describe_resume(self, start: int) -> str | None:
        """Return None: an epoch goes on at any step exactly."""
        return None

    def _shuffle(self, epoch: int) -> list[int]:
        return random.Random(f"{self._seed} {epoch}").sample(range(self._num_images), self._num_images)

    def _select(self, order: Sequence[int], step: int, part: int) -> Sequence[int]:
        first = step * self._step_size + part * self._part_size
        return order[first : first + self._part_size]


def create_loader(
    dataset: ImageDataset | CocoDataset,
    batch_size: int,
    *,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_error: OnError | None = None,
    merge: Merge = default_collate,
) -> DataLoader[Any]:
    """Make a loader for evaluation: every ``world_size``-th picture from number ``rank`` on, in order.

    Args:
        dataset: Pictures with a transform that makes tensors of equal shape, or what ``merge`` takes.
        batch_size: Pictures per batch.
        num_workers: Processes that load pictures, at most one per processor core; 0 loads in this one.
        rank: Number of this process.
        world_size: How many processes share the pictures.
        on_error: Called with the error of each picture that cannot be read, which is then left out. None: the
            first such picture raises its error.
        merge: Makes a batch of its pictures; must be picklable.

    Returns:
        A loader of (pictures (N, 3, S, S), labels (N,)), or of what ``merge`` makes.

    Raises:
        ValueError: ``batch_size`` or ``num_workers`` is too small.
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(f"batch_size={batch_size} must be at least 1, num_workers={num_workers} at least 0")
    return _Loader(
        _SeededDataset(dataset, "evaluation"),
        on_error,
        batch_size=batch_size,
        sampler=[(0, index) for index in range(rank, len(dataset), world_size)],
        collate_fn=partial(collate, merge=merge),
        num_workers=min(num_workers, describe_machine().cores),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=obey_parent_alone,
    )


def divide_batch(num_images: int, batch_size: int, num_parts: int) -> int:
    """Return the pictures of each of ``num_parts`` equal parts of a step.

    Raises:
        ValueError: The batch cannot be cut so, or there are too few pictures.
    """
    if batch_size % num_parts:
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of the {num_parts} parts (processes x accumulate) of a step"
        )
    if num_images < num_parts:
        raise ValueError(f"{num_images} training pictures are too few for {num_parts} parts (processes x accumulate)")
    return num_images // num_parts


def watch_errors(batches: Any, on_error: OnError | None, *, required: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Take the errors out of what ``collate`` made, and raise or report them; name a worker that died.

    Args:
        batches: Of (batch or None, errors).
        on_error: None raises the first error.
        required: Raise where no picture of a batch is left; else such a batch is left out.
    """
    with explain_dead_worker():
        for batch, errors in batches:
            for error in errors:
                if on_error is None:
                    raise error
                on_error(error)
            if batch is not None:
                yield batch
            elif required:
                raise errors[-1]


def obey_parent_alone(worker: int) -> None:
    """Let a process that loads pictures survive what its whole group is sent, so that the main process can save.

    Ctrl-C, ``torchrun`` and SLURM send their signals to all processes; only the main one is to decide.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def explain_dead_worker() -> Iterator[None]:
    """Say in one sentence that a process which loads pictures died.

    Raises:
        OSError: It did; PyTorch raises its error at any moment, wherever the main process is.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        # What a process that is gone has loaded can no longer be fetched from it: its socket is closed, or removed.
        lost = isinstance(error, EOFError) or (isinstance(error, OSError) and error.errno and error.filename is None)
        if not lost and "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split(". ")[0].split())
        raise OSError(
            f"a process that loads pictures died ({reason}): is memory short? fewer num_workers need less"
        ) from None


def collate(samples: Sequence[Any], *, merge: Merge = default_collate) -> tuple[Any, list[ImageError]]:
    """Return the batch, or None where no picture is left, and the errors of those that could not be read."""
    errors = [error for _, found in samples for error in found]
    read = [sample for sample, _ in samples if sample is not None]
    return merge(read) if read else None, errors


@contextlib.contextmanager
def seeded(seed: str) -> Iterator[None]:
    """Seed Python, NumPy and PyTorch (on the CPU); outside of a loader's process, give them their states back after."""
    # timm's RandAugment draws from NumPy's global state.
    states = None
    if get_worker_info() is None:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(random.getrandbits(32))  # noqa: NPY002
    torch.default_generator.manual_seed(random.getrandbits(63))
    try:
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_rng_state(states[2])


class _SeededDataset(Dataset[Any]):
    """Seeds all random states anew for each picture, as transforms draw from several; returns errors as values.

    An item is (sample, errors). With ``skip`` the next picture that can be read stands in for one that cannot.
    """

    def __init__(self, dataset: ImageDataset | CocoDataset, seed: str, *, skip: bool = False) -> None:
        self.dataset, self.seed, self.skip = dataset, seed, skip

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        errors: list[ImageError] = []
        for attempt in range(min(MAX_ATTEMPTS, len(self.dataset)) if self.skip else 1):
            try:
                with seeded(f"{self.seed} {epoch} {index}"):
                    return self.dataset[(index + attempt) % len(self.dataset)], errors
            except ImageError as error:
                errors.append(error)
        return None, errors


class _Loader(DataLoader[Any]):
    """Reports the errors of pictures as ``watch_errors`` does: PyTorch would put a worker's traceback into them."""

    def __init__(self, dataset: Dataset[Any], on_error: OnError | None, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.on_error = on_error

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return watch_errors(super().__iter__(), self.on_error)
