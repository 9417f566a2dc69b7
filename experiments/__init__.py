"""Continual-learning experiments: one config, one run, one result file, one report.

In the wheel this package is ``avalanche_classp.experiments``. Its names are loaded when they are
first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Comparison, Tuning, compare, tune
    from .protocol.own import benchmark, method, model

# In a clone, too, where it is `experiments`: what users declare must be declared here.
sys.modules.setdefault("avalanche_classp.experiments", sys.modules[__name__])

__all__ = ["Comparison", "Tuning", "benchmark", "compare", "method", "model", "tune"]

_MODULES = {
    "Comparison": "api",
    "Tuning": "api",
    "benchmark": "protocol.own",
    "compare": "api",
    "method": "protocol.own",
    "model": "protocol.own",
    "tune": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
