"""choose_engine: the fastest right engine, on a clock that tests advance; what it remembers, and when it does not."""

import copy
import dataclasses
import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fasternet.deploy import auto
from fasternet.deploy.auto import choose_engine
from fasternet.deploy.runtime import Runtime
from fasternet.environment import describe_machine, describe_software
from fasternet.timing import measure

X = torch.zeros(4, 3, 4, 4)  # 20 logits: enough for a correlation


class FakeEngines:
    """Engines that compute the network itself, times a factor, and take their time on a clock of their own."""

    def __init__(self):
        self.now, self.noise = 0.0, random.Random(0)
        self.call_s = {"cpu": 0.04, "openvino": 0.05, "onnxruntime": 0.06, "eager": 0.10}
        self.factor, self.jitter, self.prepare_s = {}, {}, {}
        self.failures = {}
        self.calls = {}  # seconds of each, by engine
        self.made = []

    def create(self, model, example, *, engine, precision, threads):
        self.made.append(engine)
        self.now += self.prepare_s.get(engine, 1.0)
        if engine in self.failures:
            raise self.failures[engine]
        self.calls[engine] = []
        network = copy.deepcopy(model).eval()

        def run(x):
            seconds = self.call_s[engine] * self.noise.lognormvariate(0, self.jitter.get(engine, 0.01))
            self.calls[engine].append(seconds)
            self.now += seconds
            return network(x) * self.factor.get(engine, 1.0)

        return Runtime("eager", precision, len(example), 0.1, None, {}, run, example)


@pytest.fixture
def engines(monkeypatch, tmp_path):
    fake = FakeEngines()
    monkeypatch.setattr(auto, "create_runtime", fake.create)
    monkeypatch.setattr(auto, "explain_engine", lambda engine, precision, device: None)
    monkeypatch.setattr(auto, "perf_counter", lambda: fake.now)
    monkeypatch.setattr(auto, "CANDIDATES", tuple(fake.call_s))
    monkeypatch.setattr(auto, "ENGINES", (*fake.call_s, "compile", "auto"))
    monkeypatch.setattr("gc.collect", lambda: 0)  # takes longer than all the rest
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def list_files():
    return sorted((Path(os.environ["XDG_CACHE_HOME"]) / "fasternet" / "auto").iterdir())


def get_trial(choice, engine):
    (trial,) = (trial for trial in choice.trials if trial.engine == engine)
    return trial


@pytest.mark.parametrize("fastest", ["cpu", "openvino", "onnxruntime", "eager"])
def test_fastest_is_chosen_and_says_why(engines, model, fastest):
    engines.call_s[fastest] = 0.02
    engines.prepare_s[fastest] = 7.0
    choice = choose_engine(model.train(), X)
    assert model.training
    assert choice.engine == fastest
    assert not choice.remembered
    said = rf"{fastest} takes (19|20)(\.\d)? ms a call, \d\.\d\d times as fast as \w+ \(\d+(\.\d)? ms\), the next of 4"
    assert re.fullmatch(said, choice.reason)
    assert choice.runtime.reasons["choice"] == choice.reason
    trial = get_trial(choice, fastest)
    assert trial.prepare_s == pytest.approx(7.0)
    assert trial.latency_ms == pytest.approx(20, rel=0.03)
    assert trial.low_ms <= trial.latency_ms <= trial.high_ms
    assert trial.difference < 1e-6
    engines.calls[fastest].clear()
    assert torch.equal(choice.runtime(X), model.eval()(X))
    assert len(engines.calls[fastest]) == 1


def test_choice_loses_less_than_five_percent_on_a_noisy_machine(engines, model):
    losses = []
    for _ in range(20):
        engines.call_s = {name: 0.02 * engines.noise.uniform(1, 1.3) for name in engines.call_s}
        engines.jitter = dict.fromkeys(engines.call_s, 0.08)
        choice = choose_engine(model, X, remember=False)
        losses.append(engines.call_s[choice.engine] / min(engines.call_s.values()) - 1)
    assert max(losses) < 0.05


def test_equals_are_told_as_such(engines, model):
    engines.call_s["openvino"] = engines.call_s["cpu"]
    assert "within the error as fast as" in choose_engine(model, X).reason


@pytest.mark.parametrize(
    "seconds",
    [
        dict.fromkeys(["cpu", "openvino", "onnxruntime", "eager"], 0.0005),
        dict.fromkeys(["cpu", "openvino", "onnxruntime", "eager"], 0.004),
        dict.fromkeys(["cpu", "openvino", "onnxruntime", "eager"], 0.0099),
        dict.fromkeys(["cpu", "openvino", "onnxruntime", "eager"], 0.021),
        dict.fromkeys(["cpu", "openvino", "onnxruntime", "eager"], 0.3),
        {"cpu": 0.004, "openvino": 0.0043, "onnxruntime": 0.6, "eager": 0.25},
    ],
)
def test_two_seconds_bound_the_timing_of_each(engines, model, seconds):
    engines.call_s = seconds
    choose_engine(model, X)
    spent = {name: sum(calls[1:]) for name, calls in engines.calls.items()}  # after the one that is checked
    assert max(spent.values()) <= 2.0
    if max(seconds.values()) < 0.1:
        assert max(spent.values()) > 1.2


