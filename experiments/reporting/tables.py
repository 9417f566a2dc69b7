"""Tables of results: as rows, Markdown, CSV and text."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..protocol.methods import family_of
from .statistics import Interval, mean_interval

Result = Mapping[str, Any]
Row = Mapping[str, Any]

REFERENCE = "classp"
EXTENSIONS = {
    "extension_difference": "classp-matrix",
    "consolidated_difference": "classp-consolidated",
}
"""Further methods that the others are compared with, by the key of that column."""
_STREAM = ("benchmark", "scenario", "experiences", "model", "validation", "train_share")
"""What two settings must have in common to be compared seed by seed."""
TITLE_KEYS = ("benchmark", "scenario", "method")
"""Config keys that a list of settings leaves out, because the title or the label says them."""
_TERMINAL_WIDTH = 120


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        key: its name in the rows and in CSV.
        heading: its name in the other tables.
        meaning: one sentence for the reader.
        source: the result's key. Default: ``key``.
        factor: turns the result's unit into the column's.
        reference: the column is the accuracy less this method's with the same seed.
        digits: decimals shown; None: as many as the value's size asks for.
        signed: show a plus.
        in_summary: show it in the terminal and in the main Markdown table, where room is scarce.
        spread: show the interval.
        optional: leave it out where no row has a value.
        last: of a list take the last number, not the mean.
    """

    key: str
    heading: str
    meaning: str
    source: str = ""
    factor: float = 1.0
    reference: str = ""
    digits: int | None = 1
    signed: bool = False
    in_summary: bool = True
    spread: bool = True
    optional: bool = False
    last: bool = False

    def read(self, result: Result) -> float | None:
        """Return a result's value, the mean of a list; None where the method has none."""
        value = result[self.source or self.key]
        value = value[-1] if self.last else value
        return None if value is None else self.factor * float(np.mean(value))


