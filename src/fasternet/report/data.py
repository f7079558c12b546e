"""Data: what ``fasternet data check`` found in a folder of pictures, with thumbnails of it and of every class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fasternet.records import Machine, Record
from fasternet.report.markup import Column, Html, figure, join, table, tag
from fasternet.report.provenance import count, provenance
from fasternet.report.sources import Source, group, select

MAX_OPEN_ROWS = 40


def show_data(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make the tables and the sheets of thumbnails of every folder that was checked."""
    content: list[Html] = []
    for index, source in enumerate(sources, start=1):
        records = select([source], "data_check")
        pictures = [record for record in records if "class" in record.values]
        for place, record in enumerate((r for r in records if "splits" in r.values), start=1):
            own = [p for p in pictures if p.condition.get("data") == record.condition.get("data")]
            content += _show_check(f"data-{index}-{place}", source, record, own, machines)
    return content


def _show_check(
    key: str, source: Source, record: Record, pictures: Sequence[Record], machines: Mapping[str, Machine]
) -> list[Html]:
    values, note = record.values, provenance([record], machines)
    splits: Mapping[str, Mapping[str, int]] = values["splits"]
    names = sorted({name for classes in splits.values() for name in classes})
    columns: list[Column[str]] = [Column("Class", lambda name: name)]
    columns += [Column(split, lambda name, c=classes: c.get(name), ",.0f") for split, classes in splits.items()]  # type: ignore[misc]
    title = f"{record.subject}: {count(values['num_images'], 'picture')} of {values['num_classes']:,} classes"
    ratios = ", ".join(f"{split} {ratio:.3g}" for split, ratio in values["imbalance"].items())
    classes = _fold(table(f"{key}-classes", columns, names), len(names), "classes")
    content = [figure(f"{key}-classes", title, classes, f"The largest class by the smallest: {ratios}.", note)]
    sides: list[Column[tuple[str, int]]] = [
        Column("Shorter side, pixels", lambda row: row[0]),
        Column("pictures", lambda row: row[1], ",.0f"),
    ]
    content.append(figure(f"{key}-sides", "Sizes", table(f"{key}-sides", sides, list(values["sides"].items()))))
    if values["findings"]:
        content.append(_show_findings(f"{key}-findings", values))
    found = [picture for picture in pictures if picture.values.get("findings")]
    if found:
        title = f"{count(len(found), 'picture')} with findings; training would trip over those with an outline"
        content.append(figure(f"{key}-found", title, _sheet(source, found)))
    for name, members in group(pictures, lambda picture: str(picture.values["class"])).items():
        if shown := [picture for picture in members if picture.values.get("is_example")]:
            content.append(figure(f"{key}-class-{names.index(name)}", f"Class {name}", _sheet(source, shown)))
    return content


def _show_findings(key: str, values: Mapping[str, Any]) -> Html:
    kinds = values["kinds"]
    told = "; ".join(f"{name}: {kind['meaning']} ({kind['count']:,})" for name, kind in kinds.items()) + "."
    columns: list[Column[dict[str, Any]]] = [
        Column("Finding", lambda row: row["kind"]),
        Column("detail", lambda row: row["remark"] or None),
        Column("files", lambda row: join(_break(row["paths"])) or None),
    ]
    rows = values["findings"]
    total = sum(kind["count"] for kind in kinds.values())
    some = f"{len(rows):,} of {total:,} findings are listed." if len(rows) < total else None
    listed = _fold(table(key, columns, rows), len(rows), "findings")
    return figure(key, f"Findings: {values['num_errors']:,} that training would trip over", listed, told, some)


def _break(paths: Iterable[str]) -> list[object]:
    return [part for path in paths for part in (tag("code", path), " ")]


def _fold(content: Html, num_rows: int, what: str) -> Html:
    if num_rows <= MAX_OPEN_ROWS:
        return content
    return tag("details", tag("summary", f"All {num_rows} {what}"), content)


def _sheet(source: Source, pictures: Sequence[Record]) -> Html:
    return tag("ul", *(_picture(source, picture) for picture in pictures), class_="pictures")


def _picture(source: Source, record: Record) -> Html:
    told = "; ".join(f"{kind}: {remark}" if remark else kind for kind, remark in record.values.get("findings") or [])
    uri = source.load_picture(path) if (path := record.attachments.get("picture")) else None
    alt = f"{record.subject}: {told}" if told else record.subject
    picture = tag("img", src=uri, alt=alt) if uri else tag("div", "no picture", class_="missing")
    lines = [tag("p", tag("span", record.subject, class_="label")), tag("p", told, class_="truth") if told else None]
    return tag("li", picture, *lines, class_="wrong" if record.values.get("is_error") else None, title=record.subject)
