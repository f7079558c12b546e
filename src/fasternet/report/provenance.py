"""Small print: on which machine, with which versions, when, by which command and under which conditions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fasternet.records import Machine, Record
from fasternet.report.markup import Html, join, tag
from fasternet.report.sources import setting

# How conditions read, in the order in which they are told; what is told elsewhere reads as nothing.
CONDITIONS: dict[str, Callable[[Any], str]] = {
    "device": lambda value: str(value).upper(),
    "threads": lambda value: f"{value} thread" if value == 1 else f"{value} threads",
    "batch_size": "batch {}".format,
    "precision": str,
    "engine": str,
    "isa": "{} at most".format,
    "memory_format": str,
    "passes": str,
    "num_layers": "{} stacked layers".format,
    "input_size": "{} px".format,
    "channels": "C {}".format,
    "height": "H {}".format,
    "width": "W {}".format,
    "size": lambda value: f"{value} size" if isinstance(value, str) else f"side {value}",
    "mib": "{} MiB".format,
    **dict.fromkeys(
        ("baseline", "baseline_engine", "baseline_precision", "best_engines", "best_rival", "metric", "sweep", "stage"),
        lambda _: "",
    ),
    # Digits that tell conditions apart and tell a reader nothing, and what captions name.
    **dict.fromkeys(("weights_hash", "pictures_hash", "picture"), lambda _: ""),
}


def number(record: Record, name: str) -> float | None:
    """Return a value where it is a finite number, else None."""
    value = record.values.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def shared_condition(records: Sequence[Record]) -> dict[str, Any]:
    """Return the conditions that all records have in common."""
    first = records[0].condition
    return {
        name: value for name, value in first.items() if all(record.condition.get(name) == value for record in records)
    }


def describe_condition(condition: Mapping[str, Any]) -> str:
    """Put conditions into words: the well-known ones first, the rest by name."""
    known = [tell(condition[name]) for name, tell in CONDITIONS.items() if condition.get(name) is not None]
    rest = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in condition.items()
        if name not in CONDITIONS and isinstance(value, str | int | float)
    ]
    return ", ".join(filter(None, known + rest))


def describe_setting(record: Record) -> str:
    """Put into words what a table's measurements have in common, for its title."""
    return describe_condition(setting(record))


def describe_machine(name: str, machines: Mapping[str, Machine]) -> str:
    """Put a machine into words: its processor where its description is at hand, else its id."""
    if not (machine := machines.get(name)):
        return name or "an unknown machine"
    parts = (machine.accelerator, machine.processor, f"{machine.cores} cores", f"{machine.memory_gib:g} GiB")
    return ", ".join(part for part in parts if part)


def provenance(records: Sequence[Record], machines: Mapping[str, Machine]) -> Html:
    """Tell where records come from, as the small print of a figure."""
    condition = describe_condition(shared_condition(records))
    where = "; ".join(unique(describe_machine(record.machine, machines) for record in records))
    versions = "; ".join(unique(describe_versions(record.versions) for record in records))
    commits = ", ".join(unique(record.commit for record in records if record.commit))
    commands = unique(record.command for record in records if record.command)
    return join(
        [
            f"Measured on {where}",
            f": {condition}" if condition else None,
            f". {describe_dates(records)}",
            f", {versions}" if versions else None,
            f", commit {commits}" if commits else None,
            ". ",
            *(join([tag("code", command), " "]) for command in commands),
        ]
    )


def describe_versions(versions: Mapping[str, str]) -> str:
    """Put versions into words."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def describe_dates(records: Iterable[Record]) -> str:
    """Return the day of the records, or the first and the last one."""
    days = sorted({record.created[:10] for record in records if record.created})
    return " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "undated"


def count(number: int, noun: str) -> str:
    """Put a number of things into words."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def unique(texts: Iterable[str]) -> list[str]:
    """Return each text once, in order of first appearance."""
    return list(dict.fromkeys(texts))
