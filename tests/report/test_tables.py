"""What the tables say: the paper's numbers in their rows, the measured ones beside them, ratios the right way round."""

import dataclasses
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from types import ModuleType

import pytest

from fasternet.records import Record
from fasternet.report import create_report
from fasternet.report.operators import compare_flops
from fasternet.report.sources import newest

Write = Callable[[list[Record]], Path]
SHAPE = {"channels": 96, "height": 56, "width": 56}


@pytest.fixture
def render(write: Write, tmp_path: Path) -> Callable[[list[Record]], str]:
    return lambda records: create_report([write(records)], tmp_path / "report.html").read_text(encoding="utf-8")


def read_rows(page: str, key: str) -> dict[str, list[str]]:
    """Return the cells of a table by the heading of their row."""
    (figure,) = re.findall(rf'<figure id="{key}">.*?</figure>', page, re.DOTALL)
    rows = re.findall(r"<tr[^>]*><th scope=\"row\".*?</tr>", figure, re.DOTALL)
    cells = [[unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]
    return {row[0]: row[1:] for row in cells}


def test_table3_puts_paper_and_measured_side_by_side(example: ModuleType, render: Callable[..., str]) -> None:
    records = example.make_networks()
    rows = read_rows(render(records), "table-3-1")
    latency = {r.subject: r.values["latency_ms"] for r in records if r.kind == "latency" and "error" not in r.values}
    own, t0 = latency["MobileNetV2"], latency["FasterNet-T0"]
    ratio = own / t0
    assert rows["MobileNetV2"] == [
        *("224", "3.5", "3.5", "0.30", "0.30", "72.0", "13.20", "12.20", "1.61", "FasterNet-T0"),
        *(f"{own:.2f}", f"{ratio:.2f}", f"{0.98 * ratio:.2f}–{1.03 * ratio:.2f}"),
    ]
    assert rows["FasterNet-T0"][8:12] == ["1.00", "FasterNet-T0", f"{t0:.2f}", "1.00"]


def test_table3_tells_times_relative_to_the_fasternet_of_the_group(
    example: ModuleType, render: Callable[..., str]
) -> None:
    rows = read_rows(render(example.make_networks()), "table-3-1")
    assert rows["ResNet50"][8:10] == [f"{69.4 / 30.8:.2f}", "FasterNet-T2"]
    assert rows["PVT-Tiny"][8:] == [f"{47.5 / 16.4:.2f}", "FasterNet-T1", "–", "–", "–"]
    assert "ConvNeXt-B" not in rows  # nothing of its group was measured


def test_table3_marks_unstable_and_failed(example: ModuleType, render: Callable[..., str]) -> None:
    rows = read_rows(render(example.make_networks()), "table-3-1")
    assert [name for name, cells in rows.items() if any(cell.endswith("†") for cell in cells)] == ["Swin-T"]
    assert "OOM" in rows["Swin-S"]


def test_table3_of_batches_has_no_paper_speeds(example: ModuleType, render: Callable[..., str]) -> None:
    records = example.make_networks(32)
    page = render(records)
    rows = read_rows(page, "table-3-1")
    (throughput,) = [r.values["images_per_second"] for r in records if r.kind == "latency" and r.subject == "ResNet50"]
    assert rows["ResNet50"][6:8] == ["FasterNet-T2", f"{throughput:,.1f}"]
    assert set(rows) == {*example.MEASURED, "Swin-S"}
    assert "i9-9900X" not in page


def test_networks_of_different_settings_do_not_mix(example: ModuleType, render: Callable[..., str]) -> None:
    page = render([*example.make_networks(), *example.make_networks(32)])
    assert [key in page for key in ('id="table-3-1"', 'id="table-3-2"', 'id="table-3-3"')] == [True, True, False]
    single, batch = (read_rows(page, f"table-3-{index}") for index in (1, 2))
    assert single["ResNet50"][6:] != batch["ResNet50"][6:]


def test_network_that_the_paper_does_not_have_is_listed(example: ModuleType, render: Callable[..., str]) -> None:
    condition = example.CPU | {"input_size": 224}
    own = example.make_latency("networks", "starnet_s1", 9.0, condition, macs=4e8, num_params=2.9e6)
    ratio = example.make_ratio("networks", "starnet_s1", "FasterNet-T0", 1.22, condition)
    rows = read_rows(render([own, ratio]), "table-3-1")  # its published top-1 is quoted
    assert rows == {"starnet_s1": ["224", "2.9", "0.40", "73.5", "FasterNet-T0", "9.00", "1.22", "1.20–1.26"]}


def test_table1_puts_paper_and_measured_side_by_side(example: ModuleType, render: Callable[..., str]) -> None:
    condition = example.CPU | SHAPE | {"memory_format": "contiguous"}
    rows = read_rows(
        render([example.make_latency("operators", "dwconv3x3", 2.0, condition, macs=27_095_040)]), "table-1-1"
    )
    assert rows == {
        "DWConv 3×3": ["96", "56 × 56", "27.09", "27.1", "3.59", "2.00", "1.94", "2.12", "7.52", "13.55", "40"]
    }


def test_operators_of_two_memory_formats_do_not_mix(example: ModuleType, render: Callable[..., str]) -> None:
    records = [
        example.make_latency("operators", "conv3x3", latency, example.CPU | SHAPE | {"memory_format": name}, macs=1e9)
        for name, latency in (("contiguous", 2.0), ("channels_last", 1.0))
    ]
    page = render(records)
    assert [read_rows(page, f"table-1-{index}")["Conv 3×3"][5] for index in (1, 2)] == ["2.00", "1.00"]


@pytest.mark.parametrize("inverse", [False, True])
def test_flops_ratio_holds_whichever_operator_is_the_baseline(example: ModuleType, *, inverse: bool) -> None:
    condition = example.CPU | SHAPE
    records = [
        example.make_latency("operators", name, 1.0, condition, macs=macs)
        for name, macs in ((example.PCONV, 6e6), ("dwconv3x3", 1e6))
    ]
    names = ("dwconv3x3", example.PCONV) if inverse else (example.PCONV, "dwconv3x3")
    ratio = example.make_ratio("operators", *names, 0.5 if inverse else 2.0, condition)
    (rate,) = compare_flops(records, [ratio]).values()
    assert rate.value == pytest.approx(3.0)
    assert rate.low < rate.value < rate.high


def test_ratios_leave_the_control_out_and_tell_its_spread(example: ModuleType, render: Callable[..., str]) -> None:
    control = example.make_ratio("networks", "FasterNet-T0", "FasterNet-T0", 1.001, example.CPU)
    other = example.make_ratio("networks", "MobileNetV2", "FasterNet-T0", 1.5, example.CPU)
    control = dataclasses.replace(control, values=control.values | {"warnings": ["other load", "it slowed down"]})
    page = render([control, other])
    assert read_rows(page, "ratios-1") == {"MobileNetV2": ["FasterNet-T0", "1.500", "1.470–1.545", "", "slower", "1.2"]}
    told = ["FasterNet-T0", "CPU, 1 thread, batch 1, fp32, eager", "2026-01-02", "1.001", "0.981–1.031", "64"]
    assert read_rows(page, "controls") == {"networks": [*told, "other load; it slowed down"]}


def test_newest_prefers_a_stable_record(example: ModuleType) -> None:
    def measure(latency: float, day: int, *, unstable: bool) -> Record:
        record = example.make_latency("networks", "x", latency, example.CPU, macs=1.0, unstable=unstable)
        return Record(**{**vars(record), "created": f"2026-01-{day:02}"})

    records = [measure(1, 1, unstable=False), measure(2, 2, unstable=False), measure(3, 3, unstable=True)]
    assert newest(records, lambda r: r.subject)["x"].values["latency_ms"] == 2
    assert newest(records[2:], lambda r: r.subject)["x"].values["latency_ms"] == 3
    failed = dataclasses.replace(records[2], values={"error": "OOM"}, created="2026-01-04", samples={})
    assert newest([*records[2:], failed], lambda r: r.subject)["x"].values["latency_ms"] == 3
    quick = dataclasses.replace(measure(4, 4, unstable=False), samples={"latency_ms": [4.0]})
    assert newest([*records, quick], lambda r: r.subject)["x"].values["latency_ms"] == 2


def test_summary_tells_training_differences_and_speed(
    example: ModuleType, write: Write, run_folder: Path, tmp_path: Path
) -> None:
    plain = example.make_ratio("networks", "ResNet50", "FasterNet-T0:split_cat", 3.0, example.CPU)
    speeds = [plain, *example.make_optimize(), *example.make_networks(), *example.make_operators()]
    sources = [run_folder, write(speeds)]
    page = create_report(sources, tmp_path / "report.html").read_text(encoding="utf-8")
    summary = unescape(re.sub(r"<[^>]*>", "", page.split('id="section-networks"')[0].split('id="section-summary"')[1]))
    for sentence in (
        "99.2 %fasternet_t0 top-1 on 360 pictures, 2.63 M parameters, trained for 15 epochs in 27 s",
        "0 of 360predictions changed by optimising fasternet_t0; largest relative difference 3.1 × 10−7",
        "’s FLOPS relative to DWConv’s, over 4 shapes",
        "optimised takes 0.81 × the time of split_cat, BN folded (0.79–0.83), faster",
        "FasterNet-T0:split_cat takes ",
        "MobileNetV2 takes ",
    ):
        assert sentence in summary
    assert "FasterNet-T1 takes" not in summary
    assert "the time of FasterNet-T0:split_cat" not in summary


def test_summary_adds_up_the_differences_of_optimising_alone(example: ModuleType, render: Callable[..., str]) -> None:
    def make(subject: str, baseline: str, changed: int, difference: float) -> Record:
        values = {"max_relative_difference": difference, "changed_predictions": changed, "num_images": 10}
        return example.make("deploy", "difference", subject, condition={"baseline": baseline}, values=values)

    page = render(
        [make("t0:optimized", "t0", 1, 2e-7), make("t1:optimized", "t1", 2, 3e-7), make("t0", "timm", 7, 1.0)]
    )
    summary = unescape(re.sub(r"<[^>]*>", "", page.split('id="section-exactness"')[0]))
    assert "3 of 20predictions changed by optimising t0, t1; largest relative difference 3.0 × 10−7" in summary
    assert summary.count("predictions changed") == 1


def test_resumed_epochs_count_once(example: ModuleType, render: Callable[..., str]) -> None:
    records = example.make_run(epochs=5)
    page = render([*records[:4], *records[3:]])
    assert "Training curve of fasternet_t0, 5 epochs" in page
    assert "trained for 5 epochs in 9 s" in page


def test_pictures_are_embedded_and_wrong_ones_come_first(run_folder: Path, tmp_path: Path) -> None:
    page = create_report([run_folder], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Predicted pictures: 1 of 24 wrong" in page
    pictures = re.findall(r"<li( class=\"wrong\")? title=\"digit (\d+)\"><img src=\"data:image/png;base64,", page)
    assert len(pictures) == 24
    assert pictures[0] == (' class="wrong"', "8")
    assert [wrong for wrong, _ in pictures[1:]] == [""] * 23
    assert "predicted 8, but it is 3" in page


@pytest.mark.parametrize(
    "attached", ["../secret.png", "/etc/hostname", "absent.png", "text.png", "large.png", "pictures"]
)
def test_attachment_that_is_no_picture_of_the_run_stays_out(
    example: ModuleType, render: Callable[..., str], tmp_path: Path, attached: str
) -> None:
    (tmp_path.parent / "secret.png").write_bytes(example.make_picture())
    (tmp_path / "text.png").write_text("<svg onload='alert(1)'/>", encoding="utf-8")
    (tmp_path / "large.png").write_bytes(example.make_picture() + bytes(1 << 20))
    (tmp_path / "pictures").mkdir()
    page = render([example.make("train", "prediction", "x", values={"label": "a"}, attachments={"picture": attached})])
    assert "no picture" in page
    assert "data:image/" not in page


def test_ratios_between_engines_name_both_and_stay_out_of_the_summary(
    example: ModuleType, render: Callable[..., str]
) -> None:
    page = render(example.make_engines())
    (figure,) = re.findall(r'<figure id="ratios-1">.*?</figure>', page, re.DOTALL)
    pairs = [
        re.sub(r"<[^>]*>", "", "; ".join(re.findall(r"<t[hd].*?</t[hd]>", row)[:3])) for row in figure.split("<tr")[3:]
    ]
    assert "MobileViT-XXS (OpenVINO fp32); MobileViT-XXS (eager fp32); 0.400" in pairs
    assert pairs.count("MobileViT-XXS; FasterNet-T0; 3.000") == 1
    assert pairs.count("MobileViT-XXS; FasterNet-T0; 2.400") == 2  # in OpenVINO, and both in their best engine
    assert len(pairs) == 3 + 2 + 2 + 1  # between networks, between engines of both; controls stay out
    summary = page.split('id="section-claims"')[0].split('id="section-summary"')[1]
    assert re.findall(r"<strong>([\d.]+) ×</strong>", summary) == ["3.00"]
    told = re.sub("<[^>]*>", "", summary)
    assert "0 of 1measured claims of the paper hold in eager PyTorch; 1 partly, 0 not. 2 more hold by comp" in told
    assert "utation, 16 were not run" in told


def test_table9_puts_forms_and_paper_side_by_side(example: ModuleType, render: Callable[..., str]) -> None:
    page = render(example.make_forms())
    (figure,) = re.findall(r'<figure id="table-9-networks-1">.*?</figure>', page, re.DOTALL)
    rows = [
        [unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)]
        for row in figure.split("<tr")[3:]
    ]
    assert [row[:2] for row in rows] == [
        [name, form] for name in ("fasternet_t0", "fasternet_t1") for form in ("contiguous", "channels_last")
    ]
    measured = ["9.45", f"{9 * 1.1 * 1.05:.2f}", f"{9 * 0.9 * 1.05:.2f}", "7.20"]
    assert rows[0][2:8] == ["8.50", "8.20", *measured]
    assert rows[0][8:10] == ["0.76", "0.75–0.78"]
    assert rows[1][2:5] == ["–", "–", "9.00"]


def test_table8_puts_counted_sizes_beside_the_paper(example: ModuleType, render: Callable[..., str]) -> None:
    rows = read_rows(render(example.make_networks()), "table-8")
    assert rows["T0"] == ["40", "1-2-8-2", "GELU", "3.9", "3.900", "0.34", "0.340"]
    assert rows["L"] == ["192", "3-4-18-3", "ReLU", "93.4", "–", "15.49", "–"]
