"""The network that a study looks at: where it comes from, its convolutions in order, its maps, pictures for it."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fasternet.analysis import reference
from fasternet.analysis.reference import (
    Reference,
    capture,
    find_first_convs,
    hash_pictures,
    list_layers,
    load_pictures,
    load_reference,
)
from fasternet.data.images import ImageError
from fasternet.models import Checkpoint, Preprocessing, create_model
from fasternet.rivals import create_network, save_network
from fasternet.train.loop import Hooks

SMALL = {"width": 8, "depths": (1, 1, 1, 1)}


def save_pictures(folder, num_classes=2, count=4):
    draw = np.random.default_rng(0)
    for label in range(num_classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(count):
            pixels = draw.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")
    return sorted(folder.rglob("*.png"))


def test_first_convs_of_a_resnet_have_stride_1():
    layers = list_layers(create_network("resnet18", num_classes=2).eval(), 64)
    assert len(layers) == 20
    assert [layer.stage for layer in layers[:2]] == [0, 1]
    found = [(layer.name, layer.stage, layer.height) for layer in find_first_convs(layers)]
    assert found == [
        ("layer1.0.conv1", 1, 16),
        ("layer2.0.conv2", 2, 8),
        ("layer3.0.conv2", 3, 4),
        ("layer4.0.conv2", 4, 2),
    ]


def test_pconv_is_a_layer_but_no_regular_convolution():
    layers = list_layers(create_model("fasternet_t0", num_classes=2, **SMALL).eval(), 64)
    assert "stages.0.blocks.0.pconv" in [layer.name for layer in layers]
    assert find_first_convs(layers) == []


def test_capture_holds_what_enters_and_leaves():
    model = create_network("resnet18", num_classes=2).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), capture(model, ["layer2.0.conv2"]) as maps:
        model(images)
        entered, left = maps["layer2.0.conv2"]
    torch.testing.assert_close(left, model.get_submodule("layer2.0.conv2")(entered))
    assert not model.get_submodule("layer2.0.conv2")._forward_hooks
    with (
        pytest.raises(ValueError, match=r"'layer2\.0\.conv9' is not a module.*layer2\.0\.conv"),
        capture(model, ["layer2.0.conv9"]),
    ):
        pass


class Pair(nn.Module):
    def forward(self, *, x):
        return x, x + 1


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        return self.pair(x=x)[1]


def test_capture_takes_keywords_and_pairs():
    x, model = torch.zeros(2), Holder()
    with capture(model, ["pair"]) as maps:
        y = model(x)
    entered, left = maps["pair"]
    assert entered is x
    assert left[1] is y


def test_checkpoint_is_taken_whatever_the_name(tmp_path):
    model = create_model("fasternet_t0", num_classes=2, **SMALL)
    for folder in ("mine", "run/best"):
        save_network(tmp_path / folder, model, name="fasternet_t0", preprocessing=Preprocessing(input_size=64))
    said = []
    found = load_reference("ResNet50", checkpoint=tmp_path / "mine", hooks=Hooks(say=said.append))
    assert found.condition == {"model": "fasternet_t0", "weights": "mine", "weights_hash": found.weights_hash}
    assert said == ["reference: fasternet_t0, weights: mine"]
    other = load_reference("ResNet50", checkpoint=tmp_path / "run" / "best")
    assert (other.weights, other.weights_hash) == ("run/best", found.weights_hash)
    assert not found.model.training
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


def test_hashes_tell_weights_and_pictures_apart(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = Reference(model, "a", "best", Preprocessing()).weights_hash
    assert len(before) == 8
    model[1].running_mean[2] = 1
    assert Reference(model, "a", "best", Preprocessing()).weights_hash != before
    one, two = (tmp_path / label / "0.png" for label in ("daisy", "tulip"))
    assert hash_pictures([one]) == hash_pictures([tmp_path.parent / "elsewhere" / "daisy" / "0.png"])
    assert len({hash_pictures(paths) for paths in ([one], [two], [one, two])}) == 3


def test_published_weights_are_named_with_their_tag_and_unknown_names_are_refused(monkeypatch, tmp_path):
    made = Checkpoint(name="ResNet50", model=nn.Conv2d(3, 4, 1), class_names=None, preprocessing=Preprocessing())
    monkeypatch.setattr(reference, "load_rival", lambda name: made)
    assert load_reference("resnet50.tv_in1k").weights == "published (tv_in1k)"
    assert load_reference("ResNet50").weights == "published"
    monkeypatch.undo()
    (tmp_path / "recipe.yaml").touch()  # as where a network was trained in place of another
    with pytest.raises(ValueError, match="unknown network 'nonsense'"):
        load_reference("nonsense", data="flowers", folder=tmp_path)


def test_network_is_trained_once_where_weights_are_out_of_reach(tmp_path, monkeypatch):
    def fail(name):
        raise ConnectionError("cannot download")

    save_pictures(tmp_path / "pictures")
    monkeypatch.setattr(reference, "_load_published", fail)
    changes = {"epochs": 1, "batch_size": 4, "num_workers": 0, "input_size": 32, "full_size_epochs": 0}
    monkeypatch.setattr(reference, "TRAINED_RECIPE", dataclasses.replace(reference.TRAINED_RECIPE, **changes))
    with pytest.raises(ConnectionError, match=r"cannot download, or name a trained network with --checkpoint"):
        load_reference("resnet50")
    arguments = {"data": str(tmp_path / "pictures"), "folder": tmp_path / "run"}
    found = load_reference("resnet50", **arguments)
    assert (found.name, found.weights) == ("resnet18", "trained here on pictures")
    monkeypatch.setattr(reference, "train", None)  # a second training would fail
    again = load_reference("resnet50", **arguments)
    assert torch.equal(found.model.conv1.weight, again.model.conv1.weight)
    assert isinstance(again.model.conv1, nn.Conv2d)


def test_pictures_come_in_seeded_order(tmp_path):
    paths = save_pictures(tmp_path / "pictures")
    own = Preprocessing(input_size=32)
    plain = torch.cat(list(load_pictures(paths, own, batch_size=3)))
    assert plain.shape == (8, 3, 32, 32)
    one, two = (torch.cat(list(load_pictures(paths, own, batch_size=3, shuffle_seed=1))) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, plain)
    torch.testing.assert_close(one.sum(), plain.sum())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_picture_that_cannot_be_read_is_named_in_a_sentence(tmp_path, num_workers):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    loader = load_pictures([tmp_path / "bad.png"], Preprocessing(input_size=32), batch_size=1, num_workers=num_workers)
    with pytest.raises(ImageError) as caught:
        list(loader)
    assert str(caught.value) == f"cannot read {tmp_path / 'bad.png'}: it is no picture of a known format"
