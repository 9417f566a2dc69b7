"""The whole measurement: levels, a search for each method, final runs, a table."""

from __future__ import annotations

import gzip
import json
import platform
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError, one_line
from ..running.files import write_atomically
from ..running.records import current_commit
from ..running.run import cpu_model
from .texts import KINDS, load
from .tuning import ADAPTERS, NEW, Run, forgetting, tune

__all__ = ["METHODS", "study", "table"]

TUNING_SEED = 1000
"""Of levels and searches; the final runs have the seeds from 0."""

LEVEL_STEPS, LEVEL_RATE = 40, 2e-3
"""A kind's level is the validation loss that AdamW has on it after so many steps from the base."""

SEARCHED = 2
"""Kinds that a trial is tuned on: the first ones."""

SHORTFALL = 10.0
"""What a trial's value rises by for each nat that it is short of a level."""

METHODS = {
    "adamw": "AdamW",
    "sgd": "SGD",
    "classp": "CLASSP, the paper's rule",
    "classp-inputs": "CLASSP, history of inputs",
}
"""The methods and what tables call them."""

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """Return the records of a file; none if it is not there.

    Raises:
        UserError: it cannot be read.
    """
    if not path.exists():
        return []
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} is not a whole records file ({one_line(error)}); move it away to have its "
            f"runs done again"
        ) from error


