"""registry: create_model by name, from files and folders, and with published weights (served from this machine)."""

import dataclasses
import re

import pytest
import safetensors.torch
import torch

from fasternet.models import (
    VARIANTS,
    WEIGHTS,
    create_ablation,
    create_model,
    list_models,
    registry,
    save_checkpoint,
)
from fasternet.models.convert import to_format


@pytest.fixture
def published(hub, tiny, randomise, tmp_path, monkeypatch):
    """A small fasternet_t0 and its weights of 1000 classes, in the place of the published ones, on both servers."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fields = {**tiny, "num_classes": 1000}
    monkeypatch.setattr(
        registry, "VARIANTS", {**VARIANTS, "fasternet_t0": dataclasses.replace(VARIANTS["fasternet_t0"], **fields)}
    )
    facts = dataclasses.replace(WEIGHTS["fasternet_t0"], url=f"{hub.url}/v1/fasternet_t0.pth")
    monkeypatch.setattr(registry, "WEIGHTS", {**WEIGHTS, "fasternet_t0": facts})
    model = randomise(create_model("fasternet_t0"))
    torch.save(to_format(model, "official"), tmp_path / "official.pth")
    hub.files["/v1/fasternet_t0.pth"] = (tmp_path / "official.pth").read_bytes()
    hub.files[f"/{facts.hub}/resolve/main/model.safetensors"] = safetensors.torch.save(to_format(model, "timm"))
    return model


def same(a, b, keys=None):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[key], b[key]) for key in (keys or b))


def test_models_are_listed_smallest_first():
    assert list_models() == [f"fasternet_{size}" for size in ("t0", "t1", "t2", "s", "m", "l")]
    assert list_models() == list(VARIANTS) == list(WEIGHTS)
    assert list_models("_t") == list_models("fasternet_t*") == ["fasternet_t0", "fasternet_t1", "fasternet_t2"]
    assert list_models("resnet") == []


@pytest.mark.parametrize("name", VARIANTS)
def test_published_weights_are_named_with_their_accuracy(name):
    facts = WEIGHTS[name]
    assert facts.hub == f"timm/{name}.in1k"
    printed = re.fullmatch(r"https://github\.com/.*/(\w+)-epoch\.\d+-val_acc1\.(\d+\.\d+)\.pth", facts.url)
    assert printed[1] == name
    assert float(printed[2]) == pytest.approx(facts.top1, abs=0.02)


@pytest.mark.parametrize("name", ["fasternet_t0", "fasternet_t0.in1k"])
def test_name_may_carry_the_tag_of_its_weights(name, tiny):
    assert create_model(name, **tiny).config == dataclasses.replace(VARIANTS["fasternet_t0"], **tiny)


@pytest.mark.parametrize(
    ("name", "offer"),
    [
        ("fasternet_t3", "did you mean fasternet_t"),
        ("fasternet-s", "did you mean fasternet_"),
        ("FasterNet_T0", "did you mean fasternet_"),
        ("fasternet_t0.in21k", "did you mean fasternet_t0.in1k"),
        ("vit", "known are fasternet_t0, fasternet_t1, "),
        ("", "known are fasternet_t0"),
    ],
)
def test_unknown_name_offers_near_ones(name, offer):
    with pytest.raises(ValueError, match=f"unknown model '{re.escape(name)}': {offer}"):
        create_model(name)


def test_unknown_option_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown option colour, widht: a model takes width, depths, activation"):
        create_model("fasternet_t0", widht=8, colour="red")


def test_model_is_fresh_and_in_training_mode(tiny):
    a, b = create_model("fasternet_t0", **tiny), create_model("fasternet_t0", **tiny)
    assert a.training
    assert not torch.equal(a.head.fc.weight, b.head.fc.weight)


def test_file_brings_its_number_of_classes(tmp_path, tiny, randomise):
    model = randomise(create_model("fasternet_t0", **tiny))
    torch.save(to_format(model, "timm"), tmp_path / "w.pth")
    del tiny["num_classes"]
    for path in (tmp_path / "w.pth", str(tmp_path / "w.pth")):
        assert same(create_model("fasternet_t0", checkpoint_path=path, **tiny), model)
    assert same(create_model("fasternet_t0", checkpoint_path=path, num_classes=5, **tiny), model)
    with pytest.raises(ValueError, match=r"w.pth has 5 classes, and num_classes=7 was asked for"):
        create_model("fasternet_t0", checkpoint_path=path, num_classes=7, **tiny)
    bare = create_model("fasternet_t0", checkpoint_path=path, num_classes=0, **tiny)
    assert same(model, bare, keys=bare.state_dict())
    assert bare(torch.randn(2, 3, 32, 32)).shape == (2, 16)


def test_file_of_another_variant_is_named(tmp_path):
    with torch.device("meta"):
        state = to_format(create_model("fasternet_t1"), "official")
    torch.save({key: torch.empty_like(tensor, device="cpu") for key, tensor in state.items()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth holds a fasternet_t1, and fasternet_t0 was asked for"):
        create_model("fasternet_t0", checkpoint_path=tmp_path / "w.pth")


def test_file_of_another_configuration_lists_what_differs(tmp_path, tiny):
    torch.save(to_format(create_model("fasternet_t0", **tiny), "official"), tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"w.pth \(official keys\) does not fit .* is \(8, 3, 4, 4\) instead of \(8, 1, "
    ):
        create_model("fasternet_t0", checkpoint_path=tmp_path / "w.pth", **{**tiny, "in_chans": 1})
    with pytest.raises(ValueError, match=r"\(8, 3, 4, 4\) instead of \(40, 3, 4, 4\)"):
        create_model("fasternet_t0", checkpoint_path=tmp_path / "w.pth")


def test_folder_brings_its_configuration(tmp_path, tiny, randomise):
    fields = {**tiny, "norm": "ln", "position": "last", "in_chans": 1, "drop_path_rate": 0.2}
    model = randomise(create_model("fasternet_t0", **fields))
    save_checkpoint(tmp_path, model, name="fasternet_t0")
    found = create_model("fasternet_t0", checkpoint_path=tmp_path, norm="ln", depths=[1, 1, 2, 1], drop_path_rate=0.1)
    assert found.config == dataclasses.replace(model.config, drop_path_rate=0.1)
    assert same(found, model)
    assert create_model("fasternet_t0", checkpoint_path=tmp_path).config.drop_path_rate == 0.0
    backbone = create_model("fasternet_t0", checkpoint_path=tmp_path, features_only=True, out_indices=(2,))
    assert len(backbone(torch.randn(1, 1, 32, 32))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "fasternet_t1"}, "holds a fasternet_t0, and fasternet_t1 was asked for"),
        ({"norm": "ln"}, "has norm 'bn', and 'ln' was asked for"),
        ({"width": 16}, "has width 8, and 16 was asked for"),
        ({"num_classes": 7}, "has 5 classes, and num_classes=7 was asked for"),
    ],
)
def test_folder_that_is_not_what_was_asked_for_is_named(tmp_path, tiny, options, message):
    save_checkpoint(tmp_path, create_model("fasternet_t0", **tiny), name="fasternet_t0")
    with pytest.raises(ValueError, match=message):
        create_model(**{"name": "fasternet_t0", "checkpoint_path": tmp_path, **options})


def test_absent_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none\.pth"):
        create_model("fasternet_t0", checkpoint_path=tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match=r"is no model folder"):
        create_model("fasternet_t0", checkpoint_path=tmp_path)
    with pytest.raises(ValueError, match="give pretrained=True or checkpoint_path, not both"):
        create_model("fasternet_t0", checkpoint_path=tmp_path, pretrained=True)


@pytest.mark.parametrize("source", ["timm", "official"])
def test_pretrained_weights_are_loaded_and_cached(published, hub, source):
    assert same(create_model("fasternet_t0", pretrained=True, source=source), published)
    num_requests = len(hub.requests)
    assert same(create_model("fasternet_t0.in1k", pretrained=True, source=source), published)
    assert len(hub.requests) == num_requests > 0
    paths = {path for method, path, _ in hub.requests if method == "GET"}
    assert ("/v1/fasternet_t0.pth" in paths) == (source == "official")


def test_pretrained_with_other_classes_keeps_all_but_the_classifier(published):
    model = create_model("fasternet_t0", pretrained=True, source="official", num_classes=7)
    assert model.head.fc.weight.shape == (7, 16)
    assert model.config.num_classes == 7
    assert same(model, published, [key for key in published.state_dict() if not key.startswith("head.fc")])


def test_pretrained_backbone_ignores_the_head(published):
    model = create_model("fasternet_t0", pretrained=True, features_only=True, out_indices=(1, 2, 3))
    assert same(published, model, model.state_dict())


def test_pretrained_from_an_unknown_source_or_for_other_pictures_is_an_error(published):
    with pytest.raises(ValueError, match="source 'torch' is not one of timm, official"):
        create_model("fasternet_t0", pretrained=True, source="torch")
    with pytest.raises(
        ValueError, match=r"model.safetensors \(timm keys\) .* is \(8, 3, 4, 4\) instead of \(8, 1, 4, 4\)"
    ):
        create_model("fasternet_t0", pretrained=True, in_chans=1)


@pytest.mark.parametrize("source", ["timm", "official"])
def test_pretrained_that_cannot_be_fetched_is_one_sentence(published, hub, source):
    hub.files.clear()
    with pytest.raises(ConnectionError, match=r"cannot download .*404.*give a file \(.*--checkpoint\)$") as caught:
        create_model("fasternet_t0", pretrained=True, source=source)
    assert "\n" not in str(caught.value)


def test_table_5_refuses_what_was_never_published():
    with pytest.raises(ValueError, match=r"variant 'T0\* ReLU' of Table 5 cannot be built: .* never published"):
        create_ablation("T0* ReLU")
    with pytest.raises(ValueError, match=r"variant 'T0 r=1/3' is not one of Table 5: T0\* r=1/2, T0 r=1/4, "):
        create_ablation("T0 r=1/3")
    with pytest.raises(ValueError, match="unknown option colour"):
        create_ablation("T0 LN", colour=1)
