"""Tables and figures, from result files alone."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from experiments.reporting.figures import CAPTIONS, draw_figures
from experiments.reporting.html import render
from experiments.reporting.labels import wrap_label
from experiments.running.records import describe_failure, write_atomically

Result = Mapping[str, Any]
Interval = tuple[float, float] | None
"""Mean and half the width of its 95 % confidence interval (NaN for a single value)."""

REFERENCE = "classp"
EXTENSIONS = {
    "extension_difference": "classp-matrix",
    "consolidated_difference": "classp-consolidated",
}
"""Further methods that the others are compared with, by the key of that column."""
_STREAM = ("benchmark", "scenario", "experiences", "model", "validation", "train_share")
"""What two settings must have in common to be compared seed by seed."""
_TITLE = ("benchmark", "scenario", "method")
"""What is said elsewhere than among the settings."""
_TERMINAL_WIDTH = 120


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        key: its name in the rows and in CSV.
        heading: its name in the other tables.
        meaning: one sentence for the reader.
        read: returns a result's value, None if the method has none.
        digits: decimals shown; None: as many as the value's size asks for.
        signed: show a plus.
        in_summary: show it in the terminal and in the main Markdown table, where room is scarce.
        spread: show the interval.
        optional: leave it out where no row has a value.
    """

    key: str
    heading: str
    meaning: str
    read: Callable[[Result], float | None]
    digits: int | None = 1
    signed: bool = False
    in_summary: bool = True
    spread: bool = True
    optional: bool = False


def _value(key: str, factor: float = 1.0) -> Callable[[Result], float | None]:
    return lambda result: None if result[key] is None else factor * result[key]


def _eval_seconds(result: Result) -> float:
    return float(np.mean(result["eval_seconds"]))


ACCURACIES = (
    Column(
        "average_accuracy",
        "accuracy %",
        "accuracy on test data after the last experience, mean over all experiences.",
        _value("average_accuracy", 100),
    ),
    Column(
        "difference",
        f"vs {REFERENCE}",
        f"accuracy less that of {REFERENCE} with the same seed, in points.",
        lambda result: None,  # needs another row's results
        signed=True,
    ),
    *(
        Column(
            key,
            f"vs {method}",
            f"likewise, less that of {method}.",
            lambda result: None,
            signed=True,
            optional=True,
        )
        for key, method in EXTENSIONS.items()
    ),
    Column(
        "forgetting",
        "forgetting %",
        "accuracy on an experience right after training on it less the accuracy at the end, mean "
        "over all experiences but the last.",
        _value("forgetting", 100),
    ),
    Column(
        "backward_transfer",
        "backward %",
        "backward transfer: the same change with the other sign, below 0 where experiences were "
        "forgotten.",
        _value("backward_transfer", 100),
        signed=True,
    ),
    Column(
        "forward_transfer",
        "forward %",
        "forward transfer: accuracy on an experience right before training on it less that of the "
        "untrained model, mean over all experiences but the first.",
        _value("forward_transfer", 100),
        signed=True,
    ),
    Column(
        "learning_accuracy",
        "learning %",
        "accuracy on an experience right after training on it, mean over all experiences.",
        _value("learning_accuracy", 100),
    ),
)
COSTS = (
    Column(
        "seconds_per_experience",
        "train s/exp",
        "seconds of training per experience, without evaluation; for joint all of it divided by "
        "the number of experiences.",
        _value("seconds_per_experience"),
        digits=None,
    ),
    Column(
        "eval_seconds",
        "eval s",
        "seconds to evaluate the whole test stream once.",
        _eval_seconds,
        digits=None,
        in_summary=False,
    ),
    Column(
        "state_bytes_per_parameter",
        "memory B/param",
        "bytes that the method keeps between experiences beside the model, for each of the "
        "model's parameters.",
        _value("state_bytes_per_parameter"),
        spread=False,
    ),
    Column(
        "peak_memory_mib",
        "peak MiB",
        "largest resident memory of the process, Python, torch and data included.",
        _value("peak_memory_bytes", 2**-20),
        digits=0,
        in_summary=False,
    ),
    Column(
        "peak_device_mib",
        "device peak MiB",
        "largest memory taken on the accelerator.",
        _value("peak_device_bytes", 2**-20),
        digits=0,
        in_summary=False,
    ),
)
COLUMNS = ACCURACIES + COSTS
"""The numbers of a row, in the order of the tables."""
SUMMARY = tuple(column for column in COLUMNS if column.in_summary)
"""The columns for the terminal and the main Markdown table."""


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
    for result in sorted(results, key=lambda result: result["config"]["seed"]):
        setting = json.dumps({**result["config"], "seed": None}, sort_keys=True)
        settings.setdefault(setting, []).append(result)
    runs = [settings[setting] for setting in sorted(settings)]
    configs = [group[0]["config"] for group in runs]
    labels = [_label(config, configs, _short) for config in configs]
    if len(set(labels)) < len(labels):
        labels = [_label(config, configs, str) for config in configs]
    return dict(zip(labels, runs, strict=True))


