"""Packed shards as data sets: a stream for training with its loader, validation pictures by number.

Training reads one shard after the other, each in an order of its own; ``shard_files`` describes the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fasternet.data.datasets import SHARDS_FILE, Datasets, ImageDataset
from fasternet.data.images import SHARD_SUFFIX, ImageError, decode_image
from fasternet.data.loaders import OnError, collate, divide_batch, obey_parent_alone, seeded, watch_errors
from fasternet.data.shard_files import (
    Member,
    Shard,
    fetch_shards,
    is_address,
    list_members,
    load_contents,
    number_label,
    open_shard,
    read_member,
)
from fasternet.environment import describe_machine


class ShardStream:
    """The training pictures of packed shards, which ``ShardLoader`` reads one shard after the other.

    Attributes:
        root: The folder or address of the shards.
        shards: The shards.
        class_names: The classes, in the order of the network's outputs.
        transform: Applied to each picture; None leaves it a PIL image.
    """

    def __init__(self, root: str, shards: Sequence[Shard], class_names: Sequence[str]) -> None:
        self.root = root
        self.shards = tuple(shards)
        self.class_names = tuple(class_names)
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return sum(shard.num_images for shard in self.shards)


class ShardDataset(ImageDataset):
    """The pictures of local shards in order, each read from its place in its tar file when it is asked for."""

    def __init__(self, root: Path, shards: Sequence[Shard], class_names: Sequence[str]) -> None:
        places: list[tuple[str, Member]] = []
        for shard in shards:
            with open_shard(str(root), shard) as file:
                places += [(shard.name, member) for member in list_members(file, shard, f"{root}/{shard.name}")]
        labels = [number_label(f"{root}/{name}", member, class_names) for name, member in places]
        super().__init__(root, [Path(member.name) for _, member in places], labels, class_names, images=places)

    def load(self, index: int) -> Image.Image:
        """Return a picture as it is, RGB, without the transform."""
        shard, member = self._place(index)
        return decode_image(self.read(index), self.root / shard / member.name)

    def read(self, index: int) -> bytes:
        """Return the bytes of a picture's file."""
        shard, member = self._place(index)
        with (self.root / shard).open("rb") as file:
            return read_member(file, member)

    def _place(self, index: int) -> tuple[str, Member]:
        assert self._images
        place: tuple[str, Member] = self._images[index]
        return place


