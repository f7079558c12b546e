"""``fasternet predict --output``: what the command says and refuses; what it writes is tested with ``predict``."""

import json
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from fasternet.cli.predict import predict
from fasternet.deploy import explain_engine
from fasternet.models import create_model, save_checkpoint


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """Return the arguments for two pictures, one of which cannot be read."""
    save_checkpoint(tmp_path / "model", create_model("fasternet_t0", width=8, num_classes=3), name="fasternet_t0")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "pictures" / "1.png")
    (tmp_path / "pictures" / "2.png").write_text("text")
    return [str(tmp_path / "pictures"), "--checkpoint", str(tmp_path / "model"), "--num-workers", "0"]


def run(*words: object):
    app = typer.Typer()
    app.command()(predict)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_output_is_named_and_unreadable_pictures_are_counted(arguments, tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    result = run(*arguments, "--output", output)
    assert (result.exit_code, result.stdout) == (0, f"{output}\n")
    assert result.stderr == "2 pictures predicted, 1 of them could not be read\n"
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [Path(line["path"]).name for line in lines] == ["1.png", "2.png"]
    assert [len(line.get("top", [])) for line in lines] == [3, 0]


def test_wrong_use_is_one_clear_sentence(arguments, tmp_path, monkeypatch) -> None:
    assert str(run(*arguments, "--resume").exception) == "resume needs output, the file to go on with"
    (tmp_path / "out.csv").touch()
    assert str(run(*arguments, "--output", tmp_path / "out.csv").exception).endswith("out.csv exists already")
    result = run("http://127.0.0.1:9/shards", *arguments[1:], "--output", tmp_path / "new.csv")
    assert isinstance(result.exception, ConnectionError)


def test_auto_says_what_it_chose_and_why(arguments, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fasternet.deploy.auto.CANDIDATES", ("eager",))
    result = run(*arguments, "--engine", "auto", "--device", "cpu", "--json")
    assert result.stderr.startswith("engine auto: eager takes ")
    assert "; prepared in " in result.stderr


def test_engine_and_precision_are_taken_and_int8_says_what_it_is_not(arguments) -> None:
    if reason := explain_engine("onnxruntime", "int8"):
        pytest.skip(reason)
    result = run(*arguments, "--engine", "onnxruntime", "--precision", "int8", "--device", "cpu", "--json")
    assert result.stderr.startswith("precision int8: speed only")
    assert len(json.loads(result.stdout)["predictions"][0]["top"]) == 3
    result = run(*arguments, "--precision", "int8", "--device", "cpu")
    assert str(result.exception).startswith("engine eager has no int8")
