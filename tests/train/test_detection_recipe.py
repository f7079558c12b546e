import dataclasses
import math

import pytest

from fasternet.train.detection_recipe import (
    DETECTION_RECIPES,
    PAPER_DETECTION_RECIPES,
    DetectionRecipe,
    find_detection_recipe,
)
from fasternet.train.recipe import load_recipe, parse_overrides, save_recipe
from fasternet.train.table7 import compare_with_table7

PAPER = PAPER_DETECTION_RECIPES["fasternet_s"]


def test_paper_recipes_equal_table7_cell_by_cell() -> None:
    cells = compare_with_table7()
    assert len(cells) == 14 * 3
    assert [cell for cell in cells if cell.ours != cell.paper] == []


def test_rate_warms_up_by_steps_and_falls_at_epochs() -> None:
    steps = 1000
    assert PAPER.compute_lr(0, 0.0, steps) == pytest.approx(2e-7)
    assert PAPER.compute_lr(0, 250 / steps, steps) == pytest.approx(2e-4 * (0.001 + 0.999 / 2))
    assert PAPER.compute_lr(0, 500 / steps, steps) == pytest.approx(2e-4)
    assert PAPER.compute_lr(7, 0.999, steps) == pytest.approx(2e-4)
    assert PAPER.compute_lr(8, 0.0, steps) == pytest.approx(2e-5)
    assert PAPER.compute_lr(11, 0.5, steps) == pytest.approx(2e-6)


def test_warm_up_may_last_longer_than_an_epoch() -> None:
    assert PAPER.compute_lr(2, 0.5, 100) == pytest.approx(2e-4 * (0.001 + 0.999 / 2))


def test_rate_without_warm_up_starts_at_the_peak_and_the_cosine_ends_at_nothing() -> None:
    recipe = dataclasses.replace(DETECTION_RECIPES["small"], warmup_iterations=0, epochs=10)
    assert recipe.compute_lr(0, 0.0, 7) == recipe.lr
    assert recipe.compute_lr(5, 0.0, 7) == pytest.approx(recipe.lr / 2)
    assert recipe.compute_lr(9, 6 / 7, 7) == pytest.approx(recipe.lr * (1 + math.cos(math.pi * (9 + 6 / 7) / 10)) / 2)


def test_rate_grows_with_the_batch() -> None:
    assert dataclasses.replace(PAPER, batch_size=2).effective_lr == pytest.approx(2.5e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("min_size=2000", "max_size=1333 must be at least min_size=2000"),
        ("multi_scale=1.2,0.8", "multi_scale=1.2,0.8 must rise"),
        ("multi_scale=480,800", "multi_scale=480,800 must rise within"),
        ("compile=true", "compile=true is not for detectors"),
        ("scale_jitter=0,2", "scale_jitter=0,2 must rise within"),
        ("lr_step_epochs=11,8", "lr_step_epochs=11,8 must rise"),
        ("regions_per_image=0", "regions_per_image=0 must be between 4"),
        ("mixup=0.1", "recipe has no field 'mixup'"),
        ("flip=maybe", "flip=maybe must be true or false"),
        ("validation_share=1", "validation_share=1.0 must be between 0.01 and 0.99"),
    ],
)
def test_wrong_field_is_one_sentence(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_overrides(PAPER, [change])
    assert "\n" not in str(error.value)


def test_two_kinds_of_jitter_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        parse_overrides(PAPER, ["multi_scale=0.8,1.2", "scale_jitter=0.1,2"])


def test_recipe_file_returns_the_same_recipe(tmp_path) -> None:
    recipe = parse_overrides(PAPER, ["multi_scale=0.8,1.2", "clip_grad=none", "batch_size=1"])
    save_recipe(tmp_path / "recipe.yaml", recipe)
    assert load_recipe(tmp_path / "recipe.yaml", DetectionRecipe) == recipe


@pytest.mark.parametrize(("name", "backbone"), [("paper", "fasternet_t0"), ("paper", None), ("large", "fasternet_s")])
def test_unknown_recipe_names_what_there_is(name: str, backbone: str | None) -> None:
    with pytest.raises(ValueError, match="paper"):
        find_detection_recipe(name, backbone)
