"""The C++ engine against plain numpy in double precision, on every instruction set that this processor has."""

import itertools
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasternet import native
from fasternet.native import Block, Feature, Head, Network, PartialConv, Patch

pytestmark = pytest.mark.skipif(
    native.explain_native("portable") is not None, reason=f"no engine: {native.explain_native('portable')}"
)
READY = [
    (isa, precision)
    for isa, precision in itertools.product(native.ISAS, native.PRECISIONS)
    if native.explain_native(isa, precision) is None
]
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}
on_every_isa = pytest.mark.parametrize(("isa", "precision"), READY)
_erf = np.vectorize(math.erf, otypes=[np.float64])


def activate(x, kind):
    if kind == "gelu":
        return 0.5 * x * (1 + _erf(x / math.sqrt(2)))
    return np.maximum(x, 0) if kind == "relu" else x


def convolve(x, weight, stride, padding):
    """``x`` (N, H, W, C), ``weight`` (out, C, k, k)."""
    k = weight.shape[2]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (1, 2))[:, ::stride, ::stride]
    return np.einsum("nhwcij,ocij->nhwo", windows, weight.astype(np.float64))


def mix(x, weight, start):
    x, end = x.copy(), start + weight.shape[0]
    x[..., start:end] = convolve(x[..., start:end], weight, 1, weight.shape[2] // 2)
    return x


def linear(x, weight, bias):
    return x @ weight.T.astype(np.float64) + (0 if bias is None else bias)


def compute(layers, x, layout="NHWC"):
    """What the layers give for ``x``, in double precision."""
    outputs = []
    picture = x.dtype == np.uint8
    x = (x.transpose(0, 2, 3, 1) if layout == "NCHW" else x).astype(np.float64)
    if picture:
        x = (x / 255 - layers[0].mean) / layers[0].std
    for layer in layers:
        match layer:
            case Patch():
                x = convolve(x, layer.weight, layer.weight.shape[2], 0) + (0 if layer.bias is None else layer.bias)
            case Block():
                y = activate(
                    linear(mix(x, layer.partial, layer.start), layer.expand, layer.expand_bias), layer.activation
                )
                x = x + linear(y, layer.project, layer.project_bias)
            case PartialConv():
                x = mix(x, layer.weight, layer.start)
            case Feature():
                scale, shift = (1 if layer.scale is None else layer.scale), (0 if layer.shift is None else layer.shift)
                outputs.append(x * scale + shift)
            case Head():
                x = activate(linear(x.mean((1, 2)), layer.weight, layer.bias), layer.activation)
                outputs.append(x if layer.classifier is None else linear(x, layer.classifier, layer.classifier_bias))
    return outputs


def normal(rng, *shape):
    """Weights that keep the scale of what they are applied to."""
    return (rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))).astype(np.float32)


def create_block(rng, c, cp, k=3, start=0, hidden=None, activation="gelu", bias=True):
    hidden = hidden or 2 * c
    biases = (normal(rng, hidden), normal(rng, c)) if bias else (None, None)
    weights = normal(rng, cp, cp, k, k), normal(rng, hidden, c), normal(rng, c, hidden)
    return Block(weights[0], weights[1], biases[0], weights[2], biases[1], start, activation)


