"""The Markdown twin: the same tables and numbers as the page, and text that stays text."""

import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from fasternet.records import append_records
from fasternet.report import create_report
from fasternet.report.markdown import to_markdown
from fasternet.report.markup import Column, Html, figure, join, power_of_ten, table, tag


class Tables(HTMLParser):
    """Collects the text of every row of every table body."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.in_cell = self.in_body = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tbody":
            self.tables.append([])
            self.in_body = True
        elif tag == "tr" and self.in_body:
            self.tables[-1].append([])
        elif tag in ("td", "th") and self.in_body:
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")
        self.in_body = self.in_body and tag != "tbody"

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.tables[-1][-1][-1] += data


def read_markdown_tables(text: str) -> list[list[list[str]]]:
    """Return the cells of every pipe table, without the marks of Markdown."""
    tables: list[list[list[str]]] = []
    lines = text.splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        if re.fullmatch(r"\| [-:| ]+ \|", line) and above.startswith("| "):
            tables.append([])
        elif line.startswith("| ") and above.startswith("| "):
            tables[-1].append([read_cell(cell) for cell in re.split(r"(?<!\\) \| ", line[2:-2])])
    return tables


def read_cell(text: str) -> str:
    return re.sub(r"\\(.)|</?sup>|[*`]", lambda match: match.group(1) or "", text).strip()


def squeeze(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[*`]", "", text)).strip()


@pytest.fixture(scope="module")
def twins(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The page of a run and of every suite, and its twin."""
    folder = tmp_path_factory.mktemp("twins")
    speeds = [*example.make_networks(), *example.make_engines(), *example.make_operators(), *example.make_forms()]
    append_records(folder / "speeds.jsonl", [*speeds, *example.make_optimize(), *example.make_faults()])
    page = create_report([folder / "speeds.jsonl", example.write_run(folder / "run")], folder / "report.html")
    return page.read_text(encoding="utf-8"), page.with_suffix(".md").read_text(encoding="utf-8")


def test_twin_has_every_cell_of_every_table(twins: tuple[str, str]) -> None:
    page, twin = twins
    expected = [[[squeeze(cell) for cell in row] for row in rows] for rows in Tables(page).tables]
    found = [[[squeeze(cell) for cell in row] for row in rows] for rows in read_markdown_tables(twin)]
    assert len(expected) > 12
    assert sum(len(row) for rows in expected for row in rows) > 1000
    assert found == expected


def test_twin_has_every_heading_caption_and_note(twins: tuple[str, str]) -> None:
    page, twin = twins
    text = read_cell(twin)
    for name in ("h1", "h2", "figcaption", "summary"):
        titles = re.findall(rf"<{name}[^>]*>([^<]*)</{name}>", page)
        assert titles
        assert all(Tables(f"<table><tbody><tr><td>{t}</td>").tables[0][0][0] in text for t in titles)
    assert [line[3:] for line in twin.splitlines() if line.startswith("## ")] == re.findall("<h2>(.*?)</h2>", page)


def test_twin_carries_no_markup_script_or_data(twins: tuple[str, str]) -> None:
    _, twin = twins
    assert not re.findall(r"<(?!/?sup>)[a-z/]", re.sub(r"`[^`]*`", "", twin))
    assert "data:" not in twin
    assert "sort" not in twin.replace("sorted", "")
    assert "(figure: Confusion matrix of 10 classes)" in twin


def test_table_joins_groups_to_headings_and_keeps_alignment() -> None:
    columns: list[Column[tuple[str, float]]] = [
        Column("Name", lambda row: row[0]),
        Column("here", lambda row: row[1], ".1f", "Speed, ms"),
        Column("paper", lambda row: None if row[1] > 2 else 1, ".0f", "Speed, ms"),
    ]
    html = figure("key", "A table", table("key", columns, [("a|b_c", 1.25), ("<i>", 3.0)]), "Note *.")
    assert to_markdown(html).splitlines() == [
        "**A table**",
        "",
        "| Name | Speed, ms: here | Speed, ms: paper |",
        "| --- | ---: | ---: |",
        r"| a\|b_c | 1.2 | 1 |",
        r"| \<i> | 3.0 | – |",
        "",
        r"Note \*.",
    ]


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        (tag("p", "a ", tag("strong", "b "), tag("em", "c")), "a **b** *c*"),
        (tag("p", tag("code", "x | `y`")), r"`` x \| `y` ``"),
        (tag("p", "# no heading"), r"\# no heading"),
        (tag("p", "1. no list"), r"1\. no list"),
        (tag("p", "_a_ a_b &lt; [x]"), r"\_a\_ a_b \&lt; \[x\]"),
        (tag("p", power_of_ten(3.1e-7)), "3.1 × 10<sup>−7</sup>"),
        (tag("ol", tag("li", "a"), tag("li", "b")), "1. a\n2. b"),
        (tag("dl", tag("div", tag("dt", "a"), tag("dd", "b"), tag("dd", "c"))), "- **a** b; c"),
        (tag("details", tag("summary", "More"), tag("p", "x")), "**More**\n\nx"),
        (tag("div", Html('<svg aria-label="Two &amp; more"><g></g></svg>')), "(figure: Two & more)"),
        (tag("p", "x", tag("button", "press"), tag("script", Html("1"))), "x"),
        (join([tag("div", Html('<svg aria-label="A"></svg>'))] * 2), "(figure: A)"),
        (Html(""), ""),
    ],
)
def test_elements_read_as_they_should(html: Html, markdown: str) -> None:
    assert to_markdown(html) == (f"{markdown}\n" if markdown else "")


def test_twin_lies_beside_the_page(example: ModuleType, tmp_path: Path) -> None:
    append_records(tmp_path / "records.jsonl", example.make_engines())
    create_report([tmp_path / "records.jsonl"], tmp_path / "new" / "page.html")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["page.html", "page.md"]
