"""Seconds that something takes out of the time of what it is plugged into."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Clocked:
    """An Avalanche metric, unchanged but for the seconds that its calls take being added up."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self._metric, name)
        return self._clocked(found) if name.startswith(("before_", "after_")) else found

    def __str__(self) -> str:
        return str(self._metric)

    def _clocked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - began

        return clocked
