import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from fasternet.cli.predict import predict as predict_command
from fasternet.data.images import ImageError, load_image
from fasternet.data.transforms import create_transform
from fasternet.deploy import explain_engine
from fasternet.models.checkpoint import Checkpoint, Preprocessing, load_checkpoint, save_checkpoint
from fasternet.models.registry import create_model
from fasternet.predict import Predictor, create_inference_model, load_weights
from fasternet.rivals import create_network, load_network, randomize_batch_norm, save_network

NAMES = ("ant", "bee", "cat", "dog")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """Return the folder of a narrow network whose predictions differ from picture to picture."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = create_model("fasternet_t0", width=8, head_width=32, num_classes=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    preprocessing = Preprocessing(input_size=64, crop_ratio=0.8, mean=(0.5,) * 3, std=(0.25,) * 3)
    save_checkpoint(folder, model, name="fasternet_t0", class_names=NAMES, preprocessing=preprocessing)
    return folder


@pytest.fixture(scope="module")
def predictor(model_folder: Path) -> Predictor:
    return Predictor.from_checkpoint(model_folder)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Return five pictures, two of them in a folder of their own, one of a single pixel."""
    paths = [tmp_path / name for name in ("1.png", "2.png", "more/3.jpg", "more/4.png", "pixel.png")]
    (tmp_path / "more").mkdir()
    for seed, path in enumerate(paths[:-1]):
        values = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(values).resize((90, 70)).save(path)
    Image.new("L", (1, 1), 200).save(paths[-1])
    return paths


def run(*arguments: object):
    app = typer.Typer()
    app.command()(predict_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def compute_expected(folder: Path, path: Path) -> torch.Tensor:
    checkpoint = load_network(folder)
    image = create_transform(checkpoint.preprocessing, training=False)(load_image(path))
    with torch.inference_mode():
        return checkpoint.model(image[None]).softmax(dim=1)[0]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_predictor_gives_the_networks_probabilities_in_order(predictor, model_folder, pictures, batch_size) -> None:
    predictions = dataclasses.replace(predictor, batch_size=batch_size)(pictures, top_k=4)
    assert [prediction.path for prediction in predictions] == pictures
    assert len({prediction.top for prediction in predictions}) == 5
    for prediction in predictions:
        expected = compute_expected(model_folder, prediction.path)
        labels = [label for label, _ in prediction.top]
        probabilities = [probability for _, probability in prediction.top]
        assert labels == [NAMES[index] for index in expected.argsort(descending=True)]
        assert probabilities == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("engine", "precision"), [("onnxruntime", "fp32"), ("openvino", "bf16"), ("cpu", "fp32"), ("cpu", "bf16")]
)
def test_predictor_runs_in_other_engines(predictor, model_folder, pictures, engine, precision) -> None:
    if reason := explain_engine(engine, precision):
        pytest.skip(reason)
    other = Predictor.from_checkpoint(model_folder, engine=engine, precision=precision, batch_size=2)
    for found, expected in zip(other(pictures, top_k=4), predictor(pictures, top_k=4), strict=True):
        assert dict(found.top) == pytest.approx(dict(expected.top), abs=1e-5 if precision == "fp32" else 0.05)
    assert (other.fingerprint == predictor.fingerprint) == (precision == "fp32")


def test_predictor_takes_folders_texts_and_a_checkpoint(model_folder, pictures) -> None:
    predictor = Predictor.from_checkpoint(load_checkpoint(model_folder))
    found = predictor([str(pictures[1]), pictures[2].parent], top_k=2)
    assert [prediction.path for prediction in found] == pictures[1:4]
    assert [len(prediction.top) for prediction in found] == [2, 2, 2]


def test_predictor_limits_top_k_to_the_classes(predictor, pictures) -> None:
    assert len(predictor(pictures[:1], top_k=9)[0].top) == 4
    with pytest.raises(ValueError, match="top_k=0 must be at least 1"):
        predictor(pictures, top_k=0)


def test_unreadable_picture_raises_or_is_left_out(predictor, pictures, tmp_path) -> None:
    pictures.insert(2, tmp_path / "absent.jpg")
    predictor = dataclasses.replace(predictor, batch_size=2)
    with pytest.raises(ImageError, match=r"absent\.jpg: there is no such file$"):
        predictor(pictures)
    errors: list[ImageError] = []
    predictions = predictor(pictures, on_error=errors.append)
    assert [prediction.path for prediction in predictions] == [*pictures[:2], *pictures[3:]]
    assert [str(error) for error in errors] == [f"cannot read {pictures[2]}: there is no such file"]


def test_outputs_that_are_not_finite_are_refused(pictures) -> None:
    transform = create_transform(Preprocessing(input_size=32), training=False)
    predictor = Predictor(lambda images: torch.full((len(images), 2), torch.nan), transform, ("a", "b"))
    with pytest.raises(ValueError, match="outputs are not finite"):
        predictor(pictures)


@pytest.mark.parametrize(("num_classes", "first", "last"), [(1000, "tench", "toilet tissue"), (3, "0", "2")])
def test_classes_without_names_get_them(num_classes: int, first: str, last: str) -> None:
    model = create_model("fasternet_t0", width=8, head_width=8, num_classes=num_classes)
    checkpoint = Checkpoint(name="fasternet_t0", model=model, class_names=None, preprocessing=Preprocessing())
    names = Predictor.from_checkpoint(checkpoint).class_names
    assert (names[0].split(",")[0], names[-1].split(",")[0], len(names)) == (first, last, num_classes)