class ShardLoader:
    """Batches of one process out of a stream of shards, with the face of ``TrainingLoader``.

    The shards of an epoch are shuffled and dealt to the processes, and by each to its workers, which read them one
    after the other. Where the shards of a worker are short, it begins them anew; where they are long, their rest is
    left out. Order and augmentation follow from seed, epoch and picture, and from the numbers of processes and workers.

    Args:
        dataset: A stream with a transform that makes tensors of equal shape.
        batch_size: Pictures of a step, over all processes.
        num_workers: Processes that load pictures, at most one per processor core and per shard; 0 loads in this one.
        seed: Decides order and augmentation, together with the epoch.
        rank: Number of this process.
        world_size: How many processes share a step.
        accumulate: Parts of a step that each process takes.
        on_error: Called with the error of each picture that cannot be read; the next one takes its place. None: the
            first such picture raises its error.

    Attributes:
        num_steps: Steps of an epoch; a last one that is not full is left out, unless it is the only one.

    Raises:
        ValueError: The pictures of a step cannot be cut into that many parts, or there are fewer shards than processes.
    """

    def __init__(
        self,
        dataset: ShardStream,
        batch_size: int,
        *,
        num_workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        on_error: OnError | None = None,
    ) -> None:
        if len(dataset.shards) < world_size:
            raise ValueError(
                f"{len(dataset.shards)} training shards in {dataset.root} are too few for {world_size} processes, "
                "which take one at least; pack with fewer images_per_shard"
            )
        self.num_steps = max(1, len(dataset) // batch_size)
        self._accumulate, self._on_error = accumulate, on_error
        self._num_workers = min(num_workers, describe_machine().cores, len(dataset.shards) // world_size)
        self._parts = _Parts(
            dataset,
            size=divide_batch(min(batch_size, len(dataset)), batch_size, world_size * accumulate),
            num_lanes=max(1, self._num_workers),
            seed=seed,
            rank=rank,
            world_size=world_size,
            skip=on_error is not None,
        )

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's parts, (pictures (n, 3, S, S), labels (n,)), from step ``start`` of an epoch on."""
        numbers = range(start * self._accumulate, self.num_steps * self._accumulate)
        loader = DataLoader[Any](
            dataclasses.replace(self._parts, epoch=epoch, numbers=numbers),
            batch_size=None,
            num_workers=self._num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # without one, each epoch would draw from PyTorch's own
            worker_init_fn=obey_parent_alone,
        )
        failures: list[Exception] = []
        yield from watch_errors(_take_results(loader, failures), self._on_error, required=True)
        if failures:  # raised here, where nobody takes it for the death of a worker
            raise failures[0]

    def names(self, epoch: int, step: int) -> list[str]:
        """Return the names of the pictures that this process takes in a step; it reads their shards anew."""
        parts = dataclasses.replace(self._parts, epoch=epoch)
        numbers = range(step * self._accumulate, (step + 1) * self._accumulate)
        return [draw.name for n in numbers for draw in itertools.islice(parts.stream(n), parts.size)]

    def describe_resume(self, start: int) -> str | None:
        """Return what holds for an epoch that goes on at a step: it does so exactly if it is dealt as before."""
        if not start:
            return None
        return (
            f"shards go on exactly where they stopped if {self._parts.world_size} processes with {self._num_workers} "
            "workers each read them before, too; if not, some pictures of this epoch are seen twice and some not at all"
        )


class _Draw(NamedTuple):
    """A picture of a stream: its name, its seed, and the sample that the n-th attempt to read it gives."""

    name: str
    seed: str
    load: Callable[[int], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class _Parts(IterableDataset[Any]):
    """The parts of steps that a process takes; worker n of N takes every N-th, out of a lane of shards of its own.

    What stops a worker comes as a value, its last: PyTorch would put a traceback into the message.
    """

    dataset: ShardStream
    size: int  # pictures of a part
    num_lanes: int
    seed: int
    rank: int
    world_size: int
    skip: bool  # whether the next picture that can be read stands in for one that cannot
    epoch: int = 0
    numbers: range = range(0)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        numbers = self.numbers[worker.id :: worker.num_workers] if worker else self.numbers
        try:
            with contextlib.closing(self.stream(numbers.start)) as draws:
                for _ in numbers:
                    yield collate([self._load(draw) for draw in itertools.islice(draws, self.size)])
        except (OSError, ValueError) as error:
            yield error

    def stream(self, number: int) -> Generator[_Draw, None, None]:
        """Yield the pictures of a lane from the first one of a part on, without end."""
        shards = self.dataset.shards
        order = random.Random(f"{self.seed} {self.epoch}").sample(shards, len(shards))
        lane = order[self.rank :: self.world_size][number % self.num_lanes :: self.num_lanes]
        skip = number // self.num_lanes * self.size
        for lap in itertools.count():
            for shard in lane:
                if skip < shard.num_images:
                    yield from self._stream_shard(shard, f"{self.seed} {self.epoch} {lap} {shard.name}", skip)
                skip = max(0, skip - shard.num_images)

    def _stream_shard(self, shard: Shard, seed: str, skip: int) -> Iterator[_Draw]:
        """Yield the pictures of a shard in the order that the seed gives them, without the first ``skip``."""
        where = f"{self.dataset.root}/{shard.name}"
        with open_shard(self.dataset.root, shard) as file:
            if hasattr(os, "posix_fadvise"):  # the system reads the file from front to back, whatever the order here
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            members = list_members(file, shard, where)
            random.Random(seed).shuffle(members)
            for number in range(skip, len(members)):
                load = functools.partial(self._read, file, members, number, where)
                yield _Draw(f"{shard.name}/{members[number].name}", f"{seed} {number}", load)

    def _read(self, file: BinaryIO, members: Sequence[Member], number: int, where: str, attempt: int) -> Any:
        member = members[(number + attempt) % len(members)]
        label = number_label(where, member, self.dataset.class_names)
        image = decode_image(read_member(file, member), f"{where}/{member.name}")
        return (self.dataset.transform(image) if self.dataset.transform else image), label

    def _load(self, draw: _Draw) -> tuple[Any, list[ImageError]]:
        errors: list[ImageError] = []
        for attempt in range(self.size + 1 if self.skip else 1):
            try:
                with seeded(draw.seed):
                    return draw.load(attempt), errors
            except ImageError as error:
                errors.append(error)
        return None, errors


def _take_results(results: Any, failures: list[Exception]) -> Iterator[Any]:
    """Yield what the workers load until one of them gives an error."""
    for result in results:
        if isinstance(result, Exception):
            failures.append(result)
            return
        yield result


def create_shard_datasets(data: str | Path) -> Datasets:
    """Open packed shards; validation shards at an address are first fetched into the user's cache folder.

    Args:
        data: A folder, or its ``http(s)://`` address.

    Raises:
        FileNotFoundError: A validation shard is missing.
        ValueError: ``shards.json`` is damaged, or a shard not what it says.
        ConnectionError: The address cannot be reached.
    """
    root = str(data).rstrip("/")
    contents = load_contents(root)
    folder = fetch_shards(root, contents.validation) if is_address(root) else Path(root)
    return Datasets(
        ShardStream(root, contents.train, contents.class_names),
        ShardDataset(folder, contents.validation, contents.class_names),
        contents.class_names,
        contents.preprocessing,
    )


def stream_shard_pictures(
    shards: Path | str, rank: int = 0, size: int = 1
) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    """Yield every picture of a folder of shards, one shard at a time.

    Args:
        shards: A folder of shards or its ``http(s)://`` address; a folder without ``shards.json``: all its tar files.
        rank: Number of this process.
        size: How many processes share the shards: every ``size``-th, from number ``rank`` on, is this one's.

    Yields:
        Name (``SHARD/MEMBER``) and a function that decodes the picture or raises an ``ImageError``.

    Raises:
        FileNotFoundError: There are no shards.
        ValueError: A shard is damaged.
        ConnectionError: The address cannot be reached.
    """
    root = str(shards).rstrip("/")
    if is_address(root) or Path(root, SHARDS_FILE).is_file():
        contents = load_contents(root)
        found = [*contents.train, *contents.validation]
    else:
        found = [Shard(path.name, -1, "") for path in sorted(Path(root).glob(f"*{SHARD_SUFFIX}"))]
        if not found:
            raise FileNotFoundError(f"no shards in folder {root}; looked for {SHARDS_FILE} and *{SHARD_SUFFIX}")
    for shard in found[rank::size]:
        with open_shard(root, shard) as file:
            for member in list_members(file, shard, f"{root}/{shard.name}"):
                name = f"{shard.name}/{member.name}"
                yield name, functools.partial(decode_image, read_member(file, member), f"{root}/{name}")
