"""Make tensors and plain containers of everything that a strategy holds.

A number, a string or a tensor is written as it is. Everything else becomes a dict with its kind, a
*record*. Objects that the script itself builds, code among them, are written as the path at which
the script holds them, so that a file never names code to be imported. What is shared stays shared:
an object that is met twice has one record, and ``torch.save`` writes memory that two tensors share
once.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import functools
import random
import types
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from avalanche_classp.checkpoint.avalanche_internals import ParamData, holds_samples
from avalanche_classp.checkpoint.file import CheckpointError
from avalanche_classp.checkpoint.initial_state import InitialState
from avalanche_classp.checkpoint.settings import constructor_arguments
from avalanche_classp.checkpoint.values import (
    ATOMS,
    GENERATORS,
    KEPT_FROM_SCRIPT,
    LEFT_OUT,
    MAPPINGS,
    SEQUENCES,
    VALUES,
    NotSaved,
    class_name,
    has_state_dict,
    is_numeric,
    is_plain,
    key_path,
    same_code,
)

__all__ = ["collect_initial_state", "encode", "encode_random_state"]

_LONGEST_SETTING = 100
"""Longer containers are data and no settings."""


def collect_initial_state(strategy: Any, stream: Any = None) -> InitialState:
    """Return what the script has built; CheckpointError if no checkpoint can hold it."""
    initial = InitialState(strategy, stream)
    _Encoder(initial, collecting=True).value(strategy, "strategy")
    return initial


def encode(strategy: Any, initial: InitialState) -> dict[str, Any]:
    """Return what a strategy holds as plain containers and tensors, which are not copied.

    CheckpointError where the script could not load something again.
    """
    classes = {what: [class_name(of) for of in found] for what, found in classes_of(strategy)}
    return {"classes": classes, "strategy": _Encoder(initial).value(strategy, "strategy")}


def classes_of(strategy: Any) -> list[tuple[str, list[type]]]:
    """Return what must be the same in a strategy that takes the state of another."""
    parts = {
        "strategy": [strategy],
        "model": [strategy.model],
        "optimizer": [strategy.optimizer],
        "plugins": strategy.plugins,
        "metrics": strategy.evaluator.metrics,
    }
    return [(what, [type(part) for part in found]) for what, found in parts.items()]


class _Encoder:
    """Records of values.

    A twin is what decoding will find in a value's place, where that is known: in an object that is
    rebuilt, and in what the factory of a defaultdict makes.
    """

    def __init__(self, initial: InitialState | None, collecting: bool = False) -> None:
        self._initial: Any = initial
        self._collecting = collecting
        self._argument = False  # whether the value at hand is one of a constructor
        self._quiet = False  # whether it is no setting
        # With the objects themselves, so that none is freed and its id used again.
        self._seen: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._claimed: dict[str, int] = {}

    def value(self, value: Any, where: str, twin: Any = None) -> Any:
        """Return the record of a value, the same one for the same object."""
        if type(value) in ATOMS or type(value) in (Tensor, nn.Parameter):
            self._note(value if type(value) in ATOMS else list(value.shape), where)
            return value
        if id(value) not in self._seen:
            record: dict[str, Any] = {}
            self._seen[id(value)] = (value, record)  # before its parts, which may lead back to it
            record.update(self._record(value, where, twin))
        elif self._collecting and self._initial.path_of(value):
            self._initial.add(value, where)
        return self._seen[id(value)][1]

    def _note(self, value: Any, where: str) -> None:
        if self._collecting and not self._quiet:
            self._initial.settings[where] = (value, self._argument)

    def _record(self, value: Any, where: str, twin: Any) -> dict[str, Any]:
        of: Any = type(value)
        if of is collections.deque or SEQUENCES.get(of.__name__) is of:
            return self._sequence(value, where, twin)
        if MAPPINGS.get(of.__name__) is of:
            return self._mapping(value, where, twin)
        if isinstance(value, enum.Enum):
            return self._enum(value, where)
        if isinstance(value, tuple) and hasattr(of, "_fields") and not hasattr(value, "__dict__"):
            self._findable(of, where)
            items = self._items(value, where, twin)
            return {"kind": "namedtuple", "class": class_name(of), "items": items}
        name = of.__name__
        if name in VALUES and VALUES[name][0] is of:
            arguments = [self.value(v, where) for v in VALUES[name][2](value)]
            self._note(str(value), where)
            return {"kind": "value", "of": name, "arguments": arguments}
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            self._note(str(value), where)
            return {"kind": "torch", "name": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            if self._collecting:
                self._initial.add(value, where)
            then = self._initial.at(where)
            path = where if isinstance(then, torch.device) and then == value else None
            return {"kind": "device", "name": str(value), "path": path}
        if isinstance(value, np.dtype) and value.kind in "biufc":
            return {"kind": "numpy dtype", "name": value.str}
        if is_numeric(value):
            kind = "array" if of is np.ndarray else "number"
            return {"kind": kind, "data": torch.from_numpy(np.array(value))}
        if of is weakref.ref:
            return {"kind": "weakref", "target": self.value(value(), f"{where}()")}
        if of is functools.partial:
            parts = _parts(value)
            return {"kind": "partial", "parts": self._items(parts, where, _parts(twin))}
        if isinstance(value, types.MethodType) and (name := _method_name(value)):
            of_twin = getattr(twin, "__self__", None)  # its object may be nowhere else
            owner = self.value(value.__self__, f"{where}.__self__", of_twin)
            return {"kind": "method", "name": name, "self": owner}
        if isinstance(value, NotSaved):
            return {"kind": "not saved"}
        if isinstance(value, KEPT_FROM_SCRIPT):
            return self._code(value, where, twin)
        return self._object(value, where, twin)

    def _sequence(self, value: Any, where: str, twin: Any) -> dict[str, Any]:
        kind = type(value).__name__
        if isinstance(value, set | frozenset):
            # In its order: sums over it depend on that. Code has its name for a path, for the
            # order of a set of objects is another one in each process.
            paths = [
                f"{where}[{_code_name(v) if isinstance(v, KEPT_FROM_SCRIPT) else i}]"
                for i, v in enumerate(value)
            ]
            if len(set(paths)) < len(paths):
                self._refuse(where, "is a set with two functions of one name")
            items = [self.value(v, path) for v, path in zip(value, paths, strict=True)]
            return {"kind": kind, "items": items}
        record = {"kind": kind, "items": self._items(value, where, twin)}
        return {**record, "maxlen": value.maxlen} if kind == "deque" else record

    def _items(self, values: Any, where: str, twin: Any) -> list[Any]:
        twins = [*(twin if isinstance(twin, list | tuple | collections.deque) else ())]
        twins += [None] * len(values)
        with self._noting(quiet=len(values) > _LONGEST_SETTING):
            self._note(len(values), f"len({where})")
            return [self.value(v, f"{where}[{i}]", twins[i]) for i, v in enumerate(values)]

    @contextlib.contextmanager
    def _noting(self, argument: bool | None = None, quiet: bool = False) -> Iterator[None]:
        """Take what is met for arguments or not; or, quiet, for no settings."""
        before = self._argument, self._quiet
        self._argument = self._argument if argument is None else argument
        self._quiet = self._quiet or quiet
        yield
        self._argument, self._quiet = before

    def _mapping(self, value: Any, where: str, twin: Any) -> dict[str, Any]:
        record: dict[str, Any] = {"kind": "mapping", "of": type(value).__name__}
        factory = getattr(value, "default_factory", None)
        if type(value) is collections.defaultdict:
            of_twin = getattr(twin, "default_factory", None)
            record["factory"] = self.value(factory, f"{where}.default_factory", of_twin)
        with self._noting(quiet=True):
            record["keys"] = [self.value(k, f"{where}.keys()[{i}]") for i, k in enumerate(value)]
        record["values"] = []
        with self._noting(quiet=len(value) > _LONGEST_SETTING):
            self._note(len(value), f"len({where})")
            for i, (key, item) in enumerate(value.items()):
                place = twin.get(key) if isinstance(twin, dict) else None
                if place is None and factory is not None and type(item) not in ATOMS:
                    place = factory()  # decoding has it, with the code in it
                record["values"].append(self.value(item, key_path(where, key, i), place))
        return record

    def _enum(self, value: Any, where: str) -> dict[str, Any]:
        self._note(str(value), where)
        self._findable(type(value), where)
        record: dict[str, Any] = {"kind": "enum", "class": class_name(type(value))}
        if value.name in type(value).__members__:
            return {**record, "member": value.name}
        if type(value.value) is not int:
            self._refuse(where, f"is {value!r}, no member of {type(value).__name__}")
        return {**record, "flags": value.value}

    def _findable(self, of: type, where: str) -> None:
        """Refuse a class of values that decoding would not find."""
        if self._collecting:
            self._initial.add_class(of)
        if self._initial.find_class(class_name(of)) is not of:
            self._refuse(
                where,
                f"has the class {class_name(of)}, which the script could not find again; define "
                f"it in a module, outside of functions and once",
            )

    def _code(self, value: Any, where: str, twin: Any) -> dict[str, Any]:
        initial = self._initial
        if self._collecting:
            initial.add(value, where)
            if isinstance(value, type) and issubclass(value, enum.Enum | tuple):
                initial.add_class(value)
        path = initial.path_of(value)
        if path is None and same_code(value, initial.at(where)):
            path = where
        if path is None and not same_code(value, twin):
            self._refuse_new(value, where)
        return {"kind": "script", "class": class_name(type(value)), "path": path}

    def _object(self, value: Any, where: str, twin: Any) -> dict[str, Any]:
        of: Any = type(value)
        record: dict[str, Any] = {"class": class_name(of), "path": self._claim(value, where)}
        if record["path"] is None and type(twin) is not of:
            if not self._initial.can_rebuild(of):
                self._refuse_new(value, where)
            twin = ParamData("", (0,)) if of is ParamData else None
        for generator, state_of, _ in GENERATORS:
            if isinstance(value, generator):
                with self._noting(quiet=True):
                    state = self.value(state_of(value), where)
                return {**record, "kind": "generator", "state": state}
        if isinstance(value, Optimizer):
            with self._noting(quiet=True):
                groups = [self._items(g["params"], where, None) for g in value.param_groups]
                state = self._state_dict(value, where, argument=False)
            self._note_groups(value.param_groups, f"{where}.state_dict()['param_groups']")
            return {**record, "kind": "optimizer", "groups": groups, "state": state}
        if has_state_dict(of) and not isinstance(value, nn.Module):
            state = self._state_dict(value, where, argument=isinstance(value, LRScheduler))
            return {**record, "kind": "state_dict", "state": state}
        is_weak = of.__module__ in ("weakref", "_weakrefset")  # with callbacks
        if not is_plain(of) or is_weak or holds_samples(value):
            self._refuse(
                where,
                f"is a {of.__module__}.{of.__qualname__}, which a checkpoint "
                f"cannot hold; {_DO_WITHOUT}",
            )
        left_out = {name for base, names in LEFT_OUT if issubclass(of, base) for name in names}
        arguments = constructor_arguments(of)
        attributes = {}
        # A strategy's model and optimizer first: others hold their parts, too, and are given them.
        for name in sorted(vars(value), key=lambda name: name not in ("model", "optimizer")):
            if name not in left_out:
                place = vars(twin).get(name) if type(twin) is of else None
                with self._noting(isinstance(value, nn.Module) or name in arguments):
                    attributes[name] = self.value(vars(value)[name], f"{where}.{name}", place)
        if self._collecting:
            self._initial.attributes[where] = set(attributes)
        deleted = self._initial.attributes.get(record["path"], set()) - set(attributes)
        return {**record, "kind": "object", "attributes": attributes, "deleted": sorted(deleted)}

    def _state_dict(self, value: Any, where: str, argument: bool) -> Any:
        with self._noting(argument):
            return self.value(value.state_dict(), f"{where}.state_dict()")

    def _note_groups(self, groups: list[dict[str, Any]], where: str) -> None:
        """Note hyper-parameters, but not how many there are: a release may have more."""
        with self._noting(argument=True):
            self._note(len(groups), f"len({where})")
            for i, group in enumerate(groups):
                for name, value in group.items():
                    if type(value) in (*ATOMS, tuple):
                        self._note(value, f"{where}[{i}][{name!r}]")

    def _claim(self, value: Any, where: str) -> str | None:
        """Return the path of the script's object whose place this one takes, each only once."""
        if self._collecting:
            self._initial.add(value, where)
        path = self._initial.path_of(value)
        if path is None and self._initial.type_at(where) is type(value):
            path = where
        if path is None or self._claimed.setdefault(path, id(value)) != id(value):
            return None
        return path

    def _refuse_new(self, value: Any, where: str) -> NoReturn:
        self._refuse(
            where,
            f"is a {type(value).__module__}.{type(value).__qualname__} that was not there at the "
            f"beginning, and could not be made again in a strategy built anew; {_DO_WITHOUT}",
        )

    def _refuse(self, where: str, why: str) -> NoReturn:
        raise CheckpointError(f"{where} {why}")


def _method_name(method: types.MethodType) -> str | None:
    """Return the name of a method in its object's class, or None if it is none of the class."""
    for of in type(method.__self__).__mro__:
        for name, function in vars(of).items():
            if function is method.__func__:
                return name
    return None


def _parts(partial: Any) -> tuple[Any, ...]:
    if type(partial) is not functools.partial:
        return ()
    return partial.func, partial.args, partial.keywords


def _code_name(value: Any) -> str:
    return getattr(value, "__qualname__", type(value).__qualname__)


_DO_WITHOUT = (
    "do without what keeps it, keep it as numbers, tensors and containers, or use Avalanche's "
    "save_checkpoint after mend_save_checkpoint()"
)


# --- random numbers -------------------------------------------------------------------------------


def encode_random_state() -> dict[str, Any]:
    """Return the states of the global generators of Python, NumPy and torch, CUDA's too."""
    name, words, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return {
        "python": _Encoder(None).value(random.getstate(), "random"),
        "numpy": [name, torch.from_numpy(words.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
