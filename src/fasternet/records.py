"""Records: what was measured, on which machine, under which condition, with every repetition.

A record is one JSON object on one line of a ``.jsonl`` file. Benchmarks, training runs and evaluations
write the same record, and ``report`` reads nothing else. Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that a record was made on; it names no host and no path.

    Attributes:
        id: Slug of the processor or accelerator, for example ``amd-epyc-2c``.
        processor: The processor as the system calls it.
        architecture: For example ``x86_64`` or ``aarch64``.
        cores: Logical cores that this process may use.
        memory_gib: Main memory in GiB.
        accelerator: Name of the first CUDA device, or None.
        system: Operating system and release.
        instruction_sets: Those that matter to the fast paths, for example ``avx2``, ``avx512f``.
    """

    id: str
    processor: str
    architecture: str
    cores: int
    memory_gib: float
    accelerator: str | None
    system: str
    instruction_sets: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One result.

    Attributes:
        suite: What produced it: ``operators``, ``networks``, ``train``, ``eval``, ``optimize`` ...
        kind: What it is: ``latency``, ``ratio``, ``cost``, ``machine_peak``, ``run``, ``epoch``, ``evaluation``,
            ``prediction``.
        subject: The thing measured: a network, an operator, a run. For a ratio: the numerator's name.
        condition: Everything that has to be equal for two records to be comparable (batch, threads, precision ...).
        values: The numbers, units as suffixes of their names (``latency_ms``, ``macs_per_second``).
        samples: Every repetition behind the values, by the name of the value.
        attachments: Files that belong to the record, as paths relative to the file that holds it.
        machine: ``Machine.id``.
        versions: Versions of fasternet, torch and whatever else took part.
        commit: Commit of the source tree, or None outside of one.
        command: The command line that reproduces it.
        created: UTC time, ISO 8601.
    """

    suite: str
    kind: str
    subject: str
    condition: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    samples: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)
    attachments: Mapping[str, str] = dataclasses.field(default_factory=dict)
    machine: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    commit: str | None = None
    command: str = ""
    created: str = ""


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Append records to a JSONL file, creating it and its folder; a torn last line is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            line = json.dumps({"schema": SCHEMA, **dataclasses.asdict(record)}, allow_nan=False)
            file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def load_records(path: Path) -> list[Record]:
    """Read the records of a JSONL file.

    A last line without its newline is what a killed process leaves behind: it is dropped.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not a record; the message names the file, the line and the reason.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no records file at {path}")
    return list(_parse(path))


def _parse(path: Path) -> Iterator[Record]:
    names = {field.name for field in dataclasses.fields(Record)}
    try:
        *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} holds no records: it is not UTF-8 text") from None
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
            if content.pop("schema", None) != SCHEMA:
                raise ValueError(f"schema must be {SCHEMA}")
            if unknown := sorted(set(content) - names):
                raise ValueError(f"unknown fields {unknown}")
            yield Record(**content)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} line {number} is not a record: {error}") from None


def save_machine(folder: Path, machine: Machine) -> Path:
    """Write ``folder/<id>.json`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine.id}.json"
    path.write_text(json.dumps(dataclasses.asdict(machine), indent=2) + "\n", encoding="utf-8")
    return path


def load_machine(path: Path) -> Machine:
    """Read what ``save_machine`` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return Machine(**{**content, "instruction_sets": tuple(content["instruction_sets"])})
