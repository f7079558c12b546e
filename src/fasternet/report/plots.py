"""Figure 2, the training curve and calibration as inline SVG, drawn by matplotlib.

Every colour is a CSS variable, so that one drawing serves light, dark and print; every drawing is made for a wide
screen and for a phone, and the page shows the one that fits. Needs the extra ``report``.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fasternet.report.labels import Box, place_labels
from fasternet.report.markup import Html, tag

SIZES = {"wide": (540, 400), "narrow": (343, 320)}  # CSS pixels
MARGINS = {"left": 46, "right": 10, "bottom": 40, "top": 30}
TICKS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(n / 10 for n in range(10, 100)))  # in a decade
MAX_MARKED_EPOCHS = 40
# Stand-ins that no one else uses, each replaced by a CSS variable once matplotlib has written the SVG.
INK, MUTED, RULE, PAPER, ACCENT, SECOND = (f"#00000{digit}" for digit in range(1, 7))
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper", ACCENT: "accent", SECOND: "second"}
STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titlesize": 13,
    "axes.titlepad": 12,
    "axes.labelsize": 11,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Point:
    """A network in Figure 2; ``measured`` here, or as the paper has it."""

    name: str
    x: float
    y: float
    measured: bool = True

    @property
    def is_fasternet(self) -> bool:
        """Whether it belongs to the family that is highlighted."""
        return self.name.startswith("FasterNet")


@dataclass(frozen=True)
class Series:
    """A line of the training curve."""

    label: str
    epochs: tuple[float, ...]
    values: tuple[float, ...]
    second: bool = False


@dataclass(frozen=True)
class Bin:
    """Pictures of about the same confidence: how many, their mean confidence and their accuracy, in per cent."""

    count: int
    confidence: float
    accuracy: float


def draw_networks(points: Sequence[Point], *, key: str, title: str, x_label: str, alt: str) -> Html:
    """Draw networks in a plane with logarithmic axes, FasterNet connected, names beside the measured ones."""

    def draw(axes: Any) -> None:
        axes.set(xscale="log", yscale="log")
        axes.set_title(title)
        axes.set_xlabel(x_label)
        for measured in (False, True):
            ours = sorted((p for p in points if p.is_fasternet and p.measured is measured), key=lambda p: p.x)
            line = (
                {"color": ACCENT, "linewidth": 2.0}
                if measured
                else {"color": MUTED, "linewidth": 0.8, "dashes": (4, 3)}
            )
            axes.plot([p.x for p in ours], [p.y for p in ours], zorder=2, **line)
        for number, point in enumerate(points):
            color = ACCENT if point.is_fasternet else INK
            filled = {"markersize": 7.5, "markerfacecolor": color, "markeredgecolor": PAPER, "zorder": 4}
            hollow = {"markersize": 4.5, "markerfacecolor": PAPER, "markeredgecolor": MUTED, "zorder": 3}
            style = filled if point.measured else hollow
            axes.plot(point.x, point.y, "o", gid=f"point{number}", markeredgewidth=0.8, **style)
        _set_limits(axes, points)
        _label(axes, [point for point in points if point.measured], [point for point in points if not point.measured])

    tips = [f"{p.name}{'' if p.measured else ' (paper)'}: {p.x:.3g}, {p.y:.3g}" for p in points]
    return _draw_responsive(draw, key=key, alt=alt, tips=tips)


def draw_curve(series: Sequence[Series], *, key: str, title: str, alt: str, from_zero: bool = False) -> Html:
    """Draw one panel of a training curve: values over epochs, from zero where noise would fill the axis."""
    from matplotlib.ticker import MaxNLocator

    def draw(axes: Any) -> None:
        for line in series:
            color, dashes = (SECOND, (5, 2)) if line.second else (ACCENT, (None, None))
            marker = "o" if len(line.epochs) <= MAX_MARKED_EPOCHS else "none"
            axes.plot(
                line.epochs, line.values, color=color, dashes=dashes, linewidth=1.8,
                marker=marker, markersize=3.5, markeredgewidth=0,
            )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.margins(x=0.03, y=0.08)
        if from_zero:
            axes.set_ylim(bottom=0)

    return _draw_responsive(draw, key=key, alt=alt, tips=[])


def draw_calibration(bins: Sequence[Bin], *, key: str, alt: str) -> Html:
    """Draw accuracy over confidence, beside the line on which both are equal."""

    def draw(axes: Any) -> None:
        most = max(b.count for b in bins)
        xs, ys = [b.confidence for b in bins], [b.accuracy for b in bins]
        axes.plot([0, 100], [0, 100], color=MUTED, linewidth=0.8, dashes=(4, 3))
        axes.vlines(xs, ys, xs, color=SECOND, linewidth=1.2)  # the distance that ECE is the mean of
        axes.plot(xs, ys, color=ACCENT, linewidth=1.2)
        for number, b in enumerate(bins):
            size = 4 + 10 * math.sqrt(b.count / most)
            style = {"markerfacecolor": ACCENT, "markeredgecolor": PAPER, "markeredgewidth": 0.8}
            axes.plot(b.confidence, b.accuracy, "o", gid=f"point{number}", markersize=size, zorder=4, **style)
        axes.set_title("(b) Calibration: accuracy over confidence, %")
        axes.set_xlabel("Confidence, %")
        axes.set(xlim=(-3, 103), ylim=(-3, 103))

    tips = [f"{b.count:,} pictures: confidence {b.confidence:.1f} %, accuracy {b.accuracy:.1f} %" for b in bins]
    return _draw_responsive(draw, key=key, alt=alt, tips=tips)


def _draw_responsive(draw: Callable[[Any], None], *, key: str, alt: str, tips: Sequence[str]) -> Html:
    try:
        from matplotlib.figure import Figure
        from matplotlib.style import context
    except ImportError:
        raise ModuleNotFoundError("a report with figures needs matplotlib: pip install 'fasternet[report]'") from None
    drawings = []
    for name, (width, height) in SIZES.items():
        with context(["default", {**STYLE, "svg.hashsalt": f"{key}-{name}"}]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has the glyph
            canvas = Figure(figsize=(width / 72, height / 72), dpi=72)
            draw(canvas.add_axes(_frame(width, height)))
            file = io.StringIO()
            canvas.savefig(
                file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
            )
        svg = _clean(file.getvalue(), prefix=f"{key}-{name}-", alt=alt, tips=tips)
        drawings.append(tag("div", svg, class_=name))
    return tag("div", *drawings, class_="drawing")


def _frame(width: int, height: int) -> tuple[float, float, float, float]:
    across, up = MARGINS["left"] + MARGINS["right"], MARGINS["bottom"] + MARGINS["top"]
    return MARGINS["left"] / width, MARGINS["bottom"] / height, 1 - across / width, 1 - up / height


def _clean(svg: str, *, prefix: str, alt: str, tips: Sequence[str]) -> Html:
    """Make matplotlib's file a part of a page: no prologue, ids of its own, CSS colours and fonts, names on hover."""
    import html

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None  # matplotlib always writes one
    opening = f'<svg {box.group()} role="img" aria-label="{html.escape(alt)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    for number, tip in enumerate(tips):
        mark = f'<g id="{prefix}point{number}">'
        svg = svg.replace(mark, f"{mark}<title>{html.escape(tip)}</title>")
    return Html(re.sub(r">\s+<", "><", svg).strip())


