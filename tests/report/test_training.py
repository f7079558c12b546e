"""What the page tells of training: curves, confusions, calibration, mistakes, seeds, faults, what limits."""

import dataclasses
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasternet.records import Record, append_records, load_records, save_machine
from fasternet.report import create_report
from fasternet.report.matrix import draw_matrix
from fasternet.report.merge import merge_records
from fasternet.report.speed import tell_limit

Write = Callable[[list[Record]], Path]
Render = Callable[..., str]


@pytest.fixture
def render(write: Write, tmp_path: Path) -> Render:
    """Make the page of one file for each list of records."""

    def create(*files: list[Record]) -> str:
        return create_report([write(records) for records in files], tmp_path / "report.html").read_text("utf-8")

    return create


def read_rows(page: str, key: str) -> list[list[str]]:
    """Return the cells of all rows of the tables of a figure."""
    (figure,) = re.findall(rf'<figure id="{key}">.*?</figure>', page, re.DOTALL)
    rows = re.findall(r"<tr[^>]*><th scope=\"row\".*?</tr>", figure, re.DOTALL)
    return [[unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def make_mistake(example: ModuleType, index: int, loss: float) -> Record:
    values = {"label": "rose", "probability": 0.9, "truth": "tulip", "loss": loss, "role": "mistake"}
    return example.make("train", "prediction", f"flower {index}", values=values)  # type: ignore[no-any-return]


def test_run_has_four_curves(example: ModuleType, render: Render) -> None:
    page = render(example.make_run(epochs=3, pictures=0))
    for title in ("(a) Loss", "(b) Accuracy, %", "(c) Learning rate", "(d) Images/s"):
        assert page.count(f">{title}<") == 2  # for a wide screen and for a phone
    assert 'aria-label="Learning rate over epochs: at the end of the epoch ends at 3.663e-05"' in page


def test_confusion_matrix_holds_every_count(example: ModuleType, render: Render) -> None:
    page = render(example.make_run(pictures=0))
    (matrix,) = re.findall(r'<svg[^>]*class="matrix">.*?</svg>', page)
    cells = re.findall(r'fill-opacity="([\d.]+)" class="(right|wrong)"><title>(.*?)</title>', matrix)
    assert len(cells) == 12
    assert {(kind, tip) for _, kind, tip in cells if kind == "wrong"} == {
        ("wrong", "3 → 8: 2 (6 %)"),
        ("wrong", "8 → 3: 1 (3 %)"),
    }
    assert max(float(opacity) for opacity, _, _ in cells) <= 0.5  # ink has to stay readable on it
    assert re.findall(r'text-anchor="middle">(\d+)</text>', matrix).count("36") == 8
    assert read_rows(page, "evaluation-1-1")[:2] == [["3", "8", "2", "5.6"], ["8", "3", "1", "2.8"]]


def test_matrix_of_many_classes_is_drawn_without_names() -> None:
    names = [f"class-{number}" for number in range(100)]
    drawing = draw_matrix("key", [[int(row == column) for column in range(100)] for row in range(100)], names)
    assert drawing.count("<rect") == 101
    assert "<text" not in drawing
    assert "class-7 → class-7: 1 (100 %)" in drawing


def test_confusions_of_too_many_classes_are_a_table(example: ModuleType, render: Render) -> None:
    classes = [{"name": f"n{i}", "num_images": 50, "top1": 80.0} for i in range(101)]
    values = {"top1": 80.0, "per_class": classes, "confusion": [["n1", "n2", 10], ["n3", "n4", 20]]}
    page = render([example.make("eval", "evaluation", "x", values=values)])
    assert 'class="matrix"' not in page
    assert read_rows(page, "evaluation-1-1")[:2] == [["n3", "n4", "20", "40.0"], ["n1", "n2", "10", "20.0"]]
    assert '<details open=""><summary>Most frequent confusions' in page


def test_calibration_is_drawn_and_told(example: ModuleType, render: Render) -> None:
    page = render(example.make_run(pictures=0))
    assert "ECE 1.7 %" in page
    assert 'aria-label="Accuracy by confidence: 95 % at 90 %, 100 % at 99 %"' in page
    assert page.count("<title>60 pictures: confidence 90.0 %, accuracy 95.0 %</title>") == 2


@pytest.mark.parametrize(
    "values",
    [
        {"confusion": "x", "calibration": {}},
        {"confusion": [[1, 2], [3]], "calibration": [[1], "x", [0, None, None]]},
        {"confusion": [[1, -2], [True, 3]], "calibration": [[2, None, 0.5]]},
        {"confusion": [["a", "b"], ["a", "b", "c"]], "ece": None},
    ],
)
def test_evaluation_without_sense_is_left_out(example: ModuleType, render: Render, values: dict[str, Any]) -> None:
    classes = [{"name": "a"}, {"name": "b"}]
    page = render([example.make("eval", "evaluation", "x", values={"top1": 50.0, "per_class": classes, **values})])
    assert "Evaluation of x: top-1 50.00 %<" in page
    assert "<svg" not in page


def test_worst_mistakes_come_first_and_apart_from_the_lot(example: ModuleType, render: Render) -> None:
    mistakes = [make_mistake(example, index, loss) for index, loss in ((1, 2.0), (2, 7.0), (3, 4.0))]
    page = render([*example.make_run(), *mistakes])
    assert "The worst mistakes: 3 wrong predictions" in page
    assert "Predicted pictures: 1 of 24 wrong" in page
    (sheet,) = re.findall(r'<figure id="mistakes-1">.*?</figure>', page, re.DOTALL)
    assert re.findall(r'title="flower (\d)"', sheet) == ["2", "3", "1"]
    assert re.findall(r"truth: tulip</span> <span class=\"share\">([^%]*%)", sheet) == ["&lt; 0.5 %", "2 %", "14 %"]


def test_seeds_of_one_recipe_share_a_row(example: ModuleType, render: Render) -> None:
    top1 = (70.0, 72.0, 77.0)
    files = [example.make_learning(seed=seed, top1=value) for seed, value in enumerate(top1)]
    files += [example.make_learning("MobileNetV2", seed=seed, top1=60.0 + seed) for seed in range(2)]
    files += [example.make_learning(seed=0, top1=75.0, lr=0.002), example.make_learning(data="cifar10", top1=88.0)]
    rows = read_rows(render(*files), "learning")
    assert [row[:7] + row[8:] for row in rows] == [
        ["fasternet_t0", "flowers", "40", "4", "3", "73.00", "70.00–77.00", "", "202", "2.50", "lr 0.001"],
        ["MobileNetV2", "flowers", "40", "4", "2", "60.50", "60.00–61.00", "", "152", "2.50", "lr 0.001"],
        ["fasternet_t0", "flowers", "40", "4", "1", "75.00", "–", "", "102", "2.50", "lr 0.002"],
        ["fasternet_t0", "cifar10", "40", "4", "1", "88.00", "–", "", "102", "2.50", "lr 0.001"],
    ]
    assert [row[7] for row in rows] == ["3.61", "–", "–", "–"]


def test_summary_tells_the_mean_of_seeds_once(example: ModuleType, render: Render) -> None:
    files = [example.make_learning(seed=seed, top1=70.0 + seed) for seed in range(3)]
    summary = unescape(re.sub(r"<[^>]*>", "", render(*files).split('id="section-learning"')[0]))
    assert "71.0 %fasternet_t0 top-1 on flowers, mean of 3 runs (70.0 to 72.0 %)" in summary
    assert summary.count(" %fasternet_t0") == 1


def test_surgery_of_a_network_reads_as_words(example: ModuleType, render: Render) -> None:
    options = {"select": "regular", "kind": "pconv", "match": "none", "input_shape": [1, 3, 64, 64], "seed": 0}
    cut = {"surgery": [options, options | {"select": "layer1.*", "kind": "pconv_alone"}]}
    files = [example.make_learning("resnet18", model_options=given) for given in ({}, cut)]
    told = unescape(render(*files))
    assert (
        "model options surgery pconv, select regular, match none then pconv_alone, select layer1.*, match none" in told
    )
    assert "model options none" in told


def test_unfinished_and_single_runs_make_no_learning_table(example: ModuleType, render: Render) -> None:
    unfinished = example.make_learning(seed=1)[:-1]
    page = render(example.make_learning(), unfinished)
    assert 'id="learning"' not in page
    assert "Training curve of fasternet_t0, 4 epochs" in page


def test_run_that_has_not_ended_says_so(example: ModuleType, render: Render) -> None:
    page = render(example.make_run(epochs=30, pictures=0)[:2])
    assert "Training curve of fasternet_t0, 1 of 30 epochs<" in page
    assert "trained for 1 of 30 epochs in 2 s" in page
    assert ">It has not ended: there is no evaluation yet. Where it was stopped, the same command with --resume" in page
    ended = render(example.make_run(epochs=30, pictures=0))
    assert "Training curve of fasternet_t0, 30 epochs<" in ended
    assert "has not ended" not in ended


def test_run_before_its_first_epoch_shows_its_recipe(example: ModuleType, render: Render) -> None:
    page = render(example.make_run(epochs=30, pictures=0)[:1])
    assert "Training curve of fasternet_t0, 0 of 30 epochs<" in page
    assert ">No epoch is done yet. It has not ended" in page
    assert "<summary>Recipe and data</summary>" in page


def test_folded_runs_that_have_not_ended_are_told_apart(example: ModuleType, tmp_path: Path) -> None:
    for seed, end in enumerate((None, -1, 1)):
        append_records(tmp_path / f"s{seed}" / "log.jsonl", example.make_learning(seed=seed)[:end])
    page = create_report([tmp_path], tmp_path / "report.html").read_text("utf-8")
    for name in (
        "s0: fasternet_t0, top-1 72.00 %",
        "s1: fasternet_t0, 4 of 4 epochs",
        "s2: fasternet_t0, 0 of 4 epochs",
    ):
        assert f"<summary>{name}</summary>" in page


def test_top5_of_five_classes_is_not_shown(example: ModuleType, render: Render) -> None:
    run, *epochs, evaluation = example.make_run(epochs=3, pictures=0)
    values = {"top1": 80.0, "top5": 100.0, "per_class": [{"name": name, "num_images": 9} for name in "abcdef"]}

    def show(num_classes: int) -> str:
        run.values["num_classes"] = num_classes
        judged = values | {"per_class": values["per_class"][:num_classes]}
        return render([run, *epochs, dataclasses.replace(evaluation, values=judged)])

    five, six = show(5), show(6)
    assert "top-5" not in five.split('id="section-records"')[0]
    assert "Accuracy, % over epochs: top-1 ends at" in five
    assert "top-1 80.00 %, top-5 100.00 %" in six
    assert "top-5 ends at" in six


def test_many_runs_are_folded_and_named(example: ModuleType, write: Write, tmp_path: Path) -> None:
    runs = []
    for seed in range(3):
        append_records(tmp_path / f"t0-s{seed}" / "log.jsonl", example.make_learning(seed=seed, top1=70.0 + seed))
        runs.append(tmp_path / f"t0-s{seed}")
    page = create_report(runs, tmp_path / "report.html").read_text("utf-8")
    assert '<details class="run"><summary>t0-s2: fasternet_t0, top-1 72.00 %</summary>' in page
    two = create_report(runs[:2], tmp_path / "report.html").read_text("utf-8")
    assert '<details class="run" open=""><summary>t0-s1: ' in two


def test_merged_runs_give_the_learning_table_of_their_folders(example: ModuleType, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a", "b", "c")]
    for seed, run in enumerate(runs):
        append_records(run / "log.jsonl", example.make_learning(seed=seed, top1=70.0 + seed) + example.make_run()[-2:])
    merged = tmp_path / "results" / "learning.jsonl"
    assert merge_records(runs, merged) == (18, 0)
    records = load_records(merged)
    assert [record.condition["run"] for record in records] == [name for name in "abc" for _ in range(6)]
    assert {record.kind for record in records} == {"run", "epoch", "evaluation"}
    pages = [create_report(s, tmp_path / "report.html").read_text("utf-8") for s in (runs, [merged], [merged, *runs])]
    rows = [read_rows(page, "learning") for page in pages]
    assert rows[0] == rows[1] == rows[2]
    assert rows[0][0][4:7] == ["3", "71.00", "70.00–72.00"]
    assert pages[1].count("<summary>c: fasternet_t0, top-1 72.00 %</summary>") == 1


def test_merging_again_adds_only_what_is_new(example: ModuleType, tmp_path: Path) -> None:
    records = example.make_learning()
    append_records(tmp_path / "run" / "log.jsonl", records[:3])
    merged = tmp_path / "all.jsonl"
    assert merge_records([tmp_path / "run"], merged) == (3, 0)
    append_records(tmp_path / "run" / "log.jsonl", records[3:])
    assert merge_records([tmp_path / "run", tmp_path / "run" / "log.jsonl"], merged) == (3, 3)
    before = merged.read_bytes()
    assert merge_records([tmp_path / "run", merged], merged) == (0, 12)
    assert merged.read_bytes() == before


def test_other_run_of_the_same_name_is_one_sentence(example: ModuleType, tmp_path: Path) -> None:
    for place, seed in (("x", 0), ("y", 1)):
        append_records(tmp_path / place / "run" / "log.jsonl", example.make_learning(seed=seed))
    merged = tmp_path / "all.jsonl"
    with pytest.raises(ValueError, match="another run is named 'run' already; rename the folder"):
        merge_records([tmp_path / "x", tmp_path / "y"], merged)
    assert not merged.exists()
    merge_records([tmp_path / "x"], merged)
    with pytest.raises(ValueError, match="another run is named 'run' already"):
        merge_records([tmp_path / "y"], merged)
    with pytest.raises(ValueError, match=r"must be a file named \*\.jsonl"):
        merge_records([tmp_path / "x"], tmp_path / "all.html")


def test_benchmarks_are_merged_as_they_are(example: ModuleType, write: Write, tmp_path: Path) -> None:
    merged = tmp_path / "all.jsonl"
    records = example.make_optimize()
    save_machine(tmp_path / "machines", example.MACHINE)
    assert merge_records([write(records)], merged) == (len(records), 0)
    assert load_records(merged) == records


def test_faults_are_a_table(example: ModuleType, render: Render) -> None:
    page = render(example.make_faults())
    assert read_rows(page, "faults") == [["SIGKILL", "24", "24", "23", "at random moments"]]
    assert "<strong>23</strong>" in page
    assert "<strong>24</strong>" not in page


def test_training_speed_tells_what_limits(example: ModuleType, render: Render) -> None:
    page = render(example.make_training_speed())
    assert [row[:3] for row in read_rows(page, "training-speed-1")] == [
        ["t0:data", "640", "100.00"],
        ["t0:step", "400", "160.00"],
        ["t0:both", "320", "200.00"],
        ["plain:both", "305", "210.00"],
    ]
    assert "t0: the step limits, with 400 images/s alone against 640; both together reach 320, 80 %" in page
    assert "The two hinder one another." in page


def test_training_steps_are_told_relative_to_fasternet_and_make_no_headline(
    example: ModuleType, render: Render
) -> None:
    page = render(example.make_steps())
    assert read_rows(page, "training-steps-1") == [
        ["MobileViT-XXS", "32", "256", "900.0", "35.6", "3.00", "2.94–3.09", "FasterNet-T0"],
        ["FasterNet-T0", "32", "224", "300.0", "106.7", "–", "–", "–"],
    ]
    assert "Training steps (CPU, 1 thread, batch 32, fp32, eager)" in page
    assert 'id="section-summary"' not in page


def test_limit_is_told_only_where_all_parts_are_known(example: ModuleType) -> None:
    records = example.make_training_speed()[:3]
    fast = example.make_latency("training-speed", "t0:step", 80.0, example.CPU | {"batch_size": 64}, macs=1e8)
    assert "the data limits" in (tell_limit([records[0], fast, records[2]]) or "")
    assert tell_limit(records[:2]) is None
