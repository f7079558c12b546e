"""The top of a report and its end: the headline figures; costs, machines, commands and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fasternet.records import Machine, Record
from fasternet.report.compare import Timing, scaled
from fasternet.report.markup import Cell, Column, Html, figure, join, table, tag
from fasternet.report.operators import compare_flops
from fasternet.report.provenance import (
    count,
    describe_condition,
    describe_dates,
    describe_machine,
    describe_setting,
    describe_versions,
    number,
    provenance,
    shared_condition,
    unique,
)
from fasternet.report.ratios import list_ratios
from fasternet.report.sources import COMPARABLE, Source, comparable, group, newest, select
from fasternet.report.training import last_epochs

MAX_CLAIMS = 4  # of a kind
UNITS = {"macs_per_second": (1e9, "G multiply-adds/s"), "bytes_per_second": (1e9, "GB/s")}
NOTES = {
    "ratios": "Claims of speed are ratios. Candidates run interleaved in one process; a ratio is that of their median "
    "times, with a bootstrap 95 % interval. A verdict needs an interval without 1, and a ratio that is further from 1 "
    "than the A/A spread of that run, the baseline measured against itself.",
    "paper-speeds": "The paper’s speeds are those of its version v1. Those of FasterNet and PConv were measured with "
    "an in-place partial convolution that overwrites the shortcut of the residual block: not quite the function that "
    "was trained. All of them come from other processors and other software, so compare ratios, not milliseconds.",
    "flops": "FLOPs are multiply-adds, as in the paper; FLOPS are multiply-adds per second. The paper counts "
    "parameters without batch normalisation.",
    "unstable": "† Unstable: the middle half of the repetitions spreads over more than 10 % of their median.",
}


def show_summary(sources: Sequence[Source]) -> list[Html]:
    """Tell what was trained, what optimising changed and how fast it all is."""
    facts = [fact for source in sources for fact in _tell_training(source)]
    facts += [*_tell_differences(sources), *_tell_flops(sources)]
    ranked: list[list[tuple[Record, Timing]]] = [[], [], []]
    for record, timing in list_ratios(sources):
        if (rank := _rank(record)) is not None:
            ranked[rank].append((record, timing))
    chosen = [row for rows in ranked for row in rows[:MAX_CLAIMS]]
    content = [tag("dl", *facts, class_="facts")] if facts else []
    if chosen:
        shared = shared_condition([record for record, _ in chosen])
        note = f"Time with its 95 % interval; {describe_condition(shared)}. All ratios stand "
        content += [
            tag("ul", *(_claim(record, timing, shared) for record, timing in chosen), class_="claims"),
            tag("p", note, tag("a", "below", href="#section-ratios"), ".", class_="note"),
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
            f"trained for {count(len(passed), 'epoch')} in {_duration(seconds)}" if passed else None,
        ]
        facts.append(_fact(f"{top1:.1f} %", tag("strong", name), ", ".join(filter(None, told))))
    return facts


def _tell_differences(sources: Sequence[Source]) -> list[Html]:
    """Tell how many predictions optimising changed."""
    facts = []
    for name, record in newest(select(sources, "difference"), lambda record: record.subject).items():
        changed, pictures = number(record, "changed_predictions"), number(record, "num_images")
        if changed is None or pictures is None:
            continue
        largest = number(record, "max_relative_difference")
        rest = None if largest is None else join(["; largest relative difference ", _power_of_ten(largest)])
        text = "predictions changed by optimising "
        facts.append(_fact(f"{changed:,.0f} of {pictures:,.0f}", text, tag("strong", name), rest))
    return facts


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


def _rank(ratio: Record) -> int | None:
    """Return how far up a ratio belongs in the summary: optimising, the forms of PConv, the paper's rivals."""
    own, _, form = ratio.subject.partition(":")
    baseline = str(ratio.condition.get("baseline"))
    if ratio.suite != "networks":
        return 0 if ratio.suite == "optimize" else None
    if form:
        return 1 if own == baseline else None
    rivals = baseline.startswith("FasterNet") and not own.startswith("FasterNet")
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


def _power_of_ten(value: float) -> Html:
    digits, power = f"{value:.1e}".split("e")
    exponent = str(int(power)).replace("-", "−")
    return tag("span", f"{digits} × 10", tag("sup", exponent), class_="whole") if value else join(["0"])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show_costs(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the table of counted costs."""
    costs = newest(select(sources, "cost"), lambda r: (r.subject, str(r.condition.get("input_size")))).values()
    if not costs:
        return []
    columns: list[Column[Record]] = [
        Column("Subject", lambda record: record.subject),
        Column("px", lambda record: record.condition.get("input_size"), ".0f"),
        Column("parameters, M", lambda record: scaled(record, "num_params", 1e6), ",.3f"),
        Column("multiply-adds, M", lambda record: scaled(record, "macs", 1e6), ",.2f"),
        Column("memory accesses, M", lambda record: scaled(record, "memory_accesses", 1e6), ",.2f"),
    ]
    content = table("costs", columns, list(costs))
    return [figure("costs", "Counted costs of one picture", content, provenance(list(costs), machines))]


def show_environment(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """List the machines with what they attain, and the files with the commands that wrote them."""
    records = [record for source in sources for record in source.records]
    content = [
        tag(
            "dl", *(_machine(name, sources, machines) for name in unique(r.machine for r in records)), class_="machines"
        )
    ]
    columns: list[Column[tuple[str, list[Record]]]] = [
        Column("Suites", lambda row: ", ".join(unique(record.suite for record in row[1]))),
        Column("records", lambda row: len(row[1]), ",.0f"),
        Column("date", lambda row: describe_dates(row[1])),
        Column("commit", lambda row: ", ".join(unique(r.commit for r in row[1] if r.commit)) or None),
        Column("versions", lambda row: "; ".join(unique(describe_versions(r.versions) for r in row[1])) or None),
        Column("command", lambda row: Cell(tag("code", row[0] or "unknown"), row[0])),
    ]
    commands = list(group(records, lambda record: record.command).items())
    content.append(figure("commands", "What was run", table("commands", columns, commands)))
    return content


def _machine(name: str, sources: Sequence[Source], machines: Mapping[str, Machine]) -> Html:
    peaks = newest(
        (record for record in select(sources, "machine_peak") if record.machine == name),
        lambda record: (record.subject, describe_condition(record.condition)),
    )
    attained = [
        f"{value / unit:,.1f} {label} ({record.subject}, {describe_condition(record.condition)})"
        for record in peaks.values()
        for key, (unit, label) in UNITS.items()
        if (value := number(record, key)) is not None
    ]
    machine = machines.get(name)
    details = [f"id {name}", machine.architecture, machine.system, *machine.instruction_sets] if machine else []
    return tag(
        "div",
        tag("dt", describe_machine(name, machines)),
        tag("dd", ", ".join(details)) if details else None,
        tag("dd", f"Attains {'; '.join(attained)}") if attained else None,
    )


def show_notes() -> list[Html]:
    """List what a reader has to know about every number of the page."""
    return [tag("ol", *(tag("li", text, id=name) for name, text in NOTES.items()), class_="notes")]
