"""Figure 4: the architecture of FasterNet, drawn from Table 8; boxes of the page that wrap where it is narrow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fasternet.paper import load_table
from fasternet.records import Machine
from fasternet.report.markup import Column, Html, figure, join, table, tag
from fasternet.report.sources import Source

KEY = "figure-4"
STRIDES = (4, 8, 16, 32)  # of the four stages, relative to the input
HEAD_WIDTH = 1280  # Table 8, the Conv 1x1 of the head
SYMBOL = "c₁", "c₂", "c₃", "c₄"
BLOCKS = "b₁", "b₂", "b₃", "b₄"


def show_figure4(sources: Sequence[Source], machines: Mapping[str, Machine]) -> list[Html]:
    """Make Figure 4; it needs no records, and takes them only to have the face of the others."""
    del sources, machines
    body = join([_draw_network(), _draw_block(), _list_variants()])
    note = "From Table 8. Cp = c / 4: the partial ratio r is 1/4. Sizes for a picture of h × w, as C × H × W."
    return [figure(KEY, "Figure 4. The architecture of FasterNet", body, note)]


def _draw_network() -> Html:
    steps = [_box("Picture", "3 × h × w")]
    for stage, stride in enumerate(STRIDES):
        before = ("Embedding", "Conv 4×4, stride 4, BN") if stage == 0 else ("Merging", "Conv 2×2, stride 2, BN")
        steps.append(_box(*before))
        shape = f"{SYMBOL[stage]} × h/{stride} × w/{stride}"
        steps.append(_box(f"Stage {stage + 1}", f"{BLOCKS[stage]} FasterNet blocks", shape, kind="stage"))
    steps.append(_box("Head", "Global pool", f"Conv 1×1, {HEAD_WIDTH}", "FC 1000"))
    return tag("ol", *steps, class_="flow", aria_label="Layers from the picture to the classes")


def _draw_block() -> Html:
    channels = Html(
        '<svg viewBox="0 0 96 26" role="img" aria-label="A quarter of the channels is convolved, the others pass">'
        '<rect class="on" x="1" y="1" width="22" height="24"/>'
        + "".join(f'<rect x="{1 + 24 * place}" y="1" width="22" height="24"/>' for place in range(1, 4))
        + "</svg>"
    )
    steps = [
        _box("Input", "c × H × W"),
        _box("PConv 3×3", channels, "the first c/4 channels; the others pass", kind="stage"),
        _box("Conv 1×1", "c → 2c", "BN, activation"),
        _box("Conv 1×1", "2c → c"),
        _box("+", "shortcut from the input", "c × H × W"),
    ]
    heading = tag("p", "A FasterNet block", class_="panel-title")
    return join([heading, tag("ol", *steps, class_="flow", aria_label="Layers of a FasterNet block")])


def _box(name: str, *lines: object, kind: str | None = None) -> Html:
    return tag("li", tag("strong", name), *(tag("span", line) for line in lines), class_=kind)


def _list_variants() -> Html:
    """Make the table of channels, depths and the rest for every variant."""

    def channels(stage: int) -> Callable[[Mapping[str, str]], int]:
        return lambda row: int(row["channels"]) * 2**stage

    def depth(stage: int) -> Callable[[Mapping[str, str]], int]:
        return lambda row: int(row["depths"].split("-")[stage])

    columns: list[Column[Mapping[str, str]]] = [Column("Variant", lambda row: f"FasterNet-{row['variant']}")]
    for stage in range(len(STRIDES)):
        columns.append(Column("channels", channels(stage), "d", f"Stage {stage + 1}"))
        columns.append(Column("blocks", depth(stage), "d", f"Stage {stage + 1}"))
    columns += [
        Column("activation", lambda row: row["activation"]),
        Column("parameters, M", lambda row: float(row["params_m"]), ".1f"),
        Column("FLOPs at 224 px, G", lambda row: float(row["macs_g_224"]), ".2f"),
    ]
    return table(KEY, columns, load_table("table8_architecture"))
