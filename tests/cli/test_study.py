"""``fasternet study`` and ``surgery``: folders, going on, what is printed; the studies themselves are stood in for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fasternet import cli
from fasternet.analysis import ablation, approximation, redundancy, salience
from fasternet.environment import create_record
from fasternet.models import Preprocessing
from fasternet.ops.pconv_nd import PConvPWConv
from fasternet.records import load_records
from fasternet.report import page
from fasternet.rivals import create_network, load_network, save_network
from fasternet.train.classification import train
from fasternet.train.recipes import RECIPES


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for label in ("daisy", "tulip"):
        (tmp_path / "flowers" / label).mkdir(parents=True)
        for number in range(5):
            pixels = draw.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "flowers" / label / f"{number}.png")
    model = create_network("resnet18", num_classes=2)
    save_network(tmp_path / "net", model, name="resnet18", preprocessing=Preprocessing(input_size=32))
    return tmp_path


@pytest.fixture
def called(monkeypatch):
    """What the studies were asked for; each yields two records, of which known ones are left out."""
    calls = []

    def stand_in(suite):
        def measure(*arguments, known=(), **options):
            calls.append((suite, arguments, options))
            done = {record.subject for record in known}
            return (create_record(suite, "study", name) for name in ("one", "two") if name not in done)

        return measure

    monkeypatch.setattr(approximation, "measure_approximation", stand_in("approximation"))
    monkeypatch.setattr(redundancy, "measure_redundancy", stand_in("redundancy"))
    monkeypatch.setattr(salience, "measure_salience", stand_in("salience"))
    monkeypatch.setattr(salience, "measure_receptive_field", stand_in("receptive_field"))
    monkeypatch.setattr(ablation, "measure_ablation", stand_in("ablation"))
    monkeypatch.setattr(ablation, "measure_ablation_latency", stand_in("ablation"))
    monkeypatch.setattr(page, "create_report", lambda sources, output, *, items: output)
    monkeypatch.setattr(page, "render_item", lambda name, sources: f"{name} of {sources[0].name}")
    return calls


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


STUDIES = {
    "approximation": ("--data", "flowers", "--checkpoint", "net"),
    "redundancy": ("flowers/daisy/0.png", "--data", "flowers", "--checkpoint", "net"),
    "salience": ("--checkpoint", "net"),
    "ablation": ("--data", "flowers"),
}


@pytest.mark.parametrize("name", STUDIES)
def test_study_writes_a_folder_and_prints_its_page_last(name, called, folder):
    result = invoke("study", name, *STUDIES[name], "-o", "mine")
    assert result.exit_code == 0, result.exception
    assert {record.suite for record in load_records(folder / "mine" / "log.jsonl")} >= {name}
    assert result.stdout.splitlines()[-1] == "mine/report.html"
    assert " of log.jsonl" in result.stdout


def test_study_goes_on_where_it_stopped(called, folder):
    arguments = ("study", "approximation", *STUDIES["approximation"], "-o", "mine")
    assert invoke(*arguments).exit_code == 0
    log = folder / "mine" / "log.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    refused = invoke(*arguments)
    assert isinstance(refused.exception, FileExistsError)
    assert "mine holds a study already" in str(refused.exception)
    assert invoke(*arguments, "--resume").exit_code == 0
    assert [record.subject for record in load_records(log)] == ["one", "two"]
    assert "no study to go on with in other" in str(invoke(*arguments[:-1], "other", "--resume").exception)
    assert invoke("study", "approximation", "--data", "flowers", "--resume").exit_code == 2


def test_options_reach_the_study(called):
    options = ("--layer", "layer1.0.conv1, layer2.0.conv2", "--seeds", "2", "--target", "norm", "--num-images", "4")
    assert invoke("study", "approximation", *STUDIES["approximation"], *options, "-o", "a").exit_code == 0
    ((_, (reference, pictures), given),) = called
    assert reference.condition == {"model": "resnet18", "weights": "net"}
    assert len(pictures) == 4
    assert given["layers"] == ["layer1.0.conv1", "layer2.0.conv2"]
    assert (list(given["seeds"]), given["target"]) == ([0, 1], "norm")


def test_json_is_one_document(called):
    result = invoke("study", "salience", *STUDIES["salience"], "--json", "-o", "mine")
    assert [record["suite"] for record in json.loads(result.stdout)] == ["salience"] * 2 + ["receptive_field"] * 2
    assert result.stderr.splitlines()[-1] == "mine/report.html"


@pytest.mark.parametrize(("item", "arguments"), [("table2", ("--data", "flowers")), ("fig6", ())])
def test_reproduce_runs_the_study_and_goes_on_with_it(item, arguments, called, folder):
    for _ in range(2):
        result = invoke("reproduce", item, *arguments, "--checkpoint", "net")
        assert result.exit_code == 0, result.exception
    records = load_records(folder / "outputs" / "reproduce" / item / "log.jsonl")
    assert len(records) in (2, 4)
    assert "needs pictures: name a folder with --data" in str(invoke("reproduce", "table2").exception)
    assert "fig3 needs a picture" in str(invoke("reproduce", "fig3").exception)


def test_surgery_prints_and_saves_a_network_that_trains_on(folder):
    result = invoke("surgery", "resnet18", "--checkpoint", "net", "--no-latency", "-o", "new", "--out", "log.jsonl")
    assert result.exit_code == 0, result.exception
    assert result.stdout.splitlines()[-1] == "new"
    assert "layer1.0.conv1" in result.stdout
    (record,) = load_records(folder / "log.jsonl")
    assert (record.subject, record.condition["weights"], record.condition["input_size"]) == ("resnet18", "net", 32)
    assert record.values["num_params_after"] < record.values["num_params_before"]
    before, after = (load_network(folder / name) for name in ("net", "new"))
    assert isinstance(after.model.layer1[0].conv1, PConvPWConv)
    assert torch.equal(after.model.conv1.weight, before.model.conv1.weight)
    recipe = RECIPES["small"]
    changes = {"epochs": 1, "batch_size": 4, "num_workers": 0, "input_size": 32, "full_size_epochs": 0}
    recipe = type(recipe)(**{**vars(recipe), **changes})
    train("resnet18", "flowers", folder / "run", recipe=recipe, checkpoint=folder / "new")
    trained = load_network(folder / "run").model
    assert isinstance(trained.layer1[0].conv1, PConvPWConv)
    train("resnet18", "flowers", folder / "run", recipe=recipe, resume=True)  # knows the network from its log


def test_surgery_takes_a_network_of_a_file(folder):
    script = str(Path(__file__).parents[2] / "runs" / "c2f.py")
    options = ("--input-channels", "64", "--input-size", "16", "--match", "macs", "--no-latency", "--json")
    result = invoke("surgery", f"{script}:create", *options)
    assert result.exit_code == 0, result.exception
    values = json.loads(result.stdout)["values"]
    assert [layer["name"] for layer in values["replaced"]] == [
        f"bottlenecks.{block}.convs.{conv}.0" for block in range(2) for conv in range(2)
    ]
    assert values["macs_after"] == pytest.approx(values["macs_before"], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("fasternet_t0",), "is built on PConv already"),
        (("resnet18", "--kind", "dwconv"), "kind 'dwconv' is not one of pconv, pconv_alone"),
        (("resnet18", "--select", "nothing"), "nothing"),
        (("resnet50", "--checkpoint", "net"), "net holds resnet18, and resnet50 was asked for"),
        (("resnet18", "--checkpoint", "net", "--pretrained"), "give --checkpoint or --pretrained, not both"),
        (("resnet18", "--checkpoint", "net", "-o", "flowers"), "flowers exists already"),
        (("mine.py:create",), "no Python file at mine.py"),
        (("empty.py:create",), "empty.py has no function create"),
        (("number.py:create",), "create of number.py must return a torch.nn.Module, not int"),
        (("number.py:create", "-o", "new"), "comes as it is: use replace_convs in Python"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, folder):
    (folder / "empty.py").write_text("")
    (folder / "number.py").write_text("def create():\n    return 3\n")
    result = invoke("surgery", *arguments, "--no-latency", "--input-size", "32")
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError | OSError)
    assert sentence in str(result.exception)
