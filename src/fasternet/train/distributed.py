"""Several processes as one: ``torchrun`` starts them, this module joins them (gloo on CPUs, NCCL on GPUs)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
        local_rank: Number of this process on its machine: the GPU that it takes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0


@contextlib.contextmanager
def join_world(device: torch.device | None = None, *, timeout: timedelta | None = None) -> Iterator[World]:
    """Join the processes that ``torchrun`` started; without it the world is this process alone.

    Args:
        device: Where the processes compute: NCCL connects them on CUDA, gloo on the CPU.
        timeout: How long one may wait for another; None: as long as PyTorch lets it.

    Raises:
        ValueError: The environment that ``torchrun`` sets is incomplete, or no number.
        OSError: Another process is gone.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield World()
        return
    try:
        world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except (KeyError, ValueError) as error:
        raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK must be set to numbers, as torchrun does: {error}") from None
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)  # objects travel through the current device
    with _explain_lost_process():
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=_open_store(),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
        try:
            yield world
        finally:
            dist.destroy_process_group()


def _open_store() -> Store:
    """Return the place where the processes find each other.

    ``torchrun`` keeps it over its restarts, and the addresses of processes that are gone with it: a process that is
    quick finds such an address instead of a new one, and all of them hang. So each attempt writes under a name of its
    own; on several machines, which count attempts apart, ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` does that.
    """
    store: Store = next(rendezvous("env://"))[0]
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        return PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if keeps_store and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0" and os.environ["RANK"] == "0":
        warnings.warn(
            "processes that torchrun starts again on several machines may wait for dead ones for ever: start torchrun "
            "with --rdzv-backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            stacklevel=3,
        )
    return store


@contextlib.contextmanager
def _explain_lost_process() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        reason = " ".join(str(error).splitlines()[0].partition("] ")[2].partition(". ")[0].split()) or "no reason given"
        raise OSError(f"another process of the run is gone ({reason}): see what it said, then resume") from None


def broadcast(world: World, value: T) -> T:
    """Return the main process's value in every process."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(world: World, value: T) -> list[T]:
    """Return the values of all processes, by rank, in every process."""
    if world.size == 1:
        return [value]
    values: list[T | None] = [None] * world.size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def sum_over(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """Add a tensor up over all processes, in place, and return it."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor
