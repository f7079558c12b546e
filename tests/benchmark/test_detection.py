"""Detection: blocks of Table 4, every part timed and compared, nothing timed that computes something else."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fasternet.benchmark import detection
from fasternet.benchmark.detection import PARTS, Methods, list_groups, measure_detection
from fasternet.deploy import fold_batch_norm
from fasternet.paper import load_table
from fasternet.records import Record

SIZE = (64, 96)
COSTS = {
    "num_params": 10,
    "num_params_without_batch_norm": 9,
    "macs": 31,
    "part_macs": {"backbone": 1, "neck": 2, "rpn_head": 4, "box_head": 8, "mask_head": 16},
}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("NUM_BLOCKS", 2), ("NUM_QUICK_BLOCKS", 1), ("NUM_TRIAL_BLOCKS", 1)):
        monkeypatch.setattr(detection, name, number)


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.body(x)
        return {"0": y, "1": y[:, :, ::2, ::2]}


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Pyramid()


def create(name: str) -> nn.Module:
    if name == "unknown":
        raise ValueError("unknown network 'unknown'")
    return Toy().eval()


def fold(detector: Any) -> nn.Module:
    fast = Toy().eval()
    fast.backbone.body = fold_batch_norm(detector.backbone.body, torch.zeros(1, 3, 32, 32))  # type: ignore[assignment]
    return fast


def list_parts(detector: Any, image: torch.Tensor) -> dict[str, Callable[[], object]]:
    return dict.fromkeys(PARTS, lambda: detector.backbone(image))


METHODS = Methods(create, lambda detector, size: COSTS, fold, list_parts)


def measure(*names: str, methods: Methods = METHODS, **options: Any) -> list[Record]:
    given = {"size": SIZE, "quick": True} | options
    return list(measure_detection(names or None, methods=methods, **given))


def find(records: list[Record], kind: str) -> dict[tuple[str, Any], Record]:
    return {(r.subject, r.condition.get("part")): r for r in records if r.kind == kind}


def test_groups_are_the_blocks_of_table_4_behind_their_fasternet() -> None:
    groups = list_groups()
    assert [group[0] for group in groups] == ["FasterNet-S", "FasterNet-M", "FasterNet-L"]
    assert groups[0][1:] == ("ResNet50", "PoolFormer-S24", "PVT-Small")
    assert sorted(name for group in groups for name in group) == sorted(
        r["backbone"] for r in load_table("table4_coco")
    )


def test_every_part_is_timed_and_compared_with_the_fasternet_of_its_run() -> None:
    names = ("ResNet50", "FasterNet-S")
    records = measure(*names)
    costs, latencies, ratios = (find(records, kind) for kind in ("cost", "latency", "ratio"))
    assert {name: costs[name, None].values for name in names} == dict.fromkeys(names, COSTS)
    assert set(latencies) == {(name, part) for name in names for part in PARTS}
    assert set(ratios) == {*(("ResNet50", part) for part in PARTS), ("FasterNet-S", "whole")}  # the last: A/A
    macs = [latencies["ResNet50", part].values["macs"] for part in PARTS]
    assert macs == [1, 2, 28, 0, 31]
    for (_, part), record in latencies.items():
        assert {"height": 64, "width": 96, "part": part, "engine": "eager", "threads": 1}.items() <= dict(
            record.condition
        ).items()
        assert len(record.samples["latency_ms"]) == detection.NUM_QUICK_BLOCKS
        assert "macs_per_second" not in record.values  # not all that is timed is counted
        if record.subject == "ResNet50":
            assert set(record.values["memory_format_trial_ms"]) == {"contiguous", "channels_last"}
        else:  # it lays out its activations itself
            assert record.condition["memory_format"] == "channels_last"
            assert "memory_format_trial_ms" not in record.values
    for (_, part), ratio in ratios.items():
        assert (ratio.condition["baseline"], ratio.condition["part"]) == ("FasterNet-S", part)
    assert [record.kind for record in records][-10:] == ["latency"] * 10  # last, so that resuming finds whole groups


def test_wrong_pyramid_is_never_timed() -> None:
    def spoil(detector: Any) -> nn.Module:
        fast: Any = fold(detector)
        fast.backbone.body[0].bias.data[3] += 0.1
        return fast

    records = measure("FasterNet-S", methods=METHODS._replace(optimize=spoil))
    (record,) = records
    assert record.values["error"].startswith("wrong: relative difference")


def test_forgotten_fold_of_batch_norm_is_found() -> None:
    """Statistics are random: a detector that leaves its BN out computes something else."""

    def forget(detector: Any) -> nn.Module:
        fast: Any = Toy().eval()
        fast.backbone.body[0] = detector.backbone.body[0]
        return fast

    (record,) = measure("FasterNet-S", methods=METHODS._replace(optimize=forget))
    assert record.values["error"].startswith("wrong")


def test_backbone_that_fails_leaves_the_others() -> None:
    records = measure("unknown", "ResNet50", "FasterNet-S")
    failed = [r for r in records if "error" in r.values]
    assert [(r.subject, r.values["error"]) for r in failed] == [("unknown", "failed: unknown network 'unknown'")]
    assert {r.subject for r in records if r.kind == "cost"} == {"ResNet50", "FasterNet-S"}


def test_groups_on_record_are_left_out() -> None:
    said: list[str] = []
    known = measure("FasterNet-S", "ResNet50")
    assert measure("FasterNet-S", "ResNet50", known=known, say=said.append) == []
    assert said == ["measured already, and left out: 1 of 1 groups"]
    assert measure("FasterNet-S", known=known, size=(64, 64))
    assert measure("FasterNet-S", known=known, quick=False)  # more rounds than are on record
    assert measure("FasterNet-S", "ResNet50", known=known[:-1])  # a part is missing
    ratio = next(record for record in known if record.kind == "ratio" and record.subject == "ResNet50")
    assert measure("FasterNet-S", "ResNet50", known=[record for record in known if record is not ratio])
    other = dataclasses.replace(ratio, condition={**ratio.condition, "baseline": "ResNet50"})
    assert measure("FasterNet-S", "ResNet50", known=[other if record is ratio else record for record in known])
    older = [dataclasses.replace(record, versions={"torch": "1.0"}) for record in known]
    assert measure("FasterNet-S", known=older)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"size": (100, 160)}, "size 100x160 must be multiples of 32"),
        ({"size": (0, 32)}, "size 0x32"),
        ({"engine": "tensorrt"}, "tensorrt"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"precision": "fp8"}, "fp8"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        measure("FasterNet-S", **options)


@pytest.mark.parametrize("name", ["ResNet50:split_cat", "FasterNet-S:inplace", "FasterNet-S:"])
def test_form_of_what_has_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"backbone '{name}': a form .*:split_cat.* is one of a FasterNet, in eager"):
        measure(name)
