"""The command line as a whole: one sentence and a status for every error, help that ends in an invocation."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fasternet import cli

COMMANDS = (
    "quickstart",
    "list",
    "info",
    "predict",
    "train",
    "eval",
    "pick",
    "convert",
    "push",
    "report",
    "surgery",
    "env",
)
GROUPS = {
    "bench": ("operators", "networks", "sweeps", "steps", "deploy", "training", "faults", "detection", "engines"),
    "data": ("check", "pack", "index", "import"),
    "detect": ("train", "eval", "predict", "export"),
    "reproduce": ("list", *(f"table{n}" for n in range(1, 10)), *(f"fig{n}" for n in range(1, 9))),
    "results": ("merge", "check"),
    "study": ("approximation", "redundancy", "salience", "ablation"),
}


def run(*arguments):
    command = [sys.executable, "-m", "fasternet", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_lists_every_command_without_torch():
    code = "import sys; from fasternet.cli import app; app(['--help'], standalone_mode=False)"
    code += "; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("False")
    for command in (*COMMANDS, *GROUPS):
        assert f"  {command}" in result.stdout


@pytest.mark.parametrize("command", [*COMMANDS, *(f"{group} {name}" for group in GROUPS for name in GROUPS[group])])
def test_help_ends_with_an_invocation(command):
    result = CliRunner().invoke(cli.app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert f"Example: fasternet {command}" in " ".join(result.stdout.split())


def test_exit_status_is_0_when_done():
    result = run("list")
    assert (result.returncode, result.stderr) == (0, "")
    assert "fasternet_t0" in result.stdout


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_output_that_the_terminal_cannot_show_is_escaped(encoding):
    code = "from fasternet import cli; cli.app = lambda: print('\\udcff \\xe9'); cli.main()"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert result.stdout == b"\\udcff " + (b"\\xe9" if encoding == "ascii" else "\xe9".encode()) + b"\n"


def test_exit_status_is_1_with_one_sentence_when_failed():
    result = run("info", "fasternet_t9")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert "fasternet_t0" in result.stderr
    assert result.stderr.count("\n") == 1


def test_exit_status_is_2_for_wrong_arguments():
    result = run("info")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("x is 3"), "error: x is 3"),
        (FileNotFoundError("no folder at y"), "error: no folder at y"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
        (MemoryError(), "error: out of memory: a smaller --batch-size or input needs less"),
        (KeyError("k"), "error: unexpected KeyError: 'k' (FASTERNET_DEBUG=1 shows where)"),
    ],
)
def test_main_turns_errors_into_one_sentence(monkeypatch, error, message):
    def fail():
        raise error

    monkeypatch.delenv("FASTERNET_DEBUG", raising=False)
    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == message


def test_main_shows_the_traceback_when_asked(monkeypatch):
    def fail():
        raise ValueError("x is 3")

    monkeypatch.setenv("FASTERNET_DEBUG", "1")
    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ValueError, match="x is 3"):
        cli.main()
