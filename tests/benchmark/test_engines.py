"""The CPU engine against its rivals: exact first, every rival compared, the best one named, time told by its parts."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fasternet import native
from fasternet.benchmark import engines, networks, prepare, restrict, stages
from fasternet.benchmark.engines import WAYS, judge_target, measure_engines
from fasternet.benchmark.restrict import explain_leak, list_variables
from fasternet.benchmark.results import Candidate, measure_candidates, measure_register_peaks
from fasternet.benchmark.stages import list_parts
from fasternet.complexity import count_costs
from fasternet.deploy import to_layers
from fasternet.environment import create_record
from fasternet.models.registry import create_model
from fasternet.records import Record
from fasternet.timing import Peak

SIZE = 64
HAS_OPENVINO = engines.explain_engine("openvino") is None


class FakeNetwork:
    """Stands in for the C++ network: layer i takes i + 1 ms."""

    isa = "avx2"

    def __init__(self, layers: Sequence[Any], **options: Any) -> None:
        self.num_layers = len(layers)

    def run(self, x: np.ndarray, *, threads: int, seconds: np.ndarray) -> None:
        seconds[:] = np.arange(1, self.num_layers + 1) / 1e3


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        return run()


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow networks, tiny blocks, peaks that are given, and the eager form in place of the C++ engine."""
    settings = {"num_blocks": 4, "min_block_s": 1e-4, "warmup_s": 0.0}
    monkeypatch.setattr(engines, "choose_settings", lambda device, quick, **given: {**settings, **given})
    gemm, registers = Peak("gemm", {"precision": "fp32"}, 1e9), Peak("registers", {"precision": "fp32"}, 2e9)
    monkeypatch.setattr(engines, "measure_peaks", lambda **_: [gemm])
    monkeypatch.setattr(engines, "measure_register_peaks", lambda *_: [registers])
    monkeypatch.setattr(engines, "INPUT_SIZE", SIZE)
    monkeypatch.setattr(engines, "load_engines", lambda *_: None)
    monkeypatch.setattr(prepare, "create_network", lambda name: create_small())
    monkeypatch.setattr(engines, "explain_engine", lambda engine, _: None if engine in ("cpu", "eager") else "not here")
    monkeypatch.setattr(native, "select_isa", lambda isa, precision: ("avx2", "asked for"))
    monkeypatch.setattr(stages.native, "Network", FakeNetwork)
    create = prepare.create_runtime

    def create_runtime(network: Any, x: Any, *, engine: str, **options: Any) -> Any:
        return create(network, x, engine="eager" if engine == "cpu" else engine, **options)

    monkeypatch.setattr(prepare, "create_runtime", create_runtime)


def create_small() -> Any:
    return create_model("fasternet_t0", width=8, depths=(1, 1, 2, 1), head_width=16).eval()


def run(**options: Any) -> list[Record]:
    return list(measure_engines(["FasterNet-T0"], precisions=["fp32"], **options))


@pytest.fixture(scope="module")
def forms() -> list[str]:
    return [way.name("FasterNet-T0") for way in WAYS if (way.engine, way.precision) == ("eager", "fp32")]


def test_engine_is_compared_with_every_rival_and_the_best_of_them(records: list[Record], forms: list[str]) -> None:
    timed = {(r.subject, r.condition["engine"]): r for r in records if r.kind == "latency" and "error" not in r.values}
    assert set(timed) == {("FasterNet-T0", "cpu"), *((form, "eager") for form in forms)}
    left_out = {r.condition["engine"] for r in records if r.values.get("error") == "left out: not here"}
    assert left_out == {"compile", "onnxruntime", "openvino"}
    ratios = [r for r in records if r.kind == "ratio"]
    assert {r.subject for r in ratios} == {"FasterNet-T0"}
    control, *others = (r for r in ratios if not r.condition.get("best_rival"))
    assert control.condition["baseline_engine"] == "cpu"
    assert {r.condition["baseline"] for r in others} == set(forms)
    (best,) = (r for r in ratios if r.condition.get("best_rival"))
    medians = {form: timed[form, "eager"].values["latency_ms"] for form in forms}
    assert best.condition["baseline"] == min(medians, key=medians.__getitem__)
    ours = timed["FasterNet-T0", "cpu"].values
    assert best.values["ratio"] == pytest.approx(ours["latency_ms"] / min(medians.values()))
    assert ours["isa"] == "avx2"
    assert ours["register_peak_share"] == pytest.approx(ours["peak_share"] / 2)
    inexact = {subject for (subject, _), record in timed.items() if record.values.get("exact") is False}
    assert inexact == {"FasterNet-T0:inplace"}
    assert "memory_format" in timed["FasterNet-T0:split_cat", "eager"].condition


