"""``fasternet list`` and ``fasternet info``."""

import json

import pytest
from torch import nn

from fasternet.cli.info import info, list_


@pytest.fixture(autouse=True)
def _skip_initialisation(monkeypatch):
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda weight, **_: weight)


def test_list_holds_the_six_variants_and_every_rival(capsys):
    from fasternet.rivals import list_rivals

    list_(as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in document["variants"]] == [
        f"fasternet_{v}" for v in ("t0", "t1", "t2", "s", "m", "l")
    ]
    assert document["variants"][2] == {
        "name": "fasternet_t2",
        "input_size": 224,
        "params_m": 15.0,
        "macs_g": 1.9,
        "top1": 78.9,
        "weights": "timm/fasternet_t2.in1k",
    }
    assert [row["name"] for row in document["rivals"]] == [rival.name for rival in list_rivals()]
    assert document["rivals"][-1]["top1"] is None  # not in the paper


def test_list_prints_the_digits_of_the_paper(capsys):
    list_()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "fasternet_t2 " in line)
    assert line.split() == ["fasternet_t2", "224", "15.0", "1.90", "78.9", "timm/fasternet_t2.in1k"]


@pytest.mark.parametrize("name", ["fasternet_t0", "FasterNet-T0"])
def test_info_adds_up(capsys, name):
    info(name, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert (document["num_params"], document["num_params_without_batch_norm"]) == (3_905_500, 3_895_820)
    assert document["input_size"] == 224
    for total in ("num_params", "macs", "memory_accesses"):
        assert sum(layer[total] for layer in document["layers"]) == document[total] > 0


def test_info_prints_layers_and_totals(capsys):
    info("fasternet_t0", input_size=64)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    pconv = "stages.0.blocks.0.pconv PConv2d 40 x 16 x 16 40 x 16 x 16 900 230,400 6,020"
    assert pconv.split() in lines
    assert ["num_params", "3,905,500"] in lines


def test_info_takes_rivals_at_their_own_size(capsys):
    info("EdgeNeXt-XXS", as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["input_size"] == 256
    assert document["layers"][0]["input_shape"] == [1, 3, 256, 256]


def test_info_takes_the_variants_of_table_5(capsys):
    info("FasterNet-T0* r=1/8", as_json=True)
    assert json.loads(capsys.readouterr().out)["macs"] == 338_778_728
    with pytest.raises(ValueError, match=r"variant 'T0\* ReLU' of Table 5 cannot be built"):
        info("FasterNet-T0* ReLU")


def test_info_offers_near_names():
    with pytest.raises(ValueError, match=r"unknown network 'mobilenetv2': near names are .*MobileNetV2"):
        info("mobilenetv2")


def test_info_says_which_size_does_not_fit():
    with pytest.raises(ValueError, match=r"input_shape \(1, 3, 16, 16\) does not fit FasterNet: .*at least 32"):
        info("fasternet_t0", input_size=16)
