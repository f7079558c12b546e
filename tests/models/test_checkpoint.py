"""checkpoint: the model folder, as we read it and as timm reads it; written whole or not at all."""

import errno
import json
import os
import shutil

import pytest
import timm
import torch

from fasternet.models import VARIANTS, Preprocessing, create_model, load_checkpoint, save_checkpoint
from fasternet.rivals import create_network, save_network

NAMES = ("ant", "bee", "cat", "dog", "Käfer")


@pytest.fixture
def model(tiny, randomise):
    return randomise(create_model("fasternet_t0", **tiny))


@pytest.fixture
def folder(model, tmp_path):
    save_checkpoint(tmp_path / "folder", model, name="fasternet_t0", class_names=NAMES)
    return tmp_path / "folder"


def logits(model, in_chans=3):
    with torch.no_grad():
        return model(torch.randn(2, in_chans, 64, 64, generator=torch.Generator().manual_seed(0)))


def edit(folder, change):
    document = json.loads((folder / "config.json").read_text())
    change(document)
    (folder / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm": "ln", "position": "rotate", "partial_ratio": 0.3, "kernel_size": 5, "activation": "relu"},
        {"layer_scale": 0.1, "in_chans": 1, "mlp_ratio": 1.5, "drop_path_rate": 0.2},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_folder_keeps_the_function_and_all_else(tmp_path, tiny, randomise, fields):
    model = randomise(create_model("fasternet_t0", **{**tiny, **fields}))
    preprocessing = Preprocessing(
        input_size=96, crop_ratio=0.95, mean=(0.5,) * 3, std=(0.1, 0.2, 0.3), interpolation="bilinear"
    )
    names = None if "num_classes" in fields else NAMES
    save_checkpoint(tmp_path / "a" / "b", model, name="fasternet_t0", class_names=names, preprocessing=preprocessing)
    found = load_checkpoint(str(tmp_path / "a" / "b"))
    assert torch.equal(logits(found.model, model.config.in_chans), logits(model, model.config.in_chans))
    assert found.model.config == model.config
    assert found.preprocessing == preprocessing
    assert (found.name, found.class_names) == ("fasternet_t0", names)
    assert not found.model.training
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_facts_travel_with_the_model_and_the_licence_is_the_users(tmp_path, model):
    facts = {"recipe": {"epochs": 2, "lr": 0.1}, "metrics": {"top1": 71.25, "top5": 100.0}, "license": "cc-by-4.0"}
    save_checkpoint(tmp_path / "a", model, name="fasternet_t0", class_names=NAMES, facts=facts)
    found = load_checkpoint(tmp_path / "a").facts
    assert {key: found[key] for key in facts} == facts
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert set(found) == {*facts, "versions"}
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name: timm\npipeline_tag: image-classification\n")
    assert "An image classifier of 5 classes for pictures of 224 x 224 pixels.\n" in card
    assert "top5" not in card  # of five classes it is 100
    save_checkpoint(tmp_path / "b", model, name="fasternet_t0")
    assert load_checkpoint(tmp_path / "b").facts["license"] is None
    assert "license" not in (tmp_path / "b" / "README.md").read_text()
    for value in (float("nan"), object()):
        with pytest.raises(ValueError, match="facts must be plain data"):
            save_checkpoint(tmp_path / "c", model, name="fasternet_t0", facts={"metrics": value})
    assert not (tmp_path / "c").exists()


def test_folder_of_a_rival_is_no_fasternet(tmp_path):
    network = create_network("ShuffleNetV2 x1.5", num_classes=2)
    save_network(tmp_path, network, name="ShuffleNetV2 x1.5")
    with pytest.raises(ValueError, match=r"holds a ShuffleNetV2 x1\.5, which is no FasterNet$"):
        load_checkpoint(tmp_path)


def test_preprocessing_defaults_to_the_papers_evaluation(model, tmp_path):
    save_checkpoint(tmp_path, model, name="fasternet_t0")
    found = load_checkpoint(tmp_path)
    assert found.class_names is None
    assert found.preprocessing == Preprocessing()
    assert (found.preprocessing.input_size, found.preprocessing.crop_ratio) == (224, 0.9)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("fasternet_t0", {}),
        ("fasternet_s", {"layer_scale": 0.1, "in_chans": 1, "mlp_ratio": 1.5, "partial_ratio": 1 / 8}),
        ("fasternet_t2", {"width": 42, "partial_ratio": 1 / 3}),
    ],
)
def test_timm_builds_the_same_function_from_the_folder(tmp_path, tiny, randomise, name, fields):
    model = randomise(create_model(name, **{**tiny, **fields}))
    save_checkpoint(tmp_path, model, name=name, class_names=NAMES, preprocessing=Preprocessing(input_size=96))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.allclose(logits(theirs, model.config.in_chans), logits(model, model.config.in_chans), rtol=1e-5)
    config = timm.data.resolve_model_data_config(theirs)
    assert config["input_size"] == (model.config.in_chans, 96, 96)
    assert config["crop_pct"] == 0.9
    assert config["interpolation"] == "bicubic"
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["label_names"] == list(NAMES)
    assert document["fasternet"]["timm"] == "builds it"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"norm": "ln"}, "norm 'ln' in fasternet_t0"),
        ({"position": "last"}, "position 'last' in fasternet_t0"),
        ({"kernel_size": 5}, "kernel_size 5 in fasternet_t0"),
        ({"activation": "relu"}, "activation 'relu' in fasternet_t0"),
        ({"partial_ratio": 0.3}, "partial_ratio 0.3"),
        ({"partial_ratio": 1 / 16}, "partial_ratio 0.0625"),  # timm: 8 // 16 = 0 channels
    ],
)
def test_folder_says_what_timm_cannot_build(tmp_path, tiny, fields, reason):
    save_checkpoint(tmp_path, create_model("fasternet_t0", **tiny, **fields), name="fasternet_t0")
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["fasternet"]["timm"] == f"cannot build it: it knows no {reason}"
    with pytest.raises(RuntimeError, match=r"Unknown model \(fasternet\.fasternet_t0\)"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert load_checkpoint(tmp_path).name == "fasternet_t0"
    assert "\n# fasternet_t0\n" in (tmp_path / "README.md").read_text()
    edit(tmp_path, lambda d: d.update(architecture="fasternet_t0"))  # as it was written before
    assert load_checkpoint(tmp_path).name == "fasternet_t0"


@pytest.mark.parametrize("name", VARIANTS)
def test_timm_knows_every_variant_under_our_name(name):
    assert timm.is_model(name)


def test_run_folder_is_read_for_its_best(folder, model, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(folder, tmp_path / "run" / "best")
    assert torch.equal(logits(load_checkpoint(tmp_path / "run").model), logits(model))


def test_folder_that_is_none_is_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no model folder at .*none"):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"is no model folder: it holds no model\.safetensors"):
        load_checkpoint(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"is no model folder: it holds no config\.json"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b'{"archi', b"[]", b"3", b"\xff\xfe", b"null"], ids=str)
def test_truncated_config_is_one_clear_error(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json is (truncated|of another package)") as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("architecture"), "config.json is truncated or was edited .*architecture"),
        (lambda d: d["pretrained_cfg"].update(input_size=[]), "config.json is truncated or was edited"),
        (lambda d: d["pretrained_cfg"].update(mean=None), "config.json is truncated or was edited"),
        (lambda d: d["fasternet"]["config"].update(colour=1), "config.json is truncated or was edited .*colour"),
        (lambda d: d["fasternet"]["config"].pop("width"), "config.json is truncated or was edited .*width"),
        (lambda d: d["fasternet"]["config"].update(norm="gn"), "norm 'gn' is not one of bn, ln"),
        (lambda d: d["fasternet"]["config"].update(width=16), "does not fit the model: of another shape: patch_embed"),
        (lambda d: d["fasternet"]["config"].update(depths=[1, 1, 1, 1]), "not known: stages.2.blocks.1"),
        (lambda d: d["fasternet"]["config"].update(num_classes=7), "config.json has 5 label_names for 7 classes"),
        (
            lambda d: d["fasternet"]["config"].update(head_width=7),
            r"classifier.weight is \(5, 16\) instead of \(5, 7\)",
        ),
        (lambda d: d["label_names"].pop(), "has 4 label_names for 5 classes"),
        (lambda d: d.pop("fasternet"), "config.json is of another package: give the weight file beside it"),
    ],
)
def test_edited_config_is_one_clear_error(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_one_clear_error(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or no safetensors file"):
        load_checkpoint(folder)


def test_save_refuses_what_a_folder_cannot_hold(tmp_path, model, tiny):
    with pytest.raises(ValueError, match="name 'fasternet_x' is not one of fasternet_t0, "):
        save_checkpoint(tmp_path / "a", model, name="fasternet_x")
    with pytest.raises(ValueError, match="class_names has 2 names for 5 classes"):
        save_checkpoint(tmp_path / "a", model, name="fasternet_t0", class_names=("ant", "bee"))
    backbone = create_model("fasternet_t0", features_only=True, **tiny)
    with pytest.raises(ValueError, match=r"holds a classifier, and this is a backbone"):
        save_checkpoint(tmp_path / "a", backbone, name="fasternet_t0")
    assert not (tmp_path / "a").exists()


def test_full_disk_leaves_the_old_folder_valid(folder, model, randomise, monkeypatch):
    before = logits(model)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(folder, randomise(model, seed=1), name="fasternet_t0", class_names=NAMES)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    assert torch.equal(logits(load_checkpoint(folder).model), before)


def test_saving_again_replaces_the_folder(folder, model, randomise):
    save_checkpoint(folder, randomise(model, seed=1), name="fasternet_t0")
    found = load_checkpoint(folder)
    assert torch.equal(logits(found.model), logits(model))
    assert found.class_names is None
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
