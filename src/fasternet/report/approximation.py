"""Table 2: how closely cheap operators approximate a regular convolution, and whether the paper's order holds.

Section 4.1: trained on the feature maps of a reference network, PConv + PWConv has the lowest loss on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fasternet.paper import load_table
from fasternet.records import Machine, Record
from fasternet.report.compare import printed
from fasternet.report.markup import Cell, Column, Html, figure, join, table, tag
from fasternet.report.provenance import count, number, provenance, unique
from fasternet.report.seeds import (
    ONE_SEED,
    UNCLEAR,
    Mean,
    by_seed,
    find_difference,
    find_mean,
    group_alike,
    judge_difference,
    mean_cell,
    signed_cell,
    span_cell,
)
from fasternet.report.sources import Source, select

OWN = "PConv + PWConv"
PAPER = {  # operators of the paper's table, and its columns
    "DWConv + PWConv": "dwconv_pwconv_mse",
    "GConv(16) + PWConv": "gconv16_pwconv_mse",
    OWN: "pconv_pwconv_mse",
}
RIVALS = tuple(name for name in PAPER if name != OWN)
RELATIVE, ABSOLUTE = "relative_mse", "mse"
MEASURES = {RELATIVE: "Relative MSE on the test pictures", ABSOLUTE: "MSE, in the maps’ own units"}
HOLDS, FAILS = "holds", "does not hold"
AVERAGE = "average"
SPACED = "margin-top: 1.25rem"
TARGETS = {"conv": "the convolution’s own output", "norm": "the output of the normalisation behind the convolution"}
NORMALIZATIONS = {
    "none": "left as they are",
    "layer": "divided by one deviation per layer",
    "channel": "divided by a deviation per channel",
}


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
        """The paper's first, in its order, then the others."""
        found = unique(record.subject for record in self.records)
        return [*(name for name in PAPER if name in found), *(name for name in found if name not in PAPER)]

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

    def seeds(self, operator: str, layer: str, measure: str) -> dict[object, float]:
        """Return a loss by seed; of the average, of those seeds that have every layer."""
        if layer != AVERAGE:
            own = (r for r in self.records if (r.subject, r.condition.get("layer")) == (operator, layer))
            return by_seed(own, measure)
        parts = [self.seeds(operator, row.name, measure) for row in self.layers]
        shared = [seed for seed in parts[0] if all(seed in part for part in parts)]
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


