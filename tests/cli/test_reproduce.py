"""``fasternet reproduce``: the whole paper as a list; each command measures, keeps, shows and names its page."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fasternet.benchmark import deploy, networks, operators
from fasternet.cli._items import ITEMS, explain_item
from fasternet.cli.reproduce import MEASURED, reproduce
from fasternet.paper import load_table
from fasternet.records import Record, append_records, load_records
from fasternet.report import page

DOCS = Path(__file__).parents[2] / "docs" / "reproduce.md"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def called(monkeypatch):
    """What the suites were asked for; each yields a record of its name. The report only notes what it would show."""
    calls = []

    def stand_in(suite):
        def measure(names=None, **options):
            calls.append((suite, names, options))
            yield Record(suite=suite, kind="cost", subject="x")

        return measure

    monkeypatch.setattr(operators, "measure_operators", stand_in("operators"))
    monkeypatch.setattr(networks, "measure_networks", stand_in("networks"))
    monkeypatch.setattr(deploy, "measure_deploy", stand_in("deploy"))
    monkeypatch.setattr(page, "create_report", lambda sources, output, *, items: output)
    monkeypatch.setattr(page, "render_item", lambda name, sources: f"{name} of {', '.join(s.name for s in sources)}")
    return calls


def invoke(*arguments):
    return CliRunner().invoke(reproduce, list(arguments))


def test_list_holds_every_table_and_figure():
    papers = dict.fromkeys(item.paper for item in ITEMS)
    assert list(papers) == [*(f"Table {n}" for n in range(1, 10)), *(f"Figure {n}" for n in range(1, 9))]
    document = json.loads(invoke("list", "--json").stdout)
    assert [row["what"] for row in document] == [item.what for item in ITEMS]
    assert "Figure 8" in invoke("list").stdout


def test_commands_of_the_list_exist():
    names = {command.name or command.callback.__name__ for command in reproduce.registered_commands}
    listed = {m.group(1) for item in ITEMS if (m := re.match(r"fasternet reproduce (\w+)", item.command))}
    assert names == listed | {"list"}


@pytest.mark.parametrize(
    ("what", "has_cuda", "architecture", "answer"),
    [
        ("operators: FLOPS, CPU", False, "x86_64", "yes"),
        ("operators: FLOPS, GPU", False, "x86_64", "no: no CUDA device is visible to torch"),
        ("operators: FLOPS, GPU", True, "x86_64", "yes"),
        ("operators: FLOPS, ARM", True, "x86_64", "no: this machine is x86_64"),
        ("operators: FLOPS, ARM", False, "aarch64", "yes"),
        ("networks: top-1", False, "x86_64", "yes, with ImageNet and weights"),
        ("ablation: top-1", True, "x86_64", "yes, with ImageNet"),
        ("detection: AP", False, "x86_64", "yes, with COCO and weights"),
    ],
)
def test_machine_decides_what_runs(what, has_cuda, architecture, answer):
    (item,) = (item for item in ITEMS if item.what == what)
    assert explain_item(item, has_cuda=has_cuda, architecture=architecture) == answer


def test_page_of_the_docs_holds_the_same_table():
    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if re.match(r"\| (Table|Figure) \d", line)]
    rows = [tuple(cell.strip().strip("`") for cell in line.strip("|").split("|")) for line in lines]
    assert rows == [(i.paper, i.what, i.command, ", ".join(i.needs) or "nothing") for i in ITEMS]


@pytest.mark.parametrize("name", MEASURED)
def test_command_measures_its_suites_and_keeps_the_records(name, called, folder):
    result = invoke(name, "--quick", "--batch-size", "4")
    assert result.exit_code == 0, result.exception
    expected = {"table1": ["operators"], "fig1": ["operators"], "table9": ["operators", "deploy"]}.get(
        name, ["networks"]
    )
    assert [suite for suite, *_ in called] == expected
    for _, _, options in called:
        assert (options["quick"], options["batch_size"], options["device"]) == (True, 4, "cpu")
    files = sorted(path for path in folder.rglob("*.jsonl"))
    assert sorted(load_records(path)[0].suite for path in files) == sorted(expected)
    assert result.stdout.splitlines()[-1] == f"outputs/reproduce/{name}.html"
    assert result.stdout.startswith(f"{name} of ")


def test_default_batch_is_the_papers(called):
    for device, batch_size in (("cpu", 1), ("cuda", 32)):
        assert invoke("table1", "--device", device).exit_code == 0
        assert called[-1][2]["batch_size"] == batch_size


def test_table5_and_table9_name_what_they_measure(called):
    for name in ("table5", "table9"):
        assert invoke(name).exit_code == 0
    (_, variants, _), (_, forms, _), (_, deployed, _) = called
    rows = [row["variant"] for row in load_table("table5_ablation")]
    assert {"FasterNet-T0", "FasterNet-T2", "FasterNet-T0 LN", "FasterNet-T2 GELU"} <= set(variants)
    assert {name.removeprefix("FasterNet-") for name in variants} - {"T0", "T2", "T0 ReLU"} <= set(rows)
    assert forms[0] == "pconv3x3_r1/4"
    assert {form.partition(":")[2] for form in forms} == {"", "split_cat", "slicing", "in_place"}
    assert deployed is None


def test_records_are_used_instead_of_measuring(called, folder):
    append_records(folder / "a.jsonl", [Record(suite="operators", kind="cost", subject="x")])
    result = invoke("table1", "--records", "a.jsonl", "--records", "a.jsonl", "-o", "elsewhere")
    assert result.stdout == "table1 of a.jsonl, a.jsonl\nelsewhere/table1.html\n"
    assert not called


def test_machine_without_cuda_says_so_in_one_sentence(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = invoke("fig2", "--device", "cuda")
    assert result.exit_code == 1
    assert "cuda" in str(result.exception)
    assert isinstance(result.exception, ValueError)


def test_table8_is_counted_and_held_against_the_paper(monkeypatch, folder):
    pytest.importorskip("matplotlib")
    result = invoke("table8")
    assert result.exit_code == 0, result.exception
    assert "| T0 | 40 | 1-2-8-2 | GELU | 3.9 | 3.905 | 0.34 | 0.335 |" in result.stdout
    assert (folder / "outputs" / "reproduce" / "table8.md").is_file()
    assert "equal Table 8 to the printed digit" in result.stderr
    rows = [
        row | {"macs_g_224": "9.99"} if row["variant"] == "T1" else row for row in load_table("table8_architecture")
    ]
    monkeypatch.setattr("fasternet.paper.load_table", lambda name: rows)
    assert str(invoke("table8").exception) == "not as Table 8 prints it: T1 macs_g_224 0.85, printed 9.99"


@pytest.mark.parametrize("name", ["list", "table6", "table8", "fig4", *MEASURED])
def test_help_ends_with_an_invocation(name):
    shown = " ".join(invoke(name, "--help").stdout.split())
    assert f"Example: fasternet reproduce {name}" in shown
