"""Figures 1, 2, 4, 7 and 8: which points they show, how these name themselves, what is drawn hollow and said why."""

import dataclasses
import math
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasternet.paper import load_accuracy, load_table
from fasternet.records import Machine, Record
from fasternet.report import figures
from fasternet.report.architecture import show_figure4
from fasternet.report.figures import show_figure1, show_figure2, show_figure7, show_figure8
from fasternet.report.points import Point
from fasternet.report.sources import Source

WAYS = {("eager", "fp32"): 1.0, ("openvino", "fp32"): 0.6, ("onnxruntime", "fp32"): 0.7, ("openvino", "int8"): 0.3}


def make_engines(example: ModuleType, *, names: Sequence[str] = (), **condition: Any) -> list[Record]:
    """Networks in several engines and precisions, with every kind of ratio, one failure and one wrong result."""
    paper = {row["network"]: row for row in load_table("table3_imagenet")}
    owners = {row["group"]: row["network"] for row in paper.values() if row["network"].startswith("FasterNet")}
    own = [name for name in load_accuracy() if not names or name in names]
    batch = condition.get("batch_size", 1)
    times = {
        (name, way): batch**0.9 * share * (1 + 0.2 * math.sin(7 * place)) * float(paper[name]["cpu_latency_ms"])
        if name in paper
        else batch * share * (9 + 3 * place % 17)
        for place, name in enumerate(own)
        for way, share in WAYS.items()
    }
    records = []
    for (name, way), latency in times.items():
        here = example.CPU | {"input_size": 224} | condition | {"engine": way[0], "precision": way[1]}
        if (name, *way) == ("Swin-B", "eager", "fp32") or (name, *way) == ("CycleMLP-B1", "onnxruntime", "fp32"):
            error = "OOM" if name == "Swin-B" else "wrong: relative difference 0.3, at most 0.001 is allowed"
            records.append(example.make("networks", "latency", name, condition=here, values={"error": error}))
            continue
        row = paper.get(name, {"params_m": "4", "macs_g": "0.4", "group": "1"})
        values = {
            "num_params": 1e6 * float(row["params_m"]), "load_s": 0.8, "peak_memory_mib": 210.0,
            "file_bytes": None if way[0] == "eager" else 2e7, "latency_ms_low": 0.99 * latency,
            "latency_ms_high": 1.01 * latency, "speed_only": way[1] == "int8", "unstable": name == "Swin-T",
        }  # fmt: skip
        macs = 1e9 * float(row["macs_g"])
        records.append(example.make_latency("networks", name, latency, here, macs=macs, **values))
        records += list_ratios(example, name, way, here, times, owners[row["group"]])
    return records


def list_ratios(
    example: ModuleType, name: str, way: tuple[str, str], here: dict[str, Any], times: dict[Any, float], owner: str
) -> list[Record]:
    pairs = [(baseline, way, False) for baseline in dict.fromkeys(("FasterNet-T0", owner))] + [(name, WAY, False)]
    pairs += [(owner, BEST, True)] if way == BEST and name != owner else []
    records = []
    for baseline, other, best in pairs:
        if (baseline, other) not in times or (baseline, other) == (name, way):
            continue
        extra = {"baseline_engine": other[0], "baseline_precision": other[1]} | ({"best_engines": True} if best else {})
        ratio = times[name, way] / times[baseline, other]
        records.append(example.make_ratio("networks", name, baseline, ratio, here | extra))
    return records


WAY, BEST = ("eager", "fp32"), ("openvino", "fp32")


def as_sources(records: Sequence[Record]) -> list[Source]:
    return [Source(Path("records.jsonl"), tuple(records))]


def read_tips(drawing: str) -> Mapping[str, list[str]]:
    """Return how points of the wide drawings name themselves, by what filters know them by."""
    tips: dict[str, list[str]] = {}
    pattern = r'<g class="point" data-engine="([^"]*)"><title>(.*?)</title>'
    for wide in re.findall(r'<div class="wide">.*?</div>', drawing, re.DOTALL):
        for engine, tip in re.findall(pattern, wide):
            tips.setdefault(engine, []).append(tip)
    return tips


