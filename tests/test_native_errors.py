"""The C++ engine's edge: which code runs here, and what is refused, each in one sentence."""

import copy
import ctypes
import itertools
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

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


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def create_network():
    """Embedding, block, a map, merging, block, a map, head."""
    blocks = [Block(zeros(2, 2, 3, 3), zeros(2 * c, c), None, zeros(c, 2 * c)) for c in (8, 16)]
    merging, head = Patch(zeros(16, 8, 2, 2)), Head(zeros(24, 16), None, zeros(5, 24))
    return [Patch(zeros(8, 3, 4, 4)), blocks[0], Feature(8), merging, blocks[1], Feature(16), head]


def call(network, *, threads=1, h=8, w=8, n=1, c=3, dtype=0, layout=1):
    """Run past the checks of Python, with an input that the library must refuse before it reads a pixel."""
    out = zeros(1, 2)
    given = native._Input(out.ctypes.data, dtype, layout, n, c, h, w)
    pointers = (ctypes.c_void_p * 1)(out.ctypes.data)
    native._check(network._library.fn_run, network._handle, ctypes.byref(given), pointers, threads, None)


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
    sentence = "FASTERNET_CPU_ISA must be one of portable, avx2, avx512, avx512_bf16, amx, not 'sse9'"
    assert native.explain_native() == sentence
    assert native.explain_native("portable") is None
    with pytest.raises(ValueError, match=sentence):
        native.select_isa(None, "fp32")
    monkeypatch.setenv(native.ISA_VARIABLE, "amx")
    assert native.explain_native() == (
        "engine cpu cannot compute in fp32 with instruction set amx, which FASTERNET_CPU_ISA asks for: "
        "it computes in bf16 alone"
    )


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
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(native.LIBRARY_VARIABLE, "broken.so")
    assert f"{broken}: " in (native.explain_native() or "")
    monkeypatch.delenv(native.LIBRARY_VARIABLE)
    monkeypatch.setattr(native, "_BUILT", tmp_path / "libfasternet.so")
    assert "was not built when fasternet was installed" in (native.explain_native() or "")


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
        ([PartialConv(zeros(2, 2, 2, 2), 4), Feature(4)], "layer 0 has kernel_size 2: it must be odd and from 1 to 63"),
        ([PartialConv(zeros(2, 3, 3, 3), 4), Feature(4)], r"weight must be a float32 array \(Cp, Cp, k, k\)"),
        ([PartialConv(zeros(2, 2, 3, 3), 4, 3), Feature(4)], "layer 0 partial_start must be from 0 to 2, not 3"),
        ([PartialConv(zeros(2, 2, 3, 3), 4, -1), Feature(4)], "start must be an integer from 0 to 4, not -1"),
        ([PartialConv(zeros(2, 2, 3, 3), 4.0), Feature(4)], "channels must be an integer"),
        ([PartialConv(zeros(2, 2, 3, 3), 2**20 + 1), Feature(4)], "channels must be an integer from 1 to 1048576"),
        ([Head(zeros(2**20 + 1, 1))], r"weight must have sizes from 1 to 1048576, not float32 \(1048577, 1\)"),
        (
            [Patch(zeros(4, 3, 22, 22)), Feature(4)],
            "layer 0 has kernel_size 22 and 3 channels: their product may be 64",
        ),
        ([Feature(3), Patch(zeros(4, 3, 9, 9)), Feature(4)], "9 and 3 channels, not a multiple of 8: the square"),
        ([Feature(8), Patch(zeros(4, 8, 65, 65)), Feature(4)], "layer 1 kernel_size must be from 1 to 64, not 65"),
        ([Patch(zeros(4, 3, 2, 2), None, zeros(3), zeros(3)), Feature(4)], r"std must be positive, not 0\.0"),
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
        ({"seconds": zeros(7)}, r"seconds must be a contiguous, aligned, writeable float64 array \(7,\), not float32"),
    ],
)
def test_arguments_of_run_that_do_not_fit_are_refused(arguments, sentence):
    network = Network(create_network())
    with pytest.raises(ValueError, match=sentence) as error:
        network.run(**{"x": zeros(1, 3, 16, 16), **arguments})
    assert "\n" not in str(error.value)


def test_uint8_needs_the_normalisation_and_maps_need_float32():
    network = Network([Patch(zeros(4, 3, 4, 4)), Feature(4)])
    with pytest.raises(ValueError, match="uint8 pictures need the mean and std"):
        network.run(zeros(1, 3, 8, 8, dtype=np.uint8))
    with pytest.raises(ValueError, match="a map must be float32"):
        Network([Feature(4)]).run(zeros(1, 8, 8, 4, dtype=np.uint8))


