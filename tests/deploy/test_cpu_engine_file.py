"""The CpuEngine's file: the same engine afterwards, without torch; damage and forgery are one sentence."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from fasternet import native
from fasternet.deploy import CpuEngine, cpu_engine, optimize_for_inference
from fasternet.models import create_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MISSING = native.explain_native()
needs_library = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def create(**options):
    options = {"width": 8, "depths": (1, 1, 1, 1), "head_width": 16, "num_classes": 5} | options
    return create_model("fasternet_t0", **options).eval()


@pytest.fixture
def saved(tmp_path):
    engine = CpuEngine.from_model(create(), mean=MEAN, std=STD)
    path = tmp_path / "net.safetensors"
    engine.save(path)
    return engine, path


@needs_library
def test_saved_engine_is_the_same(saved):
    engine, path = saved
    loaded = CpuEngine.load(path)
    assert (loaded.precision, loaded.threads) == ("fp32", 1)
    for x in (np.random.default_rng(0).standard_normal((2, 3, 40, 64), np.float32), np.ones((1, 3, 32, 32), np.uint8)):
        assert np.array_equal(loaded(x), engine(x))
    assert loaded.num_bytes > 0
    engine.save(path)  # replaces it
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    maps = CpuEngine.from_model(create(features_only=True, feature_norm=True))
    maps.save(path)
    for a, b in zip(CpuEngine.load(path)(x / np.float32(2)), maps(x / np.float32(2)), strict=True):
        assert np.array_equal(a, b)


@needs_library
def test_loading_and_running_imports_no_torch(saved):
    engine, path = saved
    code = (
        "import sys, numpy as np; from fasternet.deploy import CpuEngine\n"
        f"y = CpuEngine.load({str(path)!r})(np.ones((1, 3, 32, 32), np.float32))\n"
        "print([name for name in ('torch', 'timm') if name in sys.modules], y.tobytes().hex())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("]")[0] == "["
    assert result.stdout.split()[-1] == engine(np.ones((1, 3, 32, 32), np.float32)).tobytes().hex()


def rewrite(path, change):
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    safetensors.numpy.save_file(tensors, path, metadata)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@needs_library
@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "truncated or no safetensors file"),
        (lambda path: path.write_bytes(b""), "truncated or no safetensors file"),
        (lambda path: path.write_bytes(b"PK" * 500), "truncated or no safetensors file"),
        (flip, "was altered after it was written"),
        (lambda path: rewrite(path, lambda meta, arrays: arrays.pop("000.bias")), "was altered"),
        (lambda path: rewrite(path, lambda meta, arrays: meta.update(engine=json.dumps({}))), "was altered"),
        (
            lambda path: rewrite(path, lambda meta, arrays: meta.update(version="2")),
            "version 2 of the engine file, not 1",
        ),
        (lambda path: rewrite(path, lambda meta, arrays: meta.clear()), "holds no CPU engine: CpuEngine.save"),
    ],
)
def test_damaged_files_are_one_sentence(saved, damage, match):
    _, path = saved
    damage(path)
    with pytest.raises(ValueError, match=match) as caught:
        CpuEngine.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def forge(path, change):
    """Describe other layers, under the right hash."""

    def rewritten(metadata, tensors):
        description = json.loads(metadata["engine"])
        change(description)
        metadata["engine"] = json.dumps(description)
        metadata["sha256"] = cpu_engine._hash(metadata["engine"], tensors)

    rewrite(path, rewritten)


@needs_library
@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["layers"][0].update(kind="pickle"),
        lambda d: d["layers"][0].update(more=1),
        lambda d: d["layers"][0].pop("kind"),
        lambda d: d.pop("precision"),
        lambda d: d.update(layers=[1]),
    ],
)
def test_forged_descriptions_are_one_sentence(saved, change):
    _, path = saved
    forge(path, change)
    with pytest.raises(ValueError, match="describes no layers that this version knows") as caught:
        CpuEngine.load(path)
    assert "\n" not in str(caught.value)


@needs_library
def test_whole_numbers_of_numpy_are_saved(saved):
    engine, path = saved
    layers = [dataclasses.replace(v, start=np.int64(6)) if isinstance(v, native.Block) else v for v in engine._layers]
    CpuEngine(layers).save(path)
    x = np.random.default_rng(0).standard_normal((1, 3, 64, 64), np.float32)
    assert np.array_equal(CpuEngine.load(path)(x), CpuEngine(layers)(x))
    assert not np.array_equal(CpuEngine.load(path)(x), engine(x))


@needs_library
def test_places_that_are_no_files_are_one_sentence(saved):
    engine, path = saved
    with pytest.raises(FileNotFoundError, match="no engine file at"):
        CpuEngine.load(path.with_name("other"))
    with pytest.raises(ValueError, match="is a directory"):
        CpuEngine.load(path.parent)
    with pytest.raises(FileNotFoundError, match="no folder"):
        engine.save(path.parent / "none" / "net.safetensors")


@needs_library
def test_instruction_set_and_precision_are_named_and_checked(saved, monkeypatch):
    engine, path = saved
    assert engine.reasons["isa"] == f"{engine.isa}: the fastest of this processor"
    assert CpuEngine.load(path, isa="portable").reasons["isa"] == "portable: asked for"
    assert CpuEngine.load(path, isa="portable", precision="bf16").precision == "bf16"
    monkeypatch.setenv(native.ISA_VARIABLE, "portable")
    assert CpuEngine.load(path).isa == "portable"
    with pytest.raises(ValueError, match="isa must be one of portable"):
        CpuEngine.load(path, isa="sse")
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16"):
        CpuEngine.from_model(create(), precision="int8")


def test_without_the_library_the_request_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv(native.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(ValueError, match=r"none\.so"):
        optimize_for_inference(create(), engine="cpu")
