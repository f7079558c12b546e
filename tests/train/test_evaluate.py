import json
import subprocess
import sys
from pathlib import Path

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
    assert torch.allclose(result.losses, F.cross_entropy(logits, labels, reduction="none"), atol=1e-6)
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


def test_calibration_and_confusion_count_what_a_plain_loop_counts() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(200, 4, generator=generator)
    labels = torch.randint(0, 4, (200,), generator=generator)
    values = run(logits, labels).values()
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    matrix = [[0] * 4 for _ in range(4)]
    for row, label in zip(logits.softmax(dim=1), labels.tolist(), strict=True):
        confidence, predicted = float(row.max()), int(row.argmax())
        place = next(number for number in range(15) if confidence <= (number + 1) / 15 + 1e-9)
        bins[place].append((confidence, predicted == label))
        matrix[label][predicted] += 1
    error = 0.0
    for found, members in zip(values["calibration"], bins, strict=True):
        assert found[0] == len(members)
        if members:
            means = [sum(column) / len(members) for column in zip(*members, strict=True)]
            assert found[1:] == pytest.approx(means)
            error += abs(means[0] - means[1]) * len(members) / 200
    assert values["ece"] == pytest.approx(error)
    assert error > 0.05
    assert values["confusion"] == matrix


def test_many_classes_list_their_most_frequent_confusions() -> None:
    labels = torch.tensor([0, 0, 0, 7, 7, 9])
    logits = torch.eye(101)[[0, 5, 5, 5, 7, 9]]
    names = [f"class {number}" for number in range(101)]
    assert run(logits, labels, names).values()["confusion"] == [["class 0", "class 5", 2], ["class 7", "class 5", 1]]


def test_any_of_several_right_labels_counts() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    right = torch.tensor([[True, True, False], [False, True, True], [False, False, True]])
    result = evaluate(lambda images: logits[images], [(torch.arange(3), right)], class_names="abc")
    assert result.truths.tolist() == [0, 1, 2]
    assert result.top1 == pytest.approx(200 / 3)
    assert result.losses[0].item() == pytest.approx(-logits[0].softmax(0)[:2].sum().log().item(), rel=1e-5)
    assert [row.top1 for row in result.per_class] == [100, 0, 100]


SHARE = """
import json, sys, torch
from pathlib import Path
from fasternet.train.distributed import join_world
from fasternet.train.evaluate import evaluate

found = []
with join_world() as world:
    for num_images in (1, 7, 12):
        logits = torch.randn(num_images, 4, generator=torch.Generator().manual_seed(3))
        labels = torch.arange(num_images) % 4
        own = torch.arange(world.rank, num_images, world.size)
        batches = [(numbers, labels[numbers]) for numbers in own.split(3) if len(numbers)]
        result = evaluate(lambda numbers: logits[numbers], batches, class_names="abcd", world=world)
        found.append([result.values(), result.truths.tolist(), result.labels.tolist()])
    Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.multiprocess
def test_processes_share_the_pictures_out_and_count_each_once(tmp_path: Path) -> None:
    script = tmp_path / "share.py"
    script.write_text(SHARE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*command, script, tmp_path], check=True, timeout=120, capture_output=True)
    expected = []
    for num_images in (1, 7, 12):
        logits = torch.randn(num_images, 4, generator=torch.Generator().manual_seed(3))
        alone = run(logits, torch.arange(num_images) % 4, list("abcd"), 3)
        expected.append([alone.values(), alone.truths.tolist(), alone.labels.tolist()])
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [expected] * 2
