import contextlib
import dataclasses
import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from fasternet.models.checkpoint import save_checkpoint
from fasternet.models.registry import create_model
from fasternet.records import load_records
from fasternet.rivals import load_network
from fasternet.train.classification import create_classification, train
from fasternet.train.loop import Hooks
from fasternet.train.recipe import Recipe, load_recipe
from fasternet.train.state import load_state, seed_everything

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


def test_size_of_pictures_grows_for_the_last_epochs(create) -> None:
    task = create(train_scale=2 / 3, input_size=48, full_size_epochs=1, epochs=2)
    assert [next(iter(task.batches(epoch)))[0].shape[-1] for epoch in (0, 1, 0)] == [32, 48, 32]
    assert task.preprocessing.input_size == 48
    assert task.datasets.validation[0][0].shape == (3, 48, 48)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_norm": "sync"}, "batch_norm=sync needs GPUs"),
        ({"accumulate": 3}, "batch_size=8 must be a multiple of the 3 parts"),
    ],
)
def test_fields_that_do_not_fit_are_refused(create, fields: dict[str, object], message: str) -> None:
    if torch.cuda.is_available() and "batch_norm" in fields:
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=message):
        create(**fields)


@pytest.mark.parametrize(
    ("name", "found"), [("MobileNetV2", "MobileNetV2"), ("mobilenetv2_100", "MobileNetV2"), ("resnet18", "resnet18")]
)
def test_other_networks_train_and_their_checkpoint_is_found(pictures, recipe, tmp_path, name: str, found: str) -> None:
    fields = {"ema_decay": 0.9, "epochs": 1, "batch_size": 4}
    output = train(name, str(pictures), tmp_path / "run", recipe=dataclasses.replace(recipe, **fields), device="cpu")
    checkpoint = load_network(output)
    assert (checkpoint.name, checkpoint.class_names) == (found, ("bright", "dark"))
    assert checkpoint.facts["recipe"]["batch_size"] == 4
    assert set(checkpoint.facts["metrics"]) == {"top1", "top5", "validation_loss"}


@pytest.mark.parametrize("name", ["resnet18", "MobileNetV2"])
def test_networks_that_cannot_compute_anew_are_refused(pictures, recipe, name: str) -> None:
    recipe = dataclasses.replace(recipe, grad_checkpointing=True)
    with pytest.raises(ValueError, match=r"grad_checkpointing=true is not for (resnet18|MobileNetV2)"):
        create_classification(name, str(pictures), recipe=recipe, model_options={}, device=torch.device("cpu"))


def test_finetune_starts_from_weights_with_a_fresh_classifier(pictures, recipe, tmp_path, create) -> None:
    torch.manual_seed(1)
    source = create_model("fasternet_t0", num_classes=5, **TINY_MODEL)
    save_checkpoint(tmp_path / "source", source, name="fasternet_t0")
    device = torch.device("cpu")
    task = create_classification(
        "fasternet_t0", str(pictures), recipe=recipe, model_options={}, device=device, checkpoint=tmp_path / "source"
    )
    assert torch.equal(task.model.embedding.conv.weight, source.embedding.conv.weight)
    assert task.model.head.fc.out_features == 2


@pytest.mark.parametrize("own", [{}, {"activation": "relu"}, {"norm": "ln"}, {"position": "last"}])
def test_resumed_finetune_needs_neither_its_weights_nor_their_options(pictures, recipe, tmp_path, own) -> None:
    source = create_model("fasternet_t0", num_classes=5, **TINY_MODEL, **own)
    save_checkpoint(tmp_path / "source", source, name="fasternet_t0")
    options = {"recipe": dataclasses.replace(recipe, layer_decay=0.7, freeze=1), "device": "cpu"}
    states = []
    for name, stop_at in (("whole", 99), ("stopped", 3)):
        seen: list[int] = []
        hooks = Hooks(progress=seen.append, stop=lambda seen=seen, stop_at=stop_at: len(seen) == stop_at)
        with contextlib.suppress(InterruptedError):
            train(
                "fasternet_t0", str(pictures), tmp_path / name, checkpoint=tmp_path / "source", hooks=hooks, **options
            )
        if name == "stopped":
            shutil.rmtree(tmp_path / "source")
            train("fasternet_t0", str(pictures), tmp_path / name, resume=True, **options)
        states.append(load_state(tmp_path / name / "last" / "state.pt")["model"])
        config = load_network(tmp_path / name).model.config
        assert config == dataclasses.replace(source.config, num_classes=2, drop_path_rate=recipe.drop_path_rate)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_resume_refuses_options_that_the_run_does_not_have(pictures, recipe, tmp_path) -> None:
    recipe = dataclasses.replace(recipe, epochs=1)
    train("fasternet_t0", str(pictures), tmp_path / "run", recipe=recipe, model_options=TINY_MODEL, device="cpu")
    options = {"model_options": {"width": 24}, "device": "cpu"}
    with pytest.raises(ValueError, match="can only be resumed as it was started"):
        train("fasternet_t0", str(pictures), tmp_path / "run", recipe=recipe, resume=True, **options)


