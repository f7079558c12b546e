"""``fasternet report``: one page from records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RECORDS-OR-RUNS", help="Record files (*.jsonl) and run folders.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page to write; its Markdown twin lies beside it.")
    ] = Path("report.html"),
    items: Annotated[
        list[str] | None,
        typer.Option("--items", metavar="ITEM", help="Show this alone, for example table3 or fig2; may be repeated."),
    ] = None,
) -> None:
    """Make one self-contained page: the paper's claims and numbers beside the measured ones, training, pictures.

    Example: fasternet report outputs/quickstart results -o report.html
    """
    from fasternet.report import create_report

    print(create_report(sources, output, items=items))
