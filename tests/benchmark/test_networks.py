import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fasternet.benchmark import networks, prepare
from fasternet.benchmark.networks import QUICK, list_groups, measure_networks
from fasternet.benchmark.prepare import ABLATIONS, FASTERNETS, prepare_network
from fasternet.benchmark.results import find_fault
from fasternet.models.registry import create_model
from fasternet.ops import PConv2d
from fasternet.paper import load_table
from fasternet.records import Record
from fasternet.rivals import create_rival, list_rivals
from fasternet.timing import Peak

SIZE = 32
SETTINGS = {"num_blocks": 4, "min_block_s": 1e-4, "warmup_s": 0.0}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow networks and tiny blocks, against a peak that is given."""
    monkeypatch.setattr(networks, "choose_settings", lambda device, quick, **given: {**SETTINGS, **given})
    monkeypatch.setattr(networks, "measure_peaks", lambda **_: [Peak("gemm", {"precision": "fp32"}, 1e9)])
    monkeypatch.setattr(networks, "measure_register_peaks", lambda *_: [])
    monkeypatch.setattr(prepare, "create_network", _create_small)


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


def _spoil(monkeypatch: pytest.MonkeyPatch, network: str, spoil: Callable[[Any], Any]) -> None:
    """Let the deployment of one network go wrong."""
    deploy, create = prepare.deploy_network, prepare.create_runtime

    def deploy_wrongly(name: str, *args: Any) -> Any:
        wrong = name == network
        monkeypatch.setattr(
            prepare, "create_runtime", lambda *a, **k: spoil(create(*a, **k)) if wrong else create(*a, **k)
        )
        return deploy(name, *args)

    monkeypatch.setattr(prepare, "deploy_network", deploy_wrongly)


class _Spoiled:
    """A runtime whose output is changed on its way out."""

    def __init__(self, runtime: Any, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.runtime, self.change = runtime, change
        self.load_s, self.file_bytes = runtime.load_s, runtime.file_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(x, self.runtime(x))


def test_groups_hold_table3_and_todays_networks_once() -> None:
    groups = list_groups()
    *table3, table4, today = groups
    assert [group[0] for group in table3] == list(FASTERNETS)
    assert today[:3] == ("FasterNet-T0", "FasterNet-T1", "FasterNet-T2")
    assert table4 == ("FasterNet-M", "ResNet101", "ResNeXt101-32x4d", "ResNeXt101-64x4d")
    assert today[0] == "FasterNet-T0"
    rivals = [name for group in groups for name in group if not name.startswith("FasterNet")]
    assert sorted(rivals) == sorted(rival.name for rival in list_rivals())
    printed = {row["network"]: row["group"] for row in load_table("table3_imagenet")}
    assert sum(":" not in name for group in table3 for name in group) == 35
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
        ("shvit_s1", "FasterNet-T2"),
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
    given: dict[str, set[str]] = {}
    deploy = prepare.deploy_network

    def watch(name: str, oracle: Any, condition: Any, *args: Any) -> Any:
        def create(network: nn.Module, *a: Any, **k: Any) -> Any:
            given[name] = {module.impl for module in network.modules() if isinstance(module, PConv2d)}
            return created(network, *a, **k)

        created = prepare.create_runtime
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "create_runtime", create)
            return deploy(name, oracle, condition, *args)

    monkeypatch.setattr(prepare, "deploy_network", watch)
    records = _measure("FasterNet-T0", "FasterNet-T0:split_cat", "FasterNet-T0:slicing")
    assert not [record for record in records if "error" in record.values]
    assert given == {
        "FasterNet-T0": {"auto"},
        "FasterNet-T0:split_cat": {"split_cat"},
        "FasterNet-T0:slicing": {"slicing"},
    }


def test_engines_run_interleaved_and_are_compared() -> None:
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    records = _measure("FasterNet-T0", "MobileNetV2", "FasterNet-T0:slicing", engines=("onnxruntime", "eager"))
    timed = [(r.subject, r.condition["engine"]) for r in records if r.kind == "latency"]
    assert timed == [
        ("FasterNet-T0", "eager"),
        ("FasterNet-T0", "onnxruntime"),
        ("MobileNetV2", "eager"),
        ("MobileNetV2", "onnxruntime"),
        ("FasterNet-T0:slicing", "eager"),
    ]
    ratios = {
        (r.subject, r.condition["engine"], r.condition["baseline"], r.condition["baseline_engine"])
        for r in records
        if r.kind == "ratio" and not r.condition.get("best_engines")
    }
    assert ratios == {
        ("FasterNet-T0", "eager", "FasterNet-T0", "eager"),
        ("FasterNet-T0", "onnxruntime", "FasterNet-T0", "eager"),
        ("MobileNetV2", "eager", "FasterNet-T0", "eager"),
        ("MobileNetV2", "onnxruntime", "FasterNet-T0", "onnxruntime"),
        ("MobileNetV2", "onnxruntime", "MobileNetV2", "eager"),
        ("FasterNet-T0:slicing", "eager", "FasterNet-T0", "eager"),
    }
    medians = {(r.subject, r.condition["engine"]): r.values["latency_ms"] for r in records if r.kind == "latency"}
    (best,) = (r for r in records if r.condition.get("best_engines"))
    for name, engine in ((best.subject, "engine"), ("FasterNet-T0", "baseline_engine")):
        rivals = {e: ms for (subject, e), ms in medians.items() if subject == name}
        assert best.condition[engine] == min(rivals, key=rivals.__getitem__)


def test_groups_that_are_known_are_left_out() -> None:
    records, said = _measure("FasterNet-T0", "MobileNetV2"), []
    assert _measure("FasterNet-T0", "MobileNetV2", known=records, say=said.append) == []
    assert said == ["measured already, and left out: 1 of 1 groups"]
    assert _measure("FasterNet-T0", "MobileNetV2", known=records, batch_size=2)
    assert _measure("FasterNet-T0", "MobileNetV2", known=[r for r in records if r.subject != "MobileNetV2"])


@pytest.mark.parametrize(
    "changes",
    [
        {"versions": {"torch": "1.0"}},
        {"machine": "another"},
        {"suite": "sweeps"},
        {"samples": {"latency_ms": [1.0]}},  # a quick run
        {"values": {"error": "OOM"}, "samples": {}},
    ],
)
def test_records_that_are_not_the_same_measurement_are_not_known(changes: dict[str, Any]) -> None:
    records = [dataclasses.replace(record, **changes) for record in _measure("MobileNetV2")]
    assert _measure("MobileNetV2", known=records)


def test_latencies_of_a_group_come_after_its_ratios() -> None:
    kinds = [r.kind for r in _measure("FasterNet-T0", "MobileNetV2") if r.kind in ("ratio", "latency")]
    assert kinds == ["ratio", "ratio", "latency", "latency"]


def test_rivals_are_compared_with_the_plain_form_too() -> None:
    records = _measure("FasterNet-T0", "FasterNet-T0:split_cat", "FasterNet-T0:slicing", "MobileNetV2")
    plain = [r.subject for r in records if r.kind == "ratio" and r.condition["baseline"] == "FasterNet-T0:split_cat"]
    assert plain == ["FasterNet-T0:slicing", "MobileNetV2"]


def test_variant_is_compared_with_the_fasternet_that_it_varies() -> None:
    names = ("FasterNet-T0", "FasterNet-T2", "FasterNet-T2 GELU", "FasterNet-T0* r=1/8")
    found = networks.find_opponents(names, "FasterNet-T0")
    assert found["FasterNet-T2 GELU"] == ["FasterNet-T0", "FasterNet-T2"]
    assert found["FasterNet-T0* r=1/8"] == ["FasterNet-T0"]


def test_group_that_fails_while_it_is_timed_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError
        yield

    monkeypatch.setattr(networks, "measure_candidates", fail)
    errors = [r.values["error"] for r in _measure("FasterNet-T0", "MobileNetV2") if r.kind == "latency"]
    assert errors == ["OOM", "OOM"]


def test_layer_scale_counts_in_the_check() -> None:
    for name in ("ConvNeXt-T", "PoolFormer-S12", "EdgeNeXt-XXS"):
        network = create_rival(name)
        small = [
            key for key, p in network.named_parameters() if p.numel() > 1 and 0 < float(p.detach().abs().max()) < 1e-4
        ]
        assert small
        with torch.no_grad():
            prepare.randomize_layer_scale(network)
        state = network.state_dict()
        assert all(float(state[key].min()) >= 0.5 for key in small)


def test_networks_without_an_engine_are_left_out_unless_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager form stands in for the C++ engine."""
    groups = (("FasterNet-T0", "FasterNet-T0:slicing", "MobileNetV2"), ("ResNet50",))
    monkeypatch.setattr(networks, "list_groups", lambda: groups)
    monkeypatch.setattr(networks, "explain_engine", lambda *_: None)
    monkeypatch.setattr(networks, "load_engines", lambda *_: None)
    create = prepare.create_runtime
    monkeypatch.setattr(prepare, "create_runtime", lambda *a, engine, **options: create(*a, engine="eager", **options))
    records = list(measure_networks(engines=["cpu"], input_size=SIZE))
    assert [(r.subject, r.condition["engine"]) for r in records if r.kind == "latency"] == [("FasterNet-T0", "cpu")]
    with pytest.raises(ValueError, match="MobileNetV2 is no FasterNet that the engine cpu runs"):
        _measure("FasterNet-T0", "MobileNetV2", engines=["cpu"])


