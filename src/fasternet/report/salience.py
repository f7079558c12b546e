"""Figures 6 and 5: which position of a filter weighs most, and what PConv + PWConv sees of its input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasternet.records import Machine, Record
from fasternet.report.approximation import name_network
from fasternet.report.compare import scaled
from fasternet.report.markup import SPACED, Cell, Column, Html, figure, join, table, tag
from fasternet.report.plots import draw_positions
from fasternet.report.provenance import number, provenance, unique
from fasternet.report.seeds import FAILS, HOLDS, PARTLY, UNCLEAR, group_alike, name_verdict
from fasternet.report.sources import Source, newest, select

ALL, STEM = "all", "stage 0"  # the latter: whatever is finer than the first stage
FIELDS = ("PConv + PWConv", "T-shaped", "Conv")  # (a), (b), (c) of Figure 5
HEAT_WIDTH = 156  # CSS pixels, so that two stand side by side on a phone
MAX_LABELLED = 3  # positions a side, in whose squares numbers fit


@dataclass(frozen=True)
class Salience:
    """The salient positions of one network's filters: a record for each stage, and one for all of them."""

    records: tuple[Record, ...]

    @property
    def stages(self) -> list[Record]:
        """Those of the stages."""
        return [record for record in self.records if record.subject != ALL]

    @property
    def is_everywhere(self) -> bool:
        """Whether the centre is the most frequent position in each stage, as in the paper; a stem alone is none."""
        judged = [is_centre(record) for record in self.stages if record.subject != STEM]
        return bool(judged) and all(judged)

    @property
    def total(self) -> Record | None:
        """That of all filters."""
        return next((record for record in self.records if record.subject == ALL), None)

    @property
    def has_pconv(self) -> bool:
        """Whether filters of PConv are among them, of which the paper claims nothing."""
        names = [str(name) for r in self.records for name in r.values.get("layers") or ()]
        is_fasternet = str(self.records[0].condition.get("model")).lower().startswith("fasternet")
        return is_fasternet or any(name.rpartition(".")[2] == "pconv" for name in names)

    def judge(self) -> str | None:
        """Say whether the centre is the most frequent position; None where that is not to be judged.

        Its share has to be certain to exceed that of positions that are all alike; partly, where it is not the most
        frequent position in every stage.
        """
        if (total := self.total) is None or self.has_pconv:
            return None
        low, high, uniform = (number(total, name) for name in ("low", "high", "uniform_share"))
        if low is None or high is None or uniform is None:
            return None
        if low <= uniform:
            return FAILS if high < uniform else UNCLEAR
        return FAILS if not is_centre(total) else HOLDS if self.is_everywhere else PARTLY


def list_saliences(sources: Sequence[Source]) -> list[Salience]:
    """Return what was counted, by network and weights."""
    records = [record for record in select(sources, "study", "salience") if read_list(record, "counts")]
    groups = group_alike(records)
    return [Salience(tuple(newest(members, lambda r: r.subject).values())) for members in groups]


def read_list(record: Record, name: str) -> list[float]:
    """Return the numbers of a list; of anything else, nothing."""
    values = record.values.get(name)
    return [float(v) for v in values if isinstance(v, int | float)] if isinstance(values, list) else []


def is_centre(record: Record) -> bool:
    """Whether the centre is the most frequent salient position, alone."""
    counts = read_list(record, "counts")
    return counts.count(max(counts)) == 1 and counts.index(max(counts)) == len(counts) // 2


