"""Points and lines of a plane, the markers that tell engines apart, and the legend that names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle

from fasternet.report.markup import Html, tag

# Of engines: matplotlib's name of a marker, and what legends draw for it in a square of twelve units.
MARKERS = {
    "o": "M6 1.5a4.5 4.5 0 1 0 .01 0z",
    "s": "M2 2h8v8h-8z",
    "D": "M6 .8l5.2 5.2-5.2 5.2L.8 6z",
    "^": "M6 1l5 9.5h-10z",
    "v": "M6 11l5-9.5h-10z",
    "<": "M1 6l9.5-5v10z",
    ">": "M11 6l-9.5-5v10z",
    "P": "M4.2 1h3.6v3.2H11v3.6H7.8V11H4.2V7.8H1V4.2h3.2z",
    "X": "M3.3 .8L6 3.5 8.7 .8l2.5 2.5L8.5 6l2.7 2.7-2.5 2.5L6 8.5l-2.7 2.7L.8 8.7 3.5 6 .8 3.3z",
    "p": "M6 1l4.8 3.5-1.9 5.6H3.1L1.2 4.5z",
    "h": "M6 1l4.3 2.5v5L6 11 1.7 8.5v-5z",
    "d": "M6 .8l3.1 5.2L6 11.2 2.9 6z",
}
PAPER_POINTS = "the paper, version v1: another device, other software"


@dataclass(frozen=True)
class Point:
    """A network in a plane, ``measured`` here in an engine or as the paper has it; ``named`` where its name fits."""

    name: str
    x: float
    y: float
    measured: bool = True
    engine: str = ""
    named: bool = True

    @property
    def is_highlighted(self) -> bool:
        """Whether it belongs to what the paper proposes."""
        return self.name.startswith(("FasterNet", "PConv"))

    @property
    def filter(self) -> str:
        """What a page's filter knows it by."""
        return self.engine if self.measured else "paper"

    @property
    def detail(self) -> str:
        """What it tells beside its name."""
        where = f" ({self.filter})" if self.filter else ""
        return f"{self.x:.3g}, {self.y:.3g}{where}"


@dataclass(frozen=True)
class Line:
    """A line through points of one engine: those of FasterNet, a sweep, or what it would ideally be."""

    corners: tuple[tuple[float, float], ...]
    highlighted: bool = False
    dashed: bool = False
    engine: str = ""


def assign_markers(points: Iterable[Point]) -> dict[str, str]:
    """Give the engine of each measured point one of ``MARKERS``, in order of first appearance."""
    return dict(zip(dict.fromkeys(point.engine for point in points if point.measured), cycle(MARKERS), strict=False))


def tell_points(where: str) -> str:
    """Say how to read single points; drawings take no part in moving by keyboard, the table does."""
    return f"A point names itself under the mouse; {where} holds the numbers of all."


def list_legend(points: Iterable[Point], kinds: Mapping[str, str] | None = None) -> Html:
    """Return what colours and markers stand for; the page's script makes check boxes of what belongs to an engine."""
    points = list(points)
    entries = kinds or {"fasternet": "FasterNet, measured here", "rival": "other networks, measured here"}
    items = [tag("li", text, class_=name) for name, text in entries.items()]
    markers = assign_markers(points)
    if len(markers) > 1:
        shapes = {engine: Html(f'<svg viewBox="0 0 12 12" aria-hidden="true"><path d="{MARKERS[marker]}"/></svg>')
                  for engine, marker in markers.items()}  # fmt: skip
        items += [tag("li", shapes[engine], engine, class_="engine", data_engine=engine) for engine in markers]
    if not all(point.measured for point in points):
        items.append(tag("li", PAPER_POINTS, class_="paper", data_engine="paper"))
    return tag("ul", *items, class_="legend")
