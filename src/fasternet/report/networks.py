"""Networks: Table 3 with the paper's numbers beside the measured ones, a group of columns for each engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from fasternet.paper import load_accuracy, load_table
from fasternet.records import Machine, Record
from fasternet.report.compare import Timing, divide, interval_cell, printed, scaled, speed_cell
from fasternet.report.markup import Cell, Column, Html, figure, join, table, tag
from fasternet.report.provenance import number
from fasternet.report.settings import EAGER, Pair, Setting, Way, is_published, is_speed_only, list_settings, read_way
from fasternet.report.sources import Source

PAPER_SIZES = "224 px (MobileViT and EdgeNeXt 256 px)"
AUTHORS = "‘authors’: measured again by them in April 2023, after they had mended the shortcut."
SPEED_ONLY = "‘speed only’: quantised with random pictures, so that its accuracy is unknown."
MANY_ROWS = 40  # beyond it a table is folded


class Row(NamedTuple):
    """A row of Table 3: a network that was measured, or one that the paper has beside it.

    Attributes:
        name: The paper's name, with ``:split_cat`` and the like for a form of a FasterNet.
        size: Its input's side, None where it was not measured.
        group: The group of the paper's table, 0 for a network that it does not have.
        reference: The network that its time is told relative to.
    """

    name: str
    size: object
    group: int
    reference: str | None


class Footnotes:
    """Reasons that are too long for a cell, numbered in the order in which they are met."""

    def __init__(self, key: str) -> None:
        """Begin with none; ``key`` makes the anchors unique."""
        self.key = key
        self.texts: dict[str, int] = {}

    def mark(self, record: Record | None) -> Cell | None:
        """Return the failure of a record as a cell: its first word, and the number of its footnote."""
        if record is None or not (error := record.values.get("error")):
            return None
        word, _, reason = str(error).partition(":")
        if not reason:
            return Cell(word)
        place = self.texts.setdefault(str(error), len(self.texts) + 1)
        return Cell(join([word, tag("a", tag("sup", place), href=f"#{self.key}-footnotes")]))

    def show(self) -> Html | None:
        """Return the footnotes as one paragraph."""
        content = join(join([tag("sup", place), f" {text} "]) for text, place in self.texts.items())
        return tag("span", content, id=f"{self.key}-footnotes") if content else None


def show_networks(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Table 3 for every machine and setting, and one of all engines and precisions where there are several."""
    content = []
    for index, found in enumerate(list_settings(sources, machines), start=1):
        if not list_rows(found):
            continue
        content.append(_table3(f"table-3-{index}", found, found.source(machines)))
        if len(found.ways) > 1:
            content.append(_engines(f"engines-{index}", found, found.source(machines)))
    return content


def list_rows(found: Setting) -> list[Row]:
    """Return the rows of Table 3 in the paper's order; networks that the paper does not have follow.

    The paper's groups in which something was measured are completed where it printed the same quantity.
    """
    paper = load_table("table3_imagenet")
    groups = {row["network"]: int(row["group"]) for row in paper}
    owners = {int(row["group"]): row["network"] for row in paper if row["network"].startswith("FasterNet")}

    def create_row(name: str, size: object) -> Row:
        place = groups.get(name.partition(":")[0], 0)
        others = [
            pair.baseline
            for pair in found.timings
            if (pair.name, pair.size) == (name, size) and pair.baseline != name and pair.way == pair.baseline_way
            if ":" not in pair.baseline
        ]
        reference = owners.get(place)
        if others and reference not in others and reference != name:
            reference = others[0]
        return Row(name, size, place, reference)

    measured = dict.fromkeys((record.subject, record.condition.get("input_size")) for record in found.records)
    rows = [create_row(name, size) for name, size in measured if not is_variant(name)]
    if found.quantity.paper:
        seen = {row.name for row in rows if is_published(row.name, row.size)}
        touched = {row.group for row in rows}
        rows += [create_row(name, None) for name, place in groups.items() if place in touched and name not in seen]
    order = {name: place for place, name in enumerate(groups)}
    return sorted(rows, key=lambda row: order.get(row.name.partition(":")[0], len(order)))


def is_variant(name: str) -> bool:
    """Whether it is one of the FasterNets that were only built for the ablation; Table 5 shows those."""
    return name.startswith("FasterNet-") and name.partition(":")[0] not in load_accuracy()


