"""One setting of CLASSP for all benchmarks: where the library's defaults come from.

Every trial trains with the same values on all of :data:`PLACES`, on parts of the training data, and
is measured on validation data cut from it. Its value is the mean over the benchmarks of the mean
accuracy over their scenarios.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FixedTrial, Trial
from tqdm import tqdm

from ..errors import DivergedError, UserError
from ..protocol.benchmarks import BENCHMARKS, require_data
from ..protocol.config import Hyper
from ..protocol.methods import rule_space
from ..protocol.tuned_settings import make_config, searched_setting
from ..running.files import make_folder, write_atomically
from ..running.run import run
from .search import FIRST_TUNING_SEED, ended_trials, open_study

PLACES: dict[str, dict[str, Any]] = {
    "split-digits": {"train_share": 1.0},
    "split-mnist": {"train_share": 1.0},
    "split-fmnist": {"train_share": 0.5},
    "permuted-mnist": {"train_share": 0.5, "experiences": 5},
    "split-cifar10": {"train_share": 0.1},
}
"""The benchmarks, each with all its scenarios, and what a run takes of it. The epochs are the
benchmarks' own: ten for the digits, else one. The parts differ, so that experiences are of few
steps and of many: what learns fast enough in the former forgets too much in the latter."""


FORMER: Hyper = {"lr": 0.01, "threshold": 0.0, "epsilon": 1e-4, "power": 1.0}
"""The library's defaults before this search."""


def search_defaults(
    trials: int = 40,
    first: Sequence[tuple[float, float, float]] = (),
    output: Path = Path("results/defaults"),
    data_root: Path | None = None,
) -> str:
    """Search until the folder has so many trials, and write ``defaults.csv``.

    Args:
        trials: their number.
        first: lr, epsilon and power of what a new search tries first, with threshold 0. Default:
            :data:`FORMER` and the searched settings.
        output: the folder that keeps the trials.
        data_root: folder of the datasets.

    Returns:
        The best mean accuracy and its hyper-parameters, to print.

    Raises:
        UserError: the data is missing, the folder holds another search, or a value in ``first`` is
            none that the search could suggest.
    """
    for name in PLACES:
        require_data(name, BENCHMARKS[name].scenarios[0], data_root)
    tried: list[Hyper] = [
        {"lr": lr, "threshold": 0.0, "epsilon": epsilon, "power": power}
        for lr, epsilon, power in first
    ]
    enqueued = [_parameters(hyper) for hyper in tried or (FORMER, *_searched())]
    make_folder(output)
    study = open_study("defaults", output, known=())
    if study.user_attrs.get("places", PLACES) != PLACES:
        raise UserError(f"{output} holds a search on other benchmarks; give another --output")
    study.set_user_attr("places", PLACES)
    if not study.trials:
        for parameters in enqueued:
            study.enqueue_trial(parameters)
    with tqdm(total=trials, unit="trial", desc="search defaults") as bar:
        while (done := len(ended_trials(study))) < trials:
            bar.update(done - bar.n)
            study.sampler = optuna.samplers.TPESampler(seed=done)
            study.optimize(lambda trial: _objective(trial, data_root), n_trials=1)
        bar.update(trials - bar.n)
    write_atomically(output / "defaults.csv", _trials_csv(study))
    best = study.best_trial
    return f"{best.value:.4f} {json.dumps(best.user_attrs['hyper'])}"


def _parameters(hyper: Hyper) -> dict[str, Any]:
    """Return what the space's suggestions would have to be."""
    names = ("lr", "epsilon", "power") + ("threshold",) * (hyper["threshold"] > 0)
    parameters = {"sparse": hyper["threshold"] > 0} | {name: hyper[name] for name in names}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rule_space(FixedTrial(parameters))
    except (ValueError, UserWarning) as error:
        raise UserError(f"{parameters} is outside of what is searched ({error})") from None
    return parameters


def _searched() -> Iterator[Hyper]:
    """Yield what the searches chose for CLASSP on each of the benchmarks."""
    for name in PLACES:
        for scenario in BENCHMARKS[name].scenarios:
            setting = searched_setting(name, scenario, "classp")
            if setting is not None:
                yield setting.hyper


def _objective(trial: Trial, data_root: Path | None) -> float:
    """Return the mean over the benchmarks of the mean accuracy over their scenarios."""
    hyper = rule_space(trial)
    trial.set_user_attr("hyper", hyper)
    found = {
        name: {
            f"{name}/{scenario}": _accuracy(name, scenario, hyper, part, data_root)
            for scenario in BENCHMARKS[name].scenarios
        }
        for name, part in PLACES.items()
    }
    accuracies = {place: value for own in found.values() for place, value in own.items()}
    trial.set_user_attr("accuracies", accuracies)
    return fmean(fmean(own.values()) for own in found.values())


def _accuracy(
    name: str, scenario: str, hyper: dict[str, Any], part: dict[str, Any], data_root: Path | None
) -> float:
    """Return the accuracy of a run on validation data; 0 if the training diverges."""
    spec = BENCHMARKS[name]
    config = make_config(
        name,
        scenario,
        "classp",
        FIRST_TUNING_SEED,
        {**hyper, "paper_phases": False},
        epochs=spec.epochs,
        batch_size=spec.batch_size,
        validation=True,
        **part,
    )
    try:
        return float(run(config, data_root)["average_accuracy"])
    except DivergedError:
        return 0.0


def _trials_csv(study: optuna.Study) -> str:
    rows = [
        {
            "trial": number,
            "mean_accuracy": trial.value,
            **trial.user_attrs["accuracies"],
            "hyper": json.dumps(trial.user_attrs["hyper"]),
        }
        for number, trial in enumerate(ended_trials(study))
    ]
    return pd.DataFrame(rows).to_csv(index=False, float_format="%.6f", lineterminator="\n")
