"""The page as a whole: complete, self-contained, safe, and clear about bad input."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from fasternet.cli.report import report
from fasternet.records import Record, append_records, load_records
from fasternet.report import create_report
from fasternet.report.page import ITEMS, render_item
from fasternet.report.raw import show_raw
from fasternet.report.sources import Source

Write = Callable[[list[Record]], Path]
VOID = {"meta", "link", "img", "br"}
LOST = "Where FasterNet is not the fastest"


class Page(HTMLParser):
    """Checks that elements close in order, and collects what tests ask for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[tuple[str, str]] = []
        self.feed(self.text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.data.append((self.open[-1] if self.open else "", data))

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get(name))]

    def texts(self, tag: str) -> list[str]:
        return [data for name, data in self.data if name == tag]


@pytest.fixture(scope="module")
def everything(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a run and of every suite."""
    folder = tmp_path_factory.mktemp("everything")
    networks = [*example.make_networks(), *example.make_networks(32)]
    speeds = [*networks, *example.make_operators(), *example.make_optimize(), *example.make_training_speed()]
    speeds += [*example.make_steps(), *example.make_forms(), *example.make_faults()]
    append_records(folder / "speeds.jsonl", speeds)
    run = example.write_run(folder / "run")
    return Page(create_report([folder / "speeds.jsonl", run], folder / "report.html"))


def test_page_has_all_sections_and_every_anchor_exists(everything: Page) -> None:
    page = everything
    sections = ["Summary", "Claims", LOST, "Networks", "Variants", "Operators"]
    sections += ["Forms of PConv", "Training speed", "Ratios", "Training", "Faults", "Exactness", "Costs"]
    sections += ["Environment", "Records", "Notes"]
    assert page.texts("h2") == sections
    anchors = page.attributes("id")
    assert len(anchors) == len(set(anchors))
    links = [link[1:] for link in page.attributes("href") if link.startswith("#")]
    assert len(links) > len(sections)
    assert set(links + page.attributes("aria-labelledby")) <= set(anchors)


def test_page_loads_nothing(everything: Page) -> None:
    page = everything
    assert "http:" not in page.text
    assert "https:" not in page.text
    assert "@import" not in page.text
    assert all(source.startswith("data:image/") for source in page.attributes("src"))
    assert all(link.startswith(("#", "data:,")) for link in [*page.attributes("href"), *page.attributes("xlink:href")])
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.text))
    assert len(page.attributes("src")) == 24


def test_page_allows_only_its_own_script(everything: Page) -> None:
    text = everything.text
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text


def test_page_is_the_same_for_the_same_records(run_folder: Path, tmp_path: Path) -> None:
    first = create_report([run_folder], tmp_path / "first.html").read_bytes()
    assert create_report([run_folder], tmp_path / "second.html").read_bytes() == first


def test_record_text_never_becomes_markup(example: ModuleType, write: Write, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&$x^$"
    condition = example.CPU | {"input_size": 224, "engine": evil, "note": evil}
    shape = {"channels": 96, "height": 56, "width": 56}
    records = [
        example.make("networks", "cost", evil, evil, condition=condition, values={"macs": 1}),
        example.make_latency("networks", evil, 3.0, condition, macs=1e9),
        example.make_latency("operators", evil, 3.0, condition | shape, macs=1e9),
        example.make_ratio("networks", evil, evil * 2, 1.2, condition),
        example.make("networks", "latency", f"{evil}2", condition=condition, values={"error": evil}),
        example.make("train", "run", evil, condition={evil: evil}, values={evil: [evil]}),
        example.make("train", "epoch", evil, condition={"epoch": 1}, values={"train_loss": 1.0, "top1": 3.0}),
        example.make("train", "evaluation", evil, values={"top1": 3.0, "per_class": [{"name": evil, "top1": evil}]}),
        example.make(
            "eval", "evaluation", evil, values=example.make_evaluation() | {"per_class": [{"name": evil}] * 10}
        ),
        example.make("eval", "evaluation", f"{evil}3", values={"ece": evil, "confusion": [[evil, evil, 3]]}),
        example.make("faults", "fault", evil, values={"injected": 3, "recovered": 2, "remark": evil}),
        example.make("train", "prediction", evil, values={"label": evil, "truth": f"{evil}2", "probability": evil}),
        example.make("deploy", "difference", evil, values={"changed_predictions": 1, "num_images": 2}),
    ]
    page = Page(create_report([write(records)], tmp_path / "report.html"))
    assert [attributes.get("type") for name, attributes in page.elements if name == "script"] == [
        "application/jsonl",
        None,
    ]
    assert "<script>alert" not in page.text
    assert page.text.count("&lt;script&gt;alert(1)") > 20


def test_name_that_is_no_utf8_is_escaped(example: ModuleType, write: Write, tmp_path: Path) -> None:
    values = {"injected": 3, "recovered": 2, "remark": "odd\udcff"}
    records = [example.make("faults", "fault", "kill", values=values)]
    page = create_report([write(records)], tmp_path / "report.html")
    assert "odd\\udcff" in page.read_text(encoding="utf-8")
    assert "odd\\udcff" in page.with_suffix(".md").read_text(encoding="utf-8")


def test_every_figure_tells_machine_versions_date_and_command(everything: Page) -> None:
    figures = re.findall(r"<figure.*?</figure>", everything.text, re.DOTALL)
    measured = [figure for figure in figures if 'id="commands"' not in figure and "Figure 4." not in figure]
    assert len(measured) > 20
    for figure in measured:
        assert "Example CPU, 2 cores, 8 GiB" in figure
        assert "2026-01-02, fasternet 0.1.0, torch 2.15.0, commit 0123456789ab" in figure
        assert "<code>fasternet " in figure


@pytest.mark.parametrize(
    ("build", "sections"),
    [
        ("make_networks", ["Summary", "Claims", LOST, "Networks", "Variants", "Ratios", "Costs"]),
        ("make_operators", ["Summary", "Claims", "Operators", "Ratios"]),
        ("make_forms", ["Summary", "Forms of PConv", "Ratios"]),
        ("make_optimize", ["Summary", "Ratios", "Exactness"]),
        ("make_run", ["Summary", "Training"]),
        ("make_faults", ["Faults"]),
        ("make_training_speed", ["Summary", "Training speed", "Ratios"]),
        ("make_steps", ["Training speed", "Ratios"]),
    ],
)
def test_sections_exist_only_where_records_do(
    example: ModuleType, write: Write, tmp_path: Path, build: str, sections: list[str]
) -> None:
    page = Page(create_report([write(getattr(example, build)())], tmp_path / "report.html"))
    assert page.texts("h2") == [*sections, "Environment", "Records", "Notes"]


def test_machine_without_description_goes_by_its_id(example: ModuleType, write: Write, tmp_path: Path) -> None:
    text = create_report([write(example.make_optimize())], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Measured on example-cpu-2c: " in text


def test_folder_gives_every_record_file_below(example: ModuleType, tmp_path: Path) -> None:
    append_records(tmp_path / "results" / "a" / "one.jsonl", example.make_operators())
    append_records(tmp_path / "results" / "b" / "two.jsonl", example.make_optimize())
    page = Page(create_report([tmp_path / "results"], tmp_path / "new" / "report.html"))
    sections = ["Summary", "Claims", "Operators", "Ratios", "Exactness", "Environment", "Records", "Notes"]
    assert page.texts("h2") == sections


def test_source_named_twice_counts_once(run_folder: Path, tmp_path: Path) -> None:
    once = create_report([run_folder], tmp_path / "once.html").read_bytes()
    assert create_report([run_folder, run_folder / "log.jsonl"], tmp_path / "twice.html").read_bytes() == once


def test_bad_sources_are_one_sentence(example: ModuleType, write: Write, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "picture.png").write_bytes(example.make_picture())
    (tmp_path / "text.jsonl").write_text("hello\n", encoding="utf-8")
    mistyped = write([example.make("networks", "latency", "x", values=3)])
    sampled = write([example.make("networks", "latency", "x", samples={"latency_ms": ["fast"]})])
    cases: list[tuple[list[Path], type[Exception], str]] = [
        ([], ValueError, "sources is empty"),
        ([tmp_path / "absent.jsonl"], FileNotFoundError, "no record file or run folder at .*absent.jsonl"),
        ([tmp_path / "empty"], ValueError, "empty holds no records"),
        ([tmp_path / "empty.jsonl"], ValueError, "empty.jsonl holds no records"),
        ([tmp_path / "picture.png"], ValueError, "picture.png holds no records"),
        ([tmp_path / "text.jsonl"], ValueError, "text.jsonl line 1 is not a record"),
        ([mistyped], ValueError, "line 1 is not a record: a field has another type"),
        ([sampled], ValueError, "line 1 is not a record: a field has another type"),
    ]
    for sources, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            create_report(sources, tmp_path / "report.html")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_bad_output_is_one_sentence_and_sources_stay(run_folder: Path, tmp_path: Path) -> None:
    log = run_folder / "log.jsonl"
    before = log.read_bytes()
    with pytest.raises(ValueError, match="is a folder: name a file"):
        create_report([run_folder], run_folder)
    with pytest.raises(ValueError, match=r"must be named \*\.html"):
        create_report([run_folder], log)
    assert log.read_bytes() == before


def test_older_page_is_replaced_only_by_a_whole_one(run_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("old", encoding="utf-8")
    with pytest.raises(FileNotFoundError):
        create_report([tmp_path / "absent"], page)
    assert page.read_text(encoding="utf-8") == "old"
    assert create_report([run_folder], page) == page
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.glob(".*.part")) == []


def test_missing_matplotlib_names_the_extra(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fasternet\[report\]'"):
        create_report([run_folder], tmp_path / "report.html")


def test_report_never_imports_torch(run_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fasternet.report import create_report\n"
        f"create_report([Path({str(run_folder)!r})], Path({str(tmp_path / 'report.html')!r}))\n"
        "assert not {'torch', 'torchvision', 'timm'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_command_prints_the_path(run_folder: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report)
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, [str(run_folder), "-o", str(page)])
    assert (result.exit_code, result.output) == (0, f"{page}\n")
    assert page.is_file()
    assert CliRunner().invoke(app, []).exit_code == 2


def test_records_are_in_the_page_with_every_repetition(example: ModuleType, write: Write, tmp_path: Path) -> None:
    records = [*example.make_engines(), example.make("networks", "cost", "</script><!--&amp;", values={"macs": 1})]
    text = create_report([write(records)], tmp_path / "report.html").read_text(encoding="utf-8")
    (block,) = re.findall(r'<script type="application/jsonl" id="records">(.*?)</script>', text, re.DOTALL)
    assert not set("<>&") & set(block)
    saved = tmp_path / "saved.jsonl"
    saved.write_text(block, encoding="utf-8")
    assert load_records(saved) == records
    assert f'The HTML page holds {len(records)} records of 1 file, with every repetition. <a id="download-rec' in text


@pytest.mark.parametrize(
    ("missing", "told", "samples"),
    [
        (0, "with every repetition", [1.23456789, 2.0]),
        (1, "rounded to 4 digits", [1.235, 2.0]),
        (5 * 5 + 1, "without the repetitions", []),  # rounding saves five digits a record
        (5 * (5 + 9) + 1, "too large for the page", None),
    ],
)
def test_too_many_raw_numbers_are_shortened_and_it_is_said(
    example: ModuleType, missing: int, told: str, samples: list[float] | None
) -> None:
    """Where so many bytes are missing, of five records with two repetitions each."""
    record = example.make("networks", "latency", "x", samples={"latency_ms": [1.23456789, 2.0]})
    source = Source(Path("some.jsonl"), (record,) * 5)
    size = len(re.sub("<[^>]*>", "", show_raw([source])[1]))
    paragraph, *block = show_raw([source], max_bytes=size - missing)
    assert told in paragraph
    found = [re.findall(r'"samples":(.*?),"attachments"', html) for html in block]
    expected = {} if samples is None else {"latency_ms": samples}
    assert found == ([] if samples is None else [[json.dumps(expected, separators=(",", ":"))] * 5])


def test_items_are_shown_alone(example: ModuleType, write: Write, tmp_path: Path) -> None:
    source = write([*example.make_networks(), *example.make_forms(), *example.make_run()])
    page = Page(create_report([source], tmp_path / "report.html", items=["table9", "fig2"]))
    assert page.texts("h2") == ["Table 9", "Figure 2", "Environment", "Records", "Notes"]


@pytest.mark.parametrize("name", ["table3", "table8", "table9", "fig2", "fig4", "fig8", "claims"])
def test_item_reads_in_a_shell(example: ModuleType, write: Write, name: str) -> None:
    text = render_item(name, [write([*example.make_networks(), *example.make_forms()])])
    title = {"claims": "Claims"}.get(name, name.replace("table", "Table ").replace("fig", "Figure "))
    assert text.startswith(f"**{title}")
    assert "\n| " in text or "(figure: " in text


def test_unknown_item_and_item_without_records_are_one_sentence(
    example: ModuleType, write: Write, tmp_path: Path
) -> None:
    source = write(example.make_run())
    assert list(ITEMS)[:7] == ["table1", "table2", "table3", "table4", "table5", "table8", "table9"]
    with pytest.raises(ValueError, match="item 'table7' is not one of table1, table2, "):
        create_report([source], tmp_path / "report.html", items=["table7"])
    for name in set(ITEMS) - {"fig4"}:
        with pytest.raises(ValueError, match=rf"^nothing was measured of {name}: no record of it in .*\.jsonl$"):
            render_item(name, [source])
    assert not (tmp_path / "report.html").exists()