def _table3(key: str, found: Setting, small: Html) -> Html:
    rows, notes, quantity = list_rows(found), Footnotes(key), found.quantity
    columns = [*_describe_columns(found), *_paper_columns(found)]
    for way in found.ways:
        columns += _way_columns(found, way, notes)
    columns += _best_columns(found)
    breaks = [i for i in range(1, len(rows)) if rows[i].group != rows[i - 1].group]
    content = table(key, columns, rows, breaks=breaks)
    title = f"Table 3. Networks, the paper’s numbers and those measured here ({found.label})"
    conditions = f"Paper: {quantity.conditions}, {PAPER_SIZES}. {AUTHORS}" if quantity.paper else None
    reading = "Ratio: time relative to the network named in the same row, computed in the same engine and precision."
    quantised = SPEED_ONLY if any(map(is_speed_only, found.records)) else None
    accuracies = tell_sources(row.name for row in rows)
    return figure(key, title, content, notes.show(), reading, accuracies, quantised, conditions, small)


def _describe_columns(found: Setting) -> list[Column[Row]]:
    """Return what a network is: its size, parameters, multiply-adds and published accuracy."""
    paper = {row["network"]: row for row in load_table("table3_imagenet")}
    published = load_accuracy()

    def from_paper(column: str) -> Callable[[Row], float | None]:
        return lambda row: printed(paper.get(row.name, {}) if is_published(row.name, row.size) else {}, column)

    def here(column: str, unit: float) -> Callable[[Row], float | None]:
        def cell(row: Row) -> float | None:
            values = (scaled(found.find(row.name, row.size, way), column, unit) for way in found.ways)
            return next((value for value in values if value is not None), None)

        return cell

    def top1(row: Row) -> float | None:
        accuracy = published.get(row.name)
        return accuracy.top1 if accuracy and is_published(row.name, row.size) else None

    return [
        Column("Network", lambda row: row.name),
        Column("px", lambda row: row.size, ".0f"),
        Column("paper", from_paper("params_m"), ".1f", "Parameters, M"),
        Column("here", here("num_params", 1e6), ".1f", "Parameters, M"),
        Column("paper", from_paper("macs_g"), ".2f", "FLOPs, G"),
        Column("here", here("macs", 1e9), ".2f", "FLOPs, G"),
        Column("published", top1, ".1f", "Top-1, %"),
    ]


def _paper_columns(found: Setting) -> list[Column[Row]]:
    """Return the paper's speeds and their ratio to the FasterNet of the group."""
    quantity = found.quantity
    paper = {row["network"]: row for row in load_table("table3_imagenet")}
    again = {row["network"]: row for row in load_table("table3_imagenet_remeasured")}

    def time(row: Row) -> float | None:
        own, other = speed(row), printed(paper.get(row.reference or "", {}), quantity.paper)
        return divide(own, other) if quantity.value == "latency_ms" else divide(other, own)

    def speed(row: Row) -> float | None:
        return printed(paper.get(row.name, {}), quantity.paper) if is_published(row.name, row.size) else None

    def remeasured(row: Row) -> float | None:
        return printed(again.get(row.name, {}), quantity.remeasured) if is_published(row.name, row.size) else None

    columns: list[Column[Row]] = [Column("to", lambda row: row.reference, None, "Ratio")]
    if not quantity.paper:
        return columns
    return [
        Column("paper v1", speed, quantity.form, quantity.label),
        Column("authors", remeasured, quantity.form, quantity.label),
        Column("paper v1", time, ".2f", "Ratio"),
        *columns,
    ]


def _way_columns(found: Setting, way: Way, notes: Footnotes) -> list[Column[Row]]:
    """Return what was measured in one engine and precision."""
    quantity = found.quantity

    def timing(row: Row) -> Timing | None:
        return found.timings.get(Pair(row.name, row.size, way, row.reference or "", way))

    def speed(row: Row) -> Cell | None:
        record = found.find(row.name, row.size, way)
        return notes.mark(record) or speed_cell(record, quantity.value, quantity.form)

    def time(row: Row) -> float | None:
        if row.name == row.reference:
            return 1.0 if scaled(found.find(row.name, row.size, way), "latency_ms", 1) else None
        return known.value if (known := timing(row)) else None

    unit = "ms" if quantity.value == "latency_ms" else "images/s"
    return [
        Column(unit, speed, quantity.form, str(way)),
        Column("ratio", time, ".2f", str(way)),
        Column("95 % interval", lambda row: interval_cell(timing(row)), "", str(way)),
    ]


