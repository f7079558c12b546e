"""The paper's recipes beside Table 6, cell by cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from fasternet.models.fasternet import VARIANTS, FasterNetConfig
from fasternet.paper import load_table
from fasternet.train.optim import BETAS
from fasternet.train.recipe import Recipe
from fasternet.train.recipes import PAPER_RECIPES

Cell = str | float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A cell of Table 6: what the paper (or, where it says nothing, its code) sets, and what the recipe does."""

    setting: str
    variant: str
    source: str
    paper: Cell
    ours: Cell


def compare_with_table6() -> list[Comparison]:
    """Return every cell of Table 6 that is a setting, in the table's order; its last row, top-1, is a result."""
    cells = []
    for row in load_table("table6_imagenet_recipe"):
        if row["setting"] == "top1":
            continue
        for name, recipe in PAPER_RECIPES.items():
            variant = name.removeprefix("fasternet_").upper()
            ours = _SETTINGS[row["setting"]](recipe, VARIANTS[name])
            cells.append(Comparison(row["setting"], variant, row["source"], read_cell(row[variant]), ours))
    return cells


def read_cell(text: str) -> Cell:
    """Return a cell of a table as a number, or as it is."""
    try:
        return float(text)
    except ValueError:
        return text


def _answer(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _rand_augment(recipe: Recipe, letter: str) -> Cell:
    """Return the number behind ``m`` or ``mstd`` in timm's words, ``none`` without RandAugment."""
    words = (recipe.rand_augment or "").split("-")[1:]
    found = [float(word.removeprefix(letter)) for word in words if word.rstrip("0123456789.") == letter]
    return found[0] if found else "none"


_SETTINGS: Mapping[str, Callable[[Recipe, FasterNetConfig], Cell]] = {
    "train_resolution_epochs_1_to_280": lambda r, _: r.size_of(0) if r.size_of(0) == r.size_of(279) else "changes",
    "train_resolution_epochs_281_to_300": lambda r, _: (
        r.size_of(280) if r.size_of(280) == r.size_of(299) else "changes"
    ),
    "test_resolution": lambda r, _: r.input_size,
    "test_crop_ratio": lambda r, _: r.crop_ratio,
    "epochs": lambda r, _: r.epochs,
    "batch_size": lambda r, _: r.batch_size,
    "optimizer": lambda r, _: "AdamW",
    "beta1": lambda r, _: BETAS[0],
    "beta2": lambda r, _: BETAS[1],
    "lr": lambda r, _: r.compute_lr(r.warmup_epochs - 1),
    "lr_decay": lambda r, _: "cosine",
    "min_lr": lambda r, _: r.min_lr,
    "weight_decay": lambda r, _: r.weight_decay,
    "warmup_epochs": lambda r, _: r.warmup_epochs,
    "warmup_schedule": lambda r, _: "linear",
    "warmup_start_lr": lambda r, _: r.compute_lr(0),
    "label_smoothing": lambda r, _: r.label_smoothing,
    "dropout": lambda r, config: config.drop_rate,
    "stochastic_depth": lambda r, _: r.drop_path_rate,
    "repeated_augmentation": lambda r, _: "no",  # an epoch takes each picture once
    "gradient_clip_norm": lambda r, _: "none" if r.clip_grad is None else r.clip_grad,
    "horizontal_flip": lambda r, _: _answer(r.flip),
    "random_resized_crop": lambda r, _: _answer(r.random_resized_crop == (0.08, 1.0)),
    "rand_augment_magnitude": lambda r, _: _rand_augment(r, "m"),
    "rand_augment_std": lambda r, _: _rand_augment(r, "mstd"),
    # What follows to "no" and 0 without looking is nothing that create_transform or the loop can do.
    "auto_augment": lambda r, _: "no",
    "mixup_alpha": lambda r, _: r.mixup,
    "cutmix_alpha": lambda r, _: r.cutmix,
    "random_erasing": lambda r, _: 0.0,
    "color_jitter": lambda r, _: 0.0,
    "pca_lighting": lambda r, _: "no",
    "swa": lambda r, _: "no",
    "ema": lambda r, _: _answer(r.ema_decay is not None),
    "layer_scale": lambda r, config: _answer(config.layer_scale is not None),
    "cross_entropy_loss": lambda r, _: "yes",
    "binary_cross_entropy_loss": lambda r, _: "no",
    "mixed_precision": lambda r, _: _answer(r.precision != "fp32"),
}
