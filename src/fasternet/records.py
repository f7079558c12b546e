"""Records: what was measured, on which machine, under which condition, with every repetition.

A record is one JSON object on one line of a ``.jsonl`` file. Benchmarks, training runs and evaluations
write the same record, and ``report`` reads nothing else. ``check_records`` says what is wrong with a file. Standard
library only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

SCHEMA = 1
KINDS = (
    *("latency", "ratio", "stage", "cost", "difference", "machine_peak", "fault", "study"),
    *("run", "epoch", "evaluation", "prediction", "data_check"),
)


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
        kind: What it is: ``latency``, ``ratio``, ``stage`` (a part of a network), ``cost``, ``machine_peak``, ``run``,
            ``epoch``, ``evaluation``, ``prediction``, ``study`` (a result of the suite's study).
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
    _cut_torn_line(path)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            line = json.dumps({"schema": SCHEMA, **dataclasses.asdict(record)}, allow_nan=False)
            file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _cut_torn_line(path: Path) -> None:
    """Cut off a last line without its newline, which a killed process left behind."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def load_records(path: Path) -> list[Record]:
    """Read the records of a JSONL file.

    A last line without its newline is what a killed process leaves behind: it is dropped.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not a record; the message names the file, the line and the reason.
    """
    records = []
    for number, line in enumerate(_read_lines(path)[:-1], start=1):
        try:
            records.append(_parse(line))
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not a record: {error}") from None
    return records


