"""CpuEngine and CpuModule: what becomes of a network, inputs and outputs, what is refused; copies."""

import copy
import pickle
import threading

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from fasternet import native
from fasternet.deploy import (
    CpuEngine,
    CpuModule,
    cpu_engine,
    create_runtime,
    fold_batch_norm,
    optimize_for_inference,
    to_layers,
)
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
        (create, {"mean": (0.5, 0.5, 0.5)}, "std must hold 3 numbers above 0, one for each channel, not None"),
        (create, {"mean": 0.5, "std": 0.5}, "mean must hold 3 numbers from 0 to 1, one for each channel, not 0.5"),
        (create, {"mean": (123.7, 116.3, 103.5), "std": STD}, "mean must hold 3 numbers from 0 to 1"),
        (create, {"mean": MEAN, "std": (1, 1, 0)}, "std must hold 3 numbers above 0"),
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
    module(torch.zeros(2, 3, 32, 32))
    module.engine.threads = 4
    module.engine(np.zeros((1, 3, 32, 32), np.float32))
    assert seen == [3, 2, 4]
    assert module._bound is not None
    form, _, shapes = module._bound
    module._bound = form, lambda data, outputs, threads: seen.append(threads), shapes
    module(torch.ones(2, 3, 32, 32))
    assert seen[3:] == [2]


@needs_library
@pytest.mark.parametrize("options", [{}, {"features_only": True}])
def test_module_trusts_a_form_it_has_seen_and_no_other(options):
    module = optimize_for_inference(create(**options), engine="cpu", threads=1)
    images = torch.randn(4, 3, 64, 32)
    forms = images[:2], images[2:], images[:1], images.transpose(2, 3), images.to(memory_format=torch.channels_last)
    for x in [x for x in forms for _ in range(2)]:
        outputs, expected = module(x), module.engine(x.numpy())
        outputs, expected = (outputs, expected) if options else ([outputs], [expected])
        assert all(torch.equal(a, torch.from_numpy(b)) for a, b in zip(outputs, expected, strict=True))
    first = module(images)
    kept = copy.deepcopy(first)
    module(images + 1)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    with pytest.raises(ValueError, match="x must be a dense tensor on the CPU"):
        module(images.to_sparse())
    with pytest.raises(ValueError, match="x must be float32 or uint8"):
        module(images.double())


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
        ((1, 3, 31, 32), {}, r"H and W of at least 32, not the shape \(1, 3, 31, 32\) in the layout NCHW"),
        ((1, 1, 64, 64), {}, "x must have 3 channels, not 1"),
        ((3, 64, 64), {}, r"four dimensions, not float32 \(3, 64, 64\)"),
        ((1, 3, 64, 64), {"layout": "NHWC"}, "the layout NHWC"),
        ((1, 3, 64, 64), {"layout": "CHWN"}, "layout must be one of NCHW, NHWC, not 'CHWN'"),
        ((0, 3, 64, 64), {}, "0 pictures"),
        ((1, 3, 64, 64), {"threads": 0}, "threads must be an integer from 1 to 1024, not 0"),
        (np.zeros((1, 3, 64, 64), np.uint8), {}, "uint8 pictures need the mean and std"),
        (np.zeros((1, 3, 64, 64)), {}, "must be float32 or uint8, not float64"),
        (torch.zeros(1, 3, 64, 64), {}, "must be an array of four dimensions, not Tensor"),
        ([1.0], {}, "must be an array of four dimensions, not list"),
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
        (torch.zeros(1, 3, 64, 64, device="meta"), "on the CPU, not torch.strided on meta"),
        (torch.zeros(1, 3, 64, 64).to_sparse(), "dense tensor on the CPU, not torch.sparse_coo"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16), "float32 or uint8, not torch.bfloat16"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.float64), "not torch.float64"),
        (torch.zeros(0, 3, 64, 64), "0 pictures"),
        (np.zeros((1, 3, 64, 64), np.float32), "must be a tensor, not ndarray"),
    ],
)
def test_module_refuses_other_tensors(x, match):
    module = optimize_for_inference(create(), engine="cpu")
    with pytest.raises(ValueError, match=match):
        module(x)


def test_smallest_picture_is_the_networks():
    assert cpu_engine.MIN_INPUT_SIZE == MIN_INPUT_SIZE


@needs_library
def test_copies_keep_class_instruction_set_and_threads():
    class Own(CpuEngine):
        pass

    engine = Own.from_model(create(), isa="portable", threads=2)
    for other in (copy.copy(engine), copy.deepcopy(engine)):
        assert (type(other), other.isa, other.threads) == (Own, "portable", 2)
    other = pickle.loads(pickle.dumps(CpuEngine.from_model(create(), isa="portable")))
    assert other.reasons["isa"] == "portable: asked for"


@needs_library
@pytest.mark.parametrize("threads", [0, "2", 1.5, True, 2000])
def test_threads_are_checked_where_they_are_given(threads):
    module = optimize_for_inference(create(), engine="cpu")
    engine, x = module.engine, torch.zeros(1, 3, 32, 32)
    for give in (
        lambda: setattr(engine, "threads", threads),
        lambda: setattr(module, "threads", threads),
        lambda: CpuModule(engine, threads),
        lambda: engine(x.numpy(), threads=threads),
        lambda: CpuEngine.from_model(create(), threads=threads),
        lambda: create_runtime(create(), x, engine="cpu", threads=threads),
    ):
        with pytest.raises(ValueError, match=f"^threads must be an integer from 1 to 1024, not {threads!r}$"):
            give()


@needs_library
def test_engine_begins_with_pictures():
    for layers in ([], to_layers(create())[1:]):
        with pytest.raises(ValueError, match="layers must begin with a Patch"):
            CpuEngine(layers)
