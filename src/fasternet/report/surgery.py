"""Surgery: other networks with PConv in place of convolutions, what that costs and saves, where it does not pay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fasternet.records import Machine, Record
from fasternet.report.compare import Timing, interval_cell
from fasternet.report.markup import Cell, Column, Html, figure, join, table, tag
from fasternet.report.provenance import count, number, provenance, shared_condition
from fasternet.report.seeds import group_alike
from fasternet.report.sources import Source, newest, select

KINDS = {"pconv": "PConv + PWConv", "pconv_alone": "PConv alone"}
MATCHES: dict[str, str | None] = {"none": None, "macs": "equal multiply-adds", "params": "equal parameters"}
STARTS = {"approximate": "closed form", "random": "random"}
MAX_LISTED = 400  # layers of one record
EXPLAINED = (
    "Before → after: of the whole network. Width: whether the network was widened, so that it costs about what it did. "
    "Start: PConv + PWConv from the replaced convolution by least squares in closed form, or random weights; neither "
    "is as accurate as the original before it is fine-tuned. Time is that after over that before, both in one process "
    "and interleaved: below 1 the network became faster. Fewer multiply-adds do not have to be less time: libraries "
    "compute regular convolutions of 3 × 3 at a higher rate, and two operators move more memory than one."
)


def show_surgery(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the table of all networks that were operated on, and for each the list of its layers."""
    found = group_alike(select(sources, "study", "surgery"))
    records = [record for members in found for record in newest(members, lambda record: record.subject).values()]
    if not records:
        return []
    small = provenance(records, machines)
    content = table("surgery", _list_columns(records), records)
    title, unpaid = "PConv in place of convolutions", _tell_unpaid(records)
    shown = figure("surgery", title, content, unpaid, EXPLAINED, small)
    lists = [_show_layers(f"surgery-{i}", record) for i, record in enumerate(records, start=1)]
    return [shown, figure("surgery-layers", "What was replaced, and what was not", join(lists), LAYERS, small)]


def read_latency(record: Record) -> Timing | None:
    """Return the time after surgery over the time before; None where it was not measured."""
    found = record.values.get("latency")
    if not isinstance(found, dict):
        return None
    values = [value for name in ("ratio", "low", "high") if isinstance(value := found.get(name), int | float)]
    return Timing(*values) if len(values) == len(Timing._fields) else None


def describe_surgery(record: Record) -> str:
    """Name a network and what was done to it."""
    return ", ".join([record.subject, *(str(told) for told in _tell_options(record).values() if told)])


def _tell_options(record: Record) -> dict[str, object]:
    condition = record.condition
    kind = condition.get("operator", condition.get("kind"))
    size, data, num_images = (condition.get(name) for name in ("input_size", "data", "num_images"))
    start = STARTS.get(str(condition.get("init")), condition.get("init"))
    if condition.get("init") == "approximate":
        pictures = f"{num_images} pictures of {data}" if num_images else data
        start = f"{start}, {f'maps of {pictures}' if data else 'weights'}"
    return {
        "select": condition.get("select"),
        "operator": KINDS.get(str(kind), kind),
        "match": MATCHES.get(str(condition.get("match")), condition.get("match")),
        "init": start,
        "input_size": f"{size} px" if size else None,
    }


def _tell_unpaid(records: Sequence[Record]) -> Html:
    """Say where replacing does not pay: where the network is not faster afterwards."""
    measured = [(record, timing) for record in records if (timing := read_latency(record))]
    unpaid = [
        f"{describe_surgery(record)}: {timing.value:.2f} × the time ({timing.low:.2f}–{timing.high:.2f}, "
        f"{record.values['latency'].get('verdict')})"
        for record, timing in measured
        if timing.value >= 1
    ]
    if not measured:
        return tag("strong", "No latency was measured: whether replacing pays in time is open.")
    if not unpaid:
        return tag("strong", f"In time, replacing pays in each of the {count(len(measured), 'network')} measured.")
    return tag("strong", f"Where it does not pay in time: {'; '.join(unpaid)}.")


