"""The errors that the command line shows as one line."""

from __future__ import annotations

import sys
from collections.abc import Callable


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


def exit_code(work: Callable[[], None], resumable: bool = True) -> int:
    """Do a script's work and return 0, or 2 for what the user can put right, which is printed.

    After Ctrl-C it is 130.

    Args:
        work: what to do.
        resumable: whether the same command goes on after Ctrl-C, which is then said.
    """
    try:
        work()
    except UserError as error:
        print_error(str(error))
        return 2
    except KeyboardInterrupt:
        if resumable:
            print_interrupted()
        else:
            print("interrupted", file=sys.stderr)
        return 130
    return 0
