"""The folder of a detector: the same detections out of it, and one sentence for whatever else is given."""

import json
import re
import shutil

import pytest
import torch

from fasternet.detection.checkpoint import OF_CLASSES, is_detector, load_detector, load_weights, save_detector
from fasternet.detection.detector import create_detector, create_faster_rcnn, create_mask_rcnn
from fasternet.detection.mmdet import save_mmdet
from fasternet.detection.optimize import optimize_detector
from fasternet.models import create_model, load_checkpoint, save_checkpoint
from fasternet.rivals import create_network, load_network, save_network
from fasternet.rivals.network import read_options

SMALL = {
    "min_size": 64,
    "max_size": 128,
    "fpn_channels": 8,
    "box_head_width": 16,
    "mask_head_channels": 8,
    "score_threshold": 0.0,
    "backbone_options": {"width": 8, "depths": (1, 1, 1, 1)},
}
NAMES = ("ant", "bee", "cat")
FACTS = {"recipe": {"epochs": 3}, "metrics": {"mask_ap": 0.4125}, "license": "cc-by-4.0"}


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return create_mask_rcnn("fasternet_t0", num_classes=3, antialias=False, **SMALL).eval()


@pytest.fixture
def folder(detector, tmp_path):
    save_detector(tmp_path / "folder", detector, class_names=NAMES, category_ids=(1, 5, 90), facts=FACTS)
    return tmp_path / "folder"


