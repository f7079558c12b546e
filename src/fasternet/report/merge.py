"""Several runs, and the records of several machines, in one record file: pictures do not travel, machines do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from fasternet.records import (
    Machine,
    Record,
    append_records,
    check_records,
    find_machine,
    load_machine,
    save_machine,
)
from fasternet.report.sources import Source, load_sources


def merge_records(sources: Sequence[Path], output: Path) -> tuple[int, int]:
    """Append the records of runs and record files to one file, each record once.

    The records of a run get the name of its folder as ``condition.run``. Predictions stay where their pictures are.
    Every source is checked before anything is written. The machines that the records name are described beside the
    output: in ``machines`` of its folder, or one folder up where its own is named after one of them.

    Args:
        sources: Record files (``*.jsonl``), run folders, or folders of either.
        output: The record file, named ``*.jsonl``; what it holds stays.

    Returns:
        How many records were added, and how many were there already.

    Raises:
        FileNotFoundError: A source does not exist.
        ValueError: A source holds no records or a faulty one, does not describe its machine, two different machines
            have one id, two different runs have one name, or output is a folder or no ``.jsonl``.
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
    loaded = load_sources(sources)
    _check(dict.fromkeys(source.path for source in loaded))
    for source in loaded:
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
    described = _gather_machines(loaded, {record.machine for record in added.values()})
    own = output.parent.name in described or output.parent.name in {r.machine for s in here for r in s.records}
    _save_machines((output.parent.parent if own else output.parent) / "machines", described.values())
    append_records(output, added.values())
    return len(added), met


def _check(files: Iterable[Path]) -> None:
    """Refuse files with a fault."""
    faults = [fault for file in files for fault in check_records(file)]
    if faults:
        more = f", and {len(faults) - 1} faults more: fasternet results check lists them" if faults[1:] else ""
        raise ValueError(faults[0] + more)


def _gather_machines(sources: Iterable[Source], wanted: set[str]) -> dict[str, Machine]:
    """Return the descriptions that come with the sources, by id; runs may come without."""
    described: dict[str, Machine] = {}
    for source in sources:
        for name in {record.machine for record in source.records} & wanted:
            if path := find_machine(source.path, name):
                machine = load_machine(path)
                _compare(described.setdefault(name, machine), machine, path)
    return described


def _save_machines(folder: Path, machines: Iterable[Machine]) -> None:
    """Describe machines in a folder; what is described there already has to be the same, and stays."""
    machines = list(machines)
    known = {machine.id: folder / f"{machine.id}.json" for machine in machines}
    for machine in machines:
        if known[machine.id].is_file():
            _compare(load_machine(known[machine.id]), machine, known[machine.id])
    for machine in machines:
        if not known[machine.id].is_file():
            save_machine(folder, machine)


def _compare(one: Machine, other: Machine, path: Path) -> None:
    """Refuse another machine of the same id; its system may have been updated in between."""
    fields = [field.name for field in dataclasses.fields(Machine) if field.name != "system"]
    if differing := [name for name in fields if getattr(one, name) != getattr(other, name)]:
        raise ValueError(
            f"{path}: another machine is described as {one.id!r} elsewhere, with another {' and '.join(differing)}; "
            "give one of them another id, in its description and in its records"
        )


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
