"""Tell whether a part of the training data ranks settings as all of it does.

    python -m experiments.share FOLDER --methods METHOD ... [--jobs N] [--data-root FOLDER]

FOLDER holds a search with ``--train-share`` below 1. Its trials, those that were not cut short,
are run again with all of the training data (validation data aside), the same seed and otherwise
the same settings. ``FOLDER/share.csv`` has both accuracies of every trial. Printed are, for each
method, Spearman's rank correlation of the two and what the choice by the part costs: the best
accuracy with all of the data, less that of the trial that is best with the part. What is done is
kept, so the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.trial import TrialState
from scipy.stats import spearmanr

from experiments.compare import run_all
from experiments.config import RunConfig
from experiments.errors import UserError
from experiments.processes import available_cores
from experiments.resultfiles import Results, write_atomically
from experiments.search import config_of, open_study


def compare_shares(
    folder: Path, methods: Sequence[str], jobs: int, data_root: Path | None = None
) -> list[dict[str, Any]]:
    """Run the trials again and return, for each, ``method``, ``trial``, ``part`` and ``whole``.

    A trial that diverges with all of the data has a ``whole`` of 0.

    Raises:
        UserError: the folder holds no search of a method, or one with all of the data.
    """
    trials: dict[tuple[str, int], tuple[float, RunConfig]] = {}
    for method in methods:
        if not (folder / f"{method}.journal").is_file():
            raise UserError(f"{folder} holds no search of {method}; name one with --methods")
        study = open_study(method, folder)
        share = study.user_attrs["arguments"]["train_share"]
        if share == 1:
            raise UserError(f"{folder} holds a search of {method} with all of the data already")
        for trial in study.get_trials(states=(TrialState.COMPLETE,)):
            epochs, hyper = trial.params["epochs"], trial.user_attrs["hyper"]
            config = config_of(study, epochs, hyper, 0, train_share=1.0)
            trials[method, trial.number] = (trial.value or 0.0, config)
    results = Results(folder / "share")
    run_all([config for _, config in trials.values()], results, data_root, jobs)
    found = {
        RunConfig.from_dict(result["config"]).key(): result.get("average_accuracy", 0.0)
        for result in results.load()
    }
    return [
        {"method": method, "trial": number, "part": part, "whole": found[config.key()]}
        for (method, number), (part, config) in trials.items()
    ]


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return a line for each method."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        part, whole = ([row[key] for row in own] for key in ("part", "whole"))
        cost = max(whole) - max(own, key=lambda row: row["part"])["whole"]
        lines.append(
            f"{method}: {len(own)} trials, rank correlation {spearmanr(part, whole).statistic:.2f},"
            f" the choice costs {100 * cost:.1f} points"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.share",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where the journals of the search are")
    parser.add_argument("--methods", nargs="+", required=True, metavar="METHOD")
    parser.add_argument("--jobs", type=int, default=available_cores(), metavar="N")
    parser.add_argument("--data-root", type=Path, metavar="FOLDER", help="folder of the datasets")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    try:
        rows = compare_shares(options.folder, options.methods, options.jobs, options.data_root)
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(options.folder / "share.csv", out.getvalue())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
