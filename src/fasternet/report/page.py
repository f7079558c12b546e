"""One self-contained page from records, and its twin in Markdown; whoever reads them loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template

from fasternet.records import Machine
from fasternet.report.ablation import show_ablation
from fasternet.report.appendix import show_costs, show_differences, show_environment, show_notes
from fasternet.report.architecture import show_figure4
from fasternet.report.claims import show_claims
from fasternet.report.data import show_data
from fasternet.report.detection import show_table4
from fasternet.report.engines import show_engines
from fasternet.report.faults import show_faults
from fasternet.report.figures import show_figure1, show_figure2, show_figure7, show_figure8
from fasternet.report.learning import show_learning
from fasternet.report.markdown import to_markdown
from fasternet.report.markup import Html, join, tag
from fasternet.report.networks import show_networks
from fasternet.report.objects import show_detectors
from fasternet.report.operators import show_operators, show_table9_operators
from fasternet.report.provenance import describe_dates, describe_machine, unique
from fasternet.report.ratios import show_ratios
from fasternet.report.raw import show_raw
from fasternet.report.redundancy import show_redundancy
from fasternet.report.roofline import show_rooflines
from fasternet.report.salience import show_receptive_field, show_salience
from fasternet.report.slower import show_slower
from fasternet.report.sources import Source, find_machines, load_sources
from fasternet.report.speed import show_steps, show_training_speed
from fasternet.report.summary import show_summary
from fasternet.report.surgery import show_surgery
from fasternet.report.sweeps import show_sweeps
from fasternet.report.table2 import show_approximation
from fasternet.report.table5 import show_table5
from fasternet.report.table8 import show_table8
from fasternet.report.table9 import show_table9_networks
from fasternet.report.training import show_training

Machines = Mapping[str, Machine]
Show = Callable[[Sequence[Source], Machines], list[Html]]


def show_variants(sources: Sequence[Source], machines: Machines) -> list[Html]:
    """Make Tables 8 and 5, where there are records for them, with the architecture that they are about."""
    sizes, ablation = show_table8(sources, machines), show_table5(sources, machines)
    return [*sizes, *show_figure4(sources, machines), *ablation] if sizes or ablation else []


# The whole page, section by section; a section without records is left out.
SECTIONS: dict[str, tuple[Show, ...]] = {
    "Summary": (show_summary,),
    "Claims": (show_claims,),
    "Where FasterNet is not the fastest": (show_slower,),
    "Networks": (show_figure2, show_networks, show_figure7, show_figure8, show_sweeps),
    "The CPU engine": (show_engines,),
    "Detection": (show_table4,),
    "Variants": (show_variants,),
    "Operators": (show_figure1, show_operators, show_rooflines),
    "Forms of PConv": (show_table9_operators, show_table9_networks),
    "Studies": (show_approximation, show_redundancy, show_receptive_field, show_salience, show_ablation),
    "Surgery": (show_surgery,),
    "Training speed": (show_training_speed, show_steps),
    "Ratios": (show_ratios,),
    "Learning": (show_learning, show_detectors),
    "Training": (show_training,),
    "Data": (show_data,),
    "Faults": (show_faults,),
    "Exactness": (show_differences,),
    "Costs": (show_costs,),
}
# What can be shown alone, most of it by the name that it has in the paper.
ITEMS: dict[str, tuple[Show, ...]] = {
    "table1": (show_operators,),
    "table2": (show_approximation,),
    "table3": (show_networks,),
    "table4": (show_table4,),
    "table5": (show_table5, show_ablation),
    "table8": (show_table8,),
    "table9": (show_table9_operators, show_table9_networks),
    "fig1": (show_figure1,),
    "fig2": (show_figure2,),
    "fig3": (show_redundancy,),
    "fig4": (show_figure4,),
    "fig5": (show_receptive_field,),
    "fig6": (show_salience,),
    "fig7": (show_figure7,),
    "fig8": (show_figure8,),
    "claims": (show_claims, show_slower),
    "engines": (show_engines,),
    "sweeps": (show_sweeps,),
    "ablation": (show_ablation,),
    "surgery": (show_surgery,),
}


def create_report(sources: Sequence[Path], output: Path, *, items: Sequence[str] | None = None) -> Path:
    """Write one page with all that records tell, the paper's numbers beside the measured ones, and its Markdown twin.

    Both depend on the records alone: the same sources give the same bytes.

    Args:
        sources: Record files (``*.jsonl``), run folders, or folders of either.
        output: The page, named ``*.html``; the twin lies beside it as ``*.md``. Older ones are replaced.
        items: Names of ``ITEMS``: those alone are shown.

    Returns:
        ``output``.

    Raises:
        FileNotFoundError: A source does not exist.
        ValueError: There is no source, a source holds no records, an item is not known or has no records, or output is
            a folder or no ``.html``.
        ModuleNotFoundError: There is something to draw and matplotlib is not installed.
    """
    if output.is_dir():
        raise ValueError(f"output {output} is a folder: name a file, for example {output / 'report.html'}")
    if output.suffix != ".html":
        raise ValueError(f"output {output} must be named *.html")
    page, twin = render_page(load_sources(sources), items=items)
    output.parent.mkdir(parents=True, exist_ok=True)
    _replace(output.with_suffix(".md"), twin)
    _replace(output, page)
    return output


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # a file name need not be UTF-8
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def render_item(name: str, sources: Sequence[Path]) -> str:
    """Return one of ``ITEMS`` as Markdown.

    Args:
        name: Which one.
        sources: As for ``create_report``; Figure 4 takes none.

    Raises:
        FileNotFoundError: A source does not exist.
        ValueError: The item is not known, or nothing was measured of it.
    """
    found = load_sources(sources) if sources else []
    return to_markdown(join(_show_item(name, found, find_machines(found))))


def _show_item(name: str, sources: Sequence[Source], machines: Machines) -> list[Html]:
    if name not in ITEMS:
        raise ValueError(f"item {name!r} is not one of {', '.join(ITEMS)}")
    if not (content := [html for show in ITEMS[name] for html in show(sources, machines)]):
        paths = ", ".join(unique(str(source.path) for source in sources))
        raise ValueError(f"nothing was measured of {name}: no record of it in {paths or 'no source'}")
    return content


def render_page(sources: Sequence[Source], *, items: Sequence[str] | None = None) -> tuple[str, str]:
    """Return the page and its twin as text."""
    machines = find_machines(sources)
    sections = _list_sections(sources, machines, items)
    records = [record for source in sources for record in source.records]
    where = "; ".join(unique(describe_machine(record.machine, machines) for record in records))
    subtitle = f"{describe_dates(records)}, {where}"
    anchors = {title: f"section-{title.lower().replace(' ', '-')}" for title in sections}
    body = [tag("section", tag("h2", title), *content, id=anchors[title]) for title, content in sections.items()]
    links = [tag("a", title, href=f"#{anchors[title]}") for title in sections]
    templates = resources.files(__package__) / "templates"
    style, script, page = (
        templates.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "sort.js", "page.html")
    )
    text = Template(page).substitute(
        title="FasterNet report",
        subtitle=join([subtitle]),
        contents=join(links),
        body="\n".join(body),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    head = [tag("h1", "FasterNet report"), tag("p", subtitle)]
    return text, to_markdown(join([*head, *body]))


def _list_sections(sources: Sequence[Source], machines: Machines, items: Sequence[str] | None) -> dict[str, list[Html]]:
    """Return what the page shows, by title: all that there are records for, or the items, and what explains them."""
    if items is None:
        sections = {
            title: [html for show in shows for html in show(sources, machines)] for title, shows in SECTIONS.items()
        }
    else:
        sections = {_name_item(name): _show_item(name, sources, machines) for name in items}
    sections["Environment"] = show_environment(sources, machines)
    sections["Records"] = show_raw(sources)
    sections["Notes"] = show_notes()
    return {title: content for title, content in sections.items() if content}


def _name_item(name: str) -> str:
    """Return the title of an item: Table 3, Figure 2."""
    return name.replace("table", "Table ").replace("fig", "Figure ").capitalize()