ACCURACIES = (
    Column(
        "average_accuracy",
        "accuracy %",
        "accuracy on test data after the last experience, mean over all experiences.",
        factor=100,
    ),
    Column(
        "difference",
        f"vs {REFERENCE}",
        f"accuracy less that of {REFERENCE} with the same seed, in points.",
        reference=REFERENCE,
        signed=True,
    ),
    *(
        Column(
            key,
            f"vs {method}",
            f"likewise, less that of {method}.",
            reference=method,
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
        factor=100,
    ),
    Column(
        "backward_transfer",
        "backward %",
        "backward transfer: the same change with the other sign, below 0 where experiences were "
        "forgotten.",
        factor=100,
        signed=True,
    ),
    Column(
        "forward_transfer",
        "forward %",
        "forward transfer: accuracy on an experience right before training on it less that of the "
        "untrained model, mean over all experiences but the first.",
        factor=100,
        signed=True,
    ),
    Column(
        "learning_accuracy",
        "learning %",
        "accuracy on an experience right after training on it, mean over all experiences.",
        factor=100,
    ),
)
COSTS = (
    Column(
        "seconds_per_experience",
        "train s/exp",
        "seconds of training per experience, without evaluation; for joint all of it divided by "
        "the number of experiences.",
        digits=None,
    ),
    Column(
        "eval_seconds",
        "eval s",
        "seconds to evaluate the whole test stream once.",
        digits=None,
        in_summary=False,
    ),
    Column(
        "state_megabytes",
        "state MB",
        "millions of bytes that the method keeps between experiences beside the model, at the end; "
        "the data of joint is not counted.",
        source="state_bytes",
        factor=1e-6,
        digits=None,
        spread=False,
        last=True,
    ),
    Column(
        "state_bytes_per_parameter",
        "state B/param",
        "the same in bytes for each of the model's parameters, of which closed forms have others.",
        in_summary=False,
        spread=False,
    ),
    Column(
        "peak_memory_mib",
        "peak MiB",
        "largest resident memory of the process, Python, torch and data included.",
        source="peak_memory_bytes",
        factor=2**-20,
        digits=0,
        in_summary=False,
    ),
    Column(
        "peak_device_mib",
        "device peak MiB",
        "largest memory taken on the accelerator.",
        source="peak_device_bytes",
        factor=2**-20,
        digits=0,
        in_summary=False,
    ),
)
COLUMNS = ACCURACIES + COSTS
"""The numbers of a row, in the order of the tables."""
FAMILY = "what the method does, or keeps, against forgetting."
"""The meaning of the column of families."""
SUMMARY = tuple(column for column in COLUMNS if column.in_summary)
"""The columns for the terminal and the main Markdown table."""


def table_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return a row for each setting (all of a config but the seed), best accuracy first.

    Each row has, for the keys of :data:`COLUMNS`, an :data:`Interval` in the column's unit (None
    where a method has no such value), and

    * ``method``: the method's name, with what differs where it has several settings,
    * ``name``: the method's name alone,
    * ``n``: the number of seeds,
    * ``pairs``: how many of them the difference is over,
    * ``config``: the first run's,
    * ``source``: the kind of its setting,
    * ``sources``: where its epochs, batch size and hyper-parameters come from, by name; empty of
      records that do not say,
    * ``curve``: intervals of the mean accuracy on the experiences so far, after each of them, %,
    * ``forgetting_curve``: intervals of the mean forgetting of the experiences before, from the
      second experience on, %; empty where there is only one evaluation,
    * ``matrix``: the mean accuracy matrix, %,
    * ``maps``: the first run's maps of the first layer's accumulators; empty without CLASSP.
    """
    groups = _by_setting(results)
    accuracy = pd.DataFrame(
        {
            label: pd.Series({run["config"]["seed"]: run["average_accuracy"] for run in runs})
            for label, runs in groups.items()
        }
    )
    rows = []
    for label, runs in groups.items():
        config = runs[0]["config"]
        rows.append(
            {
                "method": label,
                "name": config["method"],
                "n": len(runs),
                "pairs": len(_differences(label, REFERENCE, groups, accuracy)),
                "config": config,
                "source": runs[0]["setting"],
                "sources": runs[0].get("sources", {}),
                **{
                    column.key: _interval(
                        _differences(label, column.reference, groups, accuracy)
                        if column.reference
                        else [column.read(run) for run in runs]
                    )
                    for column in COLUMNS
                },
                "curve": [mean_interval(v) for v in zip(*map(_accuracy_so_far, runs), strict=True)],
                "forgetting_curve": [
                    mean_interval(v) for v in zip(*map(_forgetting_so_far, runs), strict=True)
                ],
                "maps": runs[0].get("accumulator_maps") or [],
                "matrix": (100 * np.mean([run["accuracy_matrix"] for run in runs], 0)).tolist(),
            }
        )
    return sorted(rows, key=lambda row: -row["average_accuracy"][0])


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
    siblings = [flat(other) for other in others if other["method"] == config["method"]]
    differing = [
        f"{key} {show(value)}"
        for key, value in flat(config).items()
        if any(str(sibling.get(key)) != str(value) for sibling in siblings)
    ]
    return ", ".join([config["method"], *differing])


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a reader needs of a config, the hyper-parameters among the rest."""
    skip = {"seed", "hyper"}
    if not config["validation"]:
        skip |= {"validation", "train_share"}  # always all of it then
    return {key: config[key] for key in config if key not in skip} | config["hyper"]


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):  # a value for each experience
        return "/".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(values: Sequence[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return mean_interval(known) if known and len(known) == len(values) else None


def _differences(
    label: str, reference: str, groups: Mapping[str, Sequence[Result]], accuracy: pd.DataFrame
) -> list[float]:
    """Return a setting's accuracy less the reference method's, for the seeds of both, %."""
    config = groups[label][0]["config"]
    references = [
        other
        for other, runs in groups.items()
        if runs[0]["config"]["method"] == reference
        and all(runs[0]["config"][key] == config[key] for key in _STREAM)
    ]
    # With several settings of the reference, none is the one to compare with.
    if len(references) != 1 or references[0] == label:
        return []
    return (100 * (accuracy[label] - accuracy[references[0]]).dropna()).tolist()


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


def markdown_table(rows: Sequence[Row], columns: Sequence[Column] = SUMMARY) -> str:
    """Return the rows as a Markdown table of these columns."""
    return markdown(cells(rows, columns))


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return headings and lines of texts as a Markdown table, numbers to the right."""
    rule = ["---", *("---" if heading == "family" else "---:" for heading in lines[0][1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def plain_table(rows: Sequence[Row]) -> str:
    """Return the rows as a table of aligned columns, for a terminal 120 characters wide.

    Optional columns and families are left to the other tables.
    """
    columns = [column for column in SUMMARY if not column.optional]
    head, *body = cells(rows, columns, families=False)
    table = [list(line) for line in zip(*map(_two_lines, head), strict=True)] + body
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    # What the numbers leave is for the methods; long labels go on in further lines.
    widths[0] = min(widths[0], max(12, _TERMINAL_WIDTH - sum(width + 2 for width in widths[1:])))
    lines = []
    for line in table:
        first, *more = wrap_label(line[0], widths[0]) or [""]
        numbers = [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        lines += ["  ".join([first.ljust(widths[0]), *numbers]).rstrip(), *more]
    lines.insert(2, "-" * max(map(len, lines)))
    return "\n".join(lines)


def csv_table(rows: Sequence[Row]) -> str:
    """Return the rows as CSV: each interval in two columns, its half width with ``_ci95``."""
    records = []
    for row in rows:
        record: dict[str, Any] = {"method": row["method"], "family": family_of(row["name"])}
        record["n"] = row["n"]
        for column in present(rows, COLUMNS):
            record[column.key], record[f"{column.key}_ci95"] = row[column.key] or (None, None)
        setting = describe(flat(row["config"]), TITLE_KEYS)
        records.append({**record, "pairs": row["pairs"] or None, "setting": setting})
    return to_csv(records)


def to_csv(records: Sequence[Mapping[str, Any]], float_format: str = "%.6g") -> str:
    """Return the records as CSV with a line of headings; None and NaN are empty."""
    frame = pd.DataFrame(records)
    return str(frame.to_csv(index=False, float_format=float_format, lineterminator="\n"))


def cells(rows: Sequence[Row], columns: Sequence[Column], families: bool = True) -> list[list[str]]:
    """Return the headings and the rows as texts, with families where there are several."""
    columns = present(rows, columns)
    body = [
        [row["method"], str(row["n"]), *(cell(column, row[column.key]) for column in columns)]
        for row in rows
    ]
    lines = [["method", "n", *(column.heading for column in columns)], *body]
    return with_families(lines, [row["name"] for row in rows]) if families else lines


def with_families(lines: Sequence[Sequence[str]], methods: Sequence[str]) -> list[list[str]]:
    """Return a table with each method's family as second column, if there are several families.

    Args:
        lines: the headings, and a line for each method.
        methods: the methods' names.
    """
    families = [family_of(method) for method in methods]
    if len(set(families)) < 2:
        return [list(line) for line in lines]
    column = ["family", *families]
    return [[line[0], own, *line[1:]] for line, own in zip(lines, column, strict=True)]


def present(rows: Sequence[Row], columns: Sequence[Column]) -> list[Column]:
    """Return the columns without the optional ones that no row has a value for."""
    return [c for c in columns if not c.optional or any(row[c.key] is not None for row in rows)]


def cell(column: Column, value: Interval | None) -> str:
    """Return a column's value as a text."""
    if value is None:
        return "–"
    mean, half = value
    # Of seconds, about three digits: milliseconds below one, none above a hundred.
    size = 3 if mean < 1 else 2 if mean < 10 else 1 if mean < 100 else 0
    digits = size if column.digits is None else column.digits
    text = f"{mean:{'+' if column.signed else ''}z.{digits}f}"
    if not column.spread or math.isnan(half):
        return text
    return f"{text} ± {half:.{digits if half < 100 else 0}f}"


def describe(values: Mapping[str, Any], skip: Sequence[str] = ()) -> str:
    """Return "key value, key value" without the keys to skip."""
    return ", ".join(f"{key} {_short(value)}" for key, value in values.items() if key not in skip)


def wrap_label(label: str, width: int) -> list[str]:
    """Break "method, key value, key value" into lines, behind commas where possible.

    What is longer than a line is broken at its hyphens.
    """
    together = re.sub("(?<!,) ", "\N{NO-BREAK SPACE}", label)
    too_long = max(map(len, label.split()), default=0) > width
    lines = textwrap.wrap(together, width, break_on_hyphens=too_long)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _two_lines(text: str) -> tuple[str, str]:
    if len(text) <= 12:
        return "", text
    words = text.split()
    splits = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(1, len(words) + 1)]
    return min(splits, key=lambda halves: max(map(len, halves)))
