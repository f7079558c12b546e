"""docs/training.md: its Python runs as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest

from fasternet.records import load_records

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_python_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = BLOCKS
    names: dict[str, Any] = {}
    exec(block, names)
    kinds = [record.kind for record in load_records(names["run"] / "log.jsonl")]
    assert kinds[:4] == ["run", "epoch", "epoch", "evaluation"]
    assert capsys.readouterr().out.count("Progress(epoch=2") > 1
