from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasternet.train.recipe import Recipe


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A second thread makes networks this small slower, on a busy machine ten times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve noisy pictures of each of two classes: dark and bright."""
    root = tmp_path_factory.mktemp("data") / "brightness"
    generator = np.random.default_rng(0)
    for name, level in (("dark", 60), ("bright", 190)):
        (root / name).mkdir(parents=True)
        for number in range(12):
            pixels = generator.normal(level, 20, (40, 48, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    return root


@pytest.fixture
def recipe() -> Recipe:
    """Everything that draws random numbers is on."""
    return Recipe(
        epochs=3,
        batch_size=8,
        lr=2e-3,
        warmup_epochs=1,
        weight_decay=0.05,
        mixup=0.2,
        cutmix=1.0,
        drop_path_rate=0.2,
        input_size=32,
        random_resized_crop=(0.5, 1.0),
        flip=True,
        rand_augment="rand-m3-mstd0.5-inc1",
        precision="fp32",
    )
