"""The CPU engine against the network that it stands for, in eager fp32 with BN: sizes, batches, instruction sets."""

import copy
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fasternet import native
from fasternet.data.datasets import create_datasets
from fasternet.deploy import CpuEngine
from fasternet.models import create_model, list_models
from fasternet.rivals import randomize_batch_norm

LIMITS = {"fp32": 1e-5, "bf16": 2e-2}
MISSING = native.explain_native()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

# Every instruction set of this processor in every precision; bf16 in portable code only because it is asked for.
WAYS = [
    (isa, precision)
    for isa, precision in itertools.product(native.ISAS, LIMITS)
    if MISSING is None and native.explain_native(isa, precision) is None
]
SIZES = [(32, 32), (33, 47), (64, 96), (36, 100), (160, 224), (129, 257), (224, 224), (512, 32), (512, 512)]
BATCHES = [1, 2, 3, 5, 8, 16, 17, 32, 33]
MOST_PIXELS = 33 * 224 * 224  # of a batch


def prepare(name="fasternet_t0", **options):
    """Return a network with BN statistics as training would leave them."""
    torch.manual_seed(0)
    model = create_model(name, **options)
    return randomize_batch_norm(model, torch.randn(4, 3, 96, 96)).eval()


def create_narrow(**options):
    return prepare(**{"width": 8, "depths": (1, 1, 2, 1), "head_width": 64, "num_classes": 100} | options)


def differ(a, b):
    return max(
        np.abs(x - y.numpy()).max() / np.abs(y.numpy()).max() for x, y in zip(to_list(a), to_list(b), strict=True)
    )


def to_list(outputs):
    return outputs if isinstance(outputs, list) else [outputs]


@torch.no_grad()
def check(model, engines, size, batch):
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))
    expected = model(x)
    assert all(output.isfinite().all() for output in to_list(expected))
    for engine in engines:
        assert differ(engine(x.numpy()), expected) <= LIMITS[engine.precision], (engine.isa, size, batch)


@pytest.mark.parametrize("precision", LIMITS)
def test_portable_code_and_what_the_processor_has_is_run(precision):
    assert ("portable", precision) in WAYS
    best = native.select_isa(None, "fp32")[0]
    assert (best, "fp32") in WAYS


@pytest.mark.parametrize(("isa", "precision"), WAYS)
@pytest.mark.parametrize("options", [{}, {"width": 20, "activation": "relu"}, {"features_only": True}], ids=str)
def test_narrow_network_at_many_sizes_and_batches(isa, precision, options):
    model = create_narrow(**options)
    engine = CpuEngine.from_model(model, precision=precision, isa=isa)
    for size, batch in [((32, 32), 1), ((33, 47), 3), ((64, 96), 2), ((129, 65), 1), ((36, 100), 5), ((32, 32), 33)]:
        check(model, [engine], size, batch)


@pytest.mark.parametrize(("isa", "precision"), WAYS)
def test_result_does_not_depend_on_threads_or_on_the_rest_of_the_batch(isa, precision):
    engine = CpuEngine.from_model(create_narrow(width=12, features_only=True), precision=precision, isa=isa)
    for batch in (1, 5):
        x = np.random.default_rng(0).standard_normal((batch, 3, 96, 72), np.float32)
        expected = engine(x)
        for threads in (2, 3, 7):
            assert all(map(np.array_equal, engine(x, threads=threads), expected))
        engine(x[:, :, :32, :32].copy())  # another shape between
        assert all(map(np.array_equal, engine(x), expected))


@pytest.mark.parametrize(("isa", "precision"), WAYS)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_out_where_pytorch_has_it(isa, precision, activation, value):
    maps = create_narrow(activation=activation, features_only=True, out_indices=(0, 1), feature_norm=True)
    logits = create_narrow(activation=activation)
    x = torch.randn(2, 3, 96, 96)
    x[1, 1, 40, 50] = value
    for model in (maps, logits):
        found = to_list(CpuEngine.from_model(model, precision=precision, isa=isa)(x.numpy()))
        with torch.no_grad():
            expected = [output.numpy() for output in to_list(model(x))]
        for a, b in zip(found, expected, strict=True):
            assert not np.isfinite(b[1]).all()
            for kind in (np.isnan, np.isposinf, np.isneginf):
                assert (kind(a) == kind(b)).all()
            finite = np.isfinite(b)
            assert np.abs(a - b)[finite].max() <= LIMITS[precision] * np.abs(b[finite]).max()


