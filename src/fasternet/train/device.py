"""Where a network computes, and in which precision."""

from __future__ import annotations

import os
from typing import Literal

import torch

from fasternet.environment import describe_machine

Precision = Literal["fp32", "bf16", "fp16"]


def select_device(name: str | None) -> torch.device:
    """Return the device ``cpu``, ``cuda`` or ``cuda:1``; for None, CUDA where there is a device, else the CPU.

    Under ``torchrun``, ``cuda`` is the GPU of this process's number on its machine.

    Raises:
        ValueError: There is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"device {name!r} must be cpu, cuda or cuda:NUMBER")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name, index = f"cuda:{os.environ['LOCAL_RANK']}", os.environ["LOCAL_RANK"]
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def select_precision(name: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """Return the precision of this name; ``auto``: bf16 where the device computes in it, fp16 on other GPUs, else fp32.

    Raises:
        ValueError: The device would emulate what was asked for by name.
    """
    if device.type == "cuda":
        ready = torch.cuda.is_bf16_supported(including_emulation=False)
        reason = "this GPU has no bf16 arithmetic"
    else:
        ready = not {"avx512_bf16", "amx_bf16"}.isdisjoint(describe_machine().instruction_sets)
        reason = "this processor has neither avx512_bf16 nor amx_bf16"
    if name == "auto":
        return "bf16" if ready else "fp16" if device.type == "cuda" else "fp32"
    if name == "bf16" and not ready:
        raise ValueError(f"precision=bf16 would be emulated, as {reason}; use precision=fp32 or precision=auto")
    if name == "fp16" and device.type != "cuda":
        raise ValueError("precision=fp16 would be emulated: it needs a GPU; use precision=fp32 or precision=auto")
    return name
