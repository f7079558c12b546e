"""Sweeps: one plot and table for each thing that is swept, with the ideal line from the first point."""

import re
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasternet.records import Record
from fasternet.report.sources import Source
from fasternet.report.sweeps import show_sweeps


def make_sweep(
    example: ModuleType, sweep: str, latencies: dict[int, float], name: str = "FasterNet-T0", **condition: Any
) -> list[Record]:
    here = example.CPU | {"input_size": 224, "sweep": sweep} | condition
    return [
        example.make_latency("sweeps", name, latency, here | {sweep: value}, macs=1e9)
        for value, latency in latencies.items()
    ]


def show(records: list[Record]) -> list[str]:
    return [str(content) for content in show_sweeps([Source(Path("records.jsonl"), tuple(records))], {})]


def read_rows(content: str) -> list[list[str]]:
    rows = re.findall(r"<tr[^>]*><th scope=\"row\".*?</tr>", content, re.DOTALL)
    return [[unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


@pytest.mark.parametrize(
    ("sweep", "latencies", "share", "ideal"),
    [
        ("input_size", {64: 1.0, 128: 8.0}, "0.50", "in proportion to the pixels"),
        ("batch_size", {1: 2.0, 8: 8.0}, "2.00", "in proportion to the batch"),
        ("threads", {1: 8.0, 2: 5.0}, "0.80", "inversely to the threads"),
    ],
)
def test_sweep_is_told_relative_to_its_ideal(
    example: ModuleType, sweep: str, latencies: dict[int, float], share: str, ideal: str
) -> None:
    (content,) = show(make_sweep(example, sweep, latencies))
    times = [f"{latency:.2f}" for latency in latencies.values()]
    assert read_rows(content) == [["FasterNet-T0", "eager fp32", *times, share]]
    assert f"ideal: {ideal}" in content


def test_ideal_line_starts_at_the_first_point(example: ModuleType) -> None:
    (content,) = show(make_sweep(example, "threads", {2: 5.0, 1: 8.0, 4: 2.0}))  # ends where the ideal does
    (measured,), (ideal,) = (
        re.findall(rf'id="sweep-1-wide-line{number}" data-engine="eager fp32"><path d="([^"]*)"', content)
        for number in (0, 1)
    )
    first, *middle, last = re.findall(r"[ML] ([\d.]+ [\d.]+)", measured)
    assert re.findall(r"[ML] ([\d.]+ [\d.]+)", ideal) == [first, last]
    assert len(middle) == 1


def test_engines_share_a_plot_and_each_sweep_has_its_own(example: ModuleType) -> None:
    sizes = {64: 1.0, 128: 4.0}
    eager, openvino = (make_sweep(example, "input_size", sizes, engine=engine) for engine in ("eager", "openvino"))
    batches = make_sweep(example, "batch_size", {1: 1.0, 2: 2.0})
    first, second = show([*eager, *openvino, *batches])
    assert [row[1] for row in read_rows(first)] == ["eager fp32", "OpenVINO fp32"]
    assert '<li class="engine" data-engine="OpenVINO fp32">' in first
    assert "Latency over input’s side (CPU, 1 thread, batch 1)" in first
    assert "Latency over batch (CPU, 1 thread)" in second


def test_failure_stands_in_the_table(example: ModuleType) -> None:
    condition = example.CPU | {"sweep": "batch_size", "batch_size": 256, "input_size": 224}
    failed = example.make("sweeps", "latency", "FasterNet-T0", condition=condition, values={"error": "OOM"})
    (content,) = show([*make_sweep(example, "batch_size", {1: 2.0}), failed])
    assert read_rows(content) == [["FasterNet-T0", "eager fp32", "2.00", "OOM"]]
    (alone,) = show([failed])
    assert "<svg" not in alone


def test_records_without_a_sweep_are_none() -> None:
    assert show([]) == []
