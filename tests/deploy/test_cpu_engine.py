"""CpuEngine and CpuModule: what becomes of a network, the file, inputs and outputs, what is refused."""

import copy
import json
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import timm
import torch
import torch.nn.functional as F
from torch import nn

from fasternet import native
from fasternet.deploy import CpuEngine, CpuModule, cpu_engine, fold_batch_norm, optimize_for_inference, to_layers
from fasternet.models import create_model
from fasternet.models.fasternet import MIN_INPUT_SIZE
from fasternet.rivals import randomize_batch_norm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}
MISSING = native.explain_native()
needs_library = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def create(**options):
    """Return a narrow network whose BN has statistics that a wrong fold would show."""
    options = {"width": 8, "depths": (1, 1, 1, 1), "head_width": 16, "num_classes": 5} | options
    return prepare(create_model("fasternet_t0", **options), options.get("in_chans", 3))


def prepare(model, channels=3):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return randomize_batch_norm(model, torch.randn(4, channels, 64, 64)).eval()


def differ(a, b):
    return ((torch.as_tensor(a) - b).abs().max() / b.abs().max()).item()


def run_layers(layers, x):
    """Compute layers as ``native`` describes them, in double precision: what the library has to do."""
    outputs = []
    for layer in layers:
        fields = {name: torch.tensor(v).double() for name, v in vars(layer).items() if isinstance(v, np.ndarray)}
        get = fields.get
        if isinstance(layer, native.Patch):
            x = F.conv2d(x, get("weight"), get("bias"), stride=layer.weight.shape[-1])
        elif isinstance(layer, native.Block):
            part, y = slice(layer.start, layer.start + len(layer.partial)), x.clone()
            y[:, part] = F.conv2d(x[:, part], get("partial"), padding=layer.partial.shape[-1] // 2)
            y = ACTIVATIONS[layer.activation](F.conv2d(y, get("expand")[..., None, None], get("expand_bias")))
            x = x + F.conv2d(y, get("project")[..., None, None], get("project_bias"))
        elif isinstance(layer, native.Feature):
            scale, shift = fields.get("scale", torch.ones(())), fields.get("shift", torch.zeros(()))
            outputs.append(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
        else:
            x = ACTIVATIONS[layer.activation](F.linear(x.mean((2, 3)), get("weight"), get("bias")))
            outputs.append(x if layer.classifier is None else F.linear(x, get("classifier"), get("classifier_bias")))
    return outputs


CONFIGURATIONS = [
    {},
    {"activation": "relu", "depths": (2, 1, 3, 1)},
    {"layer_scale": 0.5},
    {"position": "rotate", "depths": (1, 2, 4, 5)},
    {"position": "last", "partial_ratio": 0.5, "mlp_ratio": 3.0},
    {"partial_ratio": 1.0, "kernel_size": 5, "in_chans": 1},
    {"kernel_size": 1, "width": 10, "partial_ratio": 0.3},
    {"num_classes": 0},
    {"features_only": True},
    {"features_only": True, "feature_norm": True, "out_indices": (0, 2)},
]


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_layers_and_engine_compute_the_networks_function(options):
    model = create(**options)
    x = torch.randn(2, options.get("in_chans", 3), 65, 48)
    with torch.no_grad():
        expected = model(x)
        exact = copy.deepcopy(model).double()(x.double())
    found = run_layers(to_layers(model), x.double())
    maps = exact if isinstance(exact, list) else [exact]
    for a, b in zip(found, maps, strict=True):
        assert differ(a, b) <= 2e-6  # the weights are float32
    if MISSING is None:
        check_outputs(optimize_for_inference(model, engine="cpu")(x), expected)


def check_outputs(found, expected, limit=1e-5):
    assert isinstance(found, list) == isinstance(expected, list)
    for a, b in zip(*((found, expected) if isinstance(found, list) else ([found], [expected])), strict=True):
        assert (a.shape, a.dtype, a.requires_grad) == (b.shape, torch.float32, False)
        assert differ(a, b) <= limit


def test_layers_behind_the_last_map_are_left_out():
    layers = to_layers(create(features_only=True, out_indices=(0, 1)))
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == ["Patch", "Block", "Feature", "Patch", "Block", "Feature"]
    assert all(
        array.dtype == np.float32 for layer in layers for array in vars(layer).values() if hasattr(array, "dtype")
    )


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 5, "layer_scale_init_value": 0.3},
        {"num_classes": 0, "act_layer": nn.GELU},
        {"features_only": True},
        {"features_only": True, "out_indices": (1, 2)},
    ],
    ids=str,
)
def test_timms_networks_are_taken(options):
    model = prepare(timm.create_model("fasternet_t0", embed_dim=8, depths=(1, 2, 1, 1), feature_dim=16, **options))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    found = [output.float() for output in run_layers(to_layers(model), x.double())]
    check_outputs(found if isinstance(expected, list) else found[0], expected, 2e-5)
    check_outputs(optimize_for_inference(model)(x), expected, 2e-5)


