"""The paper's recipes of detection beside Table 7, cell by cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import nn

from fasternet.paper import load_table
from fasternet.train.detection_recipe import PAPER_DETECTION_RECIPES, DetectionRecipe
from fasternet.train.optim import create_optimizer
from fasternet.train.table6 import Cell, Comparison, read_cell

PROCESSES = 8  # GPUs that the published batch is cut over


def compare_with_table7() -> list[Comparison]:
    """Return every cell of Table 7, in its order."""
    cells = []
    for row in load_table("table7_coco_recipe"):
        for name, recipe in PAPER_DETECTION_RECIPES.items():
            variant = name.removeprefix("fasternet_").upper()
            ours = _SETTINGS[row["setting"]](recipe)
            cells.append(Comparison(row["setting"], variant, row["source"], read_cell(row[variant]), ours))
    return cells


def _name_warmup(recipe: DetectionRecipe) -> str:
    """Tell how the rate rises: half of its steps bring a line half of the way."""
    if not (steps := recipe.warmup_iterations):
        return "none"
    share = (steps // 2) / steps
    first, middle, last = (recipe.compute_lr(0, done, steps) for done in (0.0, share, 1.0))
    return "linear" if first < last and math.isclose(middle, first + share * (last - first)) else "other"


_SETTINGS: Mapping[str, Callable[[DetectionRecipe], Cell]] = {
    "shorter_side": lambda r: r.min_size,
    "longer_side_at_most": lambda r: r.max_size,
    "batch_size": lambda r: r.batch_size,
    "batch_size_per_gpu": lambda r: r.batch_size / PROCESSES / r.accumulate,
    "optimizer": lambda r: type(create_optimizer(nn.Linear(1, 1), r)).__name__,
    "epochs": lambda r: r.epochs,
    "weight_decay": lambda r: r.weight_decay,
    "warmup_schedule": _name_warmup,
    "warmup_iterations": lambda r: r.warmup_iterations,
    "lr_step_epochs": lambda r: " ".join(f"{epoch:g}" for epoch in r.lr_step_epochs),
    "lr_step_factor": lambda r: r.lr_step_factor,
    "lr": lambda r: r.effective_lr,
    "stochastic_depth": lambda r: "published" if r.drop_path_rate is None else r.drop_path_rate,
    # The only one that the builders have, which are above this layer: tests/detection/test_detector.py asserts it.
    "add_on_layer_init": lambda r: "xavier",
}
