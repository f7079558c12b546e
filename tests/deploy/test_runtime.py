"""create_runtime: every engine and precision against the eager network, and what it refuses."""

import copy
import importlib.util
import logging
import os
import random

import numpy as np
import pytest
import timm
import torch
import torch._dynamo
from torch import nn

from fasternet.deploy import ENGINES, create_runtime, explain_engine, onnx_file
from fasternet.environment import describe_machine
from fasternet.models import create_model
from fasternet.rivals import randomize_batch_norm

LIMITS = {"fp32": 1e-4, "bf16": 5e-2}


def create_fasternet():
    return create_model("fasternet_t0", width=8, depths=(1, 1, 1, 1), head_width=16, num_classes=10)


def create_convnet():
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 16, 3, groups=2), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


NETWORKS = {"fasternet": create_fasternet, "convnet": create_convnet}
TAKEN = {"cpu": ("fasternet",)}
OFFERED = {
    "eager": ("fp32", "bf16"),
    "compile": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "cpu": ("fp32", "bf16"),
    "auto": (),  # one of the others
}


def mark(engine, precision, network):
    is_slow = engine == "compile" or (precision == "int8" and (engine, network) != ("onnxruntime", "convnet"))
    name = f"{engine}-{precision}-{network}"
    return pytest.param(engine, precision, NETWORKS[network], id=name, marks=[pytest.mark.slow] * is_slow)


def prepare(create, num_images=3):
    """Return a network that a wrong fold would show, pictures, and its logits for them."""
    x = torch.randn(num_images, 3, 64, 48)
    model = create()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    randomize_batch_norm(model, torch.randn(8, 3, 64, 48))
    with torch.no_grad():
        return model, x, model.eval()(x)


def require(engine, precision="fp32"):
    if (reason := explain_engine(engine, precision)) is not None:
        pytest.skip(reason)


def differ(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize(
    ("engine", "precision", "create"),
    [
        mark(engine, precision, network)
        for engine in ENGINES
        for precision in OFFERED[engine]
        for network in TAKEN.get(engine, NETWORKS)
    ],
)
def test_engine_computes_the_networks_function(engine, precision, create):
    require(engine, precision)
    model, x, expected = prepare(create)
    state = copy.deepcopy(model.state_dict())
    model.train()
    kinds = [type(module) for module in model.modules()]
    seeds = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    runtime = create_runtime(model, x, engine=engine, precision=precision)
    assert torch.equal(torch.get_rng_state(), seeds[0])
    assert random.getstate() == seeds[1]
    assert str(np.random.get_state()) == seeds[2]  # noqa: NPY002
    assert all(module.training for module in model.modules())
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())

    assert (runtime.engine, runtime.precision) == (engine, precision)
    check_facts(runtime, model)
    with torch._dynamo.config.patch(error_on_recompile=True):  # what is compiled anew is slower, without constants
        check_calls(runtime, x, expected)


def check_calls(runtime, x, expected):
    precision = runtime.precision
    before = x.clone()
    for pictures in (x, x.to(memory_format=torch.channels_last), x.clone().requires_grad_(), torch.zeros_like(x) + x):
        output = runtime(pictures)
        assert (output.dtype, tuple(output.shape), output.requires_grad) == (torch.float32, (3, 10), False)
        if precision == "int8":
            assert output.isfinite().all()
            assert torch.corrcoef(torch.stack([output.flatten(), expected.flatten()]))[0, 1] > 0.9
        else:
            assert differ(output, expected) <= LIMITS[precision]
    with torch.inference_mode():
        assert torch.equal(runtime(x.clone()), output)
        assert torch.equal(runtime(x[:]), output)
    assert torch.equal(x, before)

    kept = output.clone()
    fewer = runtime(-x[1:])  # padded, with what must not reach these
    assert tuple(fewer.shape) == (2, 10)
    assert torch.equal(output, kept)  # no later call writes into it
    assert torch.allclose(fewer, runtime(-x)[1:], rtol=1e-3, atol=1e-3)


