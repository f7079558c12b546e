"""What the pages promise exists: every command line with its options, every file that is linked."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fasternet.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def find_commands(page):
    """Return the ``fasternet`` lines of a page's code blocks, and those that stand in its sentences and tables."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`(fasternet [a-z]+ [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line.split("  #")[0].strip() for line in [*lines, *inline] if line.startswith("fasternet ")]


def find_script_commands(script):
    """Return the ``fasternet`` lines of a shell script, its variables replaced by a number."""
    text = (
        script.read_text(encoding="utf-8")
        .replace("\\\n", " ")
        .replace('"${resume[@]}"', "--resume")
        .replace('"$@"', "")
        .replace('"${common[@]}"', "--data 1")
    )
    text = re.sub(r'"[^"\n]*\$[^"\n]*"(/\*|/[a-z-]+\*)?|\$[a-z]+', "1", text)
    lines = [line.partition("#")[0].strip().removesuffix("&") for line in text.splitlines()]
    return [line[line.index("fasternet ") :] for line in lines if re.search(r"(^|-m\s+)fasternet [a-z]", line)]


SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))
COMMANDS = [(page.name, command) for page in PAGES for command in find_commands(page)]
COMMANDS += [(script.name, command) for script in SCRIPTS for command in find_script_commands(script)]


def test_pages_hold_commands():
    assert len(COMMANDS) > 50
    assert {name for name, _ in COMMANDS if name.endswith(".sh")} == {script.name for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_is_shell(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_of_a_page_is_understood(page, command):
    words = shlex.split(command)[1:]
    # Help is shown once all options are understood.
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
