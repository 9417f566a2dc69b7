"""Figures of a table's rows, as the bytes of PNG files."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import textalloc
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..protocol.methods import style_of
from ..running.matrix_figures import COLOURS, draw_matrix, new_figure, ticks
from .tables import Row, wrap_label

_LINES = ("-", (0, (4, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))
_LEGEND_WIDTH = 26  # characters
_MARKER = 4.0  # half a marker's width, in points

CAPTIONS = {
    "accuracy.png": "mean accuracy on the experiences so far, after each experience",
    "forgetting.png": "mean forgetting of the experiences before, after each experience",
    "matrix.png": "mean accuracy on every experience after every experience",
    "memory.png": "average accuracy against the memory of the method",
    "time.png": "average accuracy against training time",
    "map.png": "the first layer's accumulators, after each experience: the brighter, the more "
    "protected",
}
"""What each figure shows."""


def draw_figures(rows: Sequence[Row], title: str) -> dict[str, bytes]:
    """Draw all figures; the same rows give the same bytes.

    Args:
        rows: as :func:`experiments.reporting.tables.table_rows` makes them, at least one.
        title: stands over every figure, above what its numbers are the mean of.

    Returns:
        File names (of :data:`CAPTIONS`, as far as there is something to draw) and the files'
        contents.
    """
    several = [row for row in rows if row["forgetting_curve"]]
    mapped = [row for row in rows if row["maps"]]
    drawn: dict[str, bytes] = {}
    with style.context("default"):  # whatever the user's matplotlibrc says
        drawn["accuracy.png"] = _curves(rows, "curve", title)
        if several:
            drawn["forgetting.png"] = _curves(several, "forgetting_curve", title)
        drawn["matrix.png"] = _matrices(rows, title)
        label = "memory of the method beside the model, bytes per parameter"
        key = "state_bytes_per_parameter"
        drawn["memory.png"] = _against(rows, key, label, _scale_memory, title)
        label, key = "training time per experience, s", "seconds_per_experience"
        drawn["time.png"] = _against(rows, key, label, _scale_time, title)
        if mapped:
            drawn["map.png"] = _maps(mapped, title)
    return drawn


def _with_seeds(title: str, rows: Sequence[Row]) -> str:
    least, most = min(row["n"] for row in rows), max(row["n"] for row in rows)
    if most == 1:
        return f"{title}\none seed"
    count = most if least == most else f"{least} to {most}"
    return f"{title}\nmean over {count} seeds"


def _with_intervals(title: str, rows: Sequence[Row]) -> str:
    several = any(row["n"] > 1 for row in rows)
    return _with_seeds(title, rows) + (", with 95 % interval" if several else "")


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _looks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return each row's colour, marker and line; further settings of a method differ in the line.

    CLASSP lies on top of the others.
    """
    seen: Counter[str] = Counter()
    looks = []
    for row in rows:
        name = row["name"]
        colour, marker = style_of(name)
        ours = name.startswith("classp")
        looks.append(
            {
                "color": colour,
                "marker": marker,
                "markersize": 10 if ours else 7,
                "linestyle": _LINES[seen[colour] % len(_LINES)],
                "linewidth": 2.8 if ours else 1.4,
                "zorder": 4 if ours else 3,
            }
        )
        seen[colour] += 1
    return looks


def _curves(rows: Sequence[Row], key: str, title: str) -> bytes:
    """Draw a line for each row over the number of experiences trained.

    Args:
        rows: what to draw.
        key: ``curve``, or ``forgetting_curve``, which begins with the second experience.
        title: stands over the figure.
    """
    what, first = {
        "curve": ("accuracy on the experiences so far", 1),
        "forgetting_curve": ("forgetting of the experiences before", 2),
    }[key]
    figure = new_figure(9, max(4.8, 0.3 * len(rows) + 1.2))
    axes = figure.subplots()
    for row, look in zip(rows, _looks(rows), strict=True):
        mean, half = np.array(row[key]).T
        x = np.arange(first, first + len(mean))
        if row["name"] == "joint":  # a level to look up to, measured at the end alone
            look |= {"linestyle": "--", "marker": "" if len(x) > 1 else look["marker"]}
        axes.plot(x, mean, label="\n".join(wrap_label(row["method"], _LEGEND_WIDTH)), **look)
        band = {"color": look["color"], "zorder": look["zorder"] - 2}
        axes.fill_between(x, mean - half, mean + half, alpha=0.1, lw=0, **band)
    axes.set(xlabel="experiences trained", ylabel=f"mean {what}, %")
    axes.set_title(_with_intervals(title, rows), loc="left", fontsize=11)
    last = first - 1 + max(len(row[key]) for row in rows)
    axes.set_xticks([i + 1 for i in ticks(last) if i + 1 >= first])
    axes.grid(alpha=0.3)
    if key == "curve":
        _limit_accuracy(axes)
    figure.legend(loc="outside right upper", handlelength=3.2, fontsize=9)
    return _png(figure)


