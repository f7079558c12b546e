"""Tries the engines that are installed, takes the fastest that computes the network's function, and remembers it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasternet import native
from fasternet.deploy.engines import ENGINES, explain_engine
from fasternet.deploy.runtime import Runtime, check_output, create_runtime
from fasternet.deploy.verify import measure_correlation
from fasternet.environment import describe_machine, describe_software
from fasternet.timing import Summary, measure, summarize

CANDIDATES = tuple(name for name in ENGINES if name not in ("auto", "compile"))  # compiling takes up to minutes
MAX_DIFFERENCE = {"fp32": 1e-4, "bf16": 2e-2, "int8": 2e-2}  # of the largest output
# With fewer bits no bound on the difference holds for every network: its outputs may point the same way instead.
MIN_CORRELATION = {"bf16": 0.9, "int8": 0.3}
MIN_NUMBERS = 16  # of which a correlation says something
CLOSE = 1.15  # times the fastest of the short round: these run on in the long one

# Seconds that each candidate has in each round. They sum up to two where calls are longest: one of a third of a second
# is made three times in each, to warm up, as a candidate and as its own control.
_SHORT_S, _LONG_S = 0.8, 1.0
# What changes how fast an engine is: of ours, oneDNN, OpenVINO and PyTorch.
_VARIABLES = (
    *(native.ISA_VARIABLE, native.LIBRARY_VARIABLE),
    *("ONEDNN_MAX_CPU_ISA", "OV_CPU_MAX_ISA", "ATEN_CPU_CAPABILITY"),
)
_MIN_BLOCK_S, _WARMUP_S = 0.01, 0.05


@dataclasses.dataclass(frozen=True)
class Trial:
    """What came of one engine.

    Attributes:
        engine: Its name.
        fault: Why it was left out, or None.
        prepare_s: Seconds that making it ready took; None where it never was.
        difference: Largest difference from the network in eager fp32, as a share of the largest output.
        latency_ms: Median of a call, None where it was not timed; likewise ``low_ms`` and ``high_ms``.
        low_ms: Lower end of the median's 95 % interval.
        high_ms: Upper end.
    """

    engine: str
    fault: str | None = None
    prepare_s: float | None = None
    difference: float | None = None
    latency_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """The engine to take; ``choose_engine`` makes it.

    Attributes:
        engine: Its name.
        runtime: The network in it, ready to run; its ``reasons`` hold ``reason`` as ``"choice"``.
        reason: Why it was taken, in one sentence.
        trials: What came of each candidate.
        remembered: Whether the times are those of an earlier choice under the same conditions.
    """

    engine: str
    runtime: Runtime
    reason: str
    trials: tuple[Trial, ...]
    remembered: bool


class _Ready(NamedTuple):
    """What preparing an engine came to; there is no runtime where it cannot run, or is wrong."""

    trial: Trial
    runtime: Runtime | None = None
    call_s: float = 0.0  # of the one call that was checked


_Prepare = Callable[[str], _Ready]


def choose_engine(
    model: nn.Module,
    example: Tensor,
    *,
    precision: str = "fp32",
    threads: int | None = None,
    candidates: Sequence[str] | None = None,
    remember: bool = True,
) -> Choice:
    """Find the fastest engine for a network, a precision, a shape and a number of threads on this machine.

    Each candidate is made ready and checked against the network itself in eager fp32, on random pictures. Those that
    pass are timed in turns, each for two seconds at most (for three calls where these take longer). The choice is kept
    in the user's cache folder for the same machine, versions, architecture and arguments; weights do not count, but
    what was remembered is checked anew. The environment is the caller's: nothing is pinned.

    Args:
        model: Any network from pictures to logits, or to a list of feature maps; it is not modified.
        example: See ``create_runtime``.
        precision: See ``create_runtime``; engines without it are left out.
        threads: See ``create_runtime``; an engine that cannot have so many is left out.
        candidates: Names of engines; None takes all but ``"compile"``, which takes long to prepare.
        remember: Whether to use and keep what is known; False measures afresh and leaves no trace.

    Returns:
        The engine, ready to run, and what came of every candidate.

    Raises:
        ValueError: An argument does not fit, or no candidate runs this network rightly.
    """
    if isinstance(candidates, str):
        raise ValueError(f"candidates={candidates!r} must be a list of engines, such as [{candidates!r}]")
    names = tuple(CANDIDATES if candidates is None else dict.fromkeys(candidates))
    known = [name for name in ENGINES if name != "auto"]
    if not names or not set(names) <= set(known):
        raise ValueError(f"candidates={list(names)} must name one or more of {', '.join(known)}")
    usable = [name for name in names if explain_engine(name, precision, example.device.type) is None]
    # Of tensors made in inference mode a compiled graph would be one for such tensors alone.
    with torch.inference_mode(False), torch.no_grad():
        x = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example.device)
        expected = _run_oracle(model, x)  # a list, of logits or of maps

        def prepare(name: str) -> _Ready:
            return _prepare(model, example, x, expected, engine=name, precision=precision, threads=threads)

        if not remember:
            return _choose(names, prepare, x)
        key = _make_key(model, example, precision=precision, threads=threads, candidates=usable)
        file = _find_file(key)
        if file and (kept := _recall(file, key, prepare)):
            return kept
        choice = _choose(names, prepare, x)
    if file:
        _keep(file, key, choice)
    return choice


def _run_oracle(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what the network itself gives in eager fp32: logits alone, or maps."""
    try:
        output = copy.deepcopy(model).to(x.device, torch.float32).eval()(x)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        text = str(error).partition("\n")[0]
        raise ValueError(f"the network does not run on pictures of the shape {tuple(x.shape)}: {text}") from error
    check_output(output)
    expected = _to_list(output)
    if not all(part.isfinite().all() for part in expected):
        raise ValueError("the network's outputs for random pictures are not finite: no engine can be checked")
    return expected


