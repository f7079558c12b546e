"""Figure 3: the channels of feature maps side by side, and how redundant they are as numbers, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from fasternet.records import Machine, Record
from fasternet.report.approximation import name_network
from fasternet.report.compare import divide, scaled
from fasternet.report.markup import Cell, Column, Html, figure, join, table, tag
from fasternet.report.provenance import count, number, provenance
from fasternet.report.seeds import group_alike
from fasternet.report.sources import Source, newest, select

MAX_OPEN_LAYERS = 40
MIN_POSITIONS = 4  # a channel, for its rank and its explained shares to say something
GRID = "display: block; width: min(100%, 34rem); height: auto; image-rendering: pixelated"
GRIDS = (
    "The grids show one picture and its maps, channel by channel in their order, each scaled to its own range from "
    "black to white. The first quarter is what PConv would convolve."
)
EXPLAINED = (
    "Mean |r|: the mean absolute correlation of two channels, over positions and pictures. With a twin: the share of "
    "channels that correlate with another one at |r| > 0.9. Effective rank: the number of uncorrelated channels of "
    "equal variance that would spread the variance as much, exp of the entropy of the covariance’s eigenvalues; "
    "relative to the number of channels, 100 % is no redundancy at all.",
    "The variance that a quarter of the channels accounts for. Own: that of the first quarter itself, over that of all "
    "channels; a quarter is 25 % where channels are alike. Explained: what a linear map, as a PWConv is one, "
    "reconstructs of all channels from the first quarter, from a random quarter (the mean of several draws) and from "
    "the best combinations, the principal components, which is the most that anything linear attains. PConv convolves "
    "a quarter; where a quarter explains much, little is lost.",
    f"Positions are those of all pictures together: with fewer than {MIN_POSITIONS} times as many as channels, twins, "
    "ranks and explained shares are left blank, since few samples resemble and explain one another by chance.",
)


def show_redundancy(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Figure 3 for each network: grids of channels where they were drawn, and the numbers of all its layers."""
    groups = group_alike(select(sources, "study", "redundancy"))
    return [_show(f"figure-3-{i}", records, sources, machines) for i, records in enumerate(groups, start=1)]


def _show(key: str, found: Sequence[Record], sources: Sequence[Source], machines: Mapping[str, Machine]) -> Html:
    records = list(newest(found, lambda record: record.subject).values())
    condition = records[0].condition
    pictures, size = condition.get("num_images"), condition.get("input_size")
    of = f"{count(pictures, 'picture')} of " if isinstance(pictures, int) else ""
    title = f"Figure 3. Redundancy of feature maps: {name_network(condition)}, {of}{condition.get('data')}"
    title += f" at {size} px" if size else ""
    title += f", maps of {picture}" if (picture := condition.get("picture")) else ""
    grids = [tag("div", *grid, class_="panel") for record in records if (grid := _draw(record, sources))]
    content: Html = table(key, _list_columns(), records, breaks=_find_breaks(records))
    if len(records) > MAX_OPEN_LAYERS:
        content = tag("details", tag("summary", f"All {len(records)} layers"), content)
    shown = join([tag("div", *grids, class_="panels") if grids else None, content])
    drawn = GRIDS if grids else None
    return figure(key, title, shown, drawn, *EXPLAINED, provenance(records, machines))


def _draw(record: Record, sources: Sequence[Source]) -> list[Html]:
    """Return the grid of a layer's channels with its title, where it was drawn."""
    source = next((source for source in sources if any(record is own for own in source.records)), None)
    path = record.attachments.get("grid")
    if not path or source is None:
        return []
    uri = source.load_picture(path)
    drawn = number(record, "num_shown")
    told = f"{record.subject}, {_tell_shape(record)}" + ("" if drawn is None else f", {drawn:.0f} maps shown")
    told += f", of {name}" if (name := record.condition.get("picture")) else ""
    picture = tag("img", src=uri, alt=f"channels of {told}", style=GRID) if uri else tag("p", "no picture")
    return [tag("p", told, class_="panel-title"), picture]


def _tell_shape(record: Record) -> str:
    sizes = (number(record, name) for name in ("channels", "height", "width"))
    return " × ".join("?" if size is None else f"{size:.0f}" for size in sizes)


def _find_breaks(records: Sequence[Record]) -> set[int]:
    stages = [record.values.get("stage") for record in records]
    return {i for i in range(1, len(stages)) if stages[i] != stages[i - 1]}


def _has_few_positions(record: Record) -> bool:
    positions, channels = number(record, "num_positions"), number(record, "channels")
    return positions is not None and channels is not None and positions < MIN_POSITIONS * channels


def _list_columns() -> list[Column[Record]]:
    def percent(name: str) -> Callable[[Record], float | None]:
        return lambda record: scaled(record, name, 0.01)

    def unless_few(cell: Callable[[Record], float | None]) -> Callable[[Record], float | None]:
        return lambda record: None if _has_few_positions(record) else cell(record)

    def positions(record: Record) -> Cell | None:
        value = number(record, "num_positions")
        few = ", too few positions" if _has_few_positions(record) else ""
        return None if value is None else Cell(f"{value:,.0f}{few}", value)

    def rank(record: Record) -> float | None:
        return number(record, "effective_rank")

    def share(record: Record) -> float | None:
        return divide(scaled(record, "effective_rank", 0.01), number(record, "channels"))

    def explained(label: str, name: str, group: str) -> Column[Record]:
        return Column(label, unless_few(percent(f"{name}_explained_share")), ".1f", group)

    def more() -> Iterator[Column[Record]]:
        yield Column("own", percent("first_quarter_variance_share"), ".1f", "First quarter, % of variance")
        yield explained("explained", "first_quarter", "First quarter, % of variance")
        yield explained("random quarter", "random_quarter", "Explained by, %")
        yield explained("best combinations", "best_quarter", "Explained by, %")

    return [
        Column("Layer", lambda record: record.subject),
        Column("stage", lambda record: number(record, "stage"), ".0f"),
        Column("C × H × W", lambda record: Cell(_tell_shape(record), number(record, "channels"))),
        Column("positions", positions, ""),
        Column("mean |r|", lambda record: number(record, "mean_abs_correlation"), ".3f"),
        Column("with a twin, %", unless_few(percent("redundant_share")), ".1f"),
        Column("rank", unless_few(rank), ".1f", "Effective"),
        Column("of channels, %", unless_few(share), ".0f", "Effective"),
        *more(),
    ]
