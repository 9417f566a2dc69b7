"""The errors that the command line shows as one line."""

from __future__ import annotations

import sys


class UserError(Exception):
    """Something that the user can put right; its message says what and how."""


class DivergedError(UserError):
    """A training whose gradients are no longer finite."""


def one_line(error: BaseException) -> str:
    """Return the error's type and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def print_error(message: str) -> None:
    """Print a message as one line on standard error."""
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)


def print_interrupted() -> None:
    """Say on standard error that Ctrl-C has lost nothing."""
    print(
        "interrupted: finished runs are saved, the same command goes on from there",
        file=sys.stderr,
    )