def check_facts(runtime, model):
    num_bytes = sum(parameter.numel() for parameter in model.parameters()) * (1 if runtime.precision == "int8" else 4)
    if runtime.engine in ("eager", "compile"):
        assert runtime.file_bytes is None
    else:
        assert num_bytes < runtime.file_bytes < num_bytes + 300_000
    assert 0 < runtime.load_s < 300
    assert runtime.num_images == 3
    assert ("precision" in runtime.reasons) == (runtime.precision == "int8")
    assert "folded" in runtime.reasons["norm"]


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("engine", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
def test_memory_format_keeps_the_function(engine, memory_format):
    require(engine)
    for create in NETWORKS.values():
        model, x, expected = prepare(create)
        assert differ(create_runtime(model, x, engine=engine, memory_format=memory_format)(x), expected) <= 1e-4


def test_cpu_engine_takes_its_threads_and_timms_fasternet():
    require("cpu")
    model, x, expected = prepare(lambda: timm.create_model("fasternet_t0", embed_dim=8, num_classes=10))
    runtime = create_runtime(model, x, engine="cpu", threads=torch.get_num_threads() + 1)
    assert differ(runtime(x), expected) <= 1e-5
    assert "C++" in runtime.reasons["engine"]


def test_timms_fasternet_and_networks_that_can_be_reparameterised_are_taken():
    for name in ("fasternet_t0", "repvit_m0_9"):
        model, x, expected = prepare(lambda name=name: timm.create_model(name), 1)
        runtime = create_runtime(model, x)
        assert differ(runtime(x), expected) <= 1e-4
        assert ("block" in runtime.reasons) == (name == "fasternet_t0")


@pytest.mark.slow
def test_compiled_networks_of_one_class_keep_their_own_weights_however_many_there_are():
    require("compile")
    made = [(create_runtime(model, x, engine="compile"), x, y) for model, x, y in (prepare(create_convnet, 1),) * 9]
    made += [(create_runtime(model, x, engine="compile"), x, y) for model, x, y in (prepare(create_convnet, 1),)]
    for runtime, x, expected in made:
        assert differ(runtime(x), expected) <= 1e-4


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(4, 3, 64, 48), r"shape \(1 to 3, 3, 64, 48\) on cpu, got torch.float32 \(4, 3, 64, 48\)"),
        (torch.zeros(0, 3, 64, 48), "1 to 3"),
        (torch.zeros(1, 3, 64, 64), r"\(1, 3, 64, 64\)"),
        (torch.zeros(1, 3, 64, 48, dtype=torch.float64), "torch.float64"),
    ],
)
def test_runtime_refuses_other_pictures(x, match):
    runtime = create_runtime(create_convnet(), torch.zeros(3, 3, 64, 48))
    with pytest.raises(ValueError, match=match):
        runtime(x)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"engine": "magic"}, "engine 'magic' is not one of eager, compile, onnxruntime, openvino"),
        ({"precision": "fp8"}, "precision 'fp8' is not one of fp32, bf16, int8"),
        ({"precision": "int8"}, "engine eager has no int8"),
        ({"engine": "onnxruntime", "precision": "bf16"}, "no bf16|pip install"),
        ({"memory_format": "nhwc"}, "memory_format 'nhwc' is not one of"),
        ({"engine": "auto", "memory_format": "channels_last"}, "memory_format=channels_last is for eager and compile"),
        ({"threads": 0}, "threads must be an integer from 1 to 1024, not 0"),
        ({"threads": torch.get_num_threads() + 1}, "set them with fasternet.environment.set_threads"),
        ({"example": torch.zeros(3, 64, 64)}, "example must be float32"),
        (
            {"example": torch.zeros(1, 4, 64, 64)},
            "engine eager cannot run this network in fp32: RuntimeError: .*channels",
        ),
        ({"engine": "cpu"}, r"it is a Sequential, and only a FasterNet runs whole in C\+\+: take eager, |library"),
        ({"model": create_model("fasternet_t0", width=8, norm="ln"), "engine": "cpu"}, "has no norm 'ln'|library"),
        ({"engine": "cpu", "precision": "int8"}, "engine cpu has no int8: it computes in fp32 or bf16"),
    ],
    ids=str,
)
def test_wrong_use_is_one_sentence(options, match):
    options = {"model": create_convnet(), "example": torch.zeros(1, 3, 64, 64)} | options
    with pytest.raises((ValueError, ModuleNotFoundError), match=match) as caught:
        create_runtime(options.pop("model"), options.pop("example"), **options)
    assert "\n" not in str(caught.value)


