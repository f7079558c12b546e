"""Any network by name, into a model folder and out of it, as we read it and as timm reads it."""

import json
import shutil

import pytest
import timm
import torch

from fasternet.models import Preprocessing, create_model, save_checkpoint
from fasternet.ops.pconv_nd import PConvPWConv
from fasternet.rivals import (
    create_network,
    load_network,
    load_rival,
    randomize_batch_norm,
    resolve_network,
    save_network,
)

NAMES = ("ant", "bee", "cat")
SHAPE = [1, 3, 64, 64]
FACTS = {"recipe": {"epochs": 3, "lr": 0.001}, "metrics": {"top1": 71.5}, "license": "cc-by-4.0"}
PREPROCESSING = Preprocessing(input_size=64, crop_ratio=0.95, mean=(0.5,) * 3, std=(0.1, 0.2, 0.3))


@pytest.fixture(scope="module")
def mobilenet():
    torch.manual_seed(0)
    model = create_network("MobileNetV2", num_classes=3, drop_path_rate=0.1)
    randomize_batch_norm(model, torch.randn(4, 3, 64, 64))
    return model.eval()


@pytest.fixture
def folder(mobilenet, tmp_path):
    folder = tmp_path / "folder"
    save_network(folder, mobilenet, name="MobileNetV2", class_names=NAMES, preprocessing=PREPROCESSING, facts=FACTS)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def test_folder_of_a_rival_keeps_the_function_and_all_else(folder, mobilenet):
    found = load_network(folder)
    assert torch.equal(logits(found.model), logits(mobilenet))
    assert (found.name, found.class_names, found.num_classes) == ("MobileNetV2", NAMES, 3)
    assert found.preprocessing == PREPROCESSING
    assert not found.model.training
    assert {key: found.facts[key] for key in FACTS} == FACTS
    assert found.facts["versions"]["timm"] == timm.__version__


def test_timm_builds_the_same_function_from_the_folder_of_a_rival(folder, mobilenet):
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(logits(theirs), logits(mobilenet))
    assert theirs.num_classes == 3
    config = timm.data.resolve_model_data_config(theirs)
    assert (*config["input_size"], config["crop_pct"], *config["std"]) == (3, 64, 64, 0.95, 0.1, 0.2, 0.3)
    card = (folder / "README.md").read_text()
    assert "license: cc-by-4.0\nlibrary_name: timm\n" in card
    assert "top1 = 71.5" in card


def test_folder_that_timm_wrote_is_read(tmp_path):
    theirs = timm.create_model("mobilenetv2_050", num_classes=4)
    timm.models.save_for_hf(
        theirs, tmp_path, model_config={"label_names": ["a", "b", "c", "d"]}, safe_serialization=True
    )
    found = load_network(tmp_path)
    assert (found.name, found.class_names) == ("mobilenetv2_050", ("a", "b", "c", "d"))
    assert torch.equal(logits(found.model), logits(theirs))


def test_torchvision_rival_and_fasternet_share_the_face(tmp_path):
    for name, options in [("ShuffleNetV2 x1.5", {}), ("fasternet_t0", {"width": 8, "head_width": 16})]:
        model = create_network(name, num_classes=3, **options)
        assert model.training
        save_network(tmp_path / name, model, name=name, class_names=NAMES, facts=FACTS)
        found = load_network(tmp_path / name)
        assert torch.equal(logits(found.model), logits(model))
        assert (found.name, found.facts["license"], found.num_classes) == (name, "cc-by-4.0", 3)
    document = json.loads((tmp_path / "ShuffleNetV2 x1.5" / "config.json").read_text())
    assert document["fasternet"]["timm"] == "cannot build it: it is of torchvision"