def show_salience(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Figure 6 for each network: the histogram, the shares of the centre, the norms by position."""
    found = list_saliences(sources)
    return [_show_histogram(f"figure-6-{i}", salience, machines) for i, salience in enumerate(found, start=1)]


def _show_histogram(key: str, salience: Salience, machines: Mapping[str, Machine]) -> Html:
    shown, records = salience.stages or list(salience.records), list(salience.records)
    shares = {}
    for record in shown:
        counts = read_list(record, "counts")
        shares[record.subject] = [100 * value / (sum(counts) or 1) for value in counts]
    names, told = ", ".join(shares), name_network(records[0].condition)
    alt = f"Share of filters by salient position, of {names}; the table holds the share of the centre"
    drawing = draw_positions(shares, key=key, title="Share of the filters, %", x_label="Salient position", alt=alt)
    columns: list[Column[Record]] = [
        Column("Stage", lambda record: record.subject.removeprefix("stage ")),
        Column("layers", _count_layers, ".0f"),
        Column("filters", lambda record: number(record, "num_filters"), ",.0f"),
        Column("share, %", lambda record: scaled(record, "centre_share", 0.01), ".1f", "Centre is salient"),
        Column("95 % interval", _interval, "", "Centre is salient"),
        Column("uniform, %", lambda record: scaled(record, "uniform_share", 0.01), ".1f", "Centre is salient"),
        Column("not trained, %", _random, "", "Centre is salient"),
        Column("most frequent", lambda record: "yes" if is_centre(record) else "no", None, "Centre is salient"),
    ]  # fmt: skip
    norms = {record.subject: rows for record in records if (rows := read_list(record, "mean_norms"))}
    least, most = (choose((value for rows in norms.values() for value in rows), default=0) for choose in (min, max))
    heats = [(name, _draw_norms(name, rows, least, most)) for name, rows in norms.items()]
    content = [drawing, table(key, columns, records)]
    if heats:
        content.append(tag("p", NORMS, class_="note"))
        content.append(_arrange(heats))
    judged = salience.judge()
    verdict = PCONV if salience.has_pconv else None if judged is None else f"{CLAIM} {told}: {name_verdict(judged)}."
    title = f"Figure 6. Salient positions of the filters of {told}"
    return figure(key, title, join(content), verdict, *FIGURE6, provenance(records, machines))


def _count_layers(record: Record) -> int | None:
    return len(layers) if isinstance(layers := record.values.get("layers"), list) else None


def _interval(record: Record) -> Cell | None:
    low, high = (scaled(record, name, 0.01) for name in ("low", "high"))
    return None if low is None or high is None else Cell(f"{low:.1f}–{high:.1f}", low)


def _random(record: Record) -> Cell | None:
    share = scaled(record, "centre_share_random", 0.01)
    low, high = (scaled(record, f"random_{name}", 0.01) for name in ("low", "high"))
    if share is None:
        return None
    return Cell(f"{share:.1f}" + ("" if low is None or high is None else f" ({low:.1f}–{high:.1f})"), share)


def _draw_norms(name: str, norms: Sequence[float], least: float, most: float) -> Html:
    side = math.isqrt(len(norms))
    rows = [norms[i * side : (i + 1) * side] for i in range(side)]
    told = "; ".join(" ".join(f"{value:.2f}" for value in row) for row in rows)
    return draw_heat(rows, least=least, most=most, alt=f"norms of {name}: {told}", form=".2f")


def draw_heat(rows: Sequence[Sequence[float]], *, least: float, most: float, alt: str, form: str) -> Html:
    """Draw a matrix as squares, from ``least`` to ``most`` the more of the accent; small ones carry their numbers."""
    side = len(rows)
    step = HEAT_WIDTH // side  # whole pixels leave no seams
    width, parts = step * side, []
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            share = (value - least) / (most - least) if most > least else 0.0
            style = f"fill: color-mix(in srgb, var(--accent) {100 * share:.0f}%, var(--wash))"
            place = {"x": x * step, "y": y * step, "width": step, "height": step}
            parts.append(tag("rect", tag("title", format(value, form)), style=style, **place))
            if side <= MAX_LABELLED:
                ink = "var(--paper)" if share > 0.65 else "var(--ink)"
                text = {"x": f"{(x + 0.5) * step:.1f}", "y": f"{(y + 0.5) * step:.1f}", "style": f"fill: {ink}"}
                parts.append(
                    tag("text", format(value, form), text_anchor="middle", dominant_baseline="central", **text)
                )
    frame = tag("rect", x=0.5, y=0.5, width=width - 1, height=width - 1, class_="frame")
    return tag("svg", *parts, frame, viewBox=f"0 0 {width} {width}", width=width, height=width, class_="matrix",
               role="img", aria_label=alt, shape_rendering="crispEdges")  # fmt: skip


def _arrange(drawings: Sequence[tuple[object, Html]]) -> Html:
    """Put small drawings side by side, each under its title."""
    style = "display: flex; flex-wrap: wrap; gap: 1.25rem 1rem; margin-top: 0.75rem"
    panels = (
        tag("div", tag("p", title, class_="panel-title"), drawing, class_="heat panel") for title, drawing in drawings
    )
    return tag("div", *panels, style=style)


def show_receptive_field(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Figure 5: the effective receptive fields of the three operators, one layer and several layers deep."""
    groups = group_alike(select(sources, "study", "receptive_field"), ("depth",))
    return [_show_fields(f"figure-5-{i}", records, machines) for i, records in enumerate(groups, start=1)]


def _show_fields(key: str, found: Sequence[Record], machines: Mapping[str, Machine]) -> Html:
    latest = newest((r for r in found if _read_field(r)), lambda r: (r.condition.get("depth"), r.subject))
    depths = sorted({depth for depth, _ in latest if isinstance(depth, int)})
    names = [*(n for n in FIELDS if any(n == name for _, name in latest)),
             *unique(name for _, name in latest if name not in FIELDS)]  # fmt: skip
    content = []
    for depth in depths:
        own = [latest[depth, name] for name in names if (depth, name) in latest]
        content.append(tag("p", f"{depth} layer{'' if depth == 1 else 's'} deep:", class_="note"))
        content.append(_arrange(list(map(_draw_field, own))))
    parts = [row for record in latest.values() for row in _list_channel_groups(record)]
    if parts:
        columns: list[Column[tuple[str, str, list[float]]]] = [
            Column("Operator, 1 layer deep", lambda row: row[0]),
            Column("input channels", lambda row: row[1]),
            Column("gradient of a channel, the mean one = 1", lambda row: sum(row[2]), ".2f"),
            Column("of it at the centre, %", lambda row: 100 * row[2][len(row[2]) // 2] / (sum(row[2]) or 1), ".1f"),
        ]  # fmt: skip
        content.append(tag("div", table(key, columns, parts), style=SPACED))
    records = list(latest.values())
    title = f"Figure 5. What one output position sees of the input, C {records[0].condition.get('channels')}"
    return figure(key, title, join(content), *FIGURE5, provenance(records, machines))


def _read_field(record: Record) -> list[list[float]]:
    rows: Any = record.values.get("field")
    is_square = isinstance(rows, list) and rows and all(isinstance(r, list) and len(r) == len(rows) for r in rows)
    return rows if is_square else []


def _draw_field(record: Record) -> tuple[Html, Html]:
    rows, centre = _read_field(record), scaled(record, "centre_share", 0.01)
    told = "" if centre is None else f"centre {centre:.1f} %"
    percent = [[100 * value for value in row] for row in rows]
    alt = f"{record.subject}, {len(rows)} × {len(rows)} positions, {told}"
    title = join([tag("strong", record.subject), tag("br"), told])
    return title, draw_heat(percent, least=0, most=max(map(max, percent)), alt=alt, form=".1f")


def _list_channel_groups(record: Record) -> Iterator[tuple[str, str, list[float]]]:
    """Yield the mean field of a channel of the first quarter, which PConv convolves, and of the others, flat."""
    rows: Any = record.values.get("by_channel")
    names = ("first quarter", "the others")
    if not isinstance(rows, list) or len(rows) != len(names):
        return
    for name, row in zip(names, rows, strict=True):
        flat = [value for part in row for value in (part if isinstance(part, list) else [part])]
        if flat:
            yield record.subject, name, flat


NORMS = (
    "Mean norm by position, relative to the filter’s mean; the shade runs from the least to the largest of them all:"
)
FIGURE6 = (
    "The salient position of a filter is the one at which its weights, over the input channels, have the largest norm. "
    "Positions are counted row by row: 5 is the centre of 3 × 3. The dashed line is 1/9, the share if all positions "
    "were alike. Not trained: the share of the centre in filters of the same shapes with fresh random weights, the "
    "mean of many draws and, where it was recorded, the band of 95 % of them. The interval is by resampling filters, "
    "which are taken as independent.",
    "The paper finds the centre the most frequent salient position in all stages of a ResNet18 trained on ImageNet. "
    "A salient centre says where a filter weighs most, not that the other positions could be spared.",
)
CLAIM = "That the centre is the most frequent salient position, by its share of all filters against 1/9, in"
PCONV = "Filters of PConv are among these: the paper speaks of regular convolutions only, so its claim is not judged."
FIGURE5 = (
    "The absolute gradient of one output position with respect to each input position, the mean over input channels, "
    "draws of random weights and random sums of the output channels, in per cent of the whole. Shade is relative to "
    "the largest of each drawing. PConv + PWConv sees the neighbours through the convolved channels alone and the "
    "centre through all: the T of the paper. It is about position: stacked, the field of any operator spreads.",
)
