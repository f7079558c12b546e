"""Table 7: cells that could be constants follow what the code does."""

import dataclasses

import pytest
import torch

from fasternet.train import table7
from fasternet.train.detection_recipe import PAPER_DETECTION_RECIPES, DetectionRecipe


def read_cell(setting: str) -> object:
    return next(cell.ours for cell in table7.compare_with_table7() if cell.setting == setting)


def test_optimizer_is_that_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_cell("optimizer") == "AdamW"
    monkeypatch.setattr(table7, "create_optimizer", lambda model, recipe: torch.optim.SGD(model.parameters()))
    assert read_cell("optimizer") == "SGD"


def test_warmup_is_as_the_rate_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_cell("warmup_schedule") == "linear"
    recipe = PAPER_DETECTION_RECIPES["fasternet_s"]
    assert table7._name_warmup(dataclasses.replace(recipe, warmup_iterations=7)) == "linear"
    assert table7._name_warmup(dataclasses.replace(recipe, warmup_iterations=0)) == "none"
    monkeypatch.setattr(DetectionRecipe, "compute_lr", lambda recipe, epoch, done, num_steps: done**2)
    assert read_cell("warmup_schedule") == "other"