def _list_columns(records: Sequence[Record]) -> list[Column[Record]]:
    shared = shared_condition(records) if len(records) > 1 else {}  # which the small print tells
    further: list[tuple[str, str, Callable[[Record], object], str | None]] = [
        ("weights", "weights", lambda record: record.condition.get("weights"), None),
        ("input_size", "px", lambda record: record.condition.get("input_size"), ".0f"),
        ("partial_ratio", "r", lambda record: record.condition.get("partial_ratio"), "g"),
    ]

    def option(name: str) -> Callable[[Record], object]:
        return lambda record: _tell_options(record)[name]

    def change(name: str, form: str) -> Callable[[Record], Cell | None]:
        def cell(record: Record) -> Cell | None:
            before, after = (number(record, f"{name}_{when}") for when in ("before", "after"))
            if before is None or after is None:
                return None
            told = f"{before / 1e6:{form}} → {after / 1e6:{form}}"
            return Cell(tag("span", told, class_="whole"), after)

        return cell

    def ratio(record: Record) -> float | None:
        before, after = (number(record, f"macs_{when}") for when in ("before", "after"))
        return after / before if before and after is not None else None

    def latency(name: str) -> Callable[[Record], object]:
        def cell(record: Record) -> object:
            found = record.values.get("latency")
            return found.get(name) if isinstance(found, dict) else None

        return cell

    def time(record: Record) -> Cell | None:
        before, after = (latency(f"{when}_ms")(record) for when in ("before", "after"))
        if not isinstance(before, int | float) or not isinstance(after, int | float):
            return None
        return Cell(tag("span", f"{before:,.2f} → {after:,.2f}", class_="whole"), after)

    def spread(record: Record) -> float | None:
        value = latency("a_a_spread")(record)
        return 100 * value if isinstance(value, int | float) else None

    def verdict(record: Record) -> str | None:
        told = latency("verdict")(record)
        return f"{told}, unstable" if told and latency("unstable")(record) else str(told) if told else None

    return [
        Column("Network", lambda record: record.subject),
        *(Column(label, cell, form) for name, label, cell, form in further if name not in shared),
        Column("selected", option("select")),
        Column("replaced by", option("operator")),
        Column("width", option("match")),
        Column("start", option("init")),
        Column("ratio", lambda record: timing.value if (timing := read_latency(record)) else None, ".2f", "Time"),
        Column("95 % interval", lambda record: interval_cell(read_latency(record)), "", "Time"),
        Column("verdict", verdict, None, "Time"),
        Column("ms", time, "", "Before → after"),
        Column("parameters, M", change("num_params", ".2f"), "", "Before → after"),
        Column("multiply-adds, M", change("macs", ",.0f"), "", "Before → after"),
        Column("× multiply-adds", ratio, ".2f", "Before → after"),
        Column("replaced", lambda record: len(_list_rows(record, "replaced")), ".0f", "Layers"),
        Column("skipped", lambda record: len(_list_rows(record, "skipped")), ".0f", "Layers"),
        Column("A/A spread, %", spread, ".1f"),
    ]


def _list_rows(record: Record, name: str) -> list[dict[str, Any]]:
    rows = record.values.get(name)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list | tuple) else []


def _show_layers(key: str, record: Record) -> Html:
    """Make the folded list of a network's layers: replaced, widened, and skipped with the reason."""
    replaced, widened = (_list_rows(record, name) for name in ("replaced", "widened"))
    skipped = _list_rows(record, "skipped")
    told = f"{describe_surgery(record)}: {len(replaced)} replaced, {len(skipped)} skipped, {len(widened)} widened"
    tables = []
    if replaced:
        tables.append(table("surgery-layers", _list_replaced_columns(), replaced[:MAX_LISTED]))
    if widened:
        columns: list[Column[dict[str, Any]]] = [
            Column("Widened", lambda row: ", ".join(map(str, row.get("layers") or ()))),
            Column("channels before", lambda row: row.get("before"), ",.0f"),
            Column("after", lambda row: row.get("after"), ",.0f"),
        ]
        tables.append(table("surgery-layers", columns, widened[:MAX_LISTED]))
    for label, rows in (("Not widened", _list_rows(record, "not_widened")), ("Skipped", skipped)):
        reasons: list[Column[dict[str, Any]]] = [
            Column(label, lambda row: str(row.get("name"))),
            Column("because", lambda row: str(row.get("reason"))),
        ]
        tables += [table("surgery-layers", reasons, rows[:MAX_LISTED])] if rows else []
    spaced = (tag("div", html, style="margin-top: 1rem") for html in tables)
    notes = (tag("p", note) for note in record.values.get("notes") or ())
    return tag("details", tag("summary", told), *notes, *spaced, id=key)


def _list_replaced_columns() -> list[Column[dict[str, Any]]]:
    def shape(row: dict[str, Any]) -> str:
        side = row.get("kernel_size")
        size = " × ".join(map(str, side)) if isinstance(side, list) else f"{side} × {side}"
        return f"{size}, stride {row.get('stride')}"

    def millions(name: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda row: value / 1e6 if isinstance(value := row.get(name), int | float) else None

    return [
        Column("Replaced", lambda row: str(row.get("name"))),
        Column("C in", lambda row: row.get("in_channels"), ",.0f"),
        Column("C out", lambda row: row.get("out_channels"), ",.0f"),
        Column("kernel", shape),
        Column("before", millions("macs_before"), ",.2f", "Multiply-adds, M"),
        Column("after", millions("macs_after"), ",.2f", "Multiply-adds, M"),
        Column("relative error", lambda row: row.get("error"), ".3f"),
    ]


LAYERS = (
    "Relative error: what the replacement misses of the convolution’s output, mean square, over the variance of that "
    "output; 0 is the same function, 1 no better than the mean, and above 1 occurs. It is of white input where the "
    "weights alone were at hand; where pictures were, of their feature maps, and of every fifth picture, held out of "
    "the fit. There is none for random weights, nor with fewer than five pictures."
)
