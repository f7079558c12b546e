"""The C++ engine against plain numpy in double precision, on every instruction set that this processor has."""

import ctypes
import itertools
import math
import re
import subprocess
import sys
import threading

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


def test_the_choice_of_an_instruction_set_has_its_reason(monkeypatch):
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    isa, reason = native.select_isa(None, "fp32")
    assert (isa, "fp32") in READY
    assert isa == [isa for isa, precision in READY if precision == "fp32"][-1]
    assert reason == "the fastest of this processor"
    assert native.select_isa("portable", "bf16") == ("portable", "asked for")
    monkeypatch.setenv(native.ISA_VARIABLE, "portable")
    assert native.select_isa(None, "fp32") == ("portable", "FASTERNET_CPU_ISA asks for it")
    assert Network([Head(np.ones((2, 3), np.float32))]).reason == "FASTERNET_CPU_ISA asks for it"
    assert native.select_isa(isa, "fp32") == (isa, "asked for")
    monkeypatch.setenv(native.ISA_VARIABLE, "sse9")
    with pytest.raises(ValueError, match=r"FASTERNET_CPU_ISA must be one of portable, .*, not 'sse9'"):
        native.explain_native()


def test_what_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    for isa, precision in itertools.product(native.ISAS, native.PRECISIONS):
        if (isa, precision) not in READY:
            reason = native.explain_native(isa, precision)
            assert reason
            with pytest.raises(ValueError, match=re.escape(reason)):
                Network([Head(np.ones((2, 3), np.float32))], isa=isa, precision=precision)
    assert native.explain_native("avx2", "bf16")
    hardware = any(isa != "portable" for isa, precision in READY if precision == "bf16")
    assert (native.explain_native(None, "bf16") is None) == hardware
    with pytest.raises(ValueError, match="isa must be one of portable"):
        native.select_isa("neon", "fp32")
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, not 'fp16'"):
        native.explain_native("portable", "fp16")


def test_the_peak_is_measured(monkeypatch):
    for isa, precision in READY:
        assert 1e7 < native.measure_peak(isa, precision, 0.01) < 1e13
    with pytest.raises(ValueError, match="seconds must be positive, not 0"):
        native.measure_peak("portable", "fp32", 0)


