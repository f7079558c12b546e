"""Records survive the disk, a killed writer and an honest reader."""

import dataclasses
import json

import pytest

from fasternet.records import (
    SCHEMA,
    Machine,
    Record,
    append_records,
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