def test_calls_that_take_longer_are_made_three_times(engines, model):
    engines.call_s = {"cpu": 5.0, "openvino": 4.0}
    choice = choose_engine(model, X, candidates=["cpu", "openvino"])
    assert choice.engine == "openvino"
    assert max(len(calls) for calls in engines.calls.values()) == 1 + 3


def test_only_the_close_ones_run_on(engines, model, monkeypatch):
    rounds = []

    def spy(calls, **settings):
        rounds.append(set(calls))
        return measure(calls, **settings)

    monkeypatch.setattr(auto, "measure", spy)
    engines.call_s |= {"cpu": 0.04, "openvino": 0.044, "onnxruntime": 0.05}
    choose_engine(model, X)
    assert rounds == [{"cpu", "openvino", "onnxruntime", "eager"}, {"cpu", "openvino"}]


@pytest.mark.parametrize(
    ("precision", "factor", "is_wrong"),
    [
        ("fp32", 1 + 5e-5, False),
        ("fp32", 1 + 2e-4, True),
        ("fp32", float("nan"), True),
        ("bf16", 1.01, False),
        ("bf16", 1.05, False),
        ("bf16", -1.0, True),
        ("bf16", float("nan"), True),
    ],
)
def test_wrong_engine_is_dropped_and_said(engines, model, precision, factor, is_wrong):
    engines.factor["cpu"] = factor
    choice = choose_engine(model, X, precision=precision)
    assert choice.engine == ("openvino" if is_wrong else "cpu")
    trial = get_trial(choice, "cpu")
    assert (trial.fault is not None and trial.fault.startswith("wrong: ")) is is_wrong
    assert (trial.latency_ms is None) is is_wrong
    assert len(engines.calls["cpu"]) == 1 or not is_wrong


def test_shape_other_than_the_networks_is_wrong():
    fault = "wrong: its output is (2, 4) instead of (2, 5)"
    assert auto._compare(torch.zeros(2, 4), torch.ones(2, 5), "fp32") == (None, fault)
    assert auto._compare(torch.zeros(2, 5), torch.zeros(2, 5), "bf16") == (0.0, None)


def test_engine_that_cannot_run_is_left_out_with_its_reason(engines, model):
    engines.failures = {"cpu": ValueError("it takes a FasterNet alone\nand more"), "openvino": MemoryError()}
    choice = choose_engine(model, X)
    assert choice.engine == "onnxruntime"
    assert get_trial(choice, "cpu") == auto.Trial("cpu", "it takes a FasterNet alone")
    assert get_trial(choice, "openvino").fault == "MemoryError"
    engines.failures["onnxruntime"] = ValueError("no")
    assert "no other candidate runs this network here" in choose_engine(model, X, remember=False).reason


def test_without_any_engine_every_reason_is_given_once(engines, model):
    engines.failures = dict.fromkeys(engines.call_s, ValueError("no"))
    with pytest.raises(ValueError, match=r"^no$"):
        choose_engine(model, X)
    engines.failures["cpu"] = ValueError("never")
    with pytest.raises(ValueError, match=r"no engine runs this network here \(cpu: never; eager: no\)"):
        choose_engine(model, X)


def test_compile_is_tried_only_when_asked_for(engines, model):
    engines.call_s["compile"] = 0.001
    assert choose_engine(model, X).engine == "cpu"
    assert "compile" not in engines.made
    assert choose_engine(model, X, candidates=["eager", "compile", "eager"]).engine == "compile"


def test_few_numbers_are_not_correlated():
    a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.2, 2.4, 3.6]])
    assert "differs by 2.0e-01" in auto._compare(b, a, "bf16")[1]
    assert auto._compare(b.repeat(1, 6), a.repeat(1, 6), "bf16")[1] is None


def test_candidates_in_a_string_are_refused(engines, model):
    with pytest.raises(ValueError, match=r"candidates='cpu' must be a list of engines, such as \['cpu'\]"):
        choose_engine(model, X, candidates="cpu")


@pytest.mark.parametrize("candidates", [[], ["auto"], ["tensorrt"]])
def test_unknown_candidates_are_refused(engines, model, candidates):
    with pytest.raises(ValueError, match=r"candidates=\[.*must name one or more of cpu, .*compile"):
        choose_engine(model, X, candidates=candidates)


