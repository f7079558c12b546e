"""Operators measured: what runs, that it is checked first, and costs against the paper's equations."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fasternet import complexity
from fasternet.benchmark import operators, results
from fasternet.benchmark.operators import OPERATORS, SHAPES, find_roofline, measure_operators
from fasternet.ops import PConv2d, eager
from fasternet.ops.reference_ops import WIDTHS, create_operator
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


def _measure(*names: str, **options: Any) -> dict[tuple[str, ...], Record]:
    """Measure, and return latencies and peaks by kind and subject, ratios also by baseline."""
    records = list(measure_operators(names or None, shapes=options.pop("shapes", (TINY,)), **options))
    found = {
        (record.kind, record.subject, *([record.condition["baseline"]] if record.kind == "ratio" else [])): record
        for record in records
    }
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
    timed = {key[1] for key in found if key[0] == "latency"}
    impl = found["latency", PCONV].values["impl"]
    assert timed == set(OPERATORS) - {f"{PCONV}:{impl}"}  # what is chosen automatically runs once
    forms = [found["latency", name].values["impl"] for name in timed if name.partition(":")[0] == PCONV]
    assert sorted(forms) == ["in_place", "slicing", "split_cat"]
    assert {key[1:] for key in found if key[0] == "ratio"} == {
        *((name, PCONV) for name in timed),
        *(("conv3x3", f"{PCONV}+pwconv"), ("conv3x3", "tconv3x3_r1/4"), (PCONV, f"{PCONV}:slicing")),
    }


def test_quick_measures_table1_and_the_forms_of_pconv() -> None:
    assert operators._choose_operators(None, "forward", quick=True) == [
        *("conv3x3", "gconv3x3_16groups", "dwconv3x3", PCONV),
        *(f"{PCONV}:{form}" for form in ("split_cat", "slicing", "in_place")),
    ]


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_backward_is_checked_and_timed_without_what_writes_in_place(memory_format: str) -> None:
    found = _measure(passes="forward+backward", memory_format=memory_format)
    assert not [record for record in found.values() if "error" in record.values]
    timed = {key[1] for key in found if key[0] == "latency"}
    assert timed == set(OPERATORS) - {f"{PCONV}:split_cat", f"{PCONV}:in_place"}
    assert all(found[key].condition["passes"] == "forward+backward" for key in found if key[0] != "machine_peak")
    forward = _measure("conv3x3")["latency", "conv3x3"].values
    values = found["latency", "conv3x3"].values
    assert values["macs"] == 3 * forward["macs"]
    assert values["memory_accesses"] == 3 * forward["memory_accesses"]


def test_backward_computes_every_gradient_in_inference_mode() -> None:
    stack = operators._create_stack(f"{PCONV}+pwconv", "", 16, seed=0)
    x, upstream = torch.randn(2, 1, 16, 6, 5)
    with torch.inference_mode():
        output, *gradients = operators._create_call(stack, x, upstream, "forward+backward")()
    leaf = x.clone().requires_grad_()
    expected = stack(leaf)
    expected.backward(upstream)
    torch.testing.assert_close(output, expected.detach())
    assert len(gradients) == 1 + 2 * operators.NUM_LAYERS
    for gradient, tensor in zip(gradients, [leaf, *stack.parameters()], strict=True):
        torch.testing.assert_close(gradient, tensor.grad)


def test_wrong_gradient_is_recorded_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        return eager.slicing(x, weight.detach() + 0 * weight, **options)  # right output, no gradient of the weights

    monkeypatch.setattr("fasternet.ops.pconv._IMPLS", {"split_cat": eager.split_cat, "slicing": forget})
    found = _measure(PCONV, f"{PCONV}:slicing", passes="forward+backward")
    assert found["latency", f"{PCONV}:slicing"].values["error"].startswith("wrong: relative difference")
    assert "latency_ms" in found["latency", PCONV].values


@pytest.mark.parametrize("shape", SHAPES)
def test_counted_costs_equal_the_equations(shape: tuple[int, int, int]) -> None:
    channels, *size = shape
    partial = PConv2d(channels).partial_channels
    pconv = complexity.pconv_memory_accesses(*size, partial)
    conv, pwconv = (complexity.conv_memory_accesses(*size, channels, kernel_size=k) for k in (3, 1))
    depthwise = {
        name: complexity.conv_memory_accesses(*size, width * channels, groups=width * channels)
        for name, width in {"dwconv3x3": 1, **WIDTHS}.items()
    }
    accesses = {
        "conv3x3": conv,  # Eq. 3
        "gconv3x3_16groups": complexity.conv_memory_accesses(*size, channels, groups=16),
        **depthwise,  # Eq. 2
        PCONV: pconv,  # Eq. 5
        f"{PCONV}+pwconv": pconv + pwconv,
        "dwconv3x3+pwconv": depthwise["dwconv3x3"] + pwconv,
    }
    macs = {
        PCONV: complexity.pconv_macs(*size, partial),  # Eq. 4
        "tconv3x3_r1/4": complexity.tconv_macs(*size, channels, partial),
        f"{PCONV}+pwconv": complexity.pconv_pwconv_macs(*size, channels, partial),
        "dwconv3x3_6x": complexity.conv_macs(*size, 6 * channels, groups=6 * channels),
    }

    def count(name: str) -> dict[str, int]:
        layer = create_operator(name, channels)
        return operators._count_costs(layer, (1, channels * WIDTHS.get(name, 1), *size), "forward")[0]

    assert {name: count(name)["memory_accesses"] for name in accesses} == accesses
    assert {name: count(name)["macs"] for name in macs} == macs


@pytest.mark.parametrize(
    ("macs", "working_set", "expected"),
    [
        (1, 2 * 2**20, (0.5, 40.0)),  # copying 1 MiB touches two
        (1, 2 * 2**20 + 1, (0.5, 10.0)),
        (1, 2**40, (0.5, 10.0)),  # more than any buffer that was copied
        (8, 2**20, (4.0, 100.0)),
    ],
)
def test_roofline_takes_the_bandwidth_of_what_fits(macs: int, working_set: int, expected: tuple[float, float]) -> None:
    peaks = [Peak("copy", {"mib": 8}, 20.0), Peak("copy", {"mib": 1}, 80.0), Peak("gemm", {"precision": "fp32"}, 100.0)]
    assert tuple(find_roofline(macs, 2, working_set, peaks).values()) == expected


def test_latency_record_tells_its_roofline() -> None:
    values = _measure("dwconv3x3", batch_size=3)["latency", "dwconv3x3"].values
    work, accesses = 10 * 6 * 5 * 9 * 16, 10 * (3 * 2 * 6 * 5 * 16 + 9 * 16)
    assert values["arithmetic_intensity"] == pytest.approx(3 * work / (4 * accesses))
    assert values["roofline_macs_per_second"] == pytest.approx(min(1e9, 2e9 * values["arithmetic_intensity"]))
    assert values["roofline_share"] == pytest.approx(values["macs_per_second"] / values["roofline_macs_per_second"])


def test_latency_record_holds_rates_and_samples() -> None:
    record = _measure("dwconv3x3", PCONV, batch_size=3)["latency", PCONV]
    values, work = record.values, 10 * 6 * 5 * 9 * 4 * 4
    assert record.condition == {
        **{"channels": 16, "height": 6, "width": 5, "num_layers": 10, "batch_size": 3, "threads": 1},
        "passes": "forward",
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
    control = found["ratio", "conv3x3", "conv3x3"]  # without a PConv the first one is the baseline
    assert len(control.samples["latency_ms"]) == 4
    assert found["ratio", "dwconv3x3", "conv3x3"].values["a_a_spread"] == control.values["a_a_spread"]


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
    x = torch.randn(1, 32 * WIDTHS.get(name, 1), 28, 28)
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
        ({"passes": "backward"}, "passes 'backward' is not one of forward, forward\\+backward"),
        ({"passes": "forward+backward", "operators": [f"{PCONV}:in_place"]}, "in_place' overwrites what"),
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
