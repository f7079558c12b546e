"""Describes this machine and this software as ``records`` wants them, and makes records that carry both."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fasternet.records import Machine, Record

_INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve")


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
    """Return the versions of Python, fasternet and the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("fasternet", "torch", "torchvision", "timm", "numpy"):
        found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def find_commit() -> str | None:
    """Return the commit of the source tree (with ``+changes`` where it is dirty), or None outside of one."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "--short=12", "HEAD")
        tracked = _git(here, "ls-files", "--error-unmatch", __file__)
    except (OSError, subprocess.CalledProcessError):
        return None
    if not tracked:
        return None
    return commit + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")


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
