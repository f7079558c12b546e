import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fasternet.train.classification import create_classification
from fasternet.train.state import seed_everything

TINY_MODEL = {"width": 8, "depths": (1, 1, 1, 1), "head_width": 16}
LOGITS = torch.tensor([[2.0, -1.0], [0.5, 0.0], [-3.0, 1.0], [0.0, 0.25]])


@pytest.fixture
def create(pictures, recipe):
    def task(**fields):
        changed = dataclasses.replace(recipe, **fields)
        device = torch.device("cpu")
        return create_classification(
            "fasternet_t0", str(pictures), recipe=changed, model_options=TINY_MODEL, device=device
        )

    return task


def test_loss_smooths_labels(create) -> None:
    task = create(mixup=0.0, cutmix=0.0, label_smoothing=0.2)
    labels = torch.tensor([0, 1, 1, 0])
    targets = 0.8 * F.one_hot(labels, 2) + 0.1
    expected = -(targets * LOGITS.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(task.loss(lambda images: LOGITS, (torch.zeros(4, 3, 8, 8), labels)), expected)


@pytest.mark.parametrize("fields", [{"mixup": 1.0, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}])
def test_loss_mixes_labels_as_it_mixes_pictures(create, fields: dict[str, float]) -> None:
    task = create(**fields, label_smoothing=0.2)
    labels = torch.tensor([0, 1, 0, 1])
    pictures = labels[:, None, None, None].expand(4, 3, 16, 16).float()
    seen = []

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.mean(dim=(1, 2, 3)))  # the share of class 1 in each picture
        return LOGITS

    for seed in range(5):
        seed_everything(seed)
        loss = task.loss(model, (pictures.clone(), labels))
        share = torch.stack([1 - seen[-1], seen[-1]], dim=1)
        targets = 0.8 * share + 0.1
        torch.testing.assert_close(loss, -(targets * LOGITS.log_softmax(dim=1)).sum(dim=1).mean())
    assert len({round(float(shares[0]), 3) for shares in seen}) > 2


def test_batches_of_an_epoch_return_and_differ_from_the_next(create) -> None:
    task = create()
    epochs = [[images for images, _ in task.batches(epoch)] for epoch in (0, 0, 1)]
    assert len(epochs[0]) == task.num_steps == 2
    assert all(torch.equal(one, other) for one, other in zip(epochs[0], epochs[1], strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(epochs[0], epochs[2], strict=True))


def test_options_of_the_network_reach_it(create) -> None:
    task = create(drop_path_rate=0.3)
    assert task.model.config.drop_path_rate == 0.3
    assert task.model.config.width == 8
    assert task.model.config.num_classes == 2
    assert task.values["num_params"] == sum(parameter.numel() for parameter in task.model.parameters())
