"""What the page tells of detection runs: curves of AP, evaluation by size and class, drawings, several runs."""

import dataclasses
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasternet.records import Record, append_records
from fasternet.report import create_report
from fasternet.report.merge import merge_records

Make = Callable[..., list[Record]]
Render = Callable[..., str]
AP = {"ap": 0.5534, "ap50": 0.9012, "ap75": 0.612, "ap_small": None, "ap_medium": 0.4, "ap_large": 0.6}


@pytest.fixture
def make_run(example: ModuleType) -> Make:
    """The records of a finished run of two epochs: boxes alone for a Faster R-CNN."""

    def create(kind: str = "mask_rcnn", *, subject: str = "fasternet_t0", num_images: int = 4) -> list[Record]:
        facts = {"num_params": 5_120_000, "num_train": 14, "num_validation": num_images, "num_classes": 2}
        recipe = {"task": "detection", "kind": kind, "data": "fruits", "epochs": 2, "seed": 0, "backbone_options": {}}
        records = [example.make("train", "run", subject, condition=recipe, values=facts)]
        for epoch, ap in ((1, None), (2, 0.55)):
            values: dict[str, Any] = {
                "train_loss": 3.0 / epoch,
                "lr": 0.001 / epoch,
                "images_per_second": 2.5,
                "seconds": 60.0,
            }
            aps = {"box_ap": ap, "box_ap50": ap, "mask_ap": ap, "mask_ap50": ap}
            records.append(example.make("train", "epoch", subject, condition={"epoch": epoch}, values=values | aps))
        for split, size, more in (("validation", num_images, 0.0), ("training", 14, 0.04)):
            values = {"split": split, "num_images": size, "per_class": make_classes(more)}
            values |= {f"box_{name}": value and value + more for name, value in AP.items()}
            values |= {f"mask_{name}": value and value + more + 0.05 for name, value in AP.items()}
            condition = {"task": "detection", "kind": kind, "data": "fruits"}
            records.append(example.make("train", "evaluation", subject, condition=condition, values=values))
        for index in range(2):
            values = {"role": "lot", "num_detections": 5 + index, "num_objects": 6}
            attached = {"picture": f"pictures/{index:02}.jpg"}
            fields = {"condition": {"score_threshold": 0.5}, "values": values, "attachments": attached}
            records.append(example.make("train", "prediction", "same.jpg", **fields))
        return records if kind == "mask_rcnn" else [without_masks(record) for record in records]

    return create


def make_classes(more: float) -> list[dict[str, Any]]:
    return [
        {"class_name": "date", "num_objects": 11, "box_ap": 0.5 + more, "mask_ap": 0.6 + more},
        {"class_name": "<fig>", "num_objects": 0, "box_ap": None, "mask_ap": None},
    ]


def without_masks(record: Record) -> Record:
    values = {name: value for name, value in record.values.items() if not name.startswith("mask")}
    if "per_class" in values:
        values["per_class"] = [{k: v for k, v in row.items() if k != "mask_ap"} for row in values["per_class"]]
    return dataclasses.replace(record, values=values)


@pytest.fixture
def render(example: ModuleType, tmp_path: Path) -> Render:
    """Make the page of run folders, each with its pictures, by name."""

    def create(**runs: list[Record]) -> str:
        for name, records in runs.items():
            (tmp_path / name / "pictures").mkdir(parents=True)
            (tmp_path / name / "pictures" / "00.jpg").write_bytes(example.make_picture())
            append_records(tmp_path / name / "log.jsonl", records)
        return create_report([tmp_path / name for name in runs], tmp_path / "report.html").read_text("utf-8")

    return create


