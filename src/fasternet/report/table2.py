"""Table 2: the losses of cheap operators beside the paper's, the verdict on their order, costs and conditions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from fasternet.paper import load_table
from fasternet.records import Machine, Record
from fasternet.report.approximation import (
    ABSOLUTE,
    AVERAGE,
    CLOSED_FORM,
    MEASURES,
    OWN,
    PAPER,
    RELATIVE,
    Approximation,
    Comparison,
    Layer,
    list_approximations,
    name_network,
)
from fasternet.report.compare import printed
from fasternet.report.markup import SPACED, Cell, Column, Html, figure, join, table, tag
from fasternet.report.provenance import count, number, provenance, unique
from fasternet.report.seeds import ONE_SEED, UNCLEAR, mean_cell, name_verdict, signed_cell, span_cell
from fasternet.report.sources import Source

LABELS = {RELATIVE: "Relative MSE on the test pictures", ABSOLUTE: "MSE, in the maps’ own units"}
TARGETS = {"conv": "the convolution’s own output", "norm": "the output of the normalisation behind the convolution"}
NORMALIZATIONS = {
    "none": "left as they are",
    "layer": "divided by one deviation per layer",
    "channel": "divided by a deviation per channel",
}


def show_approximation(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Table 2 for every set of conditions, with its verdict, its costs and its conditions in words."""
    found = list_approximations(sources)
    return [html for i, study in enumerate(found, start=1) for html in _show(f"table-2-{i}", study, machines)]


def _show(key: str, study: Approximation, machines: Mapping[str, Machine]) -> list[Html]:
    condition = study.condition
    size = f" at {condition['input_size']} px" if condition.get("input_size") else ""
    where = f"{name_network(condition)}{size}, pictures: {condition.get('data')}"
    paper = {row["stage"]: row for row in load_table("table2_approximation")}
    tables = [*(_table(key, study, measure) for measure in MEASURES), _table_paper(key, study, paper)]
    content = [tag("div", each, style=SPACED) for each in tables]
    small = provenance(study.records, machines)
    title = f"Table 2. Loss of operators that approximate a regular convolution: {where}"
    shown = [figure(key, title, join(content), *_explain(study), small)]
    if study.comparisons:
        verdict = study.judge()
        told = "is not judged, one of its operators is missing" if verdict is None else _tell_verdict(verdict)
        title = f"The order of Table 2 {told}: {where}"
        shown.append(figure(f"{key}-verdict", title, _table_verdict(f"{key}-verdict", study, paper), VERDICT, small))
    if study.common:
        title = f"Costs of the operators of Table 2, {_tell_common(study)} together: {where}"
        shown.append(figure(f"{key}-costs", title, _table_costs(f"{key}-costs", study), COSTS, small))
    return shown


def _tell_verdict(verdict: str) -> str:
    return {UNCLEAR: "is not distinguishable", ONE_SEED: "is not judged, one seed has no interval"}.get(
        verdict, f"{name_verdict(verdict)}, on the average"
    )


def _tell_common(study: Approximation) -> str:
    names = [row.name for row in study.common]
    return f"all {len(names)} layers" if len(names) == len(study.layers) else f"the layers {', '.join(names)}"


def _table(key: str, study: Approximation, measure: str) -> Html:
    rows = [*study.layers, *([Layer(AVERAGE)] if study.common else [])]
    means = {(name, row.name): study.mean(name, row.name, measure) for name in study.operators for row in rows}
    form = _choose_form(mean.value for mean in means.values() if mean)
    lowest = {
        row.name: min(
            (m.value for name in study.operators if name != CLOSED_FORM and (m := means[name, row.name])), default=None
        )
        for row in rows
    }

    def here(name: str) -> Callable[[Layer], Cell | None]:
        def cell(row: Layer) -> Cell | None:
            mean = means[name, row.name]
            marked = mean is not None and name != CLOSED_FORM and mean.value == lowest[row.name]
            return mean_cell(mean, form, marked=marked)

        return cell

    counted = (
        f"{'all' if len(study.common) == len(study.layers) else f'{len(study.common)} of'} {len(study.layers)} layers"
    )
    columns: list[Column[Layer]] = [
        Column("Stage", lambda row: AVERAGE if row.name == AVERAGE else str(row.stage)),
        Column("layer", lambda row: counted if row.name == AVERAGE else row.name),
    ]
    group = f"{LABELS[measure]}, mean ± 95 %"
    columns += [
        Column(OWN, here(name), "", "Closed form") if name == CLOSED_FORM else Column(name, here(name), "", group)
        for name in study.operators
    ]
    return table(key, columns, rows, breaks=(len(study.layers),))