def _set_limits(axes: Any, points: Sequence[Point]) -> None:
    """Give both axes room beyond the points, for the names, and ticks at round numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for set_limits, axis, values in (
        (axes.set_xlim, axes.xaxis, [point.x for point in points]),
        (axes.set_ylim, axes.yaxis, [point.y for point in points]),
    ):
        room = (max(values) / min(values)) ** 0.07 * 1.1
        low, high = min(values) / room, max(values) * room
        set_limits(low, high)
        axis.set_major_locator(FixedLocator(list(_ticks(low, high))))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _ticks(low: float, high: float) -> Iterator[float]:
    """Yield round numbers between two limits: the coarsest set that has at least three."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in TICKS:
        ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    yield from ticks


def _label(axes: Any, named: Sequence[Point], others: Sequence[Point]) -> None:
    """Write the names of points beside them, FasterNet first; a name that finds no free place is left to hovering."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    def pixels(point: Point) -> tuple[float, float]:
        x, y = axes.transData.transform((point.x, point.y))
        return float(x), float(y)

    agg = FigureCanvasAgg(axes.figure).get_renderer()
    named = sorted(named, key=lambda point: (not point.is_fasternet, point.x))
    texts = [axes.text(0, 0, point.name, color=ACCENT if point.is_fasternet else INK, zorder=6,
                       fontweight="bold" if point.is_fasternet else "normal", transform=None, va="bottom")
             for point in named]  # fmt: skip
    boxes = [text.get_window_extent(agg) for text in texts]
    ours = [pixels(point) for point in named if point.is_fasternet]
    frame = axes.get_window_extent(agg)
    places = place_labels(
        [pixels(point) for point in named],
        [(box.width, box.height) for box in boxes],
        frame=Box(frame.x0, frame.y0, frame.x1, frame.y1),
        soft=[*(pixels(point) for point in others), *_samples(ours)],
    )
    for text, place, point in zip(texts, places, named, strict=True):
        if place is None:
            text.remove()
            continue
        text.set_position((place.x0, place.y0))
        start = pixels(point)
        end = (min(max(start[0], place.x0), place.x1), min(max(start[1], place.y0), place.y1))
        if math.dist(start, end) > 9:
            axes.plot(*zip(start, end, strict=True), color=MUTED, linewidth=0.6, zorder=1, transform=None)


def _samples(corners: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield points every few pixels along a line through corners."""
    for (x0, y0), (x1, y1) in pairwise(corners):
        count = max(1, round(math.dist((x0, y0), (x1, y1)) / 6))
        for step in range(count):
            yield x0 + (x1 - x0) * step / count, y0 + (y1 - y0) * step / count
