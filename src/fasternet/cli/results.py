"""``fasternet results``: record files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fasternet.cli._common import note

results = typer.Typer(help="Work with record files.", no_args_is_help=True)


@results.callback()
def _describe() -> None:
    """Work with record files."""


@results.command("merge")
def merge(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RUNS-OR-RECORDS", help="Run folders and record files (*.jsonl).")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The record file (*.jsonl) to append to.")],
) -> None:
    """Collect runs, or the records of several machines, in one record file, each record once.

    Records are checked first, and machines/<id>.json travels with them; pictures stay where they are.

    Example: fasternet results merge outputs/t0-seed0 outputs/t0-seed1 -o results/learning.jsonl
    """
    from fasternet.report.merge import merge_records

    added, met = merge_records(sources, output)
    note(f"records added: {added}, there already: {met}")
    print(output)


@results.command("check")
def check(
    sources: Annotated[
        list[Path], typer.Argument(metavar="FILES-OR-FOLDERS", help="Record files (*.jsonl) and folders of them.")
    ],
) -> None:
    """Check record files: schema, types, kinds, numbers against their samples, machines described.

    Lists every fault with its file and line; the exit status is 1 where there is one.

    Example: fasternet results check results
    """
    from fasternet.records import check_records

    files = []
    for source in sources:
        found = sorted(source.rglob("*.jsonl")) if source.is_dir() else [source]
        if not found:
            raise FileNotFoundError(f"no records file (*.jsonl) in {source}")
        files += found
    faults = [fault for file in dict.fromkeys(files) for fault in check_records(file)]
    for fault in faults:
        print(fault)
    if faults:
        raise ValueError(f"{len(faults)} faults in {len(files)} record files")
    print(f"{len(files)} record files, no fault")
