"""``fasternet results merge``: the file is the result, the counts are a remark."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fasternet.cli.results import results
from fasternet.records import Record, append_records, load_records


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


def test_help_ends_with_an_invocation() -> None:
    shown = CliRunner().invoke(results, ["merge", "--help"]).stdout
    assert "Example: fasternet results merge" in " ".join(shown.split())
