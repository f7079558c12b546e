"""The end of a report: outputs compared, counted costs, machines, commands, notes on every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fasternet.records import Machine, Record
from fasternet.report.compare import scaled
from fasternet.report.markup import Cell, Column, Html, figure, power_of_ten, table, tag
from fasternet.report.provenance import (
    describe_condition,
    describe_dates,
    describe_machine,
    describe_versions,
    number,
    provenance,
    unique,
)
from fasternet.report.sources import Source, group, newest, select

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


def show_differences(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the table of outputs that were compared: what is faster has to compute the same."""
    records = list(
        newest(select(sources, "difference"), lambda r: (r.subject, describe_condition(r.condition))).values()
    )
    if not records:
        return []

    def largest(record: Record) -> Cell | None:
        value = number(record, "max_relative_difference")
        return None if value is None else Cell(power_of_ten(value), value)

    columns: list[Column[Record]] = [
        Column("Subject", lambda record: record.subject),
        Column("against", lambda record: record.condition.get("baseline")),
        Column("pictures", lambda record: number(record, "num_images"), ",.0f"),
        Column("changed predictions", lambda record: number(record, "changed_predictions"), ",.0f"),
        Column("largest relative difference", largest, ""),
    ]
    note = "The largest difference of two outputs over the largest output."
    content = table("differences", columns, records)
    return [figure("differences", "Outputs compared", content, note, provenance(records, machines))]


def show_costs(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the table of counted costs."""
    found = [record for record in select(sources, "cost") if record.suite != "detection"]  # Table 4 shows those
    costs = newest(found, lambda r: (r.subject, str(r.condition.get("input_size")))).values()
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
