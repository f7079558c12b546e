"""Places the names of points in a plot so that none covers another or a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

MARKER = 5.0  # half the side of the square that a point covers, in pixels
NEARNESS = 11.0  # a label nearer than this to another point could be taken for its name
DISTANCES = (7.0, 13.0, 20.0, 30.0, 42.0, 56.0)
DIRECTIONS = (
    *((1, 0), (-1, 0), (0, 1), (0, -1)),
    *((0.6, 1), (0.6, -1), (-0.6, 1), (-0.6, -1)),
    *((1, 1), (1, -1), (-1, 1), (-1, -1)),
)


class Box(NamedTuple):
    """A rectangle, in pixels."""

    x0: float
    y0: float
    x1: float
    y1: float

    def meets(self, other: Box) -> bool:
        """Whether two rectangles share any area."""
        return self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1

    def within(self, other: Box) -> bool:
        """Whether it lies in another rectangle."""
        return self.x0 >= other.x0 and self.y0 >= other.y0 and self.x1 <= other.x1 and self.y1 <= other.y1


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    *,
    frame: Box,
    soft: Sequence[tuple[float, float]] = (),
) -> list[Box | None]:
    """Find a place for every label, the first ones choosing first.

    Args:
        points: What the labels name; no label may cover any of them.
        sizes: Width and height of the labels.
        frame: Where labels may be.
        soft: Points that are better left uncovered.

    Returns:
        For every label its place, or None where there is none near its point.
    """
    markers = [_around(point, MARKER) for point in points]
    lighter = [_around(point, MARKER / 2) for point in soft]
    taken: list[Box] = []
    places: list[Box | None] = []
    for index, (point, size) in enumerate(zip(points, sizes, strict=True)):
        others = [_around(other, NEARNESS) for other in [*points[:index], *points[index + 1 :]]]
        best: tuple[float, Box] | None = None
        for rank, box in _candidates(point, size):
            if not box.within(frame) or any(map(box.meets, taken)) or any(map(box.meets, markers)):
                continue
            cost = rank + sum(map(box.meets, lighter)) / 2 + 3 * sum(map(box.meets, others))
            if best is None or cost < best[0]:
                best = (cost, box)
        places.append(best[1] if best else None)
        if best:
            taken.append(best[1])
    return places


def _around(point: tuple[float, float], radius: float) -> Box:
    return Box(point[0] - radius, point[1] - radius, point[0] + radius, point[1] + radius)


def _candidates(point: tuple[float, float], size: tuple[float, float]) -> Iterator[tuple[float, Box]]:
    """Yield places around a point and how little they are liked: the near ones and those at its sides first."""
    width, height = size
    for ring, distance in enumerate(DISTANCES):
        for turn, (right, up) in enumerate(DIRECTIONS):
            reach = distance * 0.7 if abs(right) == abs(up) else distance
            x = point[0] + right * (reach + width / 2)
            y = point[1] + up * (reach + height / 2)
            yield 2.5 * ring + 0.2 * turn, Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
