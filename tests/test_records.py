"""Records survive the disk, a killed writer and an honest reader."""

import dataclasses
import json
import re

import pytest

from fasternet.records import (
    SCHEMA,
    Machine,
    Record,
    append_records,
    check_records,
    load_machine,
    load_records,
    save_machine,
)

MACHINE = Machine(
    id="cpu-2c",
    processor="A processor",
    architecture="x86_64",
    cores=2,
    memory_gib=7.5,
    accelerator=None,
    system="Linux 6",
    instruction_sets=("avx2", "avx512f"),
)
FULL = Record(
    suite="networks",
    kind="latency",
    subject="FasterNet-T0",
    condition={"batch_size": 1, "threads": 1, "precision": "fp32"},
    values={"latency_ms": 8.25, "latency_ms_p90": None, "unstable": False},
    samples={"latency_ms": [8.25, 8.5, 8.0]},
    attachments={"picture": "pictures/1.png"},
    machine="cpu-2c",
    versions={"torch": "2.15"},
    commit="0123456789ab",
    command="fasternet bench networks",
    created="2025-01-01T00:00:00+00:00",
)
PLAIN = Record(suite="train", kind="epoch", subject="größe ×2\nline")


def lines(path):
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def test_records_round_trip_every_field(tmp_path):
    path = tmp_path / "new" / "folder" / "log.jsonl"
    append_records(path, [FULL])
    append_records(path, iter([PLAIN, FULL]))
    assert load_records(path) == [FULL, PLAIN, FULL]
    assert all(getattr(FULL, field.name) for field in dataclasses.fields(Record))


def test_records_are_one_json_object_a_line_with_the_schema(tmp_path):
    path = tmp_path / "log.jsonl"
    append_records(path, [FULL, PLAIN])
    written = [json.loads(line) for line in lines(path)]
    assert [line["schema"] for line in written] == [SCHEMA, SCHEMA]
    assert all(line.endswith("\n") for line in lines(path))


def test_load_records_drops_a_torn_last_line(tmp_path):
    path = tmp_path / "log.jsonl"
    append_records(path, [FULL, PLAIN])
    text = path.read_text(encoding="utf-8")
    last = lines(path)[-1]
    for cut in (1, 5, len(last) - 1, len(last)):
        path.write_text(text[:-cut], encoding="utf-8")
        assert load_records(path) == [FULL]


def test_append_records_goes_on_after_a_torn_last_line(tmp_path):
    path = tmp_path / "log.jsonl"
    append_records(path, [FULL, PLAIN])
    path.write_text(path.read_text(encoding="utf-8")[:-5], encoding="utf-8")
    append_records(path, [PLAIN])
    assert load_records(path) == [FULL, PLAIN]


def test_load_records_of_an_empty_file_are_none(tmp_path):
    path = tmp_path / "log.jsonl"
    append_records(path, [])
    assert load_records(path) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "Expecting value"),
        ("[1, 2]", ""),
        ("", "Expecting value"),
        ('{"suite": "a", "kind": "b", "subject": "c"}', f"schema must be {SCHEMA}"),
        ('{"schema": 99, "suite": "a", "kind": "b", "subject": "c"}', f"schema must be {SCHEMA}"),
        ('{"schema": 1, "suite": "a", "kind": "b"}', "subject"),
        ('{"schema": 1, "suite": "a", "kind": "b", "subject": "c", "time": 1}', r"unknown fields \['time'\]"),
    ],
)
def test_load_records_names_the_bad_line(tmp_path, line, reason):
    path = tmp_path / "log.jsonl"
    append_records(path, [FULL])
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    append_records(path, [FULL])
    with pytest.raises(ValueError, match=rf"log\.jsonl line 2 is not a record: .*{reason}"):
        load_records(path)


def test_load_records_names_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no records file at .*none\.jsonl"):
        load_records(tmp_path / "none.jsonl")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_append_records_refuses_what_json_cannot_say(tmp_path, value):
    path = tmp_path / "log.jsonl"
    append_records(path, [FULL])
    with pytest.raises(ValueError, match="JSON"):
        append_records(path, [dataclasses.replace(FULL, values={"latency_ms": value})])
    assert load_records(path) == [FULL]


def test_record_takes_no_positional_fields():
    with pytest.raises(TypeError):
        Record("train", "epoch", "run")


def test_machine_round_trips(tmp_path):
    path = save_machine(tmp_path / "machines", MACHINE)
    assert path == tmp_path / "machines" / "cpu-2c.json"
    assert load_machine(path) == MACHINE


