"""Draws detections into a picture: translucent masks with an outline, boxes, and labels that keep clear of one another.

Sizes in pixels; a rectangle is x0, y0, x1, y1.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fasternet.data.images import to_rgb

if TYPE_CHECKING:
    from fasternet.detection.predictor import Detection

Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

# Told apart with every kind of colour vision (after Okabe and Ito), ordered so that neighbours differ in lightness too.
PALETTE: tuple[Color, ...] = (
    (245, 165, 35),
    (25, 105, 215),
    (0, 150, 115),
    (235, 130, 190),
    (250, 235, 90),
    (110, 205, 245),
    (215, 75, 20),
    (150, 40, 110),
)
# Further classes: the same hues lighter, then darker, as a mix with white and with black.
SHADES: tuple[tuple[float, int], ...] = ((0.0, 0), (0.45, 255), (0.4, 0))

FILL_OPACITY = 0.38
MIN_FONT_SIZE = 9  # smaller letters cannot be read
MAX_COST = 1.5  # of a label's place: a quarter of it over stronger labels, or an object buried under it


class Style(NamedTuple):
    """Widths that suit a picture's size."""

    line: int
    font_size: int


class Label(NamedTuple):
    """What is written about a detection, and its size with the margin."""

    text: str
    color: Color
    box: Rectangle
    width: int
    height: int
    font_size: int


def draw_detections(image: Image.Image, detections: Sequence[Detection], *, scores: bool = True) -> Image.Image:
    """Draw detections, the strongest on top.

    Args:
        image: Of any mode; it is not modified. Transparency is laid on white, 16-bit values are rescaled.
        detections: The strongest first, as a predictor gives them, with boxes and masks in pixels of ``image``. Each
            is asked for once, so that a lazy sequence has one mask in memory.
        scores: Write the score behind the name.

    Returns:
        A new picture of mode ``RGB`` and the same size.

    Raises:
        ValueError: Its grey values cannot be rescaled; see ``to_rgb``.
    """
    picture = to_rgb(image)
    style = choose_style(picture.size)
    labels = []
    for detection in reversed(detections):
        color = choose_color(detection.label)
        if detection.mask is not None:
            _draw_mask(picture, detection.mask, detection.offset, color, style.line)
        _draw_box(picture, detection.box, color, style.line, thin=detection.mask is not None)
        name = " ".join(detection.class_name.split())  # on one line
        text = f"{name} {detection.score:.2f}" if scores else name
        if label := _fit_label(text, color, detection.box, style.font_size, picture.size):
            labels.append(label)
    for label, place in zip(labels, place_labels(labels[::-1], picture.size)[::-1], strict=True):
        if place is not None:
            _draw_label(picture, label, *place)
    return picture


