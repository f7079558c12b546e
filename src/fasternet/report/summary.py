"""The headline of a report: which claims hold, what was trained, what optimising changed, how fast it is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from fasternet.records import Machine, Record
from fasternet.report.approximation import name_network
from fasternet.report.claims import Verdict, count_verdicts, list_claims
from fasternet.report.compare import Timing, scaled
from fasternet.report.learning import Learned, find_learned
from fasternet.report.markup import Html, join, power_of_ten, tag
from fasternet.report.objects import find_evaluation, list_unlike, read_ap, tell_pictures
from fasternet.report.operators import compare_flops
from fasternet.report.provenance import (
    count,
    describe_condition,
    describe_setting,
    number,
    shared_condition,
    unique,
)
from fasternet.report.ratios import list_ratios
from fasternet.report.settings import read_way
from fasternet.report.sources import COMPARABLE, Source, comparable, group, newest, select
from fasternet.report.training import last_epochs, tell_epochs

MAX_CLAIMS = 4  # of a kind
STUDIED: Mapping[Verdict, str] = {
    "partly": "partly",
    "not distinguishable": "not distinguishable",
    "does not hold": "not",
}
HEADLINES = ("deploy", "training-speed")  # suites whose ratios come first


def show_summary(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Tell which claims hold, what was trained, what optimising changed and how fast it all is."""
    learned = [row for row in find_learned(sources) if len(row.runs) > 1]
    told = {id(source) for row in learned for source in row.sources}
    facts = [*_tell_claims(sources, machines), *(_tell_learned(row) for row in learned)]
    facts += [fact for source in sources if id(source) not in told for fact in _tell_training(source)]
    facts += [fact for source in list_unlike(sources) for fact in _tell_detection(source)]
    facts += [*_tell_differences(sources), *_tell_flops(sources)]
    ranked: list[list[tuple[Record, Timing]]] = [[], [], []]
    for record, timing in list_ratios(sources):
        if (rank := _rank(record)) is not None:
            ranked[rank].append((record, timing))
    chosen = [row for rows in ranked for row in _of_one_setting(rows)[:MAX_CLAIMS]]
    content = [tag("dl", *facts, class_="facts")] if facts else []
    if chosen:
        shared = shared_condition([record for record, _ in chosen])
        under = "; ".join(filter(None, ("Time with its 95 % interval", describe_condition(shared))))
        content += [
            tag("ul", *(_claim(record, timing, shared) for record, timing in chosen), class_="claims"),
            tag("p", f"{under}. All ratios stand ", tag("a", "below", href="#section-ratios"), ".", class_="note"),
        ]
    return content


def _fact(figure: object, *text: object) -> Html:
    return tag("div", tag("dt", figure), tag("dd", *text))


def _tell_training(source: Source) -> list[Html]:
    """Tell the top-1 of every network that this file evaluates, with its size and how long the training took."""
    epochs = group(select([source], "epoch"), lambda record: record.subject)
    runs = newest(select([source], "run"), lambda record: record.subject)
    evaluations = newest(select([source], "evaluation"), lambda record: record.subject)
    facts = []
    for name in unique([*epochs, *evaluations]):
        passed, judged = last_epochs(epochs.get(name, [])), evaluations.get(name)
        best = max((top1 for record in passed if (top1 := number(record, "top1")) is not None), default=None)
        top1 = number(judged, "top1") if judged else best
        if top1 is None:
            continue
        pictures, size = scaled(judged, "num_images", 1), scaled(runs.get(name), "num_params", 1e6)
        seconds = sum(number(record, "seconds") or 0 for record in passed)
        told = [
            f" top-1{f' on {pictures:,.0f} pictures' if pictures else ''}",
            f"{size:.2f} M parameters" if size else None,
            f"trained for {tell_epochs(source, passed)} in {_duration(seconds)}" if passed else None,
        ]
        facts.append(_fact(f"{top1:.1f} %", tag("strong", name), ", ".join(filter(None, told))))
    return facts


def _tell_detection(source: Source) -> list[Html]:
    """Tell the AP of a detector, of its masks first, on how many pictures, with its size and how long it trained."""
    runs, passed = select([source], "run"), last_epochs(select([source], "epoch"))
    best = max(filter(read_ap, passed), key=lambda record: read_ap(record)[0][1], default=None)
    judged = find_evaluation(source) or best
    if not judged or not (aps := read_ap(judged)):
        return []
    (name, ap), *others = aps
    rest = "".join(f", {other} {value:.2f}" for other, value in others)
    size = scaled(runs[-1], "num_params", 1e6) if runs else None
    seconds = sum(number(record, "seconds") or 0 for record in passed)
    told = [
        f" {name}{rest}{f' on {pictures}' if (pictures := tell_pictures(judged)) else ''}",
        f"{size:.2f} M parameters" if size else None,
        f"trained for {tell_epochs(source, passed)} in {_duration(seconds)}" if passed else None,
    ]
    return [_fact(f"{ap:.2f}", tag("strong", judged.subject), ", ".join(filter(None, told)))]


