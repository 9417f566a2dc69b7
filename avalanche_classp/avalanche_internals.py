"""What CLASSPPlugin uses of Avalanche 0.6 without its documentation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

from avalanche.training.templates.base import BaseTemplate

__all__ = ["refuse_nested"]


def refuse_nested(plugin: type) -> None:
    """Have strategies refuse a plugin of this class in a list of their list of plugins.

    PackNet puts its argument there as it is, and Avalanche calls nobody in it.
    """
    original = BaseTemplate._check_plugin_compatibility
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def check(strategy: Any) -> None:
        for held in strategy.plugins:
            if isinstance(held, Sequence) and any(isinstance(p, plugin) for p in held):
                raise ValueError(
                    f"{type(strategy).__name__} does not unpack plugins=, so Avalanche would never "
                    f"call CLASSPPlugin there; give optimizer=CLASSPOptimizer(...) instead"
                )
        original(strategy)

    BaseTemplate._check_plugin_compatibility = check
