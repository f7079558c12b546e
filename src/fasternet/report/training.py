"""Training: of every run its curves, its evaluation and its pictures."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from fasternet.records import Machine, Record
from fasternet.report.evaluation import MAX_SURE_CLASSES, show_evaluation
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
    if _read_unreached(source) is not None:
        told.append(tell_epochs(source, select([source], "epoch")))
    return ", ".join([network, *told])


def tell_epochs(source: Source, epochs: Sequence[Record]) -> str:
    """Count the epochs of a run, and of one that has not ended those that it is to have."""
    done, wanted = len(last_epochs(epochs)), _read_unreached(source)
    return count(done, "epoch") if wanted is None else f"{done:,} of {count(wanted, 'epoch')}"


def _read_unreached(source: Source) -> int | None:
    """Return the epochs of a run whose closing evaluation is not there yet, else None."""
    runs = select([source], "run")
    wanted = runs[-1].condition.get("epochs") if runs else None
    return wanted if isinstance(wanted, int) and not select([source], "evaluation", "train") else None


def _show_run(key: str, source: Source, machines: Mapping[str, Machine]) -> list[Html]:
    content: list[Html] = []
    epochs = last_epochs(select([source], "epoch"))
    if epochs or _read_unreached(source) is not None:
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
    panels: list[Html] = []
    runs = select([source], "run")
    classes = number(runs[-1], "num_classes") if runs else None
    is_sure = classes is not None and classes <= MAX_SURE_CLASSES
    for name, title, lines in PANELS:
        told = [line for line in lines if not (is_sure and line[0] == "top5")]
        series = [_series(epochs, value, label, second) for value, label, second in told]
        if len(panels) < MAX_PANELS and (shown := [line for line in series if line.values]):
            ends = ", ".join(f"{line.label} ends at {line.values[-1]:.4g}" for line in shown)
            alt = f"{title} over epochs: {ends}"
            lettered = f"({string.ascii_lowercase[len(panels)]}) {title}"
            plot = draw_curve(shown, key=f"{key}-{name}", title=lettered, alt=alt, from_zero=name in FROM_ZERO)
            marks = (tag("li", line.label, class_="second" if line.second else "first") for line in shown)
            panels.append(tag("div", tag("ul", *marks, class_="legend"), plot, class_="panel"))
    drawn = tag("div", *panels, class_="panels") if panels else None
    content = join([drawn, _recipe(runs[-1]) if runs else None])
    records = epochs or runs
    title = f"Training curve of {records[-1].subject}, {tell_epochs(source, epochs)}"
    return figure(key, title, content, _tell_unfinished(source, epochs), provenance(records, machines))


def _tell_unfinished(source: Source, epochs: Sequence[Record]) -> str | None:
    if _read_unreached(source) is None:
        return None
    told = "It has not ended: there is no evaluation yet. Where it was stopped, the same command with --resume goes on."
    return told if epochs else f"No epoch is done yet. {told}"


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
