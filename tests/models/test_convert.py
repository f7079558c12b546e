"""convert: every format against the official formula and timm's network; wrong files are refused whole."""

import argparse
import pickle
import random
import re

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from fasternet.models import VARIANTS, create_model
from fasternet.models.convert import (
    detect_format,
    identify_variant,
    load_state,
    read_state,
    to_format,
    write_state,
)

NUM_TENSORS = {
    "fasternet_t0": 131,
    "fasternet_t1": 131,
    "fasternet_t2": 131,
    "fasternet_s": 171,
    "fasternet_m": 251,
    "fasternet_l": 251,
}


@pytest.fixture
def state(official, tiny):
    """An official classification file's content."""
    return official.create_state(**tiny)


@pytest.fixture
def logits(official, tiny, state):
    """Return what the official network computes for a picture."""
    return lambda x: official.run(state, x, tiny["depths"], F.gelu)[-1]


@pytest.fixture
def create(tiny):
    return lambda **options: create_model("fasternet_t0", **{**tiny, **options}).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def create_empty(create_model, name, **options):
    """Create a network whose weights are not drawn: large ones take seconds."""
    with torch.device("meta"):
        model = create_model(name, **options)
    return model.to_empty(device="cpu")


@pytest.mark.parametrize("name", VARIANTS)
def test_official_names_and_shapes_are_those_of_the_published_files(name, official):
    with torch.device("meta"):
        model = create_model(name)
        expected = official.create_state(model.config.width, model.config.depths)
    assert len(expected) == NUM_TENSORS[name]
    found = to_format(model, "official")
    assert {key: tensor.shape for key, tensor in found.items()} == {k: t.shape for k, t in expected.items()}
    assert identify_variant(found) == name


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_timm_in_both_directions(name, randomise, difference, x):
    ours = create_empty(create_model, name)
    theirs = create_empty(timm.create_model, name)
    randomise(theirs, seed=1)
    load_state(ours, theirs.state_dict(), source="timm")
    with torch.no_grad():
        assert difference(ours.eval()(x), theirs(x)) <= 1e-6
        randomise(ours, seed=2)
        before = theirs(x)
        theirs.load_state_dict(to_format(ours, "timm"), strict=True)
        expected = theirs(x)
        assert expected.isfinite().all()
        assert not torch.allclose(before, expected)
        assert difference(ours(x), expected) <= 1e-6


def test_layer_scale_and_feature_maps_equal_timm(randomise, difference, x, tiny):
    theirs = timm.create_model(
        "fasternet_t0", embed_dim=8, depths=(1, 1, 2, 1), layer_scale_init_value=0.5, features_only=True
    )
    randomise(theirs)
    ours = create_model("fasternet_t0", features_only=True, layer_scale=0.5, **tiny)
    load_state(ours, {key.replace("stages_", "stages."): t for key, t in theirs.state_dict().items()}, source="timm")
    with torch.no_grad():
        for a, b in zip(ours.eval()(x), theirs(x), strict=True):
            assert difference(a, b) <= 1e-6


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_file_is_read_to_the_official_function(tmp_path, create, state, logits, x, difference, suffix):
    path = tmp_path / f"official{suffix}"
    torch.save(state, path) if suffix == ".pth" else safetensors.torch.save_file(state, path)
    with torch.no_grad():
        assert difference(create(checkpoint_path=path)(x), logits(x)) <= 1e-6


def test_lightning_file_is_read_with_all_that_it_holds_beside_the_model(tmp_path, create, state, logits, x, difference):
    content = {f"model.{key}": tensor for key, tensor in state.items()}
    content["teacher.stem.weight"] = torch.zeros(2)
    document = {
        "state_dict": content,
        "epoch": 281,
        "pytorch-lightning_version": "1.6.5",
        "hyper_parameters": argparse.Namespace(lr=0.004, model_name="fasternet_t0"),
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}],
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(71.9), "best_model_path": "a.ckpt"}},
    }
    torch.save(document, tmp_path / "lightning.ckpt")
    with torch.no_grad():
        assert difference(create(checkpoint_path=tmp_path / "lightning.ckpt")(x), logits(x)) <= 1e-6


def test_mmdet_detector_is_read_for_its_backbone(tmp_path, official, create, x, difference, tiny):
    state = official.create_state(tiny["width"], tiny["depths"], backbone=True)
    assert len([key for key in state if re.match(r"norm[0246]\.", key)]) == 4 * 5
    content = {f"backbone.{key}": tensor for key, tensor in state.items()}
    content |= {"neck.fpn_convs.0.conv.weight": torch.zeros(2), "rpn_head.rpn_cls.bias": torch.zeros(3)}
    torch.save({"meta": {"epoch": 12}, "state_dict": content}, tmp_path / "mmdet.pth")
    model = create(checkpoint_path=tmp_path / "mmdet.pth", features_only=True, feature_norm=True)
    with torch.no_grad():
        for a, b in zip(model(x), official.run(state, x, tiny["depths"], F.gelu), strict=True):
            assert difference(a, b) <= 1e-6