def create_network(rng, width=8, classes=5, colours=3, activation="gelu"):
    """Embedding, block, a map for the caller, merging, block, head: like a FasterNet of two stages."""
    twice = 2 * width
    return [
        Patch(
            normal(rng, width, colours, 4, 4),
            normal(rng, width),
            normal(rng, colours),
            1 + rng.random(colours, np.float32),
        ),
        create_block(rng, width, width // 4, activation=activation),
        Feature(width, normal(rng, width), normal(rng, width)),
        Patch(normal(rng, twice, width, 2, 2), normal(rng, twice)),
        create_block(rng, twice, twice // 4, activation=activation),
        Feature(twice),
        Head(
            normal(rng, 3 * width, twice),
            normal(rng, 3 * width),
            normal(rng, classes, 3 * width),
            normal(rng, classes),
            activation,
        ),
    ]


def measure_difference(outputs, expected):
    assert len(outputs) == len(expected)
    assert all(a.shape == b.shape and a.dtype == np.float32 for a, b in zip(outputs, expected, strict=True))
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(outputs, expected, strict=True))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def draw(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def test_the_portable_code_runs_everywhere_in_both_precisions():
    assert {("portable", "fp32"), ("portable", "bf16")} <= set(READY)


@on_every_isa
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize(
    ("c", "cp", "k", "start", "hidden"),
    [
        *((10, 2, 3, 0, None), (20, 5, 3, 0, None), (36, 9, 5, 27, 72), (48, 12, 3, 12, None), (16, 16, 3, 0, 40)),
        *((8, 1, 1, 7, 3), (40, 10, 3, 0, None), (7, 3, 3, 2, 9), (160, 40, 3, 0, 320), (1, 1, 3, 0, 1)),
    ],
)
def test_blocks(rng, isa, precision, activation, c, cp, k, start, hidden):
    layers = [create_block(rng, c, cp, k, start, hidden, activation, bias=c != 20), Feature(c)]
    x = draw(rng, 2, 7, 9, c)
    difference = measure_difference(Network(layers, precision=precision, isa=isa).run(x), compute(layers, x))
    assert difference <= TOLERANCES[precision]


@on_every_isa
@pytest.mark.parametrize(("c", "cp", "k", "start"), [(10, 2, 3, 0), (64, 16, 3, 48), (36, 9, 5, 10), (8, 8, 1, 0)])
def test_partial_convolutions_and_what_passes_through(rng, isa, precision, c, cp, k, start):
    layers = [PartialConv(normal(rng, cp, cp, k, k), c, start), Feature(c)]
    x = draw(rng, 3, 6, 5, c)
    (y,) = Network(layers, precision=precision, isa=isa).run(x)
    assert measure_difference([y], compute(layers, x)) <= TOLERANCES[precision]
    if precision == "fp32":
        untouched = np.r_[:start, start + cp : c]
        assert np.array_equal(y[..., untouched], x[..., untouched])


@on_every_isa
@pytest.mark.parametrize(("colours", "width", "k"), [(3, 40, 4), (1, 10, 2), (4, 36, 3), (3, 7, 1)])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_embeddings_take_every_form_of_picture(rng, isa, precision, colours, width, k, layout, dtype):
    mean, std = rng.random(colours, np.float32), 0.2 + rng.random(colours, np.float32)
    layers = [Patch(normal(rng, width, colours, k, k), normal(rng, width), mean, std), Feature(width)]
    shape = (2, colours, 13, 19) if layout == "NCHW" else (2, 13, 19, colours)
    x = draw(rng, *shape) if dtype == np.float32 else rng.integers(0, 256, shape, np.uint8)
    outputs = Network(layers, precision=precision, isa=isa).run(x, layout=layout)
    assert measure_difference(outputs, compute(layers, x, layout)) <= TOLERANCES[precision]


@on_every_isa
@pytest.mark.parametrize(("c", "out", "k"), [(10, 20, 2), (36, 72, 2), (48, 33, 3), (40, 80, 2)])
def test_mergings(rng, isa, precision, c, out, k):
    layers = [Patch(normal(rng, c, 3, 2, 2)), Patch(normal(rng, out, c, k, k), normal(rng, out)), Feature(out)]
    x = draw(rng, 2, 22, 18, 3)
    outputs = Network(layers, precision=precision, isa=isa).run(x, layout="NHWC")
    assert measure_difference(outputs, compute(layers, x)) <= TOLERANCES[precision]


@on_every_isa
@pytest.mark.parametrize("classifier", [False, True])
def test_heads(rng, isa, precision, classifier):
    last = (normal(rng, 17, 50), normal(rng, 17)) if classifier else (None, None)
    for activation, bias in (("relu", normal(rng, 50)), ("gelu", None)):
        layers = [Head(normal(rng, 50, 20), bias, *last, activation)]
        x = draw(rng, 5, 3, 2, 20)
        outputs = Network(layers, precision=precision, isa=isa).run(x)
        assert measure_difference(outputs, compute(layers, x)) <= TOLERANCES[precision]


@on_every_isa
def test_a_whole_network_does_not_depend_on_threads_batch_or_former_shapes(rng, isa, precision):
    layers = create_network(rng, width=20)
    network = Network(layers, precision=precision, isa=isa)
    for n, h, w in ((1, 64, 48), (5, 19, 33), (1, 8, 8), (3, 64, 48)):
        x = draw(rng, n, 3, h, w)
        outputs = network.run(x)
        assert measure_difference(outputs, compute(layers, x, "NCHW")) <= TOLERANCES[precision]
        for threads in (2, 3, 7):
            again = network.run(x, threads=threads)
            assert all(np.array_equal(a, b) for a, b in zip(outputs, again, strict=True)), threads
        alone = network.run(x[-1:])
        assert all(np.array_equal(a[-1:], b) for a, b in zip(outputs, alone, strict=True))


@on_every_isa
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_random_shapes(isa, precision, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    c, k = data.draw(st.integers(1, 70)), data.draw(st.sampled_from([1, 3, 5]))
    cp = data.draw(st.integers(1, c))
    start = data.draw(st.integers(0, c - cp))
    n, h, w = (data.draw(st.integers(1, 6)) for _ in "nhw")
    block = create_block(
        rng, c, cp, k, start, data.draw(st.integers(1, 90)), data.draw(st.sampled_from(["relu", "gelu"]))
    )
    layers = [block, Feature(c), create_block(rng, c, cp, k, start), Feature(c)]
    x = draw(rng, n, h, w, c)
    network = Network(layers, precision=precision, isa=isa)
    outputs = network.run(x, threads=data.draw(st.integers(1, 4)))
    for y, expected in zip(outputs, compute(layers, x), strict=True):
        scale = max(1, np.abs(x).max(), np.abs(expected).max())  # one lone value may have cancelled out
        assert np.abs(y - expected).max() <= 1.5 * TOLERANCES[precision] * scale


@on_every_isa
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_nan_and_infinity_come_out_where_they_should(rng, isa, precision, activation):
    block, conv = create_block(rng, 20, 5, activation=activation), PartialConv(normal(rng, 5, 5, 3, 3), 20)
    for values in ((np.nan, np.nan), (np.inf, -np.inf)):
        x = draw(rng, 1, 6, 6, 20)
        x[0, 1, 1, 2], x[0, 4, 4, 11] = values
        for layers in ([block, Feature(20)], [conv, Feature(20)]):
            (y,) = Network(layers, precision=precision, isa=isa).run(x)
            with np.errstate(invalid="ignore"):
                (expected,) = compute(layers, x)
            special = ~np.isfinite(expected)
            assert special.any()
            assert np.array_equal(special, ~np.isfinite(y))
            assert np.array_equal(y[special], expected[special].astype(np.float32), equal_nan=True)


def test_denormals_are_harmless(rng):
    block = create_block(rng, 20, 5)
    x = draw(rng, 1, 6, 6, 20) * np.float32(1e-41)
    (y,) = Network([block, Feature(20)]).run(x)
    assert measure_difference([y], compute([block, Feature(20)], x)) <= 1e-5


def test_the_input_and_the_weights_are_not_touched_and_weights_are_copied(rng):
    layers = create_network(rng)
    x = draw(rng, 2, 3, 16, 16)
    before, kept = x.copy(), [layer.weight.copy() for layer in layers if isinstance(layer, Patch)]
    network = Network(layers)
    expected = network.run(x)
    assert np.array_equal(x, before)
    assert all(np.array_equal(a.weight, b) for a, b in zip([layers[0], layers[3]], kept, strict=True))
    layers[0].weight[:] = np.nan
    assert all(np.array_equal(a, b) for a, b in zip(network.run(x), expected, strict=True))


def test_results_go_where_the_caller_says_and_arrays_may_be_views(rng):
    network = Network(create_network(rng))
    wide = draw(rng, 2, 3, 16, 32)
    expected = network.run(np.ascontiguousarray(wide[..., ::2]))
    out = [np.full_like(array, np.nan) for array in expected]
    seconds = np.full(7, -1.0)
    returned = network.run(wide[..., ::2], out=out, seconds=seconds)
    assert all(a is b for a, b in zip(returned, out, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(out, expected, strict=True))
    assert (seconds >= 0).all()
    assert 0 < seconds.sum() < 60
    assert network.num_bytes > sum(array.nbytes for array in out)


def test_networks_run_in_several_threads_at_once(rng):
    layers = [create_network(rng, width) for width in (8, 12, 16)]
    networks = [Network(each) for each in layers]
    pictures = [draw(rng, n, 3, 24, 24) for n in (1, 2, 3)]
    expected = [[network.run(x) for x in pictures] for network in networks]
    wrong = []

    def work(network, results):
        for _ in range(10):
            for x, outputs in zip(pictures, results, strict=True):
                again = network.run(x, threads=2)
                if not all(np.array_equal(a, b) for a, b in zip(again, outputs, strict=True)):
                    wrong.append(network)

    threads = [threading.Thread(target=work, args=pair) for pair in [*zip(networks, expected, strict=True)] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@on_every_isa
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_passes_mergings_and_is_gone_with_the_next_input(rng, isa, precision, value):
    """Channels that pad a map (10, 20 are no multiples of 8) weigh nothing, and infinity times nothing is NaN."""
    ones = [Patch(np.ones((10, 3, 2, 2), np.float32)), Patch(np.ones((20, 10, 2, 2), np.float32)), Feature(20)]
    network = Network(ones, precision=precision, isa=isa)
    x = draw(rng, 1, 3, 8, 8)
    (clean,) = network.run(x)
    x[0, 1, 5, 6] = value
    (y,) = network.run(x)
    assert np.array_equal(y[0, 1, 1], np.full(20, value), equal_nan=True)
    y[0, 1, 1] = clean[0, 1, 1]
    assert np.array_equal(y, clean)
    x[0, 1, 5, 6] = 0
    assert np.isfinite(network.run(x)[0]).all()


@on_every_isa
@pytest.mark.parametrize("c", [20, 24])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_map_may_be_given_before_the_first_block(rng, isa, precision, c, threads):
    layers = [Feature(c), create_block(rng, c, c // 4), Feature(c)]
    x = draw(rng, 4, 5, 7, c)
    outputs = Network(layers, precision=precision, isa=isa).run(x, threads=threads)
    assert measure_difference(outputs, compute(layers, x)) <= TOLERANCES[precision]


@pytest.mark.parametrize("c", [20, 24])
@pytest.mark.parametrize("isa", [isa for isa, precision in READY if precision == "fp32"])
def test_maps_come_out_bit_for_bit(rng, isa, c):
    x = draw(rng, 1, 3, 4, c)
    x[0, 0, 0, :5] = -0.0, 1e-41, -1e-45, np.inf, np.nan
    for y in Network([Feature(c), Feature(c)], isa=isa).run(x):
        assert np.array_equal(y.view(np.uint32), x.view(np.uint32))


@on_every_isa
def test_means_of_many_pixels_stay_exact(isa, precision):
    x = np.full((1, 1024, 1024, 4), 0.1, np.float32)
    eye = np.eye(4, dtype=np.float32)
    (y,) = Network([Head(eye, activation="none")], precision=precision, isa=isa).run(x)
    assert np.abs(y / 0.1 - 1).max() < {"fp32": 2e-5, "bf16": 5e-3}[precision]


def test_workers_run_where_their_caller_may(rng):
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one processor")
    network, x = Network(create_network(rng)), draw(rng, 1, 3, 16, 16)
    network.run(x, threads=2)
    every, one, tasks = os.sched_getaffinity(0), {min(os.sched_getaffinity(0))}, Path("/proc/self/task")

    def count(allowed):
        return sum(os.sched_getaffinity(int(task.name)) == allowed for task in tasks.iterdir())

    try:
        os.sched_setaffinity(0, one)
        network.run(x, threads=2)
        assert count(one) >= 2
    finally:
        os.sched_setaffinity(0, every)
    network.run(x, threads=2)
    assert count(one) == 0
