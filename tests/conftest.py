"""Tiny benchmarks, models and helpers that the tests share.

Avalanche, whose import takes seconds, is imported by the functions that need it, so that the
tests of the optimizer alone start at once.
"""

from __future__ import annotations

import contextlib
import math
import random
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import experiments  # noqa: F401 - `avalanche_classp.experiments` of the examples is this one
from avalanche_classp import CLASSPOptimizer

torch.set_num_threads(1)

SGD = torch.optim.SGD

FEATURES = 6
HIDDEN = 5
CLASSES = ((0, 1), (2, 3), (4, 5))
BATCH = 8

BAD_VALUES = [
    ("lr", -0.1, ValueError),
    ("lr", math.inf, ValueError),
    ("lr", "0.1", TypeError),
    ("threshold", -1e-6, ValueError),
    ("threshold", math.nan, ValueError),
    ("threshold", [0.5], TypeError),
    ("epsilon", -1.0, ValueError),
    ("epsilon", True, TypeError),
    ("power", 0, ValueError),
    ("power", -2.0, ValueError),
    ("power", "2", TypeError),
    ("apply_decay", 1, TypeError),
    ("apply_decay", "yes", TypeError),
    ("nonfinite", "ignore", ValueError),
    ("foreach", 1, TypeError),
    ("fused", "yes", TypeError),
]
"""Hyper-parameters that must be refused: name, value, type of the error."""

BAD_PHASES = [
    ("paper", TypeError, ["phases", "'paper'"]),
    ({"lr": 0.1}, TypeError, ["phases", "{'lr': 0.1}"]),
    (5, TypeError, ["phases", "5"]),
    ([], ValueError, ["phases", "[]"]),
    ((), ValueError, ["phases", "()"]),
    ([{"lr": 0.1}, {"momentum": 0.9}], ValueError, ["phases[1]", "'momentum'"]),
    ([{"lr": 0.1}, {"lr": -3}], ValueError, ["phases[1]", "lr", "-3"]),
    ([{"apply_decay": "no"}], TypeError, ["phases[0]", "apply_decay", "'no'"]),
    ([{"power": 1.0}, None], TypeError, ["phases[1]", "None"]),
    ([{"power": 1.0}, ("lr", 0.1)], TypeError, ["phases[1]", "('lr', 0.1)"]),
]
"""Phases that must be refused: value, type of the error, what its message must name."""


def pytest_configure(config: pytest.Config) -> None:
    # A script's job in the background ignores it, and so would the programs that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _bad_inputs_tried() -> Counter[str]:
    bad_input = sys.modules.get("bad_input")
    return Counter() if bad_input is None else bad_input.TRIED


_TRIED_BY_WORKERS: Counter[str] = Counter()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of pytest-xdist's processes
        session.config.workeroutput["tried"] = dict(_bad_inputs_tried())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _TRIED_BY_WORKERS.update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    tried = _bad_inputs_tried() + _TRIED_BY_WORKERS
    if tried:
        each = ", ".join(f"{n} {where}" for where, n in sorted(tried.items()))
        terminalreporter.write_line(f"{tried.total()} bad inputs tried: {each}")


def seed_everything(seed: int = 0) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    seed_everything()


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Have the system refuse to write more than so many bytes into a file: a full disk.

    In this process, not in a fork of it: after a test that compiles, torch refuses to train there.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- data and models ------------------------------------------------------------------------------


