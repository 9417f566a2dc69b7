"""Choose every method's settings on validation data, with the same budget for each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import optuna
import pandas as pd
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import Trial, TrialState
from tqdm import tqdm

from ..errors import DivergedError, UserError, one_line
from ..protocol.benchmarks import require_data
from ..protocol.config import Hyper, RunConfig
from ..protocol.methods import METHODS
from ..protocol.tuned_settings import (
    FIRST_EXPERIENCE,
    STREAM,
    Setting,
    explain,
    make_config,
    place_of,
    settings_json,
)
from ..running.files import make_folder, write_atomically
from ..running.processes import WorkerDiedError, in_processes
from ..running.run import run

FIRST_TUNING_SEED = 1000
"""The seeds from here on are the search's; final runs use the seeds from 0 on."""


FEWEST_TO_COMPARE = 8
"""Trials that must have come as far before one can be pruned."""


optuna.logging.set_verbosity(optuna.logging.CRITICAL)


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
    finalists: int = 0,
    finalist_seeds: int = 3,
    held: Mapping[str, Hyper] | None = None,
    start: str = "spawn",
    on: str = STREAM,
    **fixed: Any,
) -> dict[str, Setting]:
    """Search each method's settings; continue a search that was cut off in the same folder.

    A trial's value is the average accuracy on validation data, mean over the tuning seeds; a
    trial whose training diverges has none, and counts. So does one that is pruned: after half of
    the experiences (not after the first), with the first tuning seed, its mean accuracy on them is
    compared with that of the earlier trials; below their median, if there are
    :data:`FEWEST_TO_COMPARE`, it ends. The sampler is Optuna's TPE, seeded by the number of trials
    begun.

    With ``finalists`` the best trials are run with more seeds, and the best mean over all their
    seeds is chosen: a setting that trains well with one seed and fails with another is found out.
    They train on all of the data; where the trials had a part of it, the mean is of these runs
    alone, since a part can rank settings otherwise.

    Args:
        benchmark: the benchmark's name.
        scenario: the scenario's name.
        methods: the methods' names.
        folder: receives ``METHOD.journal`` (Optuna's storage), and ``trials.csv`` and
            ``settings.json`` of all methods searched there.
        trials: trials for each method.
        tuning_seeds: number of seeds that each trial is run with.
        epochs_choices: see :class:`experiments.protocol.benchmarks.Benchmark`.
        batch_size: of every trial.
        data_root: see :func:`experiments.protocol.benchmarks.make_benchmark`.
        train_share: see :class:`experiments.protocol.config.RunConfig`.
        jobs: methods searched at the same time.
        finalists: how many trials of each method are run with more seeds.
        finalist_seeds: with how many more.
        held: by method, hyper-parameters that are not searched, with their values.
        start: see :func:`experiments.running.processes.in_processes`.
        on: what a trial sees, ``stream``, or ``first-experience``: it trains on the first
            experience alone and is measured on validation data of it. Hyper-parameters that change
            nothing there (:attr:`.methods.Method.unseen`) keep their defaults, and of trials that
            are equally good the one with the fewest epochs and then the lowest lr is best.
        **fixed: other RunConfig fields for every trial, such as ``model``.

    Returns:
        The best setting of each method.

    Raises:
        UserError: the data is missing, the folder holds another search, or no trial of a method
            succeeded.
    """
    place, seed = (benchmark, scenario), FIRST_TUNING_SEED
    for method in methods:  # wrong arguments are refused before anything is written
        hyper = (held or {}).get(method)
        common: dict[str, Any] = {"validation": True, "train_share": train_share, **fixed}
        make_config(*place, method, seed, hyper, "defaults", **common)
    make_folder(folder)
    require_data(benchmark, scenario, data_root, fixed.get("model"))
    arguments: dict[str, Any] = {
        "benchmark": benchmark,
        "scenario": scenario,
        "tuning_seeds": tuning_seeds,
        "epochs_choices": list(epochs_choices),
        "batch_size": batch_size,
        "train_share": train_share,
        "fixed": fixed,
    }
    if on != STREAM:  # journals of before name nothing
        arguments["on"] = on
    searched_before = {path.stem for path in folder.glob("*.journal")}
    for method in sorted(searched_before - set(methods)):
        open_study(method, folder)  # it is read at the end: one that cannot be read is known now
    for method in methods:
        study = open_study(method, folder)
        own = {"held": dict(held[method])} if held and method in held else {}
        before = study.user_attrs.get("arguments", arguments | own)
        if before != arguments | own:
            raise UserError(
                f"{folder} holds a search of {method} with other arguments ({before}); give "
                f"another --output"
            )
        study.set_user_attr("arguments", arguments | own)
    tasks = [(method, folder, trials, finalists, finalist_seeds, data_root) for method in methods]
    steps = trials + finalists * finalist_seeds
    with _Bar(methods, steps, f"search {benchmark} {scenario}") as bar:
        searches = in_processes(_search_method, tasks, jobs, told=bar.show, start=start)
        with closing(searches) as ended:
            for number, outcome in ended:
                if isinstance(outcome, WorkerDiedError):
                    raise UserError(f"the search of {methods[number]}: {outcome}")
                bar.show(number, (steps, None))
    searched = [path.stem for path in sorted(folder.glob("*.journal"))]
    # Another search of other methods may have just begun.
    studies = {m: s for m in searched if ended_trials(s := open_study(m, folder))}
    write_atomically(folder / "trials.csv", _trials_csv(studies))
    settings = {method: _best(study, batch_size) for method, study in studies.items()}
    chosen = {place_of(*place, fixed.get("model")): settings}
    write_atomically(folder / "settings.json", settings_json(chosen))
    return {method: settings[method] for method in methods}


