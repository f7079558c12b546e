"""Claims: every claim of the paper as a row, what was measured of it beside it, and whether it holds here.

A claim is judged as the paper measured it, in eager PyTorch, and once more with each network in the fastest library
engine that it has. ``holds``: the interval reaches the paper's number, the corrected one where there is one, or lies
beyond it. ``partly``: the direction is certain, the amount is smaller. ``does not hold``: the direction is not certain,
or it is the opposite one. ``not run``: there is no record of such a device, or more than records is needed.
Table 2 and Figure 6 are judged by their own rules, on the network that was studied: their verdicts are those of the
studies' own figures, they may be ``not distinguishable``, and they count apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast, get_args

from fasternet.paper import load_table
from fasternet.records import Machine, Record
from fasternet.report.approximation import (
    ABSOLUTE,
    AVERAGE,
    OWN,
    Approximation,
    list_approximations,
    name_network,
)
from fasternet.report.compare import Timing, find_device, printed, read_timing
from fasternet.report.markup import Cell, Column, Html, figure, table, tag
from fasternet.report.operators import DWCONV, FORWARD, compare_flops, read_passes, read_shape
from fasternet.report.provenance import describe_machine, number, provenance, unique
from fasternet.report.salience import Salience, list_saliences
from fasternet.report.seeds import ONE_SEED, name_verdict
from fasternet.report.settings import ENGINES, Way, has_published_size, read_way, select_ratios
from fasternet.report.sources import Source, newest, select

Verdict = Literal["holds", "partly", "not distinguishable", "does not hold", "not run"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
SUITES = ("networks", "operators")
WRAPPED = "display: block; white-space: normal; width: "  # sentences, beside a column that stays in place


class Speed(NamedTuple):
    """Found in the ratio of the time of ``rival`` to that of ``own``."""

    rival: str
    own: str


class Flops(NamedTuple):
    """Found in the FLOPS of PConv relative to those of DWConv, each the mean over the shapes of Table 1."""


class Computed(NamedTuple):
    """Found by Eq. 2 to 5."""

    value: float
    how: str


class Needs(NamedTuple):
    """Not to be found in records of speed."""

    what: str


TABLE2 = "PConv+PWConv has the lowest average approximation loss (Table 2)"
FIGURE6 = "centre is the most frequent salient position (Fig. 6)"
C, CP, K = 4, 1, 3  # r = 1/4; the shares below hold for every width
DETECTION = "needs Mask R-CNN at 1280 × 800 timed on a GPU"
COCO = "needs weights fine-tuned on COCO, and COCO’s validation pictures"
# How each claim is found, by its text; its device tells the records to look at.
RULES: dict[str, Speed | Flops | Computed | Needs] = {
    "FasterNet-T0 against MobileViT-XXS: speed": Speed("MobileViT-XXS", "FasterNet-T0"),
    "FasterNet-T0 against MobileViT-XXS: top-1 points": Needs(
        "needs the published weights of both, and ImageNet’s validation pictures"
    ),
    "FasterNet-L against Swin-B: throughput": Speed("Swin-B", "FasterNet-L"),
    "FasterNet-L against Swin-B: compute time saved": Speed("Swin-B", "FasterNet-L"),
    "FasterNet-L against ConvNeXt-B: throughput": Speed("ConvNeXt-B", "FasterNet-L"),
    "FasterNet-L against ConvNeXt-B: compute time saved": Speed("ConvNeXt-B", "FasterNet-L"),
    "PConv against DWConv: FLOPS (ratio; printed as 14x higher)": Flops(),
    "PConv against DWConv: FLOPS (ratio; printed as 6.5x higher)": Flops(),
    "PConv against DWConv: FLOPS (ratio; printed as 22.7x higher)": Flops(),
    "PConv r=1/4 against regular conv: FLOPs": Computed(
        (K**2 * CP**2) / (K**2 * C**2), "computed: h·w·k²·c_p² over h·w·k²·c²"
    ),
    "PConv r=1/4 against regular conv: memory access": Computed(
        (2 * CP) / (2 * C), "computed: h·w·2c_p over h·w·2c, the filters left out as in the paper"
    ),
    "FasterNet-S against ResNet50 in Mask R-CNN: compute time saved": Needs(DETECTION),
    "FasterNet-S against ResNet50 in Mask R-CNN: box AP": Needs(COCO),
    "FasterNet-S against ResNet50 in Mask R-CNN: mask AP": Needs(COCO),
    "FasterNet-L against PVT-Large in Mask R-CNN: latency": Needs(DETECTION),
    TABLE2: Needs("needs the weights of a trained ResNet50, and ImageNet’s pictures"),
    FIGURE6: Needs("needs the weights of a trained ResNet18"),
}
# As the paper measured: of the records of a device, those of these conditions are looked at.
CONDITIONS: dict[str, dict[str, object]] = {
    "gpu": {"batch_size": 32},
    "cpu": {"batch_size": 1, "threads": 1},
    "arm": {"batch_size": 1, "threads": 1},
}
UNDER = {
    "gpu": "a GPU, batch 32, fp32",
    "cpu": "a CPU, 1 thread, batch 1, fp32",
    "arm": "an ARM CPU, 1 thread, batch 1, fp32",
}


@dataclass(frozen=True)
class Measured:
    """What was measured of a claim, in the claim's unit.

    Attributes:
        interval: Value and 95 % interval.
        certain: Whether the measuring protocol tells it from 'no difference'.
        how: Of what and over what, where the claim does not tell.
        records: Where it comes from.
        verdict: Of a study, what its own figure says.
    """

    interval: Timing
    certain: bool = True
    how: str = ""
    records: tuple[Record, ...] = ()
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and what was measured of it on one machine.

    Attributes:
        text: In the words of the paper's table of claims.
        device: gpu, cpu, arm or any.
        kind: Unit of its numbers: ratio, share, difference, loss, or order, whose number is a share.
        v1: The paper's number in version v1.
        corrected: The one in later versions.
        machine: Id of the machine, or None.
        eager: Measured in eager PyTorch, or computed.
        best: Measured in the fastest library engine of each network.
        remark: Under which conditions, or what is missing.
    """

    text: str
    device: str
    kind: str
    v1: float | None
    corrected: float | None
    machine: str | None = None
    eager: Measured | None = None
    best: Measured | None = None
    remark: str = ""

    @property
    def is_studied(self) -> bool:
        """Whether it was judged on a network at hand, which need not be the paper's."""
        return self.eager is not None and self.eager.verdict is not None

    def judge(self, measured: Measured | None) -> Verdict:
        """Return whether the claim holds by what was measured."""
        if measured and measured.verdict:
            return measured.verdict
        target = self.v1 if self.corrected is None else self.corrected
        if measured is None or target is None:
            return "not run"
        _, low, high = measured.interval
        neutral = 1.0 if self.kind == "ratio" else 0.0
        grows = target > neutral
        if not measured.certain or not (low > neutral if grows else high < neutral):
            return "does not hold"
        return "holds" if (high >= target if grows else low <= target) else "partly"


