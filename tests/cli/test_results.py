"""``fasternet results``: merged records with their machines, the counts a remark; faults listed one by one."""

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fasternet.cli.results import results
from fasternet.records import Machine, Record, append_records, load_machine, load_records, save_machine

OTHER = Machine(
    id="their-arm-4c", processor="ARM", architecture="aarch64", cores=4, memory_gib=8.0, accelerator=None,
    system="Linux 6.1", instruction_sets=("asimd",),
)  # fmt: skip
COST = Record(suite="networks", kind="cost", subject="FasterNet-T0", values={"macs": 335}, machine=OTHER.id)


def write(folder: Path, *records: Record, machine: Machine | None = OTHER) -> Path:
    """Write records as a benchmark does: in a folder of the machine, which is described one folder up."""
    path = folder / OTHER.id / "networks.jsonl"
    append_records(path, records)
    if machine:
        save_machine(folder / "machines", machine)
    return path


def merge(*sources: Path, output: Path) -> None:
    CliRunner().invoke(results, ["merge", *map(str, sources), "-o", str(output)], catch_exceptions=False)


def test_merge_prints_the_file_and_tells_the_counts(tmp_path: Path) -> None:
    run = Record(suite="train", kind="run", subject="t0", condition={"seed": 3})
    append_records(tmp_path / "t0-seed3" / "log.jsonl", [run])
    merged = tmp_path / "results" / "all.jsonl"
    arguments = ["merge", str(tmp_path / "t0-seed3"), "-o", str(merged)]
    first, second = (CliRunner().invoke(results, arguments) for _ in range(2))
    assert (first.exit_code, first.stdout, first.stderr) == (
        0,
        f"{merged}\n",
        "records added: 1, there already: 0\n",
    )
    assert second.stderr == "records added: 0, there already: 1\n"
    (record,) = load_records(merged)
    assert record.condition == {"seed": 3, "run": "t0-seed3"}


def test_merge_needs_sources_and_an_output(tmp_path: Path) -> None:
    assert CliRunner().invoke(results, ["merge"]).exit_code == 2
    assert CliRunner().invoke(results, ["merge", str(tmp_path)]).exit_code == 2
    with pytest.raises(ValueError, match="holds no records"):
        CliRunner().invoke(results, ["merge", str(tmp_path), "-o", "x.jsonl"], catch_exceptions=False)


@pytest.mark.parametrize("place", ["all.jsonl", "their-arm-4c/all.jsonl"])
def test_merge_takes_the_machines_along(tmp_path: Path, place: str) -> None:
    theirs = write(tmp_path / "theirs", COST)
    output = tmp_path / "results" / place
    for _ in range(2):
        merge(theirs, output=output)
    assert load_records(output) == [COST]
    assert load_machine(tmp_path / "results" / "machines" / "their-arm-4c.json") == OTHER
    assert CliRunner().invoke(results, ["check", str(tmp_path / "results")]).exit_code == 0


def test_merge_refuses_records_of_a_machine_that_is_not_described(tmp_path: Path) -> None:
    theirs, output = write(tmp_path / "theirs", COST, machine=None), tmp_path / "all.jsonl"
    with pytest.raises(ValueError, match="machine 'their-arm-4c' is not described in machines/"):
        merge(theirs, output=output)
    assert not output.exists()


def test_merge_refuses_two_machines_of_one_id(tmp_path: Path) -> None:
    ours, output = write(tmp_path / "ours", COST), tmp_path / "all" / "all.jsonl"
    bigger = dataclasses.replace(OTHER, cores=8, memory_gib=16.0)
    theirs = write(tmp_path / "theirs", dataclasses.replace(COST, subject="FasterNet-T1"), machine=bigger)
    sentence = "another machine is described as 'their-arm-4c' elsewhere, with another cores and memory_gib"
    with pytest.raises(ValueError, match=sentence):
        merge(ours, theirs, output=output)
    assert not output.parent.exists()
    merge(ours, output=output)
    before = output.read_bytes()
    with pytest.raises(ValueError, match=sentence):
        merge(theirs, output=output)
    assert output.read_bytes() == before


def test_merge_takes_a_machine_whose_system_was_updated(tmp_path: Path) -> None:
    updated = dataclasses.replace(OTHER, system="Linux 7.0")
    theirs = write(tmp_path / "theirs", dataclasses.replace(COST, subject="FasterNet-T1"), machine=updated)
    merge(write(tmp_path / "ours", COST), theirs, output=tmp_path / "all.jsonl")
    assert len(load_records(tmp_path / "all.jsonl")) == 2
    assert load_machine(tmp_path / "machines" / "their-arm-4c.json") == OTHER


def test_merge_checks_before_it_adds(tmp_path: Path) -> None:
    faulty = [dataclasses.replace(COST, kind="guess"), dataclasses.replace(COST, subject="")]
    theirs, output = write(tmp_path / "theirs", COST, *faulty), tmp_path / "all.jsonl"
    with pytest.raises(ValueError, match=r"line 2: kind 'guess' is not one of .*, and 1 faults more"):
        merge(theirs, output=output)
    assert not output.exists()


def test_check_lists_every_fault(tmp_path: Path) -> None:
    good = write(tmp_path / "good", COST)
    assert CliRunner().invoke(results, ["check", str(good)]).stdout == "1 record files, no fault\n"
    write(tmp_path / "bad", COST, dataclasses.replace(COST, kind="guess"), machine=None)
    result = CliRunner().invoke(results, ["check", str(tmp_path)])
    assert result.exit_code == 1
    kind, machine = result.stdout.splitlines()
    assert "networks.jsonl line 2: kind 'guess'" in kind
    assert "'their-arm-4c' is not described" in machine
    assert str(result.exception) == "2 faults in 2 record files"


def test_check_wants_record_files(tmp_path: Path) -> None:
    for path, sentence in ((tmp_path, r"no records file \(\*.jsonl\) in"), (tmp_path / "none", "no records file at")):
        with pytest.raises(FileNotFoundError, match=sentence):
            CliRunner().invoke(results, ["check", str(path)], catch_exceptions=False)


def test_records_of_this_repository_have_no_fault() -> None:
    folder = Path(__file__).parents[2] / "results"
    result = CliRunner().invoke(results, ["check", str(folder)])
    assert result.exit_code == 0, result.stdout
    assert int(result.stdout.split()[0]) >= 8


@pytest.mark.parametrize("command", ["merge", "check"])
def test_help_ends_with_an_invocation(command: str) -> None:
    shown = CliRunner().invoke(results, [command, "--help"]).stdout
    assert f"Example: fasternet results {command}" in " ".join(shown.split())
