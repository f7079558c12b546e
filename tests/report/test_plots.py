"""The drawings: names that cover nothing, colours from the page, one drawing for each width."""

import random
import re
from itertools import combinations
from types import ModuleType

import pytest

from fasternet.report.labels import MARKER, Box, place_labels
from fasternet.report.plots import Series, draw_curve, draw_networks
from fasternet.report.points import MARKERS, Point, assign_markers, list_legend

FRAME = Box(0, 0, 480, 330)


def draw(points: list[Point]) -> str:
    return draw_networks(points, key="figure", title="(a) Speed", x_label="FLOPs", alt="speeds")


@pytest.mark.parametrize("seed", range(20))
def test_labels_cover_neither_each_other_nor_points(seed: int) -> None:
    chance = random.Random(seed)
    points = [(chance.uniform(10, 470), chance.uniform(10, 320)) for _ in range(25)]
    sizes = [(chance.uniform(40, 110), 14.0) for _ in points]
    boxes = [box for box in place_labels(points, sizes, frame=FRAME) if box]
    assert len(boxes) > 12
    assert all(box.within(FRAME) for box in boxes)
    assert not any(one.meets(other) for one, other in combinations(boxes, 2))
    markers = [Box(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in points]
    assert not any(box.meets(marker) for box in boxes for marker in markers)


def test_label_without_room_is_left_out() -> None:
    crowd = [(240.0, 165.0)] * 200
    places = place_labels(crowd, [(80.0, 14.0)] * 200, frame=FRAME)
    assert places[0] is not None
    assert None in places


def test_labels_avoid_what_is_better_left_uncovered() -> None:
    (free,) = place_labels([(240, 165)], [(60, 14)], frame=FRAME)
    assert free is not None
    soft = [(x, 165.0) for x in range(250, 310, 6)]
    (place,) = place_labels([(240, 165)], [(60, 14)], frame=FRAME, soft=soft)
    assert place is not None
    assert place != free


def test_label_keeps_away_from_the_point_of_another() -> None:
    here, neighbour = (240.0, 165.0), (240.0 + 7 + 60 + 8, 165.0)  # just beyond the end of a label on the right
    (place, _) = place_labels([here, neighbour], [(60, 14), (60, 14)], frame=FRAME)
    assert place is not None
    assert not place.meets(Box(neighbour[0] - 10, 155, neighbour[0] + 10, 175))


def test_drawing_names_every_measured_network_at_both_widths(example: ModuleType) -> None:
    points = [
        Point(record.subject, record.values["macs"] / 1e9, record.values["latency_ms"])
        for record in example.make_networks()
        if record.kind == "latency" and "error" not in record.values and ":" not in record.subject
    ]
    drawing = draw([*points, Point("PVT-Tiny", 1.94, 47.5, measured=False)])
    wide, narrow = drawing.split('<div class="narrow">')
    for part in (wide, narrow):
        named = re.findall(r"<text[^>]*>([^<]*)</text>", part)
        assert {point.name for point in points} <= set(named)
        assert "PVT-Tiny" not in named
        assert "<title>PVT-Tiny: 1.94, 47.5 (paper)</title>" in part
        assert "<title>Swin-T: " in part


def test_drawing_takes_colours_and_font_from_the_page() -> None:
    drawing = draw([Point("FasterNet-T0", 0.3, 8), Point("ResNet50", 4.1, 70), Point("PVT", 2, 40, measured=False)])
    for variable in ("--ink", "--muted", "--rule", "--paper", "--accent", "--sans"):
        assert f"var({variable})" in drawing
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawing)) <= {"#000000", "#ffffff"}
    assert not re.search(r"(fill|stroke): #", drawing)
    assert "DejaVu" not in drawing


def test_fasternet_is_connected_in_order_of_flops() -> None:
    shuffled = [Point(f"FasterNet-{name}", x, 10 * x) for name, x in (("S", 4.5), ("T0", 0.3), ("T2", 1.9))]
    drawing = draw(shuffled)
    paths = re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="[^"]*stroke: var\(--accent\)', drawing)
    lines = [path.split() for path in paths if path.count("L") == 2]
    assert len(lines) == 2  # wide and narrow
    for line in lines:
        xs = [float(x) for x in line[1::3]]
        assert xs == sorted(xs)


