"""How far the accuracy depends on each hyper-parameter: one is varied, the others stay.

The others keep what the search chose. The runs have the final seeds and test data, so what is seen
here may choose nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import UserError
from ..protocol.config import RunConfig
from ..protocol.methods import count_steps
from ..protocol.tuned_settings import make_config, searched_setting
from ..reporting.figures import draw_sensitivity
from ..reporting.statistics import mean_interval
from ..running.compare import run_all
from ..running.files import write_atomically
from ..running.records import Results

RATES = (0.25, 0.5, 2.0, 4.0)
"""What a learning rate is multiplied by."""

FACTORS = (0.01, 0.1, 10.0, 100.0)
"""What any other hyper-parameter is multiplied by."""

STEPS = (-0.5, -0.25, 0.25, 0.5)
"""What is added to the power."""

THRESHOLDS = (1e-8, 1e-6, 1e-4)
"""What is tried where the search chose 0."""

COLUMNS = (
    "method",
    "key",
    "value",
    "searched",
    "n",
    "average_accuracy",
    "average_accuracy_ci95",
    "difference",
    "difference_ci95",
)
"""The columns of ``sensitivity.csv``."""


def values_around(key: str, value: Any) -> list[Any]:
    """Return the values of a hyper-parameter that are compared, the one given among them."""
    if isinstance(value, bool):
        return [False, True]
    if key == "power":
        others = [value + step for step in STEPS]
    elif value == 0:
        others = list(THRESHOLDS)
    else:
        factors = RATES if key == "lr" else FACTORS
        others = [type(value)(value * factor) for factor in factors]
    return sorted([value, *others])


def variations(
    benchmark: str, scenario: str, method: str, seed: int
) -> Iterator[tuple[str, RunConfig]]:
    """Yield a hyper-parameter's name and a config, for each of its values.

    What a method refuses is left out.

    Raises:
        UserError: nothing was searched for this method.
    """
    searched = searched_setting(benchmark, scenario, method)
    if searched is None:
        raise UserError(f"nothing was searched for {method} on {benchmark}, {scenario}")
    for key, value in searched.hyper.items():
        for other in values_around(key, value):
            try:
                yield key, make_config(benchmark, scenario, method, seed, {key: other})
            except UserError:
                continue


def write_sensitivity(
    benchmark: str = "split-mnist",
    scenario: str = "class",
    methods: Sequence[str] = ("classp", "classp-matrix"),
    seeds: int = 5,
    output: Path | None = None,
    jobs: int | None = None,
    data_root: Path | None = None,
    command: str = "",
) -> str:
    """Vary each searched hyper-parameter and write ``sensitivity.csv`` and ``sensitivity.png``.

    Runs that are done are not done again.

    Args:
        benchmark: the benchmark's name.
        scenario: the scenario's name.
        methods: the methods' names.
        seeds: number of seeds, from 0 on.
        output: the folder. Default: ``results/sensitivity-BENCHMARK-SCENARIO``.
        jobs: runs at a time. Default: as many as cores.
        data_root: folder of the datasets.
        command: saved with each result.

    Returns:
        A line for each hyper-parameter, its values (*: searched) with their accuracies.

    Raises:
        UserError: a method was not searched, the data is missing, or the searched setting failed.
    """
    folder = output or Path("results") / f"sensitivity-{benchmark}-{scenario}"
    groups: dict[tuple[str, str, Any], list[RunConfig]] = {}
    searched: dict[str, list[RunConfig]] = {}
    for method, seed in itertools.product(dict.fromkeys(methods), range(seeds)):
        searched.setdefault(method, []).append(make_config(benchmark, scenario, method, seed))
        for key, config in variations(benchmark, scenario, method, seed):
            groups.setdefault((method, key, config.hyper[key]), []).append(config)
    results = Results(folder)
    configs = [config for group in groups.values() for config in group]
    run_all(configs, results, data_root, jobs, count_steps, command)
    accuracy = {
        key: 100 * result["average_accuracy"] for key, result in results.finished(configs).items()
    }
    rows = [
        _row(method, key, value, group, searched[method], accuracy)
        for (method, key, value), group in groups.items()
    ]
    for row in rows:
        if row["searched"] and not row["n"]:
            raise UserError(
                f"no run of {row['method']} with its searched setting ended; see {folder}"
            )
    write_atomically(folder / "sensitivity.csv", _csv(rows))
    title = f"{benchmark}, {scenario}-incremental"
    write_atomically(folder / "sensitivity.png", draw_sensitivity(rows, title))
    return _summary(rows)


def _row(
    method: str,
    key: str,
    value: Any,
    configs: Sequence[RunConfig],
    searched: Sequence[RunConfig],
    accuracy: Mapping[str, float],
) -> dict[str, Any]:
    """Return what is in :data:`COLUMNS`; no more than ``n`` where no run ended."""
    pairs = [
        (accuracy[config.key()], accuracy[own.key()])
        for config, own in zip(configs, searched, strict=True)
        if config.key() in accuracy and own.key() in accuracy
    ]
    row = {"method": method, "key": key, "value": value, "searched": configs == searched}
    row["n"] = len(pairs)
    if pairs:
        mean = mean_interval([varied for varied, _ in pairs])
        difference = mean_interval([varied - own for varied, own in pairs])
        row |= dict(zip(COLUMNS[5:], (*mean, *difference), strict=True))
    return row


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    frame = pd.DataFrame(rows, columns=COLUMNS)
    # A column of numbers and truth values is not formatted by pandas.
    frame["value"] = [f"{v:.6g}" if isinstance(v, float) else v for v in frame["value"]]
    return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    lines: dict[str, list[str]] = {}
    for row in rows:
        value = row["value"]
        shown = str(value) if isinstance(value, bool) else f"{value:.3g}"
        accuracy = f"{row['average_accuracy']:.1f}" if row["n"] else "no run ended"
        cells = lines.setdefault(f"{row['method']}, {row['key']}", [])
        cells.append(f"{shown}{'*' * row['searched']}: {accuracy}")
    return "\n".join(f"{title}: {', '.join(cells)}" for title, cells in lines.items())
