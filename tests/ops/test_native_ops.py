"""The C++ engine's operators: against the oracle, with PyTorch's machinery around them, and what they refuse."""

import copy
import gc
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasternet import native
from fasternet.ops import PConv2d, list_impls, native_ops, pconv2d, select_impl
from fasternet.ops.block import BlockWeights, block_split_cat

needs_engine = pytest.mark.skipif(native.explain_native() is not None, reason=str(native.explain_native()))

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "none": lambda x: x}
FORMATS = (torch.contiguous_format, torch.channels_last)
SHAPES = (  # N, C, H, W, Cp, k, start
    (2, 16, 8, 8, 4, 3, 0),
    (1, 7, 5, 9, 1, 3, 6),
    (1, 6, 4, 3, 6, 3, 0),
    (3, 10, 1, 1, 2, 3, 5),
    (1, 40, 7, 7, 10, 5, 30),
    (2, 9, 13, 11, 2, 1, 3),
    (1, 36, 1, 17, 9, 3, 9),
    (1, 1, 3, 3, 1, 3, 0),
    (1, 160, 14, 14, 40, 3, 0),
)


def draw(n, c, h, w, cp, k, start, *, hidden=None, biases=True):
    hidden = hidden or 2 * c
    weights = BlockWeights(
        partial=torch.randn(cp, cp, k, k) / (cp * k * k) ** 0.5,
        expand=torch.randn(hidden, c, 1, 1) / c**0.5,
        expand_bias=torch.randn(hidden) if biases else None,
        project=torch.randn(c, hidden, 1, 1) / hidden**0.5,
        start=start,
        project_bias=torch.randn(c) if biases else None,
    )
    return torch.randn(n, c, h, w), weights


def call_block(x, w, activation="gelu"):
    return torch.ops.fasternet.block(
        x, w.partial, w.expand, w.expand_bias, w.project, w.project_bias, w.start, activation
    )


def relative_difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def bits(x):
    return x.contiguous().view(torch.int32)


