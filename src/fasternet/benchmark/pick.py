"""Which network, engine and precision meet a latency budget on this machine, from the records of ``bench networks``.

Latencies are measured here, accuracies are quoted: the published top-1 belongs to fp32 and to the published weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fasternet.benchmark.prepare import FASTERNETS, find_input_size
from fasternet.environment import describe_machine
from fasternet.paper import Accuracy, load_accuracy
from fasternet.records import Record, load_records
from fasternet.rivals import find_rival
from fasternet.timing import summarize

SETTING = ("device", "batch_size", "threads")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A network in an engine and a precision, as this machine ran it.

    Attributes:
        network: As in ``measure_networks``.
        engine: What ran it.
        precision: What it computed in.
        latency_ms: Median time of a call.
        low_ms: Lower end of its 95 % interval.
        high_ms: Upper end; this is what has to fit a budget.
        p90_ms: 90th percentile, or None with few samples.
        top1: Published ImageNet-1k top-1 in percent of the network in fp32, or None.
        source: Where that is published.
        num_params: Its parameters.
        input_size: Side of the pictures.
        memory_format: That the engine was given, or None.
        unstable: The samples spread widely.
        device: Where it ran.
        batch_size: Pictures in a call.
        threads: On the CPU.
        created: When it was measured.
    """

    network: str
    engine: str
    precision: str
    latency_ms: float
    low_ms: float
    high_ms: float
    p90_ms: float | None
    top1: float | None
    source: str
    num_params: int | None
    input_size: int
    memory_format: str | None
    unstable: bool
    device: str
    batch_size: int
    threads: int
    created: str

    @property
    def remark(self) -> str:
        """What to know before it is taken."""
        remarks = {
            "speed only, no accuracy in int8 is published": self.precision == "int8",
            "top-1 is that of fp32": self.precision == "bf16",
            "no published top-1": self.top1 is None,
            "unstable": self.unstable,
        }
        return "; ".join(remark for remark, applies in remarks.items() if applies)


def find_record_files(paths: Sequence[Path] = ()) -> list[Path]:
    """Return the record files of some files and folders, else of ``./results``, else of ``FASTERNET_RESULTS``.

    Raises:
        FileNotFoundError: A path, or the folder that the variable names, does not exist.
    """
    if not paths:
        named = os.environ.get("FASTERNET_RESULTS")
        paths = [Path("results")] if Path("results").is_dir() else [Path(named)] if named else []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no record file or folder at {path}")
    return [file for path in paths for file in (sorted(path.rglob("*.jsonl")) if path.is_dir() else [path])]


def load_choices(
    files: Iterable[Path],
    *,
    device: str = "cpu",
    batch_size: int = 1,
    threads: int = 1,
    engine: str | None = None,
    precision: str | None = None,
) -> list[Choice]:
    """Return what this machine's records say of networks under such conditions; see ``find_choices``."""
    records = (record for file in files for record in load_records(file))
    setting = {"device": device, "batch_size": batch_size, "threads": threads}
    return find_choices(records, setting, engine=engine, precision=precision)


def find_choices(
    records: Iterable[Record], setting: dict[str, object], *, engine: str | None = None, precision: str | None = None
) -> list[Choice]:
    """Return the latencies of this machine under a setting, of networks at their own size.

    Of several records of a network in an engine and a precision the newest counts, a stable one before others. The
    forms and variants that only serve to compare FasterNet with itself are left out, and PVT and CycleMLP, whose
    published weights nothing here reads.

    Args:
        records: Of any kind.
        setting: Device, batch size and threads.
        engine: The only one wanted; None takes all.
        precision: Likewise; None takes all but int8, whose accuracy nobody has published.
    """
    accuracies = load_accuracy()
    machine = describe_machine().id
    best: dict[tuple[str, str, str], Choice] = {}
    for record in records:
        if (record.machine, record.suite, record.kind) != (machine, "networks", "latency"):
            continue
        if any(record.condition.get(name) != value for name, value in setting.items()):
            continue
        choice = _read(record, accuracies)
        if choice is None or engine not in (None, choice.engine):
            continue
        if choice.precision != precision if precision else choice.precision == "int8":
            continue
        key = choice.network, choice.engine, choice.precision
        held = best.get(key, choice)
        best[key] = max(held, choice, key=lambda one: (not one.unstable, one.created))
    return list(best.values())