def test_run_whose_log_does_not_know_its_network_is_not_resumed_as_another(pictures, recipe, tmp_path) -> None:
    save_checkpoint(tmp_path / "source", create_model("fasternet_t0", **TINY_MODEL, norm="ln"), name="fasternet_t0")
    options = {"recipe": dataclasses.replace(recipe, epochs=1), "device": "cpu"}
    run = train("fasternet_t0", str(pictures), tmp_path / "run", checkpoint=tmp_path / "source", **options)
    log = run / "log.jsonl"
    first, *rest = log.read_text().splitlines(keepends=True)
    document = json.loads(first)
    document["condition"]["model_options"] = {}
    log.write_text(json.dumps(document) + "\n" + "".join(rest))
    with pytest.raises(ValueError, match=r"has model_options=\{\}, not .*'norm': 'ln'"):
        train("fasternet_t0", str(pictures), run, resume=True, **options)


def test_unreadable_validation_picture_stops_a_run_that_can_go_on_without_it(pictures, recipe, tmp_path) -> None:
    for part, kept in (("train", slice(0, 9)), ("val", slice(9, 12))):
        for name in ("dark", "bright"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for picture in sorted((pictures / name).iterdir())[kept]:
                shutil.copy(picture, tmp_path / "data" / part / name)
    broken = tmp_path / "data" / "val" / "bright" / "09.png"
    broken.write_bytes(b"")
    options = {"model_options": TINY_MODEL, "device": "cpu"}
    with pytest.raises(ValueError, match=r"09\.png.* is a validation picture: .* skip_unreadable=true"):
        train("fasternet_t0", str(tmp_path / "data"), tmp_path / "run", recipe=recipe, **options)
    content = broken.with_name("10.png").read_bytes()
    broken.unlink()
    with pytest.raises(ValueError, match="has num_validation=6, not 5"):
        train("fasternet_t0", str(tmp_path / "data"), tmp_path / "run", recipe=recipe, resume=True, **options)
    broken.write_bytes(content[:99])
    said: list[str] = []
    recipe = dataclasses.replace(recipe, skip_unreadable=True)
    hooks = Hooks(say=said.append)
    train("fasternet_t0", str(tmp_path / "data"), tmp_path / "run", recipe=recipe, resume=True, hooks=hooks, **options)
    evaluation = next(r for r in load_records(tmp_path / "run" / "log.jsonl") if r.kind == "evaluation")
    assert evaluation.values["num_images"] == 5
    assert any("09.png" in sentence for sentence in said)
    assert load_recipe(tmp_path / "run" / "recipe.yaml", Recipe) == recipe  # for whoever resumes it again


@pytest.mark.slow
def test_compiled_training_learns_as_the_eager_one(pictures, recipe, tmp_path) -> None:
    losses = []
    for compiled in (False, True):
        changed = dataclasses.replace(recipe, compile=compiled, epochs=2, ema_decay=0.9, drop_path_rate=0.0)
        output = tmp_path / str(compiled)
        train("fasternet_t0", str(pictures), output, recipe=changed, model_options=TINY_MODEL, device="cpu")
        losses.append([r.values["train_loss"] for r in load_records(output / "log.jsonl") if r.kind == "epoch"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_fp16_scales_the_loss_and_keeps_the_scale_over_a_stop(pictures, recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fasternet.train.loop.select_precision", lambda precision, device: precision)
    options = {"recipe": dataclasses.replace(recipe, precision="fp16", epochs=2), "device": "cpu"}
    options["model_options"] = TINY_MODEL
    whole = train("fasternet_t0", str(pictures), tmp_path / "whole", **options)
    seen: list[int] = []
    hooks = Hooks(progress=seen.append, stop=lambda: len(seen) == 1)
    with pytest.raises(InterruptedError):
        train("fasternet_t0", str(pictures), tmp_path / "stopped", hooks=hooks, **options)
    stopped = train("fasternet_t0", str(pictures), tmp_path / "stopped", resume=True, **options)
    states = [load_state(output / "last" / "state.pt") for output in (whole, stopped)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert states[0]["scaler"]["scale"] >= 1
