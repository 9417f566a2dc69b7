"""Comparisons and searches from Python: :func:`compare` and :func:`tune`."""

from __future__ import annotations

import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from .errors import UserError, nearest
from .protocol import own
from .protocol.benchmarks import BENCHMARKS, SCENARIOS
from .protocol.config import Epochs, Hyper
from .protocol.methods import METHODS, count_steps, why_not
from .protocol.models import MODELS, require_model
from .protocol.tuned_settings import Setting, make_config
from .reporting.figures import draw_figures
from .reporting.report import write_report
from .reporting.tables import csv_table, plain_table, table_rows
from .running.compare import run_all
from .running.files import write_atomically
from .running.processes import available_cores
from .running.records import Record, Results
from .running.run import find_device
from .tuning.search import rank, search

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario
    from torch import nn

__all__ = ["Comparison", "Tuning", "compare", "tune"]

Factory = Callable[..., Any]


@dataclass(frozen=True, repr=False)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        records: one dict for each finished run: config, accuracy matrix, times, memory.
        failures: one dict for each run that failed: config and error.
    """

    records: Sequence[Record]
    failures: Sequence[Record]

    @property
    def table(self) -> pd.DataFrame:
        """One row for each method, best accuracy first; half widths of 95 % intervals in _ci95.

        Accuracy, forgetting and transfer are in %, differences in points.
        """
        return pd.read_csv(StringIO(csv_table(table_rows(self.records))))

    def report(self, folder: str | Path) -> Path:
        """Write table.md, table.csv, the figures and report.html; return the page's path."""
        write_report(self.records, Path(folder), self.failures)
        return Path(folder) / "report.html"

    def figures(self, folder: str | Path | None = None) -> dict[str, bytes]:
        """Draw the figures; return PNG files by name, and write them to a folder if one is given.

        In a notebook, ``IPython.display.Image(comparison.figures()["accuracy.png"])`` shows one.
        """
        config = self.records[0]["config"]
        title = f"{config['benchmark']}, {config['scenario']}-incremental"
        drawn = draw_figures(table_rows(self.records), title)
        if folder is not None:
            for name, content in drawn.items():
                write_atomically(Path(folder) / name, content)
        return drawn

    def __repr__(self) -> str:
        return plain_table(table_rows(self.records))


@dataclass(frozen=True, repr=False)
class Tuning:
    """What :func:`tune` found.

    Attributes:
        settings: the best setting of each method, for ``compare(settings=...)``.
        ranking: one row for each method, best first, with its mean accuracy on validation data, %,
            its trials, how many were cut short or diverged, and its values.
    """

    settings: Mapping[str, Setting]
    ranking: pd.DataFrame

    def __repr__(self) -> str:
        return str(self.ranking.to_string(index=False))


def compare(
    benchmark: str | Callable[..., CLScenario],
    model: str | Callable[..., nn.Module] | None = None,
    methods: Sequence[str | Factory] = (),
    *,
    scenario: str | None = None,
    seeds: int = 5,
    settings: str | Path | Mapping[str, Setting | Hyper] | None = None,
    epochs: Epochs | None = None,
    batch_size: int | None = None,
    output: str | Path | None = None,
    device: str = "cpu",
    data_root: str | Path | None = None,
    jobs: int | None = None,
) -> Comparison:
    """Run every method with every seed and return what came out.

    ::

        compared = compare(my_images, small_cnn, ["naive", "ewc", "classp"], seeds=5)
        compared.table
        compared.report("results")

    Args:
        benchmark: a name (``python -m experiments list`` shows them), or a function from a seed to
            an Avalanche benchmark, declared with ``@benchmark`` or not.
        model: a name, or a function from a number of classes to an ``nn.Module``. Default: the
            benchmark's usual one.
        methods: names, and functions declared with ``@method``. Default: the usual ones.
        scenario: class, domain or task. Default: the benchmark's first.
        seeds: seeds 0 to N-1 for each method.
        settings: by method's name, what :func:`tune` has found, or hyper-parameters as a dict; or
            for all what the command line's ``--settings`` takes, the folder of a search say.
            Default: what was searched for a built-in benchmark, else defaults that are not tuned.
        epochs: per experience, one number or one for each. Default: the setting's.
        batch_size: training mini-batch size. Default: the setting's.
        output: a folder that keeps records, report and TensorBoard logs; finished runs in it are
            not done again. Default: nothing is kept.
        device: torch device.
        data_root: folder of the built-in datasets. Default: ``~/.avalanche/data``.
        jobs: runs at a time. Default: as many as cores on a CPU, else 1.

    On a CPU runs are done in forked processes, so functions of a notebook are known there. On
    other devices, and where torch cannot train in a fork any more (a compiled model was trained in
    this process), they are done one after the other in this process.

    Raises:
        UserError: an unknown name, or something that does not go together. A run that fails is no
            error: it is in ``failures``.
    """
    place, names, fixed = _asked(benchmark, model, methods, scenario, device)
    way = None if settings is None or isinstance(settings, Mapping) else str(settings)
    by_method = settings if isinstance(settings, Mapping) else {}
    for name in by_method:
        if name not in names:
            raise UserError(f"settings has {name!r}, which is none of the methods compared")
    fixed |= {k: v for k, v in (("epochs", epochs), ("batch_size", batch_size)) if v is not None}
    configs = []
    with _quiet():
        for name in names:
            given = by_method.get(name, way)
            hyper, chosen = (given, None) if isinstance(given, Mapping) else ({}, given)
            configs.append(make_config(*place, name, 0, hyper, chosen, **fixed))
        configs = [replace(config, seed=seed) for seed in range(seeds) for config in configs]
        with tempfile.TemporaryDirectory() as folder:
            results = Results(Path(output or folder))
            failures = run_all(
                configs,
                results,
                None if data_root is None else Path(data_root),
                jobs,
                count_steps,
                engine=_start(device, jobs),
                tensorboard=output is not None,
            )
            finished = list(results.finished(configs).values())
    if not finished:
        raise UserError(f"no run succeeded: {failures[0]['error']}")
    compared = Comparison(finished, failures)
    if output is not None:
        compared.report(output)
    return compared


