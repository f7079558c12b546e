"""Table 4 of a report: every cell from its record, the paper's beside it, at any size."""

import re
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasternet.paper import load_table
from fasternet.records import Record
from fasternet.report.detection import PARTS, show_table4
from fasternet.report.page import create_report
from fasternet.report.sources import Source

TIMES = {"FasterNet-S": 100.0, "ResNet50": 150.0}


def make_records(example: ModuleType, height: int = 800, width: int = 1280, **changes: Any) -> list[Record]:
    size = {"height": height, "width": width, "batch_size": 1, "threads": 1, "device": "cpu"}
    condition = size | {"engine": "eager", "precision": "fp32"} | changes
    records = []
    for name, base in TIMES.items():
        costs = {"num_params": 5e7, "num_params_without_batch_norm": 4.9e7, "macs": 2.58e11, "attention_macs": 0}
        records.append(example.make("detection", "cost", name, condition=size, values=costs))
        for place, part in enumerate(PARTS, start=1):
            own = condition | {"part": part}
            records.append(example.make_latency("detection", name, place * base, own, macs=1e9))
            if name != "FasterNet-S":
                ratio = place + base / TIMES["FasterNet-S"]
                records.append(example.make_ratio("detection", name, "FasterNet-S", ratio, own))
    records.append(example.make_ratio("detection", "FasterNet-S", "FasterNet-S", 1.0, condition | {"part": "whole"}))
    return records


def show(records: list[Record]) -> list[str]:
    return [str(content) for content in show_table4([Source(Path("records.jsonl"), tuple(records))], {})]


def read_rows(content: str) -> dict[str, list[str]]:
    rows = re.findall(r"<tr[^>]*><th scope=\"row\".*?</tr>", content, re.DOTALL)
    cells = [[unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]
    return {row[0]: row[1:] for row in cells}


def test_every_cell_comes_from_its_record_or_from_the_paper(example: ModuleType) -> None:
    (content,) = show(make_records(example))
    rows = read_rows(content)
    block = [row["backbone"] for row in load_table("table4_coco")][:4]
    assert list(rows) == block
    paper = ["38.0", "58.6", "41.4", "34.4", "55.1", "36.7"]
    assert rows["ResNet50"] == [
        *("44.2", "49.0", "253", "258.0", "54.9"),
        *("150.0", "300.0", "450.0", "600.0", "750"),
        *("FasterNet-S", "1.56", "6.50", "6.37–6.70", "2.50", "2.45–2.58"),
        *paper,
    ]
    assert rows["FasterNet-S"][5:16] == ["100.0", "200.0", "300.0", "400.0", "500", *["–"] * 6]
    assert rows["PVT-Small"][:5] == ["44.1", "–", "238", "–", "89.5"]
    assert set(rows["PVT-Small"][5:16]) == {"–"}
    assert "CPU, 1 thread, batch 1, fp32, eager, 1280 × 800 px" in content
    told = ("random weights", "not measured", "2080Ti", "at which size it does not say", "resizing and normalising")
    for words in told:
        assert words in content


def test_backbones_that_the_paper_lacks_follow_its_blocks(example: ModuleType) -> None:
    own = make_records(example)
    more = [r for r in make_records(example) if r.subject == "ResNet50"]
    other = [Record(**{**vars(record), "subject": "FasterNet-T0"}) for record in more]
    rows = read_rows(show([*own, *other])[0])
    assert list(rows)[-1] == "FasterNet-T0"
    assert rows["FasterNet-T0"][0] == "–"
    assert len(rows) == 5


def test_sizes_and_engines_have_tables_of_their_own(example: ModuleType) -> None:
    records = [*make_records(example), *make_records(example, 320, 512), *make_records(example, engine="openvino")]
    full, small, openvino = show(records)
    assert "512 × 320 px" in small
    assert "openvino" in openvino
    assert "253" in full
    row = read_rows(small)["ResNet50"]
    assert not {"253", "54.9", "1.56"} & set(row)  # counted and measured at another size, or who knows at which
    assert {"54.9", "1.56"} <= set(read_rows(full)["ResNet50"])
    for content, is_eager in ((full, True), (small, True), (openvino, False)):
        assert ("exact form for inference" in content) == is_eager
    assert show([]) == []


def test_attention_and_failures_are_told(example: ModuleType) -> None:
    records = make_records(example)
    for record in records:
        if record.kind == "cost" and record.subject == "ResNet50":
            record.values["attention_macs"] = 5.94e10  # type: ignore[index]
    condition = records[1].condition | {"part": "whole"}
    fault = "wrong: relative difference 0.1 to the oracle"
    records.append(example.make("detection", "latency", "PVT-Small", condition=condition, values={"error": fault}))
    (content,) = show(records)
    assert "ResNet50 59.4 G" in content
    assert "FasterNet-S 0" not in content
    assert read_rows(content)["PVT-Small"][9] == "wrong1"
    assert fault in unescape(content)


@pytest.mark.parametrize("items", [None, ["table4"]])
def test_page_and_its_twin_hold_the_table(
    example: ModuleType, write: Any, tmp_path: Path, items: list[str] | None
) -> None:
    page = create_report([write(make_records(example))], tmp_path / "report.html", items=items)
    for path in (page, page.with_suffix(".md")):
        assert "Table 4. Mask R-CNN" in path.read_text(encoding="utf-8")
