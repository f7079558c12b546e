"""Detection runs: AP of boxes and masks, class by class, and the pictures with what was found on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fasternet.records import Machine, Record
from fasternet.report.compare import scaled
from fasternet.report.markup import Cell, Column, Html, figure, join, table, tag
from fasternet.report.provenance import count, describe_condition, number, provenance
from fasternet.report.sources import Source, group, newest, select

KINDS = {"mask": "masks", "box": "boxes"}  # what AP is of, the one that matters more first
FIGURES = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP, small objects",
    "ap_medium": "AP, medium objects",
    "ap_large": "AP, large objects",
}
DETECTORS = {"mask_rcnn": "Mask R-CNN", "faster_rcnn": "Faster R-CNN"}
SPLITS = ("validation", "training")
MAX_OPEN_CLASSES = 20
MIN_PICTURES = 100  # fewer give rough figures
EXPLAINED = (
    "AP is COCO’s average precision, from 0 to 1: the mean over overlaps of 0.50 to 0.95, where AP50 and AP75 ask for "
    "one. Small objects have less than 32² pixels of the picture as it came, large ones more than 96². A dash: there "
    "is no such object."
)


class _Finished(NamedTuple):
    """A run, and its best checkpoint on the validation pictures."""

    name: str
    run: Record
    judged: Record


def is_detection(record: Record) -> bool:
    """Return whether an evaluation is of a detector."""
    return "box_ap" in record.values


def find_evaluation(source: Source) -> Record | None:
    """Return the latest evaluation of a detector on validation pictures, where there is one."""
    found = [record for record in select([source], "evaluation") if is_detection(record)]
    judged = [record for record in found if record.values.get("split") in (None, "validation")]
    return judged[-1] if judged else None


def read_ap(record: Record) -> list[tuple[str, float]]:
    """Return the APs that a record holds, by name, the one that matters more first: ``("mask AP", 0.67)``."""
    values = ((f"{kind} AP", number(record, f"{kind}_ap")) for kind in KINDS)
    return [(name, value) for name, value in values if value is not None]


def tell_pictures(record: Record) -> str | None:
    """Say on how many pictures of which part an evaluation rests."""
    pictures, split = number(record, "num_images"), record.values.get("split")
    return None if pictures is None else count(int(pictures), f"{split} picture" if split else "picture")


def show_objects(key: str, source: Source, machines: Mapping[str, Machine]) -> list[Html]:
    """Make the figures of a run's evaluations, training beside validation, and the sheet of its drawings."""
    found = [record for record in select([source], "evaluation") if is_detection(record)]
    evaluations = group(found, lambda record: (record.subject, describe_condition(record.condition)))
    content = [
        _show_evaluation(f"objects-{key}-{place}", records, machines)
        for place, records in enumerate(evaluations.values(), start=1)
    ]
    drawn = [record for record in select([source], "prediction") if "num_detections" in record.values]
    if drawn:
        latest = newest(drawn, lambda record: record.attachments.get("picture") or record.subject)
        content.append(_show_drawings(f"drawings-{key}", source, list(latest.values()), machines))
    return content


