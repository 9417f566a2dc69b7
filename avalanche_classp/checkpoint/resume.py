"""Checkpoints of a whole Avalanche strategy, and training that goes on from them."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.logging import CSVLogger
from avalanche.training.templates import BaseSGDTemplate

from avalanche_classp.checkpoint.file import (
    TEMPORARY,
    CheckpointError,
    read_file,
    verified,
    write_file,
)
from avalanche_classp.checkpoint.strategy_state import (
    Stays,
    captured,
    captured_random_state,
    places,
    restore,
    restore_random_state,
)
from avalanche_classp.plugin import CLASSPPlugin

__all__ = ["CheckpointError", "checkpointed", "mend_save_checkpoint"]

_SUFFIX = ".checkpoint"
_PATTERN = 8 * "[0-9]" + _SUFFIX


def checkpointed(
    stream: Iterable[Any],
    strategy: Any,
    folder: str | os.PathLike[str],
    *,
    every_epochs: int | None = None,
    keep: int = 2,
) -> Iterator[Any]:
    """Return the experiences that are still to be trained, and make a checkpoint after each.

    Build benchmark, model and strategy as always, with the same seeds, and loop over this instead
    of the stream. If the process dies, start the same script again: it goes on from the newest
    checkpoint, and ends with the same weights, accumulators and metrics as if it had never been
    stopped, on a CPU bit for bit. Example::

        strategy = CLASSP(model=SimpleMLP(), lr=1e-3, train_mb_size=32, train_epochs=20)
        strategy.results = []
        for experience in checkpointed(
            benchmark.train_stream, strategy, "checkpoints", every_epochs=5
        ):
            strategy.train(experience)
            strategy.results.append(strategy.eval(benchmark.test_stream))

    *When.* The checkpoint of an experience is made when the loop's body has ended, so evaluations
    belong to it. That of an epoch is made when all plugins have seen the epoch, the strategy's
    periodic evaluations too; afterwards ``strategy.train(experience)`` begins with the next epoch.
    What the body does before ``train`` is done again then, on the weights of the checkpoint; and
    only the first experience that a body trains has checkpoints of its epochs. There are none
    within an epoch. When the stream is through, the strategy is loaded and the loop is empty.

    *What.* All that the strategy holds: model, with heads that grew; optimizer; plugins, with
    CLASSP's phase, EWC's importances and LwF's former model; clock; metrics, with all values so
    far; attributes of yours, such as ``results`` above; and the random states of Python, NumPy,
    torch and CUDA. Numbers given to constructors belong to it and win over those of the script.
    These are tested to resume bit for bit on a CPU, between experiences and within them:
    CLASSP, with phases, with matrix accumulators and with a learning-rate scheduler;
    CLASSPPlugin beside EWC; Naive with SGD, Adam and EarlyStoppingPlugin; EWC in both modes,
    SynapticIntelligence, MAS, LwF, RWalk and JointTraining; growing and multiple heads, batch
    norm, dropout; ``in_memory``; online streams; worker processes (with ``persistent_workers``
    the order of the samples is another one after a crash). Other methods work if they are made
    of tensors, numbers, containers, modules and objects made of these, or have ``state_dict()``
    and ``load_state_dict()``. Code (functions, with what closures hold, and hooks) stays that
    of the script. What else cannot be kept, or not be made anew, raises a CheckpointError that
    says where it is, and is not dropped silently; so do plugins that store samples, such as
    Replay: see :func:`mend_save_checkpoint`.

    *Loggers* are outputs and stay those of the script. CSVLogger begins its files anew, and the
    rows up to the checkpoint are written back into them. TensorboardLogger adds a file to its
    folder, with what came after the checkpoint once more; so does CSVValueLogger add lines, and
    InteractiveLogger and TextLogger print it again. Metrics of time measure with clocks that began
    anew.

    *Devices.* Tensors come back on the kind of device on which they were; model and optimizer go
    to the strategy's, and what other plugins hold does not follow them from a CPU to a GPU. None of
    this was tried on a GPU.

    *Files.* Each is written beside its place, flushed to the disk and renamed, and has a SHA-256
    checksum that is compared before anything is parsed; that finds damage, and is no signature.
    Loading runs no code from a file: it holds tensors and plain containers
    (``torch.load(weights_only=True)``), and nothing is imported because a file names it.

    With an optimizer alone, without Avalanche, use its ``state_dict()`` and ``load_state_dict()``.

    Args:
        stream: the experiences, such as ``benchmark.train_stream``, the same each time: a stream
            that shuffles when it is iterated (``split_online_stream``) as a list.
        strategy: as it was built. If there is a checkpoint its state is loaded at once.
        folder: where the checkpoints of this run, and of no other, are; it is made if need be.
        every_epochs: make one after every so many epochs of an experience, too. Default (None):
            between experiences alone.
        keep: how many are kept, at least 2. Default: 2.

    Returns:
        An iterator over the experiences that are left.

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of its range; more than one
            process.
        CheckpointError: none of the checkpoints can be used; the strategy is built differently or
            holds what cannot be kept; later, when one cannot be written: those before are intact.

    Warns:
        UserWarning: a checkpoint is truncated, corrupt or foreign, and an older one is used.
    """
    if isinstance(stream, str) or not isinstance(stream, Iterable):
        raise TypeError(f"stream must be a sequence of experiences, got {stream!r}")
    if not isinstance(strategy, BaseSGDTemplate):
        raise TypeError(f"strategy must be an Avalanche strategy, got {strategy!r}")
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, got {folder!r}")
    for name, value, least in (("every_epochs", every_epochs, 1), ("keep", keep, 2)):
        if name == "every_epochs" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ValueError("checkpointed works in one process; torch.distributed is initialized")
    checkpoints = _Checkpoints(Path(folder), every_epochs, keep)
    checkpoints.resume(strategy)
    return checkpoints.remaining(strategy, stream)


def mend_save_checkpoint() -> None:
    """Make Avalanche's own ``save_checkpoint`` work with torch's optimizers, in this process.

    It fails there with a PicklingError, because ``torch.optim`` hides its submodules and dill
    does not find their classes; this shows them again and changes nothing else. It keeps what
    :func:`checkpointed` refuses, such as samples for replay, between experiences::

        mend_save_checkpoint()
        strategy, done = maybe_load_checkpoint(strategy, "strategy.pkl")
        for experience in benchmark.train_stream[done:]:
            strategy.train(experience)
            save_checkpoint(strategy, "strategy.pkl")

    Its file is a pickle: loading it runs whatever code it holds, so load none that you did not
    write. It is not written atomically, and the model afterwards is ``strategy.model``, another
    object than before.
    """
    for name, module in list(sys.modules.items()):
        package, _, submodule = name.rpartition(".")
        if package == "torch.optim" and not hasattr(torch.optim, submodule):
            setattr(torch.optim, submodule, module)


class _Checkpoints(SupervisedPlugin, Stays):
    """Saves and restores a strategy. It is the last of the plugins: all others have acted."""

    def __init__(self, folder: Path, every_epochs: int | None, keep: int) -> None:
        super().__init__()
        self.folder = folder
        self.every_epochs = every_epochs
        self.keep = keep
        self.good: list[Path] = []  # from the oldest to the newest
        self.number = 0
        self.places: set[str] = set()
        self.done = 0  # how often the loop's body has ended
        self.begun = 0  # experiences that the loop's body has begun to train
        self.within: Path | None = None  # the checkpoint from which an experience goes on
        self.random_state: Any = None  # before the experience's training
        self.train_epochs: int | None = None  # of an experience that goes on

    # --- the loop ---------------------------------------------------------------------------------

    def resume(self, strategy: Any) -> None:
        """Become a plugin of the strategy, and load the newest good checkpoint if there is one."""
        plugins = [p for p in strategy.plugins if not isinstance(p, _Checkpoints)]
        for plugin in plugins:
            if isinstance(plugin, CLASSPPlugin):
                plugin.take_over(strategy)
        strategy.plugins = [*plugins, self]
        self.places = places(strategy)  # refuses what would be refused after an experience
        content, problems = self._newest(self._files(), strategy)
        if content is None:
            return
        for problem in problems:
            warnings.warn(f"{problem}. Going on from {self.good[-1]}", stacklevel=3)
        self._restore(strategy, content)
        self.done = content["done"]
        if content["epoch"]:
            self.within = self.good[-1]
            self.random_state = content["random_before_training"]

    def _files(self) -> list[Path]:
        """Return the checkpoints in the folder, from the oldest to the newest."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(_PATTERN + TEMPORARY):
                path.unlink()  # a process died while it wrote
            return sorted(self.folder.glob(_PATTERN))
        except OSError as error:
            raise CheckpointError(
                f"cannot use the folder {self.folder} for checkpoints: {error.strerror}; name "
                f"another"
            ) from error

    def _newest(self, paths: list[Path], strategy: Any) -> tuple[Any, list[str]]:
        """Return the content of the newest file that is good, and what is wrong with others."""
        content, problems = None, []
        for path in reversed(paths):
            try:
                if content is None:
                    content = read_file(path, strategy.device)
                else:
                    verified(path)
                self.good.insert(0, path)
            except CheckpointError as error:
                problems.append(str(error))
        if paths:
            self.number = int(paths[-1].stem)
            if content is None:
                raise CheckpointError(
                    f"no checkpoint in {self.folder} can be used: {'; '.join(problems)}. Name "
                    f"another folder to start anew"
                )
        return content, problems

    def remaining(self, strategy: Any, stream: Iterable[Any]) -> Iterator[Any]:
        """Yield the experiences that are left, and save after the loop's body."""
        try:
            for i, experience in enumerate(stream):
                if i < self.done:
                    continue
                self.begun = 0
                yield experience
                self.within = None
                self.done = i + 1
                self._save(strategy, epoch=0)
        finally:
            strategy.plugins = [p for p in strategy.plugins if p is not self]

    # --- hooks ------------------------------------------------------------------------------------

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Have the random numbers with which the experience's data were made, and are again."""
        if self.begun == 0:
            if self.within is None:
                self.random_state = captured_random_state()
            else:
                restore_random_state(strategy, self.random_state)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Undo what all plugins have just begun, if the experience goes on."""
        self.begun += 1
        if self.begun == 1 and self.within is not None:
            # From the file: the tensors read before are the strategy's and may have changed.
            content = read_file(self.within, strategy.device)
            self.within = None
            self._restore(strategy, content)
            # Avalanche asks for the number of epochs next, and not again.
            self.train_epochs = strategy.train_epochs
            strategy.train_epochs -= content["epoch"]

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Set the number of epochs right again."""
        if self.train_epochs is not None:
            strategy.train_epochs, self.train_epochs = self.train_epochs, None

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Save, unless the experience ends here."""
        epoch = strategy.clock.train_exp_epochs
        wanted = self.every_epochs is not None and epoch % self.every_epochs == 0
        if wanted and self.begun == 1 and epoch < strategy.train_epochs:
            self._save(strategy, epoch)

    # --- what is saved ----------------------------------------------------------------------------

    def _save(self, strategy: Any, epoch: int) -> None:
        content = {
            "done": self.done,
            "epoch": epoch,
            "random": captured_random_state(),
            "random_before_training": self.random_state if epoch else None,
            "csv": [_rows(logger) for logger in _csv_loggers(strategy)],
            **captured(strategy, self.places),
        }
        self.number += 1
        path = self.folder / f"{self.number:08}{_SUFFIX}"
        write_file(path, content)
        self.good.append(path)
        while len(self.good) > self.keep:
            self.good.pop(0).unlink(missing_ok=True)

    def _restore(self, strategy: Any, content: dict[str, Any]) -> None:
        restore(strategy, content)
        for logger, rows in zip(_csv_loggers(strategy), content["csv"], strict=False):
            _write_rows(logger, rows)
        restore_random_state(strategy, content["random"])


# --- CSVLogger opens its files with "w" -----------------------------------------------------------

_OF_CSV_LOGGERS = ("training_exp_id", "in_train_phase", "val_acc", "val_loss")


def _csv_loggers(strategy: Any) -> list[Any]:
    return [logger for logger in strategy.evaluator.loggers if isinstance(logger, CSVLogger)]


def _rows(logger: Any) -> dict[str, Any]:
    return {
        "files": [Path(f.name).read_text() for f in (logger.training_file, logger.eval_file)],
        "attributes": {name: getattr(logger, name) for name in _OF_CSV_LOGGERS},
    }


def _write_rows(logger: Any, rows: dict[str, Any]) -> None:
    for file, text in zip((logger.training_file, logger.eval_file), rows["files"], strict=True):
        file.seek(0)
        file.truncate()
        file.write(text)
        file.flush()
    vars(logger).update(rows["attributes"])