def tune(
    benchmark: str | Callable[..., CLScenario],
    model: str | Callable[..., nn.Module] | None = None,
    methods: Sequence[str | Factory] = (),
    *,
    trials: int = 30,
    on: str = "stream",
    scenario: str | None = None,
    tuning_seeds: int = 2,
    epochs_choices: Sequence[int] = (),
    batch_size: int | None = None,
    output: str | Path | None = None,
    device: str = "cpu",
    data_root: str | Path | None = None,
    jobs: int | None = None,
) -> Tuning:
    """Search each method's settings with the same budget, on data cut from the training data.

    ::

        tuned = tune(my_images, small_cnn, ["naive", "ewc", "classp"], trials=20)
        compare(my_images, small_cnn, ["naive", "ewc", "classp"], settings=tuned.settings)

    Args:
        benchmark: see :func:`compare`.
        model: likewise.
        methods: likewise.
        trials: for each method.
        on: what a trial sees, ``stream``, or ``first-experience`` alone, which is all that a real
            stream shows before it is learnt.
        scenario: see :func:`compare`.
        tuning_seeds: how many seeds each trial is run with; comparisons use others.
        epochs_choices: what a search chooses its epochs from. Default: the benchmark's.
        batch_size: of every trial. Default: the benchmark's.
        output: a folder that keeps Optuna's journals; a search that was cut off goes on there.
            Default: nothing is kept.
        device: torch device.
        data_root: see :func:`compare`.
        jobs: methods searched at a time. Default: as many as cores on a CPU, else 1.

    Raises:
        UserError: an unknown name, something that does not go together, or a method all of whose
            trials failed.
    """
    place, names, fixed = _asked(benchmark, model, methods, scenario, device)
    spec = BENCHMARKS[place[0]]
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        journals = Path(output or folder)
        settings = search(
            *place,
            names,
            journals,
            trials,
            tuning_seeds,
            tuple(epochs_choices) or spec.epochs_choices,
            batch_size or spec.batch_size,
            None if data_root is None else Path(data_root),
            jobs=jobs or available_cores(),
            start=_start(device, jobs),
            on=on,
            **fixed,
        )
        return Tuning(settings, rank(settings, journals / "trials.csv"))


def _asked(
    benchmark: str | Factory,
    model: str | Factory | None,
    methods: Sequence[str | Factory],
    scenario: str | None,
    device: str,
) -> tuple[tuple[str, str], list[str], dict[str, Any]]:
    """Return benchmark and scenario, methods, and what else differs from the usual."""
    if not isinstance(benchmark, str) and not own.is_declared(BENCHMARKS, benchmark):
        own.benchmark(benchmark, scenario=scenario or "class")
    if callable(model) and not own.is_declared(MODELS, model):
        own.model(model)
    name = _known("benchmark", benchmark, BENCHMARKS)
    scenario = _known("scenario", scenario or BENCHMARKS[name].scenarios[0], SCENARIOS)
    usual = [m for m, spec in METHODS.items() if spec.usual and not why_not(m, scenario)]
    names = [_known("method", method, METHODS) for method in (methods or usual)]
    fixed: dict[str, Any] = {}
    if model is not None:
        fixed["model"] = model if isinstance(model, str) else own.name_of(MODELS, model)
        require_model(fixed["model"])
    if device != "cpu":  # journals and records of CPU runs name no device
        find_device(device)
        fixed["device"] = device
    return (name, scenario), list(dict.fromkeys(names)), fixed


def _known(kind: str, given: str | Factory, entries: Mapping[str, Any]) -> str:
    name = given if isinstance(given, str) else own.name_of(entries, given)
    if name not in entries:
        raise UserError(f"unknown {kind} {name!r}; {nearest(name, entries)}")
    return name


def _start(device: str, jobs: int | None) -> str:
    if device == "cpu" and _trains_in_a_fork():
        return "fork"
    if (jobs or 1) > 1:
        raise UserError(
            f"jobs must be 1 on {device}, got {jobs}: to run several at a time put your functions "
            f"into a file and use the command line with --load FILE.py"
        )
    return "here"


def _trains_in_a_fork() -> bool:
    """Tell by trying: torch's threads for gradients, once started, do not survive a fork."""
    with warnings.catch_warnings():  # Python warns of forks beside threads
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            torch.ones(1, requires_grad=True).sum().backward()
        except RuntimeError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave warnings to their places, and random generators and threads as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_num_threads()
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_num_threads(before[2])
