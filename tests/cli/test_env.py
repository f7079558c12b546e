"""``fasternet env``: every engine in every precision is ready, or says why not."""

import json

from typer.testing import CliRunner

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
    assert ("onnxruntime" in document["versions"]) == (explain_engine("onnxruntime") is None)
    assert "engine openvino fp32 cpu" in CliRunner().invoke(app, ["env"]).stdout
