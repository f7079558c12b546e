"""HTML as small functions: whatever is not ``Html`` already is escaped, so no record can inject markup."""

from __future__ import annotations

import html
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, TypeVar

Item = TypeVar("Item")

SPACED = "margin-top: 1.25rem"  # of what stands below another thing in a figure


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


@dataclass(frozen=True)
class Cell:
    """A table cell that is not shown as it sorts."""

    content: object
    sort: float | str | None = None


@dataclass(frozen=True)
class Column(Generic[Item]):
    """A column of a table.

    Attributes:
        label: Heading.
        cell: From what a row shows to the cell: text, a number, None for 'not there', or ``Cell``.
        form: Format of a column of numbers, for example ``.2f``; None for text.
        group: Heading above the headings; neighbours of one group share it.
    """

    label: str
    cell: Callable[[Item], object]
    form: str | None = None
    group: str = ""


def tag(name: str, *children: object, **attributes: object) -> Html:
    """Make an element.

    Args:
        name: Element name.
        children: Content; None is skipped, everything but ``Html`` is escaped.
        attributes: ``class_`` stands for ``class`` and ``data_sort`` for ``data-sort``; None leaves one out.
    """
    pairs = (
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    opening = f"<{name}{''.join(pairs)}>"
    return Html(opening if name in ("img", "br") else f"{opening}{join(children)}</{name}>")


def join(children: Iterable[object]) -> Html:
    """Put children behind one another, each escaped unless it is ``Html``."""
    return Html(
        "".join(
            child if isinstance(child, Html) else html.escape(str(child)) for child in children if child is not None
        )
    )


def power_of_ten(value: float) -> Html:
    """Write a number as print does: 3.1 × 10⁻⁷."""
    digits, power = f"{value:.1e}".split("e")
    exponent = str(int(power)).replace("-", "−")
    return tag("span", f"{digits} × 10", tag("sup", exponent), class_="whole") if value else Html("0")


def figure(key: str, title: object, content: object, *notes: object) -> Html:
    """Make a figure or a table with its caption above and its notes below.

    Args:
        key: Anchor in the page, unique.
        title: Caption.
        content: What is shown.
        notes: Small print, one paragraph each; None is skipped.
    """
    small = (tag("p", note, class_="note") for note in notes if note is not None)
    return tag("figure", tag("figcaption", title, id=f"{key}-title"), content, *small, id=key)


def table(key: str, columns: Sequence[Column[Item]], items: Sequence[Item], *, breaks: Container[int] = ()) -> Html:
    """Make a sortable table, in a container of its own that scrolls where the page is narrow.

    Args:
        key: The key of the ``figure`` around it, whose caption names it.
        columns: The first is the rows' heading; those without any value are left out.
        items: One a row.
        breaks: The rows that begin a group, set off by a rule.
    """
    values = [(column, [column.cell(item) for item in items]) for column in columns]
    filled = [(column, cells) for column, cells in values if any(cell is not None for cell in cells)]
    rows = [
        tag("tr", *(_cell(column, cells[row], heading=not place) for place, (column, cells) in enumerate(filled)),
            class_="break" if row in breaks else None)
        for row in range(len(items))
    ]  # fmt: skip
    content = tag("table", tag("thead", *_headings([column for column, _ in filled])), tag("tbody", *rows))
    return tag("div", content, class_="scroll", role="region", tabindex=0, aria_labelledby=f"{key}-title")


def _headings(columns: Sequence[Column[Item]]) -> Iterator[Html]:
    if any(column.group for column in columns):
        groups = [(name, len(list(members))) for name, members in groupby(columns, key=lambda column: column.group)]
        heads = (
            tag("th", name, scope="colgroup", colspan=width) if name else tag("td", colspan=width)
            for name, width in groups
        )
        yield tag("tr", *heads, class_="groups")
    yield tag(
        "tr", *(tag("th", column.label, scope="col", class_=_kind(column), data_sortable="") for column in columns)
    )


def _cell(column: Column[Item], value: object, *, heading: bool) -> Html:
    content, sort = (value.content, value.sort) if isinstance(value, Cell) else (value, None)
    if isinstance(content, int | float) and column.form is not None:
        content, sort = format(content, column.form), content
    if content is None:
        content = tag("span", "–", class_="none")
    return tag(
        "th" if heading else "td", content, scope="row" if heading else None, class_=_kind(column), data_sort=sort
    )


def _kind(column: Column[Item]) -> str | None:
    return None if column.form is None else "number"
