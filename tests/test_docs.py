"""What the pages promise exists: every command line with its options, every file that is linked."""

import re
import shlex
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


COMMANDS = [(page.name, command) for page in PAGES for command in find_commands(page)]


def test_pages_hold_commands():
    assert len(COMMANDS) > 25


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
