"""Training: the curve of every run, its evaluation class by class, and a sheet of predicted pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fasternet.records import Machine, Record
from fasternet.report.markup import Column, Html, figure, join, table, tag
from fasternet.report.plots import Series, draw_curve
from fasternet.report.provenance import count, describe_condition, number, provenance
from fasternet.report.sources import Source, newest, select

MAX_PICTURES = 60
MAX_OPEN_CLASSES = 20
# Of each panel: its title, and for each line the value, the name and whether it is drawn as the second.
PANELS = (
    ("loss", "(a) Loss", (("train_loss", "training", False), ("validation_loss", "validation", True))),
    ("accuracy", "(b) Accuracy, %", (("top1", "top-1", False), ("top5", "top-5", True))),
)


def show_training(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the curve, the evaluation and the pictures of every run, a run being one record file."""
    content: list[Html] = []
    for index, source in enumerate(sources, start=1):
        if epochs := select([source], "epoch"):
            content.append(_curve(f"training-{index}", source, epochs, machines))
        evaluations = newest(select([source], "evaluation"), lambda r: (r.subject, describe_condition(r.condition)))
        content += [
            _evaluation(f"evaluation-{index}-{place}", record, machines)
            for place, record in enumerate(evaluations.values(), start=1)
        ]
        if predictions := select([source], "prediction"):
            content.append(_pictures(f"pictures-{index}", source, predictions, machines))
    return content


def last_epochs(records: Sequence[Record]) -> list[Record]:
    """Return the last record of every epoch, in order: a resumed run may have repeated one."""
    return [record for _, record in sorted({_epoch(record): record for record in records}.items())]


def _epoch(record: Record) -> int:
    epoch = record.condition.get("epoch")
    return epoch if isinstance(epoch, int) else 0


def _curve(key: str, source: Source, epochs: Sequence[Record], machines: Mapping[str, Machine]) -> Html:
    epochs = last_epochs(epochs)
    panels = []
    for name, title, lines in PANELS:
        series = [_series(epochs, value, label, second) for value, label, second in lines]
        if shown := [line for line in series if line.values]:
            ends = ", ".join(f"{line.label} ends at {line.values[-1]:.4g}" for line in shown)
            plot = draw_curve(shown, key=f"{key}-{name}", title=title, alt=f"{title[4:]} over epochs: {ends}")
            marks = (tag("li", line.label, class_="second" if line.second else "first") for line in shown)
            panels.append(tag("div", tag("ul", *marks, class_="legend"), plot, class_="panel"))
    runs = select([source], "run")
    content = join([tag("div", *panels, class_="panels"), _recipe(runs[-1]) if runs else None])
    title = f"Training curve of {epochs[-1].subject}, {count(len(epochs), 'epoch')}"
    return figure(key, title, content, provenance(epochs, machines))


def _series(epochs: Sequence[Record], value: str, label: str, second: bool) -> Series:
    points = [(_epoch(record), number(record, value)) for record in epochs]
    kept = [(float(epoch), y) for epoch, y in points if y is not None]
    return Series(label, tuple(x for x, _ in kept), tuple(y for _, y in kept), second)


def _recipe(run: Record) -> Html:
    facts = {**run.condition, **run.values}
    terms = [tag("div", tag("dt", name.replace("_", " ")), tag("dd", _plain(value))) for name, value in facts.items()]
    return tag("details", tag("summary", "Recipe and data"), tag("dl", *terms, class_="recipe"))


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else f"{value:,}" if isinstance(value, int) and value > 9999 else str(value)


def _evaluation(key: str, record: Record, machines: Mapping[str, Machine]) -> Html:
    top1, top5, loss, pictures = (number(record, name) for name in ("top1", "top5", "loss", "num_images"))
    figures = (("top-1", top1, ".2f", " %"), ("top-5", top5, ".2f", " %"), ("loss", loss, ".4f", ""))
    told = ", ".join(f"{name} {value:{form}}{unit}" for name, value, form, unit in figures if value is not None)
    title = f"Evaluation of {record.subject}: {told}" + (f", {pictures:,} pictures" if pictures is not None else "")
    classes = [c for c in record.values.get("per_class") or [] if isinstance(c, dict)]
    columns: list[Column[dict[str, Any]]] = [
        Column("Class", lambda row: row.get("name")),
        Column("pictures", lambda row: row.get("num_images"), ",.0f"),
        Column("top-1, %", lambda row: row.get("top1"), ".1f"),
    ]
    content = table(key, columns, classes) if classes else None
    if len(classes) > MAX_OPEN_CLASSES:
        content = tag("details", tag("summary", f"All {len(classes)} classes"), content)
    return figure(key, title, content, provenance([record], machines))


def _pictures(key: str, source: Source, predictions: Sequence[Record], machines: Mapping[str, Machine]) -> Html:
    latest = list(newest(predictions, lambda record: record.subject).values())
    wrong = [record for record in latest if _is_wrong(record)]
    shown = sorted(latest, key=lambda record: not _is_wrong(record))[:MAX_PICTURES]
    judged = sum(record.values.get("truth") is not None for record in latest)
    title = f"Predicted pictures: {len(wrong)} of {judged} wrong" if judged else f"{len(latest)} predicted pictures"
    some = f"{len(shown)} of {len(latest)} are shown, the wrong ones first. " if len(shown) < len(latest) else None
    legend = "Under each picture stands the predicted label with its probability; where it is wrong, the truth below."
    sheet = tag("ul", *(_picture(source, record) for record in shown), class_="pictures")
    return figure(key, title, sheet, join([some, legend]), provenance(shown, machines))


def _is_wrong(record: Record) -> bool:
    truth = record.values.get("truth")
    return truth is not None and truth != record.values.get("label")


def _picture(source: Source, record: Record) -> Html:
    label, truth, wrong = record.values.get("label"), record.values.get("truth"), _is_wrong(record)
    probability = number(record, "probability")
    share = None if probability is None else tag("span", f"{100 * probability:.0f} %", class_="share")
    uri = source.load_picture(path) if (path := record.attachments.get("picture")) else None
    verdict = f"predicted {label}, but it is {truth}" if wrong else f"predicted {label}"
    missing = tag("div", "no picture", class_="missing")
    picture = tag("img", src=uri, alt=f"{record.subject}: {verdict}") if uri else missing
    name = tag("span", "✗ " if wrong else None, label, class_="label")
    lines = [tag("p", name, " ", share), tag("p", f"truth: {truth}", class_="truth") if wrong else None]
    return tag("li", picture, *lines, class_="wrong" if wrong else None, title=record.subject)
