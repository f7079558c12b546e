"""What records say of an interleaved run: the latency of a candidate, and ratios of two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from fasternet.environment import create_record
from fasternet.records import Record
from fasternet.timing import Measurement


def create_ratio_records(
    suite: str,
    measured: Measurement,
    pairs: Iterable[tuple[str, str]],
    conditions: Mapping[str, Mapping[str, Any]],
    subjects: Mapping[str, str] = MappingProxyType({}),
    **further: Any,
) -> Iterator[Record]:
    """Record ratios of pairs, numerator and denominator, under the numerator's condition; the control's with warnings.

    Args:
        suite: See ``Record.suite``.
        measured: The run.
        pairs: By name; a candidate against itself is the A/A control.
        conditions: Of the candidates.
        subjects: Of those whose name is not their subject.
        further: Conditions of these ratios alone.
    """
    for name, other in pairs:
        is_control = name == other
        ratio = measured.a_a if is_control else measured.ratio(name, other)
        values = {
            "ratio": ratio.value,
            "low": ratio.low,
            "high": ratio.high,
            "verdict": ratio.verdict,
            "a_a_spread": measured.a_a.spread,
            "num_blocks": len(measured.control_ms),
            **({"warnings": list(measured.warnings)} if is_control else {}),
        }
        theirs = {f"baseline_{key}": conditions[other].get(key) for key in ("engine", "precision")}
        condition = {**conditions[name], "baseline": subjects.get(other, other), **theirs, "metric": "latency_ms"}
        yield create_record(
            suite,
            "ratio",
            subjects.get(name, name),
            condition=condition | further,
            values=values,
            samples={"latency_ms": measured.control_ms} if is_control else {},
        )


def describe_latency(measured: Measurement, name: str) -> dict[str, Any]:
    """Return the values that every latency record begins with."""
    summary = measured.summary(name)
    return {
        "latency_ms": summary.median_ms,
        "latency_ms_min": summary.min_ms,
        "latency_ms_low": summary.low_ms,
        "latency_ms_high": summary.high_ms,
        "latency_ms_p90": summary.p90_ms,
        "latency_ms_p99": summary.p99_ms,
        "spread": summary.spread,
        "unstable": summary.unstable,
        "num_loops": measured.num_loops[name],
    }
