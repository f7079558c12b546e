import json
from collections import Counter

from typer.testing import CliRunner

from fasternet.cli import app
from fasternet.paper import load_table
from fasternet.train.table6 import compare_with_table6


def test_paper_recipes_equal_table6_cell_by_cell() -> None:
    cells = compare_with_table6()
    settings = [row["setting"] for row in load_table("table6_imagenet_recipe") if row["setting"] != "top1"]
    assert len(settings) == 37
    assert Counter(cell.setting for cell in cells) == dict.fromkeys(settings, 6)
    assert [cell for cell in cells if cell.paper != cell.ours] == []


def test_reproduce_table6_shows_each_cell_and_every_difference(monkeypatch) -> None:
    result = CliRunner().invoke(app, ["reproduce", "table6"])
    assert result.exit_code == 0
    assert "222 of 222 cells equal" in result.stdout
    document = json.loads(CliRunner().invoke(app, ["reproduce", "table6", "--json"]).stdout)
    assert {
        "setting": "weight_decay",
        "variant": "S",
        "source": "paper (S: code)",
        "paper": 0.03,
        "ours": 0.03,
    } in document
    cells = compare_with_table6()
    changed = [cell.__class__(cell.setting, cell.variant, cell.source, cell.paper, 7.0) for cell in cells[:1]]
    monkeypatch.setattr("fasternet.train.table6.compare_with_table6", lambda: changed + cells[1:])
    result = CliRunner().invoke(app, ["reproduce", "table6"])
    assert "7 (paper 192)" in result.stdout
    assert "221 of 222 cells equal" in result.stdout
