"""Surgery: what the seed decides, latency, the report as text, and what is refused."""

import copy
import re

import pytest
import torch
from torch import nn

from fasternet import timing
from fasternet.models import surgery
from fasternet.models.surgery import replace_convs

SMALL = (1, 3, 32, 32)


def test_seed_alone_decides_what_is_drawn(resnet18, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the caller's GPUs are seeded"))
    settings = {"init": "random", "input_shape": SMALL, "measure": False}
    weights = []
    for seed in (0, 0, 1):
        torch.rand(7)
        new, _ = replace_convs(resnet18, "layer1.*", seed=seed, **settings)
        weights.append(new.layer1[0].conv1.pwconv.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_latency_and_the_report_as_text(monkeypatch):
    measured = timing.measure
    calls = []

    def quick(candidates, **settings):
        calls.append({name: call.func for name, call in candidates.items()})
        return measured(candidates, **settings, num_blocks=6, min_block_s=1e-4, warmup_s=0)

    monkeypatch.setattr(surgery.timing, "measure", quick)
    layers = (nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
    model = nn.Sequential(*layers, *copy.deepcopy(layers)).train()
    _, report = replace_convs(model, input_shape=(1, 8, 16, 16))
    latency = report.latency
    assert latency.before_ms > 0
    assert latency.low <= latency.ratio <= latency.high
    assert (latency.engine, latency.threads) == ("eager, as given", 1)
    text = str(report)
    assert re.search(r"^parameters 1\.184 -> 0\.\d+ k \(0\.\d+ times\)$", text, re.MULTILINE)
    assert text.splitlines()[-1].startswith("accuracy: not the given network's before fine-tuning")
    assert re.search(r"^0 +8 +8 +3 +1 ", text, re.MULTILINE)
    assert "eager, as given" in text
    assert "multiply-adds" in text
    _, report = replace_convs(model, input_shape=(1, 8, 16, 16), prepare=lambda network: nn.Sequential(network))
    assert report.latency.engine == "eager, prepared"
    assert [len(network) for network in calls[1].values()] == [1, 1]
    assert not any(network.training for network in calls[0].values())
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "conv"}, "kind 'conv' is not one of pconv, pconv_alone"),
        ({"match": "flops"}, "match 'flops' is not one of none, macs, params"),
        ({"init": "zero"}, "init 'zero' is not one of approximate, random"),
        ({"select": "layer("}, "select 'layer\\(' is not regular, depthwise, all, a regular expression, .*: missing"),
        ({"select": "layer9.*"}, "matches none of the convolutions that can be replaced: layer1.0.conv1, layer1.0"),
        ({"select": "depthwise"}, "select 'depthwise' matches none"),
        ({"select": "conv1"}, r"matches none .*; it matches conv1 \(3 input channels"),
        ({"select": ["layer1.0.conv1", "layer9"]}, "no k x k convolution of model: layer9"),
        ({"select": 5}, "select 5 is not regular, depthwise, all, a regular expression, names"),
        ({"threads": 0, "measure": True}, "threads must be from 1 to"),
        ({"images": torch.zeros(2, 5, 32, 32)}, r"images of the shape \(2, 5, 32, 32\) do not fit the network: "),
        ({"partial_ratio": 0.0}, r"partial_ratio must be in \(0, 1\]"),
        ({"input_shape": (1, 5, 32, 32)}, "input_shape"),
        ({"images": torch.zeros(3, 32, 32)}, r"images must be .* got float32 \(3, 32, 32\)"),
        ({"images": torch.full((1, 3, 8, 8), float("nan"))}, "images must be finite"),
        ({"images": torch.zeros(1, 3, 8, 8), "init": "random"}, "images are for init 'approximate'"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(resnet18, arguments, words):
    with pytest.raises(ValueError, match=words):
        replace_convs(resnet18, **{"input_shape": SMALL, "measure": False, **arguments})


def test_network_without_anything_to_replace_is_refused():
    with pytest.raises(ValueError, match=r"nothing in model can be replaced .*it has no k x k convolution"):
        replace_convs(nn.Sequential(nn.Conv2d(3, 8, 1)), input_shape=SMALL, measure=False)
