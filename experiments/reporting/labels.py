"""Labels: broken into lines, and placed beside a figure's points, none over another."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text

# Lengths are in points (1/72 inch).
_NEAR = 8.0
"""Distance between a point and a label that needs no line to it."""
_DISTANCES = (_NEAR, 14, 22, 32, 44, 58, 76, 98, 124)
_ANGLES = np.deg2rad([0, 180, 90, 270, 45, 315, 135, 225, 20, 340, 160, 200, 68, 112, 248, 292])
_MARKER = 5.0
# What it costs to cover a square point of a marker or label, or of an error bar; to cross a marker
# or label with a line; and each point of distance.
_COVERED, _BAR_COVERED, _CROSSED, _AWAY = 20.0, 3.0, 300.0, 2.0


class Point(NamedTuple):
    """A labelled point with its error bars' half widths, in the axes' data coordinates."""

    text: str
    x: float
    y: float
    dx: float
    dy: float
    color: str


def wrap_label(label: str, width: int) -> list[str]:
    """Break "method, key value, key value" into lines, behind commas where possible.

    What is longer than a line is broken at its hyphens.
    """
    together = re.sub("(?<!,) ", "\N{NO-BREAK SPACE}", label)
    too_long = max(map(len, label.split()), default=0) > width
    lines = textwrap.wrap(together, width, break_on_hyphens=too_long)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def place_labels(axes: Axes, points: Sequence[Point]) -> None:
    """Write each point's text beside it, where it covers least of the rest.

    For each point in turn, places around it at growing distances are tried, and the cheapest is
    taken. A label away from its point is joined to it by a line.

    Args:
        axes: finished but for the labels; its layout is frozen.
        points: what to label.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()  # lays out, so that lengths are known
    figure.set_layout_engine("none")
    scale = figure.dpi / 72
    frame = np.array(axes.get_window_extent().extents) / scale

    def place(x: float, y: float) -> np.ndarray:
        return np.array(axes.transData.transform((x, y))) / scale

    spots = np.array([place(point.x, point.y) for point in points])
    # Rows of left, bottom, right, top: first the markers, then the bars, then the labels.
    taken = [np.hstack([spot - _MARKER, spot + _MARKER]) for spot in spots]
    for p in points:
        for dx, dy in ((p.dx, 0.0), (0.0, p.dy)):
            ends = np.hstack([place(p.x - dx, p.y - dy), place(p.x + dx, p.y + dy)])
            low, high = np.clip(ends.reshape(2, 2), frame[:2], frame[2:])
            taken.append(np.hstack([low - 1, high + 1]))
    costs = [_COVERED] * len(points) + [_BAR_COVERED] * 2 * len(points)
    for i, (point, spot) in enumerate(zip(points, spots, strict=True)):
        text: Any = axes.annotate(
            point.text,
            (point.x, point.y),
            textcoords="offset points",
            xytext=(0, 0),
            ha="center",
            va="center",
            fontsize=9,
            zorder=6,
            arrowprops={"arrowstyle": "-", "color": point.color, "lw": 0.7, "shrinkB": 4},
        )
        words = Text.get_window_extent(text, figure.canvas.get_renderer())  # without the line
        size = np.array(words.size) / scale
        others = np.delete(np.array(taken), i, axis=0)
        distance, offset = _best_place(spot, size, frame, others, np.delete(costs, i))
        text.set_position(tuple(offset))
        text.arrow_patch.set_visible(distance > _NEAR)
        taken.append(np.hstack([spot + offset - size / 2 - 1, spot + offset + size / 2 + 1]))
        costs.append(_COVERED)


def _best_place(
    spot: np.ndarray, size: np.ndarray, frame: np.ndarray, taken: np.ndarray, costs: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return a label's distance and its middle's offset from its point."""
    distance = np.repeat(_DISTANCES, len(_ANGLES))
    direction = np.tile(np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1), (len(_DISTANCES), 1))
    offset = direction * (distance[:, None] + size / 2)
    low, high = spot + offset - size / 2 - 1, spot + offset + size / 2 + 1  # a row a place
    outside = ((low < frame[:2]) | (high > frame[2:])).any(1)
    shared = np.minimum(high[:, None], taken[:, 2:]) - np.maximum(low[:, None], taken[:, :2])
    covered = np.prod(np.maximum(shared, 0), axis=2) @ costs
    # Whether the line crosses something, at some places along it.
    along = spot + offset[:, None] * np.linspace(0, 1, 25)[:, None]
    inside: Any = (along[:, :, None] > taken[:, :2]) & (along[:, :, None] < taken[:, 2:])
    crossed = inside.all(3).any(1) @ (costs >= _COVERED) * (distance > _NEAR)
    cost = covered + _CROSSED * crossed + _AWAY * distance + 1e6 * outside
    best = int(np.argmin(cost))
    return float(distance[best]), offset[best]
