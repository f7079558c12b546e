"""Markdown from the report's own HTML: one representation, so that the page and its twin cannot differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"img", "br", "meta", "link"}
UNSHOWN = {"script", "style", "button", "nav", "head"}
BLOCKS = {
    *("html", "body", "header", "main", "section", "figure", "figcaption", "div", "p", "ul", "ol", "li", "dl", "dt"),
    *("dd", "table", "details", "summary", "h1", "h2", "h3", "h4"),
}
MARKS = {"strong": "**", "em": "*"}
# What Markdown would take for markup: anywhere, and at the start of a line.
SPECIAL = re.compile(r"([\\`*\[\]|]|(?<![^\W_])_|_(?![^\W_])|<|&(?=#?\w+;))")
LEADING = re.compile(r"^(#|>|[-+](?=\s)|\d+(?=[.)]\s))")


@dataclass
class _Node:
    name: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[_Node | str] = field(default_factory=list)

    def find(self, *names: str) -> Iterator[_Node]:
        """Yield the outermost elements of these names below."""
        for child in self.children:
            if isinstance(child, _Node):
                if child.name in names:
                    yield child
                else:
                    yield from child.find(*names)


class _Tree(HTMLParser):
    """Builds nodes; the report closes every element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = _Node("")
        self.open = [self.root]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = _Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(_Node(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def to_markdown(html: str) -> str:
    """Convert HTML of a report to Markdown: tables with all their cells, drawings as what they show in words.

    Args:
        html: What ``markup`` made: elements are closed, text is escaped.

    Returns:
        GitHub's Markdown, ending in one newline; empty where there is nothing to show.
    """
    blocks = list(_blocks(_Tree(html).root))
    # A drawing is there twice, for wide and for narrow pages.
    kept = [block for i, block in enumerate(blocks) if not (i and block == blocks[i - 1])]
    return "\n\n".join(kept) + "\n" if kept else ""


def _blocks(node: _Node) -> Iterator[str]:
    """Yield the blocks inside of an element."""
    run: list[_Node | str] = []
    for child in node.children:
        if isinstance(child, str) or child.name not in BLOCKS:
            if isinstance(child, str) or child.name not in UNSHOWN:
                run.append(child)
            continue
        yield from _paragraph(run)
        run = []
        yield from _block(child)
    yield from _paragraph(run)


def _block(node: _Node) -> Iterator[str]:
    if node.name in ("h1", "h2", "h3", "h4"):
        yield f"{'#' * int(node.name[1])} {_inline(node.children)}"
    elif node.name in ("figcaption", "summary"):
        yield f"**{_inline(node.children)}**"
    elif node.name in ("p", "dt", "dd", "li"):
        yield from _paragraph(node.children)
    elif node.name in ("ul", "ol"):
        marks = (f"{i}." if node.name == "ol" else "-" for i in range(1, len(node.children) + 1))
        items = (_inline(item.children) for item in node.find("li"))
        yield "\n".join(f"{mark} {text}" for mark, text in zip(marks, items, strict=False) if text)
    elif node.name == "dl":
        yield "\n".join(_terms(node))
    elif node.name == "table":
        yield "\n".join(_table(node))
    else:
        yield from _blocks(node)


def _paragraph(children: Iterable[_Node | str]) -> Iterator[str]:
    if text := _inline(children):
        yield LEADING.sub(r"\\\1", text) if not text[0].isdigit() else re.sub(r"^(\d+)([.)]\s)", r"\1\\\2", text)


def _terms(node: _Node) -> Iterator[str]:
    """Yield a line for each term, with what is said of it."""
    lines: list[list[str]] = []
    for item in node.find("dt", "dd"):
        text = _inline(item.children)
        lines.append([f"- **{text}**"]) if item.name == "dt" else lines[-1].append(text)
    yield from (" ".join([term, "; ".join(told)]).rstrip() for term, *told in lines)


def _table(node: _Node) -> Iterator[str]:
    """Yield the lines of a table; the headings of groups go before those of their columns."""
    *above, heads = list(next(node.find("thead")).find("tr"))
    cells = list(heads.find("th", "td"))
    groups = [_inline(cell.children) for row in above for cell in row.find("th", "td") for _ in range(_span(cell))]
    labels = [_inline(cell.children) for cell in cells]
    if groups:
        labels = [f"{name}: {label}" if name else label for name, label in zip(groups, labels, strict=True)]
    yield _row(labels)
    yield _row("---:" if cell.attributes.get("class") == "number" else "---" for cell in cells)
    for row in next(node.find("tbody")).find("tr"):
        yield _row(_inline(cell.children) for cell in row.find("th", "td"))


def _span(cell: _Node) -> int:
    return int(cell.attributes.get("colspan") or 1)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _inline(children: Iterable[_Node | str]) -> str:
    """Return text on one line."""
    return re.sub(r"\s+", " ", "".join(map(_text, children))).strip()


def _text(child: _Node | str) -> str:
    if isinstance(child, str):
        return SPECIAL.sub(r"\\\1", child)
    if child.name in UNSHOWN or "download" in child.attributes:
        return ""
    if child.name in ("svg", "img"):
        told = child.attributes.get("aria-label") or child.attributes.get("alt")
        return f"(figure: {_text(told)}) " if told else ""
    if child.name == "code":
        return _code("".join(_plain(child)))
    inner = "".join(map(_text, child.children))
    if child.name == "sup":
        return f"<sup>{inner}</sup>"
    if child.name == "br" or child.name in BLOCKS:
        return f" {inner} "
    mark, core = MARKS.get(child.name, ""), inner.strip()
    return inner.replace(core, f"{mark}{core}{mark}", 1) if mark and core else inner


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", r"\|") if text else ""


def _plain(node: _Node) -> Iterator[str]:
    for child in node.children:
        yield from [child] if isinstance(child, str) else _plain(child)
