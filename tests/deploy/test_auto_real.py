"""choose_engine with the engines that are installed: they agree, and the choice holds when it is measured afresh."""

import functools

import pytest
import torch

from fasternet.deploy import auto
from fasternet.deploy.auto import choose_engine
from fasternet.models import create_model
from fasternet.timing import measure


def create_real():
    return create_model("fasternet_t0", width=8, depths=(1, 1, 1, 1), head_width=16, num_classes=10).eval()


def test_real_eager_runs_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(auto, "_SHORT_S", 0.2)
    model, x = create_real(), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        choice = choose_engine(model, x, candidates=["eager"])
    with torch.no_grad():
        assert torch.allclose(choice.runtime(x), model(x), atol=1e-5)
    assert choose_engine(model, x, candidates=["eager"]).remembered


def test_eager_is_left_out_where_it_cannot_have_the_threads():
    with pytest.raises(ValueError, match=r"engine eager runs in PyTorch's threads.*set_threads"):
        choose_engine(create_real(), torch.randn(1, 3, 32, 32), threads=2, candidates=["eager"], remember=False)


def test_unknown_precision_and_unfit_example_are_refused():
    with pytest.raises(ValueError, match="precision 'fp8' is not one of"):
        choose_engine(create_real(), torch.randn(1, 3, 32, 32), precision="fp8")
    with pytest.raises(ValueError, match=r"^example must be float32"):
        choose_engine(create_real(), torch.randn(1, 3, 32, 32).double(), remember=False, candidates=["eager"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_real_engines_agree_and_one_is_chosen(monkeypatch, tmp_path, precision):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if (reason := auto.explain_engine("eager", precision)) is not None:
        pytest.skip(reason)
    model, x = create_real(), torch.randn(3, 3, 64, 48)
    choice = choose_engine(model, x, precision=precision)
    timed = {trial.engine: trial.latency_ms for trial in choice.trials if trial.fault is None}
    assert choice.engine == min(timed, key=timed.__getitem__)
    unusable = [name for name in auto.CANDIDATES if auto.explain_engine(name, precision) is not None]
    assert sorted([*timed, *unusable]) == sorted(auto.CANDIDATES)  # every installed one computes rightly
    runtime = auto.create_runtime(model, x, engine="auto", precision=precision)
    assert runtime.engine == choice.engine
    assert runtime.reasons["choice"].startswith(choice.reason + ", as measured on")


@pytest.mark.slow
def test_choice_is_within_five_percent_of_the_best_ten_times_of_ten():
    model, x = create_model("fasternet_t0").eval(), torch.randn(1, 3, 224, 224)
    losses, num_disturbed = [], 0
    for seed in range(10):
        choice = choose_engine(model, x, remember=False)
        names = [trial.engine for trial in choice.trials if trial.fault is None]
        afresh = {name: functools.partial(auto.create_runtime(model, x, engine=name), x) for name in names}
        measured = measure(afresh, seed=seed, num_blocks=32)
        num_disturbed += any("cores" in text for text in measured.warnings)
        median_ms = {name: measured.summary(name).median_ms for name in names}
        losses.append(median_ms[choice.engine] / min(median_ms.values()) - 1)
    told = f"other processes or the host kept this machine busy in {num_disturbed} of 10 measurements"
    if num_disturbed > 2:  # judged by the load alone, whatever came out
        pytest.skip(told)
    assert max(losses) <= 0.05, f"{losses}; {told}"