class _Bar(tqdm):
    """A progress bar over the trials of all methods, with the best one so far."""

    def __init__(self, methods: Sequence[str], steps: int, description: str) -> None:
        super().__init__(total=steps * len(methods), unit="trial", desc=description)
        self._methods = methods
        self._done = dict.fromkeys(range(len(methods)), 0)
        self._best: tuple[float, str] | None = None

    def show(self, number: int, told: tuple[int, float | None]) -> None:
        """Show how many of a method's trials and finalists' runs are done, and its best value."""
        self._done[number], value = told
        if value is not None and (self._best is None or value > self._best[0]):
            self._best = value, self._methods[number]
            self.set_postfix_str(f"best {100 * value:.1f} % by {self._methods[number]}")
        self.update(sum(self._done.values()) - self.n)


def _search_method(
    method: str,
    folder: Path,
    trials: int,
    finalists: int,
    finalist_seeds: int,
    data_root: Path | None,
    send: Callable[[Any], None],
) -> None:
    study = open_study(method, folder)

    def tell(further: int = 0) -> None:
        best = max((trial.value or 0.0 for trial in _whole_trials(study)), default=None)
        send((min(len(ended_trials(study)), trials) + further, best))

    tell()
    while len(ended_trials(study)) < trials:
        # With those that another process has begun: it would begin with the same values.
        begun = len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.TPESampler(seed=begun)
        study.optimize(lambda trial: _objective(trial, data_root), n_trials=1)
        tell()
    _run_finalists(study, finalists, finalist_seeds, data_root, tell)


def config_of(
    study: optuna.Study, epochs: int, hyper: Hyper, seed: int, train_share: float | None = None
) -> RunConfig:
    """Return the config of a search's run.

    Args:
        study: the search of one method.
        epochs: the trial's.
        hyper: the trial's.
        seed: number of the tuning seed, from 0.
        train_share: another share of the training data than the search's.
    """
    arguments = study.user_attrs["arguments"]
    return make_config(
        arguments["benchmark"],
        arguments["scenario"],
        study.study_name,
        FIRST_TUNING_SEED + seed,
        hyper,
        "defaults",
        epochs=epochs,
        batch_size=arguments["batch_size"],
        validation=True,
        train_share=train_share or arguments["train_share"],
        first_only=arguments.get("on") == FIRST_EXPERIENCE,
        **arguments["fixed"],
    )


