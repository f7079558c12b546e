"""What all commands share: standard output carries the result, standard error everything else."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from fasternet.deploy import Runtime

T = TypeVar("T")


def shorten_spinning() -> None:
    """Let waiting OpenMP threads give up their core soon; to be called before torch is loaded.

    Training T0 on the digits with two threads of two cores: 35 to 215 pictures a second where another process
    wants a core too, and no difference where none does.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def note_choice(runtime: Runtime) -> None:
    """Say what the engine ``auto`` chose, why, and how long that takes to prepare."""
    if choice := runtime.reasons.get("choice"):
        note(f"engine auto: {choice}; prepared in {runtime.load_s:.1f} s")


def refuse_auto(engines: Sequence[str] | None) -> None:
    """Refuse the engine ``auto`` where engines are measured one by one.

    Raises:
        ValueError: It is among them.
    """
    if "auto" in (engines or ()):
        raise ValueError("engine auto is one of the others, chosen by timing: name those that are to be measured")


def is_main_process() -> bool:
    """Whether this process speaks: under ``torchrun`` the first one, else always."""
    return os.environ.get("RANK", "0") == "0"


def print_json(document: object) -> None:
    """Print one JSON document to standard output."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table for people to standard output; numbers stand right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = [tuple(row) for row in rows]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], int | float | None) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_format(cell) for cell in row))
    width = None if sys.stdout.isatty() else 160
    Console(file=sys.stdout, width=width).print(table, markup=False)


def note(message: str) -> None:
    """Print a line to standard error."""
    sys.stderr.write(message + "\n")


def track(iterable: Iterable[T], total: int | None, description: str) -> Iterator[T]:
    """Iterate with a progress bar on standard error where that is a terminal, else silently."""
    if not sys.stderr.isatty():
        yield from iterable
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(file=sys.stderr)
    yield from rich_track(iterable, description, total=total, console=console, transient=True)


def _format(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return str(cell)
