import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fasternet.benchmark import engines, faults, networks, operators, steps, sweeps, training
from fasternet.cli.bench import bench
from fasternet.environment import create_record
from fasternet.records import Record, load_records
from fasternet.train.recipes import RECIPES

RATIO = {"ratio": 3.25, "low": 3.0, "high": 3.5, "verdict": "slower", "a_a_spread": 0.01, "num_blocks": 16}
LATENCY = {
    **{"latency_ms": 12.5, "latency_ms_min": 12.0, "latency_ms_p90": None, "unstable": True, "macs": 4 * 10**8},
    **{"macs_per_second": 3.2e10, "images_per_second": 80.0, "peak_share": 0.5},
}


def _records(suite: str, names: tuple[str, str], condition: dict[str, Any]) -> Iterator[Record]:
    yield create_record(suite, "machine_peak", "gemm", values={"macs_per_second": 6.4e10})
    yield create_record(suite, "latency", names[0], condition=condition, values=LATENCY)
    yield create_record(suite, "latency", names[1], condition=condition, values={"error": "OOM"})
    condition = {**condition, "baseline": names[0]}
    control = {**RATIO, "ratio": 1.0, "verdict": "not distinguishable"}
    yield create_record(suite, "ratio", names[0], condition=condition, values=control)
    yield create_record(suite, "ratio", names[1], condition=condition, values=RATIO)


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(bench, arguments, catch_exceptions=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the measuring, and return what it is asked for."""
    asked: list[dict[str, Any]] = []

    def measure_networks(names: Any, **options: Any) -> Iterator[Record]:
        asked.append({"names": names, **options})
        return _records("networks", ("FasterNet-T0", "MobileViT-XXS"), {"input_size": 224})

    def measure_operators(names: Any, **options: Any) -> Iterator[Record]:
        asked.append({"names": names, **options})
        shape = {"channels": 96, "height": 56, "width": 56}
        return _records("operators", ("pconv3x3_r1/4", "dwconv3x3"), shape)

    monkeypatch.setattr(networks, "measure_networks", measure_networks)
    monkeypatch.setattr(operators, "measure_operators", measure_operators)
    return asked


def test_networks_are_printed_beside_the_paper(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    path = tmp_path / "mine.jsonl"
    result = _run("networks", "--networks", "FasterNet-T0, MobileViT-XXS", "--quick", "--out", str(path))
    assert asked[0]["names"] == ["FasterNet-T0", "MobileViT-XXS"]
    assert asked[0]["quick"] is True
    assert asked[0]["input_size"] is None
    fasternet, mobilevit, control, ratio = (
        line for line in result.stdout.splitlines() if line.strip().startswith(("FasterNet-T0", "MobileViT-XXS"))
    )
    assert fasternet.split()[1:] == ["0.4", "8.2", "12.5", "12", "-", "32", "50", "80", "unstable"]
    assert mobilevit.split()[2] == "25.4"
    assert mobilevit.split()[-1] == "OOM"
    assert "itself (A/A control)" in control
    assert f"{25.4 / 8.2:.4g}" in ratio  # the paper's 3.1x
    assert ratio.split()[-1] == "slower"
    assert result.stderr.splitlines()[-2].startswith("unstable: 1; run again")
    assert result.stderr.splitlines()[-1] == str(path)
    assert [record.kind for record in load_records(path)].count("latency") == 2


def test_engines_are_named_where_they_are_not_the_usual_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_networks(names: Any, **options: Any) -> Iterator[Record]:
        own = {"input_size": 224, "engine": "openvino", "precision": "bf16"}
        fp32 = {**own, "precision": "fp32"}
        yield create_record("networks", "latency", "FasterNet-T0", condition=fp32, values=LATENCY)
        yield create_record("networks", "latency", "FasterNet-T0", condition=own, values=LATENCY)
        eager = {"baseline": "FasterNet-T0", "baseline_engine": "eager", "baseline_precision": "fp32"}
        yield create_record("networks", "ratio", "FasterNet-T0", condition={**own, **eager}, values=RATIO)
        same = {"baseline": "FasterNet-T0", "baseline_engine": "openvino", "baseline_precision": "bf16"}
        warned = {**RATIO, "warnings": ["other processes kept 1.6 cores busy"]}
        yield create_record("networks", "ratio", "FasterNet-T0", condition={**own, **same}, values=warned)

    monkeypatch.setattr(networks, "measure_networks", measure_networks)
    result = _run("networks", "--out", str(tmp_path / "mine.jsonl"))
    in_fp32, latency, ratio, control = (
        line for line in result.stdout.splitlines() if line.strip().startswith("FasterNet-T0")
    )
    assert latency.split()[:3] == ["FasterNet-T0", "openvino", "bf16"]
    assert in_fp32.split()[:4] == ["FasterNet-T0", "openvino", "0.4", "8.2"]  # the paper's
    assert "8.2" not in latency  # which is of fp32
    assert ratio.split()[:5] == ["FasterNet-T0", "openvino", "bf16", "FasterNet-T0", "-"]
    assert "itself (A/A control)" in control
    assert "warning: other processes kept 1.6 cores busy" in result.stderr.splitlines()


def test_resuming_takes_the_records_that_are_there(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    path = tmp_path / "mine.jsonl"
    _run("networks", "--out", str(path))
    result = _run("networks", "--resume", "--json", "--out", str(path))
    assert [len(options["known"]) for options in asked] == [0, 5]
    assert len(json.loads(result.stdout)) == 5


def test_engines_tell_rivals_and_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def measure_engines(names: Any, **options: Any) -> Iterator[Record]:
        asked.append({"names": names, **options})
        own = {"input_size": 224, "engine": "cpu", "precision": "fp32"}
        values = {**LATENCY, "register_peak_share": 0.55}
        yield create_record("engines", "latency", "FasterNet-T0", condition=own, values=values)
        pair = {**own, "baseline": "FasterNet-T0", "baseline_engine": "openvino", "baseline_precision": "fp32"}
        yield create_record("engines", "ratio", "FasterNet-T0", condition={**pair, "best_rival": True}, values=RATIO)
        part = {"latency_ms": 1.5, "share": 0.25, "macs": 1e8, "isa": "avx512", "register_peak_share": 0.4}
        yield create_record("engines", "stage", "FasterNet-T0", condition={**own, "stage": "merging 1"}, values=part)

    monkeypatch.setattr(engines, "measure_engines", measure_engines)
    path = tmp_path / "mine.jsonl"
    arguments = ("--networks", "FasterNet-T0", "--precisions", "fp32", "--threads", "2", "--out", str(path))
    result = _run("engines", *arguments)
    assert (asked[0]["names"], asked[0]["precisions"], asked[0]["threads"]) == (["FasterNet-T0"], ["fp32"], 2)
    latency, ratio, part = (line.split() for line in result.stdout.splitlines() if line.strip().startswith("FasterNet"))
    assert latency[:2] == ["FasterNet-T0", "cpu"]
    assert "55" in latency
    assert " ".join(ratio[:7]) == "FasterNet-T0 cpu FasterNet-T0 openvino, the best rival"
    assert part[2:6] == ["merging", "1", "avx512", "1.5"]
    _run("engines", "--resume", "--out", str(path))
    assert [len(options["known"]) for options in asked] == [0, 3]


def test_held_to_an_instruction_set_the_command_starts_itself_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def start(command: list[str], env: dict[str, str], **_: Any) -> Any:
        started.append((command, env))
        return types.SimpleNamespace(returncode=3)

    monkeypatch.setattr("subprocess.run", start)
    monkeypatch.setattr("sys.argv", ["fasternet", "bench", "engines", "--isa", "avx2"])
    assert CliRunner().invoke(bench, ["engines", "--isa", "avx2"]).exit_code == 3
    ((command, environment),) = started
    assert command[1:] == ["-m", "fasternet", "bench", "engines", "--isa", "avx2"]
    assert (environment["ONEDNN_MAX_CPU_ISA"], environment["FASTERNET_CPU_ISA"]) == ("AVX2", "avx2")


@pytest.mark.parametrize(("name", "module"), [("sweeps", sweeps), ("steps", steps)])
def test_sweeps_and_steps_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: Any) -> None:
    asked: dict[str, Any] = {}

    def measure(*given: Any, **options: Any) -> Iterator[Record]:
        asked.update(options, given=given)
        return _records(name, ("FasterNet-T0", "MobileViT-XXS"), {"input_size": 224})

    monkeypatch.setattr(module, f"measure_{name}", measure)
    result = _run(name, "--networks", "FasterNet-T0, MobileViT-XXS", "--quick", "--out", str(tmp_path / "mine.jsonl"))
    assert ["FasterNet-T0", "MobileViT-XXS"] in (asked.get("networks"), *asked["given"])
    assert asked["quick"] is True
    assert "12.5" in result.stdout
    assert len(load_records(tmp_path / "mine.jsonl")) == 5


def test_operators_are_printed_beside_the_paper(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    path = tmp_path / "mine.jsonl"
    result = _run("operators", "--memory-format", "channels_last", "--out", str(path))
    assert asked[0]["names"] is None
    assert asked[0]["memory_format"] == "channels_last"
    line = next(line for line in result.stdout.splitlines() if "pconv3x3_r1/4 96x56x56" in line)
    assert line.split()[3] == "4.74"
    assert "error" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [((), True), (("--batch-size", "32"), False), (("--device", "cuda"), False)],
)
def test_paper_stands_beside_its_own_conditions_alone(
    tmp_path: Path, asked: list[dict[str, Any]], arguments: tuple[str, ...], shown: bool
) -> None:
    result = _run("networks", *arguments, "--out", str(tmp_path / "mine.jsonl"))
    assert ("8.2" in result.stdout) is shown
    assert "12.5" in result.stdout


def test_json_is_one_document(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    result = _run("networks", "--json", "--out", str(tmp_path / "mine.jsonl"))
    document = json.loads(result.stdout)
    assert [entry["subject"] for entry in document][1:3] == ["FasterNet-T0", "MobileViT-XXS"]


def test_records_go_to_the_machines_folder_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = _run("networks")
    path = Path(result.stderr.splitlines()[-1])
    assert path.match("results/*/*-networks.jsonl")
    assert len(load_records(path)) == 5
    assert (tmp_path / "results" / "machines" / f"{path.parent.name}.json").is_file()


def test_wrong_network_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="near names are MobileNetV2"):
        _run("networks", "--networks", "MobileNetV3")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [("networks", "--batch-size", "0"), ("operators", "--threads", "x"), ("nets",), ("training",)]
)
def test_wrong_options_exit_with_2(arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(bench, arguments).exit_code == 2


SPEEDS = {
    "t0:data": (1000.0, 64.0),
    "t0:step": (400.0, 160.0),
    "t0:both": (390.0, 164.0),
    "plain:t0:both": (380.0, 168.0),
}


def test_training_tells_what_limits_and_compares_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def measure_training(*names: str, **options: Any) -> Iterator[Record]:
        asked.append({"names": names, **options})
        for subject, (speed, ms) in SPEEDS.items():
            values = {"images_per_second": speed, "latency_ms": ms, "latency_ms_min": ms, "unstable": False}
            yield create_record("training-speed", "latency", subject, values=values)
        condition = {"baseline": "plain:t0:both"}
        yield create_record("training-speed", "ratio", "t0:both", condition=condition, values=RATIO)
        yield create_record("training-speed", "latency", "train.py:t0:both", values={"error": "failed: no argument"})

    monkeypatch.setattr(training, "measure_training", measure_training)
    path = tmp_path / "mine.jsonl"
    arguments = ("fasternet_t1", "--data", "flowers", "--set", "batch_size=32", "--set", "num_workers=1")
    result = _run("training", *arguments, "--timm-script", "train.py", "--out", str(path))
    assert asked[0]["names"] == ("fasternet_t1", "flowers")
    assert asked[0]["timm_script"] == Path("train.py")
    recipe = asked[0]["recipe"]
    assert (recipe.batch_size, recipe.num_workers, recipe.lr) == (32, 1, RECIPES["small"].lr)
    assert "t0: the step limits, with 400 images/s alone against 1,000" in result.stdout
    step, script = (
        next(line.split() for line in result.stdout.splitlines() if line.strip().startswith(name))
        for name in ("t0:step", "train.py:t0:both")
    )
    assert step[1:] == ["400", "160", "160"]
    assert script[-3:] == ["failed:", "no", "argument"]
    assert "slower" in result.stdout
    assert len(load_records(path)) == 6


def test_faults_are_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def measure_faults(**options: Any) -> Iterator[Record]:
        asked.append(options)
        values = {"injected": 12, "recovered": 11, "bitwise_equal": 10, "remark": "state.pt is damaged"}
        yield create_record("faults", "fault", "SIGKILL", values=values)

    monkeypatch.setattr(faults, "measure_faults", measure_faults)
    result = _run("faults", "--num-kills", "5", "--seed", "3", "--out", str(tmp_path / "mine.jsonl"))
    assert {key: asked[0][key] for key in ("num_kills", "quick", "seed")} == {"num_kills": 5, "quick": False, "seed": 3}
    row = next(line for line in result.stdout.splitlines() if "SIGKILL" in line)
    assert row.split() == ["SIGKILL", "12", "11", "10", "state.pt", "is", "damaged"]
    assert len(load_records(tmp_path / "mine.jsonl")) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [("batch=3", "recipe has no field 'batch'"), ("mixup=0.2", "the plain loop has no mixup=0.2")],
)
def test_wrong_recipe_is_one_sentence(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _run("training", "--data", "digits", "--set", change)


@pytest.mark.parametrize("command", ["networks", "sweeps"])
def test_auto_is_not_measured(asked: list[dict[str, Any]], command: str) -> None:
    with pytest.raises(ValueError, match="engine auto is one of the others, chosen by timing"):
        _run(command, "--engines", "eager,auto", "--quick")
    assert asked == []
