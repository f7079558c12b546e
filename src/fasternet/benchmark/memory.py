"""How much memory a deployed network holds while it runs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch


def measure_peak_memory(create: Callable[[], Callable[[], object]], device: str) -> tuple[Callable[[], object], float]:
    """Create something to call, call it, and measure what it added to memory at its peak while it ran.

    What creating it needed for a while, an export for example, does not count; its weights and buffers do.

    Args:
        create: Makes the call.
        device: "cpu": resident memory of this process (Linux); "cuda": what torch has allocated there.

    Returns:
        The call, and MiB; NaN where the system does not tell.
    """
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        call = create()
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return call, (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before_mib = _read_resident("VmRSS")
    call = create()
    _read_resident("VmRSS")  # gives back what creating it left behind
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts again
    except OSError:
        return call, float("nan")
    call()
    return call, max(_read_resident("VmHWM") - before_mib, 0.0)


def _read_resident(field: str) -> float:
    """Return a line of this process's status in MiB, after free memory has gone back to the system."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return float("nan")
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) / 1024 if found else float("nan")
