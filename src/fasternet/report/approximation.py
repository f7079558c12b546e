"""What was measured for Table 2: operators in place of a regular convolution, and whether the paper's order holds.

Section 4.1: trained on the feature maps of a reference network, PConv + PWConv has the lowest loss on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fasternet.records import Record
from fasternet.report.provenance import number, unique
from fasternet.report.seeds import (
    FAILS,
    HOLDS,
    ONE_SEED,
    UNCLEAR,
    Mean,
    by_seed,
    find_difference,
    find_mean,
    group_alike,
    judge_difference,
)
from fasternet.report.sources import Source, select

OWN = "PConv + PWConv"
PAPER = {  # operators of the paper's table, and its columns
    "DWConv + PWConv": "dwconv_pwconv_mse",
    "GConv(16) + PWConv": "gconv16_pwconv_mse",
    OWN: "pconv_pwconv_mse",
}
CLOSED_FORM = f"{OWN} (least squares)"  # not trained
RIVALS = tuple(name for name in PAPER if name != OWN)
RELATIVE, ABSOLUTE = MEASURES = ("relative_mse", "mse")
AVERAGE = "average"


@dataclass(frozen=True)
class Layer:
    """A layer whose convolution is approximated; or, without a stage, the average of all."""

    name: str
    stage: object = None
    shape: str = ""


@dataclass(frozen=True)
class Comparison:
    """PConv + PWConv against another operator of the paper, on the average: differences paired by seed."""

    rival: str
    differences: Mapping[str, Mean]  # by measure

    def judge(self, measure: str = ABSOLUTE) -> str:
        """Say whether PConv + PWConv has the lower loss, as the paper claims."""
        return judge_difference(self.differences[measure], below=HOLDS, above=FAILS)


@dataclass(frozen=True)
class Approximation:
    """All that was measured under equal conditions: one network, its layers, its operators, its seeds."""

    records: tuple[Record, ...]

    @property
    def condition(self) -> Mapping[str, Any]:
        """Conditions, those of the first record."""
        return self.records[0].condition

    @cached_property
    def operators(self) -> list[str]:
        """The paper's first, in its order, then the others, last what is not trained."""
        found = unique(record.subject for record in self.records)
        others = (name for name in found if name not in PAPER)
        return [*(name for name in PAPER if name in found), *sorted(others, key=lambda name: name == CLOSED_FORM)]

    @property
    def trained(self) -> list[Record]:
        """Of operators that are trained."""
        return [record for record in self.records if record.subject != CLOSED_FORM]

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers by stage."""
        rows: dict[str, Layer] = {}
        for record in sorted(self.records, key=lambda r: str(r.condition.get("stage"))):
            sizes = [number(record, name) for name in ("out_channels", "height", "width")]
            shape = " × ".join("?" if size is None else f"{size:.0f}" for size in sizes)
            name = str(record.condition.get("layer"))
            rows.setdefault(name, Layer(name, record.condition.get("stage"), shape))
        return list(rows.values())

    @cached_property
    def common(self) -> list[Layer]:
        """The layers that all operators have, over which averages are taken."""
        found = {(record.subject, record.condition.get("layer")) for record in self.records}
        return [row for row in self.layers if all((name, row.name) in found for name in self.operators)]

    @property
    def has_papers_layers(self) -> bool:
        """Whether averages are over what the paper's are: one layer in each of the stages 1 to 4."""
        return [str(row.stage) for row in self.common] == ["1", "2", "3", "4"]

    def seeds(self, operator: str, layer: str, measure: str) -> dict[object, float]:
        """Return a loss by seed; of the average, of those seeds that have every common layer."""
        if layer != AVERAGE:
            own = (r for r in self.records if (r.subject, r.condition.get("layer")) == (operator, layer))
            return by_seed(own, measure)
        parts = [self.seeds(operator, row.name, measure) for row in self.common]
        shared = [seed for seed in parts[0] if all(seed in part for part in parts)] if parts else []
        return {seed: sum(part[seed] for part in parts) / len(parts) for seed in shared}

    def mean(self, operator: str, layer: str, measure: str) -> Mean | None:
        """Return the mean loss over seeds."""
        return find_mean(self.seeds(operator, layer, measure).values())

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """PConv + PWConv against each of the paper's others that was measured with the same seeds."""
        found = []
        for rival in RIVALS:
            differences = {
                measure: difference
                for measure in MEASURES
                if (difference := find_difference(*(self.seeds(name, AVERAGE, measure) for name in (OWN, rival))))
            }
            if len(differences) == len(MEASURES):
                found.append(Comparison(rival, differences))
        return found

    @property
    def is_complete(self) -> bool:
        """Whether the paper's three operators were measured with seeds that they share."""
        return len(self.comparisons) == len(RIVALS)

    def judge(self, measure: str = ABSOLUTE) -> str | None:
        """Say whether the paper's order holds; None where one of its three operators was not measured."""
        told = {comparison.judge(measure) for comparison in self.comparisons}
        if not self.is_complete:
            return None
        return next(word for word in (FAILS, ONE_SEED, UNCLEAR, HOLDS) if word in told)


def list_approximations(sources: Sequence[Source]) -> list[Approximation]:
    """Return what was measured, by its conditions."""
    records = [r for r in select(sources, "study", "approximation") if number(r, ABSOLUTE) is not None]
    return [Approximation(tuple(members)) for members in group_alike(records, ("stage", "layer", "bias"))]


def name_network(condition: Mapping[str, Any]) -> str:
    """Name a reference network with its weights: ``resnet18 (trained here)``."""
    weights = str(condition.get("weights"))
    is_published, is_own = weights.startswith("published"), weights.startswith("trained here")
    told = f"published weights {weights.removeprefix('published').strip(' ()')}".strip() if is_published else weights
    return f"{condition.get('model')} ({told if is_published or is_own else f'weights {weights}'})"
