"""A learning rate from the first experience alone, for those who will not search."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training.plugins import EvaluationPlugin

from avalanche_classp.optim.optimizer import NonFiniteGradientError

__all__ = ["suggest_lr"]

_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
_HELD_OUT = 0.2
"""Share of each class's samples that is not trained on."""


class _Try(NamedTuple):
    lr: float
    accuracy: float
    loss: float


def suggest_lr(
    strategy_factory: Callable[[float], Any],
    experience: Any,
    *,
    lrs: Sequence[float] = _LRS,
    verbose: bool = True,
) -> float:
    """Return a learning rate that learns the first experience, and no larger than it must be.

    Each lr trains a new strategy on four fifths of the experience and is tested on the last fifth.
    Of those whose accuracy is within one standard error of the best, the smallest is returned: what
    moves the weights less forgets less. It cannot know the stream that comes; a search on all of
    it finds more.

    Args:
        strategy_factory: makes an Avalanche strategy with this lr, and with the epochs and
            mini-batches that will be used.
        experience: the first of a train stream.
        lrs: what is tried. Default: 1e-4 to 1, about three to a step.
        verbose: print what was tried.

    The strategy, its model and its optimizer are copied before they are trained: those that the
    factory refers to stay as they are, and so do the random generators.

    Raises:
        ValueError: no lr, one that is not greater than 0, an experience with too few samples, or
            none of the lrs could be trained.

    Example::

        lr = suggest_lr(lambda lr: CLASSP(model=model, lr=lr), benchmark.train_stream[0])
    """
    if not lrs or not all(0 < lr < math.inf for lr in lrs):
        raise ValueError(f"lrs must be numbers greater than 0, at least one, got {lrs!r}")
    kept, held_out = _split(experience)
    tries = []
    for lr in sorted(lrs):
        with _random_generators_left_alone():
            tries.append(_try(strategy_factory, lr, kept, held_out))
    best = max(tried.accuracy for tried in tries)
    if math.isnan(best) or best < 0:
        raise ValueError(f"training diverged with each of {lrs!r}; give smaller lrs")
    error = math.sqrt(best * (1 - best) / len(held_out.dataset))
    chosen = next(tried for tried in tries if tried.accuracy >= best - error)
    if verbose:
        print(f"{'lr':>8}  accuracy  loss")
        for tried in tries:
            mark = "  <- suggested" if tried is chosen else ""
            shown = f"{100 * tried.accuracy:6.1f} %  {tried.loss:.3g}"
            print(f"{tried.lr:8.2g}  {'diverged' if tried.accuracy < 0 else shown}{mark}")
    return chosen.lr


def _split(experience: Any) -> tuple[Any, Any]:
    """Return the experience twice: without and with the part of each class that is held out."""
    targets = np.asarray(list(experience.dataset.targets))
    kept: list[int] = []
    held_out: list[int] = []
    rng = np.random.default_rng(0)
    for label in np.unique(targets):
        places = rng.permutation(np.flatnonzero(targets == label)).tolist()
        cut = round(_HELD_OUT * len(places))
        held_out += places[:cut]
        kept += places[cut:]
    if not kept or not held_out:
        raise ValueError(
            f"experience must have some samples of each class, got {len(targets)} in all"
        )
    parts = []
    for places in (kept, held_out):
        part = copy.copy(experience)
        part._dataset = experience.dataset.subset(sorted(places))  # `dataset` cannot be set
        parts.append(part)
    return parts[0], parts[1]


def _try(strategy_factory: Callable[[float], Any], lr: float, kept: Any, held_out: Any) -> _Try:
    strategy = strategy_factory(lr)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No loggers specified")
        evaluator = EvaluationPlugin(accuracy_metrics(stream=True), loss_metrics(stream=True))
    # Before the copy: loggers hold files, which cannot be copied.
    plugins = [p for p in strategy.plugins if p is not strategy.evaluator]
    before = strategy.plugins, strategy.evaluator
    strategy.plugins, strategy.evaluator = [*plugins, evaluator], evaluator
    copied = copy.deepcopy(strategy)
    strategy.plugins, strategy.evaluator = before
    try:
        copied.train(kept, eval_streams=[])
    except NonFiniteGradientError:
        return _Try(lr, -1.0, math.nan)
    measured = copied.eval([held_out])

    def value(metric: str) -> float:
        return next(float(v) for k, v in measured.items() if k.startswith(f"{metric}_Stream/"))

    loss = value("Loss")
    return _Try(lr, value("Top1_Acc") if math.isfinite(loss) else -1.0, loss)


@contextmanager
def _random_generators_left_alone() -> Iterator[None]:
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(before[0])
    np.random.set_state(before[1])