def _objective(trial: Trial, data_root: Path | None) -> float:
    """Return a trial's mean accuracy over the tuning seeds.

    Raises:
        TrialPruned: it diverged, or was pruned.
    """
    study = trial.study
    arguments = study.user_attrs["arguments"]
    epochs = trial.suggest_categorical("epochs", arguments["epochs_choices"])
    method = METHODS[study.study_name]
    unseen = method.unseen if arguments.get("on") == FIRST_EXPERIENCE else ()
    suggested = {key: value for key, value in method.space(trial).items() if key not in unseen}
    hyper = suggested | arguments.get("held", {})
    trial.set_user_attr("hyper", hyper)
    values: list[float] = []
    for seed in range(arguments["tuning_seeds"]):
        config = config_of(study, epochs, hyper, seed)
        half = max(2, config.experiences // 2)
        report = None if values else partial(_report_and_prune, trial, half)
        try:
            values.append(run(config, data_root, report=report)["average_accuracy"])
        except DivergedError:
            raise optuna.TrialPruned from None
    return fmean(values)


def _report_and_prune(
    trial: Trial, half: int, experiences: int, measure: Callable[[], float]
) -> None:
    """Half way, prune a trial below the median of the earlier ones.

    Optuna's own pruner would compare it with the trials that were not pruned alone.
    """
    if experiences != half:
        return
    value = measure()
    trial.report(value, experiences)
    earlier = [t.intermediate_values.get(experiences) for t in ended_trials(trial.study)]
    known = [other for other in earlier if other is not None]
    if len(known) >= FEWEST_TO_COMPARE and value < median(known):
        trial.set_user_attr("cut_after", experiences)
        raise optuna.TrialPruned


def _run_finalists(
    study: optuna.Study,
    finalists: int,
    finalist_seeds: int,
    data_root: Path | None,
    tell: Callable[[int], None],
) -> None:
    """Run the best trials with more seeds.

    What is done is kept in the study's ``finalists``: by number of the trial, the accuracies with
    the additional seeds and all of the data, 0 where one diverged.
    """
    tuning_seeds = study.user_attrs["arguments"]["tuning_seeds"]
    known: dict[str, list[float]] = study.user_attrs.get("finalists", {})
    whole = _whole_trials(study)
    whole.sort(key=lambda trial: trial.value or 0.0, reverse=True)
    for i in range(finalist_seeds):
        for trial in whole[:finalists]:
            values = known.setdefault(str(trial.number), [])
            if len(values) > i:
                continue
            epochs, hyper = trial.params["epochs"], trial.user_attrs["hyper"]
            config = config_of(study, epochs, hyper, tuning_seeds + i, train_share=1.0)
            try:
                values.append(run(config, data_root)["average_accuracy"])
            except DivergedError:
                values.append(0.0)
            study.set_user_attr("finalists", known)
            tell(sum(map(len, known.values())))


_LINE = b'{"op_code":'

_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError)
"""What Optuna raises for lines that are not its own."""


def open_study(method: str, folder: Path, known: Sequence[str] = ("epochs",)) -> optuna.Study:
    """Open the journal of this name, or make it; its trials must have the parameters ``known``.

    A last line that a killed process was just writing is cut off.

    Raises:
        UserError: it is damaged.
    """
    # With a relative path Optuna's lock would be a link to nowhere, which is waited for forever.
    path = folder.resolve() / f"{method}.journal"
    if path.exists():
        _mend(path)
    try:
        study = optuna.create_study(
            study_name=method,
            storage=JournalStorage(JournalFileBackend(str(path))),
            direction="maximize",
            load_if_exists=True,
        )
        for trial in ended_trials(study):
            [trial.params[name] for name in known], trial.user_attrs["hyper"]
    except _UNREADABLE as error:
        raise UserError(
            f"{path} is not a whole journal of a search ({one_line(error)}); move it away to begin "
            f"anew"
        ) from error
    return study


