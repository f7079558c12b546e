"""Describes this machine and this software as ``records`` wants them, makes records, and sets the threads."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fasternet.records import Machine, Record

_CORES = Path("/sys/devices/system/cpu")
_INSTRUCTION_SETS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "sve", "bf16", "i8mm"),  # ARM
)


@functools.cache
def describe_machine() -> Machine:
    """Describe the machine that this process runs on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processor, flags = _processor()
    accelerator = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    slug = re.sub(r"[^a-z0-9]+", "-", (accelerator or f"{processor} {cores}c").lower()).strip("-")
    return Machine(
        id=slug,
        processor=processor,
        architecture=platform.machine(),
        cores=cores,
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        accelerator=accelerator,
        system=f"{platform.system()} {platform.release()}",
        instruction_sets=tuple(name for name in _INSTRUCTION_SETS if name in flags),
    )


@functools.cache
def describe_software() -> dict[str, str]:
    """Return the versions of Python, fasternet and the libraries that results depend on, optional ones if installed."""
    found = {"python": platform.python_version()}
    for name in ("fasternet", "torch", "torchvision", "timm", "numpy"):
        found[name] = importlib.metadata.version(name)
    for name in ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def find_commit() -> str | None:
    """Return the commit of the source tree, with ``+changes`` where the package was changed, or None outside of one."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "--short=12", "HEAD")
        tracked = _git(here, "ls-files", "--error-unmatch", __file__)
    except (OSError, subprocess.CalledProcessError):
        return None
    if not tracked:
        return None
    return commit + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no", "--", ".") else "")


def create_record(
    suite: str,
    kind: str,
    subject: str,
    *,
    condition: Mapping[str, Any] | None = None,
    values: Mapping[str, Any] | None = None,
    samples: Mapping[str, list[float]] | None = None,
    attachments: Mapping[str, str] | None = None,
) -> Record:
    """Make a record of this machine, this software, this command and this moment.

    Args:
        suite: See ``Record.suite``; likewise the other arguments.
        kind: See ``Record.kind``.
        subject: See ``Record.subject``.
        condition: See ``Record.condition``.
        values: See ``Record.values``.
        samples: See ``Record.samples``.
        attachments: See ``Record.attachments``.
    """
    return Record(
        suite=suite,
        kind=kind,
        subject=subject,
        condition=condition or {},
        values=values or {},
        samples=samples or {},
        attachments=attachments or {},
        machine=describe_machine().id,
        versions=describe_software(),
        commit=find_commit(),
        command=_command(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@contextlib.contextmanager
def set_threads(num_threads: int, *, pinned: bool = True) -> Iterator[dict[str, Any]]:
    """Compute with so many threads, on so many cores, inside the ``with`` block.

    Torch gets that many threads, and all threads that this process has are pinned to as many of its cores: those least
    busy just now, one hardware thread of each physical core first. What starts inside (threads, processes) stays
    there too. On a GPU fp32 means fp32: TF32 is off, in convolutions and in products. All of it is undone at the end.

    Args:
        num_threads: From 1 to the cores at hand.
        pinned: Whether to pin; helpers of the measured work, such as processes that load pictures, may need the others.

    Yields:
        What the machine was like on entry, for the record: ``affinity`` (the cores in use), ``torch_threads``,
        ``load_average`` (of the last minute) and ``clock_mhz`` (of those cores); what cannot be read or set is None,
        with its ``<name>_reason``.

    Raises:
        ValueError: This process has fewer cores.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    available = len(cores) if cores else os.cpu_count() or 1
    if not 1 <= num_threads <= available:
        raise ValueError(f"threads must be from 1 to {available}, the cores at hand, not {num_threads}")
    describe_machine()  # is remembered, and would count fewer cores below
    load_average = os.getloadavg()[0]
    before = torch.get_num_threads()
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    allow_tf32 = cudnn.allow_tf32
    torch.set_num_threads(num_threads)
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    try:
        if (actual := torch.get_num_threads()) != num_threads:
            raise RuntimeError(f"torch computes with {actual} threads instead of {num_threads}")
        with _pin(_choose_cores(cores, num_threads if pinned else available) if cores else None) as cores_in_use:
            yield {"torch_threads": actual, "load_average": load_average, **cores_in_use}
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32 = allow_tf32