def test_folded_networks_and_other_precisions_are_taken_and_left_alone():
    model = create()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    folded = fold_batch_norm(model, x)
    assert differ(run_layers(to_layers(folded), x.double())[0], expected) <= 1e-5
    state = copy.deepcopy(model.state_dict())
    for array in vars(to_layers(model.train())[1]).values():
        if isinstance(array, np.ndarray):
            array += 1  # of its own memory
    assert model.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert differ(run_layers(to_layers(model.double()), x.double())[0], expected) <= 1e-5


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        (lambda: create(norm="ln"), {}, "has no norm 'ln'.*take another engine"),
        (lambda: nn.Linear(2, 2), {}, "model must be a FasterNet of this package or of timm, got Linear"),
        (lambda: timm.create_model("resnet18", features_only=True), {}, "got FeatureListNet"),
        (lambda: optimize_for_inference(create()), {}, "optimised for eager already"),
        (create, {"mean": (0.5, 0.5, 0.5)}, "std must hold 3 finite numbers, one for each channel, got None"),
        (create, {"mean": (0.5,), "std": (0.5,)}, "mean must hold 3 finite numbers"),
        (create, {"mean": MEAN, "std": (1, 1, 0)}, "std must be positive"),
    ],
)
def test_what_cannot_become_layers_is_one_sentence(model, options, match):
    with pytest.raises(ValueError, match=match) as caught:
        to_layers(model(), **options)
    assert "\n" not in str(caught.value)


@needs_library
def test_engine_takes_every_memory_order():
    model = create()
    engine = CpuEngine.from_model(model)
    x = torch.randn(3, 3, 64, 48)
    with torch.no_grad():
        expected = model(x)
    pictures = np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())
    arrays = (x.numpy(), pictures.transpose(0, 3, 1, 2), np.repeat(x.numpy(), 2, 0)[::2])
    outputs = [*map(engine, arrays), engine(pictures, layout="NHWC"), engine(x.numpy(), threads=2)]
    assert all(differ(output, expected) <= 1e-5 for output in outputs)
    kept = outputs[0].copy()
    engine(-x.numpy())
    assert np.array_equal(outputs[0], kept)  # memory of its own


@needs_library
def test_maps_are_channels_last_and_module_takes_tensors_as_they_are():
    model = create(features_only=True)
    module = optimize_for_inference(model, engine="cpu", threads=2)
    assert isinstance(module, CpuModule)
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    with torch.no_grad():
        expected = model(x)
    for pictures in (x, x.detach().to(memory_format=torch.channels_last), torch.cat([x, x], 3)[..., :64]):
        check_outputs(module(pictures), expected)
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in module(x))
    with torch.inference_mode():
        check_outputs(module(x.detach().clone()), expected)
    assert list(module.parameters()) == []
    check_outputs(copy.deepcopy(module)(x), expected)
    check_outputs(pickle.loads(pickle.dumps(module))(x), expected)