def _label(
    config: Mapping[str, Any], others: Sequence[Mapping[str, Any]], show: Callable[[Any], str]
) -> str:
    """Return the method's name, with the values that its other settings do not have."""
    siblings = [_flat(other) for other in others if other["method"] == config["method"]]
    differing = [
        f"{key} {show(value)}"
        for key, value in _flat(config).items()
        if any(str(sibling.get(key)) != str(value) for sibling in siblings)
    ]
    return ", ".join([config["method"], *differing])


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is worth telling of a config, the hyper-parameters among the rest."""
    skip = {"seed", "hyper"}
    if not config["validation"]:
        skip |= {"validation", "train_share"}  # always all of it then
    return {key: config[key] for key in config if key not in skip} | config["hyper"]


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):  # a value for each experience
        return "/".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return a row for each setting (all of a config but the seed), best accuracy first.

    Each row has, for the keys of :data:`COLUMNS`, an :data:`Interval` in the column's unit (None
    where a method has no such value), and

    * ``method``: the method's name, with what differs where it has several settings,
    * ``name``: the method's name alone,
    * ``n``: the number of seeds,
    * ``pairs``: how many of them the difference is over,
    * ``config``: the first run's,
    * ``source``: where its epochs, batch size and hyper-parameters come from,
    * ``curve``: intervals of the mean accuracy on the experiences so far, after each of them, %,
    * ``forgetting_curve``: intervals of the mean forgetting of the experiences before, from the
      second experience on, %; empty where there is only one evaluation,
    * ``matrix``: the mean accuracy matrix, %,
    * ``maps``: the first run's maps of the first layer's accumulators; empty without CLASSP.
    """
    groups = _by_setting(results)
    rows = []
    for label, runs in groups.items():
        config = runs[0]["config"]
        everyone = list(groups.values())
        differences = _differences(runs, everyone, REFERENCE)
        rows.append(
            {
                "method": label,
                "name": config["method"],
                "n": len(runs),
                "pairs": len(differences),
                "config": config,
                "source": runs[0]["setting"],
                **{column.key: _interval([column.read(run) for run in runs]) for column in COLUMNS},
                "difference": _interval(differences),
                **{
                    key: _interval(_differences(runs, everyone, method))
                    for key, method in EXTENSIONS.items()
                },
                "curve": [mean_interval(v) for v in zip(*map(_accuracy_so_far, runs), strict=True)],
                "forgetting_curve": [
                    mean_interval(v) for v in zip(*map(_forgetting_so_far, runs), strict=True)
                ],
                "maps": runs[0].get("accumulator_maps", []),
                "matrix": (100 * np.mean([run["accuracy_matrix"] for run in runs], 0)).tolist(),
            }
        )
    return sorted(rows, key=lambda row: -row["average_accuracy"][0])


def _interval(values: Sequence[float | None]) -> Interval:
    known = [value for value in values if value is not None]
    return mean_interval(known) if known and len(known) == len(values) else None


def _differences(
    runs: Sequence[Result], groups: Sequence[Sequence[Result]], reference: str
) -> list[float]:
    """Return the accuracy of ``runs`` less the reference's, for the seeds of both, %."""
    config = runs[0]["config"]
    references = [
        others
        for others in groups
        if others[0]["config"]["method"] == reference
        and all(others[0]["config"][key] == config[key] for key in _STREAM)
    ]
    # With several settings of the reference, none is the one to compare with.
    if len(references) != 1 or references[0] is runs:
        return []
    by_seed = {run["config"]["seed"]: run["average_accuracy"] for run in references[0]}
    return [
        100 * (run["average_accuracy"] - by_seed[run["config"]["seed"]])
        for run in runs
        if run["config"]["seed"] in by_seed
    ]


