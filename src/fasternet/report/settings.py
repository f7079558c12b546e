"""Settings: what was measured on one machine under equal conditions, its engines and precisions side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fasternet.records import Machine, Record
from fasternet.report.compare import Quantity, Timing, read_timing, select_quantity
from fasternet.report.markup import Html
from fasternet.report.provenance import describe_condition, describe_setting, provenance
from fasternet.report.sources import Source, group, newest, select, setting

ENGINES = {"eager": "eager", "compile": "torch.compile", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
ARM = ("aarch64", "arm64", "armv7l")


class Way(NamedTuple):
    """How a network is computed."""

    engine: str
    precision: str

    def __str__(self) -> str:
        """Its name in headings, legends and filters."""
        return f"{ENGINES.get(self.engine, self.engine)} {self.precision}"


EAGER = Way("eager", "fp32")


class Pair(NamedTuple):
    """What a ratio of times compares: a network of a size computed in one way, and another network in another way."""

    name: str
    size: object
    way: Way
    baseline: str
    baseline_way: Way


@dataclass(frozen=True)
class Setting:
    """Everything of one suite that one machine measured with equal device, threads and batch.

    Attributes:
        quantity: What its tables show.
        records: The newest latency of each network, size and way.
        ways: The engines and precisions, in order of first appearance.
        timings: The newest ratio of times of each pair.
        best: For each network and size its fastest fp32 engine against that of a FasterNet.
        ratios: The records behind ``timings`` and ``best``.
    """

    quantity: Quantity
    records: tuple[Record, ...]
    ways: tuple[Way, ...]
    timings: Mapping[Pair, Timing]
    best: Mapping[tuple[str, object], tuple[Pair, Timing]]
    ratios: tuple[Record, ...]

    @property
    def label(self) -> str:
        """Its conditions in words, for titles."""
        if len(self.ways) == 1:
            return describe_setting(self.records[0])
        shared = setting(self.records[0])
        return describe_condition({name: shared[name] for name in ("device", "threads", "batch_size")})

    def find(self, name: str, size: object, way: Way) -> Record | None:
        """Return the latency of a network; None where it was not measured so."""
        return self._found.get((name, size, way))

    @cached_property
    def _found(self) -> dict[tuple[str, object, Way], Record]:
        return {
            (record.subject, record.condition.get("input_size"), read_way(record)): record for record in self.records
        }

    def source(self, machines: Mapping[str, Machine]) -> Html:
        """Tell where the records come from."""
        return provenance(self.records, machines)


def list_settings(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Setting]:
    """Return the settings in which networks were measured, in order of first appearance."""
    latencies = group(select(sources, "latency", "networks"), _equal)
    ratios = group(select(sources, "ratio", "networks"), _equal)
    return [
        _create(members, ratios.get(key, []), _find_quantity(members[0], machines))
        for key, members in latencies.items()
    ]


def _find_quantity(record: Record, machines: Mapping[str, Machine]) -> Quantity:
    """Return what to show of a device; the paper measured an ARM processor beside the other one, single pictures."""
    quantity, machine = select_quantity(record), machines.get(record.machine)
    if quantity.device != "CPU" or machine is None or machine.architecture not in ARM:
        return quantity
    paper = dict.fromkeys(("paper", "remeasured"), "arm_latency_ms") if quantity.paper else {}
    conditions = "Cortex-A72, one thread, batch 1, fp32" if quantity.paper else ""
    label = quantity.label.replace("CPU", "ARM")
    return quantity._replace(device="ARM", label=label, conditions=conditions, **paper)


def read_way(record: Record, prefix: str = "") -> Way:
    """Return the engine and precision of a record, or with ``baseline_`` those of what it is compared with."""
    own = record.condition
    engine, precision = (
        own.get(f"{prefix}{name}") or own.get(name) or default
        for name, default in (("engine", "eager"), ("precision", "fp32"))
    )
    return Way(str(engine), str(precision))


def is_speed_only(record: Record) -> bool:
    """Whether a record tells speed alone, since what was computed so has another accuracy."""
    return bool(record.values.get("speed_only"))


def _equal(record: Record) -> tuple[str, ...]:
    return (record.machine, *(str(record.condition.get(name)) for name in ("device", "threads", "batch_size")))


def _create(latencies: Sequence[Record], ratios: Sequence[Record], quantity: Quantity) -> Setting:
    records = newest(latencies, lambda r: (r.subject, r.condition.get("input_size"), read_way(r)))
    timings: dict[Pair, Timing] = {}
    best: dict[tuple[str, object], tuple[Pair, Timing]] = {}
    for ratio in sorted(ratios, key=lambda ratio: ratio.created):
        baseline, size = str(ratio.condition.get("baseline")), ratio.condition.get("input_size")
        pair = Pair(ratio.subject, size, read_way(ratio), baseline, read_way(ratio, "baseline_"))
        if (timing := read_timing(ratio)) is None:
            continue
        if ratio.condition.get("best_engines"):
            best[ratio.subject, size] = pair, timing
        else:
            timings[pair] = timing
    ways = tuple(dict.fromkeys(read_way(record) for record in records.values()))
    return Setting(quantity, tuple(records.values()), ways, timings, best, tuple(ratios))
