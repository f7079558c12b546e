"""exchange and ``fasternet convert``: from every format into every other, read back; nothing is replaced unasked."""

import errno
import itertools
import os

import pytest
import torch
import typer
from typer.testing import CliRunner

from fasternet.models import Preprocessing, create_model, load_checkpoint, save_checkpoint
from fasternet.models.checkpoint import find_obstacle
from fasternet.models.convert import detect_format, read_state, to_format, write_state
from fasternet.models.exchange import convert_file

NAMES = ("ant", "bee", "cat", "dog", "eel")
FILES = {"official": "o.pth", "lightning": "l.ckpt", "mmdet": "m.pth", "timm": "t.safetensors", "fasternet": "folder"}


@pytest.fixture
def model(randomise):
    """A network that files alone describe: of a published width and depth."""
    return randomise(create_model("fasternet_t0", num_classes=5))


@pytest.fixture
def file(tmp_path, model):
    """An official file."""
    write_state(tmp_path / "in.pth", to_format(model, "official"), "official")
    return tmp_path / "in.pth"


def create_folder(path, tiny, **fields):
    model = create_model("fasternet_t0", **{**tiny, **fields})
    save_checkpoint(
        path, model, name="fasternet_t0", class_names=NAMES, preprocessing=Preprocessing(input_size=96, crop_ratio=1.0)
    )
    return model


def test_weights_survive_the_way_through_every_format(tmp_path, file, model):
    classifiers = [name for name in FILES if name != "mmdet"]
    for source, target in itertools.permutations(classifiers, 2):
        first, second = tmp_path / source / FILES[source], tmp_path / f"{source}-{target}" / FILES[target]
        if not first.exists():
            convert_file(file, first, to=source)
        sentence = convert_file(first, second, to=target)
        assert sentence == f"fasternet_t0: 131 tensors in {target} format, read back and equal"
        if target == "fasternet":
            found = load_checkpoint(second).model
        else:
            assert detect_format(read_state(second)) == target
            found = create_model("fasternet_t0", checkpoint_path=second)
        for key, tensor in model.state_dict().items():
            assert torch.equal(found.state_dict()[key], tensor), key


@pytest.mark.parametrize("target", ["official", "lightning", "timm"])
def test_backbone_goes_from_mmdet_into_files_and_back(tmp_path, file, model, target):
    sentence = convert_file(file, tmp_path / "m.pth", to="mmdet")
    assert sentence == "fasternet_t0: 128 tensors in mmdet format, read back and equal"
    convert_file(tmp_path / "m.pth", tmp_path / "b.pth", to=target)
    convert_file(tmp_path / "b.pth", tmp_path / "m2.pth", to="mmdet")
    expected = to_format(model, "mmdet")
    found = read_state(tmp_path / "m2.pth")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(ValueError, match="a model folder holds a classifier, and this is a backbone"):
        convert_file(tmp_path / "m.pth", tmp_path / "folder", to="fasternet")


def test_feature_norms_go_where_there_are_names_for_them(tmp_path, randomise):
    model = randomise(create_model("fasternet_t0", features_only=True, feature_norm=True))
    write_state(tmp_path / "m.pth", to_format(model, "mmdet"), "mmdet")
    convert_file(tmp_path / "m.pth", tmp_path / "o.pth", to="official")
    assert torch.equal(read_state(tmp_path / "o.pth")["norm6.bias"], model.feature_norms["3"].bias)
    with pytest.raises(ValueError, match="timm's format has no BN on the feature maps"):
        convert_file(tmp_path / "m.pth", tmp_path / "t.pth", to="timm")
    assert not (tmp_path / "t.pth").exists()


def test_folder_keeps_its_class_names_and_preprocessing(tmp_path, tiny):
    create_folder(tmp_path / "a", tiny, norm="ln")
    convert_file(tmp_path / "a", tmp_path / "b", to="fasternet")
    found, expected = load_checkpoint(tmp_path / "b"), load_checkpoint(tmp_path / "a")
    assert (found.class_names, found.preprocessing) == (NAMES, expected.preprocessing)
    assert found.model.config == expected.model.config


def test_folder_of_any_width_goes_into_a_file(tmp_path, tiny):
    model = create_folder(tmp_path / "a", tiny, layer_scale=0.1, in_chans=1, partial_ratio=0.5)
    convert_file(tmp_path / "a", tmp_path / "o.pth", to="official")
    state = torch.load(tmp_path / "o.pth", weights_only=True)
    assert torch.equal(state["patch_embed.proj.weight"], model.embedding.conv.weight)
    assert torch.equal(state["stages.6.blocks.0.layer_scale"], model.stages[3].blocks[0].layer_scale)


