"""What is told of operators: rows beside the paper's, ratios the right way round, forward and backward apart."""

import dataclasses
import re
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasternet.records import Record, load_records
from fasternet.report.figures import show_figure1
from fasternet.report.operators import (
    compare_flops,
    list_sets,
    show_operators,
    show_table9_operators,
)
from fasternet.report.roofline import list_points, read_roof, show_rooflines
from fasternet.report.sources import Source

SHAPE = {"channels": 96, "height": 56, "width": 56}
PCONV, DWCONV, CONV = "pconv3x3_r1/4", "dwconv3x3", "conv3x3"
RESULTS = Path(__file__).parents[2] / "results" / "amd-epyc-2c" / "2026-11-21-operators.jsonl"


def read_rows(page: str, key: str) -> dict[tuple[str, ...], list[str]]:
    """Return the cells of a table by its first three."""
    (figure,) = re.findall(rf'<figure id="{key}">.*?</figure>', page, re.DOTALL)
    rows = re.findall(r"<tr[^>]*><th scope=\"row\".*?</tr>", figure, re.DOTALL)
    cells = [[unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]
    return {tuple(row[:3]): row[3:] for row in cells}


def as_sources(records: list[Record]) -> list[Source]:
    return [Source(Path("operators.jsonl"), tuple(records))]


def show(records: list[Record]) -> str:
    sources = as_sources(records)
    shown = [show(sources, {}) for show in (show_operators, show_table9_operators, show_rooflines)]
    return "".join(html for content in shown for html in content)


def make_run(example: ModuleType, **changes: Any) -> list[Record]:
    """One shape: name, latency and multiply-adds of each operator, and ratios to PConv and of the claimed pairs."""
    condition = example.CPU | SHAPE | {"memory_format": "contiguous", "passes": "forward"} | changes
    times = {
        PCONV: (4.0, 8e6), f"{PCONV}:split_cat": (4.4, 8e6), f"{PCONV}:slicing": (5.0, 8e6),
        f"{PCONV}:in_place": (3.2, 8e6), CONV: (32.0, 128e6),
        DWCONV: (2.0, 1e6), f"{DWCONV}_6x": (12.0, 6e6), f"{PCONV}+pwconv": (8.0, 22e6), "tconv3x3_r1/4": (16.0, 43e6),
    }  # fmt: skip
    records = []
    for name, (latency, macs) in times.items():
        values: dict[str, Any] = {"arithmetic_intensity": macs / 1e7, "roofline_share": 0.25, "memory_accesses": 2e6}
        if name.partition(":")[0] == PCONV:
            values["impl"] = name.partition(":")[2] or "split_cat"
        records.append(example.make_latency("operators", name, latency, condition, macs=macs, **values))
        records.append(example.make_ratio("operators", name, PCONV, latency / 4.0, condition))
    for above, below in ((CONV, f"{PCONV}+pwconv"), (CONV, "tconv3x3_r1/4"), (PCONV, f"{PCONV}:slicing")):
        ratio = times[above][0] / times[below][0]
        records.append(example.make_ratio("operators", above, below, ratio, condition))
    return records


def make_peaks(example: ModuleType) -> list[Record]:
    shared = {"threads": 1, "device": "cpu", "precision": "fp32"}
    gemm = example.make(
        "operators", "machine_peak", "gemm", condition=shared | {"size": 512}, values={"macs_per_second": 5e10}
    )
    copies = [
        example.make(
            "operators", "machine_peak", "copy", condition=shared | {"mib": mib}, values={"bytes_per_second": rate}
        )
        for mib, rate in ((1, 8e10), (128, 2e10))
    ]
    return [gemm, *copies]


def test_pconv_is_compared_with_dwconv_at_every_width_measured(example: ModuleType) -> None:
    rows = read_rows(show(make_run(example)), "pconv-1")
    # the paper's: 34.29 against 7.52 G/s
    assert rows["DWConv 3×3", "96", "56 × 56"] == ["4.56", "4.00", "3.92–4.12", "2.00", "1.94–2.04"]
    assert rows["DWConv 3×3 (6 C wide)", "96", "56 × 56"] == ["–", "4.00", "3.92–4.12", "0.33", "0.32–0.34"]
    assert len(rows) == 2


def test_regular_convolution_is_compared_with_what_takes_its_place(example: ModuleType) -> None:
    rows = read_rows(show(make_run(example)), "conv-1")
    assert rows == {
        ("PConv 3×3 + PWConv", "96", "56 × 56"): ["5.82", "2–7", "4.00", "3.92–4.12"],
        ("T-shaped conv, r = 1/4", "96", "56 × 56"): ["2.98", "–", "2.00", "1.96–2.06"],
    }


def test_table1_tells_intensity_and_roofline(example: ModuleType) -> None:
    rows = read_rows(show(make_run(example)), "table-1-1")
    assert rows["Conv 3×3", "96", "56 × 56"][-3:] == ["2", "12.8", "25"]
    assert ("DWConv 3×3 (6 C wide)", "96", "56 × 56") in rows


def test_table9_puts_the_forms_beside_the_papers(example: ModuleType) -> None:
    rows = read_rows(show(make_run(example)), "table-9-operators-1")
    assert rows == {
        ("96", "56 × 56", "5.50"): [
            *("4.00", "4.70", "5.00", "3.20"),
            *("1.17", "0.80", "0.78–0.82", "1.25", "1.21–1.28"),
        ]
    }


def test_table9_of_batches_on_a_gpu_tells_throughput_and_ratios_of_times(example: ModuleType) -> None:
    rows = read_rows(show(make_run(example, device="cuda", batch_size=32)), "table-9-operators-1")
    ((key, cells),) = rows.items()
    assert key[2] == "9,215"
    assert cells[1] == "15,385"
    assert cells[4] == f"{15385 / 9215:.2f}"


def test_forward_and_backward_stand_apart_and_backward_without_the_paper(example: ModuleType) -> None:
    backward = make_run(example, passes="forward+backward")
    page = show([*make_run(example), *backward])
    assert "forward+backward)" in page
    assert read_rows(page, "table-1-1")["Conv 3×3", "96", "56 × 56"][:4] == ["2,601", "128", "35.67", "32.00"]
    assert read_rows(page, "table-1-2")["Conv 3×3", "96", "56 × 56"][:2] == ["128", "32.00"]
    assert read_rows(page, "conv-2")["PConv 3×3 + PWConv", "96", "56 × 56"] == ["5.82", "4.00", "3.92–4.12"]
    assert list(read_rows(page, "table-9-operators-2")) == [("96", "56 × 56", "4.00")]
    assert compare_flops(backward, backward) == {}


@pytest.mark.parametrize(
    ("architecture", "changes", "paper"),
    [
        ("x86_64", {}, "35.67"),
        ("aarch64", {}, "779.57"),
        ("aarch64", {"threads": 2}, None),
        ("x86_64", {"batch_size": 32}, None),
        ("x86_64", {"device": "cuda", "batch_size": 32}, "3,010"),
        ("x86_64", {"device": "cuda", "batch_size": 256}, None),
    ],
)
def test_papers_speeds_stand_beside_the_papers_conditions_alone(
    example: ModuleType, architecture: str, changes: dict[str, Any], paper: str | None
) -> None:
    machines = {example.MACHINE.id: dataclasses.replace(example.MACHINE, architecture=architecture)}
    sources = as_sources(make_run(example, **changes))
    (table1, *_), (figure1,) = show_operators(sources, machines), show_figure1(sources, machines)
    row = read_rows(table1, "table-1-1")["Conv 3×3", "96", "56 × 56"]
    assert row[:2] == ["2,601", "128"]
    assert (row[2] == paper) is (paper is not None)
    assert ("paper v1" in table1) is ('data-engine="paper"' in figure1) is (paper is not None)


def test_records_that_name_no_passes_are_forward(example: ModuleType) -> None:
    old = [
        Record(**{**vars(r), "condition": {k: v for k, v in r.condition.items() if k != "passes"}})
        for r in make_run(example)
    ]
    assert read_rows(show(old), "conv-1") == read_rows(show(make_run(example)), "conv-1")


@pytest.mark.skipif(not RESULTS.is_file(), reason="the repository's results are not beside the tests")
def test_published_records_still_show() -> None:
    page = show([record for record in load_records(RESULTS) if record.commit == "c58c21eac38a"])
    assert len(read_rows(page, "pconv-1")) == 4
    assert len(read_rows(page, "table-9-operators-1")) == 4
    assert "roofline-1" not in page  # they tell no intensity


def test_roofline_draws_operators_under_the_peaks_of_their_setting(example: ModuleType) -> None:
    peaks = make_peaks(example)
    page = show([*make_run(example), *peaks])
    assert "Conv: 12.8, 4 (96 × 56 × 56)<" in page
    assert "matrix product: 42.7, 50" in page
    assert "copying buffers of 1 MiB at 80 GB/s, 128 MiB at 20 GB/s" in page
    assert 'id="roofline-1"' not in show([*make_run(example, threads=2), *peaks])
    disturbed = [
        Record(**{**vars(peak), "created": "2027-01-01", "values": dict.fromkeys(peak.values, 1e9)}) for peak in peaks
    ]
    assert read_roof(make_run(example)[0], [*peaks, *disturbed]) == (50.0, 512, {1: 80.0, 128: 20.0})


def test_roofline_leaves_the_forms_of_pconv_out(example: ModuleType) -> None:
    (measured,) = list_sets(as_sources(make_run(example)), {})
    assert sorted(point.name for point in list_points(measured)) == [
        *("Conv", "DWConv", "DWConv (6 C wide)", "PConv", "PConv + PWConv", "T-shaped conv")
    ]