def check_records(path: Path) -> list[str]:
    """Look for what is wrong with a record file, line by line.

    Fields and their types, known kinds, finite numbers; a ratio inside its interval; a latency that is the median of
    its samples, as many of each name; and the machine's description in ``machines/<id>.json``, beside the file or one
    folder up. The log of a training run may come without that.

    Returns:
        One sentence each, with file and line; none for a file without fault.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not text.
    """
    *lines, torn = _read_lines(path)
    faults = [f"{path} line {len(lines) + 1} is torn: it does not end in a newline"] if torn else []
    machines, is_run = set(), False
    for number, line in enumerate(lines, start=1):
        try:
            record = _parse(line)
        except ValueError as error:
            faults.append(f"{path} line {number} is not a record: {error}")
            continue
        faults += [f"{path} line {number}: {fault}" for fault in _find_faults(record)]
        machines.add(record.machine)
        is_run = is_run or record.kind == "run"
    for machine in sorted(map(str, machines)):
        found = find_machine(path, machine)
        if not found and not is_run:
            faults.append(f"{path}: machine {machine!r} is not described in machines/{machine}.json")
        try:
            if found and load_machine(found).id != machine:
                faults.append(f"{found} describes machine {load_machine(found).id!r}")
        except ValueError as error:
            faults.append(str(error))
    return faults


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a file; the last one is empty, or torn."""
    if not path.is_file():
        raise FileNotFoundError(f"no records file at {path}")
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} holds no records: it is not UTF-8 text") from None


def _parse(line: str) -> Record:
    """Read one line.

    Raises:
        ValueError: It is not a record; the reason.
    """
    try:
        content = json.loads(line)
        if (schema := content.pop("schema", None)) != SCHEMA:
            newer = isinstance(schema, int) and schema > SCHEMA
            remark = f", not {schema}: a newer fasternet wrote it, and this one cannot read it" if newer else ""
            raise ValueError(f"schema must be {SCHEMA}{remark}")
        if unknown := sorted(set(content) - {field.name for field in dataclasses.fields(Record)}):
            raise ValueError(f"unknown fields {unknown}")
        return Record(**content)
    except (TypeError, AttributeError) as error:
        raise ValueError(str(error)) from None


def _find_faults(record: Record) -> Iterator[str]:
    """Say what is wrong with one record; the numbers are only looked at where the types are right."""
    wrong = list(_find_wrong_types(record))
    yield from wrong
    if wrong:
        return
    if record.kind not in KINDS:
        yield f"kind {record.kind!r} is not one of {', '.join(KINDS)}"
    if not record.suite or not record.subject:
        yield "suite and subject must not be empty"
    try:
        datetime.fromisoformat(record.created or "2000-01-01")
    except ValueError:
        yield f"created {record.created!r} is not a time in ISO 8601"
    for name in ("condition", "values", "samples"):
        if not _is_finite(getattr(record, name)):
            yield f"{name} must hold finite numbers"
            return
    if len(lengths := {len(samples) for samples in record.samples.values()}) > 1 or 0 in lengths:
        yield f"samples must be of one length and not empty, not {sorted(lengths)}"
    elif record.kind == "latency" and "error" not in record.values:
        yield from _find_latency_faults(record)
    elif record.kind == "ratio":
        yield from _find_ratio_faults(record)


def _find_wrong_types(record: Record) -> Iterator[str]:
    for name, content in vars(record).items():
        if name in ("condition", "values", "samples", "attachments", "versions"):
            if not isinstance(content, dict):
                yield f"{name} must be an object"
            elif name in ("attachments", "versions") and not all(isinstance(text, str) for text in content.values()):
                yield f"{name} must hold text"
            elif name == "samples" and not all(map(_is_list_of_numbers, content.values())):
                yield "samples must hold lists of numbers"
        elif not isinstance(content, str) and not (name == "commit" and content is None):
            yield f"{name} must be text"


def _find_latency_faults(record: Record) -> Iterator[str]:
    latency: Any = record.values.get("latency_ms")
    samples = record.samples.get("latency_ms")
    if not _is_number(latency) or latency <= 0:
        yield f"values.latency_ms must be a positive number, not {latency!r}, or values.error must say why not"
    elif samples is None:
        yield "samples.latency_ms is missing"
    elif not math.isclose(statistics.median(samples), latency, rel_tol=1e-6):
        yield f"values.latency_ms is {latency:g}, and the median of its samples {statistics.median(samples):g}"
    low, high = (record.values.get(f"latency_ms_{end}", latency) for end in ("low", "high"))
    if all(map(_is_number, (low, latency, high))) and not low <= latency <= high:
        yield f"values.latency_ms {latency:g} lies outside of its interval, {low:g} to {high:g}"


def _find_ratio_faults(record: Record) -> Iterator[str]:
    interval: list[Any] = [record.values.get(name) for name in ("low", "ratio", "high")]
    low, ratio, high = interval
    if not all(map(_is_number, interval)):
        yield "values.low, ratio and high must be numbers"
    elif not 0 < low <= ratio <= high:
        yield f"values.ratio {ratio:g} lies outside of its interval, {low:g} to {high:g}"
    samples = record.samples.get("latency_ms", [])
    if samples and record.values.get("num_blocks", len(samples)) != len(samples):
        yield f"values.num_blocks is {record.values['num_blocks']}, and there are {len(samples)} samples"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list_of_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_finite(tree: object) -> bool:
    if isinstance(tree, dict | list):
        return all(map(_is_finite, tree.values() if isinstance(tree, dict) else tree))
    return not isinstance(tree, float) or math.isfinite(tree)


def save_machine(folder: Path, machine: Machine) -> Path:
    """Write ``folder/<id>.json`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine.id}.json"
    path.write_text(json.dumps(dataclasses.asdict(machine), indent=2) + "\n", encoding="utf-8")
    return path


def load_machine(path: Path) -> Machine:
    """Read what ``save_machine`` wrote.

    Raises:
        ValueError: The file is no description of a machine.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Machine(**{**content, "instruction_sets": tuple(content["instruction_sets"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} does not describe a machine: {error}") from None


def find_machine(path: Path, machine: str) -> Path | None:
    """Return where a machine that a record file names is described, beside the file or one folder up; None: nowhere."""
    places = [folder / "machines" / f"{machine}.json" for folder in path.resolve().parents[:2]]
    return next((place for place in places if place.stem == machine and place.is_file()), None)
