"""``fasternet pick``: a table, one JSON document, or one sentence; a promise that is checked."""

import json

import pytest
import typer
from typer.testing import CliRunner

from fasternet.benchmark import networks
from fasternet.cli.pick import pick
from fasternet.environment import describe_machine
from fasternet.records import Record, append_records, load_records

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
app.command("pick")(pick)


def make(network, latency_ms, **condition):
    shared = {"device": "cpu", "batch_size": 1, "threads": 1, "input_size": 224}
    values = {"latency_ms": latency_ms, "latency_ms_low": 0.9 * latency_ms, "latency_ms_high": 1.1 * latency_ms}
    return Record(
        suite="networks", kind="latency", subject=network, machine=describe_machine().id, created="2026-01-01T00:00:00",
        condition={"engine": "eager", "precision": "fp32", **shared, **condition}, values=values,
        samples={"latency_ms": [latency_ms] * 3},
    )  # fmt: skip


RECORDS = [
    make("FasterNet-T0", 10.0),
    make("FasterNet-T0", 5.0, engine="openvino"),
    make("FasterNet-T0", 2.0, engine="openvino", precision="int8"),
    make("MobileNetV2", 5.2),
    make("FasterNet-T1", 20.0),
]


@pytest.fixture
def measured(monkeypatch):
    """What measure_networks was asked for; it answers with FasterNet-T0 at twice the recorded time."""
    calls = []

    def fake(names=None, **options):
        calls.append((names, options))
        yield from (make("FasterNet-T0", 10.0, engine=engine) for engine in options["engines"])

    monkeypatch.setattr(networks, "measure_networks", fake)
    return calls


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTERNET_RESULTS", raising=False)
    append_records(tmp_path / "results" / "a.jsonl", RECORDS)
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_table_is_ranked_by_top1_and_the_lines_deploy(measured):
    result = invoke("--budget-ms", "6")
    assert result.exit_code == 0
    mobilenet, fasternet = (line for line in result.stdout.splitlines() if "paper, Table 3" in line)
    assert mobilenet.split()[:4] == ["1", "MobileNetV2", "eager", "fp32"]
    assert "4.50 to 5.50" in fasternet
    assert "the first two are not distinguishable" in result.stdout
    assert 'fasternet.create_model("fasternet_t0", pretrained=True)' in result.stdout
    assert "fasternet predict photo.jpg --model fasternet_t0 --engine openvino --device cpu" in result.stdout
    assert not measured


def test_json_is_one_document(measured):
    document = json.loads(invoke("--budget-ms", "6", "--all", "--top", "1", "--json").stdout)
    assert document["machine"] == describe_machine().id
    (row,) = document["fits"]
    assert (row["network"], row["top1"], row["source"]) == ("MobileNetV2", 72.0, "paper, Table 3")
    assert document["check"] is None


def test_int8_shows_the_top1_of_fp32():
    result = invoke("--budget-ms", "6", "--precision", "int8")
    assert "fp32: 71.9" in result.stdout
    assert "speed only" in result.stdout


def test_miss_is_told_in_factor_and_ms():
    result = invoke("--budget-ms", "2")
    assert result.exit_code == 1
    assert str(result.exception) == (
        "nothing fits 2 ms: the nearest is FasterNet-T0 in openvino, whose 5.5 ms are 2.75 times the budget"
    )
    nearest = next(line.split() for line in result.stdout.splitlines() if "FasterNet-T0" in line)
    assert nearest[-2:] == ["3.5", "2.75"]
    document = json.loads(invoke("--budget-ms", "2", "--json").stdout)
    assert document["fits"] == []
    assert document["nearest"][0]["times_budget"] == pytest.approx(2.75)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--budget-ms", "6", "--min-top1", "80"], "is met by none of the 4 on record: the highest is 76.2"),
        (["--budget-ms", "0"], "budget_ms must be more than 0, not 0"),
        (["--budget-ms", "6", "--engine", "magic"], "engine 'magic' is not one of"),
        (["--budget-ms", "6", "--engine", "auto"], "engine auto is one of the others, chosen by timing"),
        (["--budget-ms", "6", "--records", "results", "--threads", "2"], "hold no latency of this machine"),
        (["--budget-ms", "6", "--records", "results", "--measure"], "give measure or records, not both"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_sentence(measured, arguments, sentence):
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert sentence in str(result.exception)
    assert not measured


def test_measures_where_there_are_no_records_and_keeps_them(measured, folder):
    result = invoke("--budget-ms", "12", "--batch-size", "1", "--engine", "onnxruntime", "--quick")
    assert result.exit_code == 0, result.exception
    ((names, options),) = measured
    assert names is None
    assert (options["engines"], options["precisions"], options["quick"]) == (["onnxruntime"], ["fp32"], True)
    (saved,) = (folder / "results" / describe_machine().id).glob("*-networks.jsonl")
    assert [record.condition["engine"] for record in load_records(saved)] == ["onnxruntime"]


def test_measure_takes_the_engines_that_are_ready(measured):
    assert invoke("--budget-ms", "12", "--measure").exit_code == 0
    assert measured[0][1]["engines"][0] == "eager"


@pytest.mark.parametrize(("budget", "held"), [("6", False), ("12", True)])
def test_check_measures_the_first_row_afresh(measured, budget, held):
    arguments = ("--budget-ms", budget, "--engine", "openvino", "--check")
    result = invoke(*arguments)
    ((names, options),) = measured
    assert (names, options["engines"], options["precisions"]) == (["FasterNet-T0"], ["openvino"], ["fp32"])
    assert result.exit_code == (0 if held else 1)
    assert f"the promise is {'kept' if held else 'broken'}" in result.stdout
    if not held:
        assert "misses the budget: 10.00 ms (9.00 to 11.00) reaches beyond 6 ms" in str(result.exception)


def test_help_ends_with_an_invocation():
    assert "Example: fasternet pick --budget-ms 20 --min-top1 75" in " ".join(invoke("--help").stdout.split())
