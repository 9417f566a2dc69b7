"""What values a checkpoint can hold, and what it leaves out."""

from __future__ import annotations

import collections
import enum
import logging
import operator
import random
import types
from collections.abc import Callable, Iterable
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from uuid import UUID

import numpy as np
import torch
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates import BaseSGDTemplate
from torch import nn

from avalanche_classp.checkpoint.avalanche_internals import OF_THE_EXPERIENCE

INITIAL_STATES = "_initial_states_of_checkpoints"
"""The attribute of a strategy with its initial state for each folder of checkpoints."""


class NotSaved:
    """Base of objects that no checkpoint holds: the script's own stay as they are."""


ATOMS = (type(None), bool, int, float, complex, str, bytes)

KEPT_FROM_SCRIPT = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodDescriptorType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
    types.ModuleType,
    types.GenericAlias,
    type,
    operator.attrgetter,
    operator.itemgetter,
    operator.methodcaller,
    np.ufunc,
    torch.jit.ScriptFunction,
    logging.Logger,
    BaseLogger,
)
"""Code and outputs: those of the script go on."""

BUILTIN_CLASSES: dict[str | None, type] = {
    of.__name__: of for of in (*ATOMS, dict, frozenset, list, set, tuple)
}
"""Classes that need not be in the script to be found again."""

SEQUENCES: dict[str, Callable[[Iterable[Any]], Any]] = {
    of.__name__: of for of in (list, tuple, set, frozenset, torch.Size)
}
MAPPINGS: dict[str, type[dict[Any, Any]]] = {
    of.__name__: of
    for of in (dict, collections.OrderedDict, collections.Counter, collections.defaultdict)
}
VALUES: dict[str, tuple[type, Callable[..., Any], Callable[[Any], tuple[Any, ...]]]] = {
    "range": (range, range, lambda v: (v.start, v.stop, v.step)),
    "slice": (slice, slice, lambda v: (v.start, v.stop, v.step)),
    "bytearray": (bytearray, bytearray, lambda v: (bytes(v),)),
    "mappingproxy": (types.MappingProxyType, types.MappingProxyType, lambda v: (dict(v),)),
    "timedelta": (timedelta, timedelta, lambda v: (v.days, v.seconds, v.microseconds)),
    **{of.__name__: (of, of.fromisoformat, lambda v: (v.isoformat(),)) for of in (date, datetime)},
    **{
        of.__name__: (of, of, lambda v: (str(v),))
        for of in (Decimal, Fraction, UUID, type(Path()), PurePosixPath, PureWindowsPath)
    },
}
"""Values by the name of their class: the class, what makes them, and from which arguments."""


def _set_bits(generator: Any, state: Any) -> None:
    generator.bit_generator.state = state


GENERATORS: tuple[tuple[type, Callable[[Any], Any], Callable[[Any, Any], object]], ...] = (
    (torch.Generator, lambda g: g.get_state(), lambda g, state: g.set_state(state.cpu())),
    (random.Random, lambda g: g.getstate(), lambda g, state: g.setstate(state)),
    (np.random.Generator, lambda g: g.bit_generator.state, _set_bits),
    (
        np.random.RandomState,
        lambda g: g.get_state(legacy=False),
        lambda g, state: g.set_state(state),
    ),
)
"""Generators of random numbers, and how their states are read and set."""

_SAVED_OF_MODULES = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
LEFT_OUT: tuple[tuple[type, set[str]], ...] = (
    (nn.Module, {n for n in vars(nn.Module()) if n.startswith("_")} - _SAVED_OF_MODULES),  # hooks
    (EvaluationPlugin, {"loggers"}),
    (BaseSGDTemplate, OF_THE_EXPERIENCE | {"device", INITIAL_STATES}),
)


def class_name(of: type) -> str:
    """Return the module and the qualified name."""
    return f"{of.__module__}:{of.__qualname__}"


def is_named(of: type, name: str) -> bool:
    """Tell whether a class has this name; a script may have become a module since."""
    package, _, qualified = name.partition(":")
    in_package = of.__module__ == package or "__main__" in (of.__module__, package)
    return in_package and of.__qualname__ == qualified


def key_path(where: str, key: Any, i: int) -> str:
    """Return the path of a mapping's value; the repr of an object says little, and changes."""
    if type(key) in ATOMS:
        return f"{where}[{key!r}]"
    return f"{where}[{key}]" if isinstance(key, enum.Enum) else f"{where}[key {i}]"


def has_state_dict(of: type) -> bool:
    """Tell whether objects of a class are saved by ``state_dict()``."""
    return hasattr(of, "state_dict") and hasattr(of, "load_state_dict")


class _Plain:
    pass


def is_plain(of: type) -> bool:
    """Tell whether objects of a class have no state but their attributes, as pickle does."""
    slots = any(vars(base).get("__slots__") for base in of.__mro__)
    size = of.__basicsize__ + of.__itemsize__
    return bool(of.__dictoffset__) and not slots and size <= _Plain.__basicsize__


def is_numeric(value: Any) -> bool:
    """Tell whether this is an array or a number of NumPy with a counterpart in torch."""
    if type(value) is not np.ndarray and not isinstance(value, np.generic):
        return False
    extended = (np.dtype(np.longdouble), np.dtype(np.clongdouble))
    return value.dtype.kind in "biufc" and value.dtype not in extended


def same_code(a: Any, b: Any) -> bool:
    """Tell whether two functions, possibly made in two places, do the same with the same."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if not isinstance(a, types.FunctionType):
        return isinstance(a, types.MethodType | types.BuiltinFunctionType) and bool(a == b)
    names = ("co_code", "co_consts", "co_names", "co_varnames")
    if any(getattr(a.__code__, name) != getattr(b.__code__, name) for name in names):
        return False
    try:
        pairs = list(zip(_held(a), _held(b), strict=True))
    except ValueError:  # a variable that has no value yet, or other defaults
        return False
    return a.__globals__ is b.__globals__ and all(
        x is y or (type(x) in ATOMS and type(x) is type(y) and x == y) for x, y in pairs
    )


def _held(function: types.FunctionType) -> list[Any]:
    """Return the values of a function's closure and defaults."""
    variables = [cell.cell_contents for cell in function.__closure__ or ()]
    return [*variables, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