def test_figure1_shows_the_four_operators_and_the_papers(example: ModuleType) -> None:
    backward = [
        dataclasses.replace(record, condition=record.condition | {"passes": "forward+backward"})
        for record in example.make_operators()
    ]
    (drawing,) = show_figure1(as_sources([*example.make_operators(), *backward]), {})
    tips = read_tips(drawing)
    assert len(tips["eager fp32"]) == len(tips["paper"]) == 16
    assert "PConv 3×3, r = 1/4, C 96: 0.162, 114 (eager fp32)" in tips["eager fp32"]
    assert "DWConv 3×3, C 768: 0.00338, 4.93 (paper)" in tips["paper"]


def test_figure2_shows_every_engine_and_marks_it_for_the_filter(example: ModuleType) -> None:
    records = make_engines(example, names=("FasterNet-T0", "FasterNet-T1", "ResNet50"))
    variant = example.make_latency("networks", "FasterNet-T0 LN", 9.0, example.CPU, macs=3e8)
    form = example.make_latency("networks", "FasterNet-T0:slicing", 9.0, example.CPU, macs=3e8)
    (drawing,) = show_figure2(as_sources([*records, variant, form]), {})
    tips = read_tips(drawing)
    assert {engine: len(found) for engine, found in tips.items()} == {
        "paper": 70, "eager fp32": 6, "OpenVINO fp32": 6, "ONNX Runtime fp32": 6,
        "OpenVINO int8, speed only": 6,
    }  # fmt: skip
    legend = re.findall(r'<li class="(?:engine|paper)" data-engine="([^"]*)"', drawing)
    assert set(legend) == set(tips)
    for engine in legend:
        assert re.search(rf'<g id="[^"]*-point\d+" data-engine="{engine}">', drawing)
    assert drawing.count('-line1" data-engine="eager fp32">') == 4  # two panels, each wide and narrow
    assert re.search(r'<g id="[^"]*-name0" data-engine="eager fp32">', drawing)


def test_figure8_shows_published_accuracy_over_what_was_measured(example: ModuleType) -> None:
    names = ("FasterNet-T0", "ResNet50", "shvit_s1", "Swin-B", "CycleMLP-B1")
    records = make_engines(example, names=names)
    (drawing,) = show_figure8(as_sources(records), {example.MACHINE.id: example.MACHINE})
    tips = read_tips(drawing)
    latency = next(r.values["latency_ms"] for r in records if r.kind == "latency" and r.subject == "shvit_s1")
    assert f"shvit_s1: {latency:.3g}, 72.8 (eager fp32)" in tips["eager fp32"]
    assert "OpenVINO int8, speed only" not in tips  # its accuracy is another
    assert len(tips["eager fp32"]) == 4  # Swin-B is out of memory
    assert "FasterNet-L: 345, 83.5 (paper)" in tips["paper"]
    assert "FasterNet-L: 210, 83.5 (paper)" in tips["paper"]
    assert "Not run: needs a GPU." in drawing
    assert "Not run: needs an ARM machine." in drawing
    assert "Not run: needs a CPU" not in drawing
    assert "SHViT, CVPR 2024 (shvit_s1)" in drawing


def test_figure7_leaves_out_what_is_much_slower(example: ModuleType) -> None:
    names = ("FasterNet-T0", "FasterNet-S", "FasterNet-L", "ResNet50", "ConvNeXt-B", "Swin-T")
    sources = as_sources(make_engines(example, names=names))
    (near,), (full,) = show_figure7(sources, {}), show_figure8(sources, {})
    limit = 2 * float(re.findall(r"FasterNet-S: ([\d.]+), [\d.]+ \(eager fp32\)", full)[0])
    latencies = [float(re.findall(r": ([\d.e+]+),", tip)[0]) for tip in read_tips(full)["eager fp32"]]
    assert len(read_tips(near)["eager fp32"]) == sum(latency <= limit for latency in latencies) < len(latencies)
    assert "at most 2 times as long as FasterNet-S" in near
    assert "FasterNet-L: 345" not in near
    assert "panel and engine. " not in near
    assert "panel and engine.<" in near
    (without,) = show_figure7(as_sources(make_engines(example, names=("FasterNet-T0", "ResNet50"))), {})
    assert "all of eager fp32 (CPU latency), OpenVINO fp32 (CPU latency)" in without


