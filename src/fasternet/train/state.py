"""What a run needs to go on where it stopped: two files of weights, optimizer and position; random numbers by key.

Every random number of a run follows from the seed and from where it is drawn (epoch, step, part, picture): no
state of a generator has to be kept.
"""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections.abc import Callable
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
    """Write a state and keep the one before it; killed at any moment, at least one of the two is whole.

    Raises:
        OSError: The disk is full or not writable; the states before are what they were.
    """
    buffer = io.BytesIO()  # torch.save into a file reports a full disk as an internal error
    torch.save(state, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()), keep=_before(path))


def load_state(path: Path) -> dict[str, Any]:
    """Read one file that ``save_state`` wrote; no code in the file is run.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"checksum of {damaged}")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, LookupError, zipfile.BadZipFile, pickle.UnpicklingError) as e:
        reason = str(e).strip().splitlines()[:1]
        raise ValueError(f"{path} is damaged and cannot be resumed from: {' '.join(reason)}") from None
    return state


def load_last_state(path: Path, say: Callable[[str], object]) -> dict[str, Any] | None:
    """Read the last state, or where it is damaged the one before it, and say so; None where none was saved.

    Raises:
        ValueError: Both are damaged.
    """
    files = [file for file in (path, _before(path)) if file.exists()]
    for number, file in enumerate(files, start=1):
        try:
            return load_state(file)
        except ValueError as error:
            if number == len(files):
                raise
            say(f"{error}; going on from the state before it")
    return None


def _before(path: Path) -> Path:
    return path.with_name(f"{path.stem}-before{path.suffix}")
