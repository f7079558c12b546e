"""Table 8: the six variants, their counted parameters and multiply-adds beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fasternet.paper import load_table
from fasternet.records import Machine, Record
from fasternet.report.compare import printed, scaled
from fasternet.report.markup import Column, Html, figure, table
from fasternet.report.provenance import provenance
from fasternet.report.sources import Source, newest, select

SIZE = 224
NOTE = (
    "Parameters here are all of them; the paper counts those without batch normalisation, which is why a last digit "
    "may differ. FLOPs are multiply-adds at 224 px."
)


def show_table8(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Table 8, where any of its variants was counted."""
    counted = [r for r in select(sources, "cost") if r.condition.get("input_size") == SIZE]
    latest = newest(counted, lambda record: _name_variant(record.subject))
    rows = load_table("table8_architecture")
    records = {row["variant"]: latest[row["variant"]] for row in rows if row["variant"] in latest}
    if not records:
        return []

    def here(name: str, unit: float) -> Column[dict[str, str]]:
        group = "Parameters, M" if name == "num_params" else "FLOPs, G"
        return Column("here", lambda row: scaled(records.get(row["variant"]), name, unit), ",.3f", group)

    columns: list[Column[dict[str, str]]] = [
        Column("FasterNet", lambda row: row["variant"]),
        Column("channels", lambda row: int(row["channels"]), ".0f"),
        Column("depths", lambda row: row["depths"]),
        Column("activation", lambda row: row["activation"]),
        Column("paper v1", lambda row: printed(row, "params_m"), ".1f", "Parameters, M"),
        here("num_params", 1e6),
        Column("paper v1", lambda row: printed(row, "macs_g_224"), ".2f", "FLOPs, G"),
        here("macs", 1e9),
    ]
    found: list[Record] = list(records.values())
    title = "Table 8. The variants, the paper’s numbers and those counted here"
    return [figure("table-8", title, table("table-8", columns, rows), NOTE, provenance(found, machines))]


def _name_variant(subject: str) -> str:
    """Return T0 for FasterNet-T0 and for fasternet_t0; of anything else, its whole name."""
    family, _, variant = subject.replace("_", "-").partition("-")
    return variant.upper() if family.lower() == "fasternet" and ":" not in variant else subject
