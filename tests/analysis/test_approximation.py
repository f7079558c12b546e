"""Approximating convolutions (Table 2): who can compute what, and that the test part only tests."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fasternet.analysis import approximation
from fasternet.analysis.approximation import LEAST_SQUARES, OPERATORS, measure_approximation, split_pictures
from fasternet.analysis.fitting import Fit, LayerMap, evaluate, fit_operators, measure_scales
from fasternet.analysis.reference import Layer, Reference, hash_pictures
from fasternet.models.checkpoint import Preprocessing
from fasternet.ops import PConv2d
from fasternet.records import append_records, load_records
from fasternet.timing import silent

PCONV = "PConv + PWConv"
FEW = {"data": "noise", "operators": [PCONV, "DWConv + PWConv"], "epochs": 2, "batch_size": 16, "seeds": (0,)}


def _compose(pconv: nn.Conv2d, pwconv: nn.Conv2d, channels: int) -> torch.Tensor:
    """Return the kernel of a regular convolution that equals a PConv and the PWConv after it."""
    spatial = torch.zeros(channels, channels, 3, 3)
    spatial[:, :, 1, 1] = torch.eye(channels)
    spatial[: len(pconv), : len(pconv)] = pconv
    return torch.einsum("om,mihw->oihw", pwconv[:, :, 0, 0], spatial)


def _create_reference(*, norm=False, inplace=False, channels=16) -> Reference:
    """Make a network whose one 3x3 convolution is a PConv + PWConv; at 16 px its maps are 4x4."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    conv.weight.data = _compose(4 * PConv2d(channels).weight, nn.Conv2d(channels, channels, 1).weight, channels)
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, channels, 4, stride=4))
    model.add_module("conv", conv)
    if norm:
        model.add_module("bn", nn.BatchNorm2d(channels, eps=1e-12))
        model.bn.weight.data.fill_(2)
    model.add_module("act", nn.ReLU(inplace=inplace))
    preprocessing = Preprocessing(input_size=16, crop_ratio=1.0)
    return Reference(model.eval().requires_grad_(False), "tiny", "made", preprocessing)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(0)
    for index in range(60):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index:02}.png")
    return sorted(folder.iterdir())


def _values(records):
    return [record.values for record in records]


def test_the_operator_that_the_layer_is_fits_it_and_others_do_not():
    model, batches, one = _create_reference().model, _load_noise(12), torch.tensor(1.0)
    fits = [
        dataclasses.replace(_create_fit(build(16, 16, False), one), label=label) for label, build in OPERATORS.items()
    ]
    shown = {"track": silent, "description": ""}
    fit_operators(model, fits, batches, batches[:1], epochs=20, patience=20, lr=0.03, **shown)
    tested = evaluate(model, fits, _load_noise(1))
    error = {fit.label: errors.relative_mse for fit, errors in tested.items()}
    for label in (PCONV, "T-shaped", "PConv + PWConv r=1/2"):  # the other two contain it
        assert error[label] < 0.01, label
    for label in ("DWConv + PWConv", "GConv(16) + PWConv", "PConv + PWConv r=1/8"):
        assert error[label] > 0.05, label


def test_least_squares_is_below_what_training_reaches(pictures):
    options = {**FEW, "operators": [PCONV, LEAST_SQUARES], "epochs": 30, "patience": 30, "lr": 0.03}
    (_, exact) = measure_approximation(_create_reference(), pictures, **options)
    assert exact.values["relative_mse"] < 1e-9
    reference = _create_reference()
    nn.init.normal_(reference.model.conv.weight)
    trained, solved = (record.values for record in measure_approximation(reference, pictures, **options))
    assert 0.1 < solved["relative_mse"] < trained["relative_mse"]
    assert (solved["num_epochs"], solved["num_params"]) == (0, trained["num_params"])
    with pytest.raises(ValueError, match=r"operator 'PConv \+ PWConv \(least squares\)' is not one of"):
        list(measure_approximation(reference, pictures, **options, normalize="channel"))


def test_a_record_says_what_was_done(pictures):
    (record,) = measure_approximation(_create_reference(), pictures, **{**FEW, "operators": [PCONV]})
    assert (record.suite, record.kind, record.subject) == ("approximation", "study", PCONV)
    condition = {**_create_reference().condition, "data": "noise", "stage": 1, "layer": "conv"}
    condition |= {"pictures_hash": hash_pictures(pictures)}
    condition |= {"target": "conv", "normalize": "layer", "bias": False, "seed": 0, "epochs": 2, "patience": 3}
    condition |= {"batch_size": 16, "lr": 0.01, "input_size": 16}
    assert record.condition == condition | {"num_train": 42, "num_validation": 6, "num_test": 12}
    values = record.values
    costs = {name: values[name] for name in ("in_channels", "out_channels", "height", "width", "num_params", "macs")}
    num_params = 9 * 4 * 4 + 16 * 16
    expected = {"in_channels": 16, "out_channels": 16, "height": 4, "width": 4}
    assert costs == {**expected, "num_params": num_params, "macs": 16 * num_params}
    assert values["relative_mse"] == pytest.approx(values["mse"] / values["target_variance"])
    assert 1 <= values["best_epoch"] <= values["num_epochs"] == 2
    assert not values["reference_trained_on_data"]


