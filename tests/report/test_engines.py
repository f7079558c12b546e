"""The CPU engine beside its rivals: one table of ratios under equal conditions, one of its parts."""

import dataclasses
import re
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

from fasternet.records import Record, append_records, save_machine
from fasternet.report.engines import show_engines
from fasternet.report.page import create_report
from fasternet.report.sources import Source

TIMES = {  # ms, by form, engine and precision
    **{("", "cpu", "fp32"): 4.0, ("inplace", "eager", "fp32"): 9.0, ("max_autotune", "compile", "fp32"): 7.0},
    **{("", "openvino", "fp32"): 5.0, ("", "cpu", "bf16"): 1.0, ("", "openvino", "bf16"): 2.0},
}


def make_records(example: ModuleType, **condition: Any) -> list[Record]:
    records = []
    for (form, engine, precision), latency in TIMES.items():
        subject = f"FasterNet-T0:{form}" if form else "FasterNet-T0"
        here = example.CPU | {"input_size": 224, "engine": engine, "precision": precision} | condition
        values = {"register_peak_share": 0.5, **({"exact": False} if form == "inplace" else {})}
        records.append(example.make_latency("engines", subject, latency, here, macs=3e8, **values))
        for own, other in ((4.0, precision), (1.0, "bf16")):
            if engine == "cpu" or (other == "bf16" and own == 4.0) or (precision == "bf16" and own != 1.0):
                continue
            pair = here | {"engine": "cpu", "precision": "fp32" if own == 4.0 else "bf16", "baseline_engine": engine}
            pair |= {"baseline_precision": precision}
            records.append(example.make_ratio("engines", "FasterNet-T0", subject, own / latency, pair))
            if engine == "openvino" and pair["precision"] == precision:
                best = example.make_ratio(
                    "engines", "FasterNet-T0", subject, own / latency, pair | {"best_rival": True}
                )
                target = 1.15 if precision == "fp32" else None
                judged = {"times_as_fast": latency / own, "target": target}
                judged |= {"target_reason": "met" if target else "no AMX here"}
                records.append(dataclasses.replace(best, values={**best.values, **judged}))
    base = example.CPU | {"input_size": 224, "precision": "fp32"} | condition
    failed = {"error": "left out: ONNX Runtime takes what the processor has"}
    records.append(
        example.make("engines", "latency", "FasterNet-T0", condition=base | {"engine": "onnxruntime"}, values=failed)
    )
    for stage, share in (("embedding", 0.1), ("stage 1", 0.9)):
        values = {"latency_ms": 4 * share, "share": share, "macs": 1e8, "macs_per_second": 2.5e10, "isa": "avx512"}
        values |= {"register_peak_share": 0.4, "num_layers": 2}
        own = base | {"engine": "cpu", "stage": stage}
        records.append(example.make("engines", "stage", "FasterNet-T0", condition=own, values=values))
    return records


def show(records: list[Record]) -> list[str]:
    return [str(content) for content in show_engines([Source(Path("records.jsonl"), tuple(records))], {})]


def read_rows(content: str) -> list[list[str]]:
    rows = re.findall(r"<tr[^>]*><th scope=\"row\".*?</tr>", content, re.DOTALL)
    return [[unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_rivals_stand_below_the_engine_with_their_ratios(example: ModuleType) -> None:
    rivals, _ = show(make_records(example))
    rows = {(row[1], row[2]): row[3:] for row in read_rows(rivals)}
    assert list(rows) == [
        ("fp32", "CPU engine"),
        ("fp32", "eager, in place (not exact)"),
        ("fp32", "torch.compile, max-autotune"),
        ("fp32", "OpenVINO – the best rival"),
        ("fp32", "ONNX Runtime"),
        ("bf16", "CPU engine"),
        ("bf16", "OpenVINO – the best rival"),
    ]
    assert rows["fp32", "CPU engine"][3] == "–"
    assert rows["fp32", "eager, in place (not exact)"][3:7] == ["0.444", "0.436–0.458", "2.25", "faster"]
    assert rows["bf16", "OpenVINO – the best rival"][3:6] == ["0.500", "0.490–0.515", "2.00"]
    assert rows["fp32", "eager, in place (not exact)"][7] == "0.111"
    assert [rows["fp32", "CPU engine"][i] for i in (5, 8)] == ["1.25", "met (1.15)"]
    assert [rows["bf16", "CPU engine"][i] for i in (5, 8)] == ["2.00", "no AMX here"]
    assert rows["fp32", "ONNX Runtime"][0] == "left out1"
    assert "ONNX Runtime takes what the processor has" in rivals
    assert rows["fp32", "CPU engine"][-1] == "50"


def test_parts_tell_time_and_share_of_the_peak(example: ModuleType) -> None:
    _, parts = show(make_records(example))
    assert read_rows(parts)[1] == [
        "FasterNet-T0",
        "fp32",
        "stage 1",
        "avx512",
        "2",
        "3.600",
        "90.0",
        "0.1000",
        "25.0",
        "40",
    ]


def test_instruction_sets_have_tables_of_their_own(example: ModuleType) -> None:
    titles = [
        re.findall(r"<figcaption.*?>(.*?)<", c)[0]
        for c in show([*make_records(example), *make_records(example, isa="avx2")])
    ]
    assert len(titles) == 4
    assert sum("avx2 at most" in title for title in titles) == 2


def test_page_and_its_twin_have_the_section(example: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "engines.jsonl"
    append_records(path, make_records(example))
    save_machine(tmp_path / "machines", example.MACHINE)
    page = create_report([path], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>The CPU engine</h2>" in page
    twin = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "## The CPU engine" in twin
    assert "OpenVINO – the best rival" in twin
