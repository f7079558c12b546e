"""Studies: Table 2, Figures 3, 5 and 6 and the ablation from records, and the paper's claims judged by them."""

import dataclasses
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasternet.records import Record, append_records
from fasternet.report import create_report
from fasternet.report.approximation import (
    ABSOLUTE,
    CLOSED_FORM,
    OWN,
    RELATIVE,
    list_approximations,
    name_network,
)
from fasternet.report.claims import FIGURE6, TABLE2, list_claims, show_claims
from fasternet.report.page import render_item
from fasternet.report.redundancy import show_redundancy
from fasternet.report.salience import list_saliences, show_receptive_field, show_salience
from fasternet.report.sources import Source
from fasternet.report.summary import show_summary
from fasternet.report.table2 import show_approximation

Write = Callable[[list[Record]], Path]
NETWORK = {"model": "resnet18", "weights": "resnet18-flowers"}
LAYERS = (
    ("layer1.0.conv1", 64, 16),
    ("layer2.0.conv2", 128, 8),
    ("layer3.0.conv2", 256, 4),
    ("layer4.0.conv2", 512, 2),
)
LOSSES = {"DWConv + PWConv": 0.30, "GConv(16) + PWConv": 0.22, OWN: 0.20, "T-shaped": 0.12, f"{OWN} r=1/2": 0.10}


def read(records: list[Record]) -> list[Source]:
    return [Source(Path("some.jsonl"), tuple(records))]


def make_approximation(
    make: Callable[..., Record], losses: dict[str, float] = LOSSES, seeds: int = 3, **changes: Any
) -> list[Record]:
    """Losses that grow with the stage, move with the seed and are four times as large in the maps' own units."""
    records = []
    shared = {"target": "conv", "normalize": "layer", "epochs": 10, "patience": 3, "batch_size": 32, "lr": 0.003}
    shared |= {"input_size": 64, "num_train": 607, "num_validation": 87, "num_test": 174, "data": "flowers"} | changes
    for seed in range(seeds):
        for (name, loss), (stage, (layer, channels, side)) in (
            (pair, place) for pair in losses.items() for place in enumerate(LAYERS, start=1)
        ):
            relative = loss * (0.7 + 0.2 * stage) + 0.004 * math.sin(5 * seed + stage + 9 * loss)
            own = {"stage": stage, "layer": layer, "bias": stage == 1, "seed": seed}
            values = {
                **{"in_channels": channels, "out_channels": channels, "height": side, "width": side},
                **{"num_params": channels**2, "macs": channels**2 * side**2, "mse": 4 * relative},
                **{"relative_mse": relative, "validation_relative_mse": relative, "best_epoch": 7},
                **{"num_epochs": 9, "target_variance": 4.0},
            }
            condition = {**NETWORK, **shared, **own}
            records.append(make("approximation", "study", name, condition=condition, values=values))
    return records


def make_redundancy(make: Callable[..., Record]) -> list[Record]:
    condition = {**NETWORK, "data": "flowers", "input_size": 64, "num_images": 200}
    records = []
    for stage, (layer, channels, side) in enumerate(LAYERS, start=1):
        values = {
            **{"stage": stage, "channels": channels, "height": side, "width": side, "redundant_share": 0.08},
            **{"mean_abs_correlation": 0.21, "effective_rank": 0.3 * channels, "first_quarter_variance_share": 0.24},
            **{"first_quarter_explained_share": 0.71, "best_quarter_explained_share": 0.93},
            **{"random_quarter_explained_share": 0.7, "num_positions": 200 * side**2, "num_dead": 0, "num_shown": 64},
        }
        grid = {"grid": f"pictures/{layer}.png"}
        records.append(
            make(
                "redundancy", "study", layer, condition=condition, values=values, attachments=grid if stage < 3 else {}
            )
        )
    return records


