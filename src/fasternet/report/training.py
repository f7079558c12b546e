"""Training: of every run its curves, its evaluation and its pictures."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from fasternet.records import Machine, Record
from fasternet.report.evaluation import show_evaluation
from fasternet.report.markup import Html, figure, join, tag
from fasternet.report.objects import find_evaluation, is_detection, read_ap, show_objects
from fasternet.report.pictures import show_pictures
from fasternet.report.plots import Series, draw_curve
from fasternet.report.provenance import count, describe_condition, number, provenance
from fasternet.report.sources import Source, newest, select

MAX_OPEN_RUNS = 2
# Of each panel: its title, and for each line the value, the name and whether it is drawn as the second. Those without
# any value are left out; the first of the others are lettered and shown.
PANELS = (
    ("loss", "Loss", (("train_loss", "training", False), ("validation_loss", "validation", True))),
    ("accuracy", "Accuracy, %", (("top1", "top-1", False), ("top5", "top-5", True))),
    ("boxes", "AP of boxes", (("box_ap", "AP", False), ("box_ap50", "AP50", True))),
    ("masks", "AP of masks", (("mask_ap", "AP", False), ("mask_ap50", "AP50", True))),
    ("rate", "Learning rate", (("lr", "at the end of the epoch", False),)),
    ("speed", "Images/s", (("images_per_second", "training", False),)),
)
FROM_ZERO = ("boxes", "masks", "speed")
MAX_PANELS = 4  # fill the two columns of a wide page


def show_training(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the curves, the evaluation and the pictures of every run; many runs are folded."""
    shown = [(source, _show_run(str(index), source, machines)) for index, source in enumerate(sources, start=1)]
    runs = [(source, content) for source, content in shown if content]
    if len(runs) == 1:
        return runs[0][1]
    opened = "" if len(runs) <= MAX_OPEN_RUNS else None
    return [
        tag("details", tag("summary", describe_run(source)), *content, class_="run", open=opened)
        for source, content in runs
    ]


def describe_run(source: Source) -> str:
    """Name a run, its network and what it reached."""
    top1 = [value for r in select([source], "evaluation") if (value := number(r, "top1")) is not None]
    network = f"{source.name}: {select([source], 'run')[0].subject}" if select([source], "run") else source.name
    aps = read_ap(judged) if (judged := find_evaluation(source)) else []
    told = [f"top-1 {top1[-1]:.2f} %"] if top1 else [f"{name} {value:.3f}" for name, value in aps]
    return ", ".join([network, *told])


def _show_run(key: str, source: Source, machines: Mapping[str, Machine]) -> list[Html]:
    content: list[Html] = []
    if epochs := select([source], "epoch"):
        content.append(_curve(f"training-{key}", source, epochs, machines))
    classified = [record for record in select([source], "evaluation") if not is_detection(record)]
    evaluations = newest(classified, lambda r: (r.subject, describe_condition(r.condition)))
    content += [
        show_evaluation(f"evaluation-{key}-{place}", f"Evaluation of {record.subject}", record, machines)
        for place, record in enumerate(evaluations.values(), start=1)
    ]
    return [*content, *show_objects(key, source, machines), *show_pictures(key, source, machines)]


def last_epochs(records: Sequence[Record]) -> list[Record]:
    """Return the last record of every epoch, in order: a resumed run may have repeated one."""
    return [record for _, record in sorted({_epoch(record): record for record in records}.items())]


def _epoch(record: Record) -> int:
    epoch = record.condition.get("epoch")
    return epoch if isinstance(epoch, int) else 0


def _curve(key: str, source: Source, epochs: Sequence[Record], machines: Mapping[str, Machine]) -> Html:
    epochs = last_epochs(epochs)
    panels: list[Html] = []
    for name, title, lines in PANELS:
        series = [_series(epochs, value, label, second) for value, label, second in lines]
        if len(panels) < MAX_PANELS and (shown := [line for line in series if line.values]):
            ends = ", ".join(f"{line.label} ends at {line.values[-1]:.4g}" for line in shown)
            alt = f"{title} over epochs: {ends}"
            lettered = f"({string.ascii_lowercase[len(panels)]}) {title}"
            plot = draw_curve(shown, key=f"{key}-{name}", title=lettered, alt=alt, from_zero=name in FROM_ZERO)
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
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else f"{value:,}" if isinstance(value, int) and value > 9999 else str(value)
