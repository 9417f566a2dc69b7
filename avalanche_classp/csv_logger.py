"""A logger that writes every metric's values, CLASSP's among them, to one CSV file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metric_results import MetricValue
from avalanche.logging import BaseLogger
from torch import Tensor

__all__ = ["CSVValueLogger"]

_HEADER = "step,name,value\n"


class CSVValueLogger(BaseLogger, SupervisedPlugin):
    """Logger for Avalanche's EvaluationPlugin: a line ``step,name,value`` for each value.

    Avalanche's CSVLogger has fixed columns, for accuracy, loss and forgetting; this one writes all
    metrics that give numbers, under the names that the other loggers show, with all digits. Images
    and tensors are left out. ``step`` is the metric's x, as a rule the training iterations so far.

    Lines are appended and on disk before training goes on, so a run that is resumed adds to what
    it had written, and a killed one loses no value. A line that was cut is ended first.

    Args:
        path: the file; made with its folder if it is not there.

    Raises:
        ValueError: the file has other columns; it is left as it is.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self._rows: list[tuple[int, str, float]] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            file.seek(0)
            header = file.readline()
            if not header:
                file.write(_HEADER.encode())
            elif header.splitlines()[0] != _HEADER.encode().rstrip():
                raise ValueError(
                    f"{self.path} has not the columns {_HEADER.rstrip()}; give another path"
                )
            else:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def log_metrics(self, metric_values: Sequence[MetricValue]) -> None:
        """Append these values."""
        super().log_metrics(list(metric_values))
        if self._rows:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(self._rows)
            self._rows = []
            # Opened each time: the strategy can be pickled, and nothing waits in a buffer.
            with self.path.open("a", newline="", encoding="utf-8") as file:
                file.write(text.getvalue())

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        """Note a value, if it is a number."""
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, int | float):
            self._rows.append((x_plot, name, value))
