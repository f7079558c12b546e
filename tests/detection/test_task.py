import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasternet.data.coco import load_coco
from fasternet.detection.checkpoint import load_detector
from fasternet.detection.task import load_split, train_detector
from fasternet.records import load_records
from fasternet.train.detection_recipe import DetectionRecipe
from fasternet.train.loop import Hooks, Progress
from fasternet.train.recipe import load_recipe
from fasternet.train.state import load_state

TINY = {"width": 8, "depths": (1, 1, 1, 1)}
RECIPE = DetectionRecipe(
    epochs=2,
    batch_size=2,
    lr=2e-3,
    weight_decay=0.01,
    warmup_iterations=2,
    lr_schedule="cosine",
    ema_decay=0.9,
    drop_path_rate=0.2,
    flip=True,
    multi_scale=(48.0, 64.0),
    min_size=64,
    max_size=96,
    fpn_channels=8,
    box_head_width=16,
    mask_head_channels=8,
    regions_per_image=16,
    validation_share=0.34,
    precision="fp32",
)


def train(data: Path, output: Path, recipe: DetectionRecipe = RECIPE, **options) -> Path:
    options = {"device": "cpu", "backbone_options": TINY, **options}
    return train_detector("fasternet_t0", str(data), output, recipe=recipe, **options)


