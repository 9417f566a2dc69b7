"""What a run shows in TensorBoard. ``docs/metrics.md`` says how to read it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.logging import TensorboardLogger
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from avalanche_classp import CLASSPOptimizer, classp_metrics
from avalanche_classp.metrics import effective_rate, layers

from ..errors import UserError, one_line
from ..protocol.config import RunConfig
from .matrix_figures import accuracy_matrix_figure, confusion_figure
from .timing import Clocked

_FINAL = ("average_accuracy", "forgetting", "learning_accuracy", "seconds_per_experience")
"""What of a result stands beside the hyper-parameters."""


class Board:
    """What a run without TensorBoard does for it: nothing.

    Attributes:
        metrics: for the run's EvaluationPlugin, beside its own.
        loggers: likewise.
    """

    def __init__(self) -> None:
        self.metrics: list[Any] = []
        self.loggers: list[Any] = []

    @property
    def seconds(self) -> float:
        """Seconds that the metrics and loggers took so far, which are not the method's."""
        return 0.0

    def after_experience(self, strategy: Any) -> None:
        """Show what the strategy has become; called after each evaluation."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """Show what came out."""

    def close(self, error: BaseException | None) -> None:
        """Write all that is not on disk, and why the run ended if it failed."""


@contextmanager
def open_board(folder: Path | None, config: RunConfig) -> Iterator[Board]:
    """Open a run's log directory, emptied; whatever happens, what was shown is written.

    Args:
        folder: the log directory; None: show nothing.
        config: the run's.

    Raises:
        UserError: the folder cannot be written.
    """
    board = Board() if folder is None else _TensorBoard(folder, config)
    try:
        yield board
    except BaseException as error:
        board.close(error)
        raise
    board.close(None)


class _Logger(TensorboardLogger):
    """Avalanche's, which adds up the seconds it takes; confusion matrices are shown as images."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seconds = 0.0

    def log_metrics(self, metric_values: Sequence[Any]) -> None:
        began = time.perf_counter()
        super().log_metrics(metric_values)
        self.seconds += time.perf_counter() - began

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        if not isinstance(value, Tensor):  # it would become a histogram
            super().log_single_metric(name, value, x_plot)


class _TensorBoard(Board):
    """Scalars of all metrics, histograms and images of CLASSP's state, the config as hparams."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        super().__init__()
        self._config = config
        try:
            # What a killed run left would be shown as a part of this one.
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            self._logger = _Logger(folder)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
        metrics = [*loss_metrics(epoch=True), *accuracy_metrics(epoch=True)]
        if config.method.startswith("classp"):
            metrics += classp_metrics(epoch=True)
            metrics += classp_metrics(experience=True, per_layer=True)
        self.metrics = [Clocked(metric) for metric in metrics]
        self.loggers = [self._logger]

    @property
    def seconds(self) -> float:
        return self._logger.seconds + sum(metric.seconds for metric in self.metrics)

    def after_experience(self, strategy: Any) -> None:
        if isinstance(strategy.optimizer, CLASSPOptimizer):
            x = strategy.clock.train_iterations
            for layer in layers(strategy):
                self._histogram("A", layer.name, layer.accumulator, x)
                rate = effective_rate(layer.accumulator, layer.rule)
                self._histogram("effective_rate", layer.name, rate, x)
        self._logger.writer.flush()

    def _histogram(self, kind: str, name: str, values: Tensor, x: int) -> None:
        """Show the decades of what is above 0: weights without history have A = 0."""
        decades = values[(values > 0) & values.isfinite()].log10()
        if len(decades):
            self._logger.writer.add_histogram(f"CLASSP_log10_{kind}/{name}", decades, x)

    def finish(self, result: Mapping[str, Any]) -> None:
        writer = self._logger.writer
        images = {
            "accuracy_matrix": accuracy_matrix_figure(result["accuracy_matrix"]),
            "confusion_matrix": confusion_figure(result["confusion_matrix"]),
        }
        for name, figure in images.items():
            writer.add_figure(f"Matrices/{name}", figure)
        final = {f"Final/{key}": result[key] for key in _FINAL if result[key] is not None}
        for name, value in final.items():
            writer.add_scalar(name, value)
        # SummaryWriter.add_hparams would make a second log directory for them.
        config = {k: v for k, v in self._config.as_dict().items() if k != "hyper"}
        values = config | dict(self._config.hyper)
        # A bool would be shown as a number.
        shown = {k: v if type(v) in (int, float) else str(v) for k, v in values.items()}
        for summary in hparams(shown, final):
            writer.file_writer.add_summary(summary)

    def close(self, error: BaseException | None) -> None:
        if error is not None:
            self._logger.writer.add_text("Failed", one_line(error))
        self._logger.writer.close()
