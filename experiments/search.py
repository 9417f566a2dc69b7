"""Choose every method's settings on validation data, with the same budget for each."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState
from tqdm import tqdm

from experiments.config import Setting
from experiments.methods import make_config
from experiments.processes import make_pool, stop
from experiments.resultfiles import make_folder, write_atomically
from experiments.run import run

FIRST_TUNING_SEED = 1000
"""The seeds from here on are the search's; final runs use the seeds from 0 on."""

_SPACES: dict[str, Callable[[Trial], dict[str, Any]]] = {
    "naive": lambda t: {"lr": _log(t, "lr", 1e-5, 1.0)},
    "adagrad": lambda t: {"lr": _log(t, "lr", 1e-5, 0.3)},
    "ewc": lambda t: {
        "lr": _log(t, "lr", 1e-5, 1.0),
        "ewc_lambda": _log(t, "ewc_lambda", 1e-3, 1e7),
    },
    "joint": lambda t: {"lr": _log(t, "lr", 1e-5, 1.0)},
    "classp": lambda t: {
        "lr": _log(t, "lr", 1e-4, 0.3),
        "threshold": _log(t, "threshold", 1e-8, 1e-3) if _flag(t, "sparse") else 0.0,
        "epsilon": _log(t, "epsilon", 1e-6, 5.0),
        "power": t.suggest_float("power", 0.5, 3.0),
        "paper_phases": _flag(t, "paper_phases"),
    },
}
"""Each method's space. Learning rates reach down to where a method hardly moves, because slow
learning alone forgets less; λ spans ten orders of magnitude, because Avalanche's Fisher depends on
the batch size."""


optuna.logging.set_verbosity(optuna.logging.CRITICAL)


def _log(trial: Trial, name: str, low: float, high: float) -> float:
    return trial.suggest_float(name, low, high, log=True)


def _flag(trial: Trial, name: str) -> bool:
    return trial.suggest_categorical(name, [False, True])


def search(
    benchmark: str,
    scenario: str,
    methods: Sequence[str],
    folder: Path,
    trials: int,
    tuning_seeds: int,
    epochs_choices: Sequence[int],
    batch_size: int,
    data_root: Path | None = None,
    train_share: float = 1.0,
    jobs: int = 1,
) -> dict[str, Setting]:
    """Search each method's settings; continue a search that was cut off in the same folder.

    A trial's value is the average accuracy on validation data, mean over the tuning seeds; a
    trial whose training diverges to non-finite gradients fails and counts. The sampler is
    Optuna's TPE, seeded by the number of trials done.

    Args:
        benchmark: the benchmark's name.
        scenario: the scenario's name.
        methods: the methods' names.
        folder: receives ``METHOD.journal`` (Optuna's storage), ``trials.csv`` and
            ``settings.json``.
        trials: trials for each method.
        tuning_seeds: number of seeds that each trial is run with.
        epochs_choices: see :class:`experiments.benchmarks.Benchmark`.
        batch_size: of every trial.
        data_root: see :func:`experiments.benchmarks.make_benchmark`.
        train_share: see :class:`experiments.config.RunConfig`.
        jobs: methods searched at the same time.

    Returns:
        The best setting of each method.
    """
    for method in methods:
        config = make_config(benchmark, scenario, method, FIRST_TUNING_SEED, Setting(1, 1, {}))
        replace(config, validation=True, train_share=train_share)  # refuses a wrong share
    make_folder(folder)
    common = (benchmark, scenario, folder, trials, tuning_seeds, tuple(epochs_choices), batch_size)
    with (
        make_pool(jobs) as pool,
        tqdm(total=len(methods), unit="method", desc=f"search {benchmark} {scenario}") as bar,
    ):
        futures = [pool.submit(_search_method, m, *common, data_root, train_share) for m in methods]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            stop(pool)
            raise
    studies = {method: _study(method, folder) for method in methods}
    write_atomically(folder / "trials.csv", _trials_csv(studies))
    settings = {method: _best(study, batch_size) for method, study in studies.items()}
    chosen = {f"{benchmark}/{scenario}": {m: s.as_dict() for m, s in settings.items()}}
    write_atomically(folder / "settings.json", json.dumps(chosen, indent=1) + "\n")
    return settings


def _search_method(
    method: str,
    benchmark: str,
    scenario: str,
    folder: Path,
    trials: int,
    tuning_seeds: int,
    epochs_choices: tuple[int, ...],
    batch_size: int,
    data_root: Path | None,
    train_share: float,
) -> None:

    def accuracy(trial: Trial) -> float:
        epochs = trial.suggest_categorical("epochs", list(epochs_choices))
        hyper = _SPACES[method](trial)
        trial.set_user_attr("hyper", hyper)
        total = 0.0
        for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + tuning_seeds):
            config = make_config(
                benchmark,
                scenario,
                method,
                seed,
                Setting(epochs, batch_size, {}),
                hyper,
                epochs=epochs,
                batch_size=batch_size,
                validation=True,
                train_share=train_share,
            )
            total += run(config, data_root)["average_accuracy"]
        return total / tuning_seeds

    study = _study(method, folder)
    while (done := len(_ended(study))) < trials:
        study.sampler = optuna.samplers.TPESampler(seed=done)
        # RuntimeError: CLASSP's word for non-finite gradients.
        study.optimize(accuracy, n_trials=1, catch=(RuntimeError,))


def _study(method: str, folder: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(folder / f"{method}.journal")))
    return optuna.create_study(
        study_name=method, storage=storage, direction="maximize", load_if_exists=True
    )


def _ended(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    # A trial that a killed process had begun stays RUNNING and does not count.
    return study.get_trials(states=(TrialState.COMPLETE, TrialState.FAIL))


def _best(study: optuna.Study, batch_size: int) -> Setting:
    best = study.best_trial
    return Setting(best.params["epochs"], batch_size, best.user_attrs["hyper"])


def _trials_csv(studies: dict[str, optuna.Study]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "trial", "validation_accuracy", "epochs", "hyper"])
    for method, study in studies.items():
        for number, trial in enumerate(_ended(study)):
            value = "" if trial.value is None else f"{trial.value:.6f}"
            hyper = json.dumps(trial.user_attrs.get("hyper", {}))
            writer.writerow([method, number, value, trial.params["epochs"], hyper])
    return out.getvalue()
