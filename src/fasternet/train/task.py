"""What the training loop does not know about a run: its network, its batches, its loss, its judgement."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasternet.data.images import ImageError
from fasternet.records import Record
from fasternet.train.distributed import World


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """What a run trains, and how it is judged; classification is one task.

    The loop calls ``loss`` and ``evaluate`` under autocast where the recipe asks for bf16 or fp16; ``summarise`` works
    in fp32.

    Attributes:
        name: The network's name, the subject of the run's records.
        model: The network, on ``device``.
        device: Where it computes.
        condition: What data and network are, for the record of the run; the loop adds the recipe.
        values: What they count, likewise.
        num_steps: Steps of the optimizer in an epoch.
        metric: The value of ``evaluate`` that is highest at the best epoch; of equal epochs the last is the best.
        world: The processes that share a step and an evaluation.
        unreadable: Errors of training pictures that this process met; the loop reads and empties it.
    """

    name: str
    model: nn.Module
    device: torch.device
    condition: Mapping[str, Any]
    values: Mapping[str, Any]
    num_steps: int
    metric: str
    world: World = dataclasses.field(default_factory=World)
    unreadable: list[ImageError] = dataclasses.field(default_factory=list)

    @abc.abstractmethod
    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yield this process's parts of each step of an epoch, counted from 0, from step ``start`` on.

        The first item of a part holds its pictures.
        """

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a part, a scalar; the part comes as the loader made it."""

    @abc.abstractmethod
    def evaluate(self, model: nn.Module) -> Mapping[str, Any]:
        """Return the values of the epoch's record, the same in each process; the network is in evaluation mode."""

    @abc.abstractmethod
    def save(self, folder: Path, model: Any, values: Mapping[str, Any]) -> None:
        """Write the network, with the values of its epoch, into a model folder, each file atomically."""

    @abc.abstractmethod
    def summarise(self, output: Path) -> list[Record]:
        """Return the records that end the log of a run folder, made with the best checkpoint in it."""

    def names(self, epoch: int, step: int) -> Sequence[str]:
        """Return the names of the pictures that this process takes in a step."""
        return ()

    def describe_resume(self, start: int) -> str | None:
        """Return a sentence where an epoch cannot go on exactly at step ``start``."""
        return None
