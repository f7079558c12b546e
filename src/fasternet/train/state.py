"""What a run needs to go on where it stopped: a file of weights, optimizer and epoch; random numbers by key.

Every random number of a run follows from the seed and from where it is drawn (epoch, step, picture): no
state of a generator has to be kept.
"""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasternet.models.checkpoint import write_atomically


def seed_everything(*key: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch with numbers, for example seed, epoch and step."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])  # noqa: NPY002 - timm's mixup and RandAugment draw from the global generators
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state atomically: killed at any moment, ``path`` holds the old one or the new one.

    Raises:
        OSError: The disk is full or not writable; ``path`` is what it was.
    """
    buffer = io.BytesIO()  # torch.save into a file reports a full disk as an internal error
    torch.save(state, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def load_state(path: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote; no code in the file is run.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(f"{path} is damaged and cannot be resumed from: {' '.join(reason)}") from None
    return state
