import dataclasses
from collections.abc import Mapping

import pytest

from fasternet.models.fasternet import VARIANTS
from fasternet.train.detection_recipe import DETECTION_RECIPES, PAPER_DETECTION_RECIPES, DetectionRecipe
from fasternet.train.recipe import BaseRecipe, Recipe, load_recipe, parse_overrides, save_recipe
from fasternet.train.recipes import PAPER_RECIPES, RECIPES, find_recipe


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("epochs=3", 3),
        ("lr=1e-3", 0.001),
        ("lr=1", 1.0),
        ("clip_grad=none", None),
        ("clip_grad=0.01", 0.01),
        ("flip=True", True),
        ("channels_last=false", False),
        ("rand_augment=rand-m3-mstd0.5-inc1", "rand-m3-mstd0.5-inc1"),
        ("rand_augment=none", None),
        ("random_resized_crop=0.08,1", (0.08, 1.0)),
        ("precision=bf16", "bf16"),
        ("lr_schedule=epoch", "epoch"),
    ],
)
def test_parse_overrides_reads_the_declared_type(override: str, value: object) -> None:
    changed = getattr(parse_overrides(RECIPES["digits"], [override]), override.partition("=")[0])
    assert changed == value
    assert type(changed) is type(value)


def test_parse_overrides_leaves_the_other_fields_alone() -> None:
    recipe = RECIPES["digits"]
    changed = parse_overrides(recipe, ["lr=0.5", "epochs=7"])
    assert dataclasses.replace(changed, lr=recipe.lr, epochs=recipe.epochs) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=2.5", "epochs=2.5 must be a whole number"),
        ("epochs=0", "epochs=0 must be at least 1"),
        ("lr=fast", "lr=fast must be a number"),
        ("lr=nan", "lr=nan must be a number"),
        ("lr=-1", "lr=-1.0 must be between"),
        ("flip=1", "flip=1 must be true or false"),
        ("clip_grad=no", "clip_grad=no must be none or a number"),
        ("precision=fp8", "precision=fp8 must be auto or fp32 or bf16 or fp16"),
        ("random_resized_crop=0.5", "must be two numbers"),
        ("random_resized_crop=0.5,0.2", "must rise within"),
        ("label_smoothing=1", "label_smoothing=1.0 must be between 0.0 and 0.99"),
        ("lr", "must read field=value"),
        ("rand_augment=rand-m99", "rand_augment=rand-m99 must begin with rand-m and a whole number from 0 to 10"),
        ("rand_augment=rand-m2.5", "whole number from 0 to 10"),
        ("teacher=", "teacher= must be none or text that is not empty"),
    ],
)
def test_parse_overrides_refuses_a_wrong_value(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_overrides(RECIPES["small"], [override])


def test_parse_overrides_offers_near_names() -> None:
    with pytest.raises(ValueError, match=r"no field 'batchsize'; did you mean batch_size"):
        parse_overrides(RECIPES["small"], ["batchsize=3"])
    with pytest.raises(ValueError, match=r"no field 'nosuch'; its fields are epochs, batch_size, "):
        parse_overrides(RECIPES["small"], ["nosuch=1"])


def test_parse_overrides_refuses_a_field_with_two_values() -> None:
    with pytest.raises(ValueError, match="epochs is given twice, as 3 and as 1"):
        parse_overrides(RECIPES["small"], ["epochs=3", "lr=0.1", "epochs=1"])
    assert parse_overrides(RECIPES["small"], ["lr=1e-1", "lr=0.1"]).lr == 0.1


def test_recipe_refuses_to_mix_an_odd_batch() -> None:
    with pytest.raises(ValueError, match="batch_size=33 must be even"):
        parse_overrides(RECIPES["small"], ["mixup=0.1", "batch_size=33"])


def test_find_recipe_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match="'big' is not one of paper, small, finetune, digits"):
        find_recipe("big")