def test_every_point_names_itself_within_the_drawing_and_takes_no_focus() -> None:
    far = Point("a network with a rather long name", 100, 2, engine="OpenVINO fp32")
    drawing = draw([Point("near", 1, 1, engine="eager fp32"), far])
    tips = re.findall(r'<text class="tip" y="([\d.]+)" text-anchor="middle">(.*?)</text>', drawing)
    lines = [re.findall(r'<tspan x="([\d.]+)"[^>]*>([^<]*)</tspan>', tip) for _, tip in tips]
    told = [("near", "1, 1 (eager fp32)"), ("a network with a rather long name", "100, 2 (OpenVINO fp32)")]
    assert [tuple(text for _, text in tip) for tip in lines] == 2 * told
    for tip, (y, _), width in zip(lines, tips, (540, 540, 343, 343), strict=True):
        assert all(3 * len(text) < float(x) < width - 3 * len(text) for x, text in tip)
        assert float(y) > 0
    assert drawing.count('<g class="point" data-engine="OpenVINO fp32"><title>') == 2
    assert "tabindex" not in drawing


def test_only_the_first_engines_points_have_names_beside_them() -> None:
    drawing = draw([Point("T0", 1, 1, engine="a"), Point("T0", 1, 2, engine="b"), Point("T1", 2, 2, engine="b")])
    names = re.findall(r'<g id="figure-wide-name\d+" data-engine="(\w)">', drawing)
    assert names == ["a"]


def test_engines_differ_in_their_markers() -> None:
    points = [Point("x", 1, 1 + place, engine=f"engine {place % 12}") for place in range(24)]
    markers = assign_markers([*points, Point("x", 1, 1, measured=False, engine="none")])
    assert list(markers) == [f"engine {place}" for place in range(12)]
    assert len(set(markers.values())) == 12
    legend = list_legend(points)
    assert all(legend.count(f'd="{MARKERS[marker]}"') == 1 for marker in markers.values())
    assert draw(points).count("<svg") == 2


def test_marker_is_that_of_the_legend_that_drawings_share() -> None:
    points = [Point("x", 1, 1, engine="openvino")]
    circle, square = (
        draw_networks(points, key="k", title="t", x_label="x", alt="a", markers={"openvino": m}) for m in "os"
    )
    assert draw_networks(points, key="k", title="t", x_label="x", alt="a") == circle != square


def test_accuracy_has_a_linear_axis() -> None:
    points = [Point("one", 1, 70), Point("two", 10, 80)]
    drawing = draw_networks(points, key="k", title="Top-1", x_label="ms", alt="x", y_scale="linear")
    assert {"72", "74", "76"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", drawing))


def test_names_with_signs_of_mathematics_and_markup_are_text() -> None:
    drawing = draw([Point("a_$x^2$ <b>", 1, 2), Point("网络", 2, 3)])
    assert "a_$x^2$ &lt;b&gt;" in drawing
    assert "网络" in drawing


@pytest.mark.parametrize("points", [[Point("one", 1, 1)], [Point("same", 2, 5), Point("place", 2, 5)]])
def test_few_points_are_enough(points: list[Point]) -> None:
    assert draw(points).count("<svg") == 2


@pytest.mark.parametrize(("epochs", "marked"), [(1, True), (300, False)])
def test_curve_marks_epochs_while_they_are_few(epochs: int, *, marked: bool) -> None:
    line = Series("training", tuple(map(float, range(epochs))), tuple(1 / (1 + epoch) for epoch in range(epochs)))
    drawing = draw_curve([line], key="curve", title="(a) Loss", alt="loss")
    assert drawing.count("<svg") == 2
    assert ("fill: var(--accent)" in drawing) is marked


def test_users_matplotlib_settings_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    before = draw([Point("one", 1, 1)])
    monkeypatch.setitem(matplotlib.rcParams, "axes.titlesize", 40)
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "red")
    assert draw([Point("one", 1, 1)]) == before
    assert matplotlib.rcParams["axes.titlesize"] == 40