def _best_columns(found: Setting) -> list[Column[Row]]:
    """Return each network in its fastest fp32 engine against the FasterNet of its group in its own."""

    def read(row: Row) -> tuple[Pair, Timing] | None:
        return found.best.get((row.name, row.size))

    heading = "Each in its fastest fp32 engine"
    return [
        Column("engine", lambda row: str(best[0].way) if (best := read(row)) else None, None, heading),
        Column("ratio", lambda row: best[1].value if (best := read(row)) else None, ".2f", heading),
        Column("95 % interval", lambda row: interval_cell(best[1]) if (best := read(row)) else None, "", heading),
        Column("to", lambda row: f"{best[0].baseline}, {best[0].baseline_way}" if (best := read(row)) else None,
               None, heading),
    ]  # fmt: skip


def tell_sources(names: Iterable[str]) -> str | None:
    """Say where the accuracies of networks are published."""
    published, sources = load_accuracy(), dict[str, list[str]]()
    for name in names:
        if name in published:
            sources.setdefault(published[name].source, []).append(name)
    quoted = "; ".join(
        source if source.startswith("paper") else f"{source} ({', '.join(names)})" for source, names in sources.items()
    )
    return f"Top-1 is quoted, not measured here: {quoted}." if quoted else None


def _engines(key: str, found: Setting, small: Html) -> Html:
    """Make the table of every network in every engine and precision, each relative to its own eager fp32."""
    order = {(row.name, row.size): place for place, row in enumerate(list_rows(found))}
    records = [record for record in found.records if not is_variant(record.subject)]
    rows = sorted(records, key=lambda r: order[r.subject, r.condition.get("input_size")])
    notes, quantity = Footnotes(key), found.quantity

    def timing(record: Record) -> Timing | None:
        name = record.subject
        return found.timings.get(Pair(name, record.condition.get("input_size"), read_way(record), name, EAGER))

    def time(record: Record) -> float | None:
        known = timing(record) if read_way(record) != EAGER else None
        return known.value if known else 1.0 if read_way(record) == EAGER and number(record, "latency_ms") else None

    def way(record: Record) -> Cell:
        name = str(read_way(record))
        return Cell(tag("span", name, data_engine=name), name)

    def spread(record: Record) -> Cell | None:
        low, high = number(record, "latency_ms_low"), number(record, "latency_ms_high")
        return interval_cell(Timing(low, low, high)) if low and high else None

    columns: list[Column[Record]] = [
        Column("Network", lambda record: record.subject),
        Column("px", lambda record: record.condition.get("input_size"), ".0f"),
        Column("engine, precision", way),
        Column("median", lambda r: notes.mark(r) or speed_cell(r, "latency_ms", quantity.form), ".2f", "Latency, ms"),
        Column("95 % interval", spread, "", "Latency, ms"),
        Column("min", lambda record: scaled(record, "latency_ms_min", 1), ".2f", "Latency, ms"),
        Column("p90", lambda record: scaled(record, "latency_ms_p90", 1), ".2f", "Latency, ms"),
        Column("images/s", lambda record: number(record, "images_per_second"), ",.1f"),
        Column("ratio", time, ".2f", "Time to its own eager fp32"),
        Column("95 % interval", lambda r: interval_cell(timing(r)) if read_way(r) != EAGER else None, "",
               "Time to its own eager fp32"),
        Column("load, s", lambda record: number(record, "load_s"), ".2f"),
        Column("file, MB", lambda record: scaled(record, "file_bytes", 1e6), ".1f"),
        Column("peak memory, MiB", lambda record: number(record, "peak_memory_mib"), ",.0f"),
        Column("% of peak", lambda record: scaled(record, "peak_share", 0.01), ".0f"),
    ]  # fmt: skip
    breaks = [i for i in range(1, len(rows)) if rows[i].subject != rows[i - 1].subject]
    content = table(key, columns, rows, breaks=breaks)
    if len(rows) > MANY_ROWS:
        content = tag("details", tag("summary", f"{len(rows)} rows"), content)
    title = f"Engines and precisions: every network in each of them ({found.label})"
    quantised = SPEED_ONLY if any(map(is_speed_only, rows)) else None
    filters = list_filter(found.ways)
    return figure(key, title, join([filters, content]), notes.show(), quantised, small)


def list_filter(ways: Iterable[object]) -> Html:
    """Return a list of engines that the page's script turns into check boxes."""
    return tag("ul", *(tag("li", way, data_engine=way) for way in ways), class_="legend filter")
