"""Tables and figures, from result files alone."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from experiments.config import RunConfig
from experiments.resultfiles import describe_failure, write_atomically

matplotlib.use("Agg")

Result = Mapping[str, Any]
Interval = tuple[float, float] | None
"""Mean and half the width of its 95 % confidence interval (NaN for a single value)."""

REFERENCE = "classp"
COLUMNS = {
    "method": "method",
    "n": "n",
    "average_accuracy": "average accuracy %",
    "difference": f"difference to {REFERENCE}, paired",
    "forgetting": "forgetting %",
    "seconds_per_experience": "time per experience s",
    "state_bytes_per_parameter": "memory, bytes per parameter",
}
# A column's unit, as a factor on the results' values.
_SCALES = {"average_accuracy": 100.0, "forgetting": 100.0, "difference": 100.0}


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % confidence interval (Student's t).

    Args:
        values: at least one number; of one alone the half width is NaN.
    """
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return float(array.mean()), math.nan
    error = array.std(ddof=1) / math.sqrt(len(array))
    return float(array.mean()), float(stats.t.ppf(0.975, len(array) - 1) * error)


def _by_setting(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Group the results by all of their config but the seed, under a label for people.

    The label is the method's name, with what differs where it has several settings.
    """
    settings: dict[str, list[Result]] = {}
    for result in results:
        settings.setdefault(RunConfig.from_dict(result["config"]).setting(), []).append(result)
    groups: dict[str, list[Result]] = {}
    for runs in settings.values():
        config = runs[0]["config"]
        method = config["method"]
        siblings = [
            _flat(other[0]["config"])
            for other in settings.values()
            if other[0]["config"]["method"] == method
        ]
        differing = [
            f"{key} {_short(value)}"
            for key, value in _flat(config).items()
            if any(sibling.get(key) != value for sibling in siblings)
        ]
        groups[", ".join([method, *differing])] = runs
    return groups


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: value for key, value in config.items() if key not in ("seed", "hyper")}
    return values | config["hyper"]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return a row for each setting (all of a config but the seed), best accuracy first.

    Each row has ``method``, ``n``, ``setting`` and, for the other keys of :data:`COLUMNS`, an
    :data:`Interval`: None where a method has no such value.
    """
    groups = _by_setting(results)
    references = [runs for runs in groups.values() if runs[0]["config"]["method"] == REFERENCE]
    rows = []
    for label, runs in groups.items():
        row: dict[str, Any] = {
            "method": label,
            "n": len(runs),
            "setting": _describe_setting(runs[0]["config"]),
        }
        for key in COLUMNS:
            if key not in ("method", "n", "difference"):
                values = [run[key] for run in runs]
                row[key] = None if None in values else _scaled(key, mean_interval(values))
        # With several settings of the reference, none is the one to compare with.
        row["difference"] = None
        if len(references) == 1 and references[0] is not runs:
            row["difference"] = _paired_difference(runs, references[0])
        rows.append(row)
    return sorted(rows, key=lambda row: -row["average_accuracy"][0])


def _paired_difference(runs: Sequence[Result], reference: Sequence[Result]) -> Interval:
    """Return the accuracy of ``runs`` less that of ``reference``, over the seeds of both."""
    by_seed = {run["config"]["seed"]: run["average_accuracy"] for run in reference}
    differences = [
        run["average_accuracy"] - by_seed[run["config"]["seed"]]
        for run in runs
        if run["config"]["seed"] in by_seed
    ]
    return _scaled("difference", mean_interval(differences)) if differences else None


def _scaled(key: str, interval: tuple[float, float]) -> tuple[float, float]:
    scale = _SCALES.get(key, 1.0)
    return interval[0] * scale, interval[1] * scale


def _describe_setting(config: Mapping[str, Any]) -> str:
    hyper = ", ".join(f"{key} {_short(value)}" for key, value in config["hyper"].items())
    return f"{config['epochs']} epochs, batch {config['batch_size']}, {hyper}"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|" + "|".join("---" if key == "method" else "---:" for key in COLUMNS) + "|",
    ]
    for row in rows:
        lines.append("| " + " | ".join(_cell(key, row[key]) for key in COLUMNS) + " |")
    return "\n".join(lines)


