"""A budget picks the most accurate network that is surely within it, from this machine's records alone."""

import dataclasses
from typing import Any

import pytest
import torch

import fasternet
from fasternet.benchmark import pick
from fasternet.environment import describe_machine
from fasternet.records import Record, append_records

SETTING = {"device": "cpu", "batch_size": 1, "threads": 1}


def make(
    network: str = "FasterNet-T0",
    latency_ms: float = 4.0,
    *,
    width: float = 0.1,
    created: str = "2026-01-01",
    **fields: Any,
) -> Record:
    condition = {"input_size": 224, "engine": "eager", "precision": "fp32", **SETTING}
    interval = {"latency_ms_low": latency_ms - width, "latency_ms_high": latency_ms + width}
    record = Record(
        suite="networks", kind="latency", subject=network, machine=describe_machine().id, created=created,
        condition=condition, values={"latency_ms": latency_ms, "num_params": 3_900_000, **interval},
    )  # fmt: skip
    for name in ("condition", "values"):
        fields[name] = {**getattr(record, name), **fields.get(name, {})}
    return dataclasses.replace(record, **fields)


def find(*records: Record, **options: Any) -> list[pick.Choice]:
    return pick.find_choices(records, SETTING, **options)


def test_only_this_machine_and_these_conditions_count():
    others = [
        make(machine="another"),
        make(suite="sweeps"),
        make(kind="ratio"),
        *(make(condition={name: value}) for name, value in (("device", "cuda"), ("batch_size", 32), ("threads", 2))),
        make(condition={"input_size": 256}),
        make("FasterNet-T0:split_cat"),
        make("FasterNet-T0 LN"),
        make("nobody knows"),
        make("PVT-Tiny"),  # nothing here reads its published weights
        dataclasses.replace(make(), values={"error": "OOM"}),
    ]
    assert find(*others) == []
    assert [choice.network for choice in find(*others, make("MobileNetV2"))] == ["MobileNetV2"]


def test_newest_record_counts_and_a_stable_one_before_it():
    old, new = make(latency_ms=3.0), make(latency_ms=4.0, created="2026-01-02")
    newest = make(latency_ms=5.0, created="2026-01-03", values={"unstable": True})
    assert [choice.latency_ms for choice in find(newest, new, old)] == [4.0]
    (shaky,) = find(newest)
    assert shaky.remark == "unstable"


def test_int8_is_left_out_unless_it_is_asked_for():
    records = [make(condition={"precision": precision}) for precision in ("fp32", "bf16", "int8")]
    assert {choice.precision for choice in find(*records)} == {"fp32", "bf16"}
    (int8,) = find(*records, precision="int8")
    assert "speed only" in int8.remark
    (bf16,) = find(*records, precision="bf16")
    assert bf16.remark == "top-1 is that of fp32"
    assert find(*records, engine="openvino") == []


def test_interval_comes_from_the_samples_where_the_record_has_none():
    samples = [4.0, 4.1, 3.9, 4.0, 4.2, 3.8, 4.0, 4.1, 3.9, 4.0]
    bare = dataclasses.replace(make(), values={"latency_ms": 4.0}, samples={"latency_ms": samples})
    (choice,) = find(bare)
    assert 3.8 <= choice.low_ms <= 4.0 <= choice.high_ms <= 4.2
    assert find(dataclasses.replace(bare, samples={})) == []


