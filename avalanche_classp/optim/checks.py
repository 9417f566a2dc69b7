"""Checks of arguments: each raises TypeError or ValueError with the argument and its value."""

from __future__ import annotations

from numbers import Real
from typing import Any

__all__ = ["require_flag", "require_number", "require_whole"]


def require_number(name: str, value: Any) -> float:
    """Return a number as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def require_whole(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number, or less than ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")


def require_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
