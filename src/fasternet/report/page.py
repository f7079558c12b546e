"""One self-contained page from records; whoever reads it loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

from fasternet.report.appendix import show_costs, show_differences, show_environment, show_notes
from fasternet.report.data import show_data
from fasternet.report.faults import show_faults
from fasternet.report.learning import show_learning
from fasternet.report.markup import Html, join, tag
from fasternet.report.networks import show_networks
from fasternet.report.operators import show_operators
from fasternet.report.provenance import describe_dates, describe_machine, unique
from fasternet.report.ratios import show_ratios
from fasternet.report.sources import Source, find_machines, load_sources
from fasternet.report.speed import show_training_speed
from fasternet.report.summary import show_summary
from fasternet.report.training import show_training


def create_report(sources: Sequence[Path], output: Path) -> Path:
    """Write one page with all that records tell, the paper's numbers beside the measured ones.

    The page depends on the records alone: the same sources give the same bytes.

    Args:
        sources: Record files (``*.jsonl``), run folders, or folders of either.
        output: The page, named ``*.html``; an older one is replaced.

    Returns:
        ``output``.

    Raises:
        FileNotFoundError: A source does not exist.
        ValueError: There is no source, a source holds no records, or output is a folder or no ``.html``.
        ModuleNotFoundError: There is something to draw and matplotlib is not installed.
    """
    if output.is_dir():
        raise ValueError(f"output {output} is a folder: name a file, for example {output / 'report.html'}")
    if output.suffix != ".html":
        raise ValueError(f"output {output} must be named *.html")
    text = render_page(load_sources(sources))
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    return output


def render_page(sources: Sequence[Source]) -> str:
    """Return the page as text."""
    machines = find_machines(sources)
    sections: dict[str, list[Html]] = {
        "Summary": show_summary(sources),
        "Networks": show_networks(sources, machines),
        "Operators": show_operators(sources, machines),
        "Training speed": show_training_speed(sources, machines),
        "Ratios": show_ratios(sources, machines),
        "Learning": show_learning(sources, machines),
        "Training": show_training(sources, machines),
        "Data": show_data(sources, machines),
        "Faults": show_faults(sources, machines),
        "Exactness": show_differences(sources, machines),
        "Costs": show_costs(sources, machines),
        "Environment": show_environment(sources, machines),
        "Notes": show_notes(),
    }
    filled = {title: content for title, content in sections.items() if content}
    records = [record for source in sources for record in source.records]
    where = "; ".join(unique(describe_machine(record.machine, machines) for record in records))
    anchors = {title: f"section-{title.lower().replace(' ', '-')}" for title in filled}
    body = [tag("section", tag("h2", title), *content, id=anchors[title]) for title, content in filled.items()]
    links = [tag("a", title, href=f"#{anchors[title]}") for title in filled]
    templates = resources.files(__package__) / "templates"
    style, script, page = (
        templates.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "sort.js", "page.html")
    )
    return Template(page).substitute(
        title="FasterNet report",
        subtitle=join([f"{describe_dates(records)}, {where}"]),
        contents=join(links),
        body="\n".join(body),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