def _limit_accuracy(axes: Axes) -> None:
    """Cut what an interval has below 0 % and above 100 %."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -2), min(high, 102))


def _matrices(rows: Sequence[Row], title: str) -> bytes:
    """Draw every setting's mean accuracy matrix, on one scale of colours."""
    count = len(rows)
    lines = -(-count // 4)
    columns = -(-count // lines)
    cells = max(len(row["matrix"][0]) for row in rows)
    side = {1: 1.4, 2: 1.4}.get(cells, 2.2 if cells < 8 else 2.7)
    figure = new_figure(max(columns * side + 1.4, 5), lines * (side + 0.35) + 0.9)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, row in zip(grid.flat, rows, strict=False):
        image = draw_matrix(axes, np.array(row["matrix"]))
        axes.set_title("\n".join(wrap_label(row["method"], round(side * 9))), fontsize=9)
    for axes in list(grid.flat)[count:]:
        axes.axis("off")
    figure.suptitle(_with_seeds(title, rows), fontsize=11)
    figure.supxlabel("on experience j", fontsize=10)
    figure.supylabel("after training on experience i", fontsize=10)
    figure.colorbar(image, ax=grid, label="accuracy, %", aspect=30, pad=0.02)
    return _png(figure)


def draw_sensitivity(rows: Sequence[Row], title: str) -> bytes:
    """Draw the accuracy over each hyper-parameter: a line of panels for each method.

    A dotted line is at the searched value, and a value with which no run ended is a cross.

    Args:
        rows: a dictionary for each value, of the columns of ``sensitivity.csv``.
        title: stands over the figure.

    Returns:
        The bytes of a PNG file.
    """
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        panels.setdefault(row["method"], {}).setdefault(row["key"], []).append(row)
    columns = max(map(len, panels.values()))
    with style.context("default"):
        figure = new_figure(max(2.3 * columns + 1, 6), 2.4 * len(panels) + 0.9)
        grid = figure.subplots(len(panels), columns, squeeze=False, sharey="row")
        for line, (method, own) in zip(grid, panels.items(), strict=True):
            for axes, (key, values) in zip(line, own.items(), strict=False):
                _sensitivity(axes, values)
                axes.set_xlabel(key, fontsize=9)
            for axes in line[len(own) :]:
                axes.axis("off")
            line[0].set_ylabel(f"{method}\naverage accuracy, %", fontsize=9)
            _limit_accuracy(line[0])  # and with it the others'
        title = f"{title}: one varied, the others as searched"
        searched = [row for row in rows if row["searched"]]
        figure.suptitle(_with_intervals(title, searched), fontsize=11)
    return _png(figure)


def _sensitivity(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw a panel; the values stand at equal distances."""
    colour, marker = style_of(rows[0]["method"])
    measured = [(i, row) for i, row in enumerate(rows) if row["n"]]
    axes.errorbar(
        [i for i, _ in measured],
        [row["average_accuracy"] for _, row in measured],
        np.nan_to_num([row["average_accuracy_ci95"] for _, row in measured]),
        color=colour,
        marker=marker,
        lw=1.2,
        elinewidth=1,
        capsize=2,
    )
    for i, row in enumerate(rows):
        if not row["n"]:
            axes.plot(i, 0.03, "x", color="black", transform=axes.get_xaxis_transform())
        elif row["searched"]:
            axes.axvline(i, color="black", lw=0.8, ls=":")
    values = [row["value"] for row in rows]
    axes.set_xticks(range(len(rows)), [_short(value) for value in values])
    axes.set_xlim(-0.4, len(rows) - 0.6)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, bool) else f"{value:.2g}"
    return text if len(text) <= 6 else f"{value:.1e}".replace("e-0", "e-")


def _maps(rows: Sequence[Row], title: str) -> bytes:
    """Draw the first layer's accumulators of each row's first seed, at most ten experiences."""
    longest = max(len(row["maps"]) for row in rows)
    shown = sorted({round(i) for i in np.linspace(0, longest - 1, min(longest, 10))})
    figure = new_figure(max(1.35 * len(shown) + 1.4, 5), 1.75 * len(rows) + 1.1)
    grid = figure.subplots(len(rows), len(shown), squeeze=False)
    values = np.concatenate([np.ravel(image) for row in rows for image in row["maps"]])
    high = max(values.max(), 1e-30)
    low = max(values[values > 0].min(initial=high), high * 1e-6)  # six decades tell enough
    norm = LogNorm(low, high if high > low else 10 * low, clip=False)
    colours = colormaps[COLOURS].with_extremes(bad="#404040", under=colormaps[COLOURS](0.0))
    for line, row in zip(grid, rows, strict=True):
        for axes, i in zip(line, shown, strict=True):
            axes.set(xticks=[], yticks=[])
            if i >= len(row["maps"]):
                axes.axis("off")
                continue
            image = axes.imshow(np.ma.masked_equal(row["maps"][i], 0), cmap=colours, norm=norm)
            axes.set_title(f"{i + 1}", fontsize=9)
        line[0].set_ylabel("\n".join(wrap_label(row["method"], 20)), fontsize=8)
    figure.suptitle(
        f"{title}\nmean accumulator A in the first layer after experience …", fontsize=11
    )
    figure.colorbar(image, ax=grid, label="A (grey: 0)", aspect=20, pad=0.02)
    return _png(figure)


def _against(
    rows: Sequence[Row],
    key: str,
    label: str,
    scale: Callable[[Axes, Sequence[float]], None],
    title: str,
) -> bytes:
    """Draw each row's accuracy against the key's value, both with their intervals."""
    figure = new_figure(8, 5.2)
    axes = figure.subplots()
    points = []
    for row, look in zip(rows, _looks(rows), strict=True):
        # Of one seed there is no interval.
        (x, dx), (y, dy) = np.nan_to_num([row[key], row["average_accuracy"]])
        look |= {"linestyle": "none", "elinewidth": 1, "capsize": 2}
        axes.errorbar(x, y, xerr=dx or None, yerr=dy or None, **look)
        text = "\n".join(wrap_label(row["method"], _LEGEND_WIDTH))
        points.append(Point(text, x, y, dx, dy, look["color"]))
    axes.set_title(_with_intervals(title, rows), loc="left", fontsize=11)
    axes.set(xlabel=label, ylabel="average accuracy, %")
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    _limit_accuracy(axes)
    scale(axes, [point.x for point in points])
    axes.xaxis.set_minor_locator(NullLocator())
    place_labels(axes, points)
    return _png(figure)


def _scale_memory(axes: Axes, values: Sequence[float]) -> None:
    """Show powers of two, but linear from 0 to the least of them: several methods keep nothing."""
    least = min((value for value in values if value >= 1), default=1.0)
    first = int(np.floor(np.log2(least)))
    last = int(np.ceil(np.log2(max(*values, 2.0**first, 1))))
    axes.set_xscale("symlog", base=2, linthresh=2.0**first)
    axes.set_xlim(-0.4 * 2.0**first, 2.0**last * 1.6)
    step = -(-(last - first + 1) // 9)
    axes.set_xticks([0, *(2.0**i for i in range(first, last + 1, step))])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def _scale_time(axes: Axes, values: Sequence[float]) -> None:
    decades = np.log10(max(values) / min(values))
    subs = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
    axes.set_xscale("log", nonpositive="clip")
    axes.set_xlim(min(values) / 1.6, max(values) * 1.6)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


class Point(NamedTuple):
    """A labelled point with its error bars' half widths, in the axes' data coordinates."""

    text: str
    x: float
    y: float
    dx: float
    dy: float
    color: str


def place_labels(axes: Axes, points: Sequence[Point]) -> None:
    """Write each point's text beside it, not over another text, point or error bar.

    Args:
        axes: finished but for the labels; its layout is frozen.
        points: what to label.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()  # lays out, so that lengths are known
    figure.set_layout_engine("none")
    x, y = [p.x for p in points], [p.y for p in points]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    textalloc.allocate(
        axes,
        x,
        y,
        [p.text for p in points],
        x_scatter=x,
        y_scatter=y,
        scatter_sizes=[_MARKER * figure.dpi / 72] * len(points),
        x_lines=[
            *([max(p.x - p.dx, left), min(p.x + p.dx, right)] for p in points),
            *([p.x, p.x] for p in points),
        ],
        y_lines=[
            *([p.y, p.y] for p in points),
            *([max(p.y - p.dy, low), min(p.y + p.dy, high)] for p in points),
        ],
        textsize=9,
        margin=0.004,
        max_distance=0.4,
        nbr_candidates=1000,
        direction=["east", "west", "north", "south"],
        linecolor=[p.color for p in points],
        linewidth=0.7,
        avoid_label_lines_overlap=True,
        zorder=6,
    )