@pytest.mark.parametrize(("isa", "precision"), WAYS)
def test_denormals_do_no_harm(isa, precision):
    model = create_narrow()
    x = torch.full((1, 3, 64, 64), 1e-40)
    with torch.no_grad():
        assert (
            differ(CpuEngine.from_model(model, precision=precision, isa=isa)(x.numpy()), model(x)) <= LIMITS[precision]
        )


def is_fast(isa):
    return isa != "portable"


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
def test_t0_at_every_size_and_batch(batch):
    model = prepare()
    engines = [CpuEngine.from_model(model, precision=p, isa=isa, threads=2) for isa, p in WAYS if is_fast(isa)]
    sizes = [size for size in SIZES if batch * size[0] * size[1] <= MOST_PIXELS]
    assert len(sizes) >= 8
    for size in sizes:
        check(model, engines, size, batch)


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
def test_narrow_network_at_every_size_and_batch(batch):
    model = create_narrow(width=20)
    engines = [CpuEngine.from_model(model, precision=p, isa=isa, threads=2) for isa, p in WAYS if is_fast(isa)]
    for size in SIZES:
        check(model, engines, size, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_variant_at_the_corners(name):
    model = prepare(name)
    for isa, precision in WAYS:
        engine = CpuEngine.from_model(model, precision=precision, isa=isa, threads=2)
        corners = [((32, 32), 3), ((65, 97), 1)]
        for size, batch in [*corners, ((224, 224), 2), ((512, 512), 1)] if is_fast(isa) else corners:
            check(model, [engine], size, batch)


def read_pictures(dataset, number):
    """Return evenly spread pictures, normalised, (N, 3, 32, 32), and their labels."""
    indices = range(0, len(dataset), len(dataset) // number)
    pixels = np.stack([np.asarray(dataset.load(index)) for index in indices])
    labels = torch.tensor([dataset.labels[index] for index in indices])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1, labels


def train(model, x, labels, epochs=6, batch=64):
    model.train()
    steps = epochs * len(x) // batch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,))
        loss = F.cross_entropy(model(x[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.mark.slow
def test_bf16_agrees_with_fp32_on_a_trained_network_at_least_as_often_as_pytorchs_own():
    folder = os.environ.get("FASTERNET_DATA")
    if not folder:
        pytest.skip("FASTERNET_DATA does not name a folder of real pictures")
    if reason := native.explain_native(precision="bf16"):
        pytest.skip(reason)
    datasets = create_datasets(Path(folder) / "cifar10")
    x, labels = read_pictures(datasets.validation, 10_000)
    assert len(x) == 10_000
    model = create_model("fasternet_t0", width=24, depths=(1, 1, 2, 1), head_width=128, num_classes=10)
    train(model, *read_pictures(datasets.train, 20_000))
    engine = CpuEngine.from_model(model, precision="bf16")
    own = copy.deepcopy(model).bfloat16()

    def classify(network):
        with torch.inference_mode():
            return torch.cat([network(batch).argmax(1) for batch in x.split(100)])

    expected = classify(model)
    accuracy = (expected == labels).float().mean().item()
    ours = (classify(lambda batch: torch.from_numpy(engine(batch.numpy()))) == expected).float().mean().item()
    theirs = (classify(lambda batch: own(batch.bfloat16())) == expected).float().mean().item()
    print(f"top-1 {accuracy:.4f}; agreement with fp32: engine {ours:.4f}, PyTorch's bf16 {theirs:.4f}")
    assert accuracy > 0.5
    assert ours >= theirs