def test_time_left_is_told_after_each_group() -> None:
    groups = [("FasterNet-T0", "MobileNetV2"), ("FasterNet-L",)]  # 1 + 0.34 + 1 + 0.30 and 1 + 15.49
    assert networks.tell_progress(groups, 1, 264.0) == (
        "1 of 2 groups measured (FasterNet-T0) in 4 min; about 28 min left"
    )
    assert networks.tell_progress(groups, 2, 600.0) == "2 of 2 groups measured (FasterNet-L) in 10 min"


def test_wrong_network_is_recorded_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil(monkeypatch, "MobileNetV2", lambda runtime: _Spoiled(runtime, lambda x, y: 1.001 * y))
    latencies = _find(_measure("FasterNet-T0", "MobileNetV2", "ResNet50"), "latency")
    assert latencies["MobileNetV2"].values["error"].startswith("wrong: relative difference")
    assert set(latencies["MobileNetV2"].values) == {"error"}
    assert "latency_ms" in latencies["ResNet50"].values


def test_network_that_spoils_its_input_is_recorded_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def halve(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.mul_(0.5)
        return y

    _spoil(monkeypatch, "MobileNetV2", lambda runtime: _Spoiled(runtime, halve))
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
    def fail(runtime: Any) -> Any:
        raise raised

    _spoil(monkeypatch, "MobileNetV2", fail)
    latencies = _find(_measure("MobileNetV2", "FasterNet-T0"), "latency")
    assert latencies["MobileNetV2"].values == {"error": recorded}
    assert "latency_ms" in latencies["FasterNet-T0"].values


def test_nothing_is_measured_where_everything_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> nn.Module:
        raise RuntimeError("no such layer")

    monkeypatch.setattr(prepare, "create_network", fail)
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

    monkeypatch.setattr(prepare, "create_network", create)
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
        ({"engines": ()}, "engines and precisions must each name at least one"),
        ({"precisions": ["int8"]}, "engine eager has no int8"),
        ({"device": "cuda:x"}, "device 'cuda:x' is not one of those at hand here"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(iter(measure_networks(**arguments)))


def test_form_without_its_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "explain_engine", lambda *_: None)  # whatever is installed
    with pytest.raises(ValueError, match="FasterNet-T0:slicing is a form of eager PyTorch in fp32"):
        _measure("FasterNet-T0", "FasterNet-T0:slicing", engines=("openvino",))


@pytest.mark.parametrize(
    ("output", "precision", "fault"),
    [
        (1.0002, "fp32", None),
        (1.001, "fp32", "wrong: relative difference"),
        (float("nan"), "fp32", "wrong: relative difference nan"),
        (0.5, "bf16", None),  # points the same way
        (float("nan"), "int8", "wrong: correlation nan"),
    ],
)
def test_precisions_have_limits_of_their_own(output: float, precision: str, fault: str | None) -> None:
    expected = torch.linspace(-1, 1, 100).reshape(2, 50)
    found = find_fault(output * expected, expected, precision)
    assert found is None if fault is None else str(found).startswith(fault)


def test_unlike_outputs_are_a_fault_in_every_precision() -> None:
    expected, other = torch.randn(2, 1, 1000, generator=torch.Generator().manual_seed(0))
    for precision in ("fp32", "bf16", "int8"):
        assert str(find_fault(other, expected, precision)).startswith("wrong: ")


def _list_checks() -> Iterator[tuple[str, str]]:
    for name in dict.fromkeys(name for group in list_groups() for name in group):
        yield from (
            (name, engine) for engine in ("eager", "onnxruntime", "openvino") if ":" not in name or engine == "eager"
        )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "engine"), [*_list_checks(), *((name, "eager") for name in ABLATIONS)])
def test_every_network_passes_its_check(monkeypatch: pytest.MonkeyPatch, name: str, engine: str) -> None:
    monkeypatch.undo()
    if engine != "eager":
        pytest.importorskip(engine, reason=f"needs {engine}")
    monkeypatch.setattr(prepare, "_try_memory_formats", lambda *_: {"contiguous": 0.0})
    condition = {"input_size": prepare.find_input_size(name), "batch_size": 1, "device": "cpu", "threads": 1}
    _, prepared = prepare_network("networks", name, condition, [(engine, "fp32")], {"seed": 0})
    assert not isinstance(prepared, Record), prepared.values