@pytest.mark.parametrize(("data", "seen"), [("noise", True), ("noise/train", True), ("noise/val", False)])
def test_a_record_says_whether_the_reference_was_trained_on_the_pictures(pictures, data, seen):
    reference = dataclasses.replace(_create_reference(), weights="trained here on noise")
    options = {**FEW, "data": data, "operators": [LEAST_SQUARES]}
    (record,) = measure_approximation(reference, pictures, **options)
    assert record.values["reference_trained_on_data"] is seen


def test_each_epoch_is_told(pictures):
    said = []
    list(measure_approximation(_create_reference(), pictures, say=said.append, **{**FEW, "seeds": (0, 1)}))
    told = [sentence for sentence in said if "min left" in sentence]
    assert [sentence.split(":")[0] for sentence in told] == [f"seed {s}, epoch {e}/2" for s in (0, 1) for e in (1, 2)]
    assert "(PConv + PWConv), at most " in told[0]


def test_the_split_is_disjoint_and_70_10_20():
    parts = split_pictures(range(1000), seed=3)
    assert [len(part) for part in parts] == [700, 100, 200]
    assert set(itertools.chain(*parts)) == set(range(1000))
    assert parts == split_pictures(range(1000), seed=3) != split_pictures(range(1000), seed=4)


def test_the_test_part_is_read_once_and_last(pictures, monkeypatch):
    loads, load = [], approximation.load_pictures
    monkeypatch.setattr(
        approximation, "load_pictures", lambda paths, **options: loads.append(paths) or load(paths, **options)
    )
    list(measure_approximation(_create_reference(), pictures, **FEW))
    train, validation, test = split_pictures(pictures, 0)
    assert loads == [train, train, validation, test]  # scales, training, validation, test


def test_the_same_seed_gives_the_same_numbers_whatever_is_trained_beside(pictures):
    both = list(measure_approximation(_create_reference(), pictures, **FEW))
    torch.rand(7)  # the state of the program's random numbers does not matter
    (alone,) = measure_approximation(_create_reference(), pictures, **{**FEW, "operators": ["DWConv + PWConv"]})
    assert alone.values == next(record.values for record in both if record.subject == alone.subject)
    (other,) = measure_approximation(_create_reference(), pictures, **{**FEW, "operators": [PCONV], "seeds": (1,)})
    assert other.values["mse"] != both[0].values["mse"]


def test_what_is_known_is_not_trained_again(pictures, tmp_path):
    options = {**FEW, "seeds": (0, 1)}
    full = list(measure_approximation(_create_reference(), pictures, **options))
    append_records(tmp_path / "log.jsonl", full[:3])  # the first seed, and half of the second
    known = load_records(tmp_path / "log.jsonl")
    rest = list(measure_approximation(_create_reference(), pictures, known=known, **options))
    assert (_values(rest), [record.subject for record in rest]) == (_values(full[3:]), [full[3].subject])
    again = measure_approximation(_create_reference(), pictures, known=known, **{**options, "lr": 0.001})
    assert len(list(again)) == 4


def test_an_operator_that_does_not_improve_stops(pictures):
    options = {**FEW, "epochs": 9, "patience": 2, "lr": 1e-30}
    for values in _values(measure_approximation(_create_reference(), pictures, **options)):
        assert (values["best_epoch"], values["num_epochs"]) == (1, 3)


def _create_fit(operator: nn.Module, scale: torch.Tensor) -> Fit:
    conv = _create_reference().model.conv
    return Fit("it", LayerMap(Layer("conv", conv, 1, 4, 4), None, False), operator, torch.tensor(1.0), scale)


def _load_noise(num_batches: int) -> list[torch.Tensor]:
    return list(torch.randn(num_batches, 8, 3, 16, 16))


