import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasternet.data.datasets import ImageDataset, create_datasets
from fasternet.data.images import ImageError
from fasternet.data.loaders import TrainingLoader, create_loader
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


@pytest.fixture
def damaged(tmp_path: Path) -> ImageDataset:
    """Return six pictures of six shades, the third and the fourth of them unreadable."""
    paths = [Path(f"{index}.png") for index in range(6)]
    for index, path in enumerate(paths):
        Image.new("RGB", (8, 8), (40 * index,) * 3).save(tmp_path / path)
    for index in (2, 3):
        (tmp_path / paths[index]).write_text("text")
    dataset = ImageDataset(tmp_path, paths, list(range(6)), "abcdef")
    dataset.transform = create_transform(Preprocessing(input_size=8), training=False)
    return dataset


def list_batches(dataset: ImageDataset, batch_size: int = 4, *, epoch: int = 0, start: int = 0, **options):
    loader = TrainingLoader(dataset, batch_size, **options)
    batches = list(loader.batches(epoch, start))
    assert len(batches) == (loader.num_steps - start) * options.get("accumulate", 1)
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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_any_epoch_and_step_again(dataset: ImageDataset, num_workers: int) -> None:
    loader = TrainingLoader(dataset, 4, num_workers=num_workers)
    first = [list(loader.batches(epoch)) for epoch in (0, 1)]
    abandoned = loader.batches(1)
    next(abandoned)
    again = [list(loader.batches(epoch, start)) for epoch, start in ((1, 3), (0, 0))]
    assert len(first[1]) == 5
    for one, other in zip(first[1][3:] + first[0], again[0] + again[1], strict=True):
        assert are_equal(one, other)


def test_parts_of_a_step_do_not_depend_on_who_takes_them(dataset: ImageDataset) -> None:
    whole = list_batches(dataset, 4, epoch=1)
    parts = list_batches(dataset, 4, epoch=1, accumulate=2)
    ranks = [list_batches(dataset, 4, epoch=1, rank=rank, world_size=2) for rank in (0, 1)]
    both = [tensor for pair in zip(*(zip(r[::2], r[1::2], strict=True) for r in ranks), strict=True)
            for batch in pair for tensor in batch]  # fmt: skip
    assert are_equal(both, parts)
    for index in (0, 1):
        assert torch.equal(torch.cat(parts[index::2]), torch.cat(whole[index::2]))


def test_names_are_those_of_the_pictures_of_a_step(dataset: ImageDataset) -> None:
    dataset.labels = list(range(22))
    for rank in (0, 1):
        loader = TrainingLoader(dataset, 4, rank=rank, world_size=2, accumulate=2)
        labels = [int(label) for batch in list(loader.batches(3))[4:6] for label in batch[1]]
        assert loader.names(3, 2) == [dataset.paths[label].as_posix() for label in labels]


@pytest.mark.parametrize(("batch_size", "parts"), [(6, 4), (64, 64)])
def test_step_that_cannot_be_cut_is_refused(dataset: ImageDataset, batch_size: int, parts: int) -> None:
    with pytest.raises(ValueError, match=f"{parts} parts"):
        TrainingLoader(dataset, batch_size, world_size=parts // 2, accumulate=2)


def test_each_seed_and_epoch_has_its_order(dataset: ImageDataset) -> None:
    loaders = [TrainingLoader(dataset, 22, seed=seed) for seed in (0, 1)]
    orders = [tuple(loader.names(epoch, 0)) for loader in loaders for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == sorted(path.as_posix() for path in dataset.paths) for order in orders)


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
    list(create_loader(dataset, 4, num_workers=num_workers))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_workers_are_no_more_than_the_cores(dataset: ImageDataset) -> None:
    assert create_loader(dataset, 4, num_workers=999).num_workers == describe_machine().cores


def test_training_leaves_out_a_partial_batch_unless_it_is_the_only_one(dataset: ImageDataset) -> None:
    assert [len(tensor) for tensor in list_batches(dataset)[::2]] == [4] * 5
    assert [len(tensor) for tensor in list_batches(dataset, 30)[::2]] == [22]


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_gives_every_picture_once_and_in_order(dataset: ImageDataset, world_size: int) -> None:
    dataset.transform = create_transform(Preprocessing(input_size=32, crop_ratio=1.0), training=False)
    dataset.labels = list(range(22))
    seen = []
    for rank in range(world_size):
        batches = list(create_loader(dataset, 4, rank=rank, world_size=world_size))
        labels = torch.cat([labels for _, labels in batches]).tolist()
        assert labels == sorted(labels)
        assert torch.equal(batches[-1][0][-1], dataset[labels[-1]][0])
        seen += labels
    assert sorted(seen) == list(range(22))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_picture_is_one_sentence_from_any_process(damaged: ImageDataset, num_workers: int) -> None:
    for batches in (
        create_loader(damaged, 2, num_workers=num_workers),
        TrainingLoader(damaged, 2, num_workers=num_workers).batches(0),
    ):
        with pytest.raises(ImageError) as caught:
            list(batches)
        assert str(caught.value) in [
            f"cannot read {damaged.root / name}: it is no picture of a known format" for name in ("2.png", "3.png")
        ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_puts_the_next_picture_in_the_place_of_an_unreadable_one(
    damaged: ImageDataset, num_workers: int
) -> None:
    errors: list[ImageError] = []
    tensors = list_batches(damaged, 2, num_workers=num_workers, on_error=errors.append)
    assert sorted(torch.cat(tensors[1::2]).tolist()) == [0, 1, 4, 4, 4, 5]
    assert sorted({str(error).split(":")[0][-5:] for error in errors}) == ["2.png", "3.png"]


def test_training_without_a_readable_picture_is_one_sentence(damaged: ImageDataset) -> None:
    dataset = damaged.select([2, 3])
    dataset.transform = damaged.transform
    with pytest.raises(ImageError, match=r"cannot read .*[23]\.png"):
        list(TrainingLoader(dataset, 2, on_error=[].append).batches(0))


def test_evaluation_leaves_out_unreadable_pictures_where_they_are_reported(damaged: ImageDataset) -> None:
    errors: list[ImageError] = []
    batches = list(create_loader(damaged, 1, on_error=errors.append))
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 4, 5]
    assert len(errors) == 2


@pytest.mark.multiprocess
def test_worker_that_dies_is_one_sentence(dataset: ImageDataset) -> None:
    main = os.getpid()

    def die(image: Image.Image) -> torch.Tensor:
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1)

    dataset.transform = die
    with pytest.raises(OSError, match="a process that loads pictures died") as caught:
        list(TrainingLoader(dataset, 4, num_workers=1).batches(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2, "num_workers": -1}])
def test_wrong_sizes_are_refused(dataset: ImageDataset, options) -> None:
    with pytest.raises(ValueError, match=r"batch_size=\d must be at least 1, num_workers=-?\d at least 0"):
        create_loader(dataset, **options)
