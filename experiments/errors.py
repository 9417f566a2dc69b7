"""The errors that the command line shows as one line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from difflib import get_close_matches

INSTALL = 'pip install "avalanche-classp[experiments]"'
"""Brings the packages that the experiments need beyond the library's."""


class UserError(Exception):
    """Something that the user can put right; its message says what and how."""


class DivergedError(UserError):
    """A training whose gradients are no longer finite."""


def one_line(error: BaseException) -> str:
    """Return the error's type and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def line_in(file: str | None, error: BaseException) -> str:
    """Return the last line of a file that an error came through, as " (line 3)", or nothing."""
    if isinstance(error, SyntaxError):
        return ""  # its message says it
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f" (line {frames[-1].lineno})" if frames else ""


def print_error(message: str) -> None:
    """Print a message as one line on standard error."""
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)


def print_interrupted(resumable: bool) -> None:
    """Say on standard error that Ctrl-C ended it, and that it has lost nothing if it has not."""
    rest = ": finished runs are saved, the same command goes on from there" if resumable else ""
    print(f"interrupted{rest}", file=sys.stderr)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a question for the known names that are like this one, or the list of them all."""
    names = list(known)
    near = get_close_matches(name, names)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(names)}"