def test_data_parallel_and_half_precision_files_are_read(tmp_path, create, state, x):
    half = {f"module.{key}": t.half() if t.is_floating_point() else t for key, t in state.items()}
    torch.save({"state_dict": half, "args": argparse.Namespace(lr=1.0)}, tmp_path / "half.pth.tar")
    model = create(checkpoint_path=tmp_path / "half.pth.tar")
    assert model.embedding.conv.weight.dtype == torch.float32
    assert torch.equal(model.embedding.conv.weight, state["patch_embed.proj.weight"].half().float())


@pytest.mark.parametrize("format", ["official", "lightning"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_written_file_holds_the_official_function(
    tmp_path, official, randomise, create, x, difference, tiny, format, suffix
):
    model = randomise(create())
    write_state(tmp_path / f"file{suffix}", to_format(model, format), format)
    if suffix == ".pth":
        content = torch.load(tmp_path / "file.pth", weights_only=True)
    else:
        content = safetensors.torch.load_file(tmp_path / "file.safetensors")
    if format == "lightning":
        content = {key.removeprefix("model."): tensor for key, tensor in content.get("state_dict", content).items()}
    with torch.no_grad():
        assert difference(model(x), official.run(content, x, tiny["depths"], F.gelu)[-1]) <= 1e-6


@pytest.mark.parametrize("backbone", [False, True])
def test_written_mmdet_file_holds_the_official_backbone(
    tmp_path, official, randomise, create, x, difference, tiny, backbone
):
    model = randomise(create(features_only=backbone, feature_norm=backbone))
    write_state(tmp_path / "mmdet.pth", to_format(model, "mmdet"), "mmdet")
    content = torch.load(tmp_path / "mmdet.pth", weights_only=True)["state_dict"]
    assert all(key.startswith("backbone.") for key in content)
    content = {key.removeprefix("backbone."): tensor for key, tensor in content.items()}
    assert not [key for key in content if key.startswith(("head", "avgpool_pre_head"))]
    with torch.no_grad():
        expected = official.run(content, x, tiny["depths"], F.gelu)
        for a, b in zip(model.forward_intermediates(x), expected, strict=True):
            assert difference(a, b) <= 1e-6


def test_to_format_refuses_what_a_format_has_no_names_for(create):
    with pytest.raises(ValueError, match="timm's format has no BN on the feature maps"):
        to_format(create(features_only=True, feature_norm=True), "timm")
    with pytest.raises(ValueError, match="format 'onnx' is not one of official, lightning, mmdet, timm, fasternet"):
        to_format(create(), "onnx")


@pytest.mark.parametrize("format", ["official", "lightning", "mmdet", "timm", "fasternet"])
@pytest.mark.parametrize("name", ["fasternet_t1", "fasternet_m"])
def test_every_format_tells_itself_and_the_variant(format, name):
    with torch.device("meta"):
        state = to_format(create_model(name), format)
    assert detect_format(state) == format
    assert identify_variant(state) == name


def test_unknown_format_and_variant_are_named(state):
    with pytest.raises(ValueError, match=r"no known FasterNet format: conv1.weight, fc.bias \.\.\."):
        detect_format(["fc.bias", "conv1.weight"])
    with pytest.raises(ValueError, match="no known FasterNet format: nothing"):
        detect_format([])
    with pytest.raises(
        ValueError, match=r"width 8 and depths \(1, 1, 2, 1\) belong to none of fasternet_t0, .*_l: name"
    ):
        identify_variant(state)


def test_keys_that_do_not_fit_are_listed_at_once_and_nothing_is_loaded(create, state):
    model = create()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    del state["stages.4.blocks.1.mlp.0.weight"], state["head.bias"]
    state["stages.4.blocks.2.mlp.0.weight"] = torch.zeros(1)
    state["patch_embed.norm.bias"] = torch.zeros(9)
    state["patch_embed.proj.weight"] = torch.zeros(8, 1, 4, 4)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_state(model, state, source="a.pth")
    assert str(caught.value) == (
        "a.pth (official keys) does not fit the model: missing: stages.4.blocks.1.mlp.0.weight, head.bias; "
        "not known: stages.4.blocks.2.mlp.0.weight; of another shape: patch_embed.proj.weight is (8, 1, 4, 4) instead "
        "of (8, 3, 4, 4), patch_embed.norm.bias is (9,) instead of (8,)"
    )
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.bias"), "missing: head.bias$"),
        (lambda state: state.update({"norm6.bias": torch.zeros(1)}), "not known: norm6.bias$"),
        (lambda state: state.update({"head.bias": torch.zeros(4)}), r"shape: head.bias is \(4,\) instead of \(5,\)$"),
    ],
)
def test_one_key_that_does_not_fit_is_enough(create, state, change, message):
    change(state)
    with pytest.raises(ValueError, match=rf"a.pth \(official keys\) does not fit the model: .*{message}"):
        load_state(create(), state, source="a.pth")


