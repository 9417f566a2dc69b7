"""What a script gives to a strategy, and how two versions of a script differ in it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

__all__ = ["Differences", "constructor_arguments"]

_SHOWN = 5


@functools.cache
def constructor_arguments(of: type) -> frozenset[str]:
    """Return the names of the arguments of a class's constructor and of its bases' ones."""
    names: set[str] = set()
    for called in (of, *(vars(base).get("__init__") for base in of.__mro__)):
        try:
            parameters = inspect.signature(called).parameters  # type: ignore[arg-type]
        except (TypeError, ValueError):  # none, or one in C
            continue
        kinds = inspect.Parameter
        names |= {
            name
            for name, p in parameters.items()
            if p.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
        }
    return frozenset(names)


class Differences:
    """Settings that are other ones in the script than they were when a checkpoint was made.

    Attributes:
        paths: where they are, without those of shapes.
        deciding: numbers and shapes that are arguments, hyper-parameters or parts of the model,
            as text.
        others: the rest, as text: names, folders, times.
        shapes: whether a tensor of the model has another shape.
    """

    def __init__(self, then: Mapping[str, Any], now: Mapping[str, tuple[Any, bool]]) -> None:
        self.paths: set[str] = set()
        self.shapes = False
        deciding: list[str] = []
        others: list[str] = []
        for path, (value, is_argument) in now.items():
            # NaN equals itself here.
            if path not in then or then[path] == value or repr(then[path]) == repr(value):
                continue
            if isinstance(value, list):
                self.shapes = self.shapes or is_argument
            else:
                self.paths.add(path)
            is_text = isinstance(value, str | bytes) or isinstance(then[path], str | bytes)
            name = path.replace(".state_dict()['param_groups']", ".param_groups")
            kind = others if is_text or not is_argument else deciding
            kind.append(f"{name} was {_shown(then[path])} and is {_shown(value)}")
        self.deciding, self.others = _listed(deciding), _listed(others)


def _shown(value: Any) -> str:
    return f"of shape {tuple(value)}" if isinstance(value, list) else repr(value)


def _listed(lines: list[str]) -> str:
    more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return ", ".join(lines[:_SHOWN]) + more
