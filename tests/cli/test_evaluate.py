import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from typer.testing import CliRunner, Result

from fasternet.cli import app
from fasternet.deploy import explain_engine
from fasternet.models.checkpoint import Preprocessing, save_checkpoint
from fasternet.models.registry import create_model
from fasternet.rivals import create_network, save_network

CLASSES = ("bright", "dark")


def run(*arguments: object) -> Result:
    words = ["eval", *map(str, arguments), "--device", "cpu", "--num-workers", "0"]
    return CliRunner().invoke(app, words)


def load(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


def save_pictures(root: Path, numbers: range) -> Path:
    generator = np.random.default_rng(0)
    for name, level in (("bright", 190), ("dark", 60)):
        (root / name).mkdir(parents=True)
        for number in numbers:
            pixels = generator.normal(level, 40, (40, 48, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    return root


def save_model(folder: Path, num_classes: int, names: tuple[str, ...] | None, **preprocessing) -> Path:
    torch.manual_seed(0)
    model = create_model("fasternet_t0", width=8, depths=(1, 1, 1, 1), head_width=16, num_classes=num_classes)
    save_checkpoint(folder, model, name="fasternet_t0", class_names=names, preprocessing=Preprocessing(**preprocessing))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures, an odd number for two processes."""
    root = tmp_path_factory.mktemp("data")
    save_pictures(root / "val", range(5))
    (root / "val" / "dark" / "04.png").unlink()
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "small", 2, CLASSES, input_size=32)


def test_protocol_is_said(small: Path, data: Path, tmp_path: Path) -> None:
    own = load("--data", data, "--checkpoint", small)
    assert own["protocol"] == "shorter side to 35 (bicubic), centre crop of 32, ratio 0.9"
    other = load("--data", data, "--checkpoint", small, "--size", 64, "--crop", 1)
    assert other["protocol"] == "shorter side to 64 (bicubic), centre crop of 64, ratio 1"
    assert (other["input_size"], other["crop_ratio"]) == (64, 1)
    assert own["loss"] != other["loss"]
    paper = run("--data", data, "--checkpoint", small, "--size", 224)
    assert "shorter side to 248 (bicubic), centre crop of 224, ratio 0.9: the paper's protocol" in paper.stdout
    assert "top-1 %" in paper.stdout
    assert "top-5 %" not in paper.stdout  # of two classes it is 100


@pytest.mark.parametrize("crop", [0, 0.0001, 1.5])
def test_crop_ratio_beyond_its_range_is_refused(small: Path, data: Path, crop: float) -> None:
    error = run("--data", data, "--checkpoint", small, "--crop", crop).exception
    assert isinstance(error, ValueError)
    assert str(error).startswith(f"crop={crop} must be between 0.05 and 1")


def test_unreadable_picture_is_an_error_unless_skipped(small: Path, tmp_path: Path) -> None:
    root = save_pictures(tmp_path / "val", range(3)).parent
    (root / "val" / "dark" / "01.png").write_bytes(b"")
    arguments = ("--data", root, "--checkpoint", small)
    assert "01.png: the file is empty" in str(run(*arguments).exception)
    document = load(*arguments, "--skip-unreadable")
    assert (document["num_images"], document["num_unreadable"]) == (5, 1)
    assert document["unreadable"][0].endswith("01.png: the file is empty")
    shown = run(*arguments, "--skip-unreadable")
    assert "left out, as they cannot be read: 1" in shown.stderr


def test_rival_is_evaluated_and_optimised(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rival = create_network("MobileNetV2", num_classes=2).eval()
    preprocessing = Preprocessing(input_size=32)
    save_network(tmp_path / "m", rival, name="MobileNetV2", class_names=CLASSES, preprocessing=preprocessing)
    arguments = ("--data", data, "--checkpoint", tmp_path / "m")
    plain, folded = load(*arguments), load(*arguments, "--engine", "eager")
    assert (plain["model"], plain["num_images"]) == ("MobileNetV2", 9)
    assert folded["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_engine_and_precision_are_taken(small: Path, data: Path) -> None:
    if reason := explain_engine("openvino"):
        pytest.skip(reason)
    arguments = ("--data", data, "--checkpoint", small)
    plain, fast = load(*arguments), load(*arguments, "--engine", "openvino", "--size", 32, "--batch-size", 4)
    assert (plain["engine"], fast["engine"], fast["precision"]) == (None, "openvino", "fp32")
    assert fast["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    larger = load(*arguments, "--engine", "eager", "--size", 64)
    assert larger["input_size"] == 64
    error = run(*arguments, "--precision", "bf16").exception
    assert str(error).startswith("precision=bf16 needs an engine")


def test_auto_names_the_engine_that_ran_and_why(
    small: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fasternet.deploy.auto.CANDIDATES", ("eager",))
    result = run("--data", data, "--checkpoint", small, "--engine", "auto", "--json")
    assert json.loads(result.stdout)["engine"] == "eager"
    assert "engine auto: eager takes" in result.stderr
    assert "; prepared in " in result.stderr


def test_imagenet_weights_take_imagenets_layouts(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", 1000, None, input_size=32)
    synsets = ImageNetInfo().label_names()
    generator = np.random.default_rng(1)
    for number in range(1, 6):
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        for folder in (tmp_path / "flat", tmp_path / "tree" / synsets[100 * number], tmp_path / f"v2/{100 * number}"):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"ILSVRC2012_val_{number:08}.png")
    lines = [f"ILSVRC2012_val_{number:08}.png {100 * number}" for number in range(1, 6)]
    (tmp_path / "val.txt").write_text("\n".join(lines))
    results = [
        load("--checkpoint", model, "--data", tmp_path / folder, *more)
        for folder, more in (("flat", ("--labels", tmp_path / "val.txt")), ("tree", ()), ("v2", ()))
    ]
    assert [(r["num_images"], r["loss"]) for r in results] == [(5, pytest.approx(results[0]["loss"]))] * 3
    assert [row["num_images"] for row in results[0]["per_class"]].count(1) == 5
    shown = run("--checkpoint", model, "--data", tmp_path / "flat", "--labels", "real")
    assert "ReaL: any label of a picture is right" in shown.stdout
    assert "worst of 1000 classes" in shown.stdout
    assert "top-5 %" in shown.stdout


def test_labels_of_pictures_in_folders_are_told_apart(small: Path, data: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / "nest" / name).mkdir(parents=True)
        picture = (data / "val" / name / "00.png").read_bytes()
        (tmp_path / "nest" / name / "1.png").write_bytes(picture)
    (tmp_path / "nest.txt").write_text("file label\nbright/1.png dark\ndark/1.png bright\n\n")
    document = load("--data", tmp_path / "nest", "--checkpoint", small, "--labels", tmp_path / "nest.txt")
    assert [row["num_images"] for row in document["per_class"]] == [1, 1]
    (tmp_path / "nest.txt").write_text("1.png dark\n")
    error = run("--data", tmp_path / "nest", "--checkpoint", small, "--labels", tmp_path / "nest.txt").exception
    assert "does not tell pictures bright/1.png and dark/1.png apart" in str(error)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_processes_share_the_pictures_and_one_speaks(small: Path, data: Path) -> None:
    arguments = ["eval", "--data", str(data), "--checkpoint", str(small), "--json", "--device", "cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fasternet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=180)
    assert result.returncode == 0, result.stderr
    shared, alone = json.loads(result.stdout), load("--data", data, "--checkpoint", small)
    assert shared["num_images"] == 9
    assert shared.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-5)
    for name in ("top1", "top5", "per_class", "confusion"):
        assert shared[name] == alone[name]