@pytest.mark.parametrize("fields", [{"norm": "ln"}, {"position": "rotate"}, {"activation": "relu"}], ids=str)
@pytest.mark.parametrize("to", ["official", "timm", "lightning", "mmdet"])
def test_file_that_would_stand_for_another_function_is_refused(tmp_path, tiny, fields, to):
    create_folder(tmp_path / "a", tiny, **fields)
    field, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"the format {to} cannot say that the model has {field} '{value}'"):
        convert_file(tmp_path / "a", tmp_path / "out.pth", to=to)
    assert not (tmp_path / "out.pth").exists()


def test_obstacle_is_none_for_what_weights_show(tiny):
    fields = {**tiny, "layer_scale": 0.1, "in_chans": 4, "mlp_ratio": 3.0, "partial_ratio": 0.5, "drop_path_rate": 0.1}
    assert find_obstacle(create_model("fasternet_t0", **fields).config, "fasternet_t0") is None


def test_target_is_replaced_only_when_asked(tmp_path, file, model):
    target = tmp_path / "out.pth"
    target.write_text("precious")
    with pytest.raises(FileExistsError, match=r"out.pth exists already, and overwrite is off"):
        convert_file(file, target, to="timm")
    assert target.read_text() == "precious"
    convert_file(file, target, to="timm", overwrite=True)
    assert torch.equal(read_state(target)["classifier.bias"], model.head.fc.bias)
    with pytest.raises(FileExistsError, match="is a file, which fasternet cannot replace"):
        convert_file(file, target, to="fasternet", overwrite=True)
    with pytest.raises(FileExistsError, match="is a folder, which official cannot replace"):
        convert_file(file, tmp_path, to="official", overwrite=True)
    convert_file(file, tmp_path / "folder", to="fasternet")
    convert_file(file, tmp_path / "folder", to="fasternet", overwrite=True)


def test_failed_write_leaves_the_old_target(tmp_path, file, monkeypatch):
    (tmp_path / "sub").mkdir()
    target = tmp_path / "sub" / "out.pth"
    target.write_text("precious")

    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device"):
        convert_file(file, target, to="timm", overwrite=True)
    assert [path.name for path in target.parent.iterdir()] == ["out.pth"]
    assert target.read_text() == "precious"


def test_write_that_does_not_read_back_is_an_error(tmp_path, file, monkeypatch):
    from fasternet.models import convert

    def write_wrongly(path, state, format):
        write_state(path, {key: tensor + 1 for key, tensor in state.items()}, format)

    monkeypatch.setattr(convert, "write_state", write_wrongly)
    with pytest.raises(ValueError, match=r"out.pth would not hold what was read"):
        convert_file(file, tmp_path / "out.pth", to="timm")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"to": "onnx"}, ValueError, "to 'onnx' is not one of official, lightning, mmdet, timm, fasternet"),
        ({"source": "none.pth"}, FileNotFoundError, r"no checkpoint at .*none\.pth"),
        ({"source": ""}, ValueError, "is a directory, not a checkpoint file"),
        ({"model": "fasternet_t9"}, ValueError, "unknown model 'fasternet_t9': did you mean"),
        ({"model": "fasternet_s"}, ValueError, "holds a fasternet_t0, and fasternet_s was asked for"),
        ({"to": "fasternet", "target": "out.pth"}, ValueError, "out.pth is named like a file"),
    ],
)
def test_wrong_argument_is_named(tmp_path, file, options, error, message):
    options = {"to": "timm", "target": "out", "source": file, **options}
    source, target = tmp_path / options.pop("source"), tmp_path / options.pop("target")
    with pytest.raises(error, match=message):
        convert_file(source, target, **options)
    assert not target.exists()


def test_folder_of_another_variant_is_named(tmp_path, tiny):
    create_folder(tmp_path / "a", tiny)
    with pytest.raises(ValueError, match="a holds a fasternet_t0, and fasternet_t1 was asked for"):
        convert_file(tmp_path / "a", tmp_path / "b.pth", to="timm", model="fasternet_t1")


def test_file_of_no_published_width_has_no_name(tmp_path, tiny):
    write_state(tmp_path / "a.pth", to_format(create_model("fasternet_t0", **tiny), "timm"), "timm")
    with pytest.raises(ValueError, match=r"width 8 and depths .* belong to none of"):
        convert_file(tmp_path / "a.pth", tmp_path / "b.pth", to="official")


@pytest.fixture
def run():
    """Run ``fasternet convert`` in this process; errors come through as the main program sees them."""
    from fasternet.cli.convert import convert

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(convert)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_command_prints_the_path_and_notes_the_rest(tmp_path, file, run):
    result = run(file, tmp_path / "out.safetensors", "--to", "timm")
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'out.safetensors'}\n"
    assert result.stderr == "fasternet_t0: 131 tensors in timm format, read back and equal\n"
    with pytest.raises(FileExistsError):
        run(file, tmp_path / "out.safetensors", "--to", "timm")
    assert run(file, tmp_path / "out.safetensors", "--to", "timm", "--overwrite").exit_code == 0
    assert run(file, tmp_path / "other.pth").exit_code == 2
    assert "Example: fasternet convert" in run("--help").stdout
