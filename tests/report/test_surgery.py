"""Surgery: one table of all networks, where it does not pay, and the layers of each."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasternet.cli.surgery import create_surgery_record
from fasternet.models.surgery import Latency, Replacement, Skipped, SurgeryReport, Widening
from fasternet.records import Record
from fasternet.report.page import render_item
from fasternet.report.sources import Source
from fasternet.report.surgery import show_surgery

OPTIONS = {"select": "regular", "kind": "pconv", "match": "none", "partial_ratio": 0.25}
OPTIONS |= {"input_shape": [1, 3, 224, 224], "seed": 0}


def make_surgery(subject: str = "resnet50", ratio: float | None = 0.8, **changes: Any) -> Record:
    """Make a record as the command does; ``changes`` are of its condition."""
    conv = Replacement("", 64, 64, 3, 1, macs_before=115_605_504, macs_after=20_070_400, error=0.61)
    blocks = [(stage, block) for stage in range(1, 5) for block in range(3)]
    report = SurgeryReport(
        replaced=tuple(
            dataclasses.replace(conv, name=f"layer{stage}.{block}.conv2", error=0.61 if block else None)
            for stage, block in blocks
        ),
        skipped=(Skipped("conv1", "stride 2 with 3 channels: nothing to leave untouched"),),
        widened=(Widening(("layer1.0.conv1", "layer1.0.conv2"), before=64, after=100),),
        not_widened=(Skipped("layer4.2.conv2", "its width is on the residual stream"),),
        num_params_before=25_557_032,
        num_params_after=16_800_000,
        macs_before=4_089_184_256,
        macs_after=2_500_000_000,
        latency=None if ratio is None else make_latency(ratio),
        notes=("match 'macs' is missed: 0.61 times",),
        options={**OPTIONS, **{name: value for name, value in changes.items() if name in OPTIONS}},
    )
    condition = {"model": subject, "weights": "random", "init": "approximate", "input_size": 224, "threads": 1}
    return create_surgery_record(condition | {n: v for n, v in changes.items() if n not in OPTIONS}, report)


def make_latency(ratio: float) -> Latency:
    return Latency(
        before_ms=80.0,
        after_ms=80.0 * ratio,
        **{"ratio": ratio, "low": 0.99 * ratio, "high": 1.02 * ratio},
        verdict="faster" if ratio < 0.97 else "slower",
        a_a_spread=0.012,
        unstable=False,
        threads=1,
        engine="eager, prepared",
    )


def read(*records: Record) -> list[Source]:
    return [Source(Path("some.jsonl"), records)]


def test_every_network_and_option_is_a_row(write: Callable[[list[Record]], Path]) -> None:
    records = [make_surgery(), make_surgery(match="macs", ratio=1.1)]
    records += [make_surgery("mobilenet_v2", 1.3, select="depthwise", kind="pconv_alone")]
    text = render_item("surgery", [write([*records, records[0]])])
    table, rest = text.split("\n\n", 2)[1:]
    assert table.count("\n") == 1 + 3
    assert (
        "| 0.80 | 0.79–0.82 | faster | 80.00 → 64.00 | 25.56 → 16.80 | 4,089 → 2,500 | 0.61 | 12 | 1 | 1.2 |" in table
    )
    assert "| depthwise | PConv alone |" in table
    assert "| equal multiply-adds | closed form, weights | 1.10 |" in table
    unpaid = rest.split("\n\n")[0]
    assert unpaid.startswith("**Where it does not pay in time: resnet50, regular, PConv + PWConv, equal multiply-adds")
    assert "1.10 × the time (1.09–1.12, slower); mobilenet" in unpaid
    assert unpaid.count(" × the time") == 2


@pytest.mark.parametrize(
    ("ratio", "told"), [(0.8, "replacing pays in each of the 1 network measured"), (None, "No latency was measured")]
)
def test_whether_it_pays_is_said_plainly(ratio: float | None, told: str) -> None:
    assert told in show_surgery(read(make_surgery(ratio=ratio)), {})[0]


def test_layers_are_folded_with_errors_and_reasons() -> None:
    _, lists = show_surgery(read(make_surgery()), {})
    assert lists.count("<details") == 1
    assert "12 replaced, 1 skipped, 1 widened" in lists
    assert "stride 2 with 3 channels" in lists
    assert lists.count(">0.610<") == 8
    assert "layer1.0.conv1, layer1.0.conv2" in lists
    assert "its width is on the residual stream" in lists
    assert "missed: 0.61 times" in lists
    assert "over the variance" in lists
    assert show_surgery([], {}) == []


def test_what_was_fitted_tells_rows_apart(write: Callable[[list[Record]], Path]) -> None:
    records = [make_surgery(init="random"), make_surgery()]
    records += [make_surgery(data="flowers", num_images=number) for number in (64, 256)]
    text = render_item("surgery", [write(records)])
    starts = ("random", "closed form, weights", *(f"closed form, maps of {n} pictures of flowers" for n in (64, 256)))
    assert [text.count(f"| {start} |") for start in starts] == [1, 1, 1, 1]