def list_claims(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Claim]:
    """Return every claim of the paper, once for each machine that it was measured on, once where it was not."""
    operators = [record for kind in ("latency", "ratio") for record in select(sources, kind, "operators")]
    records = [*operators, *filter(has_published_size, select_ratios(sources))]
    claims = []
    for row in load_table("claims"):
        known = (row["claim"], row["device"], row["kind"], printed(row, "v1"), printed(row, "corrected"))
        rule = RULES[row["claim"]]
        if isinstance(rule, Computed):
            measured = Measured(Timing(rule.value, rule.value, rule.value))
            claims.append(Claim(*known, eager=measured, remark=rule.how))
        elif isinstance(rule, Needs):
            studied = _find_studied(row["claim"], sources)
            claims += [replace(Claim(*known, remark=m.how), machine=m.records[0].machine, eager=m) for m in studied]
            claims += [] if studied else [Claim(*known, remark=rule.what)]
        else:
            claims += _list_measured(Claim(*known), rule, records, machines)
    return claims


def _find_studied(text: str, sources: Sequence[Source]) -> list[Measured]:
    """Return what the studies of a claim found, one of each network and of each set of conditions."""
    if text == TABLE2:
        return [found for study in list_approximations(sources) if (found := _judge_table2(study))]
    return [found for salience in list_saliences(sources) if text == FIGURE6 and (found := _judge_figure6(salience))]


def _judge_table2(study: Approximation) -> Measured | None:
    """Take the verdict of Table 2 on the order of its operators."""
    mean, verdict = study.mean(OWN, AVERAGE, ABSOLUTE), study.judge()
    if mean is None or verdict in (None, ONE_SEED):
        return None
    told = "; ".join(f"against {row.rival}: {row.judge()}" for row in study.comparisons)
    how = f"{name_network(study.condition)}, pictures of {study.condition.get('data')}; {told}"
    return Measured(Timing(mean.value, mean.low, mean.high), True, how, study.records, cast(Verdict, verdict))


