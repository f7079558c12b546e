from pathlib import Path
from typing import Any

import pytest
import torch

from fasternet.benchmark import operators, results
from fasternet.benchmark.operators import OPERATORS, SHAPES, measure_operators
from fasternet.paper import load_table
from fasternet.records import Record, load_records
from fasternet.timing import Peak

TINY = (16, 6, 5)
PCONV = "pconv3x3_r1/4"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure tiny blocks, against a peak that is given."""
    settings = {"num_blocks": 4, "min_block_s": 1e-4, "warmup_s": 0.0}
    monkeypatch.setattr(operators, "choose_settings", lambda device, **_: settings)
    peaks = [Peak("gemm", {"precision": "fp32", "size": 8}, 1e9), Peak("copy", {"mib": 1}, 2e9)]
    monkeypatch.setattr(operators, "measure_peaks", lambda **_: peaks)


def _measure(*names: str, **options: Any) -> dict[tuple[str, str], Record]:
    records = list(measure_operators(names or None, shapes=options.pop("shapes", (TINY,)), **options))
    found = {(record.kind, record.subject): record for record in records}
    assert len(found) == len(records)
    return found


def test_table1_is_what_runs_by_default() -> None:
    table = load_table("table1_operators")
    assert list(OPERATORS[:4]) == ["conv3x3", "gconv3x3_16groups", "dwconv3x3", PCONV]
    assert len(SHAPES) == 4
    assert [(name, *map(str, shape)) for name in OPERATORS[:4] for shape in SHAPES] == [
        (row["operator"], row["channels"], row["height"], row["width"]) for row in table
    ]


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_every_operator_passes_its_check_and_is_timed(memory_format: str) -> None:
    found = _measure(memory_format=memory_format, batch_size=2)
    assert not [record for record in found.values() if "error" in record.values]
    timed = {subject for kind, subject in found if kind == "latency"}
    impl = found["latency", PCONV].values["impl"]
    assert timed == set(OPERATORS) - {f"{PCONV}:{impl}"}  # what is chosen automatically runs once
    assert {found["latency", name].values["impl"] for name in timed if name.startswith(PCONV)} == {
        *("split_cat", "slicing", "in_place")
    }
    assert {subject for kind, subject in found if kind == "ratio"} == timed
    assert found["ratio", "conv3x3"].condition["baseline"] == PCONV


def test_latency_record_holds_rates_and_samples() -> None:
    record = _measure("dwconv3x3", PCONV, batch_size=3)["latency", PCONV]
    values, work = record.values, 10 * 6 * 5 * 9 * 4 * 4
    assert record.condition == {
        **{"channels": 16, "height": 6, "width": 5, "num_layers": 10, "batch_size": 3, "threads": 1},
        **{"device": "cpu", "precision": "fp32", "engine": "eager", "memory_format": "contiguous"},
    }
    assert values["macs"] == work
    assert values["memory_accesses"] == 10 * (2 * 6 * 5 * 4 + 9 * 4 * 4)  # Eq. 5
    assert values["macs_per_second"] == pytest.approx(3 * work / values["latency_ms"] * 1e3)
    assert values["images_per_second"] == pytest.approx(3e3 / values["latency_ms"])
    num_bytes = 4 * 10 * (3 * 2 * 6 * 5 * 4 + 9 * 4 * 4)
    assert values["bytes_per_second"] == pytest.approx(num_bytes / values["latency_ms"] * 1e3)
    assert values["peak_share"] == pytest.approx(values["macs_per_second"] / 1e9)
    assert len(record.samples["latency_ms"]) == 4
    assert values["latency_ms_p90"] is None
    assert values["load_average"] >= 0


def test_run_begins_with_peaks_and_holds_its_control() -> None:
    found = _measure("conv3x3", "dwconv3x3")
    assert found["machine_peak", "gemm"].values == {"macs_per_second": 1e9}
    assert found["machine_peak", "copy"].values == {"bytes_per_second": 2e9}
    control = found["ratio", "conv3x3"]  # without a PConv the first one is the baseline
    assert control.condition["baseline"] == "conv3x3"
    assert len(control.samples["latency_ms"]) == 4
    assert found["ratio", "dwconv3x3"].values["a_a_spread"] == control.values["a_a_spread"]


def test_wrong_operator_is_recorded_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "pconv2d_", lambda x, weight: x.mul_(1.001))
    found = _measure(PCONV, f"{PCONV}:in_place")
    assert found["latency", f"{PCONV}:in_place"].values["error"].startswith("wrong: relative difference")
    assert "latency_ms" not in found["latency", f"{PCONV}:in_place"].values
    assert "latency_ms" in found["latency", PCONV].values


def test_missing_memory_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(operators, "pconv2d_", fail)
    found = _measure(f"{PCONV}:in_place")
    assert found["latency", f"{PCONV}:in_place"].values == {"error": "OOM"}


@pytest.mark.parametrize("name", OPERATORS)
def test_stacks_keep_the_scale_of_their_input(name: str) -> None:
    operator, _, impl = name.partition(":")
    stack = operators._create_stack(operator, impl, 32, seed=0)
    x = torch.randn(1, 32, 28, 28)
    before = x.clone()
    with torch.inference_mode():
        outputs = [stack(x) for _ in range(3)]
    assert torch.equal(x, before)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert 0.3 < outputs[0].std() < 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operators": ["conv5x5"]}, "operator 'conv5x5' is not one of conv3x3, "),
        ({"operators": [f"{PCONV}:fastest"]}, "operator 'pconv3x3_r1/4:fastest' is not one of"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"device": "tpu"}, "device 'tpu' is not one of those at hand here: cpu"),
        ({"memory_format": "nhwc"}, "memory_format 'nhwc' is not one of contiguous, channels_last"),
        ({"threads": 0}, "threads must be from 1 to"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(iter(measure_operators(**arguments)))


def test_results_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = results.find_results_file("operators")
    machine = path.parent.name
    written = results.save_results(path, measure_operators(["dwconv3x3"], shapes=(TINY,)))
    next(written)
    assert len(load_records(path)) == 1
    rest = list(written)
    assert len(load_records(path)) == 1 + len(rest)
    assert (tmp_path / "results" / "machines" / f"{machine}.json").is_file()
    list(results.save_results(tmp_path / "mine" / "one.jsonl", iter(rest)))
    assert (tmp_path / "mine" / "machines" / f"{machine}.json").is_file()
