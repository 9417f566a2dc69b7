"""Benchmarks, models and methods of the user's own, beside the built-in ones.

:func:`benchmark`, :func:`model` and :func:`method` put an entry into ``BENCHMARKS``, ``MODELS`` or
``METHODS``; from there on everything knows it. Nothing here imports torch or Avalanche.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError, one_line
from .benchmarks import BENCHMARKS, SCENARIOS
from .config import Epochs, Hyper
from .methods import METHODS, Method, Space
from .models import MODELS, Model, Shape
from .own_stream import OwnBenchmark, call, count_arguments, load_own, readable

if TYPE_CHECKING:
    from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])


def benchmark(
    function: Function | None = None,
    *,
    name: str | None = None,
    description: str | None = None,
    scenario: str = "class",
    model: str | Callable[..., nn.Module] | None = None,
    epochs: Epochs = 3,
    epochs_choices: tuple[int, ...] = (1, 3, 10),
    batch_size: int = 32,
    test_stream: str = "test",
    deterministic: bool = False,
) -> Any:
    """Declare a benchmark: a function that makes an Avalanche benchmark from a seed.

    ::

        @benchmark(scenario="class", model="linear")
        def my_images(seed):
            train, test = ...
            return nc_benchmark(train, test, n_experiences=5, task_labels=False, seed=seed)

    Number of experiences, classes and a sample's shape are read from what it makes. A search takes
    its validation data from the train stream.

    Args:
        function: takes the run's seed, or nothing if it always makes the same. The seed may change
            the order of classes; the same samples must be for testing with every seed, or a search
            would see them. Random generators are seeded before it is called. Its train and test
            streams must have as many experiences as each other, with tensors as samples.
        name: Default: the function's.
        description: one line for ``list``. Default: the first line of the function's docstring.
        scenario: ``class`` (one head for all classes), ``domain`` (the same labels in every
            experience) or ``task`` (a head for each task label).
        model: the model that is used where none is named. Default: ``cnn`` for images of 1 or 3
            channels, else ``mlp-256``.
        epochs: epochs per experience where nothing was searched.
        epochs_choices: what a search chooses from.
        batch_size: mini-batch size.
        test_stream: name of the stream that is evaluated on.
        deterministic: your word that reading a sample gives the same each time (no random
            augmentation). Samples are then read once and kept in memory.

    Raises:
        UserError: the name is taken, or a value is wrong.
    """

    def declare(function: Function) -> Function:
        if scenario not in SCENARIOS:
            raise UserError(f"scenario must be {', '.join(SCENARIOS)}, got {scenario!r}")
        own = OwnBenchmark(
            description=description or _first_line(function),
            batch_size=batch_size,
            load=lambda stream: load_own(own, stream),
            scenarios=(scenario,),
            epochs=epochs,
            epochs_choices=tuple(epochs_choices),
            shared_labels=True,  # a head has all labels, and experiences may share their images
            random=count_arguments(function) > 0,
            origin=function,
            test_stream=test_stream,
            deterministic=deterministic,
        )
        if model is not None:
            own.__dict__["model"] = name_of(MODELS, model)
        return _register("benchmark", BENCHMARKS, name, own, function)

    return declare if function is None else declare(function)


def model(
    function: Function | None = None,
    *,
    name: str | None = None,
    description: str | None = None,
    classifier: str = "",
) -> Any:
    """Declare a model: a function, or a class, that makes an ``nn.Module``.

    ::

        @model
        def linear(classes):
            return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, classes))

    Args:
        function: takes the number of classes, or nothing if it needs no argument.
        name: Default: the function's.
        description: one line for ``list``. Default: the first line of the function's docstring.
        classifier: attribute that holds the last layer, of which the scenario ``task`` has one per
            task. Default: the last attribute that is a Linear layer, or a Sequential that ends in
            one.

    Raises:
        UserError: the name is taken.
    """

    def declare(function: Function) -> Function:
        def make(shape: Shape, labels: int) -> nn.Module:
            arguments = (labels,) if count_arguments(function) else ()
            made = call("model", function, *arguments)
            _require_fits(f"model {readable(function)!r}", made, shape, labels)
            return made

        own = Model(description or _first_line(function), make, classifier, origin=function)
        return _register("model", MODELS, name, own, function)

    return declare if function is None else declare(function)


def method(
    function: Function | None = None,
    *,
    name: str | None = None,
    description: str | None = None,
    defaults: Hyper | None = None,
    space: Space | None = None,
) -> Any:
    """Declare a method: a function that builds an Avalanche strategy.

    ::

        @method(defaults={"lr": 0.01, "momentum": 0.9})
        def momentum(model, hyper, common):
            optimizer = SGD(model.parameters(), **hyper)
            return Naive(model=model, optimizer=optimizer, **common)

    Args:
        function: takes the model, the hyper-parameters (a mapping with the keys of ``defaults``)
            and what all strategies get, as keyword arguments: criterion, mini-batch sizes, device,
            evaluator. Give these on.
        name: Default: the function's.
        description: one line for ``list``. Default: the first line of the function's docstring.
        defaults: its hyper-parameters, numbers or bools, with the values where nothing was
            searched.
        space: takes an Optuna trial and returns the hyper-parameters that a search tries; the
            others keep their defaults. Default: lr from 1e-5 to 1, if it has one.

    Raises:
        UserError: the name is taken, or a default is no number.
    """
    values = dict(defaults or {})
    for key, value in values.items():
        if not isinstance(value, int | float):
            raise UserError(f"defaults[{key!r}] must be a number, true or false, got {value!r}")

    def lr_alone(trial: Any) -> dict[str, Any]:
        return {"lr": trial.suggest_float("lr", 1e-5, 1.0, log=True)} if "lr" in values else {}

    def declare(function: Function) -> Function:
        own = Method(
            description=description or _first_line(function),
            defaults=values,
            build=function,
            space=space or lr_alone,
            origin=function,
        )
        return _register("method", METHODS, name, own, function)

    return declare if function is None else declare(function)


def is_declared(entries: Mapping[str, Any], function: Callable[..., Any]) -> bool:
    """Tell whether an entry was declared with this function."""
    return any(entry.origin is function for entry in entries.values())


def name_of(entries: Mapping[str, Any], given: str | Callable[..., Any]) -> str:
    """Return a name as it is, and the name that a function was declared with.

    Raises:
        UserError: the function was not declared.
    """
    if isinstance(given, str):
        return given
    for name, entry in entries.items():
        if entry.origin is given:
            return name
    name = readable(given)
    raise UserError(f"{name} is not declared; decorate it with @benchmark, @model or @method")


def _register(
    kind: str, entries: dict[str, Any], name: str | None, entry: Any, function: Function
) -> Function:
    """Add an entry. A cell that is run again replaces its own entry, nothing else is replaced."""
    name = name or readable(function)
    there = entries.get(name)
    if there is not None and _place(there.origin) != _place(function):
        owner = "a built-in one" if there.origin is None else ".".join(_place(there.origin))
        raise UserError(f"the {kind} name {name!r} is taken by {owner}; give another name=")
    entries[name] = entry
    return function


def _place(function: Callable[..., Any] | None) -> tuple[str, str]:
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", "")


def _first_line(function: Callable[..., Any]) -> str:
    text = inspect.getdoc(function) if inspect.isroutine(function) else function.__doc__
    return (text or "").strip().partition("\n")[0] or "declared by the user"


def _require_fits(what: str, made: Any, shape: Shape, labels: int) -> None:
    """Check that a model takes the samples and has enough outputs.

    Raises:
        UserError: it does not.
    """
    import torch
    from avalanche.models import MultiTaskModule

    if not isinstance(made, torch.nn.Module):
        raise UserError(f"{what} must return an nn.Module, got a {type(made).__name__}")
    if isinstance(made, MultiTaskModule):
        return
    training = made.training
    try:
        with torch.no_grad():
            out = made.eval()(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(f"{what} does not take samples of {shape}: {one_line(error)}") from error
    made.train(training)
    if out.dim() != 2 or out.shape[1] < labels:
        raise UserError(
            f"{what} gives an output of the shape {tuple(out.shape[1:])} for a sample; it must "
            f"have a number for each of {labels} classes"
        )