def test_network_follows_from_the_seed():
    first, second, other = (
        torch.manual_seed(seed) and create_network("ShuffleNetV2 x1.5", num_classes=3).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize("kind", ["folder", "run", "file"])
def test_weights_with_other_classes_get_a_fresh_classifier(folder, mobilenet, tmp_path, kind):
    shutil.copytree(folder, tmp_path / "run" / "best")
    path = {"folder": folder, "run": tmp_path / "run", "file": folder / "model.safetensors"}[kind]
    same = create_network("MobileNetV2", num_classes=3, checkpoint_path=path)
    assert same.training
    assert torch.equal(logits(same), logits(mobilenet))
    model = create_network("mobilenetv2_100", num_classes=7, checkpoint_path=path)
    before, after = mobilenet.state_dict(), model.state_dict()
    assert after["classifier.weight"].shape == (7, 1280)
    assert all(torch.equal(after[key], before[key]) for key in before if not key.startswith("classifier"))


def test_fasternet_with_other_classes_gets_a_fresh_classifier(tmp_path):
    model = create_model("fasternet_t0", width=8, head_width=16, num_classes=3)
    save_checkpoint(tmp_path, model, name="fasternet_t0")
    found = create_network("fasternet_t0", num_classes=5, checkpoint_path=tmp_path)
    assert found.config.num_classes == 5
    assert torch.equal(found.head.pwconv.weight, model.head.pwconv.weight)
    assert found.head.fc.weight.shape == (5, 16)
    assert found.training


def test_what_does_not_fit_is_one_clear_error(folder, tmp_path):
    with pytest.raises(ValueError, match=r"holds a mobilenetv2_100, and mobilenetv2_050 was asked for$"):
        create_network("mobilenetv2_050", num_classes=3, checkpoint_path=folder)
    with pytest.raises(ValueError, match=r"model.safetensors does not fit the network: .*of another shape: conv_stem"):
        create_network("mobilenetv2_050", num_classes=3, checkpoint_path=folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"^unknown network 'mobilenetv2-100': did you mean mobilenetv2_100"):
        create_network("mobilenetv2-100", num_classes=3)
    with pytest.raises(ValueError, match=r"MobileNetV2 cannot be built with {'colour': 1}"):
        create_network("MobileNetV2", num_classes=3, colour=1)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        create_network("MobileNetV2", num_classes=3, checkpoint_path=tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="class_names has 2 names for 3 classes"):
        save_network(tmp_path, create_network("MobileNetV2", num_classes=3), name="MobileNetV2", class_names=NAMES[:2])
    (folder / "config.json").write_text('{"architecture": "mobilenetv2_100"}')
    with pytest.raises(ValueError, match=r"config.json is truncated or was edited"):
        load_network(folder)


def test_published_weights_that_cannot_be_had_are_one_clear_error(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(timm, "create_model", refuse)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    for name in ("MobileNetV2", "ShuffleNetV2 x1.5"):
        with pytest.raises(
            ConnectionError, match=r"weights of .*\(.*\): without a network, give a file \(.*--checkpoint\)$"
        ) as caught:
            create_network(name, num_classes=3, pretrained=True)
        assert "\n" not in str(caught.value)


def test_published_weights_keep_their_own_classifier(monkeypatch):
    """Published weights of 21841 classes with a head of 1000 would predict at random."""
    asked = []

    def create(name, *, pretrained, num_classes):
        asked.append((name, pretrained, num_classes))
        return build(name, num_classes=num_classes)

    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    found = load_rival("mobilenetv2_100.ra_in1k")
    assert (found.num_classes, found.name, found.preprocessing.crop_ratio) == (1000, "MobileNetV2", 0.875)
    with torch.device("meta"):
        load_rival("convnext_tiny.in12k")
    assert asked == [("mobilenetv2_100.ra_in1k", True, 1000), ("convnext_tiny.in12k", True, 11821)]
    with pytest.raises(ValueError, match="published weights of vit_small_patch14_dinov2 have no classifier"):
        load_rival("vit_small_patch14_dinov2.lvd142m")


def test_names_are_the_papers_where_it_has_them():
    assert resolve_network("mobilenetv2_100.ra_in1k").name == "MobileNetV2"
    assert resolve_network("mobilenetv2_100.ra_in1k").builder == "mobilenetv2_100.ra_in1k"
    assert resolve_network("regnety_160").name == "regnety_160"


TWICE = [{"select": r"layer1\..*", "input_shape": SHAPE}, {"select": r"layer2\.1\..*", "input_shape": SHAPE}]


def create_operated(**changes):
    return create_network("resnet18", num_classes=3, channels=(16, 16, 16, 16), **{"surgery": TWICE, **changes})


def test_surgery_is_done_in_turn_and_again_from_the_folder(tmp_path):
    model = create_operated()
    replaced = [name for name, module in model.named_modules() if isinstance(module, PConvPWConv)]
    assert replaced == [f"layer{block}.conv{conv}" for block in ("1.0", "1.1", "2.1") for conv in (1, 2)]
    assert model.training
    save_network(tmp_path, model, name="resnet18")
    assert torch.equal(logits(load_network(tmp_path).model), logits(model))


def test_what_surgery_draws_follows_from_the_seed():
    first, again, other = (
        torch.manual_seed(seed) and create_operated().layer2[1].conv1.pwconv.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    given = [torch.manual_seed(seed) and create_operated(surgery=[{**TWICE[1], "seed": 7}]) for seed in (1, 2)]
    assert torch.equal(*(model.layer2[1].conv1.pwconv.weight for model in given))


def test_surgery_on_published_weights_keeps_what_it_can(monkeypatch):
    """All of a 3x3 convolution that works on its centre alone is left, where weights are fitted and not drawn."""
    build = timm.create_model

    def create(name, *, pretrained, **options):
        model = build(name, **options)
        torch.nn.init.dirac_(model.layer1[1].conv1.weight)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    conv = create_operated(pretrained=True).layer1[1].conv1
    x = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(conv(x), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("surgery", [[{"bogus": 1}], {"select": "regular"}, [{"init": "random"}]])
def test_surgery_that_does_not_exist_is_one_sentence(surgery):
    with pytest.raises(ValueError, match=r"^resnet18 cannot be built with surgery .*(bogus|mapping|init)"):
        create_operated(surgery=surgery)