class Block(nn.Module):
    """A module around the operator."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(w, requires_grad=False) for w in (weights.partial, weights.expand, weights.project)
        )

    def forward(self, x):
        partial, expand, project = self.weights
        return torch.ops.fasternet.block(x, partial, expand, None, project, None, 0, "relu") + 1


@needs_engine
@pytest.mark.parametrize("memory_format", FORMATS)
def test_block_equals_oracle(memory_format):
    for shape, activation, biases in itertools.product(SHAPES, ACTIVATIONS, (True, False)):
        x, weights = draw(*shape, biases=biases, hidden=None if biases else 3 * shape[1] + 1)
        x = x.to(memory_format=memory_format)
        before = x.clone()
        y = call_block(x, weights, activation)
        assert relative_difference(y, block_split_cat(x, weights, ACTIVATIONS[activation])) <= 1e-5, (shape, activation)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, before)


@needs_engine
@pytest.mark.parametrize("memory_format", FORMATS)
def test_pconv_equals_oracle_and_leaves_the_rest_bitwise(memory_format):
    for shape in SHAPES:
        x, weights = draw(*shape)
        x = x.to(memory_format=memory_format)
        before = x.clone()
        y = pconv2d(x, weights.partial, impl="native", start=weights.start)
        oracle = pconv2d(x, weights.partial, impl="split_cat", start=weights.start)
        assert relative_difference(y, oracle) <= 1e-5, shape
        rest = [i for i in range(shape[1]) if not shape[6] <= i < shape[6] + shape[4]]
        assert torch.equal(bits(y[:, rest]), bits(x[:, rest]))
        assert torch.equal(x, before)
        y.fill_(1)
        assert torch.equal(x, before)


@needs_engine
def test_operators_take_views_and_empty_batches():
    x, weights = draw(2, 12, 9, 8, 3, 3, 0)
    for view in (x[:, :, ::2, 1:], x[:1].expand(3, -1, -1, -1), x.transpose(2, 3), x.flip(0)[1:]):
        assert relative_difference(call_block(view, weights), block_split_cat(view, weights, F.gelu)) <= 1e-5
    assert call_block(x[:0], weights).shape == (0, 12, 9, 8)
    flat = weights._replace(expand=weights.expand.flatten(1), project=weights.project.flatten(1))
    assert torch.equal(call_block(x, flat), call_block(x, weights))


@needs_engine
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_operators_pass_on_what_is_not_finite(value):
    x, weights = draw(1, 16, 7, 7, 4, 3, 0)
    for channel in (1, 9):
        given = x.clone()
        given[0, channel, 3, 3] = value
        y, oracle = call_block(given, weights), block_split_cat(given, weights, F.gelu)
        torch.testing.assert_close(y, oracle, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert not oracle.isfinite().all()
        y = pconv2d(given, weights.partial, impl="native")
        torch.testing.assert_close(y, pconv2d(given, weights.partial), rtol=1e-4, atol=1e-5, equal_nan=True)


@needs_engine
def test_operators_pass_opcheck():
    for shape, memory_format in itertools.product(((2, 8, 5, 7, 2, 3, 1), (1, 1, 1, 3, 1, 3, 0)), FORMATS):
        x, w = draw(*shape)
        x = x.to(memory_format=memory_format)
        arguments = (x, w.partial, w.expand, w.expand_bias, w.project, None, w.start, "gelu")
        torch.library.opcheck(torch.ops.fasternet.block.default, arguments)
        torch.library.opcheck(torch.ops.fasternet.pconv.default, (x, w.partial, w.start))


@needs_engine
def test_operators_compile_in_one_graph():
    x, weights = draw(2, 16, 6, 5, 4, 3, 0)
    for module in (Block(weights), PConv2d(16, impl="native").requires_grad_(False)):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), module(x))
        with torch.no_grad():
            next(module.parameters()).mul_(2)
        assert torch.equal(compiled(x), module(x))


@needs_engine
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_operators_compile_with_inductor():
    x, weights = draw(2, 16, 6, 5, 4, 3, 0)
    module = nn.Sequential(Block(weights), nn.ReLU(), Block(weights))
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))


@needs_engine
def test_operators_export_with_a_free_size():
    x, weights = draw(2, 16, 6, 5, 4, 3, 0)
    size = {0: torch.export.Dim("n", min=1), 2: torch.export.Dim("h", min=1)}
    for module in (Block(weights), PConv2d(16, impl="native").requires_grad_(False)):
        program = torch.export.export(module, (x,), dynamic_shapes=(size,))
        y = torch.randn(3, 16, 9, 5)
        assert torch.equal(program.module()(y), module(y))
        assert any("fasternet" in str(node.target) for node in program.graph.nodes)


@needs_engine
def test_weights_are_packed_once_and_again_after_a_change(monkeypatch):
    packed = []
    network = native.Network
    monkeypatch.setattr(native, "Network", lambda *args, **options: packed.append(1) or network(*args, **options))
    x, weights = draw(1, 16, 6, 6, 4, 3, 0)

    def check(weights, num_packed):
        packed.clear()
        for _ in range(2):
            y = call_block(x, weights)
            assert relative_difference(y, block_split_cat(x, weights, F.gelu)) <= 1e-5
        assert len(packed) == num_packed

    check(weights, 1)
    for name in ("partial", "expand", "expand_bias", "project", "project_bias"):
        getattr(weights, name).mul_(2)
        check(weights, 1)
        check(weights._replace(**{name: getattr(weights, name) + 1}), 1)
    check(weights._replace(start=5), 1)
    check(weights, 0)
    weights.project.data = torch.randn(16, 32, 1, 1)
    check(weights, 1)
    with torch.inference_mode():
        check(weights, 0)
        check(weights._replace(project=weights.project.clone()), 2)  # no write to it would be counted


@needs_engine
def test_weights_of_a_reused_address_are_packed_anew():
    module, x = PConv2d(64, impl="native").requires_grad_(False), torch.randn(1, 64, 6, 6)
    for _ in range(5):
        module(x)
        module.bfloat16().float()  # frees the weight's memory; what comes back may lie at the same address
        assert relative_difference(module(x), pconv2d(x, module.weight)) <= 1e-5
        nn.init.normal_(module.weight)


@needs_engine
def test_copies_and_loaded_states_compute_with_their_own_weights():
    x, weights = draw(1, 16, 6, 6, 4, 3, 0)
    block = Block(weights)
    first = block(x)
    other = copy.deepcopy(block)
    with torch.no_grad():
        other.weights[1].neg_()
    assert torch.equal(block(x), first)
    assert not torch.equal(other(x), first)
    block.load_state_dict(other.state_dict())
    assert torch.equal(block(x), other(x))


@needs_engine
@pytest.mark.parametrize("name", ["partial", "project_bias"])
def test_packed_weights_end_with_any_of_the_weights(name):
    gc.collect()
    before = set(native_ops._packed)
    x, weights = draw(1, 16, 6, 6, 4, 3, 0)
    for _ in range(3):  # the others stay
        call_block(x, weights)
        (key,) = set(native_ops._packed) - before
        assert id(getattr(weights, name)) in key
        weights = weights._replace(**{name: getattr(weights, name) + 1})
        assert set(native_ops._packed) == before


@needs_engine
def test_threads_may_share_a_weight():
    x, weights = draw(1, 16, 6, 6, 4, 3, 0)
    expected, results = call_block(x, weights), []

    def run():
        results.extend(torch.equal(call_block(x, weights), expected) for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 80


def test_operators_refuse_with_the_argument_named():
    x, w = draw(1, 8, 4, 4, 2, 3, 0)
    refused = [
        (lambda: call_block(x[0], w), "x must have the shape"),
        (lambda: call_block(x.double(), w), "float64"),
        (lambda: pconv2d(x.bfloat16(), w.partial.bfloat16(), impl="native"), "bfloat16"),
        (lambda: pconv2d(x, w.partial, impl="native", dilation=2), "dilation, got 2"),
        (lambda: pconv2d(x, w.partial, impl="native", start=7), "7 to 9"),
        (lambda: pconv2d(x.to("meta"), w.partial, impl="native"), "meta"),
        (lambda: torch.ops.fasternet.pconv(x[0], w.partial, 0), "x must have the shape"),
        (lambda: call_block(x.to("meta"), w), "the CPU alone, got x on meta, partial on cpu"),
        (lambda: call_block(x, w._replace(project=w.project.to("meta"))), "got x on cpu, project on meta"),
    ]
    for call, match in refused:
        with pytest.raises(ValueError, match=match):
            call()


@needs_engine
def test_operators_refuse_weights_that_do_not_fit():
    x, w = draw(1, 8, 4, 4, 2, 3, 0)
    for changes, match in (
        ({"start": 7}, "start must be from 0 to 6, not 7|channels that it does not have"),
        ({"start": -1}, "start must be an integer from 0 to 8, not -1"),
        ({"partial": torch.randn(2, 2, 2, 2)}, "kernel_size"),
        ({"partial": torch.randn(3, 2, 3, 3)}, r"partial must be a float32 array .*, not float32 \(3, 2, 3, 3\)"),
        ({"expand_bias": torch.randn(15)}, r"expand_bias must be a float32 array \(16\), not float32 \(15,\)"),
        ({"project": torch.randn(8, 15, 1, 1)}, r"project must be a float32 array \(8, 16\)"),
        ({"expand": torch.randn(16, 8, 3, 3)}, "expand must be a matrix or the weight of a 1 x 1 convolution"),
        ({"project_bias": torch.randn(9)}, r"project_bias must be a float32 array \(8\)"),
    ):
        with pytest.raises(ValueError, match=match):
            call_block(x, w._replace(**changes))
    with pytest.raises(ValueError, match="activation"):
        call_block(x, w, "tanh")
    with pytest.raises(ValueError, match=r"takes weights of torch\.float32, but project is torch\.float16"):
        call_block(x, w._replace(project=w.project.half()))
    with pytest.raises(ValueError, match="8 channels"):
        call_block(x[:, :7], w)
    with pytest.raises(ValueError, match="8 channels"):
        call_block(x[:0, :7], w)
    with pytest.raises(ValueError, match=r"start must be from 0 to 6, not 7|channels that it does not have"):
        torch.ops.fasternet.pconv(x, w.partial, 7)


@pytest.mark.parametrize("which", ["x", "partial", "project"])
def test_operators_refuse_a_gradient(which):
    x, w = draw(1, 8, 4, 4, 2, 3, 0)
    (x if which == "x" else getattr(w, which)).requires_grad_()
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        call_block(x, w)
    compiled = torch.compile(lambda x: call_block(x, w), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="no gradient"):
        compiled(x)


@needs_engine
def test_operators_run_where_no_gradient_is_wanted():
    x, w = draw(1, 8, 4, 4, 2, 3, 0)
    expected = call_block(x, w)
    for tensor in (x, w.partial, w.expand):
        tensor.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(call_block(x, w), expected)


def test_operators_say_why_the_engine_cannot_run(monkeypatch):
    monkeypatch.setattr(native, "explain_native", lambda *_: "the C++ library was not built: no compiler was found")
    x, w = draw(1, 8, 4, 4, 2, 3, 0)
    for call in (lambda: call_block(x, w), lambda: pconv2d(x, w.partial, impl="native")):
        with pytest.raises(ValueError, match=r"^the C\+\+ library was not built: no compiler was found$"):
            call()


def test_native_is_an_implementation_by_name_only():
    assert "native" not in list_impls()
    assert select_impl("native").reason == "asked for"
    assert select_impl().impl == "split_cat"
    assert "impl=native" in repr(PConv2d(8, impl="native"))
    with pytest.raises(ValueError, match="slicing, native"):
        select_impl("magic")