def test_too_large_an_input_is_out_of_memory_in_one_sentence():
    network = Network([Patch(zeros(2**16, 3, 1, 1)), Head(zeros(2, 2**16))])
    for h, n in ((2**23, 1), (2**24, 1), (2**24, 2**31)):  # the second is 2^66 bytes: zero, once they overflow
        with pytest.raises(MemoryError, match="not enough memory"):
            call(network, h=h, w=h, n=n)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"h": 2**24 + 1}, "at most 2^24 pixels on a side and 2^31 pictures, not 1 pictures of 16777217 x 8"),
        ({"dtype": 7}, "unknown dtype 7 or layout 1"),
        ({"layout": 2}, "unknown dtype 0 or layout 2"),
        ({"c": 4}, "the input must have 3 channels, not 4"),
        ({"threads": 1025}, "threads must be from 1 to 1024, not 1025"),
    ],
)
def test_the_library_itself_refuses_what_does_not_fit(arguments, sentence):
    network = Network([Patch(zeros(4, 3, 1, 1)), Head(zeros(2, 4))])
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call(network, **arguments)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"kind": 9}, "layer 0 kind must be from 0 to 4, not 9"),
        ({"kind": 3, "out_channels": 9}, "layer 0 must have out_channels equal to its in_channels, 8, not 9"),
        ({"kind": 2, "out_channels": 7}, "layer 0 must have out_channels equal to its in_channels, 8, not 7"),
        ({"kind": 1, "out_channels": 2**20}, "out_channels equal to its in_channels, 8, not 1048576"),
        ({"kind": 4}, "no second weight: its out_channels must equal its hidden_channels, 16, not be 8"),
        ({"kind": 4, "hidden_channels": 0}, "layer 0 hidden_channels must be from 1 to 1048576, not 0"),
        ({"kind": 2, "partial_channels": 9}, "layer 0 partial_channels must be from 1 to 8, not 9"),
        ({"kind": 2}, "layer 0 lacks weight[0]"),
        ({"kind": 0, "activation": -1}, "layer 0 activation must be from 0 to 2, not -1"),
        ({"kind": 0, "in_channels": 2**20 + 1}, "layer 0 in_channels must be from 1 to 1048576, not 1048577"),
    ],
)
def test_the_library_itself_refuses_layers_that_do_not_fit(fields, sentence):
    sizes = {"in_channels": 8, "out_channels": 8, "hidden_channels": 16, "kernel_size": 3, "partial_channels": 2}
    layer, handle = native._Layer(**{**sizes, **fields}), ctypes.c_void_p()
    given = ctypes.byref(layer), 1, b"portable", b"fp32", ctypes.byref(handle)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        native._check(native._library().fn_create, *given)
    assert handle.value is None


def test_results_must_not_lie_in_the_input():
    memory = zeros(2, 4, 4, 8)
    network = Network([Feature(8)])
    network.run(memory[:1], out=[memory[1:]])
    with pytest.raises(ValueError, match="out must not share memory with x"):
        network.run(memory[:1], out=[memory[:1]])


def test_memory_that_is_not_aligned_is_copied_or_refused():
    x = np.arange(128, dtype=np.float32).reshape(1, 4, 4, 8)
    crooked = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    crooked[:] = x
    assert not crooked.flags.aligned
    network = Network([Feature(8)])
    assert np.array_equal(network.run(crooked)[0], x)
    with pytest.raises(ValueError, match=r"out\[0\] must be a contiguous, aligned, writeable float32"):
        network.run(x, out=[crooked])


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_networks_cannot_be_copied(make):
    with pytest.raises(TypeError, match="a Network cannot be copied or pickled: make another from the same layers"):
        make(Network([Feature(8)]))


def test_a_forked_child_has_threads_of_its_own():
    code = (
        "import os, numpy as np; from fasternet.native import Feature, Network\n"
        "x = np.ones((5, 4, 4, 8), np.float32); Network([Feature(8)]).run(x, threads=3)\n"
        "if (child := os.fork()) == 0: os._exit(int(Network([Feature(8)]).run(x, threads=3)[0].sum() != x.sum()))\n"
        "print(os.waitpid(child, 0)[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "0\n"


def test_torch_is_not_imported():
    code = "import sys, fasternet.native; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
