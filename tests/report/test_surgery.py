"""Surgery: one table of all networks, where it does not pay, and the layers of each."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasternet.records import Record
from fasternet.report.page import render_item
from fasternet.report.sources import Source
from fasternet.report.surgery import show_surgery


def make_surgery(
    make: Callable[..., Record], subject: str = "resnet50", ratio: float | None = 0.8, **changes: Any
) -> Record:
    condition = {"model": subject, "weights": "random", "select": "regular", "operator": "pconv", "match": "none"}
    condition |= {"init": "approximate", "partial_ratio": 0.25, "input_size": 224, "batch_size": 1, "threads": 1}
    verdict = "faster" if (ratio or 0) < 0.97 else "slower"
    latency = None if ratio is None else {
        **{"before_ms": 80.0, "after_ms": 80.0 * ratio, "ratio": ratio, "low": 0.99 * ratio, "high": 1.02 * ratio},
        **{"verdict": verdict, "a_a_spread": 0.012, "unstable": False, "threads": 1},
    }  # fmt: skip
    replaced = [
        {
            **{"name": f"layer{stage}.{block}.conv2", "in_channels": 64 * stage, "out_channels": 64 * stage},
            **{"kernel_size": 3, "stride": 1, "macs_before": 115_605_504, "macs_after": 20_070_400},
            "error": 0.61 if block else None,
        }
        for stage in range(1, 5)
        for block in range(3)
    ]
    values = {
        **{"num_params_before": 25_557_032, "num_params_after": 16_800_000, "macs_before": 4_089_184_256},
        **{"macs_after": 2_500_000_000, "replaced": replaced, "latency": latency},
        "skipped": [{"name": "conv1", "reason": "stride 2 with 3 channels: nothing to leave untouched"}],
        "widened": [{"layers": ["layer1.0.conv1", "layer1.0.conv2"], "before": 64, "after": 100}],
    }
    return make("surgery", "study", subject, condition=condition | changes, values=values)


def read(*records: Record) -> list[Source]:
    return [Source(Path("some.jsonl"), records)]


def test_every_network_and_option_is_a_row(example: ModuleType, write: Callable[[list[Record]], Path]) -> None:
    records = [make_surgery(example.make), make_surgery(example.make, match="macs", ratio=1.1)]
    records += [make_surgery(example.make, "mobilenet_v2", 1.3, select="depthwise", operator="pconv_alone")]
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
def test_whether_it_pays_is_said_plainly(example: ModuleType, ratio: float | None, told: str) -> None:
    assert told in show_surgery(read(make_surgery(example.make, ratio=ratio)), {})[0]


def test_layers_are_folded_with_errors_and_reasons(example: ModuleType) -> None:
    _, lists = show_surgery(read(make_surgery(example.make)), {})
    assert lists.count("<details") == 1
    assert "12 replaced, 1 skipped, 1 widened" in lists
    assert "stride 2 with 3 channels" in lists
    assert lists.count(">0.610<") == 8
    assert "layer1.0.conv1, layer1.0.conv2" in lists
    assert show_surgery([], {}) == []