def _mend(path: Path) -> None:
    """Cut off the line that a killed process was just writing: Optuna could not read on after it.

    Raises:
        UserError: it is no journal; it is left as it is.
    """
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        *lines, rest = path.read_bytes().split(b"\n")
        torn = rest != b"" and _LINE.startswith(rest[: len(_LINE)])
        if not all(line.startswith(_LINE) for line in lines) or (rest and not torn):
            raise UserError(f"{path} is no journal of a search; move it away to begin anew")
        if torn:
            os.truncate(path, path.stat().st_size - len(rest))
    finally:
        lock.release()


def ended_trials(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that count."""
    # One that a killed process had begun stays RUNNING, one that raised is FAIL: both are redone.
    return study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


def _whole_trials(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that have a value."""
    return study.get_trials(states=(TrialState.COMPLETE,))


def rank(settings: Mapping[str, Setting], trials_csv: Path) -> pd.DataFrame:
    """Return a row for each method with its setting, the best first.

    Args:
        settings: what :func:`search` has returned.
        trials_csv: the file that it has written.

    Returns:
        The columns ``method``, ``validation_accuracy`` in %, which is the mean over all seeds where
        finalists were run with more of them, ``trials``, how many of them were ``cut`` short or
        diverged, ``epochs`` and ``hyper``.
    """
    trials = pd.read_csv(trials_csv)
    rows = []
    for method, setting in settings.items():
        own = trials[trials["method"] == method]
        by = "all_seeds" if own["all_seeds"].notna().any() else "validation_accuracy"
        rows.append(
            {
                "method": method,
                "validation_accuracy": 100 * own[by].max(),
                "trials": len(own),
                "cut": int(own["validation_accuracy"].isna().sum()),
                "epochs": setting.epochs,
                "hyper": explain(setting.hyper, {}),
            }
        )
    ranking = pd.DataFrame(rows).sort_values("validation_accuracy", ascending=False)
    return ranking.reset_index(drop=True)


def _best(study: optuna.Study, batch_size: int) -> Setting:
    whole = _whole_trials(study)
    if not whole:
        raise UserError(f"no trial of {study.study_name} succeeded; give more --trials")
    values = _with_all_seeds(study)
    finalists = [trial for trial in whole if trial.number in values]
    on = study.user_attrs["arguments"].get("on", STREAM)

    def rank(trial: optuna.trial.FrozenTrial) -> tuple[float, ...]:
        value = values[trial.number] if finalists else trial.value or 0.0
        if on == STREAM:
            return (value,)
        return value, -trial.params["epochs"], -trial.user_attrs["hyper"].get("lr", 0.0)

    best = max(finalists or whole, key=rank)
    return Setting(best.params["epochs"], batch_size, best.user_attrs["hyper"], on)


def _with_all_seeds(study: optuna.Study) -> dict[int, float]:
    """Return the finalists' mean accuracy over all their seeds, by number of the trial."""
    finalists: dict[str, list[float]] = study.user_attrs.get("finalists", {})
    arguments = study.user_attrs["arguments"]
    seeds = arguments["tuning_seeds"] if arguments["train_share"] == 1 else 0
    return {
        trial.number: (seeds * (trial.value or 0.0) + sum(more)) / (seeds + len(more))
        for trial in study.trials
        if (more := finalists.get(str(trial.number)))
    }


def _trials_csv(studies: dict[str, optuna.Study]) -> str:
    rows = []
    for method, study in studies.items():
        all_seeds = _with_all_seeds(study)
        for number, trial in enumerate(ended_trials(study)):
            # Of one that was cut short Optuna has the last value that it was compared by.
            whole = trial.state == TrialState.COMPLETE
            rows.append(
                {
                    "method": method,
                    "trial": number,
                    "validation_accuracy": trial.value if whole else None,
                    "cut_after": trial.user_attrs.get("cut_after"),
                    "all_seeds": all_seeds.get(trial.number),
                    "epochs": trial.params["epochs"],
                    "hyper": json.dumps(trial.user_attrs.get("hyper", {})),
                }
            )
    frame = pd.DataFrame(rows).astype({"cut_after": "Int64"})
    return frame.to_csv(index=False, float_format="%.6f", lineterminator="\n")
