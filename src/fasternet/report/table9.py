"""Table 9, networks: the published forms of PConv, the in-place one and the optimised network, beside the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fasternet.paper import load_table
from fasternet.records import Machine, Record
from fasternet.report.compare import (
    Quantity,
    Timing,
    interval_cell,
    printed,
    read_timing,
    select_quantity,
    speed_cell,
)
from fasternet.report.markup import Cell, Column, Html, figure, table
from fasternet.report.provenance import describe_setting, provenance
from fasternet.report.settings import has_published_size, read_way
from fasternet.report.sources import Source, comparable, group, newest, select

SUITE = "deploy"
FORMS = {"split_cat": "split_cat", "slicing": "slicing", "inplace": "in place"}
MEMORY_FORMATS = ("contiguous", "channels_last")
NOTE = (
    "Every form has BN folded. The paper’s forward passes are in the contiguous format; its slicing wrote in place, "
    "over the shortcut: that is ‘in place’ here, which is not the trained function; the others compute that. A ratio "
    "below 1: the optimised network is faster."
)


class Row(NamedTuple):
    """One FasterNet in one memory format."""

    network: str
    memory_format: str


def show_table9_networks(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the networks' half of Table 9 for every set that was measured under equal conditions."""
    content = []
    for index, (setting, members) in enumerate(group(select(sources, "latency", SUITE), comparable).items(), start=1):
        latest = newest(members, lambda record: record.subject)
        ratios = [ratio for ratio in select(sources, "ratio", SUITE) if comparable(ratio) == setting]
        rows = _list_rows(latest)
        if rows:
            content.append(_show(f"table-9-networks-{index}", latest, ratios, rows, machines))
    return content


def _list_rows(latest: Mapping[str, Record]) -> list[Row]:
    """Return the networks in the paper's order, each in the memory formats that it was measured in."""
    order = [row["network"].lower().replace("-", "_") for row in load_table("table9_forward_choice")]
    found = {name.split(":")[0] for name in latest if name.count(":") == 2}
    names = sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))
    return [
        Row(name, memory_format)
        for name in names
        for memory_format in MEMORY_FORMATS
        if any(f"{name}:{form}:{memory_format}" in latest for form in FORMS)
    ]


def _show(
    key: str,
    latest: Mapping[str, Record],
    ratios: Sequence[Record],
    rows: Sequence[Row],
    machines: Mapping[str, Machine],
) -> Html:
    first = next(iter(latest.values()))
    quantity = select_quantity(first, machines)
    paper = {row["network"].lower().replace("-", "_"): row for row in load_table("table9_forward_choice")}
    compared = newest(
        (r for r in ratios if read_timing(r) and read_way(r) == read_way(r, "baseline_")),
        lambda record: (record.subject, record.condition.get("baseline")),
    )

    def from_paper(form: str) -> Callable[[Row], float | None]:
        column = _name_column(quantity, form) if has_published_size(first) else ""
        return lambda row: printed(paper.get(row.network, {}), column) if row.memory_format == "contiguous" else None

    def here(form: str) -> Callable[[Row], Cell | None]:
        return lambda row: speed_cell(latest.get(_name(row, form)), quantity.value, quantity.form)

    def timing(row: Row, form: str) -> Timing | None:
        ratio = compared.get((_name(row, "optimized"), _name(row, form)))
        return read_timing(ratio) if ratio else None

    def ratio(form: str) -> Callable[[Row], float | None]:
        return lambda row: found.value if (found := timing(row, form)) else None

    columns: list[Column[Row]] = [
        Column("Network", lambda row: row.network),
        Column("memory format", lambda row: row.memory_format),
        Column("split_cat", from_paper("split_cat"), quantity.form, f"Paper v1, {quantity.label}"),
        Column("slicing", from_paper("slicing"), quantity.form, f"Paper v1, {quantity.label}"),
        *(Column(label, here(form), "", f"Here, {quantity.label}") for form, label in FORMS.items()),
        Column("optimised", here("optimized"), "", f"Here, {quantity.label}"),
    ]
    for form, label in FORMS.items():
        heading = f"Optimised : {label}"
        columns.append(Column("ratio", ratio(form), ".2f", heading))
        columns.append(Column("95 % interval", lambda row, f=form: interval_cell(timing(row, f)), "", heading))  # type: ignore[misc]
    breaks = [i for i in range(1, len(rows)) if rows[i].network != rows[i - 1].network]
    title = (
        f"Table 9, networks. Forms of PConv, the paper’s numbers and those measured here ({describe_setting(first)})"
    )
    conditions = f"Paper: {quantity.conditions}." if quantity.paper else None
    content = table(key, columns, rows, breaks=breaks)
    return figure(key, title, content, conditions, NOTE, provenance(list(latest.values()), machines))


def _name(row: Row, form: str) -> str:
    return f"{row.network}:optimized" if form == "optimized" else f"{row.network}:{form}:{row.memory_format}"


def _name_column(quantity: Quantity, form: str) -> str:
    if not quantity.paper:
        return ""
    return f"{quantity.device.lower()}_{form}_{'ms' if quantity.value == 'latency_ms' else 'images_per_second'}"
