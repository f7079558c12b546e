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
    """Collect what several runs learned in one record file, each record once; pictures stay where they are.

    Example: fasternet results merge outputs/t0-seed0 outputs/t0-seed1 -o results/learning.jsonl
    """
    from fasternet.report.merge import merge_records

    added, met = merge_records(sources, output)
    note(f"records added: {added}, there already: {met}")
    print(output)
