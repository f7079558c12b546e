"""Table 3 with a group of columns for each engine, the table of engines, and Table 5."""

import dataclasses
import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasternet.records import Record, load_records
from fasternet.report.networks import show_networks
from fasternet.report.settings import Way, is_published, list_settings, read_way
from fasternet.report.sources import Source
from fasternet.report.table5 import show_table5

RESULTS = Path(__file__).parents[2] / "results" / "amd-epyc-2c" / "2026-11-21-networks.jsonl"
OPENVINO = {"engine": "openvino"}


def as_sources(records: Sequence[Record]) -> list[Source]:
    return [Source(Path("records.jsonl"), tuple(records))]


def load_old() -> list[Record]:
    """Return the published records of a commit in which there were no engines."""
    return [record for record in load_records(RESULTS) if record.commit == "e6c7babaf431"]


def read_rows(content: str) -> dict[str, list[str]]:
    """Return the cells of a table by the heading of their row; of several of one name the last."""
    rows = re.findall(r"<tr[^>]*><th scope=\"row\".*?</tr>", content, re.DOTALL)
    cells = [[unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]
    return {row[0]: row[1:] for row in cells}


def read_headings(content: str) -> list[str]:
    return [unescape(name) for name in re.findall(r'<th scope="colgroup"[^>]*>([^<]*)</th>', content)]


@pytest.fixture
def engines(example: ModuleType) -> list[Record]:
    """Two networks and a failing one, in eager and OpenVINO, with every kind of ratio."""
    records = []
    times = {"FasterNet-T0": (8.0, 5.0), "MobileNetV2": (12.0, 6.0)}
    for place, engine in enumerate(("eager", "openvino")):
        here = example.CPU | {"input_size": 224, "engine": engine}
        own = {"baseline_engine": engine, "baseline_precision": "fp32"}
        eager = {"baseline_engine": "eager", "baseline_precision": "fp32"}
        for name, latencies in times.items():
            values = {"num_params": 3.5e6, "load_s": 0.25, "file_bytes": 14e6 if place else None}
            latency = latencies[place]
            records.append(example.make_latency("networks", name, latency, here, macs=3e8, **values))
            ratio = latency / times["FasterNet-T0"][place]
            records.append(example.make_ratio("networks", name, "FasterNet-T0", ratio, here | own))
            if place:
                ratio = latency / latencies[0]
                records.append(example.make_ratio("networks", name, name, ratio, here | eager))
    best = example.CPU | {"input_size": 224, "baseline_engine": "onnxruntime", "best_engines": True} | OPENVINO
    records.append(example.make_ratio("networks", "MobileNetV2", "FasterNet-T0", 1.25, best))
    wrong = {"error": "wrong: relative difference 0.3"}
    here = example.CPU | {"input_size": 256} | OPENVINO
    records.append(example.make("networks", "latency", "MobileViT-XXS", condition=here, values=wrong))
    return records


def test_engines_of_one_setting_share_a_table(engines: list[Record]) -> None:
    table3, _ = show_networks(as_sources(engines), {})
    assert read_headings(table3)[-3:] == ["eager fp32", "OpenVINO fp32", "Each in its fastest fp32 engine"]
    row = read_rows(table3)["MobileNetV2"]
    assert row[5:10] == ["72.0", "13.20", "12.20", "1.61", "FasterNet-T0"]
    assert row[10:16] == ["12.00", "1.50", "1.47–1.54", "6.00", "1.20", "1.18–1.24"]
    assert row[16:] == ["OpenVINO fp32", "1.25", "1.23–1.29", "FasterNet-T0, ONNX Runtime fp32"]
    assert "paper, Table 3" in table3


def test_failure_has_a_footnote_and_what_was_not_measured_a_dash(engines: list[Record]) -> None:
    table3, _ = show_networks(as_sources(engines), {})
    assert read_rows(table3)["MobileViT-XXS"][10:14] == ["–", "–", "–", "wrong1"]
    assert '<span id="table-3-1-footnotes"><sup>1</sup> wrong: relative difference 0.3 </span>' in table3


def test_engines_are_told_relative_to_the_networks_own_eager_fp32(engines: list[Record]) -> None:
    _, content = show_networks(as_sources(engines), {})
    row = read_rows(content)["MobileNetV2"]
    assert row[:3] == ["224", "OpenVINO fp32", "6.00"]
    assert row[6:10] == ["0.50", "0.49–0.52", "0.25", "14.0"]
    assert '<span data-engine="OpenVINO fp32">' in content


def test_int8_is_marked_speed_only(example: ModuleType) -> None:
    here = example.CPU | {"input_size": 224}
    quantised = example.make_latency(
        "networks", "ResNet50", 9.0, here | OPENVINO | {"precision": "int8"}, macs=4e9, speed_only=True
    )
    plain = example.make_latency("networks", "ResNet50", 30.0, here, macs=4e9)
    table3, content = show_networks(as_sources([plain, quantised]), {})
    assert read_headings(table3)[-1] == "OpenVINO int8, speed only"
    assert read_rows(content)["ResNet50"][1] == "OpenVINO int8, speed only"


def test_todays_networks_follow_with_their_published_accuracy(example: ModuleType, engines: list[Record]) -> None:
    here = example.CPU | {"input_size": 224}
    own = example.make_latency("networks", "shvit_s1", 4.0, here, macs=2e8)
    ratios = [
        example.make_ratio("networks", "shvit_s1", other, 0.5, here)
        for other in ("FasterNet-T0:split_cat", "FasterNet-T0")
    ]
    table3, _ = show_networks(as_sources([own, *ratios, *engines]), {})
    rows = read_rows(table3)
    assert "FasterNet-T0" in rows["shvit_s1"]  # the deployed form is what times are relative to
    assert list(rows)[-1] == "shvit_s1"
    assert "72.8" in rows["shvit_s1"]
    assert "SHViT, CVPR 2024 (shvit_s1)" in table3


def test_records_from_before_there_were_engines_still_show() -> None:
    (table3,) = show_networks(as_sources(load_old()), {})
    row = read_rows(table3)["ResNet50"]
    assert read_headings(table3)[-1] == "eager fp32"
    assert row[9] == "FasterNet-T2"
    assert all(cell != "–" for cell in row[10:])


def test_other_input_size_stands_beside_neither_the_papers_numbers_nor_published_accuracy(example: ModuleType) -> None:
    small = example.make_latency("networks", "MobileNetV2", 3.0, example.CPU | {"input_size": 128}, macs=1e8)
    (table3,) = show_networks(as_sources([small]), {})
    own, paper = re.findall(r'<th scope="row">MobileNetV2</th>(.*?)</tr>', table3)
    assert (">128<" in own, "72.0" in own, "13.20" in own) == (True, False, False)
    assert (">128<" in paper, "72.0" in paper, "13.20" in paper) == (False, True, True)
    assert is_published("EdgeNeXt-S", 256)
    assert not is_published("EdgeNeXt-S", 224)
    assert is_published("fastvit_t8", 256)
    variant = example.make_latency("networks", "FasterNet-T0 LN", 3.0, example.CPU | {"input_size": 128}, macs=1e8)
    assert show_table5(as_sources([variant]), {}) == []


def test_quick_or_smaller_run_replaces_no_full_one(example: ModuleType) -> None:
    here = example.CPU | {"input_size": 224}
    best = here | {"best_engines": True, "engine": "openvino", "baseline_engine": "eager"}
    latency = example.make_latency("networks", "MobileNetV2", 12.0, here, macs=3e8)
    full = [
        example.make_ratio("networks", "MobileNetV2", "FasterNet-T0", 1.5, here),
        example.make_ratio("networks", "MobileNetV2", "FasterNet-T0", 1.2, best),
    ]
    quick = example.make_ratio("networks", "MobileNetV2", "FasterNet-T0", 9.0, here)
    quick = dataclasses.replace(quick, values=quick.values | {"num_blocks": 32}, created="2026-02-02", command="quick")
    other = example.make_ratio("networks", "MobileNetV2", "FasterNet-T0", 8.0, best | {"engine": "eager"})
    other = dataclasses.replace(other, created="2026-02-02", command="eager only")
    (found,) = list_settings(as_sources([latency, *full, quick, other]), {})
    assert [timing.value for timing in found.timings.values()] == [1.5]
    assert [timing.value for _, timing in found.best.values()] == [1.2]


def test_setting_is_one_machine_device_threads_and_batch(example: ModuleType, engines: list[Record]) -> None:
    (found,) = list_settings(as_sources(engines), {})
    assert found.ways == (Way("eager", "fp32"), Way("openvino", "fp32"))
    batch = example.make_latency("networks", "ResNet50", 9.0, example.CPU | {"batch_size": 32}, macs=4e9)
    assert len(list_settings(as_sources([*engines, batch]), {})) == 2


def test_baseline_runs_the_same_way_unless_the_record_says_otherwise(example: ModuleType) -> None:
    ratio = example.make_ratio("networks", "a", "b", 1.0, example.CPU | OPENVINO)
    assert read_way(ratio) == read_way(ratio, "baseline_") == Way("openvino", "fp32")
    other = example.make_ratio("networks", "a", "b", 1.0, example.CPU | OPENVINO | {"baseline_engine": "eager"})
    assert read_way(other, "baseline_") == Way("eager", "fp32")


def make_variants(example: ModuleType) -> list[Record]:
    here: dict[str, Any] = example.CPU | {"input_size": 224}
    times = {"FasterNet-T0": 8.0, "FasterNet-T2": 30.0, "FasterNet-T0 LN": 12.0, "FasterNet-T2 GELU": 33.0}
    records = [example.make_latency("networks", name, ms, here, macs=3e8) for name, ms in times.items()]
    records.append(example.make_latency("networks", "FasterNet-T0", 5.0, here | OPENVINO, macs=3e8))
    return [*records, example.make_ratio("networks", "FasterNet-T0 LN", "FasterNet-T0", 1.5, here)]


def test_table5_sets_variants_against_the_papers_choice(example: ModuleType) -> None:
    (content,) = show_table5(as_sources(make_variants(example)), {})
    rows = read_rows(content)
    assert read_headings(content)[-1] == "eager fp32"  # nothing but the default ran in the other engine
    assert rows["T0 LN"][2:] == ["71.9", "10.30", "1.26", "FasterNet-T0", "12.00", "1.50", "1.47–1.54"]
    assert rows["T2 GELU"][5:] == ["FasterNet-T2", "33.00", "–", "–"]  # no ratio was measured
    assert rows["T0 BN"][6:] == ["8.00", "1.00", "–"]
    assert rows["T0* ReLU"][1] == "not built: unpublished"
    assert rows["T0* r=1/2"][1] == "stand-in"


def test_variants_stand_in_table5_alone(example: ModuleType) -> None:
    table3, content = show_networks(as_sources(make_variants(example)), {})
    assert "FasterNet-T0 LN" not in {**read_rows(table3), **read_rows(content)}
    assert show_table5(as_sources(load_old()), {}) == []
