"""``fasternet reproduce``: one table or figure of the paper."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from fasternet.cli._common import print_json, print_table

reproduce = typer.Typer(help="Tables and figures of the paper.", no_args_is_help=True)

# What each takes; "fasternet reproduce" itself prints what needs no measuring.
COMMANDS = (
    ("Table 1", "operators", "fasternet bench operators"),
    ("Table 3", "networks: latency", "fasternet bench networks"),
    ("Table 3", "networks: top-1 on ImageNet", "fasternet eval fasternet_t0 --data IMAGENET"),
    ("Table 6", "training recipes", "fasternet reproduce table6"),
    ("Table 6", "training on ImageNet", "bash runs/imagenet_8gpus.sh"),
    ("Table 8", "variants: parameters and multiply-adds", "fasternet info fasternet_t0"),
    ("Table 9", "forms of PConv", "fasternet bench deploy"),
    ("Fig. 2, 7, 8", "plots of Table 3", "fasternet report results"),
)


@reproduce.command("list")
def list_() -> None:
    """List what can be reproduced, and the command for each.

    Example: fasternet reproduce list
    """
    print_table(("paper", "what", "command"), COMMANDS)


@reproduce.command("table6")
def table6(json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Print the recipes beside Table 6; a cell that differs shows both values. Nothing is trained.

    Example: fasternet reproduce table6
    """
    from fasternet.train.table6 import compare_with_table6

    cells = compare_with_table6()
    if json:
        print_json([dataclasses.asdict(cell) for cell in cells])
        return
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    rows = []
    for start in range(0, len(cells), len(variants)):
        row = cells[start : start + len(variants)]
        values = [_show(c.ours) if c.ours == c.paper else f"{_show(c.ours)} (paper {_show(c.paper)})" for c in row]
        rows.append((row[0].setting.replace("_", " "), *values, row[0].source))
    print_table(("setting", *variants, "source"), rows, title="Recipe 'paper' of each variant, beside Table 6")
    num_equal = sum(cell.ours == cell.paper for cell in cells)
    print(f"{num_equal} of {len(cells)} cells equal the paper's; training on ImageNet has not been run here")


def _show(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"
