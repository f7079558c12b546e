"""Several runs in one record file: what they learned travels, their pictures do not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from fasternet.records import Record, append_records
from fasternet.report.sources import Source, load_sources


def merge_records(sources: Sequence[Path], output: Path) -> tuple[int, int]:
    """Append the records of runs and record files to one file, each record once.

    The records of a run get the name of its folder as ``condition.run``. Predictions stay where their pictures are.

    Args:
        sources: Record files (``*.jsonl``), run folders, or folders of either.
        output: The record file, named ``*.jsonl``; what it holds stays.

    Returns:
        How many records were added, and how many were there already.

    Raises:
        FileNotFoundError: A source does not exist.
        ValueError: A source holds no records, two different runs have one name, or output is a folder or no ``.jsonl``.
    """
    if output.is_dir() or output.suffix != ".jsonl":
        raise ValueError(f"output {output} must be a file named *.jsonl")
    here = load_sources([output]) if output.is_file() and output.stat().st_size else []
    known = {_key(record) for source in here for record in source.records}
    runs = {
        record.condition.get("run"): _key(record) for source in here for record in source.records if _begins(record)
    }
    added: dict[str, Record] = {}
    met = 0
    for source in load_sources(sources):
        for record in _name(source):
            key = _key(record)
            name = record.condition.get("run")
            if _begins(record) and runs.setdefault(name, key) != key:
                raise ValueError(
                    f"{source.path}: another run is named {name!r} already; rename the folder of one of them"
                )
            met += key in known or key in added
            if key not in known:
                added[key] = record
    append_records(output, added.values())
    return len(added), met


def _name(source: Source) -> list[Record]:
    """Return what travels of a source, the records of a run with its name."""
    records = [record for record in source.records if record.kind != "prediction"]
    if not any(_begins(record) for record in records):
        return records
    return [dataclasses.replace(record, condition={**record.condition, "run": source.name}) for record in records]


def _begins(record: Record) -> bool:
    return record.kind == "run"


def _key(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record), sort_keys=True)