def test_rival_is_predicted_from_its_folder_and_its_file_with_bn_folded(pictures, tmp_path) -> None:
    torch.manual_seed(0)
    model = create_network("MobileNetV2", num_classes=4)
    randomize_batch_norm(model, torch.randn(4, 3, 64, 64))
    save_network(
        tmp_path, model.eval(), name="MobileNetV2", class_names=NAMES, preprocessing=Preprocessing(input_size=64)
    )
    checkpoint = load_weights("mobilenetv2_100", tmp_path)
    assert "folded" in create_inference_model(checkpoint).reasons["norm"]
    expected = compute_expected(tmp_path, pictures[0])
    (found,) = Predictor.from_checkpoint(checkpoint)(pictures[:1], top_k=4)
    assert [label for label, _ in found.top] == [NAMES[index] for index in expected.argsort(descending=True)]
    assert [value for _, value in found.top] == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-5)
    file = load_weights("MobileNetV2", tmp_path / "model.safetensors")
    assert (file.num_classes, file.preprocessing.crop_ratio, file.class_names) == (4, 0.875, None)
    assert torch.equal(file.model.classifier.weight, model.classifier.weight)
    with pytest.raises(ValueError, match=r"holds MobileNetV2, not resnet18$"):
        load_weights("resnet18", tmp_path)
    with pytest.raises(ValueError, match="engine 'gpu' is not one of eager, compile, onnxruntime, openvino"):
        create_inference_model(checkpoint, engine="gpu")


def test_load_weights_recognises_the_network_of_a_file(tmp_path) -> None:
    model = create_model("fasternet_t0", num_classes=7)
    save_checkpoint(tmp_path, model, name="fasternet_t0")
    loaded = load_weights(checkpoint=tmp_path / "model.safetensors")
    assert (loaded.name, loaded.class_names, loaded.model.training) == ("fasternet_t0", None, False)
    assert torch.equal(loaded.model.head.fc.weight, model.head.fc.weight)


def test_load_weights_alone_takes_the_published_ones(monkeypatch) -> None:
    narrow = create_model("fasternet_t0", width=8, head_width=8)
    calls = []

    def create(*args, **kwargs):
        calls.append((args, kwargs))
        return narrow

    monkeypatch.setattr("fasternet.predict.predictor.create_model", create)
    assert load_weights("fasternet_t1").model is narrow
    assert calls == [(("fasternet_t1",), {"pretrained": True, "checkpoint_path": None})]


def test_load_weights_refuses_what_does_not_fit(model_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"holds fasternet_t0, not fasternet_s$"):
        load_weights("fasternet_s", model_folder)
    with pytest.raises(ValueError, match=r"^name a network"):
        load_weights()
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        load_weights(checkpoint=tmp_path / "absent.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: the keys are of no known FasterNet format"):
        load_weights(checkpoint=tmp_path / "other.pth")


def test_command_prints_a_table(predictor, model_folder, pictures) -> None:
    result = run(pictures[0], pictures[2].parent, "--checkpoint", model_folder, "--top-k", 2)
    assert result.exit_code == 0
    top = predictor(pictures[:1])[0].top
    words = result.stdout.split()
    assert words[:3] == ["picture", "label", "probability"]
    assert sum(word in NAMES for word in words) == 6
    assert f"{top[0][0]} {top[0][1]:.4g}"[:7] in " ".join(words)
    assert result.stderr == ""


def test_command_prints_json(predictor, model_folder, pictures) -> None:
    result = run(*pictures, "--checkpoint", model_folder, "--top-k", 1, "--json", "--batch-size", 2)
    document = json.loads(result.stdout)
    assert document["model"] == "fasternet_t0"
    assert document["errors"] == []
    predictions = predictor(pictures, top_k=1)
    assert [Path(row["path"]) for row in document["predictions"]] == pictures
    for row, prediction in zip(document["predictions"], predictions, strict=True):
        assert [best["label"] for best in row["top"]] == [label for label, _ in prediction.top]
        assert row["top"][0]["probability"] == pytest.approx(prediction.top[0][1], abs=1e-5)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_command_names_unreadable_pictures_and_predicts_the_others(model_folder, pictures, options) -> None:
    pictures[1].write_text("text")
    pictures[3].write_bytes(pictures[3].read_bytes()[:200])
    result = run(*pictures, "--checkpoint", model_folder, *options)
    assert result.exit_code == 1
    for path in (pictures[0], pictures[2], pictures[4]):
        assert path.name in result.stdout
    lines = result.stderr.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [["error", f"cannot read {pictures[i]}"] for i in (1, 3)]


def test_command_fails_where_no_picture_can_be_read(model_folder, tmp_path) -> None:
    result = run(tmp_path / "absent.png", "--checkpoint", model_folder)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: cannot read {tmp_path / 'absent.png'}: there is no such file\n"


def test_command_without_weights_uses_the_published_ones_or_fails(monkeypatch, pictures) -> None:
    def refuse(name: str, **kwargs: object) -> None:
        assert (name, kwargs["pretrained"]) == ("fasternet_t0", True)
        raise ConnectionError("no network")

    monkeypatch.setattr("fasternet.predict.predictor.create_model", refuse)
    result = run(pictures[0])
    assert result.exit_code == 1
    assert isinstance(result.exception, ConnectionError)
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [(), ("a.png", "--top-k", "0"), ("a.png", "--batch-size", "0")])
def test_command_refuses_wrong_arguments(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2