def make_salience(make: Callable[..., Record], centre: int = 60, last: int | None = None) -> list[Record]:
    """Of 160 filters a stage, so many with the centre, the others spread evenly; ``last`` for stage 4."""
    records = []
    totals = [0] * 9
    for stage in range(1, 5):
        own = last if last is not None and stage == 4 else centre
        counts = [(160 - own) // 8] * 9
        counts[4] = own
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
        records.append(_make_salience(make, f"stage {stage}", counts))
    return [*records, _make_salience(make, "all", totals)]


def _make_salience(make: Callable[..., Record], subject: str, counts: list[int]) -> Record:
    share = counts[4] / sum(counts)
    values = {
        **{"counts": counts, "num_filters": sum(counts), "kernel_size": 3, "centre_share": share, "low": share - 0.05},
        **{"high": share + 0.05, "uniform_share": 1 / 9, "centre_share_random": 0.112, "layers": ["a", "b"]},
        "mean_norms": [0.9, 1.0, 0.9, 1.0, 1.4, 1.0, 0.9, 1.0, 0.9],
    }
    return make("salience", "study", subject, condition=NETWORK, values=values)


def make_fields(make: Callable[..., Record]) -> list[Record]:
    records = []
    for name, peak in ((OWN, 0.7), ("T-shaped", 0.6), ("Conv", 1 / 9)):
        for depth in (1, 8):
            side = 2 * depth + 1
            weights = [
                [math.exp(-((x - depth) ** 2 + (y - depth) ** 2) / (2 * depth * (1.2 - peak))) for x in range(side)]
                for y in range(side)
            ]
            total = sum(map(sum, weights))
            field = [[value / total for value in row] for row in weights]
            values: dict[str, Any] = {"size": side, "field": field, "centre_share": field[depth][depth]}
            if depth == 1:
                values["by_channel"] = [[0.2] * 9, [0, 0, 0, 0, 0.75, 0, 0, 0, 0]]
            condition = {"channels": 64, "depth": depth, "kernel_size": 3, "num_draws": 64, "seed": 0}
            records.append(make("receptive_field", "study", name, condition=condition, values=values))
    return records


def make_studies(example: ModuleType) -> list[Record]:
    records = [*make_approximation(example.make), *make_redundancy(example.make), *make_fields(example.make)]
    return [*records, *make_salience(example.make), *example.make_ablation()]


def test_page_has_the_studies_and_safe_unique_markup(example: ModuleType, write: Write, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    named = dict.fromkeys(LOSSES, 0.2) | {evil: 0.3}
    records = [*make_studies(example), *make_approximation(example.make, named, model=evil, data=evil)]
    page = create_report([write(records)], tmp_path / "report.html").read_text(encoding="utf-8")
    shown = page.partition('<script type="application/jsonl"')[0]
    assert re.findall(r"<h2>(.*?)</h2>", shown) == ["Summary", "Claims", "Studies", "Ratios", "Environment", "Records"]
    assert evil not in shown
    assert shown.count("&lt;script&gt;") > 5
    anchors = re.findall(r' id="([^"]*)"', page)
    assert len(anchors) == len(set(anchors)) > 20
    titles = ["Table 2. Loss", "Figure 3.", "Figure 5.", "Figure 6.", "Table 5 on small data."]
    places = [shown.index(f">{title}") for title in titles]
    assert places == sorted(places)


def test_average_is_that_of_the_layers_seed_by_seed(example: ModuleType) -> None:
    records = make_approximation(example.make)
    (study,) = list_approximations(read(records))
    own = [r for r in records if r.subject == OWN]
    by_seed = [statistics.fmean(r.values["mse"] for r in own if r.condition["seed"] == seed) for seed in range(3)]
    mean = study.mean(OWN, "average", ABSOLUTE)
    assert mean is not None
    assert mean.value == pytest.approx(statistics.fmean(by_seed))
    (partial,) = list_approximations(read([r for r in records if (r.subject, r.condition["stage"]) != (OWN, 4)]))
    three = [r.values["mse"] for r in own if r.condition["stage"] != 4]
    mean = partial.mean(OWN, "average", ABSOLUTE)
    assert mean is not None
    assert mean.value == pytest.approx(statistics.fmean(three))
    text = "".join(show_approximation([Source(Path("some.jsonl"), partial.records)], {}))
    assert "The average is over the layers layer1.0.conv1, layer2.0.conv2, layer3.0.conv2, which all operators" in text
    assert "0.0123" not in text  # the average of the paper, of four layers
    (none,) = list_approximations(read([r for r in records if r.subject != OWN or r.condition["stage"] == 9]))
    assert none.judge() is None


@pytest.mark.parametrize(
    ("gconv", "verdict", "claim"),
    [
        (0.25, "holds", "holds for this network"),
        (0.2, "not distinguishable", "not distinguishable"),
        (0.15, "does not hold", "does not hold for this network"),
    ],
)
def test_order_of_table2_is_judged_alike_everywhere(
    example: ModuleType, gconv: float, verdict: str, claim: str
) -> None:
    sources = read(make_approximation(example.make, LOSSES | {"GConv(16) + PWConv": gconv}))
    (study,) = list_approximations(sources)
    assert (study.judge(), study.judge(RELATIVE)) == (verdict, verdict)
    (row,) = (row for row in list_claims(sources, {}) if row.text == TABLE2)
    assert row.judge(row.eager) == verdict
    assert f">{claim}</span>" in show_claims(sources, {})[0]
    assert f"The order of Table 2 {'is ' if gconv == 0.2 else ''}{claim}" in show_approximation(sources, {})[1]
    assert "resnet18 (weights resnet18-flowers)" in row.remark
    assert f"against GConv(16) + PWConv: {verdict}" in row.remark


def test_one_seed_judges_nothing(example: ModuleType) -> None:
    sources = read(make_approximation(example.make, seeds=1))
    assert "is not judged, one seed has no interval" in show_approximation(sources, {})[1]
    (row,) = (row for row in list_claims(sources, {}) if row.text == TABLE2)
    assert (row.eager, row.remark[:5]) == (None, "needs")


def test_table2_marks_the_lowest_and_quotes_the_paper(example: ModuleType, write: Write) -> None:
    text = render_item("table2", [write(make_approximation(example.make))])
    (first, _, last) = (line for line in text.split("\n") if line.startswith("| 1 |"))
    assert first.startswith("| 1 | layer1.0.conv1 | 0.2714 ± 0.0076 |")
    assert last.startswith("| 1 | layer1.0.conv1 | 64 × 16 × 16 |")
    assert (first.count("**"), last.count("**")) == (2, 0)
    assert last.endswith("| 0.0089 | 0.0065 | 0.0069 |")
    assert text.index("DWConv + PWConv") < text.index("T-shaped")
    assert "607 to train, 87 to stop early, 174 to test" in text
    assert "holds for this network, on the average" in text
    assert "Adam without weight decay, one peak rate for all operators, 0.003, on a cosine to 0, batch 32" in text
    assert "Not converged" not in text


def test_least_squares_stays_out_of_the_comparison(example: ModuleType, write: Write) -> None:
    losses = {CLOSED_FORM: 0.01} | LOSSES
    closed = [
        dataclasses.replace(r, values={**r.values, "num_epochs": 0, "best_epoch": 0}) if r.subject == CLOSED_FORM else r
        for r in make_approximation(example.make, losses)
    ]
    (study,) = list_approximations(read(closed))
    assert study.operators == [*LOSSES, CLOSED_FORM]
    text = render_item("table2", [write(closed)])
    (first, *_) = (line for line in text.split("\n") if line.startswith("| 1 |"))
    assert first.count("**") == 2
    assert "**" not in first.split("|")[-2]
    assert first.split("|")[-2].strip().startswith("0.0086")
    assert "Closed form: not trained" in text
    assert "10 epochs at most (9 were spent)" in text


def test_table2_says_what_qualifies_it(example: ModuleType) -> None:
    records = make_approximation(example.make, weights="trained here on flowers", weights_hash="deadbeef", epochs=7)
    text = show_approximation(read(records), {})[0]
    assert "resnet18 (trained here on flowers) at 64 px" in text
    assert "most of these pictures trained it" in text
    assert "Not converged: in 60 of 60 trainings the last epoch was the best" in text
    assert "deadbeef" not in text
    other = show_approximation(read(make_approximation(example.make, weights="trained here on cifar10")), {})[0]
    assert "most of these pictures" not in other
    assert (
        name_network({"model": "ResNet50", "weights": "published (tv_in1k)"}) == "ResNet50 (published weights tv_in1k)"
    )


def test_table2_is_one_for_each_set_of_conditions(example: ModuleType) -> None:
    records = [*make_approximation(example.make), *make_approximation(example.make, input_size=224)]
    found = [html for html in show_approximation(read(records), {}) if "Table 2. Loss" in html]
    assert [size for html in found for size in ("at 64 px", "at 224 px") if size in html] == ["at 64 px", "at 224 px"]


def test_figure3_shows_grids_and_numbers(example: ModuleType, tmp_path: Path) -> None:
    append_records(tmp_path / "log.jsonl", make_redundancy(example.make))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "layer1.0.conv1.png").write_bytes(example.make_picture())
    page = create_report([tmp_path], tmp_path / "report.html", items=["fig3"]).read_text(encoding="utf-8")
    assert page.count('src="data:image/png') == 1
    assert "no picture" in page  # of layer 2, whose file is missing
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (
        "| layer4.0.conv2 | 4 | 512 × 2 × 2 | 800, too few positions | 0.210 | – | – | – | 24.0 | – | – | – |" in text
    )
    assert "| layer3.0.conv2 | 3 | 256 × 4 × 4 | 3,200 | 0.210 | 8.0 | 76.8 | 30 | 24.0 | 71.0 | 70.0 | 93.0 |" in text
    assert show_redundancy(read(example.make_ablation()), {}) == []


def test_figure3_is_one_for_each_picture(example: ModuleType) -> None:
    records = [
        dataclasses.replace(r, condition={**r.condition, "picture": name, "pictures_hash": "deadbeef"})
        for name in ("rose.jpg", "tulip.jpg", None)
        for r in make_redundancy(example.make)
    ]
    shown = show_redundancy(read(records), {})
    assert [", maps of rose.jpg<" in html for html in shown] == [True, False, False]
    assert [html.count("64 maps shown, of tulip.jpg<") for html in shown] == [0, 2, 0]
    assert "None" not in shown[2]
    assert "deadbeef" not in "".join(shown)


@pytest.mark.parametrize(
    ("centre", "last", "verdict"),
    [
        (60, None, "holds"),
        (60, 8, "partly"),
        (8, None, "does not hold"),
        (16, None, "not distinguishable"),
    ],
)
def test_figure6_is_judged_by_all_stages(example: ModuleType, centre: int, last: int | None, verdict: str) -> None:
    sources = read(make_salience(example.make, centre, last))
    (row,) = (row for row in list_claims(sources, {}) if row.text == FIGURE6)
    assert row.judge(row.eager) == verdict
    (html,) = show_salience(sources, {})
    assert html.count(">no<") == {"holds": 0, "partly": 1}.get(verdict, 5)
    claim = verdict if centre == 16 else f"{verdict} for this network"
    assert f"in resnet18 (weights resnet18-flowers): {claim}." in html
    assert f">{claim}</span>" in show_claims(sources, {})[0]
    assert f"stage 1, position 5: {100 * centre / sum(sources[0].records[0].values['counts']):.1f} %" in html


def test_pconv_and_a_stem_alone_do_not_prove_figure6(example: ModuleType) -> None:
    records = make_salience(example.make)
    stem = [dataclasses.replace(r, subject={"stage 1": "stage 0"}.get(r.subject, r.subject)) for r in records]
    (found,) = list_saliences(read([r for r in stem if r.subject in ("stage 0", "all")]))
    assert found.judge() == "partly"
    layers = {"layers": ["stages.0.0.pconv"], "random_low": 0.1, "random_high": 0.13}
    pconv = [dataclasses.replace(r, values={**r.values, **layers}) for r in records]
    (html,) = show_salience(read(pconv), {})
    assert "its claim is not judged" in html
    assert ">11.2 (10.0–13.0)<" in html
    assert not any(row.is_studied for row in list_claims(read(pconv), {}))


def test_summary_counts_studies_apart(example: ModuleType) -> None:
    speed = example.make_ratio("networks", "MobileViT-XXS", "FasterNet-T0", 3.6, example.CPU)
    records = [speed, *make_approximation(example.make), *make_salience(example.make, 8)]
    (text,) = show_summary(read(records), {})[:1]
    told = re.sub("<[^>]*>", "", text)
    assert "1 of 1measured claims of the paper hold in eager PyTorch" in told
    assert "1 of 2claims of the paper about trained networks hold on networks at hand, resnet18 (weights" in told
    assert "; 1 not" in told
    assert "in eager PyTorch" not in show_summary(read(records[1:]), {})[0]


def test_figure5_draws_every_field(example: ModuleType, write: Write) -> None:
    (html,) = show_receptive_field(read(make_fields(example.make)), {})
    assert html.count("<svg") == 6
    assert html.count("<rect") == 3 * (3**2 + 1) + 3 * (17**2 + 1)
    assert f"| {OWN} | the others | 0.75 | 100.0 |" in render_item("fig5", [write(make_fields(example.make))])
