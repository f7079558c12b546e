"""Salient positions of filters that were made for it, and the receptive field of the operators of Fig. 5."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from fasternet.analysis.reference import Reference
from fasternet.analysis.salience import find_norms, measure_receptive_field, measure_salience
from fasternet.models.checkpoint import Preprocessing
from fasternet.ops import PConv2d


def _refer(*layers):
    model = nn.Sequential(*layers).eval().requires_grad_(False)
    return Reference(model, "small", "made", Preprocessing(input_size=32))


def test_norms_are_taken_over_input_channels():
    weight = torch.randn(5, 7, 3, 3)
    weight[2] = 0
    norms = find_norms(weight)
    assert norms.shape == (4, 9)  # the filter that is zero has no salient position
    assert norms[1, 5] == pytest.approx(weight[1, :, 1, 2].norm().item())


def test_salient_positions_are_counted_by_stage():
    first, second = nn.Conv2d(3, 6, 3, 4, 1), nn.Conv2d(6, 6, 3, 2, 1)
    with torch.no_grad():
        first.weight.normal_(0, 0.01)
        first.weight[:4, 0, 1, 1] = -1  # the centre of four filters
        first.weight[4:, 2, 0, 2] = 1  # position 3 of two
        second.weight.fill_(1)  # ties: the first position
    found = {record.subject: record for record in measure_salience(_refer(first, nn.BatchNorm2d(6), second))}
    assert list(found) == ["stage 1", "stage 2", "all"]
    values = found["stage 1"].values
    assert values["counts"] == [0, 0, 2, 0, 4, 0, 0, 0, 0]
    assert values["centre_share"] == pytest.approx(4 / 6)
    assert values["low"] < 4 / 6 < values["high"]
    assert values["layers"] == ["0"]
    assert np.argmax(values["mean_norms"]) == 4
    assert np.mean(values["mean_norms"]) == pytest.approx(1)
    assert found["stage 2"].values["counts"] == [6, 0, 0, 0, 0, 0, 0, 0, 0]
    assert found["all"].values["num_filters"] == 12
    assert found["all"].values["counts"][0] == 6
    json.dumps(values, allow_nan=False)


def test_pconv_counts_and_depthwise_pointwise_and_larger_filters_do_not():
    layers = (
        nn.Conv2d(3, 16, 5, 4, 2),
        PConv2d(16),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 8, 1),
    )
    (stage, total) = measure_salience(_refer(*layers))
    assert stage.subject == "stage 1"
    assert stage.values["layers"] == ["1"]
    assert stage.values["num_filters"] == total.values["num_filters"] == 4
    with pytest.raises(ValueError, match="small has no regular 3x3 convolution"):
        list(measure_salience(_refer(layers[0], layers[3])))


def test_interval_of_random_filters_contains_the_uniform_share():
    layer = nn.Conv2d(4, 400, 3, 4, 1)
    layer.in_channels, layer.weight = 3, nn.Parameter(torch.empty(400, 3, 3, 3), requires_grad=False)
    contained = contained_by_band = 0
    for seed in range(20):
        layer.weight.normal_(generator=torch.Generator().manual_seed(1000 + seed))
        values = next(measure_salience(_refer(layer), seed=seed)).values
        contained += values["low"] <= values["uniform_share"] <= values["high"]
        contained_by_band += values["random_low"] <= values["centre_share"] <= values["random_high"]
        assert values["centre_share_random"] == pytest.approx(1 / 9, abs=0.001)
    assert contained >= 16
    assert contained_by_band >= 16  # filters that were drawn are what the baseline says
    assert values["random_high"] - values["random_low"] == pytest.approx(4 * (1 / 9 * 8 / 9 / 400) ** 0.5, rel=0.1)


def test_stages_of_a_resnet18_follow_the_stride():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=2).eval()
    found = list(measure_salience(Reference(model, "resnet18", "random", Preprocessing()), input_size=64))
    assert [record.subject for record in found] == ["stage 1", "stage 2", "stage 3", "stage 4", "all"]
    for number, record in enumerate(found[:4], start=1):
        assert len(record.values["layers"]) == 4
        assert all(name.startswith(f"layer{number}.") for name in record.values["layers"])
        assert record.values["num_filters"] == 4 * 32 * 2**number
    assert found[4].values["centre_share_random"] == pytest.approx(1 / 9, abs=0.02)
    again = list(measure_salience(Reference(model, "resnet18", "random", Preprocessing()), input_size=64))
    assert [record.values for record in again] == [record.values for record in found]


def test_field_of_one_layer_is_t_shaped_for_pconv_and_uniform_for_conv():
    found = {record.subject: record.values for record in measure_receptive_field(depths=(1,))}
    assert list(found) == ["PConv + PWConv", "T-shaped", "Conv"]
    for subject in ("PConv + PWConv", "T-shaped"):
        convolved, untouched = found[subject]["by_channel"]
        assert min(convolved) > 0.8 * max(convolved)
        assert untouched[:4] + untouched[5:] == [0] * 8
        assert untouched[4] > 0
    assert np.ravel(found["Conv"]["field"]) == pytest.approx(np.full(9, 1 / 9), rel=0.06)
    # Of c channels all see the centre and a quarter the other eight positions; PConv's sum keeps a channel's variance.
    assert found["T-shaped"]["centre_share"] == pytest.approx(1 / 3, rel=0.05)
    assert found["PConv + PWConv"]["centre_share"] == pytest.approx((3 + 1 / 3) / 6, rel=0.05)


def test_field_grows_with_depth_and_follows_from_the_seed():
    run = {"channels": 8, "depths": (3,), "kernel_size": 5, "num_draws": 4}
    found = list(measure_receptive_field(**run, seed=1))
    for record in found:
        field = np.array(record.values["field"])
        assert field.shape == (13, 13)
        assert record.values["size"] == 13
        assert field.sum() == pytest.approx(1)
        assert field[0, 0] > 0
        assert field[6, 6] == record.values["centre_share"]
        assert "by_channel" not in record.values
    assert [record.values for record in measure_receptive_field(**run, seed=1)] == [r.values for r in found]
    assert found[0].condition == {"channels": 8, "depth": 3, "kernel_size": 5, "num_draws": 4, "seed": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd and positive, got 4"),
        ({"depths": (0,)}, "depths must be at least 1, got 0"),
        ({"num_draws": 0}, "num_draws must be at least 1, got 0"),
    ],
)
def test_field_refuses_what_it_cannot_measure(options, message):
    with pytest.raises(ValueError, match=message):
        list(measure_receptive_field(**options))