class Records:
    """The records of a folder, on disk after each run.

    Args:
        folder: where ``records.jsonl.gz`` lies.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "records.jsonl.gz"
        self.all = read(self.path)

    def get(self, stage: str, run: Run, measure: Callable[[], Record]) -> Record:
        """Return a run's record; measure what is not there.

        Args:
            stage: ``level of KIND``, ``search`` or ``final``.
            run: what was run.
            measure: returns what is to be recorded beside it.
        """
        for record in self.all:
            if record["stage"] == stage and record["run"] == run.as_dict():
                return record
        record = {"stage": stage, "run": run.as_dict(), **measure(), **_environment()}
        self.all.append(record)
        lines = "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in self.all)
        write_atomically(self.path, gzip.compress(lines.encode(), mtime=0))
        return record


def _environment() -> Record:
    texts = {kind: load(kind) for kind in KINDS}
    return {
        "texts": {
            kind: {
                "bytes": [len(t.train), len(t.validation), len(t.test)],
                "sha256": t.checksum,
            }
            for kind, t in texts.items()
        },
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
        "cpu": cpu_model(),
        "commit": current_commit(),
    }


def suggest(trial: Any, method: str) -> tuple[str, dict[str, float]]:
    """Return an adapter and hyper-parameters that Optuna draws for a method."""
    adapter = trial.suggest_categorical("adapter", ADAPTERS)

    def log(name: str, least: float, most: float) -> float:
        return float(f"{trial.suggest_float(name, least, most, log=True):.3g}")

    if method == "adamw":
        return adapter, {"lr": log("lr", 2e-4, 2e-2)}
    if method == "sgd":
        return adapter, {"lr": log("lr", 0.05, 10)}
    if method == "classp":
        power = trial.suggest_categorical("power", (1.0, 2.0))
        return adapter, {
            "lr": log("lr", 5e-4, 2e-2),
            "epsilon": log("epsilon", 1e-4, 1) ** power,
            "power": power,
        }
    return adapter, {"lr": log("lr", 0.5, 50), "epsilon": log("epsilon", 0.1, 100)}


def search(
    method: str, trials: int, levels: dict[str, float], records: Records, folder: Path
) -> Run:
    """Return the best run of a method's trials: the least forgetting, all levels reached."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = tuple(NEW[:SEARCHED])
    runs: list[Run] = []

    def objective(trial: Any) -> float:
        adapter, hyper = suggest(trial, method)
        run = Run(method, adapter, hyper, TUNING_SEED, levels)
        runs.append(run)
        return records.get("search", run, lambda: _valued(tune(run, folder, tell, kinds), run))[
            "value"
        ]

    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=max(2, trials // 2))
    found = optuna.create_study(sampler=sampler)
    found.optimize(objective, n_trials=trials)
    return runs[found.best_trial.number]


def _valued(result: Record, run: Run) -> Record:
    """Add what a search minimizes."""
    short = 0.0
    for kind in NEW[:SEARCHED]:
        curve = result["curves"].get(kind)
        short += max(0.0, curve[-1] - run.levels[kind]) if curve else 1.0
    value = forgetting(result["losses"]) + SHORTFALL * short
    return result | {"value": value if np.isfinite(value) else 1e3}


def tell(line: str) -> None:
    """Print a line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)


def study(folder: Path, methods: Sequence[str], seeds: int, trials: int) -> str:
    """Do what is not in the folder's records, write its table and return it.

    Args:
        folder: where results go.
        methods: of :data:`METHODS`.
        seeds: final runs of each method, from seed 0.
        trials: of each method's search.
    """
    torch.set_num_threads(1)
    records = Records(folder)
    cache = folder / "models"
    levels = {}
    for kind in NEW:
        run = Run("adamw", "both", {"lr": LEVEL_RATE}, TUNING_SEED)

        def measured(run: Run = run, kind: str = kind) -> Record:
            result = tune(run, cache, tell, (kind,), LEVEL_STEPS)
            return {"kind": kind, "level": result["curves"][kind][-1], **result}

        levels[kind] = records.get(f"level of {kind}", run, measured)["level"]
    begin, done, total = time.monotonic(), 0, len(methods) * (1 + seeds)

    def progress(what: str) -> None:
        nonlocal done
        done += 1
        left = (time.monotonic() - begin) / done * (total - done) / 60
        tell(f"{what}: {done} of {total} parts, about {left:.0f} minutes left")

    chosen = {}
    for method in methods:
        chosen[method] = search(method, trials, levels, records, cache)
        progress(f"search of {method}")
    for seed in range(seeds):
        for method, best in chosen.items():
            run = Run(method, best.adapter, best.hyper, seed, levels, test=True)
            records.get("final", run, lambda run=run: tune(run, cache, tell))  # type: ignore[misc]
            progress(f"{method}, seed {seed}")
    text = table(records.all)
    write_atomically(folder / "table.md", text)
    return text


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the final runs as Markdown.

    Perplexities are those of bytes, means over the seeds after the last kind; forgetting is
    :func:`~experiments.language.tuning.forgetting`, with the seeds' range.
    """
    lines = [
        f"| method | setting | {' | '.join(KINDS)} | forgetting (least to most) | steps | n |",
        f"|{'---|' * (len(KINDS) + 5)}",
    ]
    finals: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["stage"] == "final":
            finals.setdefault(record["run"]["method"], []).append(record)
    if finals:
        before = np.exp([some["losses"][0] for rs in finals.values() for some in rs]).mean(0)
        cells = " | ".join(f"{x:.2f}" for x in before)
        lines.append(f"| before tuning | | {cells} | | | |")
    for method, some in finals.items():
        whole = [r for r in some if all(r["reached"].values()) and len(r["reached"]) == len(NEW)]
        run = some[0]["run"]
        values = ", ".join(f"{key} {value:g}" for key, value in run["hyper"].items())
        setting = f"{run['adapter']}, {values}"
        if not whole:
            lines.append(f"| {METHODS[method]} | {setting} |{' |' * len(KINDS)} | | 0 |")
            continue
        after = np.exp([r["losses"][-1] for r in whole]).mean(0)
        forgotten = [forgetting(r["losses"]) for r in whole]
        steps = np.mean([sum(r["steps"].values()) for r in whole])
        lines.append(
            f"| {METHODS[method]} | {setting} | {' | '.join(f'{x:.2f}' for x in after)} | "
            f"{np.mean(forgotten):.3f} ({min(forgotten):.3f} to {max(forgotten):.3f}) | "
            f"{steps:.0f} | {len(whole)} |"
        )
    return "\n".join(lines) + "\n"