def test_panels_share_the_markers_of_their_legend(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = []

    def draw(points: Sequence[Point], *, markers: dict[str, str], **_: object) -> str:
        shared.append((markers, {point.engine for point in points if point.measured}))
        return ""

    monkeypatch.setattr(figures, "draw_networks", draw)
    cpu = [r for r in make_engines(example, names=("ResNet50",)) if r.condition["engine"] == "openvino"]
    gpu = make_engines(example, names=("ResNet50",), device="cuda", batch_size=32)
    show_figure8(as_sources([*cpu, *[r for r in gpu if r.condition["engine"] == "eager"]]), {})
    assert [engines for _, engines in shared] == [{"eager fp32"}, {"OpenVINO fp32"}, set()]
    assert all(markers == {"eager fp32": "o", "OpenVINO fp32": "s"} for markers, _ in shared)


def test_other_input_sizes_stay_out_of_published_accuracy(example: ModuleType) -> None:
    records = make_engines(example, names=("FasterNet-T0", "ResNet50"))
    small = make_engines(example, names=("MobileNetV2",), input_size=128)
    (drawing,) = show_figure8(as_sources([*records, *small]), {})
    assert not any(tip.startswith("MobileNetV2") for tip in read_tips(drawing)["eager fp32"])
    assert show_figure8(as_sources(small), {}) == []


@pytest.mark.parametrize(
    ("architecture", "condition", "panels"),
    [
        ("x86_64", {"device": "cuda", "batch_size": 32}, ["GPU throughput, images/s (CUDA", "CPU latency, ms, the"]),
        ("aarch64", {}, ["GPU throughput, images/s, the", "CPU latency, ms, the", "ARM latency, ms (CPU"]),
    ],
)
def test_panel_belongs_to_the_device(
    example: ModuleType, architecture: str, condition: dict[str, Any], panels: list[str]
) -> None:
    machine: Machine = dataclasses.replace(example.MACHINE, architecture=architecture)
    records = make_engines(example, names=("FasterNet-T0", "ResNet50"), **condition)
    (drawing,) = show_figure8(as_sources(records), {machine.id: machine})
    for panel in panels:
        assert drawing.count(panel) >= 2


def test_figure4_holds_the_numbers_of_table8() -> None:
    (drawing,) = show_figure4([], {})
    cells = [re.findall(r"<t[hd][^>]*>([^<]*)<", row) for row in re.findall(r"<tr>.*?</tr>", drawing)]
    (large,) = [row for row in cells if row[0] == "FasterNet-L"]
    assert large == ["FasterNet-L", "192", "3", "384", "4", "768", "18", "1536", "3", "ReLU", "93.4", "15.49"]
    assert re.findall(r"<strong>(.*?)</strong>", drawing)[:4] == ["Picture", "Embedding", "Stage 1", "Merging"]


@pytest.mark.parametrize("show", [show_figure1, show_figure2, show_figure7, show_figure8])
def test_figures_exist_only_where_records_do(example: ModuleType, show: Any) -> None:
    assert show(as_sources(example.make_run(epochs=1)), {}) == []
    assert show(as_sources([example.make("networks", "latency", "Swin-S", values={"error": "OOM"})]), {}) == []


CHROMIUM = shutil.which("chromium")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_check_box_hides_one_engine_in_the_browser(example: ModuleType, tmp_path: Path) -> None:
    (drawing,) = show_figure2(as_sources(make_engines(example, names=("FasterNet-T0", "ResNet50"))), {})
    script = resources.files("fasternet.report").joinpath("templates/sort.js").read_text(encoding="utf-8")
    page = tmp_path / "page.html"
    records = '<script type="application/json" id="records">{}</script><a id="download-records">raw</a>'
    click = "document.querySelector('[data-engine=\"OpenVINO fp32\"] input').click();"
    page.write_text(f'<meta charset="utf-8">{drawing}{records}<script>{script}{click}</script>', encoding="utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
    command = [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    hidden = re.findall(
        r'<g [^>]*data-engine="([^"]*)"[^>]*class="(?:point )?off"|class="point off"[^>]*"([^"]*)">', shown
    )
    assert {name for pair in hidden for name in pair if name} == {"OpenVINO fp32"}
    assert shown.count('class="point off"') == 2 * 2 * 2  # networks, panels, widths
    assert shown.count('type="checkbox"') == 5
    assert 'href="blob:' in shown
