"""Accuracy and confusion matrices as figures, for TensorBoard and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = "cividis"
_DPI = 150


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of this size in inches."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def ticks(count: int) -> list[int]:
    """Return which of so many cells have a label: all up to ten, else the first and every fifth."""
    return [i for i in range(count) if count <= 10 or i == 0 or (i + 1) % 5 == 0]


def draw_matrix(axes: Axes, matrix: np.ndarray) -> Any:
    """Draw a matrix of values from 0 to 100, with numbers where there is room; return the image."""
    image = axes.imshow(matrix, cmap=COLOURS, vmin=0, vmax=100)
    height, width = matrix.shape
    axes.set_xticks(ticks(width), [str(i + 1) for i in ticks(width)], fontsize=7)
    if height == 1 < width:  # joint training has one row, after everything
        axes.set_yticks([0], ["all"], fontsize=7)
    else:
        axes.set_yticks(ticks(height), [str(i + 1) for i in ticks(height)], fontsize=7)
    axes.tick_params(length=2)
    if width <= 10:
        size = 9 if width < 8 else 6.5
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if sum(colormaps[COLOURS](value / 100)[:3]) < 1.5 else "black"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=size)
    return image


def accuracy_matrix_figure(matrix: Sequence[Sequence[float]]) -> Figure:
    """Draw one run's accuracy matrix.

    Args:
        matrix: accuracy, 0 to 1, on each experience (columns) after each (rows).
    """
    values = 100 * np.array(matrix)
    with style.context("default"):
        figure, axes = _new_square(values.shape[1])
        draw_matrix(axes, values)
        axes.set(xlabel="on experience j", ylabel="after training on experience i")
        axes.set_title("accuracy, %", fontsize=11)
    return figure


def confusion_figure(counts: Sequence[Sequence[float]]) -> Figure:
    """Draw a confusion matrix.

    Args:
        counts: of each class (rows), how many samples were taken for each (columns).
    """
    values = np.array(counts, dtype=float)
    values = 100 * values / np.maximum(values.sum(1, keepdims=True), 1)
    with style.context("default"):
        figure, axes = _new_square(len(values))
        draw_matrix(axes, values)
        shown = ticks(len(values))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(shown, [str(tick) for tick in shown], fontsize=7)
        axes.set(xlabel="taken for class", ylabel="class")
        axes.set_title("% of the class's samples", fontsize=11)
    return figure


def _new_square(cells: int) -> tuple[Figure, Axes]:
    side = 4.2 if cells <= 10 else 6
    figure = new_figure(side, side)
    return figure, figure.subplots()
