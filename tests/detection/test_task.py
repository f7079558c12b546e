import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fasternet.data.coco import CocoData, CocoImage, Instance, load_coco
from fasternet.detection.checkpoint import load_detector
from fasternet.detection.detector import create_mask_rcnn
from fasternet.detection.evaluate import evaluate_detector
from fasternet.detection.task import DetectionTask, create_detection, load_split, select_pictures, train_detector
from fasternet.records import load_records
from fasternet.train.detection_recipe import DETECTION_RECIPES, DetectionRecipe
from fasternet.train.distributed import World
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
    multi_scale=(0.75, 1.0),
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


def create_task(data: Path, recipe: DetectionRecipe = RECIPE, **options) -> DetectionTask:
    given = {"kind": None, "device": torch.device("cpu"), "world": World(), "checkpoint": None, "pretrained": False}
    options = {**given, "backbone_options": TINY, "hooks": Hooks(), **options}
    return create_detection("fasternet_t0", str(data), recipe=recipe, **options)


def write_parts(folder: Path, shapes: Path, change) -> Path:
    """Write the pictures as training and as validation pictures; ``change`` takes both annotation documents."""
    documents = [json.loads((shapes / "shapes.json").read_text()) for _ in range(2)]
    change(*documents)
    (folder / "annotations").mkdir()
    for name, document in zip(("train2017", "val2017"), documents, strict=True):
        (folder / name).symlink_to(shapes / "images")
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(document))
    return folder


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
    assert checkpoint.facts["recipe"]["multi_scale"] == [0.75, 1.0]
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
    write_parts(tmp_path, shapes, lambda _, validation: validation["categories"][0].update(name="green"))
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


def test_of_two_files_the_wanted_one_alone_is_opened(shapes: Path, tmp_path: Path) -> None:
    write_parts(tmp_path, shapes, lambda *_: None)
    (tmp_path / "train2017").unlink()
    assert len(select_pictures(str(tmp_path), "validation")) == 6
    with pytest.raises(FileNotFoundError, match="pictures are missing"):
        select_pictures(str(tmp_path), "training")


def test_masks_in_one_file_alone_are_said_and_no_object_is_left_out(shapes: Path, tmp_path: Path) -> None:
    def change(training, validation) -> None:
        for annotation in (training["annotations"][0], *validation["annotations"]):
            del annotation["segmentation"]

    said: list[str] = []
    task = create_task(write_parts(tmp_path, shapes, change), hooks=Hooks(say=said.append))
    assert task.condition["kind"] == "faster_rcnn"
    assert sum(len(image.instances) for image in task.training.images) == 12
    files = [tmp_path / "annotations" / f"instances_{name}.json" for name in ("train2017", "val2017")]
    assert said == [f"{files[0]} has masks and {files[1]} has none: boxes alone are learned"]


def test_missing_package_is_said_before_the_training(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs? faster-coco-eval: pip install 'fasternet\[detection\]'"):
        train(shapes, tmp_path / "run", kind="faster_rcnn")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("min_size", [64, 100])
def test_pictures_of_the_training_follow_the_size_asked_for(shapes: Path, min_size: int) -> None:
    recipe = dataclasses.replace(
        DETECTION_RECIPES["small"], min_size=min_size, max_size=2 * min_size, fpn_channels=8, box_head_width=8
    )
    task = create_task(shapes, recipe)
    sides = {min(image.shape[1:]) for epoch in range(9) for images, _ in task.batches(epoch) for image in images}
    assert 0.79 <= min(sides) / min_size < 0.9
    assert 1.15 < max(sides) / min_size <= 1.26


def test_weights_of_another_run_are_taken_and_what_starts_fresh_is_said(
    shapes: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    task = create_task(shapes, checkpoint=uninterrupted, hooks=Hooks(say=said.append))
    theirs = load_detector(uninterrupted).model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in task.model.state_dict().items())
    assert said == []

    def rename(*documents) -> None:
        for document in documents:
            document["categories"][0]["name"] = "green"

    create_task(write_parts(tmp_path, shapes, rename), checkpoint=uninterrupted, hooks=Hooks(say=said.append))
    reason = "has the class 'red' where the data have 'green'"
    assert said == [f"{uninterrupted} {reason}: the layers that tell classes start fresh"]


def test_judgement_does_not_depend_on_the_batch(shapes: Path, tmp_path: Path) -> None:
    images = []
    for number, size in enumerate([(96, 64), (64, 96), (80, 64), (64, 64)]):
        path = tmp_path / f"{number}.png"
        Image.effect_noise(size, 60).convert("RGB").save(path)
        thing = Instance(number + 1, 0, (5.0, 5.0, 40.0, 50.0), [[5, 5, 40, 5, 40, 50, 5, 50]], False, 1575.0)
        images.append(CocoImage(number, path, *size, (thing,)))
    data = CocoData(tmp_path / "sizes.json", ("red", "blue"), (1, 2), tuple(images), {}, True)
    heads = {"fpn_channels": 8, "box_head_width": 16, "mask_head_channels": 8}
    torch.manual_seed(0)
    model = create_mask_rcnn(
        "fasternet_t0", num_classes=2, min_size=64, max_size=96, score_threshold=0, backbone_options=TINY, **heads
    ).eval()
    found = create_task(shapes).judge(model, data)
    with model.transform.keep_masks_small():
        assert found == evaluate_detector(model, data, masks=True)
        assert found.results != evaluate_detector(model, data, masks=True, batch_size=2).results


def test_weights_that_are_not_finite_are_not_judged(shapes: Path) -> None:
    task = create_task(shapes)
    task.model.eval().backbone.body.embedding.norm.running_mean[0] = float("nan")
    with pytest.raises(ValueError, match="the weights of the network are not finite"):
        task.evaluate(task.model)


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "bf16"},
        {"accumulate": 2},
        {"multi_scale": None, "scale_jitter": (0.5, 1.5)},
        {"grad_checkpointing": True},
    ],
    ids=lambda fields: [*fields][-1],
)
def test_every_way_of_training_ends(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict, uninterrupted: Path
) -> None:
    # Where bf16 would be emulated it is refused, and computes the same.
    monkeypatch.setattr("fasternet.train.loop.select_precision", lambda name, device: name)
    output = train(shapes, tmp_path / "run", dataclasses.replace(RECIPE, **fields))
    found, expected = load_result(output)["log"], load_result(uninterrupted)["log"]
    assert len(found) == 2
    assert all(math.isfinite(loss) for _, loss, *_ in found)
    if "grad_checkpointing" in fields:
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other)
    else:
        assert found != expected


TRAIN = """
import dataclasses, sys
from pathlib import Path
from test_task import RECIPE, train

data, output = sys.argv[1:]
train(Path(data), Path(output), dataclasses.replace(RECIPE, head_norm="bn", flip=False, ema_decay=None))
"""


@pytest.mark.multiprocess
def test_two_processes_train_where_a_part_has_no_objects(shapes: Path, tmp_path: Path) -> None:
    def clear(training, _) -> None:
        training["annotations"] = [a for a in training["annotations"] if a["image_id"] <= 3]

    data = write_parts(tmp_path, shapes, clear)
    (tmp_path / "train.py").write_text(TRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [tmp_path / "train.py", data, tmp_path / "two"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, timeout=240, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    recipe = dataclasses.replace(RECIPE, head_norm="bn", flip=False, ema_decay=None, accumulate=2)
    train(data, tmp_path / "one", recipe)
    losses = [
        [r.values["train_loss"] for r in load_records(tmp_path / name / "log.jsonl") if r.kind == "epoch"]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
