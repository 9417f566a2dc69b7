"""Config files: what the command line can say, as TOML."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.errors import UserError


def read_words(path: Path, words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return the command line with the file's options in the place of ``--config``.

    The file's come before what the user typed, so that the user has the last word. A key is an
    option without its dashes (``data-root`` or ``data_root``), hyper-parameters stand in the
    table ``set``::

        benchmark = "split-mnist"
        methods = ["classp", "ewc"]
        seeds = 5

        [set.classp]
        lr = 0.01

    Args:
        path: the TOML file.
        words: the command line, the command first.
        parser: the command's.

    Raises:
        UserError: the file cannot be read, is no TOML, or has an unknown key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path} is no TOML file: {error}") from None
    actions = {
        action.option_strings[0].removeprefix("--"): action
        for action in parser._actions
        if action.option_strings and action.dest not in ("help", "config")
    }
    from_file: list[str] = []
    for key, value in values.items():
        name = key.replace("_", "-")
        if name not in actions:
            raise UserError(
                f"--config {path} has the unknown key {key!r}; known are {', '.join(actions)}"
            )
        try:
            from_file += _words_of(name, value, actions[name])
        except ValueError as error:
            raise UserError(f"--config {path}: {key} {error}, got {value!r}") from None
    return [words[0], *from_file, *_without_config(words[1:])]


def _words_of(name: str, value: Any, action: argparse.Action) -> list[str]:
    option = f"--{name}"
    if name == "set":
        if not isinstance(value, Mapping):
            raise ValueError("must be a table of hyper-parameters")
        return [word for text in _overrides(value) for word in (option, text)]
    if isinstance(action, argparse._StoreTrueAction | argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return [option] if value else list(action.option_strings[1:])
    values = value if isinstance(value, list) else [value]
    if any(isinstance(item, list | Mapping | bool) for item in values):
        raise ValueError("must be a text or a number, or a list of them")
    if action.nargs == "+":
        return [option, *map(str, values)]
    return [f"{option}={','.join(map(str, values))}"]


def _overrides(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _overrides(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={str(value).lower() if isinstance(value, bool) else value}"


def _without_config(words: Sequence[str]) -> Iterator[str]:
    rest = iter(words)
    for word in rest:
        if word == "--config":
            next(rest)
        elif not word.startswith("--config="):
            yield word
