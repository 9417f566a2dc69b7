"""The state of a strategy as tensors and plain containers, and back into a strategy.

``captured`` walks over everything that a strategy holds. ``restore`` walks over a strategy that was
built anew, beside what was captured: what is there keeps its identity (a parameter that a user or
an optimizer holds stays the one that is trained) and gets the captured values. Code is never
captured: functions, classes and methods stay those of the strategy built anew.

What is shared stays shared: ``torch.save`` writes an object that is met twice once, and memory that
two tensors share once.
"""

from __future__ import annotations

import collections
import copy
import enum
import functools
import logging
import pathlib
import random
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates import BaseSGDTemplate
from avalanche.training.utils import ParamData
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from avalanche_classp.checkpoint.file import CheckpointError

__all__ = [
    "Stays",
    "captured",
    "captured_random_state",
    "places",
    "restore",
    "restore_random_state",
]


class Stays:
    """What is no state: it stays as it is in the strategy built anew."""


_STAYS = (
    Stays,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    type,
    functools.partial,
    enum.Enum,
    pathlib.PurePath,
    torch.device,
    logging.Logger,
    BaseLogger,
)

_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_OF_NUMBERS = (torch.dtype, np.ndarray, np.generic)
_SEQUENCES: dict[str, Callable[[Iterable[Any]], Any]] = {
    of.__name__: of for of in (tuple, set, frozenset, torch.Size)
}
_MAPPINGS: dict[str, type[dict[Any, Any]]] = {
    of.__name__: of
    for of in (dict, collections.OrderedDict, collections.Counter, collections.defaultdict)
}
_CONTAINERS = (list, collections.deque, *_SEQUENCES.values(), *_MAPPINGS.values())
_MAKERS = (dict, float, int, list, set)
"""Factories of a defaultdict that are kept by their names."""

_KEPT_OF_MODULES = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_LEFT_OUT: tuple[tuple[type, set[str]], ...] = (
    # Hooks: code.
    (nn.Module, {n for n in vars(nn.Module()) if n.startswith("_")} - _KEPT_OF_MODULES),
    (EvaluationPlugin, {"loggers"}),
    # Of the experience at hand: what Avalanche's own _train_cleanup and _eval_cleanup drop, and
    # JointTraining's experiences.
    (
        BaseSGDTemplate,
        {
            "experience",
            "_experiences",
            "adapted_dataset",
            "dataloader",
            "mbatch",
            "mb_output",
            "loss",
            "current_eval_stream",
            "_eval_streams",
        },
    ),
)

_MADE_ANEW = ("avalanche.evaluation.", "torch.nn.")
"""Packages whose objects are made where the strategy built anew has none: the means of a metric,
the layers of a grown model."""


# --- capture --------------------------------------------------------------------------------------


def places(strategy: Any) -> set[str]:
    """Return where a strategy as it was built has what :func:`restore` cannot make.

    Raises:
        CheckpointError: as :func:`captured`.
    """
    capture = _Captured(strategy)
    capture.value(strategy, "strategy")
    return capture.places


def captured(strategy: Any, known: Collection[str] | None = None) -> dict[str, Any]:
    """Return what the strategy is made of, for ``torch.save``; tensors are not copied.

    Args:
        strategy: an Avalanche strategy.
        known: the :func:`places` of the strategy as it was built. Default (None): anywhere.

    Raises:
        CheckpointError: something cannot be captured or could not be restored; the message says
            what and where it is.
    """
    classes = {what: [_name(of) for of in found] for what, found in _classes(strategy).items()}
    return {"classes": classes, "strategy": _Captured(strategy, known).value(strategy, "strategy")}


def _classes(strategy: Any) -> dict[str, list[type]]:
    """Return what must be the same in a strategy built anew."""
    parts = {
        "strategy": [strategy],
        "model": [strategy.model],
        "optimizer": [strategy.optimizer],
        "plugins": strategy.plugins,
        "metrics": strategy.evaluator.metrics,
    }
    return {what: [type(part) for part in found] for what, found in parts.items()}


def _name(of: type) -> str:
    return f"{of.__module__}:{of.__qualname__}"


def _is_named(of: type, name: str) -> bool:
    """Tell whether a class has this name; what was a script then may be a module now."""
    package, _, qualified = name.partition(":")
    in_package = of.__module__ == package or "__main__" in (of.__module__, package)
    return in_package and of.__qualname__ == qualified


