import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasternet.data.datasets import ImageDataset, create_datasets
from fasternet.data.images import ImageError
from fasternet.data.loaders import create_loader
from fasternet.data.transforms import create_transform
from fasternet.environment import describe_machine
from fasternet.models.checkpoint import Preprocessing


@pytest.fixture
def dataset() -> ImageDataset:
    """Return 22 digits with every augmentation."""
    dataset = create_datasets("digits").validation.select(range(22))
    dataset.transform = create_transform(
        Preprocessing(input_size=32), training=True, rand_augment="rand-m7-mstd0.5-inc1"
    )
    return dataset


def list_batches(dataset: ImageDataset, batch_size: int = 4, **options) -> list[torch.Tensor]:
    loader = create_loader(dataset, batch_size, **{"training": True, **options})
    batches = list(loader)
    assert len(loader) == len(batches)
    return [tensor for batch in batches for tensor in batch]


def are_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_batches_do_not_depend_on_workers_or_random_states(dataset: ImageDataset) -> None:
    alone = list_batches(dataset, seed=5, epoch=2)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    torch.manual_seed(99)
    assert are_equal(list_batches(dataset, seed=5, epoch=2, num_workers=2), alone)
    assert are_equal(list_batches(dataset, seed=5, epoch=2), alone)


def test_each_seed_and_epoch_has_its_order_and_augmentation(dataset: ImageDataset) -> None:
    dataset.transform = None
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        loader = create_loader(dataset, 22, training=True, seed=seed, epoch=epoch)
        orders.append(tuple(loader.sampler))
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(22)) for order in orders)


def test_augmentation_differs_by_picture_and_epoch(dataset: ImageDataset) -> None:
    def draw(_image: Image.Image) -> torch.Tensor:
        return torch.tensor([random.random(), np.random.random(), torch.rand(()).item()])  # noqa: NPY002

    dataset.transform = draw
    draws = torch.cat([tensor for epoch in (0, 1) for tensor in list_batches(dataset, 22, epoch=epoch)[::2]])
    assert draws.shape == (44, 3)
    assert len(draws.flatten().unique()) == 132


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_leaves_the_random_states_alone(dataset: ImageDataset, num_workers: int) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    list_batches(dataset, num_workers=num_workers)
    dataset.transform = create_transform(Preprocessing(input_size=32), training=False)
    list_batches(dataset, num_workers=num_workers, training=False)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_workers_are_no_more_than_the_cores(dataset: ImageDataset) -> None:
    assert create_loader(dataset, 4, training=True, num_workers=999).num_workers == describe_machine().cores


def test_training_leaves_out_a_partial_batch_unless_it_is_the_only_one(dataset: ImageDataset) -> None:
    assert [len(tensor) for tensor in list_batches(dataset)[::2]] == [4] * 5
    assert [len(tensor) for tensor in list_batches(dataset, 30)[::2]] == [22]


def test_evaluation_gives_every_picture_in_order(dataset: ImageDataset) -> None:
    dataset.transform = create_transform(Preprocessing(input_size=32, crop_ratio=1.0), training=False)
    tensors = list_batches(dataset, training=False)
    assert torch.cat(tensors[1::2]).tolist() == dataset.labels
    assert torch.equal(tensors[-2][-1], dataset[21][0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_picture_is_one_sentence_from_any_process(tmp_path: Path, num_workers: int) -> None:
    paths = []
    for index in range(4):
        paths.append(Path(f"{index}.png"))
        Image.new("RGB", (8, 8)).save(tmp_path / paths[-1])
    (tmp_path / "2.png").write_text("text")
    dataset = ImageDataset(tmp_path, paths, [0] * 4, ["a"])
    dataset.transform = create_transform(Preprocessing(input_size=8), training=False)
    with pytest.raises(ImageError) as caught:
        list_batches(dataset, 2, num_workers=num_workers)
    assert str(caught.value) == f"cannot read {tmp_path / '2.png'}: it is no picture of a known format"


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2, "num_workers": -1}])
def test_wrong_sizes_are_refused(dataset: ImageDataset, options) -> None:
    with pytest.raises(ValueError, match=r"batch_size=\d must be at least 1, num_workers=-?\d at least 0"):
        create_loader(dataset, training=True, **options)
