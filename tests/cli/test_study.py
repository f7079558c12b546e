"""``fasternet study``: folders, going on, what is printed; the studies themselves are stood in for."""

import json
import re
import shlex

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fasternet import cli
from fasternet.analysis import ablation, ablation_latency, approximation, redundancy, reference, salience
from fasternet.environment import create_record
from fasternet.models import Preprocessing
from fasternet.records import load_records
from fasternet.report import page
from fasternet.rivals import create_network, save_network


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for label in ("daisy", "tulip"):
        (tmp_path / "flowers" / label).mkdir(parents=True)
        for number in range(6):
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
    monkeypatch.setattr(ablation_latency, "measure_ablation_latency", stand_in("ablation"))
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
    options = ("--layer", "layer1.0.conv1, layer2.0.conv2", "--seeds", "2", "--target", "norm", "--num-images", "11")
    assert invoke("study", "approximation", *STUDIES["approximation"], *options, "-o", "a").exit_code == 0
    ((_, (network, pictures), given),) = called
    assert (network.name, network.weights) == ("resnet18", "net")
    assert len(pictures) == 11
    assert given["layers"] == ["layer1.0.conv1", "layer2.0.conv2"]
    assert (list(given["seeds"]), given["target"]) == ([0, 1], "norm")


def test_json_is_one_document(called):
    result = invoke("study", "salience", *STUDIES["salience"], "--json", "-o", "mine")
    assert [record["suite"] for record in json.loads(result.stdout)] == ["salience"] * 2 + ["receptive_field"] * 2
    assert result.stderr.splitlines()[-1] == "mine/report.html"


@pytest.mark.parametrize(("item", "arguments", "count"), [("table2", ("--data", "flowers"), 2), ("fig6", (), 4)])
def test_reproduce_runs_the_study_and_goes_on_with_it(item, arguments, count, called, folder):
    for _ in range(2):
        result = invoke("reproduce", item, *arguments, "--checkpoint", "net")
        assert result.exit_code == 0, result.exception
    records = load_records(folder / "outputs" / "reproduce" / item / "log.jsonl")
    assert len(records) == count
    assert "needs pictures: name a folder with --data" in str(invoke("reproduce", "table2").exception)
    assert "fig3 needs a picture" in str(invoke("reproduce", "fig3").exception)


def test_ablation_is_timed_at_its_size_and_in_full_with_the_classes_of_the_data(called):
    assert invoke("study", "ablation", *STUDIES["ablation"], "-o", "mine").exit_code == 0
    (_, arguments, trained), *timed = called
    assert (arguments, trained["data"], trained["size"]) == (("flowers",), "flowers", "small")
    assert [(given["size"], given["num_classes"]) for _, _, given in timed] == [("small", 2), ("full", 2)]


@pytest.fixture
def out_of_reach(monkeypatch):
    """Published weights cannot be downloaded; notes which data a network would be trained on, and where."""
    trained = []

    def fail(name):
        raise ConnectionError(f"no weights of {name}")

    def train(data, run, hooks):
        trained.append((data, run))
        return reference.Reference(create_network("resnet18", num_classes=2), "resnet18", "trained", Preprocessing())

    monkeypatch.setattr(reference, "_load_published", fail)
    monkeypatch.setattr(reference, "_train", train)
    return trained


def test_a_network_is_trained_in_place_of_the_default_alone(called, folder, out_of_reach):
    study = ("study", "salience", "--data", "flowers")
    assert "no weights of resnet34" in str(invoke(*study, "--model", "resnet34", "-o", "a").exception)
    assert out_of_reach == []
    assert invoke(*study, "-o", "b").exit_code == 0
    (folder / "flowers" / "val").mkdir()
    assert invoke("study", "salience", "--data", "flowers/val", "-o", "c").exit_code == 0  # unseen pictures
    (folder / "more").mkdir()
    (folder / "flowers").rename(folder / "more" / "flowers")
    assert invoke("study", "salience", "--data", "more/flowers", "-o", "d").exit_code == 0
    (_, first), (data, second), (_, third) = out_of_reach
    assert data == str(folder / "flowers")
    assert first == second != third  # one for each data set, though both are called flowers
    assert first.name.startswith("reference-resnet18-flowers-")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("approximation", "--data", "nowhere"), "--data must be a folder of pictures, and there is none at nowhere"),
        (("salience", "--data", "nowhere"), "--data must be a folder of pictures, and there is none at nowhere"),
        (("approximation", "--data", "flowers", "--target", "bn"), "target 'bn' is not one of conv, norm"),
        (("approximation", "--data", "flowers", "--normalize", "all"), "normalize 'all' is not one of"),
        (("approximation", "--data", "flowers", "--operators", "PConv"), "operator 'PConv' is not one of"),
        (("approximation", "--data", "flowers", "--layer", "a,,b"), "--layer must be names of modules"),
        (("approximation", "--data", "broken"), "cannot read broken/0.png: the file is empty"),
        (("redundancy", "no.jpg"), "cannot read no.jpg: there is no such file"),
    ],
)
def test_bad_input_is_one_sentence_before_there_is_a_network(arguments, sentence, folder, monkeypatch):
    monkeypatch.setattr(reference, "load_reference", None)
    (folder / "broken").mkdir()
    for number in range(12):
        (folder / "broken" / f"{number}.png").touch()
    result = invoke("study", *arguments)
    assert isinstance(result.exception, ValueError | OSError)
    assert sentence in str(result.exception)


@pytest.mark.parametrize("num_records", [0, 1])
@pytest.mark.parametrize(
    ("words", "advised"),
    [
        (
            ("study", "salience", "--checkpoint", "net", "-o", "mine"),
            "fasternet study salience --checkpoint net -o mine --resume",
        ),
        (("reproduce", "fig6", "--checkpoint", "net"), "fasternet reproduce fig6 --checkpoint net"),
    ],
)
def test_advice_after_an_interrupt_works(words, advised, num_records, called, monkeypatch):
    def interrupt(reference, **options):
        for number in range(num_records):
            yield create_record("salience", "study", str(number))
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["fasternet", *words])
    with monkeypatch.context() as patch:
        patch.setattr(salience, "measure_salience", interrupt)
        assert str(invoke(*words).exception) == f"stopped; go on with: {advised}"
    again = invoke(*shlex.split(advised)[1:])
    assert again.exit_code == 0, again.exception


def test_advice_names_the_folder_that_had_the_time_in_its_name(called, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["fasternet", "study", "salience"])
    monkeypatch.setattr(reference, "load_reference", interrupt)  # before there is anything to measure
    advised = str(invoke("study", "salience").exception)
    assert re.fullmatch(
        r"stopped; go on with: fasternet study salience --output outputs/salience-[\d-]+ --resume", advised
    )
