"""``fasternet surgery``: what is printed and saved, training what came of it, networks of a file, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fasternet import cli
from fasternet.models import Preprocessing
from fasternet.ops.pconv_nd import PConvPWConv
from fasternet.records import load_records
from fasternet.rivals import create_network, load_network, save_network
from fasternet.train.recipe import Recipe, load_recipe

FACTS = {"license": "cc-by-4.0", "data": "flowers", "recipe": {"epochs": 3}, "metrics": {"top1": 71.5}}
QUICK = ("--epochs", "1", "--batch-size", "4", "--input-size", "32", "--set", "num_workers=0", "--no-amp")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures of two classes, and a network."""
    folder = tmp_path_factory.mktemp("made")
    draw = np.random.default_rng(0)
    for label in ("daisy", "tulip"):
        (folder / "flowers" / label).mkdir(parents=True)
        for number in range(5):
            pixels = draw.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "flowers" / label / f"{number}.png")
    torch.manual_seed(0)
    model = create_network("resnet18", num_classes=2)
    save_network(folder / "net", model, name="resnet18", preprocessing=Preprocessing(input_size=32), facts=FACTS)
    return folder


@pytest.fixture(autouse=True)
def folder(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("flowers", "net"):
        (tmp_path / name).symlink_to(made / name)
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def operate(checkpoint, output, *options):
    result = invoke("surgery", "resnet18", "--checkpoint", checkpoint, "--no-latency", "-o", output, *options)
    assert result.exit_code == 0, result.exception
    return result


def train(*options, name="resnet18"):
    return invoke("train", name, "--data", "flowers", "-o", "run", "--device", "cpu", *options)


def test_network_is_printed_recorded_and_saved(folder):
    result = operate("net", "new", "--out", "log.jsonl")
    assert result.stdout.splitlines()[-1] == "new"
    assert "layer1.0.conv1" in result.stdout
    operate("net", "other", "--out", "log.jsonl", "--data", "flowers", "--num-images", "4")
    plain, fitted = (record.condition for record in load_records(folder / "log.jsonl"))
    wanted = {"model": "resnet18", "weights": "net", "input_size": 32, "init": "approximate", "num_images": None}
    assert {name: plain.get(name) for name in wanted} == wanted
    assert (fitted["data"], fitted["num_images"]) == ("flowers", 4)
    values = load_records(folder / "log.jsonl")[0].values
    assert values["num_params_after"] < values["num_params_before"]
    before, after = (load_network(folder / name) for name in ("net", "new"))
    assert isinstance(after.model.layer1[0].conv1, PConvPWConv)
    assert torch.equal(after.model.conv1.weight, before.model.conv1.weight)
    assert {name: after.facts.get(name) for name in FACTS} == {**FACTS, "metrics": None}


def test_what_was_operated_on_trains_and_goes_on(folder):
    """With the default recipe, and the record of the operation inside the model folder."""
    operate("net", "new", "--out", "new/log.jsonl")
    assert "holds a resnet18, which is no FasterNet" in str(train("--checkpoint", "new", name="fasternet_t0").exception)
    refused = train("--checkpoint", "new", "--set", "layer_decay=0.8")
    assert "layer_decay needs a FasterNet" in str(refused.exception)
    assert "takes none" not in refused.stderr
    result = train("--checkpoint", "new", *QUICK)
    assert result.exit_code == 0, result.exception
    assert "layer_decay=0.9 is for FasterNet: resnet18 takes none" in result.stderr
    assert load_recipe(folder / "run" / "recipe.yaml", Recipe).layer_decay is None
    assert isinstance(load_network(folder / "run").model.layer1[0].conv1, PConvPWConv)
    result = train("--resume")
    assert result.exit_code == 0, result.exception
    (folder / "run" / "log.jsonl").write_text("")
    assert "does not begin with the record of a run" in str(train("--resume").exception)


def test_operations_add_up(folder):
    operate("net", "once", "--select", r"layer1\..*", "--match", "macs")
    operate("once", "twice", "--select", r"layer2\.1\..*")
    model = load_network(folder / "twice").model
    replaced = {name for name, module in model.named_modules() if isinstance(module, PConvPWConv)}
    assert replaced == {f"layer{block}.conv{conv}" for block in ("1.0", "1.1", "2.1") for conv in (1, 2)}
    assert model.layer1[0].conv1.out_channels > 64
    once = load_network(folder / "once").model
    assert torch.equal(model.layer1[0].conv1.pwconv.weight, once.layer1[0].conv1.pwconv.weight)
    result = invoke("predict", "flowers/daisy/0.png", "--checkpoint", "twice")
    assert result.exit_code == 0, result.exception


def test_network_of_a_file():
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
        (("resnet18", "--checkpoint", "net", "--num-classes", "7"), "num_classes=7 is for a network without weights"),
        (("resnet18", "--pretrained", "--num-classes", "7"), "num_classes=7 is for a network without weights"),
        (("resnet18", "--checkpoint", "net", "-o", "flowers"), "flowers exists already"),
        (("resnet18", "--checkpoint", "net", "-o", "mine.py"), "mine.py exists already"),
        (("absent.py:create",), "no Python file at absent.py"),
        (("mine.py:absent",), "mine.py has no function absent"),
        (("mine.py:number",), "number of mine.py must return a torch.nn.Module, not int"),
        (("mine.py:number", "-o", "new"), "comes as it is: use replace_convs in Python"),
        (("mine.py:divide",), "divide of mine.py made no network: ZeroDivisionError: division by zero"),
        (("mine.py:argue",), "argue of mine.py made no network: TypeError: argue() missing 1 required positional"),
        (("broken.py:create",), "create of broken.py made no network: SyntaxError"),
        (("poor.py:create",), "create of poor.py made no network: ModuleNotFoundError: No module named 'absent'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments, sentence, folder):
    functions = ("number():\n    return 3", "divide():\n    return 1 / 0", "argue(width):\n    return width")
    (folder / "mine.py").write_text("\n".join(f"def {function}" for function in functions))
    (folder / "broken.py").write_text("def create(:\n")
    (folder / "poor.py").write_text("import absent\n")
    result = invoke("surgery", *arguments, "--no-latency", "--input-size", "32")
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError | OSError)
    assert sentence in str(result.exception)