class _Captured:
    """Records of values: atoms and tensors as they are, everything else a dict with its kind."""

    def __init__(self, strategy: Any = None, known: Collection[str] | None = None) -> None:
        self.places: set[str] = set()
        self._strategy = strategy
        self._known = known
        # With the objects themselves, so that none is freed and its id used again.
        self._seen: dict[int, tuple[Any, dict[str, Any]]] = {}

    def value(self, value: Any, where: str) -> Any:
        """Return the record of a value, the same one for the same object."""
        if type(value) in _ATOMS or type(value) in (Tensor, nn.Parameter):
            return value
        if id(value) not in self._seen:
            record: dict[str, Any] = {}
            self._seen[id(value)] = (value, record)  # before its parts, which may lead back to it
            known = self._known
            if self._makes_its_parts(value, where):
                self._known = None
            record.update(self._record(value, where))
            self._known = known
        return self._seen[id(value)][1]

    def _makes_its_parts(self, value: Any, where: str) -> bool:
        """Tell whether restoring makes this with what is in it; raise if it cannot be restored."""
        of = type(value)
        # Its values can be made by its factory, which is code.
        with_factory = of is collections.defaultdict and value.default_factory not in _MAKERS
        if (of in _CONTAINERS and not with_factory) or isinstance(value, _OF_NUMBERS):
            return False
        self.places.add(where)
        if self._known is None or where in self._known:
            return with_factory
        if not _can_be_made(of, self._strategy.model):
            raise CheckpointError(
                f"{where} is a {of.__module__}.{of.__qualname__} that was not there at the "
                f"beginning, and could not be made again in a strategy built anew; {_DO_WITHOUT}"
            )
        return True

    def _record(self, value: Any, where: str) -> dict[str, Any]:
        of = type(value)
        if of is list or of in _SEQUENCES.values():
            # A set in its order: sums over it depend on that.
            return {"kind": of.__name__, "items": self._items(value, where)}
        if of is collections.deque:
            return {"kind": "deque", "items": self._items(value, where), "maxlen": value.maxlen}
        if of in _MAPPINGS.values():
            return {
                "kind": "mapping",
                "of": of.__name__,
                "factory": getattr(getattr(value, "default_factory", None), "__name__", None),
                "keys": self._items(value, where),
                "values": [
                    # A tensor's or an object's repr says little, and changes.
                    self.value(v, f"{where}[{k!r}]" if type(k) in _ATOMS else f"{where}[key {i}]")
                    for i, (k, v) in enumerate(value.items())
                ],
            }
        if isinstance(value, torch.dtype):
            return {"kind": "dtype", "name": str(value).removeprefix("torch.")}
        if _is_numeric(value):
            kind = "array" if of is np.ndarray else "number"
            return {"kind": kind, "data": torch.from_numpy(np.array(value))}
        if isinstance(value, torch.Generator):
            return {"kind": "generator", "state": value.get_state()}
        if isinstance(value, random.Random):
            return {"kind": "random", "state": self.value(value.getstate(), where)}
        if isinstance(value, np.random.Generator):
            return {"kind": "numpy", "state": self.value(value.bit_generator.state, where)}
        if isinstance(value, _STAYS):
            return {"kind": "stays", "class": _name(of)}
        if isinstance(value, Optimizer):
            return {
                "kind": "optimizer",
                "class": _name(of),
                "groups": [self._items(group["params"], where) for group in value.param_groups],
                "state": self.value(value.state_dict(), f"{where}.state_dict()"),
            }
        if _has_state_dict(of) and not isinstance(value, nn.Module):
            state = self.value(value.state_dict(), f"{where}.state_dict()")
            return {"kind": "state_dict", "class": _name(of), "state": state}
        if not _is_plain(of) or _holds_data(value):
            raise CheckpointError(
                f"{where} is a {of.__module__}.{of.__qualname__}, which a checkpoint cannot hold; "
                f"{_DO_WITHOUT}"
            )
        left_out = {name for base, names in _LEFT_OUT if issubclass(of, base) for name in names}
        attributes = {
            name: self.value(attribute, f"{where}.{name}")
            for name, attribute in vars(value).items()
            if name not in left_out
        }
        return {"kind": "object", "class": _name(of), "attributes": attributes}

    def _items(self, values: Iterable[Any], where: str) -> list[Any]:
        return [self.value(item, f"{where}[{i}]") for i, item in enumerate(values)]


_DO_WITHOUT = (
    "do without what keeps it, keep it as numbers, tensors and containers, or use Avalanche's "
    "save_checkpoint after mend_save_checkpoint()"
)


def _can_be_made(of: type, model: nn.Module) -> bool:
    if of is ParamData or any(type(module) is of for module in model.modules()):
        return True
    return of.__module__.startswith(_MADE_ANEW) and _is_plain(of)