def test_unfit_example_is_refused(engines, model):
    with pytest.raises(ValueError, match=r"does not run on pictures of the shape \(1, 4, 8, 8\)"):
        choose_engine(model, torch.zeros(1, 4, 8, 8))


def test_network_without_finite_logits_is_refused(engines, model):
    with pytest.raises(ValueError, match="not finite"):
        choose_engine(nn.Sequential(model, nn.Threshold(1e9, float("nan"))), X)
    with pytest.raises(ValueError, match="no tensor of logits"):
        choose_engine(nn.AdaptiveMaxPool2d(1, return_indices=True), X)


def test_second_time_is_remembered(engines, model):
    first = choose_engine(model, X)
    engines.made.clear()
    second = choose_engine(model, X)
    assert second.remembered
    assert second.engine == first.engine == "cpu"
    assert second.trials == first.trials
    assert second.reason.startswith(first.reason + ", as measured on 20")
    assert second.runtime.reasons["choice"] == second.reason
    assert engines.made == ["cpu"]
    assert len(engines.calls["cpu"]) == 1  # checked, not timed
    nn.init.normal_(model[0].weight)
    assert choose_engine(model, X).remembered  # weights do not count
    assert len(list_files()) == 1


def test_nothing_is_read_or_kept_unless_wanted(engines, model):
    choose_engine(model, X, remember=False)
    assert not Path(os.environ["XDG_CACHE_HOME"]).exists()
    choose_engine(model, X)
    assert not choose_engine(model, X, remember=False).remembered


def test_each_part_of_the_key_asks_anew(engines, model, monkeypatch):
    def differ(change=None, network=model, x=X, **options):
        with monkeypatch.context() as patch:
            if change:
                patch.setattr(*change)
            return choose_engine(network, x, **options).remembered

    machine, software = describe_machine(), describe_software()
    other = {**software, "openvino": "1.0"}
    deeper = nn.Sequential(*model, nn.Linear(5, 5))
    gelu = nn.Sequential(*model, nn.GELU())
    relu = nn.Sequential(*model, nn.ReLU())
    variants = [
        {},
        {"change": (auto, "describe_machine", lambda: dataclasses.replace(machine, id="another"))},
        {"change": (auto, "describe_machine", lambda: dataclasses.replace(machine, instruction_sets=("avx2",)))},
        {"change": (auto, "describe_software", lambda: other)},
        {"change": (auto, "explain_engine", lambda name, *_: "no" if name == "eager" else None)},
        {"network": deeper},
        {"network": gelu},
        {"network": relu},
        {"x": X[:1]},
        {"precision": "bf16"},
        {"threads": torch.get_num_threads() + 1},
        {"candidates": ["cpu", "eager"]},
    ]
    assert [differ(**variant) for variant in variants] == [False] * len(variants)
    assert [differ(**variant) for variant in variants] == [True] * len(variants)
    for name in auto._VARIABLES:
        monkeypatch.setenv(name, "portable")
        assert not differ()
    assert len(list_files()) == len(variants) + 5


def test_key_is_the_same_in_another_process(model):
    class Layer(nn.Module):
        def extra_repr(self):
            return f"act={object()}"

    keys = [
        auto._make_key(nn.Sequential(model, Layer()), X, precision="fp32", threads=1, candidates=["cpu"]) for _ in "ab"
    ]
    assert keys[0] == keys[1] == json.loads(json.dumps(keys[0]))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", None])
def test_damaged_file_is_said_once_and_made_anew(engines, model, content):
    choose_engine(model, X)
    (file,) = list_files()
    if content is None:
        content = file.read_bytes().replace(b'"fault"', b'"fualt"')
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{file.name} is damaged or cannot be read .*: the engine is chosen anew"):
        assert not choose_engine(model, X).remembered
    assert choose_engine(model, X).remembered


def test_remembered_engine_that_fails_now_is_chosen_anew(engines, model):
    choose_engine(model, X)
    engines.factor["cpu"] = 2.0
    choice = choose_engine(model, X)
    assert (choice.engine, choice.remembered) == ("openvino", False)
    assert choose_engine(model, X).engine == "openvino"


def test_unwritable_folder_is_said_and_does_not_stop_it(engines, model, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # for root no permission is missing
    with pytest.warns(UserWarning, match=r"is not remembered: .*file"):
        assert choose_engine(model, X).engine == "cpu"


def test_write_that_breaks_off_leaves_nothing(engines, model, monkeypatch):
    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.warns(UserWarning, match="is not remembered: disk full"):
        choose_engine(model, X)
    assert list_files() == []


def test_missing_home_is_said_and_does_not_stop_it(engines, model, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", fail)
    with pytest.warns(UserWarning, match="is not remembered: Could not determine home"):
        assert choose_engine(model, X).engine == "cpu"