@pytest.fixture
def described(tmp_path):
    """A file beside the description of the machine that its records name."""
    save_machine(tmp_path / "machines", MACHINE)
    return tmp_path / "log.jsonl"


LATENCY = dataclasses.replace(FULL, values={"latency_ms": 8.25, "latency_ms_low": 8.0, "latency_ms_high": 8.5})
RATIO = dataclasses.replace(FULL, kind="ratio", values={"ratio": 1.0, "low": 0.9, "high": 1.1, "num_blocks": 3})


def test_check_records_finds_no_fault_where_there_is_none(described):
    failed = dataclasses.replace(FULL, values={"error": "OOM"}, samples={})
    run = dataclasses.replace(PLAIN, kind="run", machine="cpu-2c")
    append_records(described, [FULL, LATENCY, RATIO, failed, run])
    assert check_records(described) == []


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (dataclasses.replace(FULL, kind="guess"), "kind 'guess' is not one of latency"),
        (dataclasses.replace(FULL, subject=""), "suite and subject must not be empty"),
        (dataclasses.replace(FULL, subject=3), "subject must be text"),
        (dataclasses.replace(FULL, commit=3), "commit must be text"),
        (dataclasses.replace(FULL, condition=[1]), "condition must be an object"),
        (dataclasses.replace(FULL, versions={"torch": 2}), "versions must hold text"),
        (dataclasses.replace(FULL, samples={"latency_ms": [8.25, "8"]}), "samples must hold lists of numbers"),
        (dataclasses.replace(FULL, created="yesterday"), "created 'yesterday' is not a time"),
        (dataclasses.replace(FULL, samples={"latency_ms": [8.25], "b": [1, 2]}), r"one length and not empty, not \[1"),
        (dataclasses.replace(FULL, samples={"latency_ms": []}), "one length and not empty"),
        (dataclasses.replace(FULL, samples={"latency_ms": [8.2501] * 3}), "8.25, and the median of its samples 8.2501"),
        (dataclasses.replace(FULL, samples={}), "samples.latency_ms is missing"),
        (dataclasses.replace(FULL, values={}), "must be a positive number, not None"),
        (dataclasses.replace(FULL, values={**LATENCY.values, "latency_ms_high": 8.1}), "of its interval, 8 to 8.1"),
        (dataclasses.replace(RATIO, values={"ratio": 1.2, "low": 0.9, "high": 1.1}), "1.2 lies outside of its"),
        (dataclasses.replace(RATIO, values={"ratio": 1.0, "low": None, "high": 1.1}), "must be numbers"),
        (dataclasses.replace(RATIO, values={**RATIO.values, "num_blocks": 4}), "num_blocks is 4, and there are 3"),
    ],
)  # fmt: skip
def test_check_records_names_line_and_fault(described, record, fault):
    append_records(described, [FULL, record])
    (found,) = check_records(described)
    assert re.fullmatch(rf".*log\.jsonl line 2: .*{fault}.*", found)


def test_check_records_goes_on_after_lines_that_are_no_records(described):
    append_records(described, [FULL])
    with described.open("a", encoding="utf-8") as file:
        file.write('{"schema": 2, "text": "?"}\nnonsense\n')
        file.write(json.dumps({"schema": 1, **dataclasses.asdict(FULL), "values": {"latency_ms": float("nan")}}) + "\n")
        file.write("{")
    newer, nonsense, infinite, torn = sorted(check_records(described), key=lambda fault: fault.partition("line ")[2])
    assert "line 2 is not a record: schema must be 1, not 2: a newer fasternet wrote it" in newer
    assert "line 3 is not a record" in nonsense
    assert "line 4: values must hold finite numbers" in infinite
    assert "line 5 is torn" in torn


def test_check_records_wants_the_machine_described(tmp_path):
    path = tmp_path / "cpu-2c" / "log.jsonl"
    append_records(path, [FULL])
    (fault,) = check_records(path)
    assert fault.endswith("machine 'cpu-2c' is not described in machines/cpu-2c.json")
    save_machine(tmp_path / "machines", MACHINE)
    assert check_records(path) == []
    (tmp_path / "machines" / "cpu-2c.json").write_text('{"id": "other"}')
    assert "does not describe a machine" in check_records(path)[0]
    append_records(path, [PLAIN, dataclasses.replace(PLAIN, kind="run", machine="elsewhere")])
    assert len(check_records(path)) == 1
