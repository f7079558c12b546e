"""Where FasterNet is not the fastest: networks of at least its published top-1 that measured faster, plainly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fasternet.paper import Accuracy, load_accuracy
from fasternet.records import Machine, Record
from fasternet.report.compare import Timing, interval_cell, read_timing
from fasternet.report.markup import Column, Html, figure, table, tag
from fasternet.report.provenance import count, describe_condition, describe_machine, number, provenance
from fasternet.report.ratios import is_control
from fasternet.report.settings import INT8, has_published_size, read_way, select_ratios
from fasternet.report.sources import Source, group, newest

NOTE = (
    "Top-1 is quoted, never measured here; each network at the input size that it is published for. The ratio is the "
    "other network’s time over that of FasterNet. Two networks without a measured ratio are compared through a "
    "FasterNet that both have one to in the same engine; the interval then holds those of both. int8 is left out, for "
    "its accuracy is not the published one."
)


class Comparison(NamedTuple):
    """A FasterNet against a network of at least its published top-1.

    Attributes:
        own: The FasterNet.
        rival: The other network.
        timing: The time of the rival over that of the FasterNet.
        verdict: The rival is "faster", "slower" or "not distinguishable".
        via: The FasterNet that both were measured against, or None where the ratio was measured.
        records: The one or two ratios behind it.
    """

    own: str
    rival: str
    timing: Timing
    verdict: str
    via: str | None
    records: tuple[Record, ...]


def show_slower(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Tell for every set of comparable networks which ones beat a FasterNet in speed without being less accurate."""
    ratios = [
        record
        for record in select_ratios(sources)
        if has_published_size(record) and not is_control(record) and _comparable(record) is not None
    ]
    content = []
    for index, (setting, members) in enumerate(group(ratios, _comparable).items(), start=1):
        assert setting is not None  # filtered above
        if pairs := list(compare_at_equal_accuracy(members)):
            content.append(_show(f"slower-{index}", setting, pairs, machines))
    return content


def _comparable(ratio: Record) -> tuple[str, str] | None:
    """Return machine and conditions of both sides of a ratio, in words; None where the sides differ otherwise."""
    own, other = read_way(ratio), read_way(ratio, "baseline_")
    if INT8 in (own.precision, other.precision):
        return None
    condition = {name: ratio.condition.get(name) for name in ("device", "threads", "batch_size")}
    if ratio.condition.get("best_engines"):
        return ratio.machine, f"{describe_condition(condition)}, {own.precision}, each in its best library engine"
    if own != other:
        return None
    return ratio.machine, describe_condition(condition | own._asdict())


def compare_at_equal_accuracy(ratios: Sequence[Record]) -> Iterator[Comparison]:
    """Yield every FasterNet against every network of at least its published top-1, as far as ratios tell."""
    accuracy = load_accuracy()
    known = newest(ratios, lambda ratio: (ratio.subject, str(ratio.condition.get("baseline"))))
    names = dict.fromkeys(name for pair in known for name in pair if name in accuracy)
    for own in (name for name in names if name.startswith("FasterNet")):
        for rival in names:
            if not rival.startswith("FasterNet") and accuracy[rival].top1 >= accuracy[own].top1:
                pair = _compare(own, rival, known)
                if pair:
                    yield pair


def _compare(own: str, rival: str, known: Mapping[tuple[str, str], Record]) -> Comparison | None:
    if direct := known.get((rival, own)):
        timing = read_timing(direct)
        assert timing  # filtered by whoever calls
        return Comparison(own, rival, timing, str(direct.values.get("verdict")), None, (direct,))
    for via in dict.fromkeys(baseline for _, baseline in known):
        above, below = known.get((rival, via)), known.get((own, via))
        first, second = above and read_timing(above), below and read_timing(below)
        if above and below and first and second and read_way(above, "baseline_") == read_way(below, "baseline_"):
            timing = Timing(first.value / second.value, first.low / second.high, first.high / second.low)
            spread = sum(number(record, "a_a_spread") or 0 for record in (above, below))
            return Comparison(own, rival, timing, _judge(timing, spread), via, (above, below))
    return None


def _judge(timing: Timing, spread: float) -> str:
    """Return the verdict of the measuring protocol: an interval without 1, further from 1 than the A/A spread."""
    if timing.low <= 1 <= timing.high or abs(timing.value - 1) <= spread:
        return "not distinguishable"
    return "faster" if timing.value < 1 else "slower"


def _show(key: str, setting: tuple[str, str], pairs: Sequence[Comparison], machines: Mapping[str, Machine]) -> Html:
    accuracy = load_accuracy()
    lost = [pair for pair in pairs if pair.verdict == "faster"]
    slower = sum(pair.verdict == "slower" for pair in pairs)
    rest = f"slower in {slower}, not distinguishable in {len(pairs) - len(lost) - slower}"
    compared = f"{count(len(pairs), 'comparison')} of a FasterNet with a network of at least its published top-1"
    title = f"{setting[1][0].upper()}{setting[1][1:]}; {describe_machine(setting[0], machines)}"
    small = provenance([record for pair in pairs for record in pair.records], machines)
    if not lost:
        told = f"In none of {compared} the other network is faster; it is {rest}."
        return figure(key, title, tag("p", told), small)
    told = f"In {len(lost)} of {compared}, the other network is faster; it is {rest}."

    def quote(name: str) -> Accuracy:
        return accuracy[name]

    columns: list[Column[Comparison]] = [
        Column("FasterNet", lambda pair: pair.own),
        Column("top-1, %", lambda pair: quote(pair.own).top1, ".1f"),
        Column("source", lambda pair: quote(pair.own).source),
        Column("Faster", lambda pair: pair.rival),
        Column("top-1, %", lambda pair: quote(pair.rival).top1, ".1f"),
        Column("source", lambda pair: quote(pair.rival).source),
        Column("ratio", lambda pair: pair.timing.value, ".2f", "Time"),
        Column("95 % interval", lambda pair: interval_cell(pair.timing), "", "Time"),
        Column("through", lambda pair: pair.via, None, "Time"),
    ]
    rows = sorted(lost, key=lambda pair: (quote(pair.own).top1, pair.timing.value))
    breaks = [i for i in range(1, len(rows)) if rows[i].own != rows[i - 1].own]
    return figure(key, title, tag("div", tag("p", told), table(key, columns, rows, breaks=breaks)), NOTE, small)