def read_text(page: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", page))


def read_rows(page: str, key: str) -> list[list[str]]:
    (figure,) = re.findall(rf'<figure id="{key}">.*?</figure>', page, re.DOTALL)
    rows = re.findall(r"<tr[^>]*><th scope=\"row\".*?</tr>", figure, re.DOTALL)
    return [[read_text(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_detection_run_has_curves_of_ap_and_nothing_of_top1(make_run: Make, render: Render) -> None:
    page = render(run=make_run())
    for title in ("(a) Loss", "(b) AP of boxes", "(c) AP of masks", "(d) Learning rate"):
        assert page.count(f">{title}<") == 2  # for a wide screen and for a phone
    assert 'aria-label="AP of masks over epochs: AP ends at 0.55, AP50 ends at 0.55"' in page
    sections = re.findall(r'<section id="section-(?:summary|training)">.*?</section>', page, re.DOTALL)
    assert len(sections) == 2
    assert not re.search(r"top-?[15]|Accuracy|redicted|Images/s<", "".join(sections))
    assert "<dt>backbone options</dt><dd>none</dd>" in page


def test_summary_tells_ap_and_the_pictures_it_rests_on(make_run: Make, render: Render) -> None:
    page = read_text(render(run=make_run()))
    assert "0.60fasternet_t0 mask AP, box AP 0.55 on 4 validation pictures, 5.12 M parameters, trained for 2 e" in page


def test_unfinished_run_tells_its_best_epoch(make_run: Make, render: Render) -> None:
    page = render(run=make_run()[:3])
    assert "0.55fasternet_t0 mask AP, box AP 0.55, 5.12 M parameters" in read_text(page)
    assert 'id="objects-1-1"' not in page


def test_evaluation_puts_training_beside_validation_and_missing_as_a_dash(make_run: Make, render: Render) -> None:
    page = render(run=make_run())
    rows = read_rows(page, "objects-1-1")
    assert rows[:4] == [
        ["AP", "0.553", "0.603", "0.593", "0.643"],
        ["AP50", "0.901", "0.951", "0.941", "0.991"],
        ["AP75", "0.612", "0.662", "0.652", "0.702"],
        ["AP, small objects", "–", "–", "–", "–"],
    ]
    assert rows[6:] == [
        ["date", "11", "0.500", "0.600", "11", "0.540", "0.640"],
        ["<fig>", "0", "–", "–", "0", "–", "–"],
    ]
    text = read_text(page)
    assert "Evaluation of fasternet_t0: mask AP 0.603, box AP 0.553 on 4 validation pictures" in text
    assert "On 4 validation pictures and 14 training pictures the figures are rough" in text


def test_many_pictures_are_not_called_rough_and_many_classes_are_folded(make_run: Make, render: Render) -> None:
    records = make_run(num_images=5000)
    classes = [{"class_name": f"class {i}", "num_objects": i, "box_ap": 0.5, "mask_ap": None} for i in range(80)]
    judged = dataclasses.replace(records[3], values={**records[3].values, "per_class": classes})
    page = render(run=[*records[:3], judged])
    assert "rough" not in page
    assert "5,000 validation pictures" in page
    assert "<summary>All 80 classes</summary>" in page


def test_boxes_alone_have_no_column_of_masks(make_run: Make, render: Render) -> None:
    page = render(run=make_run("faster_rcnn"))
    assert read_rows(page, "objects-1-1")[0] == ["AP", "0.553", "0.593"]
    assert read_rows(page, "objects-1-1")[6] == ["date", "11", "0.500", "11", "0.540"]
    assert ">(d) Images/s<" in page
    assert "AP of masks" not in page


def test_drawings_count_what_was_found(make_run: Make, render: Render) -> None:
    page = render(run=make_run())
    (sheet,) = re.findall(r'<figure id="drawings-1">.*?</figure>', page, re.DOTALL)
    assert "What was found on 2 pictures: 11 detections, 12 annotated" in sheet
    assert 'alt="same.jpg: 5 found at score 0.5, 6 annotated"' in sheet
    assert [read_text(line) for line in re.findall(r"<p><span.*?</p>", sheet)] == [
        "5 found at score 0.5 6 annotated",
        "6 found at score 0.5 6 annotated",
    ]
    assert sheet.count('class="missing"') == 1  # of the second there is no file


def test_detectors_and_classifiers_share_a_page(
    example: ModuleType, make_run: Make, render: Render, tmp_path: Path
) -> None:
    masks, boxes = (
        [record for record in run if record.kind != "epoch"]
        for run in (make_run(), make_run("faster_rcnn", subject="fasternet_s"))
    )
    page = render(masks=masks, boxes=boxes, digits=example.make_run(epochs=0))
    assert read_rows(page, "detectors") == [
        ["fasternet_t0", "Mask R-CNN", "masks", "fruits", "4", "2", "0", "0.603", "0.951", "0.553", "0.901", "5.12"],
        ["fasternet_s", "Faster R-CNN", "boxes", "fruits", "4", "2", "0", "–", "–", "0.553", "0.901", "5.12"],
    ]
    for told in (
        "masks: fasternet_t0, mask AP 0.603, box AP 0.553",
        "boxes: fasternet_s, box AP 0.553",
        "digits: fasternet_t0, top-1 99.17 %",
    ):
        assert f"<summary>{told}</summary>" in page
    assert "99.2 %fasternet_t0 top-1 on 360 pictures" in read_text(page)
    assert "Predicted pictures: 1 of 24 wrong" in page
    merged = tmp_path / "all.jsonl"
    merge_records([tmp_path / "masks", tmp_path / "boxes"], merged)
    again = create_report([merged, tmp_path / "masks"], tmp_path / "again.html").read_text("utf-8")
    assert read_rows(again, "detectors") == read_rows(page, "detectors")
    assert read_text(again).count("fasternet_t0 mask AP, box AP 0.55 on 4 validation pictures") == 1


@pytest.mark.parametrize("values", [{"per_class": "x"}, {"per_class": [1, {}]}, {"num_images": None, "split": None}])
def test_evaluation_without_sense_is_left_out(make_run: Make, render: Render, values: dict[str, Any]) -> None:
    record = make_run()[3]
    page = render(run=[dataclasses.replace(record, values={**record.values, **values})])
    assert "Evaluation of fasternet_t0: mask AP 0.603, box AP 0.553" in page


def test_twin_holds_what_the_page_holds(make_run: Make, render: Render, tmp_path: Path) -> None:
    render(run=make_run())
    twin = (tmp_path / "report.md").read_text("utf-8")
    assert "| AP75 | 0.612 | 0.662 | 0.652 | 0.702 |" in twin
    assert "(figure: same.jpg: 5 found at score 0.5, 6 annotated)" in twin
