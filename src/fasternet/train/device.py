"""Where a network computes, and in which precision."""

from __future__ import annotations

from typing import Literal

import torch

from fasternet.environment import describe_machine


def select_device(name: str | None) -> torch.device:
    """Return the device ``cpu``, ``cuda`` or ``cuda:1``; for None, CUDA where there is a device, else the CPU.

    Raises:
        ValueError: There is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"device {name!r} must be cpu, cuda or cuda:NUMBER")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def select_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the precision of this name; ``auto`` is bf16 where the device computes in it, else fp32.

    Raises:
        ValueError: bf16 was asked for by name, and the device would emulate it.
    """
    if device.type == "cuda":
        ready = torch.cuda.is_bf16_supported(including_emulation=False)
        reason = "this GPU has no bf16 arithmetic"
    else:
        ready = not {"avx512_bf16", "amx_bf16"}.isdisjoint(describe_machine().instruction_sets)
        reason = "this processor has neither avx512_bf16 nor amx_bf16"
    if name == "auto":
        return "bf16" if ready else "fp32"
    if name == "bf16" and not ready:
        raise ValueError(f"precision=bf16 would be emulated, as {reason}; use precision=fp32 or precision=auto")
    return name