def test_differences_come_first_and_latencies_last(records: list[Record]) -> None:
    kinds = [r.kind for r in records if "error" not in r.values]
    assert list(dict.fromkeys(kinds)) == ["machine_peak", "cost", "difference", "ratio", "stage", "latency"]
    (difference,) = (r for r in records if r.kind == "difference")
    assert difference.values["max_relative_difference"] <= difference.values["limit"] == 1e-5


def test_engine_that_is_wrong_is_not_timed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy = engines.deploy_network

    def spoil(name: str, oracle: Any, condition: Any, *args: Any) -> Any:
        candidate = deploy(name, oracle, condition, *args)
        call, factor = candidate.call, 1.0001 if condition["engine"] == "cpu" else 1.0
        return dataclasses.replace(candidate, call=lambda: factor * call())

    monkeypatch.setattr(engines, "deploy_network", spoil)
    records = run()
    (error,) = (r.values["error"] for r in records if r.condition.get("engine") == "cpu")
    assert re.match(r"wrong: relative difference (1\.0e-04|9\.\de-05) to eager, more than 1e-05", error)
    assert not any(r.kind == "ratio" for r in records)


def test_parts_hold_all_multiply_adds_and_all_the_time(records: list[Record]) -> None:
    parts = [r for r in records if r.kind == "stage"]
    names = ["embedding", "stage 1", "merging 1", "stage 2", "merging 2", "stage 3", "merging 3", "stage 4", "head"]
    assert [r.condition["stage"] for r in parts] == names
    assert [r.values["latency_ms"] for r in parts] == pytest.approx([1, 2, 3, 4, 5, 6 + 7, 8, 9, 10])
    assert sum(r.values["share"] for r in parts) == pytest.approx(1)
    macs = count_costs(create_small(), (1, 3, SIZE, SIZE)).macs
    assert sum(r.values["macs"] for r in parts) == macs
    assert parts[0].values["register_peak_share"] == pytest.approx(parts[0].values["macs"] / 1e-3 / 2e9)


@pytest.mark.parametrize("size", [(64, 64), (97, 130)])
def test_parts_count_what_complexity_counts(size: tuple[int, int]) -> None:
    model = create_small()
    macs = count_costs(model, (1, 3, *size)).macs
    assert sum(macs for _, macs in list_parts(to_layers(model), *size)) == macs


def test_networks_that_are_known_are_left_out(small: None, records: list[Record]) -> None:
    said: list[str] = []
    assert run(known=records, say=said.append) == []
    assert said == ["left out: not here", "measured already, and left out: 1 of 1 networks"]
    others = [dataclasses.replace(r, condition={**r.condition, "isa": "avx2"}) for r in records]
    ways = [way for way in WAYS if way.engine in ("cpu", "eager") and way.precision == "fp32"]
    condition = {name: records[-1].condition[name] for name in ("input_size", "batch_size", "threads", "device")}
    assert engines._is_known(records, "FasterNet-T0", ways, condition, 4)
    assert engines._is_known(others, "FasterNet-T0", ways, {**condition, "isa": "avx2"}, 4)
    assert not engines._is_known(others, "FasterNet-T0", ways, condition, 4)
    assert not engines._is_known(records, "FasterNet-T0", ways, {**condition, "batch_size": 2}, 4)
    assert not engines._is_known(records, "FasterNet-T0", ways, condition, 64)
    failed = [dataclasses.replace(r, values={"error": "OOM"}, samples={}) for r in records if r.kind == "latency"]
    assert engines._is_known(failed, "FasterNet-T0", ways, condition, 4)
    mine = [r for r in records if r.condition.get("engine") != "cpu"]
    assert not engines._is_known(mine, "FasterNet-T0", ways, condition, 4)


