"""Result files: one run, one JSON file, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.protocol.config import RunConfig

SCHEMA = 2
_SHARE, _CHANGE = (0, 1), (-1, 1)
_NUMBERS = {
    "average_accuracy": _SHARE,
    "forgetting": _CHANGE,
    "backward_transfer": _CHANGE,
    "forward_transfer": _CHANGE,
    "learning_accuracy": _SHARE,
    "peak_memory_bytes": (0, 2**63),
    "peak_device_bytes": (0, 2**63),
    "seconds_per_experience": (1e-9, 1e12),
    "state_bytes_per_parameter": (0, 2**63),
}
"""What the tables are made of, with the least and the most that it can be."""
_ALWAYS = ("average_accuracy", "seconds_per_experience", "state_bytes_per_parameter")
"""Those of them that every method has."""


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

    def by_key(self) -> dict[str, dict[str, Any]]:
        """Read all result files, failures included, in the order of their names.

        Returns:
            The results, each under its config's :meth:`~experiments.protocol.config.RunConfig.key`.

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
        return results

    def load(self) -> list[dict[str, Any]]:
        """Return the results of :meth:`by_key` as a list."""
        return list(self.by_key().values())

    def finished(self, configs: Iterable[RunConfig]) -> dict[str, dict[str, Any]]:
        """Return :meth:`by_key` of these configs, as far as they are there and no failures."""
        wanted = {config.key() for config in configs}
        return {
            key: result
            for key, result in self.by_key().items()
            if "error" not in result and key in wanted
        }


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
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
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
        schema = result["schema"]
        if schema == SCHEMA:
            # Older versions left out what had its default.
            result["config"] = _require_whole(result).as_dict()
    except UserError as error:
        reason = str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        if schema == SCHEMA:
            return result
        raise UserError(
            f"{path} has the result format {schema!r}, this version reads {SCHEMA}; "
            f"use the version that wrote it, or move the file away"
        )
    raise UserError(
        f"{path} is not a whole result file ({reason}); move it away to have the run done again"
    )


def _require_whole(result: Mapping[str, Any]) -> RunConfig:
    """Return the config; raise if something is not as the report needs it."""
    config = RunConfig.from_dict(result["config"])
    for key in ("command", "error"):
        _require(key, result.get(key, ""), str)
    if "error" in result:
        return config
    _require("setting", result["setting"], str)
    _require("environment", result.get("environment", {}), dict)
    for key, (least, most) in _NUMBERS.items():
        if result[key] is not None or key in _ALWAYS:
            _require_number(key, result[key], least, most)
    matrix = _table("accuracy_matrix", result["accuracy_matrix"], 0, 1)
    # Joint training and validation runs have one row.
    if len(matrix) not in (1, config.experiences) or len(matrix[0]) != config.experiences:
        raise ValueError(
            f"accuracy_matrix is of {len(matrix)} × {len(matrix[0])}, not of the "
            f"{config.experiences} experiences"
        )
    _table("eval_seconds", [result["eval_seconds"]], 0, 1e12)
    _require("accumulator_maps", result.get("accumulator_maps") or [], list)
    for image in result.get("accumulator_maps") or []:
        _table("accumulator_maps", image, 0, sys.float_info.max)
    return config


def _require(key: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{key} is {value!r:.50}")


def _require_number(key: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{key} is {value!r:.50}")


def _table(key: str, rows: Any, least: float, most: float) -> list[list[float]]:
    """Return the rows if they are: at least one, equally long, of numbers in this range."""
    _require(key, rows, list)
    for row in rows:
        _require(key, row, list)
        for value in row:
            _require_number(key, value, least, most)
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError(f"{key} has no rows, or of different lengths")
    return rows