def _accuracy_so_far(result: Result) -> list[float]:
    matrix = result["accuracy_matrix"]
    if len(matrix) == 1:  # joint training has one value, after everything: a level to look up to
        return [100 * result["average_accuracy"]] * len(matrix[0])
    return [100 * float(np.mean(row[: i + 1])) for i, row in enumerate(matrix)]


def _forgetting_so_far(result: Result) -> list[float]:
    matrix = np.array(result["accuracy_matrix"])
    return [
        100 * float(np.mean([matrix[i, i] - matrix[k, i] for i in range(k)]))
        for k in range(1, len(matrix))
    ]


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column] = SUMMARY) -> str:
    """Return the rows as a Markdown table of these columns."""
    cells = _cells(rows, columns)
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    lines = [" | ".join(line) for line in [cells[0], rule, *cells[1:]]]
    return "\n".join(f"| {line} |" for line in lines)


def plain_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table of aligned columns, for a terminal 120 characters wide.

    Optional columns are left to the other tables.
    """
    cells = _cells(rows, [column for column in SUMMARY if not column.optional])
    table = [list(line) for line in zip(*map(_two_lines, cells[0]), strict=True)] + cells[1:]
    widths = [max(len(line[i]) for line in table) for i in range(len(cells[0]))]
    # What the numbers leave is for the methods; long labels go on in further lines.
    widths[0] = min(widths[0], max(12, _TERMINAL_WIDTH - sum(width + 2 for width in widths[1:])))
    lines = []
    for line in table:
        first, *more = wrap_label(line[0], widths[0]) or [""]
        numbers = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines += ["  ".join([first.ljust(widths[0]), *numbers]).rstrip(), *more]
    lines.insert(2, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _cells(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> list[list[str]]:
    """Return the headings and the rows as texts."""
    columns = _present(rows, columns)
    body = [
        [row["method"], str(row["n"]), *(cell(column, row[column.key]) for column in columns)]
        for row in rows
    ]
    return [["method", "n", *(column.heading for column in columns)], *body]


def _present(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> list[Column]:
    """Return the columns without the optional ones that no row has a value for."""
    return [c for c in columns if not c.optional or any(row[c.key] is not None for row in rows)]


def cell(column: Column, value: Interval) -> str:
    """Return a column's value as a text."""
    if value is None:
        return "–"
    mean, half = value
    # Of seconds, about three digits: milliseconds below one, none above a hundred.
    size = 3 if mean < 1 else 2 if mean < 10 else 1 if mean < 100 else 0
    digits = size if column.digits is None else column.digits
    sign = "+" if column.signed else ""
    text = f"{mean:{sign}z.{digits}f}"
    if not column.spread or math.isnan(half):
        return text
    return f"{text} ± {half:.{digits if half < 100 else 0}f}"


def _two_lines(text: str) -> tuple[str, str]:
    if len(text) <= 12:
        return "", text
    words = text.split()
    cut = min(
        range(1, len(words) + 1),
        key=lambda i: max(len(" ".join(words[:i])), len(" ".join(words[i:]))),
    )
    return " ".join(words[:cut]), " ".join(words[cut:])


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as CSV: each interval in two columns, its half width with ``_ci95``."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = _present(rows, COLUMNS)
    names = [name for column in columns for name in (column.key, f"{column.key}_ci95")]
    writer.writerow(["method", "n", *names, "pairs", "setting"])
    for row in rows:
        numbers = [x for column in columns for x in row[column.key] or (math.nan, math.nan)]
        shown = ["" if math.isnan(x) else f"{x:.6g}" for x in numbers]
        setting = _describe(_flat(row["config"]), _TITLE)
        writer.writerow([row["method"], row["n"], *shown, row["pairs"] or "", setting])
    return out.getvalue()


def _describe(values: Mapping[str, Any], skip: Sequence[str]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in values.items() if key not in skip)


