"""Whether a part of the training data ranks settings as all of it does.

Where a search trained on a part (``--train-share`` below 1), its trials that were not pruned are
run again with all of the training data, the same seeds and otherwise the same settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import pandas as pd
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import spearmanr

from ..errors import UserError
from ..protocol.config import RunConfig
from ..running.compare import run_all
from ..running.files import write_atomically
from ..running.records import Results
from .search import config_of, open_study


def rank_subset(
    folder: Path, methods: Sequence[str], jobs: int | None = None, data_root: Path | None = None
) -> str:
    """Run a search's trials again with all of the training data, and write ``subset_ranking.csv``.

    Accuracies are means over the tuning seeds; a run that diverges with all of the data counts
    as 0.

    Args:
        folder: where the journals of the search are.
        methods: the methods' names.
        jobs: runs at a time. Default: as many as cores.
        data_root: folder of the datasets.

    Returns:
        A line for each method: Spearman's rank correlation, and what the choice by the part costs.

    Raises:
        UserError: the folder holds no search of a method, one with all of the data, or less than
            two trials that were not cut short.
    """
    trials = [
        (method, trial.number, trial.value, configs)
        for method in methods
        for trial, configs in _trials(folder, method)
    ]
    results = Results(folder / "subset_ranking")
    run_all([c for *_, configs in trials for c in configs], results, data_root, jobs)
    found = {key: result.get("average_accuracy", 0.0) for key, result in results.by_key().items()}
    rows = [
        (method, number, part, fmean(found[config.key()] for config in configs))
        for method, number, part, configs in trials
    ]
    frame = pd.DataFrame(rows, columns=["method", "trial", "part", "whole"])
    write_atomically(folder / "subset_ranking.csv", frame.to_csv(index=False, lineterminator="\n"))
    return summary(frame)


def _trials(folder: Path, method: str) -> Iterator[tuple[FrozenTrial, list[RunConfig]]]:
    """Yield the trials that were not cut short, each with its configs for all of the data."""
    if not (folder / f"{method}.journal").is_file():
        raise UserError(f"{folder} holds no search of {method}; name one with --methods")
    study = open_study(method, folder)
    arguments = study.user_attrs["arguments"]
    if arguments["train_share"] == 1:
        raise UserError(f"{folder} holds a search of {method} with all of the data already")
    whole = study.get_trials(states=(TrialState.COMPLETE,))
    if len(whole) < 2:
        raise UserError(f"{folder} has no two trials of {method} to rank; search more")
    for trial in whole:
        epochs, hyper = trial.params["epochs"], trial.user_attrs["hyper"]
        yield (
            trial,
            [
                config_of(study, epochs, hyper, seed, train_share=1.0)
                for seed in range(arguments["tuning_seeds"])
            ],
        )


def summary(frame: pd.DataFrame) -> str:
    """Return a line for each method."""
    lines = []
    for method, own in frame.groupby("method", sort=False):
        correlation = spearmanr(own["part"], own["whole"]).statistic
        cost = own["whole"].max() - own["whole"].iloc[own["part"].argmax()]
        lines.append(
            f"{method}: {len(own)} trials, rank correlation {correlation:.2f}, the choice costs "
            f"{100 * cost:.1f} points"
        )
    return "\n".join(lines)