def _judge_figure6(salience: Salience) -> Measured | None:
    """Take the verdict of Figure 6."""
    total, verdict = salience.total, salience.judge()
    if total is None or verdict is None or (share := number(total, "centre_share")) is None:
        return None
    low, high = (float(total.values[name]) for name in ("low", "high"))
    how = f"share of the filters of {name_network(total.condition)} whose centre is salient; 11 % if all were alike"
    return Measured(Timing(share, low, high), True, how, salience.records, cast(Verdict, verdict))


def _list_measured(
    claim: Claim, rule: Speed | Flops, records: Sequence[Record], machines: Mapping[str, Machine]
) -> list[Claim]:
    wanted = CONDITIONS[claim.device].items()
    fitting = [
        record
        for record in records
        if find_device(record, machines).lower() == claim.device
        and all(record.condition.get(name) == value for name, value in wanted)
        and all(way.precision == "fp32" for way in _ways(record))
    ]
    found = []
    for machine in unique(record.machine for record in fitting):
        own = [record for record in fitting if record.machine == machine]
        eager = _find_flops(own) if isinstance(rule, Flops) else _find_speed(own, rule, claim.kind, best=False)
        best = None if isinstance(rule, Flops) else _find_speed(own, rule, claim.kind, best=True)
        if eager or best:
            told = [f"on {UNDER[claim.device]}", *(way.how for way in (eager, best) if way and way.how)]
            told += [] if isinstance(rule, Flops) else _tell_plain(own, rule, claim.kind)
            found.append(replace(claim, machine=machine, eager=eager, best=best, remark="; ".join(told)))
    pair = ("PConv", "DWConv") if isinstance(rule, Flops) else rule
    return found or [replace(claim, remark=f"no record of {' and '.join(pair)} on {UNDER[claim.device]}")]


def _ways(record: Record) -> tuple[Way, Way]:
    return read_way(record), read_way(record, "baseline_")


def _find_speed(records: Sequence[Record], rule: Speed, kind: str, *, best: bool) -> Measured | None:
    """Return the ratio of times of two networks, both in eager PyTorch or each in its fastest engine."""
    ratios = [
        record
        for record in records
        if (record.kind, record.suite, record.subject) == ("ratio", "networks", rule.rival)
        and record.condition.get("baseline") == rule.own
        and bool(record.condition.get("best_engines")) == best
        and (best or all(way.engine == "eager" for way in _ways(record)))
        and read_timing(record)
    ]
    if not ratios:
        return None
    (record,) = newest(ratios, lambda _: "").values()
    timing = read_timing(record)
    assert timing  # filtered above
    own, other = (ENGINES.get(way.engine, way.engine) for way in _ways(record))
    how = f"best engines: {rule.rival} in {own}, {rule.own} in {other}" if best else ""
    interval = Timing(*(1 - 1 / value for value in timing)) if kind == "share" else timing
    return Measured(interval, record.values.get("verdict") != "not distinguishable", how, (record,))


def _tell_plain(records: Sequence[Record], rule: Speed, kind: str) -> list[str]:
    """Tell what FasterNet reaches with PConv as plain PyTorch runs it, where that was measured."""
    plain = _find_speed(records, rule._replace(own=f"{rule.own}:split_cat"), kind, best=False)
    if not plain:
        return []
    value, low, high = (_tell(shown, kind) for shown in plain.interval)
    return [f"plain form (split_cat): {value} ({low} to {high})"]


def _find_flops(records: Sequence[Record]) -> Measured | None:
    """Return the mean FLOPS of PConv over those of DWConv, as Table 1's averages, with the shapes' intervals."""
    own = [
        record
        for record in records
        if record.suite == "operators"
        and read_passes(record) == FORWARD
        and record.condition.get("memory_format", "contiguous") == "contiguous"
        and all(way.engine == "eager" for way in _ways(record))
    ]
    paper = {read_shape(row) for row in load_table("table1_operators")}
    rates = {
        read_shape(record.condition): rate
        for record in newest(own, lambda r: (r.kind, r.subject, read_shape(r.condition))).values()
        if (record.kind, record.subject) == ("latency", DWCONV) and (rate := number(record, "macs_per_second"))
    }
    latencies, ratios = ([r for r in own if r.kind == kind] for kind in ("latency", "ratio"))
    compared = compare_flops(latencies, ratios)
    used = [shape for shape in compared if shape in paper and shape in rates]
    if not used:
        return None
    total = sum(rates[shape] for shape in used)
    mean = Timing(*(sum(rates[shape] * compared[shape][i] for shape in used) / total for i in range(3)))
    by_shape = [compared[shape].value for shape in used]
    how = f"mean FLOPS over {len(used)} of Table 1’s {len(paper)} shapes, as its averages; by shape "
    how += f"{min(by_shape):.1f} to {max(by_shape):.1f}"
    return Measured(mean, True, how, tuple(latencies + ratios))


