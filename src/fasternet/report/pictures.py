"""Pictures with what was predicted for them: the worst mistakes, and some drawn by lot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fasternet.records import Machine, Record
from fasternet.report.markup import Html, figure, join, tag
from fasternet.report.provenance import number, provenance
from fasternet.report.sources import Source, newest, select

MAX_PICTURES = 60


def show_pictures(key: str, source: Source, machines: Mapping[str, Machine]) -> list[Html]:
    """Make the sheets of pictures that a run predicted."""
    found = select([source], "prediction")
    predictions = [record for record in found if "num_detections" not in record.values]  # those are drawings
    mistakes = [record for record in predictions if record.values.get("role") == "mistake"]
    others = [record for record in predictions if record.values.get("role") != "mistake"]
    content = []
    if mistakes:
        content.append(_mistakes(f"mistakes-{key}", source, mistakes, machines))
    if others:
        content.append(_lot(f"pictures-{key}", source, others, machines))
    return content


def _mistakes(key: str, source: Source, records: Sequence[Record], machines: Mapping[str, Machine]) -> Html:
    latest = newest(records, lambda record: record.subject).values()
    shown = sorted(latest, key=lambda record: -(number(record, "loss") or 0))[:MAX_PICTURES]
    title = f"The worst mistakes: {len(shown)} wrong predictions"
    legend = "Of all validation pictures, these have the highest loss. Under each stands the predicted label with its "
    legend += "probability, and below the truth with the probability that it was given."
    return figure(key, title, _sheet(source, shown), legend, provenance(shown, machines))


def _lot(key: str, source: Source, records: Sequence[Record], machines: Mapping[str, Machine]) -> Html:
    latest = list(newest(records, lambda record: record.subject).values())
    wrong = [record for record in latest if _is_wrong(record)]
    shown = sorted(latest, key=lambda record: not _is_wrong(record))[:MAX_PICTURES]
    judged = sum(record.values.get("truth") is not None for record in latest)
    title = f"Predicted pictures: {len(wrong)} of {judged} wrong" if judged else f"{len(latest)} predicted pictures"
    some = f"{len(shown)} of {len(latest)} are shown, the wrong ones first. " if len(shown) < len(latest) else None
    drawn = "Drawn by lot. " if any(record.values.get("role") == "lot" for record in shown) else None
    legend = "Under each picture stands the predicted label with its probability; where it is wrong, the truth below."
    return figure(key, title, _sheet(source, shown), join([drawn, some, legend]), provenance(shown, machines))


def _sheet(source: Source, records: Sequence[Record]) -> Html:
    return tag("ul", *(_picture(source, record) for record in records), class_="pictures")


def _is_wrong(record: Record) -> bool:
    truth = record.values.get("truth")
    return truth is not None and truth != record.values.get("label")


def _picture(source: Source, record: Record) -> Html:
    label, truth, wrong = record.values.get("label"), record.values.get("truth"), _is_wrong(record)
    probability, loss = number(record, "probability"), number(record, "loss")
    uri = source.load_picture(path) if (path := record.attachments.get("picture")) else None
    verdict = f"predicted {label}, but it is {truth}" if wrong else f"predicted {label}"
    missing = tag("div", "no picture", class_="missing")
    picture = tag("img", src=uri, alt=f"{record.subject}: {verdict}") if uri else missing
    name = tag("span", "✗ " if wrong else None, label, class_="label")
    lines = [tag("p", name, " ", _share(probability))]
    if wrong:  # the loss is that of the truth alone
        rest = _share(None if loss is None else math.exp(-loss))
        lines.append(tag("p", tag("span", f"truth: {truth}"), " ", rest, class_="truth"))
    return tag("li", picture, *lines, class_="wrong" if wrong else None, title=record.subject)


def _share(probability: float | None) -> Html | None:
    if probability is None:
        return None
    percent = 100 * probability
    return tag("span", f"{percent:.0f} %" if percent >= 0.5 or not percent else "< 0.5 %", class_="share")