def test_rank_takes_the_upper_end_and_sorts_by_published_top1_then_latency():
    choices = find(
        make("FasterNet-T0", 3.0),  # 71.9
        make("FasterNet-T0", 2.0, condition={"engine": "openvino"}),
        make("FasterNet-T1", 4.95, width=0.1),  # 76.2, but its interval reaches 5.05
        make("ResNet101", 1.0),  # nobody's top-1 is quoted for it
        make("MobileNetV2", 4.0),  # 72.0
        make("ShuffleNetV2 x1.5", 5.0, width=0.0),  # 72.6, at the budget
    )
    ranked = pick.rank(choices, 5.0)
    assert [choice.network for choice in ranked] == ["ShuffleNetV2 x1.5", "MobileNetV2", "FasterNet-T0", "ResNet101"]
    assert (ranked[2].engine, ranked[3].remark) == ("openvino", "no published top-1")
    assert [c.engine for c in pick.rank(choices, 5.0, every=True) if c.network == "FasterNet-T0"] == [
        "openvino",
        "eager",
    ]
    assert [c.network for c in pick.rank(choices, 5.0, min_top1=72.0)] == ["ShuffleNetV2 x1.5", "MobileNetV2"]
    assert pick.rank(choices, 0.5) == []
    nearest = pick.find_nearest(choices, min_top1=70)
    assert [(c.network, c.engine) for c in nearest[:2]] == [("FasterNet-T0", "openvino"), ("MobileNetV2", "eager")]


def test_top1_is_quoted_with_its_source():
    (own,) = find(make())
    (today,) = find(make("mobilenetv4_conv_small"))
    assert (own.top1, own.source) == (71.9, "paper, Table 3")
    assert today.top1 == 73.7
    assert "timm" in today.source


def test_overlap_is_of_intervals():
    one, touching, apart = (find(make(latency_ms=ms))[0] for ms in (4.0, 4.19, 4.3))
    assert pick.overlap(one, touching)
    assert pick.overlap(touching, one)
    assert not pick.overlap(one, apart)
    assert not pick.overlap(apart, one)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (make(), '("fasternet_t0", pretrained=True), torch.zeros(1, 3, 224, 224), engine="eager")'),
        (make(condition={"engine": "openvino", "precision": "bf16"}), '"openvino", precision="bf16", threads=1)'),
        (make("MobileNetV2", condition={"memory_format": "channels_last"}), 'memory_format="channels_last")'),
    ],
)  # fmt: skip
def test_python_line_says_how_it_was_measured(record, expected):
    (choice,) = find(record)
    line = pick.describe_python(choice)
    assert expected in line
    assert ("torch.set_num_threads(1)" in line) == (choice.engine == "eager")
    compile(line, "line", "exec")


def test_python_line_works_when_it_is_pasted(monkeypatch):
    def create_small(name, *, pretrained):
        assert (name, pretrained) == ("fasternet_t0", True)
        return small(name, width=8, depths=(1, 1, 1, 1), head_width=16)

    small = fasternet.create_model
    monkeypatch.setattr(fasternet, "create_model", create_small, raising=False)
    (choice,) = find(make())
    scope: dict[str, Any] = {}
    before = torch.get_num_threads()
    try:
        exec(pick.describe_python(choice), scope)
    finally:
        torch.set_num_threads(before)
    assert scope["network"](torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_shell_line_is_for_what_predict_takes():
    (own,), (rival,) = find(make()), find(make("MobileNetV2"))
    assert pick.describe_shell(own) == "fasternet predict photo.jpg --model fasternet_t0 --engine eager --device cpu"
    assert pick.describe_shell(rival) is None
    assert pick.describe_shell(find(make(condition={"precision": "bf16"}))[0]) is None


def test_record_files_are_in_results_else_where_the_variable_points(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTERNET_RESULTS", raising=False)
    assert pick.find_record_files() == []
    elsewhere = tmp_path / "elsewhere" / "x" / "a.jsonl"
    append_records(elsewhere, [make()])
    monkeypatch.setenv("FASTERNET_RESULTS", str(tmp_path / "elsewhere"))
    assert pick.find_record_files() == [elsewhere]
    assert [choice.network for choice in pick.load_choices(pick.find_record_files())] == ["FasterNet-T0"]
    (tmp_path / "results").mkdir()
    assert pick.find_record_files() == []
    assert pick.find_record_files([elsewhere]) == [elsewhere]
    with pytest.raises(FileNotFoundError, match=r"no record file or folder at .*nowhere"):
        pick.find_record_files([tmp_path / "nowhere"])