def _has_state_dict(of: type) -> bool:
    return hasattr(of, "state_dict") and hasattr(of, "load_state_dict")


def _is_numeric(value: Any) -> bool:
    """Tell whether this is an array or a number of NumPy with a counterpart in torch."""
    if type(value) is not np.ndarray and not isinstance(value, np.generic):
        return False
    extended = (np.dtype(np.longdouble), np.dtype(np.clongdouble))
    return value.dtype.kind in "biufc" and value.dtype not in extended


class _Plain:
    pass


def _is_plain(of: type) -> bool:
    """Tell whether objects of a class have no state but their attributes: as pickle does it."""
    slots = any(vars(base).get("__slots__") for base in of.__mro__)
    size = of.__basicsize__ + of.__itemsize__
    return bool(of.__dictoffset__) and not slots and size <= _Plain.__basicsize__


def _holds_data(value: Any) -> bool:
    of_avalanche = type(value).__module__.startswith("avalanche.benchmarks.")
    return of_avalanche or isinstance(value, Dataset | DataLoader)


# --- restore --------------------------------------------------------------------------------------


def restore(strategy: Any, content: Mapping[str, Any]) -> None:
    """Give a strategy, built as the captured one was, everything that was captured.

    Args:
        strategy: it is changed in place.
        content: what :func:`captured` returned, read from a file; its tensors become the
            strategy's.

    Raises:
        CheckpointError: the strategy is built differently. It may be changed in part.
    """
    for what, classes in _classes(strategy).items():
        then = content["classes"][what]
        if len(then) != len(classes) or not all(map(_is_named, classes, then)):
            raise CheckpointError(
                f"the checkpoint does not fit the strategy: {what} {_listed(then)} then, "
                f"{_listed(map(_name, classes))} now; {_BUILD_AS_THEN}"
            )
    _Restored(strategy).value(content["strategy"], strategy, "strategy")


_BUILD_AS_THEN = "build the strategy as it was built then, or name another folder to start anew"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name.rpartition(":")[2] for name in names) or "none"


