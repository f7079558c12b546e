"""Networks in a plane, sweeps, the training curve and calibration as inline SVG, drawn by matplotlib.

Every colour is a CSS variable, so that one drawing serves light, dark and print; every drawing is made for a wide
screen and for a phone, and the page shows the one that fits. A point names itself under the mouse, and whatever belongs
to an engine says so (``data-engine``), for the page's filters. Needs the extra ``report``.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from fasternet.report.labels import Box, place_labels
from fasternet.report.markup import Html, join, tag
from fasternet.report.points import Line, Point, assign_markers

SIZES = {"wide": (540, 400), "narrow": (343, 320)}  # CSS pixels
MARGINS = {"left": 46, "right": 10, "bottom": 40, "top": 30}
TICKS = (  # in a decade, the coarsest first
    *((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)),
    tuple(n / 10 for n in range(10, 100)),
)
MAX_MARKED_EPOCHS = 40
TIP_CHARACTER, LINE_HEIGHT = 6.6, 15  # of a point's name, CSS pixels
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
class Mark:
    """A point in a finished drawing, in its pixels from the upper left, and how it names itself."""

    x: float
    y: float
    name: str
    detail: str
    engine: str = ""


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


def draw_networks(points: Sequence[Point], **options: Any) -> Html:
    """Draw networks in a plane, the FasterNets of an engine connected; ``options`` are those of ``draw_plane``."""
    lines = []
    for measured, engine in dict.fromkeys((p.measured, p.engine) for p in points):
        ours = [p for p in points if p.name.startswith("FasterNet") and (p.measured, p.engine) == (measured, engine)]
        corners = tuple(sorted((p.x, p.y) for p in ours))
        lines.append(Line(corners, highlighted=measured, dashed=not measured, engine=engine if measured else "paper"))
    return draw_plane(points, lines, **options)


def draw_plane(
    points: Sequence[Point],
    lines: Sequence[Line],
    *,
    key: str,
    title: str,
    x_label: str,
    alt: str,
    y_scale: Literal["log", "linear"] = "log",
    markers: Mapping[str, str] | None = None,
) -> Html:
    """Draw points and lines over a logarithmic axis; each engine has its marker, the first one's points their names.

    Args:
        points: Hollow where they are the paper's.
        lines: What connects them.
        key: Anchor, unique in the page.
        title: Heading, which names the vertical axis too.
        x_label: Name of the horizontal axis.
        alt: The drawing in words.
        y_scale: Of the vertical axis.
        markers: Of the engines, where several drawings share a legend.
    """
    shapes = markers or assign_markers(points)
    first = next((point.engine for point in points if point.measured), "")
    engines: dict[str, str] = {f"line{number}": line.engine for number, line in enumerate(lines)}

    def draw(axes: Any) -> list[Mark]:
        axes.set(xscale="log", yscale=y_scale)
        axes.set_title(title)
        axes.set_xlabel(x_label)
        for number, line in enumerate(lines):
            style = {"color": ACCENT, "linewidth": 2.0} if line.highlighted else {"color": MUTED, "linewidth": 0.9}
            dashes = {"dashes": (4, 3), "linewidth": 0.8} if line.dashed else {}
            xs, ys = ([corner[axis] for corner in line.corners] for axis in (0, 1))
            axes.plot(xs, ys, zorder=2, gid=f"line{number}", **(style | dashes))
        for number, point in enumerate(points):
            color = ACCENT if point.is_highlighted else INK
            size, layer = (7.5, 5) if point.engine == first else (5.5, 4)
            filled = {"markersize": size, "markerfacecolor": color, "markeredgecolor": PAPER, "zorder": layer}
            hollow = {"markersize": 4.5, "markerfacecolor": PAPER, "markeredgecolor": MUTED, "zorder": 3}
            style = filled if point.measured else hollow
            marker = shapes[point.engine] if point.measured else "o"
            axes.plot(point.x, point.y, marker, gid=f"point{number}", markeredgewidth=0.8, **style)
            engines[f"point{number}"] = point.filter
        _set_limits(axes, points, y_scale)
        engines.update(_label(axes, points, first=first))
        return [Mark(*_pixels(axes, p.x, p.y), p.name, p.detail, p.filter) for p in points]

    return _draw_responsive(draw, key=key, alt=alt, engines=engines)


def draw_curve(series: Sequence[Series], *, key: str, title: str, alt: str, from_zero: bool = False) -> Html:
    """Draw one panel of a training curve: values over epochs, from zero where noise would fill the axis."""
    from matplotlib.ticker import MaxNLocator

    def draw(axes: Any) -> list[Mark]:
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
        return []

    return _draw_responsive(draw, key=key, alt=alt)


def draw_calibration(bins: Sequence[Bin], *, key: str, alt: str) -> Html:
    """Draw accuracy over confidence, beside the line on which both are equal."""

    def draw(axes: Any) -> list[Mark]:
        most = max(b.count for b in bins)
        xs, ys = [b.confidence for b in bins], [b.accuracy for b in bins]
        axes.plot([0, 100], [0, 100], color=MUTED, linewidth=0.8, dashes=(4, 3))
        axes.vlines(xs, ys, xs, color=SECOND, linewidth=1.2)  # the distance that ECE is the mean of
        axes.plot(xs, ys, color=ACCENT, linewidth=1.2)
        for b in bins:
            size = 4 + 10 * math.sqrt(b.count / most)
            style = {"markerfacecolor": ACCENT, "markeredgecolor": PAPER, "markeredgewidth": 0.8}
            axes.plot(b.confidence, b.accuracy, "o", markersize=size, zorder=4, **style)
        axes.set_title("(b) Calibration: accuracy over confidence, %")
        axes.set_xlabel("Confidence, %")
        axes.set(xlim=(-3, 103), ylim=(-3, 103))
        return [Mark(*_pixels(axes, b.confidence, b.accuracy), f"{b.count:,} pictures", _tell_bin(b)) for b in bins]

    return _draw_responsive(draw, key=key, alt=alt)


def draw_positions(shares: Mapping[str, Sequence[float]], *, key: str, title: str, x_label: str, alt: str) -> Html:
    """Draw a histogram over the positions of a filter, a bar for each series, and the line on which all are equal."""
    num_positions, width = len(next(iter(shares.values()))), 0.8 / len(shares)

    def draw(axes: Any) -> list[Mark]:
        marks = []
        axes.axhline(100 / num_positions, color=MUTED, linewidth=0.9, dashes=(4, 3), zorder=3)
        for place, (name, values) in enumerate(shares.items()):
            xs = [position + 1 - 0.4 + width * (place + 0.5) for position in range(num_positions)]
            shade = (place + 1) / len(shares)
            axes.bar(xs, values, width, color=ACCENT, alpha=0.25 + 0.75 * shade, label=name, zorder=2)
            marks += [(x, value, f"{name}, position {i}", f"{value:.1f} %")
                      for i, (x, value) in enumerate(zip(xs, values, strict=True), start=1)]  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_xticks(range(1, num_positions + 1))
        axes.set_ylim(0, 1.22 * max(map(max, shares.values())))
        axes.grid(visible=False, axis="x")
        axes.legend(frameon=False, labelcolor=MUTED, fontsize=10, ncols=4, loc="upper left", handlelength=1,
                    columnspacing=1, handletextpad=0.4, borderaxespad=0)  # fmt: skip
        return [Mark(*_pixels(axes, x, value), name, told) for x, value, name, told in marks]

    return _draw_responsive(draw, key=key, alt=alt)


def _tell_bin(b: Bin) -> str:
    return f"confidence {b.confidence:.1f} %, accuracy {b.accuracy:.1f} %"


def _pixels(axes: Any, x: float, y: float) -> tuple[float, float]:
    """Return where a point lies in the drawing, from its upper left corner."""
    right, up = axes.transData.transform((x, y))
    return float(right), float(axes.figure.bbox.height - up)


def _draw_responsive(
    draw: Callable[[Any], list[Mark]], *, key: str, alt: str, engines: Mapping[str, str] | None = None
) -> Html:
    """Make a drawing for every width; ``engines`` tells by ``gid`` which of its parts belong to an engine."""
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
            marks = draw(canvas.add_axes(_frame(width, height)))
            file = io.StringIO()
            canvas.savefig(
                file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
            )
        svg = _clean(file.getvalue(), prefix=f"{key}-{name}-", alt=alt, engines=engines or {})
        named = join(_name(mark, width) for mark in marks)
        drawings.append(tag("div", Html(svg.replace("</svg>", f"{named}</svg>")), class_=name))
    return tag("div", *drawings, class_="drawing")


def _frame(width: int, height: int) -> tuple[float, float, float, float]:
    across, up = MARGINS["left"] + MARGINS["right"], MARGINS["bottom"] + MARGINS["top"]
    return MARGINS["left"] / width, MARGINS["bottom"] / height, 1 - across / width, 1 - up / height


def _name(mark: Mark, width: int) -> Html:
    """Make the area over a point that names it; it lies above everything drawn, so that nothing hides the name."""
    half = TIP_CHARACTER * max(len(mark.name), len(mark.detail)) / 2
    x = f"{max(half, min(mark.x, width - half)):.1f}"
    y = f"{mark.y + (24 if mark.y < MARGINS['top'] + LINE_HEIGHT else -13 - LINE_HEIGHT):.1f}"
    lines = tag("tspan", mark.name, x=x), tag("tspan", mark.detail, x=x, dy=LINE_HEIGHT)
    tip = tag("text", *lines, class_="tip", y=y, text_anchor="middle")
    area = tag("circle", cx=f"{mark.x:.1f}", cy=f"{mark.y:.1f}", r=9)
    title = tag("title", f"{mark.name}: {mark.detail}")
    return tag("g", title, area, tip, class_="point", data_engine=mark.engine or None)


def _clean(svg: str, *, prefix: str, alt: str, engines: Mapping[str, str]) -> Html:
    """Make matplotlib's file a part of a page: no prologue, ids of its own, CSS colours and fonts, engines by name."""
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
    for gid, engine in engines.items():
        mark = f'<g id="{prefix}{gid}"'
        svg = svg.replace(f"{mark}>", f'{mark} data-engine="{html.escape(engine)}">') if engine else svg
    return Html(re.sub(r">\s+<", "><", svg).strip())


