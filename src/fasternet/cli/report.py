"""``fasternet report``: one page from records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RECORDS-OR-RUNS", help="Record files (*.jsonl) and run folders.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
) -> None:
    """Make one self-contained page: measured numbers beside the paper's, training, evaluation, pictures.

    Example: fasternet report outputs/quickstart results -o report.html
    """
    from fasternet.report import create_report

    print(create_report(sources, output))
