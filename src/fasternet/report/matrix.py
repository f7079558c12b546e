"""The confusion matrix as inline SVG: shares as shades, counts and names where there is room for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fasternet.report.markup import Html, tag

SIDE = 400  # CSS pixels that the cells take, as far as their bounds allow
CELL_BOUNDS = (5, 52)
MIN_COUNT_CELL, MIN_NAME_CELL = 20, 10  # pixels of a cell that has room for its count, a row for its name
MAX_NAME = 18  # letters
LETTER = 6.3  # pixels, at 11 px
STRONGEST = 0.5  # opacity: ink stays readable on it, in the light (8:1) and in the dark (4.9:1)


def draw_matrix(labelled_by: str, matrix: Sequence[Sequence[int]], names: Sequence[str]) -> Html:
    """Draw counts, truths in rows and predictions in columns.

    Args:
        labelled_by: Anchor of the caption.
        matrix: K rows of K counts.
        names: Of the K classes.
    """
    cell = min(max(SIDE // len(names), CELL_BOUNDS[0]), CELL_BOUNDS[1])
    short = [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…" for name in names]
    margin = 8 + round(LETTER * max(map(len, short))) if cell >= MIN_NAME_CELL else 4
    side = cell * len(names)
    parts = [
        tag("rect", class_="frame", x=margin, y=margin, width=side, height=side),
        *_names(short, cell, margin),
        *_cells(matrix, names, cell, margin),
    ]
    size = margin + side + 1
    picture = tag(
        "svg", *parts, viewBox=f"0 0 {size} {size}", width=size, height=size, role="img",
        aria_label=f"Confusion matrix of {len(names)} classes", class_="matrix",
    )  # fmt: skip
    title = tag("p", "(a) Confusion matrix: truth in rows, prediction in columns", class_="panel-title")
    return tag(
        "div", title, tag("div", picture, class_="scroll", role="region", tabindex=0, aria_labelledby=labelled_by)
    )


def _names(names: Sequence[str], cell: int, margin: int) -> Iterator[Html]:
    if cell < MIN_NAME_CELL:
        return
    for place, name in enumerate(names):
        middle = margin + cell * (place + 0.5)
        yield tag("text", name, x=margin - 5, y=middle + 4, text_anchor="end")
        yield tag("text", name, transform=f"translate({middle + 4} {margin - 5}) rotate(-90)")


def _cells(matrix: Sequence[Sequence[int]], names: Sequence[str], cell: int, margin: int) -> Iterator[Html]:
    counted = cell >= MIN_COUNT_CELL
    for truth, row in enumerate(matrix):
        total = sum(row) or 1
        for label, count in enumerate(row):
            if not count:
                continue
            x, y, share = margin + cell * label, margin + cell * truth, count / total
            tip = tag("title", f"{names[truth]} → {names[label]}: {count:,} ({100 * share:.0f} %)")
            opacity = (0.06 + (STRONGEST - 0.06) * share) if counted else 0.15 + 0.85 * share
            yield tag(
                "rect", tip, x=x, y=y, width=cell, height=cell, fill_opacity=f"{opacity:.2f}",
                class_="right" if truth == label else "wrong",
            )  # fmt: skip
            if counted:
                text = f"{count:,}" if len(f"{count:,}") * LETTER < cell else f"{count / 1000:.0f}k"
                yield tag("text", text, x=x + cell / 2, y=y + cell / 2 + 4, text_anchor="middle")