def _set_limits(axes: Any, points: Sequence[Point], y_scale: str) -> None:
    """Give both axes room beyond the points, for the names, and logarithmic ones ticks at round numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if y_scale == "linear":
        axes.margins(y=0.12)

    for set_limits, axis, values in (
        (axes.set_xlim, axes.xaxis, [point.x for point in points]),
        (axes.set_ylim, axes.yaxis, [point.y for point in points]),
    ):
        if axis.get_scale() == "linear":
            continue
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


def _label(axes: Any, points: Sequence[Point], *, first: str) -> dict[str, str]:
    """Write the names of an engine's points beside them, FasterNet first; one without a free place names itself.

    Returns:
        The engine by the ``gid`` of what was written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    def pixels(point: Point) -> tuple[float, float]:
        x, y = axes.transData.transform((point.x, point.y))
        return float(x), float(y)

    agg = FigureCanvasAgg(axes.figure).get_renderer()
    named = [point for point in points if point.measured and point.engine == first] or list(points)
    named = sorted((point for point in named if point.named), key=lambda point: (not point.is_highlighted, point.x))
    others = [point for point in points if point not in named]
    texts = [axes.text(0, 0, point.name, color=ACCENT if point.is_highlighted else INK, zorder=6,
                       fontweight="bold" if point.is_highlighted else "normal", transform=None, va="bottom",
                       gid=f"name{number}")
             for number, point in enumerate(named)]  # fmt: skip
    boxes = [text.get_window_extent(agg) for text in texts]
    ours = [pixels(point) for point in named if point.is_highlighted]
    frame = axes.get_window_extent(agg)
    places = place_labels(
        [pixels(point) for point in named],
        [(box.width, box.height) for box in boxes],
        frame=Box(frame.x0, frame.y0, frame.x1, frame.y1),
        soft=[*(pixels(point) for point in others), *_samples(ours)],
    )
    for number, (text, place, point) in enumerate(zip(texts, places, named, strict=True)):
        if place is None:
            text.remove()
            continue
        text.set_position((place.x0, place.y0))
        start = pixels(point)
        end = (min(max(start[0], place.x0), place.x1), min(max(start[1], place.y0), place.y1))
        if math.dist(start, end) > 9:
            leader = {"color": MUTED, "linewidth": 0.6, "zorder": 1, "transform": None, "gid": f"leader{number}"}
            axes.plot(*zip(start, end, strict=True), **leader)
    gids = (f"{part}{number}" for part in ("name", "leader") for number in range(len(named)))
    return dict(zip(gids, [point.filter for point in named] * 2, strict=True))


def _samples(corners: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield points every few pixels along a line through corners."""
    for (x0, y0), (x1, y1) in pairwise(corners):
        count = max(1, round(math.dist((x0, y0), (x1, y1)) / 6))
        for step in range(count):
            yield x0 + (x1 - x0) * step / count, y0 + (y1 - y0) * step / count