def test_a_missing_or_foreign_library_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv(native.LIBRARY_VARIABLE, str(tmp_path / "no.so"))
    with pytest.raises(ValueError, match=r"library .*no\.so, which FASTERNET_NATIVE_LIBRARY names, does not exist"):
        Network([Head(np.ones((2, 3), np.float32))])
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"nothing")
    monkeypatch.setenv(native.LIBRARY_VARIABLE, str(broken))
    assert "cannot be loaded" in (native.explain_native() or "")
    monkeypatch.delenv(native.LIBRARY_VARIABLE)
    monkeypatch.setattr(native, "_BUILT", tmp_path / "libfasternet.so")
    assert "was not built when fasternet was installed" in (native.explain_native() or "")


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ([], "must hold a Feature or a Head"),
        ([Patch(zeros(4, 3, 4, 4))], "must hold a Feature or a Head"),
        (["patch", Feature(4)], "must be some of Patch, Block, PartialConv, Feature, Head"),
        ([Patch(zeros(4, 3, 4, 4, dtype=np.float64)), Feature(4)], r"a Patch, weight .* \(out, C, k, k\), not float64"),
        ([Patch(zeros(4, 3, 4, 3)), Feature(4)], r"weight must be a float32 array"),
        ([Patch(zeros(4, 3, 4, 4), zeros(5)), Feature(4)], r"bias must be a float32 array \(4\), not float32 \(5,\)"),
        ([Patch(zeros(4, 3, 4, 4), mean=zeros(3)), Feature(4)], "both mean and std, or neither"),
        ([Patch(zeros(4, 3, 0, 0)), Feature(4)], "weight must be a float32 array"),
        (
            [Feature(3), Patch(zeros(4, 3, 2, 2), None, zeros(3), zeros(3)), Feature(4)],
            "no mean and std after the first",
        ),
        ([Patch(zeros(4, 3, 4, 4)), Feature(5)], "takes 5 channels, the one before gives 4"),
        ([Head(zeros(4, 3)), Feature(4)], "a head, which must be the last"),
        ([Head(zeros(4, 3), classifier_bias=zeros(4))], "no classifier_bias without a classifier"),
        ([Head(zeros(4, 3), activation="silu")], "activation must be one of none, relu, gelu, not 'silu'"),
        ([PartialConv(zeros(2, 2, 2, 2), 4), Feature(4)], "kernel_size of 2"),
        ([PartialConv(zeros(2, 3, 3, 3), 4), Feature(4)], r"weight must be a float32 array \(Cp, Cp, k, k\)"),
        ([PartialConv(zeros(2, 2, 3, 3), 4, 3), Feature(4)], "channels that it does not have"),
        ([PartialConv(zeros(2, 2, 3, 3), 4, -1), Feature(4)], "start must be an integer from 0 to 4, not -1"),
        ([PartialConv(zeros(2, 2, 3, 3), 4.0), Feature(4)], "channels must be an integer"),
        (
            [Block(zeros(2, 2, 3, 3), zeros(8, 4), None, zeros(8, 4)), Feature(4)],
            r"project .* \(4, 8\), not float32 \(8, 4\)",
        ),
        ([Block(None, zeros(8, 4), None, zeros(4, 8)), Feature(4)], "partial must be a float32 array .* not None"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layers, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        Network(layers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"x": [1]}, "x must be an array of four dimensions, not list"),
        ({"x": zeros(3, 16, 16)}, r"four dimensions, not float32 \(3, 16, 16\)"),
        ({"x": zeros(1, 3, 16, 16, dtype=np.float64)}, "x must be float32 or uint8, not float64"),
        ({"x": zeros(1, 4, 16, 16)}, "x must have 3 channels, not 4"),
        ({"x": zeros(1, 16, 16, 3)}, "x must have 3 channels, not 16 .* layout NCHW"),
        ({"x": zeros(0, 3, 16, 16)}, "the input is empty: 0 pictures of 16 x 16"),
        ({"x": zeros(1, 3, 7, 16)}, "too small"),
        ({"layout": "CHWN"}, "layout must be one of NCHW, NHWC, not 'CHWN'"),
        ({"threads": 0}, "threads must be an integer from 1 to 1024, not 0"),
        ({"threads": 1.5}, r"threads must be an integer .*, not 1\.5"),
        ({"out": []}, "out must hold 3 arrays, not 0"),
        (
            {"out": [zeros(1, 4, 4, 8), zeros(1, 2, 2, 16), zeros(1, 6)]},
            r"out\[2\] must be .* \(1, 5\), not float32 \(1, 6\)",
        ),
        ({"out": [zeros(1, 4, 4, 8), zeros(1, 2, 2, 16), zeros(1, 10)[:, ::2]]}, r"out\[2\] must be a contiguous"),
        ({"seconds": zeros(7)}, r"seconds must be a contiguous, writeable float64 array \(7,\), not float32"),
    ],
)
def test_arguments_of_run_that_do_not_fit_are_refused(rng, arguments, sentence):
    network = Network(create_network(rng))
    with pytest.raises(ValueError, match=sentence) as error:
        network.run(**{"x": zeros(1, 3, 16, 16), **arguments})
    assert "\n" not in str(error.value)


def test_uint8_needs_the_normalisation_and_maps_need_float32(rng):
    network = Network([Patch(zeros(4, 3, 4, 4)), Feature(4)])
    with pytest.raises(ValueError, match="uint8 pictures need the mean and std"):
        network.run(zeros(1, 3, 8, 8, dtype=np.uint8))
    with pytest.raises(ValueError, match="a map must be float32"):
        Network([Feature(4)]).run(zeros(1, 8, 8, 4, dtype=np.uint8))


def test_too_large_an_input_is_out_of_memory_in_one_sentence():
    network = Network([Patch(zeros(2048, 3, 1, 1)), Head(zeros(2, 2048))])
    out = zeros(1, 2)
    given = native._Input(out.ctypes.data, 0, 1, 1, 3, 2**23, 2**23)  # refused before a pixel is read
    pointers = (ctypes.c_void_p * 1)(out.ctypes.data)
    with pytest.raises(MemoryError, match="not enough memory"):
        native._check(network._library.fn_run, network._handle, ctypes.byref(given), pointers, 1, None)


def test_torch_is_not_imported():
    code = "import sys, fasternet.native; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
