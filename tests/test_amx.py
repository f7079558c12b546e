"""AMX's tile products, run by an emulation of the tiles: the algorithm is tested where the processor has none."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fasternet import native
from fasternet.native import Block, Feature, Head, Network, Patch

SOURCE = Path(native.__file__).parent / "csrc"
TOLERANCE = 2e-2
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the library whose tiles are emulated, and its self-check."""
    if shutil.which("cmake") is None or not SOURCE.is_dir():
        pytest.skip("cmake or the sources are missing")
    folder = tmp_path_factory.mktemp("amx")
    subprocess.run(["cmake", "-S", SOURCE, "-B", folder, "-DFASTERNET_EMULATE_AMX=ON"], check=True)
    subprocess.run(["cmake", "--build", folder, "--target", "fasternet", "fasternet_selfcheck"], check=True)
    return folder


@pytest.fixture
def emulated(built, monkeypatch):
    monkeypatch.setenv(native.LIBRARY_VARIABLE, str(built / "libfasternet.so"))
    if (reason := native.explain_native("amx", "bf16")) is not None:
        pytest.skip(f"even emulated, {reason}")
    return built


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape):
    """Weights that keep the scale of what they are applied to."""
    return (rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))).astype(np.float32)


def create_block(rng, c, cp, k, start, hidden, activation):
    weights = normal(rng, cp, cp, k, k), normal(rng, hidden, c), normal(rng, c, hidden)
    return Block(weights[0], weights[1], normal(rng, hidden), weights[2], normal(rng, c), start, activation)


def activate(x, kind):
    return F.gelu(x) if kind == "gelu" else F.relu(x)


def compute(layers, x):
    """What comes out at the end, in double precision; ``x`` (N, H, W, C)."""
    x = torch.from_numpy(x).double().permute(0, 3, 1, 2)
    for layer in layers:
        w = {name: torch.from_numpy(a).double() for name, a in vars(layer).items() if isinstance(a, np.ndarray)}
        match layer:
            case Patch():
                x = F.conv2d(x, w["weight"], w["bias"], stride=layer.weight.shape[2])
            case Block():
                y, end = x.clone(), layer.start + layer.partial.shape[0]
                y[:, layer.start : end] = F.conv2d(y[:, layer.start : end], w["partial"], padding="same")
                y = activate(F.conv2d(y, w["expand"][..., None, None], w["expand_bias"]), layer.activation)
                x = x + F.conv2d(y, w["project"][..., None, None], w["project_bias"])
            case Head():
                x = activate(F.linear(x.mean((2, 3)), w["weight"], w["bias"]), layer.activation)
                return F.linear(x, w["classifier"], w["classifier_bias"]).numpy()
    return x.permute(0, 2, 3, 1).numpy()


def check(layers, x):
    """Near to double precision; the same whatever the threads, and for a picture alone."""
    network = Network(layers, precision="bf16", isa="amx")
    (y,) = network.run(x, layout="NHWC")
    expected = compute(layers, x)
    assert np.abs(y - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert np.array_equal(y, network.run(x, layout="NHWC", threads=2)[0])
    assert np.array_equal(y[-1:], network.run(x[-1:], layout="NHWC", threads=3)[0])


def test_the_self_check_passes_and_covers_tiles(emulated):
    done = subprocess.run([emulated / "fasternet_selfcheck"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "amx bf16: " in done.stdout


def test_what_holds_of_every_instruction_set_holds_of_tiles(emulated):
    tests = Path(__file__).with_name("test_native.py")
    options = ("-q", "-k", "amx", "-p", "no:cacheprovider")
    done = subprocess.run([sys.executable, "-m", "pytest", tests, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("c", [10, 20, 36, 40, 48, 64, 80, 96, 160, 320])
@pytest.mark.parametrize(
    ("k", "h", "w", "n", "activation"),
    [(3, 7, 7, 3, "gelu"), (5, 13, 9, 1, "relu"), (1, 1, 1, 3, "relu"), (3, 1, 40, 1, "gelu")],
)
def test_blocks(emulated, rng, c, k, h, w, n, activation):
    cp = max(1, c // 4)
    x = rng.standard_normal((n, h, w, c), np.float32)
    for start in {0, (c - cp) // 2, c - cp}:
        block = create_block(rng, c, cp, k, start, 2 * c, activation)
        check([block, Feature(c)], x)


# Depths beyond what is gathered at a time, in one line of pixels and over several; steps that are read in place.
@pytest.mark.parametrize(
    ("c", "cp", "hidden", "h", "w"),
    [(180, 180, 1600, 7, 7), (192, 192, 96, 2, 70), (64, 32, 33, 3, 64), (64, 16, 1024, 5, 9)],
)
def test_deep_products(emulated, rng, c, cp, hidden, h, w):
    block = create_block(rng, c, cp, 3, 0, hidden, "gelu")
    check([block, Feature(c)], rng.standard_normal((1, h, w, c), np.float32))


@pytest.mark.parametrize("n", [1, 3, 5, 37])
@pytest.mark.parametrize("width", [10, 24, 40])
def test_pictures_to_logits(emulated, rng, n, width):
    twice = 2 * width
    layers = [
        Patch(normal(rng, width, 3, 4, 4), normal(rng, width)),
        create_block(rng, width, width // 4, 3, 0, twice, "gelu"),
        Patch(normal(rng, twice, width, 2, 2), normal(rng, twice)),
        Head(normal(rng, 72, twice), normal(rng, 72), normal(rng, 1000, 72), normal(rng, 1000), "gelu"),
    ]
    check(layers, rng.standard_normal((n, 29, 45, 3), np.float32))


# Weights of zero, and none beyond a pixel's channels: what is not finite stays with the pixels that read it.
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("c", [20, 40, 64])
def test_what_is_not_finite_stays_where_it_belongs(emulated, rng, value, c):
    block = create_block(rng, c, c // 4, 3, 0, 2 * c, "relu")
    network = Network([block, Feature(c)], precision="bf16", isa="amx")
    x = rng.standard_normal((1, 9, 11, c), np.float32)
    (clean,) = network.run(x)
    x[0, 4, 6, :] = value
    (y,) = network.run(x)
    reached = np.zeros((9, 11), bool)
    reached[3:6, 5:8] = True
    assert np.array_equal(y[0, ~reached], clean[0, ~reached])
    assert not np.isfinite(y[0, reached]).all(-1).any()


def test_the_peak_of_tiles_is_measured(emulated):
    assert native.measure_peak("amx", "bf16", 0.01) > 0