def show_approximation(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Table 2 for every set of conditions, with its verdict, its costs and its conditions in words."""
    found = list_approximations(sources)
    return [html for i, study in enumerate(found, start=1) for html in _show(f"table-2-{i}", study, machines)]


def name_network(condition: Mapping[str, Any]) -> str:
    """Name a reference network with its weights: ``resnet18 (trained here)``."""
    weights = condition.get("weights")
    known = {"trained here": weights, "published": "published weights"}
    return f"{condition.get('model')} ({known.get(str(weights), f'weights {weights}')})"


def _show(key: str, study: Approximation, machines: Mapping[str, Machine]) -> list[Html]:
    condition, rows = study.condition, [*study.layers, Layer(AVERAGE)]
    size = f" at {condition['input_size']} px" if condition.get("input_size") else ""
    where = f"{name_network(condition)}{size}, pictures: {condition.get('data')}"
    paper = {row["stage"]: row for row in load_table("table2_approximation")}
    content = [tag("div", _table(key, study, measure, rows, paper), style=SPACED) for measure in MEASURES]
    small = provenance(study.records, machines)
    title = f"Table 2. Loss of operators that approximate a regular convolution: {where}"
    shown = [figure(key, title, join(content), *_explain(study), small)]
    if study.comparisons:
        verdict = study.judge()
        told = "is not judged, one of its operators is missing" if verdict is None else _tell_verdict(verdict)
        title = f"The order of Table 2 {told}: {where}"
        shown.append(figure(f"{key}-verdict", title, _table_verdict(f"{key}-verdict", study, paper), VERDICT, small))
    title = f"Costs of the operators of Table 2, all layers together: {where}"
    shown.append(figure(f"{key}-costs", title, _table_costs(f"{key}-costs", study), COSTS, small))
    return shown


def _tell_verdict(verdict: str) -> str:
    return {UNCLEAR: "is not distinguishable", ONE_SEED: "is not judged, one seed has no interval"}.get(
        verdict, f"{verdict} on the average"
    )


def _table(
    key: str, study: Approximation, measure: str, rows: Sequence[Layer], paper: Mapping[str, Mapping[str, str]]
) -> Html:
    means = {(name, row.name): study.mean(name, row.name, measure) for name in study.operators for row in rows}
    form = _choose_form(mean.value for mean in means.values() if mean)
    lowest = {
        row.name: min((m.value for name in study.operators if (m := means[name, row.name])), default=None)
        for row in rows
    }

    def here(name: str) -> Callable[[Layer], Cell | None]:
        def cell(row: Layer) -> Cell | None:
            mean = means[name, row.name]
            return mean_cell(mean, form, marked=mean is not None and mean.value == lowest[row.name])

        return cell

    def from_paper(name: str) -> Callable[[Layer], float | None]:
        stages = [row.stage for row in rows]

        def cell(row: Layer) -> float | None:
            place = AVERAGE if row.name == AVERAGE else str(row.stage) if stages.count(row.stage) == 1 else ""
            return printed(paper.get(place, {}), PAPER[name])

        return cell

    columns: list[Column[Layer]] = [
        Column("Stage", lambda row: AVERAGE if row.name == AVERAGE else str(row.stage)),
        Column("layer", lambda row: None if row.name == AVERAGE else row.name),
    ]
    if measure == RELATIVE:
        columns.append(Column("C × H × W", lambda row: row.shape or None))
    columns += [Column(name, here(name), "", f"{MEASURES[measure]}, mean ± 95 %") for name in study.operators]
    if measure == ABSOLUTE:
        columns += [Column(name, from_paper(name), ".4f", "Paper v1, MSE") for name in study.operators if name in PAPER]
    return table(key, columns, rows, breaks=(len(rows) - 1,))


def _choose_form(values: Iterable[float]) -> str:
    """Return the format in which the smallest of a table's numbers has three digits."""
    least = min((value for value in values if value > 0), default=1.0)
    return f".{max(2 - math.floor(math.log10(least)), 2)}f"


def _table_verdict(key: str, study: Approximation, paper: Mapping[str, Mapping[str, str]]) -> Html:
    forms = {
        measure: "+" + _choose_form(abs(row.differences[measure].value) for row in study.comparisons)
        for measure in MEASURES
    }

    def difference(measure: str) -> Callable[[Comparison], Cell | None]:
        return lambda row: signed_cell(row.differences[measure].value, forms[measure])

    def interval(measure: str) -> Callable[[Comparison], Cell | None]:
        return lambda row: span_cell(row.differences[measure], forms[measure])

    def verdict(measure: str) -> Callable[[Comparison], Html]:
        return lambda row: tag("span", told := row.judge(measure), class_=f"verdict {told.replace(' ', '-')}")

    def printed_difference(row: Comparison) -> Cell | None:
        own, other = (printed(paper[AVERAGE], PAPER[name]) for name in (OWN, row.rival))
        return None if own is None or other is None else signed_cell(own - other, "+.4f")

    columns: list[Column[Comparison]] = [
        Column(f"{OWN} minus", lambda row: row.rival),
        Column("paper v1", printed_difference, "", "Average of MSE, as the paper"),
    ]
    for measure, group in ((ABSOLUTE, "Average of MSE, as the paper"), (RELATIVE, "Average of relative MSE")):
        columns += [
            Column("difference", difference(measure), "", group),
            Column("95 % interval", interval(measure), "", group),
            Column("verdict", verdict(measure), None, group),
        ]
    return table(key, columns, study.comparisons)


def _table_costs(key: str, study: Approximation) -> Html:
    def total(name: str) -> Callable[[str], float | None]:
        def add(operator: str) -> float | None:
            found = {r.condition.get("layer"): number(r, name) for r in study.records if r.subject == operator}
            values = [value for value in found.values() if value is not None]
            return sum(values) if len(values) == len(study.layers) else None

        return add

    params, macs = total("num_params"), total("macs")

    def relative(operator: str) -> float | None:
        own, base = macs(operator), macs(OWN)
        return own / base if own and base else None

    def thousands(operator: str) -> float | None:
        own = params(operator)
        return None if own is None else own / 1e3

    def millions(operator: str) -> float | None:
        own = macs(operator)
        return None if own is None else own / 1e6

    columns: list[Column[str]] = [
        Column("Operator", lambda name: name),
        Column("parameters, thousands", thousands, ",.1f"),
        Column("multiply-adds, M", millions, ",.2f"),
        Column(f"multiply-adds, relative to {OWN}", relative, ".2f"),
    ]
    return table(key, columns, study.operators)


VERDICT = (
    "Below zero PConv + PWConv has the lower loss. The difference is taken seed by seed, and its interval is Student’s "
    "t over the seeds: holds, where it lies below zero; does not hold, where it lies above; else not distinguishable. "
    "There are two averages: of the MSE, which the paper takes and which the verdict goes by, and of the relative MSE, "
    "in which every layer has the same weight. Both are of this one network; another may differ by more than the seeds."
)
COSTS = "The paper compares operators of unlike cost: T-shaped and r = 1/2 compute more than PConv + PWConv at r = 1/4."


def _explain(study: Approximation) -> list[str]:
    """Tell how the losses are to be read, and under which conditions they were measured."""
    condition, records = study.condition, study.records
    seeds = len({record.condition.get("seed") for record in records})
    sizes = [condition.get(f"num_{part}") for part in ("train", "validation", "test")]
    told = [f"{size:,}" if isinstance(size, int) else "?" for size in sizes]
    target = TARGETS.get(str(condition.get("target")), f"{condition.get('target')}")
    normalization = NORMALIZATIONS.get(str(condition.get("normalize")), f"normalised by {condition.get('normalize')}")
    passed = [value for record in records if (value := number(record, "num_epochs")) is not None]
    spent = " to ".join(unique(f"{value:.0f}" for value in (min(passed), max(passed)))) if passed else ""
    stopped = f" ({spent} were spent)" if spent else ""
    apart = ", each with its own split and its own initial weights" if seeds > 1 else ""
    return [
        "Relative MSE is the mean squared error on the test pictures over the variance of what is approximated, about "
        "the mean of each channel: 0 is exact, 1 is no better than a constant. Strong: the lowest of a row. The "
        "paper’s losses are of another network, other pictures and another scale: compare their order within a row, "
        "not their size.",
        f"Reference: {name_network(condition)}. In each stage the named 3 × 3 convolution of stride 1, since PConv "
        "has stride 1; C × H × W is its output. "
        f"Approximated is {target}; the maps are {normalization}. Pictures of {condition.get('data')}: "
        f"{told[0]} to train, {told[1]} to stop early, {told[2]} to test. Every operator has the same budget: "
        f"{condition.get('epochs')} epochs at most{stopped}, patience {condition.get('patience')}, batch "
        f"{condition.get('batch_size')}, learning rate {condition.get('lr')}; {count(seeds, 'seed')}{apart}.",
    ]
