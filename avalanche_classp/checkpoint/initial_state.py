"""What the script had built when the loop began: what a checkpoint may refer to."""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Sized
from typing import Any

from avalanche_classp.checkpoint.avalanche_internals import REBUILT_PACKAGES, ParamData
from avalanche_classp.checkpoint.values import (
    BUILTIN_CLASSES,
    KEPT_FROM_SCRIPT,
    NotSaved,
    class_name,
    is_named,
    is_plain,
)

__all__ = ["InitialState"]


class InitialState(NotSaved):
    """What a strategy held when the script had built it.

    The same script builds the same again after a crash. So a checkpoint may refer to the objects
    that are here, and a difference between two of these is a change of the script.

    Attributes:
        settings: numbers, strings and shapes of tensors by their path, each with whether it is an
            argument of a constructor, a hyper-parameter or part of the model.
        attributes: names of the attributes of each object by its path.
    """

    def __init__(self, strategy: Any, stream: Any = None) -> None:
        self.settings: dict[str, tuple[Any, bool]] = {}
        self.attributes: dict[str, set[str]] = {}
        self._objects: dict[str, Callable[[], Any]] = {}
        self._types: dict[str, type] = {}
        self._paths: dict[int, str] = {}
        self._classes: dict[str, type | None] = {}
        self._imported = frozenset(sys.modules)
        self._layers = {type(module) for module in strategy.model.modules()}
        if isinstance(stream, Sized):
            self.settings["len(stream)"] = (len(stream), True)

    def __reduce__(self) -> Any:
        """Be None in pickles and copies, which would hold other objects."""
        return type(None), ()

    def add(self, value: Any, path: str) -> None:
        """Note an object; it is kept alive only if it is code."""
        weak = not isinstance(value, KEPT_FROM_SCRIPT) and type(value).__weakrefoffset__
        self._objects.setdefault(path, weakref.ref(value) if weak else lambda: value)
        self._types.setdefault(path, type(value))
        self._paths.setdefault(id(value), path)

    def add_class(self, of: type) -> None:
        """Note a class of values; two of one name cannot be told apart."""
        name = class_name(of)
        self._classes[name] = of if self._classes.get(name, of) is of else None

    def at(self, path: str | None) -> Any:
        """Return the object at a path, or None."""
        if path in BUILTIN_CLASSES:
            return BUILTIN_CLASSES[path]
        return None if path not in self._objects else self._objects[path]()

    def type_at(self, path: str) -> type | None:
        """Return the class of the object that was at a path."""
        return self._types.get(path)

    def path_of(self, value: Any) -> str | None:
        """Return the path at which the script has this object, or None."""
        if isinstance(value, type) and BUILTIN_CLASSES.get(value.__name__) is value:
            return value.__name__
        path = self._paths.get(id(value))
        return path if self.at(path) is value else None

    def find_class(self, name: str) -> type | None:
        """Return the class of this name that the script uses or has imported; import nothing."""
        if name in self._classes:
            return self._classes[name]
        for of in self._classes.values():
            if of is not None and is_named(of, name):  # __main__ then, a module now
                return of
        package, _, qualified = name.partition(":")
        found: Any = sys.modules.get(package) if package in self._imported else None
        for part in qualified.split("."):
            found = vars(found).get(part) if isinstance(found, types.ModuleType | type) else None
        return found if isinstance(found, type) else None

    def can_rebuild(self, of: type) -> bool:
        """Tell whether objects of this class can be made without calling their constructor."""
        if of is ParamData or of in self._layers:
            return True
        in_package = of.__module__.startswith(REBUILT_PACKAGES)
        return in_package and is_plain(of) and self.find_class(class_name(of)) is of