class _Restored:
    """Values made of records. A twin is what the strategy built anew has in a value's place."""

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        self._made: dict[int, Any] = {}

    def value(self, record: Any, twin: Any, where: str) -> Any:
        """Return the value of a record, in place of its twin if that is of the same kind."""
        if type(record) in _ATOMS:
            return record
        if id(record) not in self._made:
            if isinstance(record, Tensor):
                self._made[id(record)] = _tensor(record, twin, self._strategy.device)
            else:
                make = {
                    "list": self._list,
                    "mapping": self._mapping,
                    "object": self._object,
                    "optimizer": self._optimizer,
                    "state_dict": self._state_dict,
                    "stays": self._stays,
                }.get(record["kind"], self._plain)
                # The first three note what they make before they fill it: it may hold itself.
                self._made[id(record)] = make(record, twin, where)
        return self._made[id(record)]

    def _list(self, record: Any, twin: Any, where: str) -> Any:
        made = self._made[id(record)] = twin if type(twin) is list else []
        made[:] = self._items(record["items"], made, where)
        return made

    def _mapping(self, record: Any, twin: Any, where: str) -> Any:
        of: Any = _MAPPINGS[record["of"]]
        made: Any
        if type(twin) is of:
            made = twin
        elif of is not collections.defaultdict:
            made = of()
        elif record["factory"] in (factories := {maker.__name__: maker for maker in _MAKERS}):
            made = of(factories[record["factory"]])
        else:
            raise self._misfit(where, "a defaultdict")
        self._made[id(record)] = made
        keys = [self.value(key, None, where) for key in record["keys"]]
        new = {}
        for key, value in zip(keys, record["values"], strict=True):
            place = made.get(key)
            if place is None and getattr(made, "default_factory", None) is not None:
                place = made.default_factory()
            new[key] = self.value(value, place, f"{where}[{key!r}]")
        made.clear()
        made.update(new)
        return made

    def _object(self, record: Any, twin: Any, where: str) -> Any:
        if type(twin) in _ATOMS:
            twin = None
        if twin is not None and not _is_named(type(twin), record["class"]):
            raise self._misfit(where, record["class"], twin)
        made = self._new(record["class"], where) if twin is None else twin
        self._made[id(record)] = made
        attributes = vars(made)
        # A strategy's model first: the others hold its parameters, and have none of their own to
        # put in their place.
        for name in sorted(record["attributes"], key=lambda name: name != "model"):
            value = record["attributes"][name]
            attributes[name] = self.value(value, attributes.get(name), f"{where}.{name}")
        return made

    def _new(self, name: str, where: str) -> Any:
        """Make an object that only the captured strategy had; no constructor of a user runs."""
        if _is_named(ParamData, name):
            return ParamData("", (0,))
        for module in self._strategy.model.modules():
            if _is_named(type(module), name):
                return copy.deepcopy(module)
        package, _, qualified = name.partition(":")
        module = sys.modules.get(package) if package.startswith(_MADE_ANEW) else None
        of = vars(module).get(qualified) if module else None
        if not isinstance(of, type) or not _is_plain(of):
            raise self._misfit(where, name)
        made: Any = object.__new__(of)
        if isinstance(made, nn.Module):
            nn.Module.__init__(made)
        return made

    def _optimizer(self, record: Any, twin: Any, where: str) -> Any:
        if not isinstance(twin, Optimizer) or not _is_named(type(twin), record["class"]):
            raise self._misfit(where, record["class"], twin)
        # A growing head's parameters are other ones than before, and Avalanche adds new ones.
        groups = [self._items(group, (), where) for group in record["groups"]]
        twin.state.clear()
        twin.param_groups[:] = [{**twin.param_groups[0], "params": params} for params in groups]
        self._load(record, twin, where)
        return twin

    def _state_dict(self, record: Any, twin: Any, where: str) -> Any:
        if not _is_named(type(twin), record["class"]) or not _has_state_dict(type(twin)):
            raise self._misfit(where, record["class"], twin)
        self._load(record, twin, where)
        return twin

    def _load(self, record: Any, twin: Any, where: str) -> None:
        state = self.value(record["state"], None, where)
        try:
            twin.load_state_dict(state)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{where} does not take the state of the checkpoint: {error}"
            ) from error

    def _stays(self, record: Any, twin: Any, where: str) -> Any:
        if twin is None:
            raise self._misfit(where, record["class"])
        return twin

    def _plain(self, record: Any, twin: Any, where: str) -> Any:
        """Make what cannot hold itself."""
        kind = record["kind"]
        if kind in _SEQUENCES:
            twins = twin if isinstance(twin, tuple) else ()
            return _SEQUENCES[kind](self._items(record["items"], twins, where))
        if kind == "deque":
            return collections.deque(self._items(record["items"], (), where), record["maxlen"])
        if kind == "dtype":
            return getattr(torch, record["name"])
        if kind in ("array", "number"):
            array = record["data"].numpy()
            return array if kind == "array" else array[()]
        if twin is None:
            raise self._misfit(where, kind)
        state = self.value(record["state"], None, where)
        if kind == "generator":
            twin.set_state(state.cpu())
        elif kind == "random":
            twin.setstate(state)
        else:
            twin.bit_generator.state = state
        return twin

    def _items(self, records: list[Any], twins: Any, where: str) -> list[Any]:
        padded = [*twins, *[None] * len(records)]
        return [self.value(r, padded[i], f"{where}[{i}]") for i, r in enumerate(records)]

    def _misfit(self, where: str, name: str, twin: Any = None) -> CheckpointError:
        now = "nothing" if twin is None else type(twin).__name__
        return CheckpointError(
            f"the checkpoint does not fit the strategy: {where} was {name.rpartition(':')[2]}, and "
            f"is {now} in the strategy built anew; {_BUILD_AS_THEN}"
        )


def _tensor(loaded: Tensor, twin: Any, device: torch.device) -> Tensor:
    # Moved only where it must be, for tensors that share memory go on sharing it then.
    if not isinstance(loaded, nn.Parameter):
        return loaded.to(twin.device) if isinstance(twin, Tensor) else loaded
    is_twin = isinstance(twin, nn.Parameter)
    data = loaded.data.to(twin.device if is_twin else device)
    if not is_twin or (twin.shape, twin.dtype) != (data.shape, data.dtype):
        return nn.Parameter(data, requires_grad=loaded.requires_grad)
    twin.data = data
    twin.grad = None
    return twin.requires_grad_(loaded.requires_grad)


# --- random numbers -------------------------------------------------------------------------------


def captured_random_state() -> dict[str, Any]:
    """Return the states of the global generators of Python, NumPy and torch, CUDA's too."""
    name, words, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return {
        "python": _Captured().value(random.getstate(), "random"),
        "numpy": [name, torch.from_numpy(words.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(strategy: Any, content: Mapping[str, Any]) -> None:
    """Set the global generators; of CUDA's those of the devices that there are."""
    random.setstate(_Restored(strategy).value(content["python"], None, "random"))
    name, words, *rest = content["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(content["torch"].cpu())
    if torch.cuda.is_available():
        for i, state in enumerate(content["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), i)