def show_detectors(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the table of all finished detection runs; of one run, nothing."""
    rows = list(_list_finished(sources))
    if len(rows) < 2:
        return []

    def ap(name: str) -> Callable[[_Finished], float | None]:
        return lambda row: number(row.judged, name)

    columns: list[Column[_Finished]] = [
        Column("Backbone", lambda row: row.run.subject),
        Column("detector", lambda row: DETECTORS.get(str(row.run.condition.get("kind")))),
        Column("run", lambda row: row.name),
        Column("data", lambda row: row.run.condition.get("data")),
        Column("pictures", lambda row: number(row.judged, "num_images"), ",.0f"),
        Column("epochs", lambda row: row.run.condition.get("epochs"), ",.0f"),
        Column("seed", lambda row: row.run.condition.get("seed"), ".0f"),
    ]
    columns += [
        Column(FIGURES[name], ap(f"{kind}_{name}"), ".3f", title.capitalize())
        for kind, title in KINDS.items()
        for name in ("ap", "ap50")
    ]
    columns.append(Column("parameters, M", lambda row: scaled(row.run, "num_params", 1e6), ".2f"))
    note = "A row is a run. AP is that of its best checkpoint on the validation pictures, which chose it."
    content, small = table("detectors", columns, rows), provenance([row.judged for row in rows], machines)
    return [figure("detectors", "Detectors that were trained", content, note, small)]


def list_unlike(sources: Sequence[Source]) -> list[Source]:
    """Return each run once: it may come from its folder and from a file that it was merged into."""
    found: dict[tuple[str, ...], Source] = {}
    for source in sources:
        found.setdefault(_identify(source), source)
    return list(found.values())


def _identify(source: Source) -> tuple[str, ...]:
    record = [*source.records, *select([source], "run")][-1]
    return record.machine, record.subject, record.command, record.created


def _list_finished(sources: Sequence[Source]) -> Iterator[_Finished]:
    for source in list_unlike(sources):
        runs, judged = select([source], "run"), find_evaluation(source)
        if runs and judged:
            yield _Finished(source.name, runs[-1], judged)


def _show_evaluation(key: str, records: Sequence[Record], machines: Mapping[str, Machine]) -> Html:
    latest = newest(records, lambda record: str(record.values.get("split")))
    splits = [latest[split] for split in dict.fromkeys([*SPLITS, *latest]) if split in latest]
    first = splits[0]
    aps = [f"{name} {value:.3f}" for name, value in read_ap(first)]
    on = tell_pictures(first)
    title = f"Evaluation of {first.subject}: {', '.join(aps) or 'no AP'}{f' on {on}' if on else ''}"
    columns: list[Column[str]] = [Column("Measure", lambda name: FIGURES[name])]
    columns += [
        Column(KINDS[kind], _figure_cell(record, kind), ".3f", _name_split(record))
        for record in splits
        for kind in _list_kinds(record)
    ]
    content = _arrange(table(key, columns, list(FIGURES)), key, splits)
    few = [
        on for record in splits if (number(record, "num_images") or 0) < MIN_PICTURES and (on := tell_pictures(record))
    ]
    rough = f" On {' and '.join(few)} the figures are rough: a single object moves them." if few else ""
    chosen = " The validation pictures chose the checkpoint." if first.suite == "train" else ""
    return figure(key, title, content, EXPLAINED + chosen + rough, provenance(splits, machines))


def _list_kinds(record: Record) -> list[str]:
    """Return what an evaluation judged, even where no AP came of it; boxes first, which every detector has."""
    return [kind for kind in ("box", "mask") if f"{kind}_ap" in record.values]


def _name_split(record: Record) -> str:
    return (tell_pictures(record) or str(record.values.get("split") or "pictures")).capitalize()


def _figure_cell(record: Record, kind: str) -> Callable[[str], object]:
    return lambda name: _or_dash(number(record, f"{kind}_{name}"))


def _or_dash(value: object) -> object:
    """Keep the column of a value that is missing: that there is none is what it tells."""
    return Cell(None) if value is None else value


def _arrange(figures: Html, key: str, splits: Sequence[Record]) -> Html:
    """Put the table of the classes, in the order of the data, beside the figures, or many of them folded below."""
    found = [{str(row.get("class_name")): row for row in _list_classes(record)} for record in splits]
    names = list(dict.fromkeys(name for classes in found for name in classes))
    if not names:
        return figures

    def cell(classes: Mapping[str, Mapping[str, Any]], name: str) -> Callable[[str], object]:
        return lambda class_name: _or_dash(classes.get(class_name, {}).get(name))

    columns: list[Column[str]] = [Column("Class", lambda name: name)]
    for record, classes in zip(splits, found, strict=True):
        split = _name_split(record)
        columns.append(Column("objects", cell(classes, "num_objects"), ",.0f", split))
        columns += [Column(f"{kind} AP", cell(classes, f"{kind}_ap"), ".3f", split) for kind in _list_kinds(record)]
    content = table(key, columns, names)
    if len(names) > MAX_OPEN_CLASSES:
        return join([figures, tag("details", tag("summary", f"All {len(names)} classes"), content)])
    return tag("div", tag("div", figures, class_="panel"), tag("div", content, class_="panel"), class_="panels")


def _list_classes(record: Record) -> list[Mapping[str, Any]]:
    rows = record.values.get("per_class")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _show_drawings(key: str, source: Source, records: Sequence[Record], machines: Mapping[str, Machine]) -> Html:
    found, there = (sum(int(number(r, name) or 0) for r in records) for name in ("num_detections", "num_objects"))
    title = f"What was found on {count(len(records), 'picture')}: {count(found, 'detection')}, {there:,} annotated"
    note = (
        "Validation pictures, drawn by lot, as the best checkpoint sees them. Found are all detections with a score of "
        f"at least {records[0].condition.get('score_threshold')}, right or wrong; annotated is what people marked."
    )
    sheet = tag("ul", *(_drawing(source, record) for record in records), class_="pictures drawings")
    return figure(key, title, sheet, note, provenance(records, machines))


def _drawing(source: Source, record: Record) -> Html:
    found, there = (number(record, name) for name in ("num_detections", "num_objects"))
    uri = source.load_picture(path) if (path := record.attachments.get("picture")) else None
    told = f"{found:,.0f} found at score {record.condition.get('score_threshold')}" if found is not None else "–"
    marked = f"{there:,.0f} annotated" if there is not None else None
    alt = ", ".join(filter(None, (f"{record.subject}: {told}", marked)))
    picture = tag("img", src=uri, alt=alt) if uri else tag("div", "no picture", class_="missing")
    line = tag("p", tag("span", told, class_="label"), " ", tag("span", marked, class_="share") if marked else None)
    return tag("li", picture, line, title=record.subject)