def show_claims(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the table of claims; without any record of operators or networks, and any study of a claim, nothing."""
    claims = list_claims(sources, machines)
    has_speeds = any(select(sources, kind, suite) for kind in ("latency", "ratio") for suite in SUITES)
    if not has_speeds and not any(claim.machine for claim in claims):
        return []

    def value(claim: Claim, shown: float | None) -> Cell | None:
        return None if shown is None else Cell(_tell(shown, claim.kind), shown)

    def here(claim: Claim, measured: Measured | None) -> Cell | None:
        return value(claim, measured.interval.value) if measured else None

    def interval(claim: Claim, measured: Measured | None) -> Cell | None:
        if measured is None or not measured.records:
            return None
        return Cell(f"{_tell(measured.interval.low, claim.kind)} to {_tell(measured.interval.high, claim.kind)}",
                    measured.interval.low)  # fmt: skip

    def verdict(claim: Claim, measured: Measured | None) -> Cell:
        told = claim.judge(measured)
        words = name_verdict(told) if claim.is_studied else told
        return Cell(tag("span", words, class_=f"verdict {told.replace(' ', '-')}"), VERDICTS.index(told))

    def wrap(text: str, width: str) -> Cell:
        return Cell(tag("span", text, style=WRAPPED + width), text)

    def has_engines(claim: Claim) -> bool:
        return isinstance(RULES[claim.text], Speed)

    eager, best = "In eager PyTorch, as the paper", "In the best library engine of each"
    columns: list[Column[Claim]] = [
        Column("Claim", lambda claim: wrap(claim.text, "min(38vw, 15rem)")),
        Column("on", lambda claim: claim.device),
        Column("v1", lambda claim: value(claim, claim.v1), "", "Paper"),
        Column("corrected", lambda claim: value(claim, claim.corrected), "", "Paper"),
        Column("here", lambda claim: here(claim, claim.eager), "", eager),
        Column("95 % interval", lambda claim: interval(claim, claim.eager), "", eager),
        Column("verdict", lambda claim: verdict(claim, claim.eager), None, eager),
        Column("here", lambda claim: here(claim, claim.best), "", best),
        Column("95 % interval", lambda claim: interval(claim, claim.best), "", best),
        Column("verdict", lambda claim: verdict(claim, claim.best) if has_engines(claim) else None, None, best),
        Column("under", lambda claim: wrap(claim.remark, "16rem")),
        Column(
            "machine", lambda claim: wrap(describe_machine(claim.machine, machines), "8rem") if claim.machine else None
        ),
    ]
    texts = [claim.text for claim in claims]
    breaks = [i for i in range(1, len(texts)) if texts[i].partition(":")[0] != texts[i - 1].partition(":")[0]]
    used = [record for claim in claims for m in (claim.eager, claim.best) if m for record in m.records]
    content = table("claims", columns, claims, breaks=breaks)
    small = provenance(used, machines) if used else None
    return [figure("claims", "Claims of the paper, and whether they hold here", content, *NOTES, small)]


def count_verdicts(claims: Sequence[Claim]) -> dict[Verdict, int]:
    """Return how many claims hold and how many do not, by what was measured in the paper's way."""
    found = [claim.judge(claim.eager) for claim in claims]
    return {verdict: found.count(verdict) for verdict in VERDICTS}


NOTES = (
    "Holds: the interval reaches the paper’s number (the corrected one where there is one) or lies beyond it. Partly: "
    "the direction is certain, the amount is smaller. Does not hold: the direction is not certain, or it is the "
    "opposite one. Not run: no record of such a device, or more than records is needed. Claims that are a mere count "
    "are computed and stand with those of eager PyTorch.",
    "Table 2 and Figure 6 are judged on the networks at hand, by the verdicts of their own figures: what does not hold "
    "for these may hold for those of the paper, trained on ImageNet. Table 2: the order is judged, not the size of the "
    "loss, which depends on the network. Figure 6: the centre’s share of all filters has to be certain to exceed 1/9; "
    "partly, where it is not the most frequent in every stage.",
    "A speed is the rival’s time over that of FasterNet, time saved is 1 − 1/ratio. v1 was measured with an in-place "
    "PConv; here FasterNet computes the trained function, and PConv is timed in its exact form.",
)


def _tell(value: float, kind: str) -> str:
    if kind in ("share", "order"):
        return f"{100 * value:.3g} %"
    return f"{value:.1f}" if kind == "difference" else f"{value:.3g}"
