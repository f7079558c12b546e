"""The ablation from records: differences to the base, times of two sizes, and what stays out of other sections."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from fasternet.records import Record
from fasternet.report.ablation import list_variants, show_ablation
from fasternet.report.claims import show_claims
from fasternet.report.page import render_item
from fasternet.report.ratios import show_ratios
from fasternet.report.seeds import judge_difference
from fasternet.report.sources import Source
from fasternet.report.summary import show_summary

Write = Callable[[list[Record]], Path]


def read(records: list[Record]) -> list[Source]:
    return [Source(Path("some.jsonl"), tuple(records))]


def test_ablation_compares_with_the_base(example: ModuleType) -> None:
    records = example.make_ablation()
    rows = {row.name: row for row in list_variants(records[:12], records[12:])}
    assert list(rows) == list(example.ABLATED)
    assert rows["base"].difference is None
    verdicts = {
        name: judge_difference(row.difference, below="worse", above="better")
        for name, row in rows.items()
        if row.difference
    }
    assert verdicts == {"r=1/8": "worse", "LN": "worse", "kernel 5": "better"}
    (html,) = show_ablation(read(records), {})
    assert "3 seeds, 8 epochs of 6,000 pictures of cifar10 at 64 px, judged on 2,000, not ImageNet." in html
    assert ">−0.6<" in html  # the paper's r = 1/8
    assert ">1.30<" in html


def test_table5_is_whatever_there_is_of_it(example: ModuleType, write: Write) -> None:
    text = render_item("table5", [write(example.make_ablation())])
    assert text.startswith("**Table 5 on small data.")
    times = [record for record in example.make_ablation() if record.kind != "study"]
    assert "time alone" in render_item("table5", [write(times)])


def test_times_of_the_ablation_stay_out_of_the_headline(example: ModuleType) -> None:
    records = example.make_ablation()
    assert show_summary(read(records), {}) == []
    assert show_claims(read(records), {}) == []
    assert "Ratios of time, ablation" in show_ratios(read(records), {})[0]


def test_both_sizes_of_the_ablation_are_timed_and_told_apart(example: ModuleType) -> None:
    condition = example.CPU | {"size": "full", "input_size": 224}
    values = {"unstable": True, "num_batch_norms_left": 5}
    full = [
        example.make_latency("ablation", "LN", 44.0, condition, macs=9e6, **values),
        example.make_ratio("ablation", "LN", "base", 2.5, condition),
    ]
    other = [dataclasses.replace(r, machine="other") for r in full]
    shown = show_ablation(read([*example.make_ablation(), *full, *other]), {})
    assert len(shown) == 2
    heads = re.findall('scope="colgroup"[^>]*>(.*?)<', shown[0])
    sizes = ["small, 64 px", "T0, 224 px"]
    assert [head.partition(":")[0] for head in heads[-4:]] == [*sizes, *(f"Costs, {size}" for size in sizes)]
    assert "Accuracy is that of the small size alone; the same changes were timed in T0, 224 px too." in shown[0]
    assert shown[0].count(">5 BN<") == shown[0].count(">cannot be folded<") == 1
    assert re.search(r">44\.00<a[^>]*>†<", shown[0])
    assert shown[0].count(">2.50<") == 1
    assert "T0, 224 px, time alone, other" in shown[1]


def test_error_of_the_ablations_times_is_shown(example: ModuleType) -> None:
    records = example.make_ablation()
    base = next(i for i, r in enumerate(records) if (r.kind, r.subject) == ("ratio", "base"))
    records[base] = dataclasses.replace(records[base], values={**records[base].values, "warnings": ["other load: 1.2"]})
    (html,) = show_ablation(read(records), {})
    row = re.search(r"<tr><th[^>]*>base</th>(?:(?!</tr>).)*>3.00<.*?</tr>", html)
    assert row is not None
    assert ">0.98–1.03<" in row[0]
    assert ">control<" in row[0]
    assert "A/A spread, the base against itself: 1.2 %. Warnings of the runs: other load: 1.2." in html
