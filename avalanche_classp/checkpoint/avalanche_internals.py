"""All that checkpoints use of Avalanche 0.6 without its documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avalanche.logging import CSVLogger
from avalanche.training.utils import ParamData
from torch.utils.data import DataLoader, Dataset

__all__ = [
    "OF_THE_EXPERIENCE",
    "REBUILT_PACKAGES",
    "ParamData",
    "csv_loggers",
    "csv_rows",
    "holds_samples",
    "restore_csv_rows",
]

OF_THE_EXPERIENCE = {
    "experience",
    "_experiences",
    "adapted_dataset",
    "dataloader",
    "mbatch",
    "mb_output",
    "loss",
    "current_eval_stream",
    "_eval_streams",
}
"""Attributes of a strategy that Avalanche sets for each experience and drops after it
(``_train_cleanup``, ``_eval_cleanup``), and the experiences of JointTraining."""

REBUILT_PACKAGES = ("avalanche.evaluation.", "torch.nn.")
"""Objects of these packages are rebuilt without their constructors where the script has none: the
means of a metric, the layers of a grown model."""

_CSV_LOGGER_STATE = ("training_exp_id", "in_train_phase", "val_acc", "val_loss")


def holds_samples(value: Any) -> bool:
    """Tell whether this is data, which checkpoints do not hold."""
    of_avalanche = type(value).__module__.startswith("avalanche.benchmarks.")
    return of_avalanche or isinstance(value, Dataset | DataLoader)


def csv_loggers(strategy: Any) -> list[Any]:
    """Return the loggers that open their files with "w", which loses the rows so far."""
    return [logger for logger in strategy.evaluator.loggers if isinstance(logger, CSVLogger)]


def csv_rows(logger: Any) -> dict[str, Any]:
    """Return what a CSVLogger has written, and what it remembers."""
    return {
        "files": [Path(f.name).read_text() for f in (logger.training_file, logger.eval_file)],
        "attributes": {name: getattr(logger, name) for name in _CSV_LOGGER_STATE},
    }


def restore_csv_rows(logger: Any, rows: dict[str, Any]) -> None:
    """Write the rows of a checkpoint into the files of a CSVLogger."""
    for file, text in zip((logger.training_file, logger.eval_file), rows["files"], strict=True):
        file.seek(0)
        file.truncate()
        file.write(text)
        file.flush()
    vars(logger).update(rows["attributes"])