def rank(
    choices: Iterable[Choice], budget_ms: float, *, min_top1: float | None = None, every: bool = False
) -> list[Choice]:
    """Return the choices that fit: the upper end of the interval within the budget, the most accurate first.

    Args:
        choices: As ``find_choices`` gives them.
        budget_ms: Of one call.
        min_top1: Leave out what has less, and what has no published top-1.
        every: Keep each engine and precision of a network, not its fastest alone.
    """
    fitting = sorted(
        (choice for choice in filter_accurate(choices, min_top1) if choice.high_ms <= budget_ms),
        key=lambda choice: (choice.top1 is None, -(choice.top1 or 0), choice.latency_ms),
    )
    return fitting if every else _keep_first(fitting)


def find_nearest(choices: Iterable[Choice], *, min_top1: float | None = None) -> list[Choice]:
    """Return each network in its fastest engine and precision, those that miss a budget least first."""
    return _keep_first(sorted(filter_accurate(choices, min_top1), key=lambda choice: choice.high_ms))


def filter_accurate(choices: Iterable[Choice], min_top1: float | None) -> list[Choice]:
    """Leave out what has a lower published top-1, or none; None keeps all."""
    return [c for c in choices if min_top1 is None or (c.top1 is not None and c.top1 >= min_top1)]


def overlap(one: Choice, other: Choice) -> bool:
    """Whether the intervals of two latencies overlap, so that the networks are not distinguishable in speed."""
    return one.low_ms <= other.high_ms and other.low_ms <= one.high_ms


def describe_python(choice: Choice) -> str:
    """Return the line of Python that deploys a choice with published weights."""
    words = ["import fasternet, torch"]
    arguments = [f"engine={choice.engine!r}"]
    is_torch = choice.engine in ("eager", "compile")
    if choice.precision != "fp32":
        arguments.append(f"precision={choice.precision!r}")
    if choice.device == "cpu" and is_torch:
        words.append(f"torch.set_num_threads({choice.threads})")
    elif choice.device == "cpu":
        arguments.append(f"threads={choice.threads}")
    if is_torch and choice.memory_format == "channels_last" and choice.network not in FASTERNETS:
        arguments.append("memory_format='channels_last'")
    device = "" if choice.device == "cpu" else f", device={choice.device!r}"
    example = f"torch.zeros({choice.batch_size}, 3, {choice.input_size}, {choice.input_size}{device})"
    if choice.network in FASTERNETS:
        network = f"fasternet.create_model({FASTERNETS[choice.network]!r}, pretrained=True)"
    else:
        network = f"fasternet.create_network({choice.network!r}, num_classes=1000, pretrained=True)"
    words.append(f"network = fasternet.create_runtime({network}, {example}, {', '.join(arguments)})")
    return "; ".join(words).replace("'", '"')


def describe_shell(choice: Choice) -> str | None:
    """Return the shell command that runs a choice on a picture; None where ``predict`` does not take it."""
    if choice.network not in FASTERNETS or choice.precision != "fp32":
        return None
    model = FASTERNETS[choice.network]
    return f"fasternet predict photo.jpg --model {model} --engine {choice.engine} --device {choice.device}"


def _read(record: Record, accuracies: dict[str, Accuracy]) -> Choice | None:
    values, condition, network = record.values, record.condition, record.subject
    samples = record.samples.get("latency_ms")
    own_size = _find_input_size(network)
    if "latency_ms" not in values or own_size is None or condition.get("input_size") != own_size:
        return None  # it failed, is a form or variant, or ran at a size that the published top-1 does not belong to
    low, high = values.get("latency_ms_low"), values.get("latency_ms_high")
    if low is None or high is None:
        if not samples:
            return None
        summary = summarize(samples)
        low, high = summary.low_ms, summary.high_ms
    accuracy = accuracies.get(network)
    return Choice(
        network=network,
        engine=condition.get("engine", "eager"),
        precision=condition.get("precision", "fp32"),
        latency_ms=values["latency_ms"],
        low_ms=low,
        high_ms=high,
        p90_ms=values.get("latency_ms_p90"),
        top1=accuracy.top1 if accuracy else None,
        source=accuracy.source if accuracy else "",
        num_params=values.get("num_params"),
        input_size=own_size,
        memory_format=condition.get("memory_format"),
        unstable=bool(values.get("unstable")),
        **{name: condition[name] for name in SETTING},
        created=record.created,
    )


def _find_input_size(network: str) -> int | None:
    """Return the side of the pictures that a network is made for; None for what cannot be deployed as published."""
    if network in FASTERNETS:
        return find_input_size(network)
    try:
        rival = find_rival(network)
    except ValueError:
        return None  # a form or a variant
    return None if rival.source == "fasternet" else rival.input_size  # ours have no published weights


def _keep_first(choices: Sequence[Choice]) -> list[Choice]:
    """Keep one choice a network."""
    first: dict[str, Choice] = {}
    for choice in choices:
        first.setdefault(choice.network, choice)
    return list(first.values())
