"""The paper's tables as data ("Run, Don't Walk", CVPR 2023), each row with the version of the paper it stands in.

The CSV files can be laid next to the PDF. Two tables have a second source: ``table3_imagenet_remeasured`` holds what
the authors posted after they had mended the shortcut, and ``claims`` the sentences of abstract and text.
``today_accuracy`` is not the paper's: it quotes what others published for networks that came after it.
"""

from __future__ import annotations

import csv
from importlib import resources
from typing import NamedTuple

TABLES = (
    "claims",
    "table1_operators",
    "table2_approximation",
    "table3_imagenet",
    "table3_imagenet_remeasured",
    "table4_coco",
    "table5_ablation",
    "table6_imagenet_recipe",
    "table7_coco_recipe",
    "table8_architecture",
    "table9_forward_choice",
    "today_accuracy",
)


class Accuracy(NamedTuple):
    """A published ImageNet-1k top-1 in percent, which nothing here has measured, and where it is published."""

    top1: float
    source: str


def load_table(name: str) -> list[dict[str, str]]:
    """Read one table.

    Args:
        name: One of ``TABLES``.

    Returns:
        One dictionary a row, by column name; cells are text exactly as printed.

    Raises:
        ValueError: There is no such table.
    """
    if name not in TABLES:
        raise ValueError(f"table {name!r} is not one of {', '.join(TABLES)}")
    text = resources.files(__package__).joinpath(f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def load_accuracy() -> dict[str, Accuracy]:
    """Return the published top-1 of every network of Table 3 and of today's fast ones, by name."""
    paper = {row["network"]: Accuracy(float(row["top1"]), "paper, Table 3") for row in load_table("table3_imagenet")}
    today = {row["network"]: Accuracy(float(row["top1"]), row["source"]) for row in load_table("today_accuracy")}
    return paper | today