def test_explain_engine_names_what_is_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if name == "onnx" else None)
    sentence = explain_engine("onnxruntime")
    assert sentence.endswith("onnxruntime: pip install 'fasternet[onnxruntime]'")
    assert "nncf" in explain_engine("openvino", "int8")
    assert "nncf" not in explain_engine("openvino", "bf16")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fasternet\[openvino\]'"):
        create_runtime(create_convnet(), torch.zeros(1, 3, 64, 64), engine="openvino")


def test_explain_engine_names_the_hardware(monkeypatch):
    machine = describe_machine()
    for sets, ready in ((("avx2",), False), (("avx2", "amx_bf16"), True), (("avx512_bf16",), True)):
        changed = type(machine)(**{**vars(machine), "instruction_sets": sets, "processor": "Old One"})
        monkeypatch.setattr("fasternet.deploy.engines.describe_machine", lambda changed=changed: changed)
        assert (explain_engine("eager", "bf16") is None) == ready
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert explain_engine("eager", device="cuda") == "no CUDA device is visible to torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert explain_engine("eager", device="cuda") is None
    for engine in ("onnxruntime", "cpu"):
        assert "CPU alone" in explain_engine(engine, device="cuda")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "C++ compiler" in explain_engine("compile")
    with pytest.raises(ValueError, match="device 'tpu' is not one of cpu, cuda"):
        explain_engine("eager", device="tpu")


def test_explain_engine_says_of_auto_whether_there_is_one(monkeypatch):
    assert explain_engine("auto") is None
    assert (explain_engine("auto", "int8") is None) == (None in map(explain_engine, ENGINES[2:4], ["int8"] * 2))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert explain_engine("auto", "int8").startswith("engine auto finds none for int8 on cpu: eager, onnxruntime")


def test_explain_engine_says_why_the_library_cannot_run(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTERNET_NATIVE_LIBRARY", str(tmp_path / "none.so"))
    assert "none.so" in explain_engine("cpu")
    with pytest.raises(ValueError, match=r"none\.so"):
        create_runtime(create_fasternet(), torch.zeros(1, 3, 64, 64), engine="cpu")


def test_openvino_that_does_not_take_the_threads_is_refused():
    require("openvino")
    too_many = (os.cpu_count() or 1) + 1
    with pytest.raises(ValueError, match=f"INFERENCE_NUM_THREADS {too_many - 1} instead of {too_many}"):
        create_runtime(create_convnet(), torch.zeros(1, 3, 64, 64), engine="openvino", threads=too_many)


def test_openvino_sees_every_core_although_loaded_on_one():
    require("openvino")
    cores = os.sched_getaffinity(0)
    if len(cores) < 2 or len(cores) < (os.cpu_count() or 1):
        pytest.skip("this process has one core, or not all")
    onnx_file._open_openvino.cache_clear()
    model, x, expected = prepare(create_convnet)
    try:
        os.sched_setaffinity(0, {min(cores)})
        runtime = create_runtime(model, x, engine="openvino", threads=2)
        assert os.sched_getaffinity(0) == {min(cores)}
    finally:
        os.sched_setaffinity(0, cores)
    assert differ(runtime(x), expected) <= 1e-4


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_network_that_cannot_be_exported_is_one_sentence(engine, capfd, recwarn):
    require(engine)

    class Choosing(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(ValueError, match=f"engine {engine} cannot run this network in fp32: ") as caught:
        create_runtime(Choosing(*create_convnet()), torch.zeros(1, 3, 64, 64), engine=engine)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not recwarn


@pytest.mark.parametrize(("engine", "precision"), [("openvino", "int8"), ("onnxruntime", "int8")])
def test_building_is_silent(engine, precision, capfd, caplog):
    require(engine, precision)
    create_runtime(create_convnet(), torch.zeros(1, 3, 64, 64), engine=engine, precision=precision)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