def test_long_calls_run_in_fewer_rounds() -> None:
    assert engines._count_rounds("FasterNet-T0", 1, 64) == engines._count_rounds("FasterNet-L", 1, 64) == 64
    assert engines._count_rounds("FasterNet-T2", 32, 64) == 32
    assert engines._count_rounds("FasterNet-L", 32, 64) == engines.MIN_BLOCKS


def test_each_precision_has_a_control_of_its_own(small: None) -> None:
    records = list(measure_engines(["FasterNet-T0"], precisions=["fp32", "bf16"]))
    controls = [r for r in records if r.kind == "ratio" and r.samples]
    assert [r.condition["precision"] for r in controls] == ["fp32", "bf16"]
    spreads = {r.condition["precision"]: r.values["a_a_spread"] for r in controls}
    assert spreads["fp32"] != spreads["bf16"]
    for ratio in (r for r in records if r.kind == "ratio"):
        assert ratio.values["a_a_spread"] == spreads[ratio.condition["precision"]]
    timed = [r for r in records if r.kind == "latency" and r.condition["engine"] == "cpu"]
    assert [r.condition["precision"] for r in timed] == ["fp32", "bf16"]  # the controls are no rows


@pytest.mark.parametrize(
    ("network", "precision", "isa", "batch_size", "ratio", "expected"),
    [
        ("T0", "fp32", "avx512", 1, 1 / 1.16, (1.15, True, "met")),
        ("T0", "fp32", "avx512", 1, 1 / 1.14, (1.15, False, "not met")),
        ("L", "fp32", "avx512", 1, 1.01, (1.0, True, "met")),  # the interval reaches 1
        ("L", "fp32", "avx512", 1, 1.015, (1.0, False, "not met")),
        ("T2", "fp32", "avx2", 1, 0.9, (1.0, True, "met")),
        ("S", "fp32", "avx2", 1, 0.9, (None, None, "no target")),
        ("T0", "bf16", "avx512_bf16", 1, 0.3, (None, None, "no AMX here")),
        ("T0", "bf16", "amx", 32, 1 / 1.2, (1.3, False, "not met")),
    ],
)
def test_targets_are_judged(
    network: str, precision: str, isa: str, batch_size: int, ratio: float, expected: Any
) -> None:
    values = {"ratio": ratio, "low": ratio - 0.012, "high": ratio + 0.012}
    condition = {"precision": precision, "batch_size": batch_size}
    record = create_record("engines", "ratio", f"FasterNet-{network}", condition=condition, values=values)
    judged = judge_target(record, isa)
    assert tuple(judged[name] for name in ("target", "target_met", "target_reason")) == expected
    assert judged["times_as_fast"] == pytest.approx(1 / ratio)


def test_precisions_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "explain_engine", lambda engine, precision: "no fp32" if precision == "fp32" else None)
    assert engines._choose_precisions(None) == ["bf16"]
    for wanted in (["fp32"], ["fp32", "bf16"]):
        with pytest.raises(ValueError, match="no fp32"):
            engines._choose_precisions(wanted)
    monkeypatch.setattr(engines, "explain_engine", lambda engine, precision: f"no {precision}")
    with pytest.raises(ValueError, match="no bf16"):
        engines._choose_precisions(None)


@pytest.mark.parametrize("name", engines.HOLDING_BACK)
def test_environment_that_holds_back_some_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "avx2")
    with pytest.raises(ValueError, match=f"{name}=avx2 holds some of the engines back: unset it, or give isa"):
        next(measure_engines())