@pytest.fixture(scope="module")
def uninterrupted(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(shapes, tmp_path_factory.mktemp("runs") / "uninterrupted")


def load_result(output: Path) -> dict[str, object]:
    logs = [
        (r.condition["epoch"], *(r.values[name] for name in ("train_loss", "lr", "box_ap", "mask_ap")))
        for r in load_records(output / "log.jsonl")
        if r.kind == "epoch"
    ]
    best = load_detector(output).model.state_dict()
    return {"state": load_state(output / "last" / "state.pt"), "best": best, "log": logs}


def assert_same(one: Path, other: Path) -> None:
    torch.testing.assert_close(load_result(one), load_result(other), rtol=0, atol=0, equal_nan=True)


def test_run_leaves_a_folder_with_all_that_is_needed(shapes: Path, uninterrupted: Path) -> None:
    checkpoint = load_detector(uninterrupted)
    assert (checkpoint.class_names, checkpoint.category_ids) == (("red", "blue"), (1, 2))
    assert checkpoint.model.config.fpn_channels == 8
    assert checkpoint.facts["recipe"]["multi_scale"] == [48.0, 64.0]
    assert load_recipe(uninterrupted / "recipe.yaml", DetectionRecipe) == RECIPE
    records = load_records(uninterrupted / "log.jsonl")
    assert [r.kind for r in records] == [
        "run",
        "epoch",
        "epoch",
        "evaluation",
        "evaluation",
        "prediction",
        "prediction",
    ]
    assert records[0].values["num_train"] == 4
    assert records[0].values["num_validation"] == 2
    assert [r.values["split"] for r in records if r.kind == "evaluation"] == ["validation", "training"]
    assert [r.values["num_images"] for r in records if r.kind == "evaluation"] == [2, 4]
    best = max(r.values["mask_ap"] for r in records if r.kind == "epoch")
    assert checkpoint.facts["metrics"]["mask_ap"] == best
    for record in records[-2:]:
        assert (uninterrupted / record.attachments["picture"]).stat().st_size > 500


@pytest.mark.parametrize("num_reports", [1, 4])
def test_run_killed_after_any_step_goes_on_from_that_step(
    shapes: Path, uninterrupted: Path, tmp_path: Path, num_reports: int
) -> None:
    seen: list[Progress] = []

    def die(state: Progress) -> None:
        seen.append(state)
        if len(seen) == num_reports:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(shapes, tmp_path / "run", hooks=Hooks(progress=die, save_minutes=0))
    train(shapes, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_run_killed_by_sigkill_ends_bitwise_as_if_it_had_not_been(
    shapes: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    helper = tmp_path / "go.py"
    helper.write_text(
        "import sys, torch\nfrom pathlib import Path\nfrom fasternet.detection.task import train_detector\n"
        "from fasternet.train.detection_recipe import DetectionRecipe\nfrom fasternet.train.loop import Hooks\n"
        "from fasternet.train.recipe import load_recipe\ntorch.set_num_threads(1)\n"
        f"recipe = load_recipe(Path({str(uninterrupted / 'recipe.yaml')!r}), DetectionRecipe)\n"
        "def tell(state):\n    print('step', state.epoch, state.step, flush=True)\n"
        f"train_detector('fasternet_t0', {str(shapes)!r}, Path({str(tmp_path / 'run')!r}), recipe=recipe,\n"
        f"    device='cpu', backbone_options={TINY!r}, hooks=Hooks(progress=tell, save_minutes=0))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(helper)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert any(line.startswith("step 2 1") for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    train(shapes, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", uninterrupted)


def test_boxes_alone_make_a_faster_rcnn(shapes: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1, ema_decay=None)
    output = train(shapes, tmp_path / "run", recipe, kind="faster_rcnn")
    values = next(r.values for r in load_records(output / "log.jsonl") if r.kind == "evaluation")
    assert load_detector(output).model.config.kind == "faster_rcnn"
    assert "box_ap" in values
    assert "mask_ap" not in values


def test_frozen_parts_stay_as_they_are(shapes: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1, freeze=2, batch_norm="frozen", ema_decay=None)
    train(shapes, tmp_path / "run", recipe)
    before = load_state(tmp_path / "run" / "last" / "state.pt")["model"]
    again = train(shapes, tmp_path / "again", dataclasses.replace(recipe, lr=1e-3))
    after = load_state(again / "last" / "state.pt")["model"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = ("backbone.body.embedding.", "backbone.body.stages.0.", "backbone.body.stages.1.")
    assert not [name for name in moved if name.startswith(frozen) or "running_" in name]
    assert any(name.startswith("backbone.body.stages.2.") for name in moved)
    assert any(name.startswith("rpn.") for name in moved)


@pytest.mark.slow
def test_losses_fall_and_objects_are_found(shapes: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        RECIPE, epochs=12, ema_decay=None, drop_path_rate=0.0, multi_scale=None, lr=4e-3, fpn_channels=16
    )
    output = train(shapes, tmp_path / "run", recipe)
    losses = [r.values["train_loss"] for r in load_records(output / "log.jsonl") if r.kind == "epoch"]
    assert losses[-1] < 0.6 * losses[0]


def test_split_follows_from_the_seed(shapes: Path) -> None:
    first, second = load_split(str(shapes), 0.34, 0)
    assert sorted(first.names + second.names) == sorted(load_coco(shapes / "shapes.json").names)
    assert load_split(str(shapes), 0.34, 0) == (first, second)
    assert any(load_split(str(shapes), 0.34, seed) != (first, second) for seed in range(1, 6))


def test_parts_with_other_classes_are_refused(shapes: Path, tmp_path: Path) -> None:
    document = json.loads((shapes / "shapes.json").read_text())
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").symlink_to(shapes / "images")
    (tmp_path / "val2017").symlink_to(shapes / "images")
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(document))
    document["categories"][0]["name"] = "green"
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="have other classes"):
        load_split(str(tmp_path), 0.2, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_norm": "sync"}, "batch_norm=sync needs GPUs"),
        ({"batch_size": 6, "accumulate": 6}, "too few"),
        ({"freeze": 4, "layer_decay": 0.5}, None),
    ],
)
def test_recipes_that_cannot_be_are_one_sentence(shapes: Path, tmp_path: Path, fields, message: str | None) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1, **fields)
    if message is None:
        train(shapes, tmp_path / "run", recipe)
        return
    with pytest.raises(ValueError, match=message):
        train(shapes, tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


def test_masks_are_asked_for_only_where_there_are_some(shapes: Path, tmp_path: Path) -> None:
    document = json.loads((shapes / "shapes.json").read_text())
    for annotation in document["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "images").symlink_to(shapes / "images")
    (tmp_path / "boxes.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="kind=mask_rcnn needs masks"):
        train(tmp_path / "boxes.json", tmp_path / "run", kind="mask_rcnn")