@contextlib.contextmanager
def _pin(cores: list[int] | None) -> Iterator[dict[str, Any]]:
    """Keep all threads of this process on ``cores``; yield what came of it."""
    if cores is None:
        hidden = "this system does not let a process choose its cores"
        yield {"affinity": None, "affinity_reason": hidden, "clock_mhz": None, "clock_mhz_reason": hidden}
        return
    own = os.sched_getaffinity(0)
    before = {}
    try:
        for thread in _list_threads():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                before[thread] = os.sched_getaffinity(thread)
                os.sched_setaffinity(thread, cores)
        yield _describe_cores(sorted(os.sched_getaffinity(0)))
    finally:
        for thread in _list_threads():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, before.get(thread, own))


def _list_threads() -> list[int]:
    """Return the threads of this process, as the system numbers them; only the calling one where it hides them."""
    try:
        return [int(entry.name) for entry in Path("/proc/self/task").iterdir()]
    except OSError:
        return [0]


def _describe_cores(cores: list[int]) -> dict[str, Any]:
    try:
        clocks = [int((_CORES / f"cpu{core}/cpufreq/scaling_cur_freq").read_text()) / 1e3 for core in cores]
    except (OSError, ValueError):
        hidden = "no cpufreq interface (virtual machines hide it)"
        return {"affinity": cores, "clock_mhz": None, "clock_mhz_reason": hidden}
    return {"affinity": cores, "clock_mhz": clocks}


def _choose_cores(cores: list[int], num_cores: int) -> list[int]:
    """Return the least busy cores; two that share a physical core only once every other has been taken."""
    if num_cores == len(cores):
        return cores
    siblings = {core: _siblings(core) for core in cores}
    begin = _busy_ticks()
    time.sleep(0.05)
    busy = {core: ticks - begin.get(core, ticks) for core, ticks in _busy_ticks().items()}
    firsts: list[int] = []
    seconds: list[int] = []
    taken: set[int] = set()
    for core in sorted(cores, key=lambda core: sum(busy.get(sibling, 0) for sibling in siblings[core])):
        (seconds if core in taken else firsts).append(core)
        taken |= siblings[core]
    return sorted([*firsts, *seconds][:num_cores])


def _siblings(core: int) -> set[int]:
    """Return the hardware threads of this one's physical core, itself among them."""
    try:
        text = (_CORES / f"cpu{core}/topology/thread_siblings_list").read_text()
        ranges = [part.split("-") for part in text.strip().split(",")]
        return {core}.union(*(range(int(ends[0]), int(ends[-1]) + 1) for ends in ranges))
    except (OSError, ValueError):
        return {core}


def _busy_ticks() -> dict[int, int]:
    """Return for how long each core has worked since the machine started; empty where the system hides it."""
    try:
        text = Path("/proc/stat").read_text(encoding="utf-8")
    except OSError:
        return {}
    rows = re.findall(r"^cpu(\d+) (.+)$", text, re.MULTILINE)
    # user nice system idle iowait irq softirq steal: all but idle and iowait
    return {int(core): sum(map(int, [*(f := fields.split())[:3], *f[5:8]])) for core, fields in rows}


def _processor() -> tuple[str, frozenset[str]]:
    """Return the processor's name and its feature flags."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    name = re.search(r"^(?:model name|Hardware|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return (
        name.group(1).strip() if name else platform.machine(),
        frozenset(flags.group(1).split()) if flags else frozenset(),
    )


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _command() -> str:
    """Return this process's command line, the program and absolute paths cut down to their last part."""
    program = "fasternet" if Path(sys.argv[0]).parent == Path(__file__).parent else Path(sys.argv[0]).name
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join([program, *words])