def test_max_autotune_reaches_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    seen: list[bool] = []

    def create(*_: Any, **options: Any) -> Any:
        seen.append(config.max_autotune)
        raise ValueError("seen")

    monkeypatch.setattr(prepare, "create_network", lambda name: create_small())
    monkeypatch.setattr(prepare, "create_runtime", create)
    condition = {"input_size": SIZE, "batch_size": 1, "device": "cpu", "threads": 1}
    oracle = prepare.create_oracle("FasterNet-T0", condition, 0)
    for name in ("FasterNet-T0", "FasterNet-T0:max_autotune"):
        with pytest.raises(ValueError, match="seen"):
            prepare.deploy_network(name, oracle, {**condition, "engine": "compile", "precision": "fp32"}, {}, {})
    assert seen == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": ["MobileNetV2"]}, "network 'MobileNetV2' is not one of FasterNet-T0"),
        ({"isa": "sse"}, "isa 'sse' is not one of portable, avx2"),
        ({"isa": "avx2"}, "isa=avx2 needs a process that was started under ATEN_CPU_CAPABILITY=avx2 "),
        ({"precisions": ["int8"]}, "precision 'int8' is not one of fp32, bf16"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_wrong_arguments_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(measure_engines(**options))


def test_cpu_engine_runs_what_is_a_fasternet_with_batch_norm() -> None:
    setups = [("eager", "fp32"), ("cpu", "fp32"), ("cpu", "bf16")]
    for name in ("FasterNet-T0", "FasterNet-T0 ReLU", "FasterNet-T0* r=1/8"):
        assert networks.list_setups(name, setups) == setups
    for name in ("MobileNetV2", "FasterNet-T0 LN", "FasterNet-T0:slicing"):
        assert networks.list_setups(name, setups) == [("eager", "fp32")]


def test_peaks_of_registers_are_recorded_where_the_engine_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "explain_native", lambda precision: None if precision == "fp32" else "no hardware")
    monkeypatch.setattr(native, "select_isa", lambda isa, precision: ("avx2", "asked for"))
    monkeypatch.setattr(native, "measure_peak", lambda isa, precision: 1e11)
    (peak,) = measure_register_peaks(("fp32", "bf16", "int8"), 2)
    assert (peak.subject, peak.condition, peak.per_second) == ("registers", {"precision": "fp32", "isa": "avx2"}, 2e11)
    results = measure_candidates(
        "networks",
        [Candidate("one", lambda: torch.ones(9), {"batch_size": 2, "precision": "fp32"}, {"macs": 9}, 0, {})],
        baseline="one",
        pairs=(),
        peaks=[peak],
        moment={},
        settings={"num_blocks": 4, "min_block_s": 1e-4, "warmup_s": 0.0},
    )
    values = next(results).values
    assert values["register_peak_share"] == pytest.approx(values["macs_per_second"] / 2e11)


def test_unrestricted_engines_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "MLAS" in (explain_leak("onnxruntime", "avx2") or "")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert explain_leak("eager", "avx2") == "PyTorch computes with AVX512 all the same"
    assert explain_leak("eager", "avx512") is None
    monkeypatch.setattr(restrict, "_list_openvino_kernels", lambda: ["reorder", "brgconv_avx512_f32"])
    assert explain_leak("openvino", "avx2") == "OpenVINO computes with brgconv_avx512_f32 all the same"
    assert explain_leak("openvino", "avx512") is None
    assert explain_leak("cpu", "avx2") is None


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_started_under_its_variables_everything_keeps_to_an_instruction_set(isa: str) -> None:
    if not HAS_OPENVINO:
        pytest.skip("needs OpenVINO")
    code = "import sys; from fasternet.benchmark.restrict import explain_leak; print(explain_leak(*sys.argv[1:]))"
    for engine in ("openvino", "eager"):
        command, environment = [sys.executable, "-c", code, engine, isa], {**os.environ, **list_variables(isa)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["None"]


def test_engine_itself_is_measured(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if reason := native.explain_native():
        pytest.skip(reason)
    real = native.Network, native.select_isa, prepare.create_runtime
    request.getfixturevalue("small")
    monkeypatch.setattr(stages.native, "Network", real[0])
    monkeypatch.setattr(native, "select_isa", real[1])
    monkeypatch.setattr(prepare, "create_runtime", real[2])
    records = run(batch_size=2)
    assert not [r.values["error"] for r in records if r.condition.get("engine") == "cpu" and "error" in r.values]
    assert all(r.values["latency_ms"] > 0 for r in records if r.kind == "stage")
