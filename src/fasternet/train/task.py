"""What the training loop does not know about a run: its network, its batches, its loss, its judgement."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasternet.records import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """What a run trains, and how it is judged; classification is one task.

    The loop calls ``loss`` and ``evaluate`` under autocast where the recipe asks for bf16; ``summarise`` works in fp32.

    Attributes:
        name: The network's name, the subject of the run's records.
        model: The network, on ``device``.
        device: Where it computes.
        condition: What data and network are, for the record of the run; the loop adds the recipe.
        values: What they count, likewise.
        num_steps: Batches an epoch.
        metric: The value of ``evaluate`` that is highest at the best epoch; of equal epochs the last is the best.
    """

    name: str
    model: nn.Module
    device: torch.device
    condition: Mapping[str, Any]
    values: Mapping[str, Any]
    num_steps: int
    metric: str

    @abc.abstractmethod
    def batches(self, epoch: int) -> Iterable[Any]:
        """Return the batches of an epoch, counted from 0; the first item of a batch holds its pictures."""

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a batch, a scalar; the batch comes as the loader made it."""

    @abc.abstractmethod
    def evaluate(self, model: nn.Module) -> Mapping[str, Any]:
        """Return the values that the epoch's record gets; the network is in evaluation mode."""

    @abc.abstractmethod
    def save(self, folder: Path, model: Any) -> None:
        """Write the network into a model folder, each file atomically."""

    @abc.abstractmethod
    def summarise(self, output: Path) -> list[Record]:
        """Return the records that end the log of a run folder, made with the best checkpoint in it."""
