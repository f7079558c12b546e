"""``fasternet env``: every engine in every precision is ready, or says why not."""

import itertools
import json

from typer.testing import CliRunner

from fasternet import native
from fasternet.cli import app
from fasternet.deploy import ENGINES, PRECISIONS, explain_engine


def test_every_engine_and_precision_is_ready_or_says_why_not() -> None:
    document = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    for engine in ENGINES:
        for precision in PRECISIONS:
            assert document["ready"][f"engine {engine} {precision} cpu"] == (
                explain_engine(engine, precision) or "ready"
            )
    assert document["ready"]["engine eager fp32 cpu"] == "ready"
    assert document["ready"]["pconv2d native"] == (native.explain_native() or "ready")
    assert ("onnxruntime" in document["versions"]) == (explain_engine("onnxruntime") is None)
    assert "engine openvino fp32 cpu" in CliRunner().invoke(app, ["env"]).stdout


def test_every_instruction_set_is_ready_or_says_why_not_and_the_choice_has_its_reason(monkeypatch):
    document = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    for isa, precision in itertools.product(native.ISAS, native.PRECISIONS):
        assert document["ready"][f"isa {isa} {precision}"] == (native.explain_native(isa, precision) or "ready")
    monkeypatch.setenv(native.ISA_VARIABLE, "portable")
    chosen = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)["isa"]
    reason = native.explain_native("portable")
    expected = "portable: FASTERNET_CPU_ISA asks for it" if reason is None else f"none: {reason}"
    assert chosen == {"fp32": expected, "bf16": expected}


def test_a_missing_library_is_a_reason_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv(native.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    result = CliRunner().invoke(app, ["env", "--json"])
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert "does not exist" in document["ready"]["isa portable fp32"]
    assert document["isa"]["fp32"].startswith("none: the CPU engine's library")
