"""Sizes of pictures for detection: the shorter side as asked for, the longer one within its limit (Table 7)."""

from __future__ import annotations


def fit_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Return height and width of a picture: the shorter side ``min_size``, the longer one ``max_size`` at most.

    The proportions are kept, to the nearest pixel; no side becomes less than 1.
    """
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