def test_find_recipe_has_the_paper_s_for_each_variant_and_for_no_other_network() -> None:
    assert [find_recipe("paper", name) for name in VARIANTS] == list(PAPER_RECIPES.values())
    for name in ("MobileNetV2", None):
        with pytest.raises(ValueError, match="recipe 'paper' is for fasternet_t0"):
            find_recipe("paper", name)


def test_rate_follows_the_batch_where_the_recipe_says_for_which_it_is_meant() -> None:
    recipe = parse_overrides(PAPER_RECIPES["fasternet_t0"], ["batch_size=512"])
    assert recipe.effective_lr == pytest.approx(0.0005)
    assert recipe.compute_lr(20) == pytest.approx(0.0005)
    assert parse_overrides(RECIPES["small"], ["batch_size=512"]).effective_lr == RECIPES["small"].lr


def test_size_of_training_pictures_changes_for_the_last_epochs() -> None:
    recipe = PAPER_RECIPES["fasternet_l"]
    assert [recipe.size_of(epoch) for epoch in (0, 279, 280, 299)] == [192, 192, 224, 224]
    recipe = parse_overrides(RECIPES["digits"], ["input_size=48"])
    assert {recipe.size_of(epoch) for epoch in range(recipe.epochs)} == {48}
    for size, small in ((256, 192), (40, 32), (24, 24)):
        recipe = parse_overrides(RECIPES["small"], [f"input_size={size}"])
        assert (recipe.size_of(0), recipe.size_of(recipe.epochs - 1)) == (small, size)


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        (["epochs=300"], []),
        (["epochs=40"], []),
        (
            ["epochs=2"],
            ["the rate reaches 0.000211", "full_size_epochs=20 is the whole run: no epoch trains at 192 px"],
        ),
        (["epochs=20"], ["no epoch trains at 192 px"]),
        (["epochs=10", "lr_schedule=step", "full_size_epochs=0"], ["epochs=10 the rate reaches 0.00199"]),
        (["epochs=20", "train_scale=1"], []),
        (["epochs=20", "input_size=32"], []),
    ],
)
def test_recipe_says_what_a_short_run_never_reaches(changes: list[str], sentences: list[str]) -> None:
    recipe = parse_overrides(PAPER_RECIPES["fasternet_t0"], changes)
    found = recipe.describe_shortfalls(20)
    assert len(found) == len(sentences)
    assert all(part in sentence for part, sentence in zip(sentences, found, strict=True))


@pytest.mark.parametrize("num_steps", [1, 7, 1251])
@pytest.mark.parametrize("kind", [PAPER_RECIPES, RECIPES, PAPER_DETECTION_RECIPES, DETECTION_RECIPES])
def test_recipe_as_it_stands_has_no_shortfall(kind: Mapping[str, BaseRecipe], num_steps: int) -> None:
    for recipe in kind.values():
        # Table 7's warm-up of 500 steps is for COCO.
        too_short = kind is PAPER_DETECTION_RECIPES and num_steps < 500 / 12
        assert len(recipe.describe_shortfalls(num_steps)) == too_short


ALL = [*PAPER_RECIPES.values(), *RECIPES.values()]


@pytest.mark.parametrize("recipe", ALL, ids=[*PAPER_RECIPES, *RECIPES])
def test_recipe_file_returns_the_same_recipe(recipe: Recipe, tmp_path) -> None:
    save_recipe(tmp_path / "recipe.yaml", recipe)
    assert load_recipe(tmp_path / "recipe.yaml", Recipe) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: fast\n", "is not a recipe"),
        ("- 1\n", "it holds no fields"),
        ("", "it holds no fields"),
        ("lr: [", "is not a recipe"),
        ("learning_rate: 1\n", "no field 'learning_rate'"),
    ],
)
def test_load_recipe_says_what_is_wrong(text: str, message: str, tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(path, Recipe)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [Recipe, DetectionRecipe])
def test_recipe_documents_each_field(kind: type[BaseRecipe]) -> None:
    text = "".join(part.__doc__.split("Attributes:")[1] for part in (BaseRecipe, kind))
    documented = [line.split(":")[0].strip() for line in text.splitlines()]
    assert {field.name for field in dataclasses.fields(kind)} <= set(documented)
