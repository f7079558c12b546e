"""Faults: what was done to running trainings, and how many of them went on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fasternet.records import Machine, Record
from fasternet.report.markup import Cell, Column, Html, figure, table, tag
from fasternet.report.provenance import describe_condition, number, provenance
from fasternet.report.sources import Source, newest, select


def show_faults(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the table of injected faults."""
    found = select(sources, "fault")
    records = list(newest(found, lambda record: (record.subject, describe_condition(record.condition))).values())
    if not records:
        return []

    def of_injected(name: str) -> Column[Record]:
        def cell(record: Record) -> Cell | None:
            value, injected = number(record, name), number(record, "injected")
            if value is None:
                return None
            short = injected is not None and value < injected
            return Cell(tag("strong", f"{value:,.0f}") if short else f"{value:,.0f}", value)

        return Column(name.replace("_", " "), cell, "")

    columns: list[Column[Record]] = [
        Column("Fault", lambda record: record.subject),
        Column("injected", lambda record: number(record, "injected"), ",.0f"),
        of_injected("recovered"),
        of_injected("bitwise_equal"),
        Column("remark", lambda record: record.values.get("remark")),
        Column("under", lambda record: describe_condition(record.condition) or None),
    ]
    note = (
        "Recovered: the run went on to its end, or stopped with one sentence where it must not go on. Bitwise equal: "
        "the final weights are those of a run that was left alone. Bold: fewer than injected."
    )
    return [figure("faults", "Faults injected", table("faults", columns, records), note, provenance(records, machines))]