def test_long_lists_of_keys_are_counted(create, state):
    for key in [key for key in state if ".mlp.1." in key]:
        del state[key]
    with pytest.raises(ValueError, match=r"missing: (\S+, ){5}\S+ and 19 more$"):
        load_state(create(), state, source="a.pth")


def test_keys_of_another_network_are_refused(create):
    with pytest.raises(ValueError, match=r"resnet.pth: the keys are of no known FasterNet format: conv1.weight"):
        load_state(create(), {"conv1.weight": torch.zeros(1)}, source="resnet.pth")


def test_backbone_reads_a_classifier_and_keeps_its_norms_fresh(create, official, state, x, difference, tiny):
    model = create(features_only=True, feature_norm=True)
    load_state(model, state, source="official")
    for norm in model.feature_norms.values():
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        norm.eps = 1e-12  # then a fresh norm is the identity
    with torch.no_grad():
        expected = official.run(state, x, tiny["depths"], F.gelu)[:-1]
        for a, b in zip(model(x), expected, strict=True):
            assert difference(a, b) <= 1e-6


@pytest.mark.parametrize("format", ["official", "lightning", "timm", "fasternet"])
def test_backbone_reads_the_classifier_of_every_format(create, randomise, x, format):
    classifier, backbone = randomise(create()), create(features_only=True)
    load_state(backbone, to_format(classifier, format), source=format)
    with torch.no_grad():
        assert torch.equal(backbone(x)[-1], classifier.forward_features(x))


def test_feature_norms_are_read_whole_or_not_at_all(create, official, tiny):
    state = official.create_state(tiny["width"], tiny["depths"], backbone=True)
    with pytest.raises(ValueError, match=r"not known: norm0.weight"):
        load_state(create(features_only=True), state, source="a.pth")
    del state["norm4.bias"]
    with pytest.raises(ValueError, match=r"missing: norm4.bias$"):
        load_state(create(features_only=True, feature_norm=True), state, source="a.pth")


def test_classifier_misses_its_head_in_a_backbone(create, official, tiny):
    state = official.create_state(tiny["width"], tiny["depths"], backbone=True)
    with pytest.raises(
        ValueError, match=r"missing: avgpool_pre_head.1.weight, head.weight, head.bias; not known: norm0"
    ):
        load_state(create(), state, source="a.pth")


class _Payload:
    """A pickle of this creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, state, suffix, legacy):
    path, mark = tmp_path / f"evil{suffix}", tmp_path / "mark"
    torch.save({"state_dict": state, "extra": _Payload(mark)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"is refused: beside tensors it holds \S+open, which can run code") as caught:
        read_state(path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    torch.load(path, weights_only=False)["extra"].close()
    assert mark.exists(), "the payload works"


def test_bare_pickle_with_code_is_refused_and_not_run(tmp_path):
    path, mark = tmp_path / "evil.pth", tmp_path / "mark"
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps(_Payload(mark), protocol=protocol))
        with pytest.raises(ValueError, match=r"is refused|is truncated, or is no checkpoint"):
            read_state(path)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"\0", b"hello\n" * 9, b"<html>404</html>", b'{"a": 1}', b"PK\3\4zip"], ids=str
)
def test_file_that_is_no_checkpoint_is_one_clear_error(tmp_path, suffix, content):
    (tmp_path / f"file{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"file{suffix} is truncated") as caught:
        read_state(tmp_path / f"file{suffix}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_and_damaged_files_are_one_clear_error(tmp_path, state, kind):
    path = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content, rng, num_errors = path.read_bytes(), random.Random(0), 0
    for step in range(150):
        damaged = bytearray(content)
        if step % 3:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(20):
                damaged[rng.randrange(4000)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_state(path)
        except ValueError as error:
            assert re.search(r"is truncated|is refused|no state dict", str(error))  # noqa: PT017
            num_errors += 1
    assert num_errors >= 140


@pytest.mark.parametrize(
    "content", [torch.zeros(3), {}, {"state_dict": {}}, {0: torch.zeros(1)}, {"a": 1}, ["a"]], ids=str
)
def test_file_without_a_state_dict_is_one_clear_error(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"file.pth holds no state dict of tensors"):
        read_state(tmp_path / "file.pth")


def test_absent_file_and_directory_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none.pth"):
        read_state(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="is a directory, not a checkpoint file"):
        read_state(tmp_path)
