"""``bench detection`` and ``reproduce table4``: real detectors composed, small; then what is printed and kept."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fasternet.benchmark import detection
from fasternet.benchmark.detection import PARTS
from fasternet.cli._detection import compose_methods, parse_size, print_detectors
from fasternet.cli.bench import bench
from fasternet.cli.reproduce import reproduce
from fasternet.detection import detector as detectors
from fasternet.environment import create_record
from fasternet.records import Record, check_records, load_records

SHARED = {"height": 800, "width": 1280, "batch_size": 1, "threads": 1, "device": "cpu"}
RATIO = {"ratio": 2.5, "low": 2.0, "high": 3.0, "verdict": "slower", "a_a_spread": 0.01, "num_blocks": 1}


def make_records() -> Iterator[Record]:
    for name, base in (("FasterNet-S", 100.0), ("ResNet50", 200.0)):
        yield create_record("detection", "cost", name, condition=SHARED, values={"macs": 1, "num_params": 1})
        for place, part in enumerate(PARTS):
            condition = SHARED | {"engine": "eager", "precision": "fp32", "part": part}
            values = {"latency_ms": base + place, "unstable": False}
            samples = {"latency_ms": [base + place]}
            yield create_record("detection", "latency", name, condition=condition, values=values, samples=samples)
            against = condition | {"baseline": "FasterNet-S", "metric": "latency_ms"}
            yield create_record("detection", "ratio", name, condition=against, values=RATIO)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Replace the measuring, and return what it is asked for."""
    calls: list[dict[str, Any]] = []

    def measure_detection(names: Any, **options: Any) -> Iterator[Record]:
        calls.append({"names": names, **options})
        return make_records()

    monkeypatch.setattr(detection, "measure_detection", measure_detection)
    monkeypatch.chdir(tmp_path)
    return calls


def run(app: Any, *arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_parts_are_printed_with_the_ratio_beside_the_papers(asked: list[dict[str, Any]]) -> None:
    result = run(bench, "detection", "--networks", "FasterNet-S,ResNet50", "--size", "64x96", "--quick")
    assert result.exit_code == 0
    (call,) = asked
    assert call["names"] == ["FasterNet-S", "ResNet50"]
    assert (call["size"], call["quick"], call["known"]) == ((64, 96), True, [])
    (line,) = (line.split() for line in result.stdout.splitlines() if "ResNet50" in line)
    assert line[:6] == ["ResNet50", "200", "201", "202", "203", "204"]
    assert line[6:8] == ["1.564", "2.5"]  # 54.9 over 35.1 ms
    assert line[8:] == ["2.000", "to", "3.000", "FasterNet-S"]
    title = " ".join(result.stdout.split())
    assert title.startswith("Mask R-CNN, part by part, 800x1280, cpu, eager fp32, 1 thread; ratios of the whole")
    assert "paper v1: its GPU latencies" in title


def test_paper_is_not_quoted_at_another_size(capsys: pytest.CaptureFixture[str]) -> None:
    records = [dataclasses.replace(r, condition={**r.condition, "height": 320, "width": 512}) for r in make_records()]
    print_detectors(records)
    printed = capsys.readouterr().out
    assert "320x512" in printed
    assert "1.564" not in printed


def test_records_are_kept_printed_and_resumed(asked: list[dict[str, Any]]) -> None:
    result = run(bench, "detection", "--out", "mine.jsonl", "--json")
    document = json.loads(result.stdout)
    assert len(document) == len(load_records(Path("mine.jsonl"))) == 22
    run(bench, "detection", "--out", "mine.jsonl", "--resume")
    assert asked[0]["names"] is None
    assert len(asked[1]["known"]) == 22


def test_table4_is_measured_kept_and_shown(asked: list[dict[str, Any]]) -> None:
    result = run(reproduce, "table4", "--quick", "--size", "320x512")
    assert result.exit_code == 0
    assert (asked[0]["names"], asked[0]["quick"], asked[0]["size"]) == (None, True, (320, 512))
    assert result.stdout.startswith("**Table 4. Mask R-CNN")
    assert result.stdout.splitlines()[-1] == "outputs/reproduce/table4.html"
    (records,) = Path("results").rglob("*-detection.jsonl")
    run(reproduce, "table4", "--records", str(records))
    assert len(asked) == 1


@pytest.mark.parametrize("text", ["800", "800x", "-1x32", "8e2x32", "800 x 1280", "1x2x3"])
def test_size_is_height_by_width(text: str) -> None:
    assert parse_size("800x1280") == (800, 1280)
    with pytest.raises(ValueError, match="must be height by width in pixels, as in 800x1280"):
        parse_size(text)


def test_engine_auto_is_refused(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="engine auto"):
        run(bench, "detection", "--engine", "auto")
    assert asked == []


def test_real_detectors_pass_their_check_and_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    create = detectors.create_mask_rcnn

    def create_narrow(name: str, **options: Any) -> Any:
        if name.startswith("fasternet"):
            options["backbone_options"] = {"width": 8, "depths": (1, 1, 1, 1)}
        return create(name, fpn_channels=8, box_head_width=16, mask_head_channels=8, **options)

    monkeypatch.setattr(detectors, "create_mask_rcnn", create_narrow)
    monkeypatch.setattr(detection, "NUM_QUICK_BLOCKS", 1)
    path = tmp_path / "mine.jsonl"
    networks = "FasterNet-T0:split_cat,FasterNet-T0,mobilenetv4_conv_small"
    run(bench, "detection", "--networks", networks, "--size", "32x64", "--quick", "--out", str(path))
    records = load_records(path)
    assert not [record.values for record in records if "error" in record.values]
    assert {(r.subject, r.condition["part"]) for r in records if r.kind == "latency"} == {
        (name, part) for name in networks.split(",") for part in PARTS
    }
    compared = {(r.subject, r.condition["baseline"]) for r in records if r.kind == "ratio"}
    assert {baseline for _, baseline in compared} == {"FasterNet-T0"}
    assert ("FasterNet-T0:split_cat", "FasterNet-T0") in compared
    (macs,) = {r.values["part_macs"]["box_head"] for r in records if r.kind == "cost"}
    assert macs == 1000 * (49 * 8 * 16 + 16 * (16 + 5 * 81))
    assert check_records(path) == []


def test_methods_deploy_in_the_engine_that_is_asked_for() -> None:
    methods = compose_methods("cpu", "fp32", 1)
    with pytest.raises(ValueError, match="engine cpu runs a FasterNet alone"):
        methods.optimize(methods.create("ResNet50"))
