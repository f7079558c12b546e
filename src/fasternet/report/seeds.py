"""Means over seeds with their 95 % intervals (Student's t), and differences of what had the same seeds, in pairs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from fasternet.records import Record
from fasternet.report.markup import Cell, tag
from fasternet.report.provenance import number
from fasternet.report.sources import group, newest

# Student's t, two-sided 95 %, for 1, 2, 3 ... degrees of freedom; beyond them 1.96 + 2.4/df is right to 0.001.
STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
UNLIKE = ("seed", "run", "num_workers")  # what may differ between the runs of one row
ONE_SEED = "one seed"
UNCLEAR = "not distinguishable"
HOLDS, PARTLY, FAILS = "holds", "partly", "does not hold"


class Mean(NamedTuple):
    """A mean over seeds.

    Attributes:
        value: The mean.
        margin: Half of the 95 % interval; None for a single seed.
        num_seeds: Over which it is taken.
    """

    value: float
    margin: float | None
    num_seeds: int

    @property
    def low(self) -> float:
        """Lower end of the interval; of a single seed, the value."""
        return self.value - (self.margin or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval; of a single seed, the value."""
        return self.value + (self.margin or 0.0)


def find_mean(values: Collection[float]) -> Mean | None:
    """Return the mean with its interval; of nothing, None."""
    if not values:
        return None
    count = len(values)
    if count == 1:
        return Mean(next(iter(values)), None, 1)
    df = count - 1
    quantile = STUDENT_T[df - 1] if df <= len(STUDENT_T) else 1.96 + 2.4 / df
    return Mean(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(count), count)


def find_difference(own: Mapping[object, float], other: Mapping[object, float]) -> Mean | None:
    """Return the mean of ``own`` minus ``other``, paired by the seeds that both have."""
    return find_mean([value - other[seed] for seed, value in own.items() if seed in other])


def judge_difference(difference: Mean, *, below: str, above: str) -> str:
    """Put a difference into a word: ``below`` or ``above`` zero where its interval excludes it."""
    if difference.margin is None:
        return ONE_SEED
    return below if difference.high < 0 else above if difference.low > 0 else UNCLEAR


def name_verdict(verdict: str) -> str:
    """Put a study's verdict into words: it is about the network that was studied, not about the paper's."""
    return f"{verdict} for this network" if verdict in (HOLDS, PARTLY, FAILS) else verdict


def by_seed(records: Iterable[Record], name: str) -> dict[object, float]:
    """Return a value of each seed, of the records that hold it."""
    latest = newest(records, lambda record: record.condition.get("seed")).items()
    return {seed: value for seed, record in latest if (value := number(record, name)) is not None}


def group_alike(records: Iterable[Record], unlike: Sequence[str] = ()) -> list[list[Record]]:
    """Group records of one machine whose conditions are equal but for seeds and what is named."""

    def key(record: Record) -> str:
        condition = {name: v for name, v in record.condition.items() if name not in (*UNLIKE, *unlike)}
        return json.dumps([record.machine, condition], sort_keys=True, default=str)

    return list(group(records, key).values())


def mean_cell(mean: Mean | None, form: str, *, marked: bool = False) -> Cell | None:
    """Return a mean and its margin as a cell, ``0.412 ± 0.013``; the marked one is strong."""
    if mean is None:
        return None
    margin = None if mean.margin is None else f" ± {mean.margin:{form.replace('+', '')}}"
    value = f"{mean.value:{form}}".replace("-", "−")
    return Cell(tag("span", tag("strong", value) if marked else value, margin, class_="whole"), mean.value)


def signed_cell(value: float, form: str) -> Cell:
    """Return a difference as a cell, with its sign."""
    return Cell(f"{value:{form}}".replace("-", "−"), value)


def span_cell(mean: Mean | None, form: str) -> Cell | None:
    """Return an interval as a cell; that of a single seed is not there."""
    if mean is None or mean.margin is None:
        return None
    low, high = (f"{end:{form}}".replace("-", "−") for end in (mean.low, mean.high))
    return Cell(f"{low} to {high}", mean.low)
