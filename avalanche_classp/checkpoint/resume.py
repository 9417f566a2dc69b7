"""Checkpoints of a whole Avalanche strategy, and training that goes on from them."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.templates import BaseSGDTemplate

from avalanche_classp.checkpoint.avalanche_internals import (
    csv_loggers,
    csv_rows,
    restore_csv_rows,
)
from avalanche_classp.checkpoint.decoding import (
    check,
    check_classes,
    decode,
    decode_random_state,
)
from avalanche_classp.checkpoint.encoding import (
    collect_initial_state,
    encode,
    encode_random_state,
)
from avalanche_classp.checkpoint.file import (
    TEMPORARY,
    CheckpointError,
    read_content,
    read_file,
    verified,
    write_file,
)
from avalanche_classp.checkpoint.settings import Differences
from avalanche_classp.checkpoint.values import INITIAL_STATES, NotSaved
from avalanche_classp.optim.checks import require_whole
from avalanche_classp.plugin import CLASSPPlugin

__all__ = ["CheckpointError", "checkpointed", "mend_save_checkpoint"]

_SUFFIX = ".checkpoint"
_ON_CHANGE = ("refuse", "script", "checkpoint")
_PATTERN = 8 * "[0-9]" + _SUFFIX


def checkpointed(
    stream: Iterable[Any],
    strategy: Any,
    folder: str | os.PathLike[str],
    *,
    every_epochs: int | None = None,
    keep: int = 2,
    on_change: str = "refuse",
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

    A checkpoint holds the whole strategy (model, optimizer, plugins, clock, metrics, attributes of
    yours such as ``results`` above) and the random states of Python, NumPy, torch and CUDA. It is
    made when the loop's body has ended; that of an epoch when all plugins have seen the epoch, for
    the first experience that a body trains. What the body does before ``train`` is done again when
    an experience goes on. Code and loggers stay those of the script, and loading a file runs no
    code from it. What could not be loaded again, such as stored samples, is refused by the first
    call or when it is saved. A line on stderr says from where a run goes on, or that nothing is
    left to do. ``docs/checkpoints.md`` says more.

    Args:
        stream: the experiences, such as ``benchmark.train_stream``, the same each time: a stream
            that shuffles when it is iterated (``split_online_stream``) as a list. To count or pair
            them, do it inside: ``checkpointed(enumerate(stream), …)``, ``checkpointed(zip(
            train_stream, valid_stream), …)``.
        strategy: as it was built. If there is a checkpoint its state is loaded at once.
        folder: where the checkpoints of this run, and of no other, are; it is made if need be.
        every_epochs: make one after every so many epochs of an experience, too. Default (None):
            between experiences alone.
        keep: how many are kept, at least 2. Default: 2.
        on_change: what to do if the script gives other numbers (lr, epochs, batch size, …) or
            shapes than it did when the checkpoint was made. "refuse" (default) raises a
            CheckpointError that names them; "script" goes on with the script's numbers,
            "checkpoint" with those of the checkpoint. Strings and numbers that are no arguments
            of a constructor are those of the checkpoint, or with "script" of the script; a
            warning names them.

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of its range; more than one
            process.
        CheckpointError: none of the checkpoints can be used; the script was changed; the strategy
            holds what cannot be kept; later, when one cannot be written: those before are intact.

    Warns:
        UserWarning: a checkpoint is truncated, corrupt or foreign, and an older one is used; the
            script was changed in what does not decide.
    """
    if isinstance(stream, str) or not isinstance(stream, Iterable):
        raise TypeError(f"stream must be a sequence of experiences, got {stream!r}")
    if not isinstance(strategy, BaseSGDTemplate):
        raise TypeError(f"strategy must be an Avalanche strategy, got {strategy!r}")
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, got {folder!r}")
    if every_epochs is not None:
        require_whole("every_epochs", every_epochs)
    require_whole("keep", keep, 2)
    if on_change not in _ON_CHANGE:
        raise ValueError(f"on_change must be one of {', '.join(_ON_CHANGE)}, got {on_change!r}")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ValueError("checkpointed works in one process; torch.distributed is initialized")
    checkpoints = _Checkpoints(Path(folder), every_epochs, keep)
    checkpoints.resume(strategy, stream, on_change)
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


