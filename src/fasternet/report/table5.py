"""Table 5: the ablation's variants, their speeds in the paper beside those measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fasternet.paper import load_table
from fasternet.records import Machine
from fasternet.report.compare import Timing, divide, interval_cell, printed, scaled, speed_cell
from fasternet.report.markup import Cell, Column, Html, figure, table
from fasternet.report.networks import Footnotes
from fasternet.report.provenance import provenance
from fasternet.report.settings import Pair, Setting, Way, has_published_size, list_settings, read_way
from fasternet.report.sources import Source

# The variants that are FasterNets of Table 3; the paper marks them as its choice in each group.
DEFAULTS = {"T0 r=1/4": "FasterNet-T0", "T0 BN": "FasterNet-T0", "T0 GELU": "FasterNet-T0", "T2 ReLU": "FasterNet-T2"}
NOT_BUILT = {"T0* ReLU": "not built: unpublished"}
STAND_INS = {"T0* r=1/2": "stand-in"}
GROUPS = {"partial_ratio": "Partial ratio", "normalization": "Normalization", "activation": "Activation"}
STAR = (
    "T0*: T0 with another width or depth, so that it costs about as much. For r = 1/2 and for ReLU the authors did not "
)
STAR += "publish which; ‘stand-in’: built here to T0’s multiply-adds."

Row = Mapping[str, str]


def show_table5(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Table 5 for every setting in which one of the variants was measured."""
    rows = load_table("table5_ablation")
    names = {name_variant(row["variant"]) for row in rows}
    variants = names - set(DEFAULTS.values())
    content = []
    for index, found in enumerate(list_settings(sources, machines), start=1):
        records = [record for record in found.records if record.subject in names and has_published_size(record)]
        if any(record.subject in variants for record in records):
            ways = dict.fromkeys(read_way(record) for record in records if record.subject in variants)
            content.append(_table5(f"table-5-{index}", found, list(ways), rows, provenance(records, machines)))
    return content


def name_variant(variant: str) -> str:
    """Return the network that a row of Table 5 is."""
    return DEFAULTS.get(variant, f"FasterNet-{variant}")


def find_default(row: Row) -> str:
    """Return the network that a row is compared with: the paper's choice for its size."""
    return "FasterNet-T2" if row["variant"].startswith("T2") else "FasterNet-T0"


def _table5(key: str, found: Setting, ways: Sequence[Way], rows: Sequence[Row], small: Html) -> Html:
    quantity, notes = found.quantity, Footnotes(key)
    defaults = {name: row for row in rows for variant, name in DEFAULTS.items() if row["variant"] == variant}

    def from_paper(column: str) -> Callable[[Row], float | None]:
        return lambda row: printed(row, column)

    def paper_time(row: Row) -> float | None:
        own, other = (printed(r, quantity.paper) for r in (row, defaults[find_default(row)]))
        return divide(own, other) if quantity.value == "latency_ms" else divide(other, own)

    columns: list[Column[Row]] = [
        Column("Variant", lambda row: row["variant"]),
        Column("varied", lambda row: GROUPS[row["ablation"]]),
        Column("remark", lambda row: NOT_BUILT.get(row["variant"]) or STAND_INS.get(row["variant"])),
        Column("paper v1", from_paper("top1"), ".1f", "Top-1, %"),
    ]
    if quantity.paper:
        columns.append(Column("paper v1", from_paper(quantity.paper), quantity.form, quantity.label))
        columns.append(Column("paper v1", paper_time, ".2f", "Ratio"))
    columns.append(Column("to", find_default, None, "Ratio"))
    for way in ways:
        columns += _way_columns(found, way, notes)
    breaks = [i for i in range(1, len(rows)) if rows[i]["ablation"] != rows[i - 1]["ablation"]]
    title = f"Table 5. The ablation’s variants, the paper’s numbers and those measured here ({found.label})"
    reading = "Ratio: time relative to the paper’s choice. Top-1 is quoted from the paper, not measured here."
    conditions = f"Paper: {quantity.conditions}." if quantity.paper else None
    return figure(key, title, table(key, columns, rows, breaks=breaks), notes.show(), reading, STAR, conditions, small)


def _way_columns(found: Setting, way: Way, notes: Footnotes) -> list[Column[Row]]:
    """Return what was measured in one engine and precision."""
    quantity = found.quantity
    sizes = {r.subject: r.condition.get("input_size") for r in found.records if has_published_size(r)}

    def timing(row: Row) -> Timing | None:
        name, other = name_variant(row["variant"]), find_default(row)
        return found.timings.get(Pair(name, sizes.get(name), way, other, way)) if name != other else None

    def speed(row: Row) -> Cell | None:
        name = name_variant(row["variant"])
        record = found.find(name, sizes.get(name), way)
        return notes.mark(record) or speed_cell(record, quantity.value, quantity.form)

    def time(row: Row) -> float | None:
        name, known = name_variant(row["variant"]), timing(row)
        if name == find_default(row):
            return 1.0 if scaled(found.find(name, sizes.get(name), way), "latency_ms", 1) else None
        return known.value if known else None

    unit = "ms" if quantity.value == "latency_ms" else "images/s"
    return [
        Column(unit, speed, quantity.form, str(way)),
        Column("ratio", time, ".2f", str(way)),
        Column("95 % interval", lambda row: interval_cell(timing(row)), "", str(way)),
    ]
