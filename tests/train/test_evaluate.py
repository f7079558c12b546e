import pytest
import torch
import torch.nn.functional as F

from fasternet.train.evaluate import evaluate


def run(logits: torch.Tensor, labels: torch.Tensor, class_names=None, batch_size: int = 7):
    """Evaluate given logits: the pictures are their numbers."""
    batches = [
        (torch.arange(start, min(start + batch_size, len(labels))), labels[start : start + batch_size])
        for start in range(0, len(labels), batch_size)
    ]
    names = class_names or [f"class {number}" for number in range(logits.shape[1])]
    return evaluate(lambda numbers: logits[numbers], batches, class_names=names)


def test_evaluate_counts_what_a_plain_loop_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(100, 12, generator=generator)
    labels = torch.randint(0, 12, (100,), generator=generator)
    result = run(logits, labels)
    ranks = [int((row > row[label]).sum()) for row, label in zip(logits, labels, strict=True)]
    assert result.top1 == sum(rank == 0 for rank in ranks)
    assert result.top5 == sum(rank < 5 for rank in ranks)
    assert result.num_images == 100
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert torch.equal(result.labels, logits.topk(5).indices)
    assert torch.equal(result.truths, labels)
    for number, row in enumerate(result.per_class):
        own = [rank for rank, label in zip(ranks, labels.tolist(), strict=True) if label == number]
        assert row.num_images == len(own)
        assert row.top1 == pytest.approx(100 * sum(rank == 0 for rank in own) / len(own))


def test_evaluate_does_not_depend_on_the_batches() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(50, 8, generator=generator), torch.arange(50) % 8
    one, other = run(logits, labels, batch_size=50), run(logits, labels, batch_size=3)
    assert one.per_class == other.per_class
    assert one.loss == pytest.approx(other.loss)


def test_evaluate_of_three_classes_has_a_top5_of_100() -> None:
    result = run(torch.eye(3)[[1, 2, 0]], torch.tensor([0, 1, 2]))
    assert (result.top1, result.top5) == (0.0, 100.0)
    assert result.probabilities.shape == (3, 3)


def test_evaluate_gives_a_class_without_pictures_no_accuracy() -> None:
    result = run(torch.eye(3)[[0, 1]], torch.tensor([0, 1]))
    assert [row.top1 for row in result.per_class] == [100.0, 100.0, None]
    assert result.values()["per_class"][2] == {"name": "class 2", "num_images": 0, "top1": None}


def test_evaluate_takes_half_precision_outputs() -> None:
    logits = torch.randn(10, 4).bfloat16()
    assert run(logits, torch.zeros(10, dtype=torch.long)).loss == pytest.approx(
        F.cross_entropy(logits.float(), torch.zeros(10, dtype=torch.long)).item()
    )


def test_evaluate_refuses_another_number_of_classes() -> None:
    with pytest.raises(ValueError, match="network has 4 classes, the data 2"):
        run(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), class_names=["a", "b"])


def test_evaluate_refuses_outputs_that_are_not_finite() -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        run(logits, torch.zeros(3, dtype=torch.long))


def test_evaluate_refuses_an_empty_loader() -> None:
    with pytest.raises(ValueError, match="no pictures"):
        evaluate(lambda images: images, [], class_names=["a"])
