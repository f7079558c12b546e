"""Settings: what was measured on one machine under equal conditions, its engines and precisions side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from fasternet.paper import load_table
from fasternet.records import Machine, Record
from fasternet.report.compare import Quantity, Timing, read_timing, select_quantity
from fasternet.report.markup import Html
from fasternet.report.provenance import describe_condition, describe_setting, provenance
from fasternet.report.sources import Source, group, newest, select, setting

ENGINES = {
    **{"eager": "eager", "compile": "torch.compile", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"},
    "cpu": "CPU engine",
}
SIZE = 224  # of pictures, at which networks are published, except for
SIZES = {"MobileViT-": 256, "EdgeNeXt-": 256}  # those of the paper, and what paper/today_accuracy.csv names
INT8 = "int8"  # calibrated on random pictures: its accuracy is not the published one


class Way(NamedTuple):
    """How a network is computed."""

    engine: str
    precision: str

    def __str__(self) -> str:
        """Its name in headings, legends and filters."""
        only = ", speed only" if self.precision == INT8 else ""
        return f"{ENGINES.get(self.engine, self.engine)} {self.precision}{only}"


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
        records: The latency of each network, size and way, as ``newest`` chooses it.
        ways: The engines and precisions, in order of first appearance.
        timings: The ratio of times of each pair, likewise.
        best: For each network and size its fastest fp32 engine against that of a FasterNet.
    """

    quantity: Quantity
    records: tuple[Record, ...]
    ways: tuple[Way, ...]
    timings: Mapping[Pair, Timing]
    best: Mapping[tuple[str, object], tuple[Pair, Timing]]

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


def list_settings(sources: Sequence[Source], machines: Mapping[str, Machine], suite: str = "networks") -> list[Setting]:
    """Return the settings in which networks were measured, in order of first appearance."""
    latencies = group(select(sources, "latency", suite), _equal)
    ratios = group(select_ratios(sources, suite), _equal)
    return [
        _create(members, ratios.get(key, []), select_quantity(members[0], machines))
        for key, members in latencies.items()
    ]


def select_ratios(sources: Sequence[Source], suite: str = "networks") -> list[Record]:
    """Return the ratios of times; where the best engines were compared, those of the commands with the most engines."""
    ratios = [ratio for ratio in select(sources, "ratio", suite) if read_timing(ratio)]
    commands = group(ratios, lambda ratio: ratio.command)
    engines = {command: len({read_way(r).engine for r in members}) for command, members in commands.items()}

    def key(ratio: Record) -> tuple[object, ...]:
        names = ("best_engines", "baseline", "input_size")
        return (*_equal(ratio), ratio.subject, *(ratio.condition.get(name) for name in names))

    best = [ratio for ratio in ratios if ratio.condition.get("best_engines")]
    most = {name: max(engines[r.command] for r in members) for name, members in group(best, key).items()}
    return [ratio for ratio in ratios if engines[ratio.command] >= most.get(key(ratio), 0)]


@cache
def _load_sizes() -> dict[str, int]:
    return {row["network"]: int(row["input_size"]) for row in load_table("today_accuracy")}


def is_published(network: str, size: object) -> bool:
    """Whether a network's published accuracy and speed are those of this input size; a record without one is taken."""
    paper = next((side for family, side in SIZES.items() if network.startswith(family)), SIZE)
    return size in (None, _load_sizes().get(network, paper))


def has_published_size(record: Record) -> bool:
    """Whether a network was measured at the input size that its published accuracy and speed belong to."""
    return is_published(record.subject, record.condition.get("input_size"))


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
    return bool(record.values.get("speed_only")) or read_way(record).precision == INT8


def _equal(record: Record) -> tuple[str, ...]:
    return (record.machine, *(str(record.condition.get(name)) for name in ("device", "threads", "batch_size")))


def _create(latencies: Sequence[Record], ratios: Sequence[Record], quantity: Quantity) -> Setting:
    records = newest(latencies, lambda r: (r.subject, r.condition.get("input_size"), read_way(r)))
    plain = newest((r for r in ratios if not r.condition.get("best_engines")), _read_pair)
    chosen = newest((r for r in ratios if r.condition.get("best_engines")), lambda r: _read_pair(r)[:2])
    timings = {pair: timing for pair, ratio in plain.items() if (timing := read_timing(ratio))}
    best = {name: (_read_pair(ratio), timing) for name, ratio in chosen.items() if (timing := read_timing(ratio))}
    ways = tuple(dict.fromkeys(read_way(record) for record in records.values()))
    return Setting(quantity, tuple(records.values()), ways, timings, best)


def _read_pair(ratio: Record) -> Pair:
    baseline, size = str(ratio.condition.get("baseline")), ratio.condition.get("input_size")
    return Pair(ratio.subject, size, read_way(ratio), baseline, read_way(ratio, "baseline_"))