def _tell_learned(row: Learned) -> Html:
    """Tell the mean top-1 of runs that differ in their seed alone."""
    span = f"{min(row.top1):.1f} to {max(row.top1):.1f} %"
    text = f" top-1 on {row.condition.get('data')}, mean of {count(len(row.top1), 'run')} ({span})"
    return _fact(f"{statistics.fmean(row.top1):.1f} %", tag("strong", row.runs[0].subject), text)


def _tell_differences(sources: Sequence[Source]) -> list[Html]:
    """Tell how many predictions optimising changed, of all networks together."""
    found = [record for record in select(sources, "difference") if record.suite != "engines"]  # of which some are bf16
    latest = newest(found, lambda record: record.subject).values()
    own = [record for record in latest if record.subject.partition(":")[0] == record.condition.get("baseline")]
    told = [
        record for record in own if None not in (number(record, "changed_predictions"), number(record, "num_images"))
    ]
    if not told:
        return []
    changed, pictures = (sum(number(r, name) or 0 for r in told) for name in ("changed_predictions", "num_images"))
    differences = [value for record in told if (value := number(record, "max_relative_difference")) is not None]
    rest = join(["; largest relative difference ", power_of_ten(max(differences))]) if differences else None
    names = tag("strong", ", ".join(str(record.condition["baseline"]) for record in told))
    return [_fact(f"{changed:,.0f} of {pictures:,.0f}", "predictions changed by optimising ", names, rest)]


def _tell_flops(sources: Sequence[Source]) -> list[Html]:
    """Tell how the FLOPS of PConv compare with those of DWConv."""
    facts = []
    for condition, records in group(select(sources, "latency", "operators"), comparable).items():
        ratios = [ratio for ratio in select(sources, "ratio", "operators") if comparable(ratio) == condition]
        if rates := [rate.value for rate in compare_flops(records, ratios).values()]:
            span = "–".join(unique(f"{rate:.1f}" for rate in (min(rates), max(rates))))
            text = f"’s FLOPS relative to DWConv’s, over {count(len(rates), 'shape')}; {describe_setting(records[0])}"
            facts.append(_fact(f"{span} ×", tag("strong", "PConv"), text))
    return facts


def _tell_claims(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Tell how many of the paper's claims hold, where any was measured; those that a study judged, apart."""
    claims, facts = list_claims(sources, machines), []
    studied = [claim for claim in claims if claim.is_studied]
    measured = [claim for claim in claims if claim.machine and claim.eager and not claim.is_studied]
    link = tag("a", "claims of the paper", href="#section-claims")
    if measured:
        counts = count_verdicts(measured)
        computed = count_verdicts([claim for claim in claims if claim.eager and not claim.machine])["holds"]
        rest = f"{counts['partly']} partly, {counts['does not hold']} not. {computed} more hold by computation, "
        rest += f"{count_verdicts(claims)['not run']} were not run"
        facts.append(
            _fact(f"{counts['holds']} of {len(measured)}", "measured ", link, f" hold in eager PyTorch; {rest}")
        )
    if studied:
        counts = count_verdicts(studied)
        rest = ", ".join(f"{counts[v]} {word}" for v, word in STUDIED.items() if counts[v])
        networks = unique(name_network(claim.eager.records[0].condition) for claim in studied if claim.eager)
        told = f" hold on networks at hand, {', '.join(networks)}{f'; {rest}' if rest else ''}"
        facts.append(_fact(f"{counts['holds']} of {len(studied)}", link, " about trained networks", told))
    return facts


def _of_one_setting(rows: list[tuple[Record, Timing]]) -> list[tuple[Record, Timing]]:
    """Keep the ratios of networks that share machine and conditions with the first one: engines do not mix."""
    networks = [record for record, _ in rows if record.suite == "networks"]
    return [row for row in rows if row[0].suite != "networks" or comparable(row[0]) == comparable(networks[0])]


def _rank(ratio: Record) -> int | None:
    """Return how far up a ratio belongs in the summary: optimising, the forms of PConv, the paper's rivals."""
    own, _, form = ratio.subject.partition(":")
    baseline = str(ratio.condition.get("baseline"))
    if read_way(ratio) != read_way(ratio, "baseline_") or ratio.condition.get("best_engines"):
        return None
    if ratio.suite != "networks":
        return 0 if ratio.suite in HEADLINES else None
    if form:
        return 1 if own == baseline else None
    rivals = baseline.startswith("FasterNet") and ":" not in baseline and not own.startswith("FasterNet")
    return 2 if rivals else None


def _claim(record: Record, timing: Timing, shared: Mapping[str, object]) -> Html:
    differing = describe_condition({name: record.condition.get(name) for name in COMPARABLE if name not in shared})
    return tag(
        "li",
        tag("strong", record.subject),
        " takes ",
        tag("strong", f"{timing.value:.2f} ×"),
        f" the time of {record.condition.get('baseline')} ",
        tag("span", f"({timing.low:.2f}–{timing.high:.2f})", class_="whole"),
        ", ",
        tag("em", record.values.get("verdict")),
        f"; {differing}" if differing else None,
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