def detect(model):
    image = torch.rand(3, 60, 90, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model([image])[0]


def test_folder_keeps_the_function_and_all_else(folder, detector):
    found = load_detector(folder)
    assert not found.model.training
    assert found.model.config == detector.config
    assert (found.class_names, found.category_ids) == (NAMES, (1, 5, 90))
    assert {key: found.facts[key] for key in FACTS} == FACTS
    assert found.facts["versions"]["torch"]
    assert "config" not in found.facts
    ours, theirs = detect(found.model), detect(detector)
    assert len(ours["scores"]) > 0
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    document = json.loads((folder / "config.json").read_text())
    assert (document["architecture"], document["fasternet"]["config"]["kind"]) == ("mask_rcnn", "mask_rcnn")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name: fasternet\npipeline_tag: image-segmentation\n")
    assert "mask_ap = 0.4125" in card


@pytest.mark.parametrize(
    ("kind", "backbone", "options"),
    [("faster_rcnn", "fasternet_t0", {"width": 8, "layer_scale": 0.1}), ("mask_rcnn", "mobilenetv4_conv_small", {})],
)
def test_any_detector_goes_through_a_folder(tmp_path, kind, backbone, options):
    model = create_detector(kind, backbone, num_classes=2, **{**SMALL, "backbone_options": options})
    save_detector(tmp_path, model)
    found = load_detector(tmp_path)
    assert found.model.config == model.config
    assert (found.class_names, found.category_ids) == (None, None)
    own, read = model.state_dict(), found.model.state_dict()
    assert own.keys() == read.keys()
    assert all(torch.equal(read[key], own[key]) for key in own)


def test_run_folder_stands_for_its_best(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run" / "best")
    assert load_detector(tmp_path / "run").class_names == NAMES


def test_what_does_not_belong_to_the_detector_is_refused_before_anything_is_written(detector, tmp_path):
    for argument, values in (("class_names", NAMES[:2]), ("category_ids", (1, 2, 3, 4))):
        with pytest.raises(ValueError, match=rf"^{argument} has {len(values)} entries for 3 classes$"):
            save_detector(tmp_path / "new", detector, **{argument: values})
    with pytest.raises(ValueError, match="an optimised detector cannot be saved"):
        save_detector(tmp_path / "new", optimize_detector(detector))
    with pytest.raises(ValueError, match="facts must be plain data"):
        save_detector(tmp_path / "new", detector, facts={"loss": float("nan")})
    assert not (tmp_path / "new").exists()


def test_classifiers_and_detectors_are_told_apart(folder, tmp_path):
    fasternet = create_model("fasternet_t0", width=8, head_width=16, num_classes=3)
    save_checkpoint(tmp_path / "fasternet", fasternet, name="fasternet_t0")
    rival = create_network("MobileNetV2", num_classes=3)
    save_network(tmp_path / "rival", rival, name="MobileNetV2")
    for name, architecture in (("fasternet", "fasternet_t0"), ("rival", "mobilenetv2_100")):
        with pytest.raises(ValueError, match=rf"{name} holds a {architecture}, which is no detector$"):
            load_detector(tmp_path / name)
    for read in (
        load_network,
        load_checkpoint,
        lambda path: create_model("fasternet_t0", checkpoint_path=path),
        lambda path: create_network("fasternet_t0", num_classes=3, checkpoint_path=path),
        lambda path: create_faster_rcnn("fasternet_t0", num_classes=3, backbone_checkpoint=path),
    ):
        with pytest.raises(
            ValueError, match=r"folder holds a mask_rcnn, which is a detector: `fasternet detect` reads"
        ):
            read(folder)


def test_backbone_keeps_the_options_of_its_checkpoint(tmp_path):
    fasternet = create_model("fasternet_t0", width=8, head_width=16, num_classes=3, activation="relu", position="last")
    save_checkpoint(tmp_path / "fasternet", fasternet, name="fasternet_t0")
    options = {"num_classes": 3, "fpn_channels": 8, "box_head_width": 8}
    detector = create_faster_rcnn("fasternet_t0", backbone_checkpoint=tmp_path / "fasternet", **options)
    save_detector(tmp_path / "detector", detector)
    body = load_detector(tmp_path / "detector").model.backbone.body
    assert (body.config.width, body.config.activation, body.config.position) == (8, "relu", "last")
    brought = {"width": 8, "head_width": 16, "activation": "relu", "position": "last"}
    for folder in ("fasternet", "detector"):
        assert read_options("fasternet_t0", tmp_path / folder) == brought
        assert read_options("ResNet50", tmp_path / folder) == {}


def edit(folder, change):
    document = json.loads((folder / "config.json").read_text())
    change(document)
    (folder / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["fasternet"]["config"].pop("backbone"), "is truncated or was edited (TypeError"),
        (lambda d: d["fasternet"]["config"].update(colour=1), "is truncated or was edited (TypeError"),
        (lambda d: d["fasternet"]["config"].update(min_size="800"), "was edited: min_size must be a positive integer"),
        (
            lambda d: d["fasternet"]["config"].update(backbone="fasternet_x"),
            "was edited: unknown network 'fasternet_x'",
        ),
        (lambda d: d["fasternet"].update(config=None), "is truncated or was edited"),
        (lambda d: d.update(fasternet=[]), "is truncated or was edited"),
        (lambda d: d.update(category_ids=[1]), "config.json has 1 category_ids for 3 classes"),
        (lambda d: d.update(label_names=["a"]), "config.json has 1 label_names for 3 classes"),
        (lambda d: d["fasternet"]["config"].update(fpn_channels=16), "does not fit the network: of another shape"),
        (lambda d: d["fasternet"]["config"].update(kind="faster_rcnn"), "not known: roi_heads.mask_head"),
    ],
)
def test_edited_configuration_is_one_sentence(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_detector(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_damaged_folders_are_one_sentence(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^no model folder at .*absent$"):
        load_detector(tmp_path / "absent")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or no safetensors file"):
        load_detector(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is truncated or was edited"):
        load_detector(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"is no model folder: it holds no model.safetensors$"):
        load_detector(folder)


def create_other(num_classes=3, kind="mask_rcnn", backbone="fasternet_t0", **fields):
    return create_detector(kind, backbone, num_classes=num_classes, **{**SMALL, **fields})


@pytest.mark.parametrize(
    ("num_classes", "names", "told"),
    [
        (3, NAMES, None),
        (3, None, None),
        (3, ("ant", "fly", "cat"), "has the class 'bee' where the data have 'fly'"),
        (5, ("a", "b", "c", "d", "e"), "has 3 classes and the data 5"),
    ],
)
def test_layers_that_tell_classes_start_fresh_where_classes_differ(detector, folder, num_classes, names, told) -> None:
    model = create_other(num_classes)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert load_weights(model, folder, names) == (told and f"{folder} {told}: the layers that tell classes start fresh")
    now, theirs = model.state_dict(), detector.state_dict()
    for key, tensor in now.items():
        wanted = before if told and key.startswith(OF_CLASSES) else theirs
        assert torch.equal(tensor, wanted[key]), key


def test_run_folders_and_published_files_are_whole_detectors(detector, folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "run" / "best")
    save_mmdet(tmp_path / "file.pth", detector)
    for path in (folder, tmp_path / "run", tmp_path / "file.pth"):
        assert is_detector(path)
        model = create_other()
        assert load_weights(model, path, NAMES) is None
        theirs = detector.state_dict()
        differing = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, theirs[key])]
        # A published file has neither box nor mask of the background.
        assert all(key.startswith(OF_CLASSES) and path.suffix for key in differing)
    assert "file.pth has 3 classes and the data 4" in load_weights(create_other(4), tmp_path / "file.pth", None)
    backbone = create_model("fasternet_t0", width=8, head_width=16, num_classes=3)
    save_checkpoint(tmp_path / "classifier", backbone, name="fasternet_t0")
    torch.save(backbone.state_dict(), tmp_path / "classifier.pth")
    assert not any(is_detector(tmp_path / name) for name in ("classifier", "classifier.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fpn_channels": 16, "head_norm": "bn"},
            "has fpn_channels=8, head_norm=none, and the recipe has not: add --set fpn_channels=8 --set head_norm=none",
        ),
        ({"feature_norm": False}, "has feature_norm=true, and the recipe has not: add --set feature_norm=true"),
        ({"mask_head_channels": 4, "box_head_width": 8}, "add --set box_head_width=16 --set mask_head_channels=8"),
        ({"kind": "faster_rcnn"}, "is a mask_rcnn, and a faster_rcnn is to be trained: take kind=mask_rcnn"),
        ({"backbone_options": {"width": 16, "depths": (1, 1, 1, 1)}}, "has a backbone with width=8: give it the same"),
        ({"backbone": "ResNet50", "backbone_options": {}}, "ResNet50"),
    ],
)
@pytest.mark.parametrize("form", ["folder", "file.pth"])
def test_other_detectors_are_refused_with_what_would_fit(detector, folder, tmp_path, form, change, message) -> None:
    save_mmdet(tmp_path / "file.pth", detector)
    model = create_other(**change)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="^" + re.escape(str(tmp_path / form))) as caught:
        load_weights(model, tmp_path / form, NAMES)
    assert "\n" not in str(caught.value)
    assert "roi_heads" not in str(caught.value)
    assert message in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_another_published_variant_is_named(tmp_path) -> None:
    other = create_other(backbone="fasternet_t1", backbone_options={})
    save_mmdet(tmp_path / "file.pth", other)
    save_detector(tmp_path / "folder", other)
    for name in ("file.pth", "folder"):
        with pytest.raises(ValueError, match="has the backbone fasternet_t1, and fasternet_t0 is to be trained"):
            load_weights(create_other(backbone_options={}), tmp_path / name, NAMES)
