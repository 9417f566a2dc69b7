"""What a benchmark of the user's own tells of itself: counted when it is first asked."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import UserError, line_in, one_line
from .benchmarks import Benchmark, Stream, benchmark_of
from .models import Shape

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

_COUNTED = ("experiences", "experiences_choices", "classes", "shape", "model")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class OwnBenchmark(Benchmark):
    """A benchmark that a user declared: what its stream tells is asked of it when it is needed."""

    experiences: int = field(init=False)
    experiences_choices: tuple[int, ...] = field(init=False)
    classes: int = field(init=False)
    shape: Shape = field(init=False)
    model: str = field(init=False)
    test_stream: str

    def __getattr__(self, name: str) -> Any:
        if name not in _COUNTED:
            raise AttributeError(name)
        for key, value in _count(self).items():
            self.__dict__.setdefault(key, value)
        return self.__dict__[name]

    def count_labels(self, scenario: str, experiences: int) -> int:
        """Return how many labels a head of the model tells apart."""
        return self.classes


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the random generators that a user's function may use; put them back at the end."""
    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


@lru_cache(maxsize=1)
def _made(function: Callable[..., Any], seed: int) -> Any:
    """Make a benchmark, or take the last one: it is counted first and then used."""
    with _seeded(seed):
        return call("benchmark", function, *(seed,) * count_arguments(function))


def _datasets(own: OwnBenchmark, seed: int) -> tuple[list[Any], list[Any]]:
    """Return the datasets of the train and the test stream.

    Raises:
        UserError: they cannot be used.
    """
    assert own.origin is not None
    what = f"benchmark {readable(own.origin)!r}"
    made = _made(own.origin, seed)
    streams = getattr(made, "streams", None)
    if not isinstance(streams, Mapping):
        raise UserError(f"{what} must return an Avalanche benchmark, got a {type(made).__name__}")
    for name in ("train", own.test_stream):
        if name not in streams:
            raise UserError(f"{what} has no stream {name!r}; it has {', '.join(streams)}")
    train, test = ([e.dataset for e in streams[n]] for n in ("train", own.test_stream))
    if len(train) != len(test):
        raise UserError(
            f"{what} has {len(train)} train and {len(test)} test experiences; make as many of each"
        )
    if not train or not all(map(len, (*train, *test))):
        raise UserError(f"{what} has an experience without samples; leave it out")
    for dataset in (*train, *test):
        if not hasattr(dataset, "targets"):
            raise UserError(f"{what} has datasets without targets; use as_classification_dataset")
    return train, test


def load_own(own: OwnBenchmark, stream: Stream) -> CLScenario:
    """Make the benchmark, with train and test streams alone and task labels in every dataset."""
    from avalanche.benchmarks.utils import DataAttribute
    from avalanche.benchmarks.utils.flat_data import ConstantSequence

    name = "targets_task_labels"

    def with_task_labels(dataset: Any) -> Any:
        if hasattr(dataset, name):
            return dataset
        zeros = ConstantSequence(0, len(dataset))
        return dataset.update_data_attribute(name, DataAttribute(zeros, name, use_in_getitem=True))

    train, test = (list(map(with_task_labels, part)) for part in _datasets(own, stream.seed))
    return benchmark_of(train, test)


def _count(own: OwnBenchmark) -> dict[str, Any]:
    """Return what :data:`_COUNTED` are.

    Raises:
        UserError: its samples, labels or task labels are not as the scenario needs them.
    """
    import torch

    assert own.origin is not None
    what = f"benchmark {readable(own.origin)!r}"
    train, test = _datasets(own, 0)
    with _seeded(0):
        sample = train[0][0][0]
    if not isinstance(sample, torch.Tensor):
        raise UserError(
            f"{what} has {type(sample).__name__} samples; give the dataset a transform that makes "
            f"tensors of one size (Resize, ToTensor)"
        )
    labels = {int(label) for dataset in (*train, *test) for label in dataset.targets}
    if min(labels) < 0:
        raise UserError(f"{what} has the label {min(labels)}; labels must be at least 0")
    tasks = {int(t) for d in train for t in getattr(d, "targets_task_labels", (0,))}
    (scenario,) = own.scenarios
    if (len(tasks) > 1) != (scenario == "task") and len(train) > 1:
        raise UserError(
            f"{what} has {len(tasks)} different task labels, which is not the scenario "
            f"{scenario!r}: task has one for each experience, class and domain one for all "
            f"(nc_benchmark: task_labels=)"
        )
    shape = tuple(sample.shape)
    return {
        "experiences": len(train),
        "experiences_choices": (len(train),),
        "classes": max(labels) + 1,
        "shape": shape,
        "model": "cnn" if len(shape) == 3 and shape[0] in (1, 3) else "mlp-256",
    }


# Functions of the user's


def readable(function: Callable[..., Any]) -> str:
    """Return a function's name."""
    return getattr(function, "__name__", type(function).__name__).strip("<>")


def count_arguments(function: Callable[..., Any]) -> int:
    """Return how many positional arguments it cannot do without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have none
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def call(kind: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of the user's.

    Raises:
        UserError: it raised something.
    """
    try:
        return function(*arguments)
    except UserError:
        raise
    except Exception as error:
        file = getattr(sys.modules.get(function.__module__), "__file__", None)
        reason = one_line(error) + line_in(file, error)
        raise UserError(f"{kind} {readable(function)!r} failed: {reason}") from error
