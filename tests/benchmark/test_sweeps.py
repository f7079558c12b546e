from typing import Any

import pytest
import torch
from torch import nn

from fasternet.benchmark import memory, prepare, steps, sweeps
from fasternet.benchmark.memory import measure_peak_memory
from fasternet.benchmark.steps import measure_steps
from fasternet.benchmark.sweeps import VALUES, measure_sweeps
from fasternet.environment import describe_machine
from fasternet.models.registry import create_model
from fasternet.records import Record
from fasternet.timing import Peak

SETTINGS = {"min_block_s": 1e-4, "warmup_s": 0.0}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sweeps, steps):
        monkeypatch.setattr(module, "choose_settings", lambda device, quick, **given: {**SETTINGS, **given})
        monkeypatch.setattr(module, "measure_peaks", lambda **_: [Peak("gemm", {"precision": "fp32"}, 1e9)])
        monkeypatch.setattr(module, "NUM_BLOCKS", 3)
    monkeypatch.setattr(prepare, "create_network", _create_small)
    monkeypatch.setattr(steps, "create_network", _create_small)


def _create_small(name: str) -> nn.Module:
    if name.startswith("FasterNet"):
        return create_model("fasternet_t0", width=8, depths=(1, 1, 1, 1), head_width=16).eval()
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *pool).eval()


def _latencies(records: list[Record]) -> list[Record]:
    return [record for record in records if record.kind == "latency"]


@pytest.mark.parametrize(("sweep", "values"), [("input_size", (32, 48)), ("batch_size", (1, 3))])
def test_sweep_measures_every_network_at_every_value(
    monkeypatch: pytest.MonkeyPatch, sweep: str, values: tuple[int, ...]
) -> None:
    monkeypatch.setitem(VALUES, sweep, values)
    said: list[str] = []
    records = list(measure_sweeps((sweep,), networks=("FasterNet-T0", "MobileNetV2"), say=said.append))
    found = [(r.subject, r.condition[sweep]) for r in _latencies(records)]
    assert found == [(name, value) for value in values for name in ("FasterNet-T0", "MobileNetV2")]
    assert all(record.condition["sweep"] == sweep for record in records if record.kind in ("latency", "ratio"))
    assert all(len(record.samples["latency_ms"]) == 3 for record in _latencies(records))
    assert said == [f"{sweep} {value} measured" for value in values]
    controls = [r.condition[sweep] for r in records if r.kind == "ratio"]
    assert controls == list(values)


def test_threads_are_swept_up_to_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "find_input_size", lambda name: 32)
    monkeypatch.setattr(sweeps, "find_input_size", lambda name: 32)
    records = _latencies(list(measure_sweeps(("threads",), networks=("MobileNetV2",))))
    assert [r.condition["threads"] for r in records] == [n for n in VALUES["threads"] if n <= describe_machine().cores]
    assert [len(r.values["affinity"] or ()) for r in records] == [r.condition["threads"] for r in records]


def test_failing_value_is_recorded_and_the_sweep_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VALUES, "input_size", (2, 32))  # a picture that no FasterNet takes
    records = _latencies(list(measure_sweeps(("input_size",), networks=("FasterNet-T0",))))
    assert ["error" in record.values for record in records] == [True, False]


def test_unknown_sweep_is_refused() -> None:
    with pytest.raises(ValueError, match="sweeps has 'depth', which is not one of input_size, batch_size, threads"):
        next(iter(measure_sweeps(("depth",))))


def test_training_steps_are_compared() -> None:
    names = ("FasterNet-T0", "MobileNetV2", "ResNet50")
    records = list(measure_steps(names, batch_size=2, input_size=32))
    timed = {record.subject: record for record in _latencies(records)}
    assert tuple(timed) == names
    values: Any = timed["MobileNetV2"].values
    assert values["macs"] == 3 * (8 * 8 * 27 * 8 + 8 * 1000)
    assert values["bytes_per_second"] is None
    assert set(values["memory_format_trial_ms"]) == {"contiguous", "channels_last"}
    pairs = [(r.subject, r.condition["baseline"]) for r in records if r.kind == "ratio"]
    assert pairs == [
        ("FasterNet-T0", "FasterNet-T0"),
        ("MobileNetV2", "FasterNet-T0"),
        ("ResNet50", "FasterNet-T0"),
    ]


def test_training_step_learns() -> None:
    network = _create_small("MobileNetV2")
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    step = steps._create_step(network, x, labels, torch.channels_last)
    with torch.inference_mode():  # as the timing does
        losses = [float(step()) for _ in range(200)]
    assert losses[-1] < losses[0] - 0.01


def test_network_that_cannot_learn_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str) -> nn.Module:
        network = _create_small(name)
        if name == "MobileNetV2":
            nn.init.constant_(network[-1].bias, float("nan"))
        return network

    monkeypatch.setattr(steps, "create_network", create)
    records = _latencies(list(measure_steps(("FasterNet-T0", "MobileNetV2"), batch_size=2, input_size=32)))
    errors = {record.subject: record.values.get("error") for record in records}
    assert errors["FasterNet-T0"] is None
    assert str(errors["MobileNetV2"]).startswith("failed: the loss is nan")


def test_peak_memory_counts_what_a_call_holds() -> None:
    def create() -> Any:
        weights = torch.ones(40 * 2**18)  # 40 MiB, which stay
        torch.ones(400 * 2**18).sum()  # needed to create it alone
        return lambda: weights * 2  # 40 MiB more

    call, mib = measure_peak_memory(create, "cpu")
    assert float(call().sum()) == 2 * 40 * 2**18
    if mib != mib:
        pytest.skip("this system does not tell how much memory a process holds")
    assert 70 < mib < 120


def test_unknown_memory_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_read_resident", lambda field: float("nan"))
    call, mib = measure_peak_memory(lambda: lambda: 3, "cpu")
    assert (call(), mib != mib) == (3, True)
