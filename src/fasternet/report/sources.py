"""What a report is made of: record files, run folders, the machines that they name and the pictures that they show."""

from __future__ import annotations

import base64
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fasternet.records import Machine, Record, load_machine, load_records

PICTURE_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}
MAX_PICTURE_BYTES = 1 << 20
COMPARABLE = ("device", "threads", "batch_size", "precision", "engine", "isa")

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Source:
    """One record file and what it holds; of a file that holds several runs, one of them."""

    path: Path
    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        """What to call it: the run as merging named it, or the run folder, or the file."""
        merged = self.records[0].condition.get("run")
        return str(merged) if merged else self.path.resolve().parent.name if self.path.stem == "log" else self.path.stem

    def load_picture(self, relative: str) -> str | None:
        """Return an attached picture as a data URI; None where it is missing, too large, outside or no picture."""
        folder = self.path.parent.resolve()
        path = (folder / relative).resolve()
        if not path.is_relative_to(folder) or not path.is_file() or path.stat().st_size > MAX_PICTURE_BYTES:
            return None
        content = path.read_bytes()
        for start, media_type in PICTURE_TYPES.items():
            if content.startswith(start):
                return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
        return None


def load_sources(paths: Sequence[Path]) -> list[Source]:
    """Read record files; of a folder, for example of a run, every ``*.jsonl`` below it.

    Returns:
        A source for each file, or for each run of a file that several were merged into.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: There is no path, a path holds no record, or a line is not a record.
    """
    if not paths:
        raise ValueError("sources is empty: name at least one record file (*.jsonl) or run folder")
    found: dict[Path, list[Source]] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no record file or run folder at {path}")
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        sources = {file.resolve(): _split(file, _load(file)) for file in files}
        if not any(sources.values()):
            raise ValueError(
                f"{path} holds no records: name a *.jsonl file, or a folder with one, that a run has filled"
            )
        found |= sources
    return [source for sources in found.values() for source in sources]


def _split(file: Path, records: Iterable[Record]) -> list[Source]:
    """Take the runs of a file apart, which merging told apart by ``condition.run``."""
    runs = group(records, lambda record: str(record.condition.get("run") or ""))
    return [Source(file, tuple(members)) for members in runs.values()]


def _load(file: Path) -> list[Record]:
    records = load_records(file)
    for number, record in enumerate(records, start=1):
        texts = (
            record.suite,
            record.kind,
            record.subject,
            record.machine,
            record.command,
            record.created,
            record.commit or "",
        )
        tables = (record.condition, record.values, record.attachments, record.versions, record.samples)
        is_sound = all(isinstance(text, str) for text in texts) and all(isinstance(table, dict) for table in tables)
        if not is_sound or not all(map(_is_list_of_numbers, record.samples.values())):
            raise ValueError(f"{file} line {number} is not a record: a field has another type than it should")
    return records


def _is_list_of_numbers(samples: object) -> bool:
    return isinstance(samples, list) and all(isinstance(sample, int | float) for sample in samples)


def find_machines(sources: Iterable[Source]) -> dict[str, Machine]:
    """Return the machines described by ``machines/<id>.json`` beside the records or one folder up, by id."""
    machines = {}
    for source in sources:
        for folder in source.path.resolve().parents[:2]:
            for path in sorted((folder / "machines").glob("*.json")):
                machines[path.stem] = load_machine(path)
    return machines


def select(sources: Iterable[Source], kind: str, suite: str | None = None) -> list[Record]:
    """Return all records of a kind, and of a suite where one is named, in order."""
    records = (record for source in sources for record in source.records)
    return [record for record in records if record.kind == kind and suite in (None, record.suite)]


def group(records: Iterable[Record], key: Callable[[Record], Key]) -> dict[Key, list[Record]]:
    """Group records by a key, in order of first appearance."""
    groups: dict[Key, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def newest(records: Iterable[Record], key: Callable[[Record], Key]) -> dict[Key, Record]:
    """Return the record per key that counts: unstable ones are rerun, never deleted.

    What did not fail comes before what did, then what is stable, then what has more rounds, so that a quick run never
    replaces a full one, then the newest, which of equals is the last.
    """
    return {name: max(reversed(members), key=_rank) for name, members in group(records, key).items()}


def _rank(record: Record) -> tuple[bool, bool, int, str]:
    values, lengths = record.values, map(len, record.samples.values())
    rounds = values.get("num_blocks")  # of a ratio
    rounds = rounds if isinstance(rounds, int) else max(lengths, default=0)
    return "error" not in values, not values.get("unstable"), rounds, record.created


def setting(record: Record) -> dict[str, Any]:
    """Return the conditions that have to be equal for speeds to stand in one table."""
    # Each network runs in the memory format that suits it better; operators all run in one.
    names = (*COMPARABLE, "memory_format") if record.suite == "operators" else COMPARABLE
    return {name: record.condition.get(name) for name in names}


def comparable(record: Record) -> tuple[str, ...]:
    """Return a key that records share whose speeds may stand in one table: same machine, same setting."""
    return (record.machine, *map(str, setting(record).values()))