def _to_list(output: Tensor | list[Tensor]) -> list[Tensor]:
    return [part.cpu() for part in ([output] if isinstance(output, Tensor) else output)]


def _prepare(
    model: nn.Module,
    example: Tensor,
    x: Tensor,
    expected: list[Tensor],
    *,
    engine: str,
    precision: str,
    threads: int | None,
) -> _Ready:
    """Make an engine ready and check it."""
    begin = perf_counter()
    try:
        runtime = create_runtime(model, example, engine=engine, precision=precision, threads=threads)
        ready = perf_counter()
        output = _to_list(runtime(x))  # waits for a GPU
        end = perf_counter()
    except Exception as error:  # other people's engines have many; what went wrong is shown
        text = (str(error) or type(error).__name__).partition("\n")[0]
        return _Ready(Trial(engine, text))
    difference, fault = _compare_all(output, expected, precision)
    return _Ready(Trial(engine, fault, ready - begin, difference), None if fault else runtime, end - ready)


def _compare_all(
    outputs: Sequence[Tensor], expected: Sequence[Tensor], precision: str
) -> tuple[float | None, str | None]:
    """Return the relative difference of the output that differs most, and what is wrong with it."""
    if len(outputs) != len(expected):
        return None, f"wrong: it has {len(outputs)} outputs instead of {len(expected)}"
    found = [_compare(output, right, precision) for output, right in zip(outputs, expected, strict=True)]
    return next((pair for pair in found if pair[1]), max(found, key=lambda pair: pair[0] or 0.0))


def _compare(output: Tensor, expected: Tensor, precision: str) -> tuple[float | None, str | None]:
    if output.shape != expected.shape:
        return None, f"wrong: its output is {tuple(output.shape)} instead of {tuple(expected.shape)}"
    scale = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    difference = float((output - expected).abs().max()) / scale
    if difference <= (limit := MAX_DIFFERENCE[precision]):
        return difference, None
    if (least := MIN_CORRELATION.get(precision)) and expected.numel() >= MIN_NUMBERS:
        correlation = measure_correlation(output, expected)
        wrong = f"wrong: it correlates by {correlation:.2f} with eager fp32, less than {least:g}"
        return difference, None if correlation >= least else wrong
    return difference, f"wrong: it differs by {difference:.1e} of the largest output from eager, more than {limit:g}"


def _choose(names: Sequence[str], prepare: _Prepare, x: Tensor) -> Choice:
    """Prepare, check and time all candidates, and take the fastest."""
    found = {name: prepare(name) for name in names}
    runtimes = {name: ready.runtime for name, ready in found.items() if ready.runtime is not None}
    trials = {name: ready.trial for name, ready in found.items()}
    if not runtimes:
        faults = {trial.fault: name for name, trial in trials.items()}  # the same one for all is said once
        told = "; ".join(f"{name}: {fault}" for fault, name in faults.items())
        raise ValueError(f"no engine runs this network here ({told})" if len(faults) > 1 else next(iter(faults)))
    calls = {name: functools.partial(runtime, x) for name, runtime in runtimes.items()}
    summaries = _time(calls, {name: found[name].call_s for name in calls}, x.device.type)
    for name, of in summaries.items():
        trials[name] = dataclasses.replace(trials[name], latency_ms=of.median_ms, low_ms=of.low_ms, high_ms=of.high_ms)
    best = min(summaries, key=lambda name: summaries[name].median_ms)
    reason = _explain(best, summaries)
    return Choice(best, _with_reason(runtimes[best], reason), reason, tuple(trials.values()), remembered=False)


def _time(calls: Mapping[str, Callable[[], object]], call_s: Mapping[str, float], device: str) -> dict[str, Summary]:
    """Time all in a short round, and those that are close in a long one too; ``call_s`` is rough, to plan with."""
    samples = {name: list(found) for name, found in _measure(calls, call_s, _SHORT_S, device).items()}
    # By the median and by the least: on a busy machine either may lie.
    typical, least = ({name: of(times) for name, times in samples.items()} for of in (statistics.median, min))
    close = {
        name: call
        for name, call in calls.items()
        if any(times[name] <= CLOSE * min(times.values()) for times in (typical, least))
    }
    call_s = {name: typical[name] / 1e3 for name in close}
    if len(close) > 1 and _count_rounds(call_s, _LONG_S) >= 1:
        for name, more in _measure(close, call_s, _LONG_S, device).items():
            samples[name] += more
    return {name: summarize(found) for name, found in samples.items()}