def choose_color(label: int) -> Color:
    """Return the colour of a class, from its number alone: the same in every picture."""
    share, toward = SHADES[label // len(PALETTE) % len(SHADES)]
    red, green, blue = (round(value + (toward - value) * share) for value in PALETTE[label % len(PALETTE)])
    return red, green, blue


def choose_style(size: tuple[int, int]) -> Style:
    """Return widths for a picture of (width, height): 800x600 has lines of 2 and letters of 14."""
    extent = min((size[0] ** 2 + size[1] ** 2) ** 0.5, 4 * min(size))
    return Style(max(round(extent / 400), 1), max(round(extent / 70), MIN_FONT_SIZE))


def place_labels(labels: Sequence[Label], size: tuple[int, int]) -> list[tuple[int, int] | None]:
    """Find a place for each label beside its box, the first first: inside of the picture, clear of labels and objects.

    Args:
        labels: No larger than the picture.
        size: Its width and height.

    Returns:
        Left and top of each; None for one that would hide others, unless it is the first.
    """
    taken: list[tuple[int, int, int, int]] = []
    places: list[tuple[int, int] | None] = []
    for label in labels:
        candidates = list(_list_places(label, size))
        costs = [_judge(place, label, labels, taken) + 0.04 * rank for rank, place in enumerate(candidates)]
        best = candidates[costs.index(min(costs))]
        if min(costs) > MAX_COST and taken:
            places.append(None)
        else:
            taken.append(best)
            places.append(best[:2])
    return places


def _draw_mask(picture: Image.Image, mask: Tensor, offset: tuple[int, int], color: Color, line: int) -> None:
    """Lay a mask (h, w), whose first pixel is at ``offset`` (row, column), over the picture."""
    if not mask.any():
        return
    opacity = mask * torch.tensor(255, dtype=torch.uint8)  # (h, w)
    opacity.masked_fill_(_erode(mask, line), round(255 * FILL_OPACITY))
    picture.paste(color, (offset[1], offset[0]), Image.fromarray(opacity.numpy()))


def _erode(mask: Tensor, radius: int) -> Tensor:
    """Return where a mask (h, w) is set all around, in a square; nothing is set outside of it.

    Whole windows of 2 * radius + 1 are joined by doubling, in bytes: masks may fill a picture of 179 megapixels.
    """
    window = 2 * radius + 1
    core = mask
    for side in (0, 1):
        if core.shape[side] < window:
            return torch.zeros_like(mask)
        joined = 1
        while joined < window:
            step = min(joined, window - joined)
            length = core.shape[side] - step
            core = core.narrow(side, 0, length) & core.narrow(side, step, length)
            joined += step
    eroded = torch.zeros_like(mask)
    eroded[radius : radius + core.shape[0], radius : radius + core.shape[1]] = core
    return eroded


def _draw_box(picture: Image.Image, box: Rectangle, color: Color, line: int, *, thin: bool) -> None:
    """Draw a box: thin around a mask, else with a dark edge that shows it on any background."""
    x0, y0 = (max(round(value), 0) for value in box[:2])
    x1 = max(min(round(box[2]), picture.width) - 1, x0)
    y1 = max(min(round(box[3]), picture.height) - 1, y0)
    edge = max(line // 2, 1)
    draw = ImageDraw.Draw(picture, "RGBA")
    if not thin:
        draw.rectangle((x0 - edge, y0 - edge, x1 + edge, y1 + edge), outline=(0, 0, 0, 90), width=edge)
    draw.rectangle((x0, y0, x1, y1), outline=color, width=edge if thin else line)


@functools.lru_cache(maxsize=64)
def _load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _fit_label(text: str, color: Color, box: Rectangle, font_size: int, size: tuple[int, int]) -> Label | None:
    """Return a label that the picture has room for, in smaller letters where it must be; None: there is no room."""
    while font_size >= MIN_FONT_SIZE:
        left, _, right, _ = _load_font(font_size).getbbox(text)
        pad = _choose_pad(font_size)
        label = Label(text, color, box, round(right - left) + 2 * pad, round(font_size * 1.1) + pad, font_size)
        if label.width <= size[0] and label.height <= size[1]:
            return label
        font_size = min(font_size - 1, int(font_size * 0.8))
    return None


def _choose_pad(font_size: int) -> int:
    return max(round(font_size * 0.3), 2)


def _list_places(label: Label, size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield places at a box's corners, the preferred first, moved into the picture."""
    x0, y0, x1, y1 = label.box
    width, height = label.width, label.height
    corners = (
        (x0, y0 - height),
        (x1 - width, y0 - height),
        (x0, y1),
        (x1 - width, y1),
        (x0, y0),
        (x1 - width, y0),
        (x0, y1 - height),
        (x1 - width, y1 - height),
        (x1, y0),
        (x0 - width, y0),
        (x1, y1 - height),
        (x0 - width, y1 - height),
        ((x0 + x1 - width) / 2, y0 - height),
        ((x0 + x1 - width) / 2, y1),
    )
    for x, y in corners:
        left = round(min(max(x, 0), size[0] - width))
        top = round(min(max(y, 0), size[1] - height))
        yield left, top, left + width, top + height


def _judge(place: Rectangle, label: Label, labels: Sequence[Label], taken: Sequence[Rectangle]) -> float:
    """Return how bad a place is: labels that it overlaps count most, then objects that it buries."""
    area = label.width * label.height
    overlap = sum(_intersect(place, other) for other in taken) / area
    buried = sum(_intersect(place, other.box) / max(_measure(other.box), 1) for other in labels)
    return 6 * overlap + 2 * buried + 4 * _intersect(place, label.box) / max(_measure(label.box), 1)


def _intersect(a: Rectangle, b: Rectangle) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _measure(box: Rectangle) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _draw_label(picture: Image.Image, label: Label, left: int, top: int) -> None:
    scale = 4  # drawn larger and averaged, for smooth corners
    pad = _choose_pad(label.font_size)
    chip = Image.new("L", (label.width * scale, label.height * scale))
    shape = (0, 0, chip.width - 1, chip.height - 1)
    ImageDraw.Draw(chip).rounded_rectangle(shape, radius=pad * scale, fill=255)
    picture.paste(label.color, (left, top), chip.reduce(scale))
    ImageDraw.Draw(picture).text(
        (left + label.width / 2, top + label.height / 2),
        label.text,
        fill=_choose_ink(label.color),
        font=_load_font(label.font_size),
        anchor="mm",
    )


def _choose_ink(color: Color) -> Color:
    """Return black or white, whichever stands out more (WCAG's contrast of relative luminances)."""
    linear = [(value / 255) ** 2.2 for value in color]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 0.05 * 1.05 else (255, 255, 255)