def make_data(classes: Sequence[int], per_class: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return features that tell the classes apart, and the classes, in mixed order."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(classes).repeat(per_class)
    centers = 2 * torch.eye(FEATURES)[y % FEATURES]
    return centers + torch.randn(len(y), FEATURES, generator=generator), y


def make_benchmark(
    classes: Sequence[Sequence[int]] = CLASSES, tasks: Sequence[int] | None = None
) -> Any:
    """Return a benchmark with one experience of 24 samples for each pair of classes."""
    from avalanche.benchmarks import tensors_benchmark

    return tensors_benchmark(
        [make_data(c) for c in classes],
        [make_data(c, per_class=3, seed=1) for c in classes],
        other_streams_tensors={"valid": [make_data(c, per_class=5, seed=2) for c in classes]},
        task_labels=[0] * len(classes) if tasks is None else tasks,
    )


@pytest.fixture(scope="session")
def tiny() -> Any:
    return make_benchmark()


def linear_head() -> nn.Module:
    """Return a model with an output for every class, the same weights at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 6))


GROWING = ("2.classifier.weight", "2.classifier.bias")
"""Names of the parameters of `growing_head()` that grow."""


def growing_head() -> nn.Module:
    """Return a model whose head has two outputs and gets two more in each experience."""
    from avalanche.models import IncrementalClassifier

    torch.manual_seed(0)
    body = (nn.Linear(FEATURES, HIDDEN), nn.Tanh())
    return nn.Sequential(*body, IncrementalClassifier(HIDDEN, initial_out_features=2))


def many_heads() -> nn.Module:
    """Return a model with one head per task."""
    from avalanche.models import MTSimpleMLP

    torch.manual_seed(0)
    return MTSimpleMLP(input_size=FEATURES, hidden_size=HIDDEN)


# --- strategies -----------------------------------------------------------------------------------


class On:
    """An Avalanche plugin made of functions: `On(before_eval=f)` calls `f(strategy)`."""

    def __init__(self, **hooks: Callable[[Any], Any]) -> None:
        for name, function in hooks.items():
            setattr(self, name, lambda strategy, f=function, **kwargs: f(strategy))


def build(strategy_class: type, model: nn.Module, **kwargs: Any) -> Any:
    """Return a quiet strategy with SGD, unless `kwargs` say otherwise."""
    kwargs = {
        "evaluator": None,
        "train_mb_size": BATCH,
        "criterion": nn.CrossEntropyLoss(),
    } | kwargs
    if "optimizer" not in kwargs:
        kwargs["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    return strategy_class(model=model, **kwargs)


def naive(model: nn.Module, *plugins: Any, **kwargs: Any) -> Any:
    from avalanche.training import Naive

    return build(Naive, model, plugins=list(plugins), **kwargs)


def fit(strategy: Any, experiences: Iterable[Any], **kwargs: Any) -> Any:
    """Train on one experience after the other, in a fixed order of samples."""
    for experience in experiences:
        seed_everything(1)
        strategy.train(experience, **({"shuffle": False} | kwargs))
    return strategy


def hand_written_loop(
    model: nn.Module,
    *,
    epochs: int,
    phases: Sequence[dict[str, Any]] = ({},),
    consolidation: float = 1.0,
    criterion: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    **hyperparameters: Any,
) -> CLASSPOptimizer:
    """Train without Avalanche on the batches that `fit(strategy, tiny.train_stream)` sees."""
    optimizer = CLASSPOptimizer(model.parameters(), **hyperparameters)
    for i, classes in enumerate(CLASSES):
        optimizer.param_groups[0].update(phases[min(i, len(phases) - 1)])
        x, y = make_data(classes)
        for _ in range(epochs):
            for start in range(0, len(y), BATCH):
                batch = slice(start, start + BATCH)
                optimizer.zero_grad()
                criterion(model(x[batch]), y[batch]).backward()
                optimizer.step()
        for p in model.parameters():
            optimizer.state[p]["accumulator"] *= consolidation
    return optimizer


# --- parameter groups -----------------------------------------------------------------------------


def two_groups(model: nn.Module, **head: Any) -> list[dict[str, Any]]:
    """Return two groups, the body with lr 0.1 and the head with lr 0.2 and what is given."""
    return [
        {"params": list(model[0].parameters()), "lr": 0.1},
        {"params": list(model[2].parameters()), "lr": 0.2, **head},
    ]


def values(optimizer: torch.optim.Optimizer, key: str) -> list[Any]:
    return [group[key] for group in optimizer.param_groups]


def held_ids(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


# --- what is compared -----------------------------------------------------------------------------


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def accumulators(strategy: Any) -> dict[str, Tensor]:
    """Return what the optimizer has accumulated for the tensors that the model has now."""
    state = strategy.optimizer.state
    return {
        name: state[p]["accumulator"].clone()
        for name, p in strategy.model.named_parameters()
        if "accumulator" in state.get(p, {})
    }


def total(tensors: dict[str, Tensor]) -> float:
    return sum(t.sum().item() for t in tensors.values())


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Tell whether two dicts hold the same tensors, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
