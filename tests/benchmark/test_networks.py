from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fasternet.benchmark import networks
from fasternet.benchmark.networks import FASTERNETS, QUICK, list_groups, measure_networks
from fasternet.models.registry import create_model
from fasternet.paper import load_table
from fasternet.records import Record
from fasternet.rivals import list_rivals
from fasternet.timing import Peak

SIZE = 32


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow networks and tiny blocks, against a peak that is given."""
    settings = {"num_blocks": 4, "min_block_s": 1e-4, "warmup_s": 0.0}
    monkeypatch.setattr(networks, "choose_settings", lambda device, seed, **_: {**settings, "seed": seed})
    monkeypatch.setattr(networks, "measure_peaks", lambda **_: [Peak("gemm", {"precision": "fp32"}, 1e9)])
    monkeypatch.setattr(networks, "_create", _create_small)


def _create_small(name: str) -> nn.Module:
    if name in FASTERNETS:
        return create_model("fasternet_t0", width=8, depths=(1, 1, 1, 1), head_width=16).eval()
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 1000),
    ).eval()


def _measure(*names: str, **options: Any) -> list[Record]:
    return list(measure_networks(names, input_size=SIZE, **options))


def _find(records: list[Record], kind: str) -> dict[str, Record]:
    return {record.subject: record for record in records if record.kind == kind}


def _spoil(monkeypatch: pytest.MonkeyPatch, network: str, spoil: Callable[[nn.Module], nn.Module]) -> None:
    """Let the deployment of one network go wrong."""
    deploy = networks._deploy

    def deploy_wrongly(model: nn.Module, name: str, impl: str, x: torch.Tensor) -> nn.Module:
        deployed = deploy(model, name, impl, x)
        return spoil(deployed) if name == network else deployed

    monkeypatch.setattr(networks, "_deploy", deploy_wrongly)


def test_groups_hold_table3_and_todays_networks_once() -> None:
    groups = list_groups()
    *table3, today = groups
    assert [group[0] for group in table3] == list(FASTERNETS)
    assert today[0] == "FasterNet-T0"
    rivals = [name for group in groups for name in group if not name.startswith("FasterNet")]
    assert sorted(rivals) == sorted(rival.name for rival in list_rivals())
    printed = {row["network"]: row["group"] for row in load_table("table3_imagenet")}
    for group in table3:
        assert {printed[name.partition(":")[0]] for name in group} == {printed[group[0]]}
        assert {f"{group[0]}:split_cat", f"{group[0]}:slicing"} < set(group)
    assert set(QUICK) < {name for group in groups for name in group}


def test_networks_are_compared_with_the_first_fasternet_and_the_one_of_their_group() -> None:
    names = ("MobileNetV2", "FasterNet-T0", "FasterNet-T2", "ResNet50", "shvit_s1")
    records = _measure(*names, batch_size=2)
    assert set(_find(records, "latency")) == set(_find(records, "cost")) == set(names)
    ratios = [(record.subject, record.condition["baseline"]) for record in records if record.kind == "ratio"]
    assert ratios == [
        ("FasterNet-T0", "FasterNet-T0"),
        ("MobileNetV2", "FasterNet-T0"),
        ("FasterNet-T2", "FasterNet-T0"),
        ("ResNet50", "FasterNet-T0"),
        ("ResNet50", "FasterNet-T2"),
        ("shvit_s1", "FasterNet-T0"),
    ]


def test_latency_record_holds_costs_rates_and_samples() -> None:
    record = _find(_measure("MobileNetV2", batch_size=3), "latency")["MobileNetV2"]
    values = record.values
    assert record.condition["memory_format"] in ("contiguous", "channels_last")
    assert {**record.condition, "memory_format": ""} == {
        **{"input_size": SIZE, "batch_size": 3, "threads": 1, "device": "cpu", "precision": "fp32"},
        **{"engine": "eager", "memory_format": ""},
    }
    assert values["macs"] == 8 * 8 * 27 * 8 + 8 * 1000
    assert values["num_params"] == 27 * 8 + 16 + 9 * 1000
    assert values["macs_per_second"] == pytest.approx(3 * values["macs"] / values["latency_ms"] * 1e3)
    assert values["peak_share"] == pytest.approx(values["macs_per_second"] / 1e9)
    assert len(record.samples["latency_ms"]) == 4
    assert set(values["memory_format_trial_ms"]) == {"contiguous", "channels_last"}


def test_every_form_of_fasternet_is_deployed_as_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    deployed: dict[str, nn.Module] = {}
    choose = networks._choose_memory_format

    def watch(model: nn.Module, *args: Any) -> Any:
        impls = {module.impl for module in model.modules() if isinstance(module, networks.PConv2d)}
        deployed["".join(sorted(impls))] = model
        return choose(model, *args)

    monkeypatch.setattr(networks, "_choose_memory_format", watch)
    records = _measure("FasterNet-T0", "FasterNet-T0:split_cat", "FasterNet-T0:slicing")
    assert not [record for record in records if "error" in record.values]
    assert set(deployed) == {"", "split_cat", "slicing"}
    for model in deployed.values():
        assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_wrong_network_is_recorded_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nudge(model: nn.Module) -> nn.Module:
        model[-1].weight.data.mul_(1.001)
        return model

    _spoil(monkeypatch, "MobileNetV2", nudge)
    latencies = _find(_measure("FasterNet-T0", "MobileNetV2", "ResNet50"), "latency")
    assert latencies["MobileNetV2"].values["error"].startswith("wrong: relative difference")
    assert set(latencies["MobileNetV2"].values) == {"error"}
    assert "latency_ms" in latencies["ResNet50"].values


def test_network_that_spoils_its_input_is_recorded_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spoiler(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.model(x)
            x.mul_(0.5)
            return y

    _spoil(monkeypatch, "MobileNetV2", Spoiler)
    error = _find(_measure("MobileNetV2"), "latency")["MobileNetV2"].values["error"]
    assert error.startswith("wrong: relative difference")


@pytest.mark.parametrize(
    ("raised", "recorded"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "OOM"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "OOM"),
        (MemoryError(), "OOM"),
        (RuntimeError("mat1 and mat2 shapes\ncannot be multiplied"), "failed: mat1 and mat2 shapes"),
        (AssertionError(), "failed: AssertionError"),
    ],
)
def test_failing_network_is_recorded(monkeypatch: pytest.MonkeyPatch, raised: Exception, recorded: str) -> None:
    def fail(model: nn.Module) -> nn.Module:
        raise raised

    _spoil(monkeypatch, "MobileNetV2", fail)
    latencies = _find(_measure("MobileNetV2", "FasterNet-T0"), "latency")
    assert latencies["MobileNetV2"].values == {"error": recorded}
    assert "latency_ms" in latencies["FasterNet-T0"].values


def test_nothing_is_measured_where_everything_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> nn.Module:
        raise RuntimeError("no such layer")

    monkeypatch.setattr(networks, "_create", fail)
    records = _measure("MobileNetV2")
    assert [(record.kind, record.values.get("error")) for record in records[1:]] == [
        ("latency", "failed: no such layer")
    ]


def test_dead_oracle_is_no_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str) -> nn.Module:
        model = _create_small(name)
        nn.init.zeros_(model[-1].weight)
        nn.init.zeros_(model[-1].bias)
        return model

    monkeypatch.setattr(networks, "_create", create)
    error = _find(_measure("MobileNetV2"), "latency")["MobileNetV2"].values["error"]
    assert error.startswith("wrong: the oracle's largest output is 0.0e+00")


def test_rivals_run_at_the_size_that_they_are_made_for() -> None:
    records = list(measure_networks(["MobileViT-S", "FasterNet-T2", "ResNet50"]))
    sizes = {name: record.condition["input_size"] for name, record in _find(records, "latency").items()}
    assert sizes == {"MobileViT-S": 256, "FasterNet-T2": 224, "ResNet50": 224}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"networks": ["MobileNetV3"]}, "rival 'MobileNetV3' is unknown; near names are MobileNetV2"),
        ({"networks": ["FasterNet-T0:fastest"]}, "network 'FasterNet-T0:fastest' is unknown"),
        ({"networks": ["ResNet50:slicing"]}, "network 'ResNet50:slicing' is unknown"),
        ({"networks": ["FasterNet-T9"]}, "FasterNet-T9"),
        ({"batch_size": -1}, "batch_size must be at least 1, not -1"),
        ({"device": "cuda:x"}, "device 'cuda:x' is not one of those at hand here"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(iter(measure_networks(**arguments)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for group in list_groups() for name in group])
def test_every_network_passes_its_check(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(networks, "_choose_memory_format", lambda model, x, settings: (model, x, "", {}))
    condition = {"input_size": networks._find_input_size(name), "batch_size": 1, "device": "cpu"}
    prepared = networks._prepare(name, condition, {"seed": 0})
    assert not isinstance(prepared, Record), prepared.values