@needs_library
def test_module_takes_pytorchs_threads_of_the_moment(monkeypatch):
    module = optimize_for_inference(create(), engine="cpu")
    run, seen = native.Network.run, []
    monkeypatch.setattr(native.Network, "run", lambda *args, **rest: seen.append(rest["threads"]) or run(*args, **rest))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    module(torch.zeros(1, 3, 32, 32))
    module.threads = 2
    module(torch.zeros(1, 3, 32, 32))
    module.engine.threads = 4
    module.engine(np.zeros((1, 3, 32, 32), np.float32))
    assert seen == [3, 2, 4]


@needs_library
def test_uint8_pictures_are_normalised_on_the_way_in():
    model = create()
    engine = CpuEngine.from_model(model, mean=MEAN, std=STD)
    x = torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8)
    normalised = (x / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = model(normalised)
    assert differ(engine(x.numpy()), expected) <= 1e-5
    assert differ(engine(x.permute(0, 2, 3, 1).contiguous().numpy(), layout="NHWC"), expected) <= 1e-5
    assert differ(engine(normalised.numpy()), expected) <= 1e-5  # float pictures are normalised by the caller
    assert differ(CpuModule(engine)(x), expected) <= 1e-5


@needs_library
def test_one_engine_serves_several_threads():
    engine = CpuEngine.from_model(create())
    pictures = [np.random.default_rng(i).standard_normal((1 + i, 3, 32 + 8 * i, 48), np.float32) for i in range(4)]
    expected = [engine(x) for x in pictures]
    right = []

    def work(x, y):
        right.extend(np.array_equal(engine(x), y) for _ in range(20))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(pictures, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 80


@needs_library
@pytest.mark.parametrize(
    ("x", "options", "match"),
    [
        ((1, 3, 31, 32), {}, r"shape \(N, 3, H, W\) with H and W of at least 32, got \(1, 3, 31, 32\)"),
        ((1, 1, 64, 64), {}, r"\(N, 3, H, W\)"),
        ((3, 64, 64), {}, r"got \(3, 64, 64\)"),
        ((1, 3, 64, 64), {"layout": "NHWC"}, r"\(N, H, W, 3\)"),
        ((1, 3, 64, 64), {"layout": "CHWN"}, "layout 'CHWN' is not one of NCHW, NHWC"),
        ((0, 3, 64, 64), {}, "at least one picture"),
        ((1, 3, 64, 64), {"threads": 0}, "threads must be an integer from 1 to 1024, not 0"),
        (np.zeros((1, 3, 64, 64), np.uint8), {}, "uint8, but the engine has no mean and std"),
        (np.zeros((1, 3, 64, 64)), {}, "must be float32, .*got float64"),
    ],
)
def test_engine_refuses_other_pictures(x, options, match):
    engine = CpuEngine.from_model(create())
    with pytest.raises(ValueError, match=match) as caught:
        engine(np.zeros(x, np.float32) if isinstance(x, tuple) else x, **options)
    assert "\n" not in str(caught.value)


@needs_library
@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(1, 3, 64, 64, device="meta"), "on the CPU, got torch.strided on meta"),
        (torch.zeros(1, 3, 64, 64).to_sparse(), "dense tensor on the CPU, got torch.sparse_coo"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16), "float32, .*got torch.bfloat16"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.float64), "got torch.float64"),
        (torch.zeros(0, 3, 64, 64), "at least one picture"),
    ],
)
def test_module_refuses_other_tensors(x, match):
    module = optimize_for_inference(create(), engine="cpu")
    with pytest.raises(ValueError, match=match):
        module(x)


def test_smallest_picture_is_the_networks():
    assert cpu_engine.MIN_INPUT_SIZE == MIN_INPUT_SIZE


@pytest.fixture
def saved(tmp_path):
    engine = CpuEngine.from_model(create(), mean=MEAN, std=STD, class_names=["a", "b", "c", "d", "e"])
    path = tmp_path / "net.safetensors"
    engine.save(path)
    return engine, path


@needs_library
def test_saved_engine_is_the_same(saved):
    engine, path = saved
    loaded = CpuEngine.load(path)
    assert (loaded.class_names, loaded.precision, loaded.threads) == (("a", "b", "c", "d", "e"), "fp32", 1)
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