class _Checkpoints(SupervisedPlugin, NotSaved):
    """Saves and restores a strategy. It is the last of the plugins: all others have acted."""

    def __init__(self, folder: Path, every_epochs: int | None, keep: int) -> None:
        super().__init__()
        self.folder = folder
        self.every_epochs = every_epochs
        self.keep = keep
        self.good: list[Path] = []  # from the oldest to the newest
        self.number = 0
        self.initial: Any = None
        self.settings: dict[str, Any] = {}  # of the script that this run began with
        self.from_script: set[str] = set()  # settings that are not those of the checkpoint
        self.verified = False  # whether a checkpoint was read again
        self.done = 0  # how often the loop's body has ended
        self.begun = 0  # experiences that the loop's body has begun to train
        self.epochs = 0  # of the experience that goes on
        self.within: Path | None = None  # the checkpoint from which an experience goes on
        self.random_state: Any = None  # before the experience's training
        self.train_epochs: int | None = None  # of an experience that goes on

    # --- the loop ---------------------------------------------------------------------------------

    def resume(self, strategy: Any, stream: Iterable[Any], on_change: str) -> None:
        """Become a plugin of the strategy, and load the newest good checkpoint if there is one."""
        plugins = [p for p in strategy.plugins if not isinstance(p, _Checkpoints)]
        for plugin in plugins:
            if isinstance(plugin, CLASSPPlugin):
                plugin.take_over(strategy)
        strategy.plugins = [*plugins, self]
        content, problems = self._newest(self._files(), strategy)
        # A strategy at hand that has trained is no longer what the script built.
        known = vars(strategy).setdefault(INITIAL_STATES, {})
        self.initial = known.get(self.folder.resolve())
        if content is None or self.initial is None:
            self.initial = known[self.folder.resolve()] = collect_initial_state(strategy, stream)
        self.settings = {path: value for path, (value, _) in self.initial.settings.items()}
        if content is None:
            buffer = io.BytesIO()
            torch.save(encode(strategy, self.initial), buffer)
            written = read_content(buffer.getbuffer(), self.folder, strategy.device)
            check(strategy, written, self.initial)
            return
        for problem in problems:
            warnings.warn(f"{problem}. Going on from {self.good[-1]}", stacklevel=3)
        check_classes(strategy, content)
        self._compare_settings(content["settings"], on_change)
        self._restore(strategy, content)
        self.done = content["done"]
        self.epochs = content["epoch"]
        if self.epochs:
            self.within = self.good[-1]
            self.random_state = content["random_before_training"]

    def _compare_settings(self, then: dict[str, Any], on_change: str) -> None:
        found = Differences(then, self.initial.settings)
        where = f"{self.good[-1]} was made by another version of the script"
        if found.deciding and (on_change == "refuse" or (found.shapes and on_change == "script")):
            choices = 'choose on_change="script" (the new numbers) or "checkpoint" (the old ones)'
            if found.shapes:
                choices = 'go on with the old shapes and numbers by on_change="checkpoint"'
            raise CheckpointError(
                f"{where}: {found.deciding}. Set this back, {choices}, or name another folder to "
                f"start anew"
            )
        if found.others and on_change == "refuse":
            warnings.warn(f"{where}: {found.others}. The old values go on", stacklevel=4)
        if on_change == "script":
            self.from_script = found.paths
        else:
            self.settings = then

    def _announce(self, experiences: int | None, nothing_left: bool) -> None:
        """Say from where a run goes on, or that there is nothing left to do."""
        of = "" if experiences is None else f" of {experiences}"
        done = f"{self.done}{of} experiences done"
        if self.epochs:
            done += f", and {self.epochs} epoch{'s' * (self.epochs > 1)} of the next"
        line = f"Resuming from {self.good[-1]}: {done}"
        if nothing_left:
            line = (
                f"Nothing left to train: {self.good[-1]} has {done}; name another folder to start "
                f"anew"
            )
        print(line, file=sys.stderr)

    def _files(self) -> list[Path]:
        """Return the files in the folder, from the oldest to the newest."""
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
        resumed = self.done > 0 or self.epochs > 0
        experiences = len(stream) if isinstance(stream, Sized) else None
        try:
            for i, experience in enumerate(stream):
                if i < self.done:
                    continue
                if resumed:
                    self._announce(experiences, nothing_left=False)
                    resumed = False
                self.begun = 0
                yield experience
                self.within = None
                self.done = i + 1
                self._save(strategy, epoch=0)
            if resumed:
                self._announce(experiences, nothing_left=True)
        finally:
            strategy.plugins = [p for p in strategy.plugins if p is not self]

    # --- hooks ------------------------------------------------------------------------------------

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Have the random numbers with which the experience's data were made, and are again."""
        if self.begun == 0:
            if self.within is None:
                self.random_state = encode_random_state()
            else:
                decode_random_state(self.random_state)

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
            "random": encode_random_state(),
            "random_before_training": self.random_state if epoch else None,
            "csv": [csv_rows(logger) for logger in csv_loggers(strategy)],
            "settings": self.settings,
            **encode(strategy, self.initial),
        }
        self.number += 1
        path = self.folder / f"{self.number:08}{_SUFFIX}"
        write_file(path, content)
        if not self.verified:
            try:
                check(strategy, read_file(path, strategy.device), self.initial)
            except CheckpointError:
                path.unlink()
                raise
            self.verified = True
        self.good.append(path)
        while len(self.good) > self.keep:
            self.good.pop(0).unlink(missing_ok=True)

    def _restore(self, strategy: Any, content: dict[str, Any]) -> None:
        decode(strategy, content, self.initial, self.from_script)
        for logger, rows in zip(csv_loggers(strategy), content["csv"], strict=False):
            restore_csv_rows(logger, rows)
        decode_random_state(content["random"])