def _table_paper(key: str, study: Approximation, paper: Mapping[str, Mapping[str, str]]) -> Html:
    """Put the paper's losses beside the layers that stand for its stages."""
    rows = [*study.layers, *([Layer(AVERAGE)] if study.has_papers_layers else [])]

    def from_paper(name: str) -> Callable[[Layer], float | None]:
        stages = [row.stage for row in rows]

        def cell(row: Layer) -> float | None:
            place = AVERAGE if row.name == AVERAGE else str(row.stage) if stages.count(row.stage) == 1 else ""
            return printed(paper.get(place, {}), PAPER[name])

        return cell

    columns: list[Column[Layer]] = [
        Column("Stage", lambda row: AVERAGE if row.name == AVERAGE else str(row.stage)),
        Column("layer", lambda row: None if row.name == AVERAGE else row.name),
        Column("C × H × W", lambda row: row.shape or None),
        *(Column(name, from_paper(name), ".4f", "Paper v1, MSE") for name in study.operators if name in PAPER),
    ]
    return table(key, columns, rows, breaks=(len(study.layers),))


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
        def cell(row: Comparison) -> Html:
            told = row.judge(measure)
            return tag("span", name_verdict(told), class_=f"verdict {told.replace(' ', '-')}")

        return cell

    def printed_difference(row: Comparison) -> Cell | None:
        own, other = (printed(paper[AVERAGE], PAPER[name]) for name in (OWN, row.rival))
        if own is None or other is None or not study.has_papers_layers:
            return None
        return signed_cell(own - other, "+.4f")

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
            values = [value for row in study.common if (value := found.get(row.name)) is not None]
            return sum(values) if values and len(values) == len(study.common) else None

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
    "t over the seeds: holds for this network, where it lies below zero; does not, where it lies above; else not "
    "distinguishable. "
    "There are two averages: of the MSE, which the paper takes and which the verdict goes by, and of the relative MSE, "
    "in which every layer has the same weight. Both are of this one network; another may differ by more than the seeds."
)
COSTS = "The paper compares operators of unlike cost: T-shaped and r = 1/2 compute more than PConv + PWConv at r = 1/4."


LEAST_SQUARES = (
    "Closed form: not trained, least squares on the training part: what PConv + PWConv can reach at all there; of the "
    "other operators none has one here, so that it is out of the comparison."
)


def _explain(study: Approximation) -> list[str | None]:
    """Tell how the losses are to be read, and under which conditions they were measured."""
    condition, records = study.condition, study.trained
    seeds = len({record.condition.get("seed") for record in records})
    sizes = [condition.get(f"num_{part}") for part in ("train", "validation", "test")]
    told = [f"{size:,}" if isinstance(size, int) else "?" for size in sizes]
    data = condition.get("data")
    target = TARGETS.get(str(condition.get("target")), f"{condition.get('target')}")
    normalization = NORMALIZATIONS.get(str(condition.get("normalize")), f"normalised by {condition.get('normalize')}")
    all_have = "" if len(study.common) == len(study.layers) else ", which all operators have"
    passed = [value for record in records if (value := number(record, "num_epochs")) is not None]
    spent = " to ".join(unique(f"{value:.0f}" for value in (min(passed), max(passed)))) if passed else ""
    stopped = f" ({spent} were spent)" if spent else ""
    apart = ", each with its own split and its own initial weights" if seeds > 1 else ""
    own = f" The network was trained on {data} too: most of these pictures trained it." if _is_trained_on(study) else ""
    return [
        "Relative MSE is the mean squared error on the test pictures over the variance of what is approximated, about "
        "the mean of each channel: 0 is exact, 1 is no better than a constant. Strong: the lowest of a row. The "
        "paper’s losses are of another network, other pictures and another scale: compare their order within a row, "
        f"not their size. The average is over {_tell_common(study)}{all_have}.",
        LEAST_SQUARES if CLOSED_FORM in study.operators else None,
        f"Reference: {name_network(condition)}. In each stage the named 3 × 3 convolution of stride 1, since PConv "
        "has stride 1; C × H × W is its output. "
        f"Approximated is {target}; the maps are {normalization}. Pictures of {data}: "
        f"{told[0]} to train, {told[1]} to stop early, {told[2]} to test.{own} Every operator has the same budget: "
        f"Adam without weight decay, one peak rate for all operators, {condition.get('lr')}, on a cosine to 0, batch "
        f"{condition.get('batch_size')}, {condition.get('epochs')} epochs at most{stopped}, patience "
        f"{condition.get('patience')}; {count(seeds, 'seed')}{apart}.",
        _tell_unconverged(records),
    ]


def _is_trained_on(study: Approximation) -> bool:
    """Whether the pictures are those on which the network was trained."""
    name, is_own, data = str(study.condition.get("weights")).partition("trained here on ")
    return bool(is_own) and not name and data == str(study.condition.get("data"))


def _tell_unconverged(records: Sequence[Record]) -> str | None:
    """Say where most operators were still improving when the budget ended."""
    spent = [(number(record, "best_epoch"), record.condition.get("epochs")) for record in records]
    at_end = sum(best is not None and best == epochs for best, epochs in spent)
    if 2 * at_end <= len(spent):
        return None
    return (
        f"Not converged: in {at_end} of {len(spent)} trainings the last epoch was the best, so that more epochs would "
        "lower the losses, and might change their order."
    )
