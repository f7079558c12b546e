"""Claims: every one is a row, found in the right records, judged rightly; and where FasterNet is not the fastest."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fasternet.paper import load_accuracy, load_table
from fasternet.records import Machine, Record
from fasternet.report.claims import RULES, VERDICTS, Claim, count_verdicts, list_claims, show_claims
from fasternet.report.compare import Timing
from fasternet.report.slower import compare_at_equal_accuracy, show_slower
from fasternet.report.sources import Source

SPEED = "FasterNet-T0 against MobileViT-XXS: speed"
SAVED = "FasterNet-L against Swin-B: compute time saved"
FLOPS = "PConv against DWConv: FLOPS (ratio; printed as 6.5x higher)"


def read(*records: Record) -> list[Source]:
    return [Source(Path("some.jsonl"), records)]


def find(records: list[Record], text: str, device: str, machines: dict[str, Machine] | None = None) -> Claim:
    (claim,) = (c for c in list_claims(read(*records), machines or {}) if (c.text, c.device) == (text, device))
    return claim


def test_every_claim_is_a_row_and_has_a_rule() -> None:
    rows = load_table("claims")
    assert {row["claim"] for row in rows} == set(RULES)
    claims = list_claims([], {})
    assert [(claim.text, claim.device) for claim in claims] == [(row["claim"], row["device"]) for row in rows]
    assert count_verdicts(claims) == dict.fromkeys(VERDICTS, 0) | {"holds": 2, "not run": len(rows) - 2}
    assert all(claim.remark for claim in claims)


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (3.6, "holds"),
        (3.25, "holds"),  # up to 3.35, and the corrected number is 3.3
        (3.15, "partly"),  # would hold by v1's 3.1
        (1.2, "partly"),
        (1.01, "does not hold"),
        (0.5, "does not hold"),
    ],
)
def test_speed_is_judged_by_its_interval(example: ModuleType, ratio: float, verdict: str) -> None:
    claim = find([example.make_ratio("networks", "MobileViT-XXS", "FasterNet-T0", ratio, example.CPU)], SPEED, "cpu")
    assert claim.eager is not None
    assert claim.eager.interval == Timing(ratio, 0.98 * ratio, 1.03 * ratio)
    assert (claim.judge(claim.eager), claim.judge(claim.best)) == (verdict, "not run")
    assert claim.machine == example.MACHINE.id


def test_protocol_that_cannot_tell_refutes_a_claim(example: ModuleType) -> None:
    record = example.make_ratio("networks", "MobileViT-XXS", "FasterNet-T0", 3.6, example.CPU)
    record = dataclasses.replace(record, values=record.values | {"verdict": "not distinguishable"})
    claim = find([record], SPEED, "cpu")
    assert claim.judge(claim.eager) == "does not hold"


@pytest.mark.parametrize(("ratio", "verdict"), [(1.6, "holds"), (1.3, "partly"), (0.9, "does not hold")])
def test_time_saved_is_a_share_of_the_rivals_time(example: ModuleType, ratio: float, verdict: str) -> None:
    claim = find([example.make_ratio("networks", "Swin-B", "FasterNet-L", ratio, example.CPU)], SAVED, "cpu")
    assert claim.eager is not None
    assert claim.eager.interval == pytest.approx([1 - 1 / ratio, 1 - 1 / (0.98 * ratio), 1 - 1 / (1.03 * ratio)])
    assert claim.judge(claim.eager) == verdict


@pytest.mark.parametrize(
    ("change", "device"),
    [
        ({}, "cpu"),
        ({"batch_size": 32}, None),
        ({"threads": 2}, None),
        ({"precision": "bf16"}, None),
        ({"device": "cuda", "batch_size": 32}, "gpu"),
        ({"device": "cuda"}, None),
    ],
)
def test_only_the_papers_conditions_count(example: ModuleType, change: dict[str, object], device: str | None) -> None:
    record = example.make_ratio("networks", "MobileViT-XXS", "FasterNet-T0", 2.0, example.CPU | change)
    found = [claim.device for claim in list_claims(read(record), {}) if claim.eager and claim.text == SPEED]
    assert found == ([device] if device else [])


def test_processor_of_the_machine_tells_arm_from_cpu(example: ModuleType) -> None:
    machine = dataclasses.replace(example.MACHINE, architecture="aarch64")
    record = example.make_ratio("networks", "MobileViT-XXS", "FasterNet-T0", 2.0, example.CPU)
    assert find([record], SPEED, "arm", {machine.id: machine}).eager
    assert not find([record], SPEED, "cpu", {machine.id: machine}).eager


def test_claim_has_a_row_for_every_machine(example: ModuleType) -> None:
    record = example.make_ratio("networks", "MobileViT-XXS", "FasterNet-T0", 2.0, example.CPU)
    claims = list_claims(read(record, dataclasses.replace(record, machine="other")), {})
    assert [claim.machine for claim in claims if claim.text == SPEED] == [None, example.MACHINE.id, "other", None]


def test_eager_and_best_engines_do_not_mix(example: ModuleType) -> None:
    claim = find(example.make_engines(), SPEED, "cpu")
    assert claim.eager is not None
    assert claim.best is not None
    assert (claim.eager.interval.value, claim.best.interval.value) == (3.0, 2.4)
    assert "MobileViT-XXS in OpenVINO, FasterNet-T0 in OpenVINO" in claim.remark
    others = [
        r
        for r in example.make_engines()
        if r.condition.get("engine") != "eager" and not r.condition.get("best_engines")
    ]
    assert find(others, SPEED, "cpu").eager is None


def test_flops_are_the_mean_over_the_shapes_as_in_table1(example: ModuleType) -> None:
    records = []
    for channels, side, pconv_ms, dwconv_ms in ((96, 56, 4.0, 2.0), (768, 7, 2.0, 1.0), (5, 5, 9.0, 1.0)):
        condition = example.CPU | {"channels": channels, "height": side, "width": side}
        for name, ms, macs in ((example.PCONV, pconv_ms, 80e6), ("dwconv3x3", dwconv_ms, 10e6)):
            records.append(example.make_latency("operators", name, ms, condition, macs=macs))
        records.append(example.make_ratio("operators", "dwconv3x3", example.PCONV, dwconv_ms / pconv_ms, condition))
    claim = find(records, FLOPS, "cpu")
    assert claim.eager is not None
    rates = [(80 / 4 + 80 / 2) / 2, (10 / 2 + 10 / 1) / 2]  # of (5, 5, 5), which Table 1 does not have, nothing
    assert claim.eager.interval.value == pytest.approx(rates[0] / rates[1])
    assert claim.judge(claim.eager) == "partly"
    assert "2 of Table 1’s 4 shapes" in claim.remark
    backward = [dataclasses.replace(r, condition={**r.condition, "passes": "forward+backward"}) for r in records]
    assert find(backward, FLOPS, "cpu").eager is None


def test_plain_form_is_told_beside_the_deployed_one(example: ModuleType) -> None:
    own, plain = (
        example.make_ratio("networks", "MobileViT-XXS", f"FasterNet-T0{form}", ratio, example.CPU)
        for form, ratio in (("", 2.0), (":split_cat", 1.5))
    )
    claim = find([own, plain], SPEED, "cpu")
    assert claim.eager is not None
    assert claim.eager.interval.value == 2.0
    assert claim.remark.endswith("; plain form (split_cat): 1.5 (1.47 to 1.54)")
    assert "plain form" not in find([own], SPEED, "cpu").remark


def test_other_input_size_and_quick_runs_do_not_count(example: ModuleType) -> None:
    full = example.make_ratio("networks", "MobileViT-XXS", "FasterNet-T0", 2.0, example.CPU | {"input_size": 256})
    quick = example.make_ratio("networks", "MobileViT-XXS", "FasterNet-T0", 9.0, example.CPU | {"input_size": 256})
    quick = dataclasses.replace(quick, values=quick.values | {"num_blocks": 32}, created="2026-02-02")
    small = example.make_ratio("networks", "MobileViT-XXS", "FasterNet-T0", 8.0, example.CPU | {"input_size": 224})
    claim = find([full, quick, dataclasses.replace(small, created="2026-02-02")], SPEED, "cpu")
    assert claim.eager is not None
    assert claim.eager.interval.value == 2.0
    assert find([small], SPEED, "cpu").eager is None


def test_claims_are_shown_only_where_speeds_are(example: ModuleType) -> None:
    assert show_claims(read(*example.make_run()), {}) == []
    (html,) = show_claims(read(*example.make_engines()), {})
    assert html.count("<tr") == 2 + len(load_table("claims"))


@pytest.fixture
def lose(example: ModuleType) -> Callable[..., Record]:
    def make(rival: str, own: str, ratio: float, **condition: object) -> Record:
        record: Record = example.make_ratio(
            "networks", rival, own, ratio, example.CPU | {"input_size": 224} | condition
        )
        return record

    return make


def test_faster_networks_of_equal_accuracy_are_named(lose: Callable[..., Record]) -> None:
    accuracy = load_accuracy()
    assert accuracy["MobileViT-XXS"].top1 < accuracy["FasterNet-T0"].top1 < accuracy["mobilenetv4_conv_small"].top1
    records = [
        lose("mobilenetv4_conv_small", "FasterNet-T0", 0.7),
        lose("MobileViT-XXS", "FasterNet-T0", 0.6),  # faster, but less accurate
        lose("starnet_s1", "FasterNet-T0", 1.3),
    ]
    (html,) = show_slower(read(*records), {})
    assert "In 1 of 2 comparisons" in html
    assert "mobilenetv4_conv_small" in html
    assert all(str(accuracy[name].source) in html for name in ("FasterNet-T0", "mobilenetv4_conv_small"))
    assert "MobileViT" not in html.partition("figcaption>")[2].partition("Measured on")[0]


def test_networks_are_compared_through_a_third_one(lose: Callable[..., Record]) -> None:
    records = [lose("shvit_s3", "FasterNet-T0", 0.9), lose("FasterNet-T1", "FasterNet-T0", 2.0)]
    pairs = {pair.own: pair for pair in compare_at_equal_accuracy(records)}
    assert set(pairs) == {"FasterNet-T0", "FasterNet-T1"}
    assert (pairs["FasterNet-T0"].via, pairs["FasterNet-T1"].via) == (None, "FasterNet-T0")
    assert pairs["FasterNet-T1"].timing == pytest.approx([0.45, 0.45 * 0.98 / 1.03, 0.45 * 1.03 / 0.98])
    assert pairs["FasterNet-T1"].verdict == "faster"


def test_chain_holds_only_through_one_deployment_of_the_third_network(lose: Callable[..., Record]) -> None:
    best = {"engine": "openvino", "best_engines": True}
    above = lose("shvit_s3", "FasterNet-T0", 0.9, baseline_engine="openvino", **best)
    for engine, names in (("openvino", ["FasterNet-T0", "FasterNet-T1"]), ("onnxruntime", ["FasterNet-T0"])):
        below = lose("FasterNet-T1", "FasterNet-T0", 2.0, baseline_engine=engine, **best)
        assert [pair.own for pair in compare_at_equal_accuracy([above, below])] == names


def test_other_input_size_has_no_published_accuracy(lose: Callable[..., Record]) -> None:
    assert show_slower(read(lose("mobilenetv4_conv_small", "FasterNet-T0", 0.7, input_size=128)), {}) == []


def test_nothing_faster_is_said_with_the_number_of_comparisons(lose: Callable[..., Record]) -> None:
    (html,) = show_slower(read(lose("starnet_s1", "FasterNet-T0", 1.3), lose("ResNet50", "FasterNet-T0", 1.0)), {})
    assert "In none of 2 comparisons" in html
    assert "slower in 1, not distinguishable in 1" in html


def test_settings_do_not_mix_and_int8_stays_out(lose: Callable[..., Record]) -> None:
    name = "mobilenetv4_conv_small"
    records = [
        lose(name, "FasterNet-T0", 0.7),
        lose(name, "FasterNet-T0", 0.8, engine="openvino"),
        lose(name, "FasterNet-T0", 0.3, engine="openvino", baseline_engine="eager"),
        lose(name, "FasterNet-T0", 0.9, engine="openvino", baseline_engine="onnxruntime", best_engines=True),
        lose(name, "FasterNet-T0", 0.2, engine="openvino", precision="int8"),
    ]
    figures = show_slower(read(*records), {})
    found = [next(value for value in ("0.70", "0.80", "0.90", "0.30", "0.20") if f">{value}<" in f) for f in figures]
    assert found == ["0.70", "0.80", "0.90"]
    assert "each in its best library engine" in figures[2]
