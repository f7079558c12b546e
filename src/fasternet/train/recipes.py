"""The recipes by name, as data: the paper's for each variant (Table 6), and those for smaller sets of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fasternet.train.recipe import Recipe


def _create_paper_recipe(
    *,
    weight_decay: float,
    drop_path_rate: float,
    mixup: float,
    magnitude: int | None,
    batch_size: int = 4096,
    clip_grad: float | None = None,
) -> Recipe:
    """Return a column of Table 6; what it does not print is the published code's (rates, clipping, schedule)."""
    return Recipe(
        epochs=300,
        batch_size=batch_size,
        lr=batch_size / 1024 * 1e-3,
        lr_batch_size=batch_size,
        warmup_epochs=20,
        lr_schedule="epoch",
        weight_decay=weight_decay,
        clip_grad=clip_grad,
        mixup=mixup,
        cutmix=1.0,
        drop_path_rate=drop_path_rate,
        input_size=224,
        train_scale=192 / 224,
        full_size_epochs=20,
        random_resized_crop=(0.08, 1.0),
        flip=True,
        rand_augment=f"rand-m{magnitude}-mstd0.5-inc1" if magnitude else None,
        num_workers=12,
    )


PAPER_RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "fasternet_t0": _create_paper_recipe(weight_decay=0.005, drop_path_rate=0.0, mixup=0.05, magnitude=None),
        "fasternet_t1": _create_paper_recipe(weight_decay=0.01, drop_path_rate=0.02, mixup=0.1, magnitude=3),
        "fasternet_t2": _create_paper_recipe(weight_decay=0.02, drop_path_rate=0.05, mixup=0.1, magnitude=5),
        "fasternet_s": _create_paper_recipe(weight_decay=0.03, drop_path_rate=0.1, mixup=0.3, magnitude=7),
        "fasternet_m": _create_paper_recipe(
            weight_decay=0.05, drop_path_rate=0.2, mixup=0.5, magnitude=7, batch_size=2048, clip_grad=1.0
        ),
        "fasternet_l": _create_paper_recipe(
            weight_decay=0.05, drop_path_rate=0.3, mixup=0.7, magnitude=7, batch_size=2048, clip_grad=0.01
        ),
    }
)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        # One GPU or CPU and a few thousand pictures, where the published recipe underfits: on 3,439 pictures of five
        # flowers T0 reached 67 % at its rate of 0.002 and reaches 73 % here, in seven minutes on two cores.
        "small": Recipe(
            epochs=36,
            batch_size=64,
            lr=4e-4,
            warmup_epochs=2,
            weight_decay=0.05,
            ema_decay=0.99,
            input_size=128,
            train_scale=0.75,
            full_size_epochs=4,
            random_resized_crop=(0.3, 1.0),
            flip=True,
            num_workers=4,
        ),
        # From weights that know pictures already, for a folder of a few thousand: five epochs of the flowers from
        # weights of 8,000 small pictures gave 64.3 %, those of "small" 63.7 %, from scratch 60.7 % (three seeds).
        "finetune": Recipe(
            epochs=10,
            batch_size=64,
            lr=5e-4,
            warmup_epochs=1,
            layer_decay=0.9,
            weight_decay=0.05,
            ema_decay=0.99,
            input_size=224,
            random_resized_crop=(0.3, 1.0),
            flip=True,
            num_workers=4,
        ),
        # Handwritten digits of 8x8 pixels: no mirroring, small crops. Five seeds of T0 reached 99.4 to 99.7 %, three
        # of a T0 of width 16 the same.
        "digits": Recipe(
            epochs=12,
            batch_size=64,
            lr=5e-4,
            warmup_epochs=1,
            weight_decay=0.05,
            input_size=32,
            crop_ratio=1.0,
            random_resized_crop=(0.7, 1.0),
            flip=False,
        ),
    }
)


def find_recipe(name: str, model_name: str | None = None) -> Recipe:
    """Return the recipe of this name.

    Args:
        name: ``paper``, or one of ``RECIPES``.
        model_name: The network, as ``paper`` is another recipe for each variant.

    Raises:
        ValueError: There is none, or the paper has none for this network.
    """
    if name == "paper":
        if model_name is None or model_name not in PAPER_RECIPES:
            raise ValueError(f"recipe 'paper' is for {', '.join(PAPER_RECIPES)}, and not for {model_name}")
        return PAPER_RECIPES[model_name]
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is not one of paper, {', '.join(RECIPES)}")
    return RECIPES[name]
