"""Config files: what the command line can say, as TOML."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .protocol.config import format_value


def read_words(path: Path, command: type) -> list[str]:
    """Return a file's options as words of the command line.

    They come before what the user typed, so that the user has the last word. A key is an option
    without its dashes (``data-root`` or ``data_root``), hyper-parameters stand in the table
    ``set``::

        benchmark = "split-mnist"
        methods = ["classp", "ewc"]
        seeds = 5

        [set.classp]
        lr = 0.01

    Args:
        path: the TOML file.
        command: the dataclass whose fields are the options.

    Raises:
        UserError: the file cannot be read, is no TOML, or has an unknown key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"--config {path} is no TOML file: {error}") from None
    defaults = {
        field.name.replace("_", "-"): field.default
        for field in dataclasses.fields(command)
        if field.name != "config"
    }
    words: list[str] = []
    for key, value in values.items():
        name = key.replace("_", "-")
        if name not in defaults:
            raise UserError(
                f"--config {path} has the unknown key {key!r}; known are {', '.join(defaults)}"
            )
        try:
            words += _words_of(name, value, defaults[name])
        except ValueError as error:
            raise UserError(f"--config {path}: {key} {error}, got {value!r}") from None
    return words


def without_config(words: Sequence[str]) -> Iterator[str]:
    """Yield the words but ``--config FILE``."""
    rest = iter(words)
    for word in rest:
        if word == "--config":
            next(rest)
        elif not word.startswith("--config="):
            yield word


def _words_of(name: str, value: Any, default: Any) -> list[str]:
    option = f"--{name}"
    if name == "set":
        if not isinstance(value, Mapping):
            raise ValueError("must be a table of hyper-parameters")
        return [word for text in _overrides(value) for word in (option, text)]
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return [option if value else f"--no-{name}"]
    values = value if isinstance(value, list) else [value]
    if any(isinstance(item, list | Mapping | bool) for item in values):
        raise ValueError("must be a text or a number, or a list of them")
    if name == "load":
        return [f"{option}={value}" for value in values]
    if isinstance(default, tuple):
        return [option, *map(str, values)]
    return [f"{option}={format_value(value)}"]


def _overrides(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _overrides(value, f"{prefix}{key}.")
        else:
            # A list is none that a hyper-parameter could have: it is shown as it stands.
            yield f"{prefix}{key}={value if isinstance(value, list) else format_value(value)}"