def test_the_weights_of_the_best_epoch_are_kept():
    model, validation = _create_reference().model, _load_noise(1)
    fit = _create_fit(OPERATORS["DWConv + PWConv"](16, 16, False), torch.tensor(1.0))
    shown = {"track": silent, "description": ""}
    batches = [torch.randn(1, 3, 16, 16)]  # few enough to overfit
    fit_operators(model, [fit], batches, validation, epochs=60, patience=60, lr=0.05, **shown)
    assert fit.best_epoch < fit.num_epochs == 60
    assert evaluate(model, [fit], validation) == {fit: fit.validation}


def test_errors_are_in_the_maps_own_units_however_they_were_divided():
    reference, batches = _create_reference(), _load_noise(3)
    zero = nn.Conv2d(16, 16, 1, bias=False)
    nn.init.zeros_(zero.weight)
    map = _create_fit(zero, torch.tensor(1.0)).map
    y = torch.cat([reference.model.conv(reference.model.stem(images)) for images in batches])
    for normalize in ("none", "layer", "channel"):
        ((x_scale, y_scale),) = measure_scales(reference.model, [map], batches, normalize).values()
        (errors,) = evaluate(reference.model, [Fit("0", map, zero, x_scale, y_scale)], batches).values()
        assert errors.mse == pytest.approx(y.square().mean().item(), rel=1e-5)
        assert errors.variance == pytest.approx(y.var((0, 2, 3), correction=0).mean().item(), rel=1e-4)
        if normalize != "none":
            assert errors.loss == pytest.approx(1, rel=0.2)  # zero-mean noise over its own variance


def test_target_norm_is_the_map_after_batch_normalization(pictures):
    (before,), (after,) = (
        measure_approximation(_create_reference(norm=True), pictures, target=target, **{**FEW, "operators": [PCONV]})
        for target in ("conv", "norm")
    )
    assert after.values["target_variance"] == pytest.approx(4 * before.values["target_variance"], rel=1e-4)
    assert (before.condition["bias"], after.condition["bias"]) == (False, True)
    assert after.values["num_params"] == before.values["num_params"] + 16


def test_an_activation_in_place_does_not_reach_the_target(pictures):
    one, other = (
        list(measure_approximation(_create_reference(inplace=inplace), pictures, **FEW)) for inplace in (True, False)
    )
    assert _values(one) == _values(other)


def test_residual_networks_are_approximated_behind_their_stride():
    import timm

    model = timm.create_model("resnet18", num_classes=3).eval()
    maps = approximation._choose_maps(model, 64, None, "norm", None)
    names = {map.layer.name: map.norm for map in maps}
    assert list(names) == ["layer1.0.conv1", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]
    assert names["layer3.0.conv2"] is model.layer3[0].bn2


@pytest.mark.parametrize("label", OPERATORS)
def test_every_operator_may_change_the_width(label):
    operator = OPERATORS[label](32, 48, True)
    assert operator(torch.rand(2, 32, 5, 6)).shape == (2, 48, 5, 6)
    assert sum(parameter.numel() == 48 for parameter in operator.parameters()) == 1  # the bias


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operators": ["PConv"]}, "operator 'PConv' is not one of DWConv"),
        ({"operators": []}, "operators must name at least one of"),
        ({"layers": ["stem"]}, "layer 'stem' is no regular 3x3 convolution with stride 1; those are: conv"),
        ({"target": "bn"}, "target 'bn' is not one of conv, norm"),
        ({"target": "norm"}, "no batch normalization reads layer 'conv'"),
        ({"normalize": "picture"}, "normalize 'picture' is not one of none, layer, channel"),
        ({"seeds": (1, 1)}, "seeds must be different numbers"),
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"input_size": 0}, "input_size must be positive, got 0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"lr": 1e30}, "the loss is not finite; lr 1e.30 is too large"),
    ],
)
def test_wrong_arguments_are_named(pictures, options, message):
    with pytest.raises(ValueError, match=message):
        list(measure_approximation(_create_reference(), pictures, **{**FEW, **options}))


def test_too_few_pictures_are_refused(pictures):
    with pytest.raises(ValueError, match="pictures must be at least 10"):
        list(measure_approximation(_create_reference(), pictures[:9], **FEW))


def test_channels_that_an_operator_cannot_split_are_named_with_the_layer(pictures):
    with pytest.raises(
        ValueError, match=r"operator 'GConv\(16\) \+ PWConv' does not fit layer 'conv' with 24 channels"
    ):
        list(measure_approximation(_create_reference(channels=24), pictures, data="noise"))


def test_a_network_without_such_a_layer_is_refused(pictures):
    reference = dataclasses.replace(_create_reference(), model=nn.Sequential(nn.Conv2d(3, 8, 4, stride=4)))
    with pytest.raises(ValueError, match="stages 1 to 4, and nothing else is approximated"):
        list(measure_approximation(reference, pictures, data="noise"))
