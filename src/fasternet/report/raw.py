"""Raw numbers: the records behind a page, with every repetition, inside of the page itself as a record file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence

from fasternet.records import SCHEMA, Record
from fasternet.report.markup import Html, tag
from fasternet.report.provenance import count
from fasternet.report.sources import Source

MAX_BYTES = 8 << 20
DIGITS = 4  # of a repetition, where all digits would be too many
Shorten = Callable[[list[float]], list[float]]
# What is done to the repetitions until the records fit, and how the page tells it.
STEPS: tuple[tuple[Shorten, str], ...] = (
    (list, "with every repetition"),
    (lambda values: [float(f"{value:.{DIGITS}g}") for value in values], f"repetitions rounded to {DIGITS} digits"),
    (lambda _: [], "without the repetitions, which would be too large"),
)


def show_raw(sources: Sequence[Source], *, max_bytes: int = MAX_BYTES) -> list[Html]:
    """Make the block of records that the page carries, and the sentence that says what it holds."""
    records = [record for source in sources for record in source.records]
    told = f"{count(len(records), 'record')} of {count(len({source.path for source in sources}), 'file')}"
    for shorten, how in STEPS:
        text = _dump(records, shorten)
        if len(text) <= max_bytes:
            link = tag("a", "Save them as a record file.", id="download-records", download="records.jsonl")
            block = tag("script", Html(text), type="application/jsonl", id="records")  # the page's script links to it
            return [tag("p", f"The HTML page holds {told}, {how}. ", link), block]
    return [tag("p", f"{told} are too large for the page: they stand in the files that it was made from.")]


def _dump(records: Sequence[Record], shorten: Shorten) -> str:
    lines = []
    for record in records:
        samples = {name: shorten(values) for name, values in record.samples.items()}
        content = {"schema": SCHEMA, **dataclasses.asdict(dataclasses.replace(record, samples=samples))}
        lines.append(json.dumps(content, separators=(",", ":")) + "\n")
    # ASCII without "<" and "&": nothing in it can end the element or read as markup.
    return "".join(lines).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