def plain_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table of aligned columns, for a terminal."""
    cells = [list(COLUMNS.values())]
    cells += [[_cell(key, row[key]) for key in COLUMNS] for row in rows]
    # Long headings go on two lines.
    head = [_two_lines(text) for text in cells[0]]
    cells = [[h[0] for h in head], [h[1] for h in head], *cells[1:]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    lines.insert(2, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _two_lines(text: str) -> tuple[str, str]:
    if len(text) < 12:
        return "", text
    words = text.split()
    cut = min(
        range(1, len(words) + 1),
        key=lambda i: max(len(" ".join(words[:i])), len(" ".join(words[i:]))),
    )
    return " ".join(words[:cut]), " ".join(words[cut:])


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str | int):
        return str(value)
    mean, half = value
    digits = {"seconds_per_experience": 2}.get(key, 1)
    sign = "+" if key == "difference" else ""
    text = f"{mean:{sign}.{digits}f}"
    if key == "state_bytes_per_parameter" or math.isnan(half):
        return text
    return f"{text} ± {half:.{digits}f}"


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as CSV: each interval in two columns, its half width with ``_ci95``."""
    intervals = [key for key in COLUMNS if key not in ("method", "n")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["method", "n", *(name for key in intervals for name in (key, f"{key}_ci95")), "setting"]
    )
    for row in rows:
        numbers = [number for key in intervals for number in row[key] or ("", "")]
        shown = [f"{x:.6g}" if isinstance(x, float) and not math.isnan(x) else "" for x in numbers]
        writer.writerow([row["method"], row["n"], *shown, row["setting"]])
    return out.getvalue()


def write_report(results: Sequence[Result], folder: Path, failures: Sequence[Result] = ()) -> str:
    """Write ``table.md``, ``table.csv`` and ``accuracy.png`` and return the table as text.

    Args:
        results: results of one benchmark and scenario, at least one.
        folder: where to.
        failures: failed runs beside them; they are listed under the table.

    Raises:
        UserError: the folder cannot be written.
    """
    rows = table_rows(results)
    config = results[0]["config"]
    title = f"{config['benchmark']}, {config['scenario']}-incremental"
    failed = [describe_failure(failure) for failure in failures]
    parts = [
        f"# {title}",
        *(
            f"Made by `{command}`."
            for command in sorted({result.get("command", "") for result in results} - {""})
        ),
        markdown_table(rows),
        *(f"**Failed:** {line}" for line in failed),
        "Mean ± half the width of the 95 % confidence interval over n seeds, on test data. "
        "Average accuracy: mean over all experiences after the last one. Forgetting: accuracy of "
        "an experience right after training on it less the accuracy at the end, mean over all but "
        "the last (Avalanche's StreamForgetting). Time: training alone, on one thread. Memory: "
        "what the method keeps between experiences beside the model.",
        "![average accuracy after each experience](accuracy.png)",
        "Settings:",
        "\n".join(f"* {row['method']}: {row['setting']}" for row in rows),
    ]
    write_atomically(folder / "table.md", "\n\n".join(parts) + "\n")
    write_atomically(folder / "table.csv", csv_table(rows))
    write_atomically(folder / "accuracy.png", _accuracy_figure(results, title))
    return "\n".join([title, plain_table(rows), *(f"FAILED {line}" for line in failed)])


def _accuracy_figure(results: Sequence[Result], title: str) -> bytes:
    """Draw the mean accuracy over the experiences seen so far, after each of them."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, runs in _by_setting(results).items():
        curves = [_accuracy_so_far(run) for run in runs]
        intervals = [mean_interval(column) for column in zip(*curves, strict=True)]
        mean, half = 100 * np.array(intervals).T
        x = np.arange(1, len(mean) + 1)
        dashed = "--" if runs[0]["config"]["method"] == "joint" else "-"
        (line,) = axes.plot(x, mean, dashed, marker="o", markersize=4, label=label)
        axes.fill_between(x, mean - half, mean + half, alpha=0.2, color=line.get_color(), lw=0)
    axes.set(
        title=title,
        xlabel="experiences trained",
        ylabel="mean accuracy on the experiences so far, %",
        xticks=x,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    out = io.BytesIO()
    figure.savefig(out, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return out.getvalue()


def _accuracy_so_far(result: Result) -> list[float]:
    matrix = result["accuracy_matrix"]
    if len(matrix) == 1:  # joint training has one value, after everything: a level to look up to
        return [result["average_accuracy"]] * len(matrix[0])
    return [float(np.mean(row[: i + 1])) for i, row in enumerate(matrix)]