def _measure(
    calls: Mapping[str, Callable[[], object]], call_s: Mapping[str, float], budget_s: float, device: str
) -> Mapping[str, list[float]]:
    rounds = max(1, _count_rounds(call_s, budget_s))
    settings: dict[str, Any] = {"num_blocks": rounds, "min_block_s": _MIN_BLOCK_S, "warmup_s": _WARMUP_S}
    fastest = min(call_s, key=call_s.__getitem__)
    return measure(calls, baseline=fastest, device=device, clock=perf_counter, **settings).samples_ms


def _count_rounds(call_s: Mapping[str, float], budget_s: float) -> int:
    """Return how many rounds fit where each has so many seconds: the fastest, with its control, runs twice."""
    fastest = min(call_s, key=call_s.__getitem__)

    def count(name: str, seconds: float) -> float:
        warmup_s = seconds if seconds >= _WARMUP_S else _WARMUP_S + 2.5 * _MIN_BLOCK_S + seconds
        block_s = seconds if seconds >= 2 * _MIN_BLOCK_S else 1.25 * _MIN_BLOCK_S + 2 * seconds
        return (budget_s - warmup_s) / (block_s * (2 if name == fastest else 1))

    return int(min(count(name, seconds) for name, seconds in call_s.items()))


def _explain(best: str, summaries: Mapping[str, Summary]) -> str:
    own = summaries[best]
    others = sorted((found.median_ms, name) for name, found in summaries.items() if name != best)
    if not others:
        return f"{best} takes {own.median_ms:.3g} ms a call, and no other candidate runs this network here"
    next_ms, name = others[0]
    times = f"{next_ms / own.median_ms:.2f} times as fast as"
    if summaries[name].low_ms <= own.high_ms:
        times = "within the error as fast as"
    return (
        f"{best} takes {own.median_ms:.3g} ms a call, {times} {name} ({next_ms:.3g} ms), the next of {len(summaries)}"
    )


def _with_reason(runtime: Runtime, reason: str) -> Runtime:
    return dataclasses.replace(runtime, reasons={**runtime.reasons, "choice": reason})


def _make_key(
    model: nn.Module, example: Tensor, *, precision: str, threads: int | None, candidates: Sequence[str]
) -> dict[str, Any]:
    """Return all that the choice depends on, as JSON gives it back."""
    software = describe_software()
    shapes = [f"{name} {tuple(tensor.shape)}" for name, tensor in model.state_dict().items()]
    text = "\n".join([repr(getattr(model, "config", None)), repr(model), *shapes])
    text = re.sub(r" at 0x[0-9a-f]+", "", text)  # of functions, another one in every process
    return {
        "machine": describe_machine().id,
        "instruction_sets": list(describe_machine().instruction_sets),
        "environment": [os.environ.get(name) for name in _VARIABLES],
        "versions": {name: software.get(name) for name in ("fasternet", "torch", "onnxruntime", "openvino")},
        "model": hashlib.sha256(text.encode()).hexdigest(),
        "shape": list(example.shape),
        "device": example.device.type,
        "precision": precision,
        "threads": threads or torch.get_num_threads(),
        "torch_threads": torch.get_num_threads(),
        "candidates": list(candidates),
    }


def _find_file(key: Mapping[str, Any]) -> Path | None:
    """Return where a choice is kept; None, and a warning, where the user has no folder for it."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasternet" / "auto"
    except RuntimeError as error:
        warnings.warn(f"the choice of the engine is not remembered: {error}", stacklevel=3)
        return None
    return cache / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"


def _recall(file: Path, key: Mapping[str, Any], prepare: _Prepare) -> Choice | None:
    """Return what was chosen before, if it is still right; weights may have changed since."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["key"] != key or content["engine"] not in key["candidates"]:
            raise ValueError("it holds another choice")
        engine, reason = content["engine"], f"{content['reason']}, as measured on {content['measured']}"
        trials = tuple(Trial(**trial) for trial in content["trials"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(f"{file} is damaged or cannot be read ({text}): the engine is chosen anew", stacklevel=3)
        return None
    runtime = prepare(engine).runtime
    return None if runtime is None else Choice(engine, _with_reason(runtime, reason), reason, trials, remembered=True)


def _keep(file: Path, key: Mapping[str, Any], choice: Choice) -> None:
    """Write a choice in one step: another process reads the old file or the new one, never half of it."""
    content = {
        "key": key,
        "engine": choice.engine,
        "reason": choice.reason,
        "measured": datetime.now(UTC).date().isoformat(),
        "trials": [dataclasses.asdict(trial) for trial in choice.trials],
    }
    part = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as opened:
            part = opened.name
            json.dump(content, opened, indent=1)
        Path(part).replace(file)
    except OSError as error:
        warnings.warn(f"the choice of the engine is not remembered: {error}", stacklevel=3)
        if part is not None:
            with contextlib.suppress(OSError):
                Path(part).unlink()
