"""Result files: one run, one JSON file, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.config import RunConfig
from experiments.errors import UserError

SCHEMA = 2
_NUMBERS = (
    "average_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "learning_accuracy",
    "peak_memory_bytes",
    "peak_device_bytes",
    "seconds_per_experience",
    "state_bytes_per_parameter",
)
"""What the tables are made of."""


class Results:
    """The result files of an output folder, in its sub-folder ``runs``.

    Args:
        folder: the output folder; made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"

    def save(self, result: Mapping[str, Any]) -> Path:
        """Write a result, or a failure (``{"config": ..., "error": ...}``), and return its file.

        A file of the same config is replaced.

        Raises:
            UserError: the folder cannot be written.
        """
        config = RunConfig.from_dict(result["config"])
        stream = f"{config.benchmark}-{config.scenario}"
        path = self.runs / f"{stream}-{config.method}-{config.seed}-{_digest(config)}.json"
        write_atomically(path, json.dumps({"schema": SCHEMA, **result}, indent=1) + "\n")
        return path

    def logs(self, config: RunConfig) -> Path:
        """Return the run's TensorBoard log directory."""
        return self.folder / "tensorboard" / f"{config.method}-{config.seed}-{_digest(config)}"

    def load(self) -> list[dict[str, Any]]:
        """Read all result files, failures included, in the order of their names.

        Raises:
            UserError: a file is not a result file of this version, or two are of the same run; they
                are left as they are.
        """
        results: dict[str, dict[str, Any]] = {}
        paths: dict[str, Path] = {}
        for path in sorted(self.runs.glob("*.json")):
            result = _read(path)
            key = RunConfig.from_dict(result["config"]).key()
            if key in paths:
                raise UserError(f"{paths[key]} and {path} hold the same run; move one of them away")
            paths[key], results[key] = path, result
        return list(results.values())

    def finished(self, configs: Iterable[RunConfig]) -> list[dict[str, Any]]:
        """Return the results of these configs, as far as they are there and no failures."""
        wanted = {config.key() for config in configs}
        return [
            result
            for result in self.load()
            if "error" not in result and RunConfig.from_dict(result["config"]).key() in wanted
        ]


def _digest(config: RunConfig) -> str:
    """Return what tells a run from all others."""
    return hashlib.sha256(config.key().encode()).hexdigest()[:8]


def describe_failure(result: Mapping[str, Any]) -> str:
    """Return which run failed and why, on one line."""
    config = result["config"]
    return f"{config['method']}, seed {config['seed']}: {result['error']}"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash.

    Raises:
        UserError: it cannot be written.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    make_folder(path.parent)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's is for the owner alone
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def make_folder(folder: Path) -> None:
    """Make a folder, if it is not there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["schema"] != SCHEMA:
            raise UserError(
                f"{path} has the result format {result['schema']!r}, this version reads {SCHEMA}; "
                f"use the version that wrote it, or move the file away"
            )
        RunConfig.from_dict(result["config"])
        if "error" not in result:
            for key in _NUMBERS:
                if not (isinstance(result[key], int | float) or result[key] is None):
                    raise ValueError(f"{key} is {result[key]!r}")
            (
                result["accuracy_matrix"][-1][0]
                + result["average_accuracy"]
                + result["eval_seconds"][0]
            )
            result["setting"].strip()
        return result
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path} is not a whole result file ({type(error).__name__}: {error}); move it away "
            f"to have the run done again"
        ) from error