def write_report(
    results: Sequence[Result],
    folder: Path,
    failures: Sequence[Result] = (),
) -> str:
    """Write ``table.md``, ``table.csv``, the figures and ``report.html``; return the table as text.

    The page gathers all of it in one file that opens without network.

    Args:
        results: results of one benchmark and scenario, at least one, in any order.
        folder: where to.
        failures: failed runs beside them; they are listed under the table.

    Raises:
        UserError: the folder cannot be written.
    """
    rows = table_rows(results)
    config = results[0]["config"]
    costs = [column for column in COSTS if any(row[column.key] for row in rows)]
    explained = [*_present(rows, ACCURACIES), *costs]
    title = f"{config['benchmark']}, {config['scenario']}-incremental"
    failed = sorted(describe_failure(failure) for failure in failures)
    missing = _missing_seeds(rows, results)
    sources = _sources(rows)
    commands = sorted({result.get("command", "") for result in results} - {""})
    common, own = _settings(rows)
    figures = draw_figures(rows, title)
    parts = [
        f"# {title}",
        sources,
        *(f"Made by `{command}`." for command in commands),
        markdown_table(rows),
        "Time and memory:",
        markdown_table(rows, costs),
        *(f"**Failed:** {line}" for line in failed),
        *(f"**{line}**" for line in missing),
        _INTERVALS,
        "\n".join(f"* {column.heading}: {column.meaning}" for column in explained),
        *(f"![{CAPTIONS[name]}]({name})" for name in figures),
        f"All runs: {common}. Settings:",
        "\n".join(f"* {method}: {values}" for method, values in own),
    ]
    page = render(
        figures,
        CAPTIONS,
        title=title,
        sources=sources,
        commands=commands,
        accuracies=_cells(rows, SUMMARY),
        costs=_cells(rows, costs),
        reference=REFERENCE,
        failed=failed,
        missing=missing,
        intervals=_INTERVALS,
        columns=explained,
        common=common,
        own=own,
        environments=_environments(results),
    )
    write_atomically(folder / "table.md", "\n\n".join(parts) + "\n")
    write_atomically(folder / "table.csv", csv_table(rows))
    for name, content in figures.items():
        write_atomically(folder / name, content)
    write_atomically(folder / "report.html", page)
    failed = [f"FAILED {line}" for line in failed]
    return "\n".join([title, sources, plain_table(rows), *failed, *missing])


_INTERVALS = (
    "n: number of seeds, one run each. After ±: half the width of the 95 % confidence "
    "interval (Student's t over the seeds); without it there is one seed, or the value does "
    "not depend on the seed. –: the method has no such value, or there is nothing to compare."
)


_SOURCES = {
    "searched": "searched on validation data",
    "transferred": "searched on validation data, with another model",
    "published": "from a paper",
    "default": "defaults, not tuned",
    "given": "given by the user",
}


def _sources(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return where the rows' settings come from, in a sentence."""
    by_source = {
        text: ", ".join(sorted(row["method"] for row in rows if row["source"] == source))
        for source, text in _SOURCES.items()
    }
    used = {text: methods for text, methods in by_source.items() if methods}
    if len(used) == 1:
        return f"Settings: {next(iter(used))}, for all methods."
    listed = "; ".join(f"{text}: {methods}" for text, methods in used.items())
    return f"Settings, NOT of the same kind for all methods: {listed}."


def _missing_seeds(rows: Sequence[Mapping[str, Any]], results: Sequence[Result]) -> list[str]:
    """Return a sentence if the rows are not over the same seeds."""
    seeds = len({result["config"]["seed"] for result in results})
    fewer = [f"{row['method']} {row['n']} of {seeds}" for row in rows if row["n"] < seeds]
    if not fewer:
        return []
    return [
        f"Not all rows have the same seeds: {'; '.join(fewer)}. The others failed or were not run; "
        f"a difference is over the seeds of both rows."
    ]


def _settings(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[str, str]]]:
    """Return what all runs have in common, and each row's own values with its label."""
    first = rows[0]["config"]
    same = [key for key in first if all(row["config"][key] == first[key] for row in rows)]
    common = {key: value for key, value in _flat(first).items() if key in same}
    own = [(row["method"], _describe(_flat(row["config"]), [*_TITLE, *common])) for row in rows]
    return _describe(common, _TITLE), own


def _environments(results: Sequence[Result]) -> list[str]:
    """Return a line for each set of versions and device that the runs were made with."""
    return sorted({_describe(result.get("environment", {}), ()) for result in results})
