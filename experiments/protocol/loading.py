"""Files of the user's that declare benchmarks, models and methods."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UserError, line_in, one_line
from .benchmarks import BENCHMARKS
from .config import RunConfig
from .methods import METHODS
from .models import MODELS
from .own_stream import readable

LOADED: dict[Path, str] = {}
"""The files that :func:`load_files` has executed, and the SHA-256 of what they held."""


def load_files(paths: Iterable[Path]) -> None:
    """Execute files that declare benchmarks, models and methods, each once.

    They import the decorators from ``avalanche_classp.experiments``, and may import modules that
    lie beside them.

    Raises:
        UserError: a file cannot be read, raises, declares nothing, or declares a name that is
            taken.
    """
    for path in paths:
        file = path.resolve()
        if file not in LOADED:
            _load_file(path, file)


def _load_file(path: Path, file: Path) -> None:
    try:
        source = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read --load {path}: {error.strerror or error}") from None
    name = f"loaded_{file.stem}"  # not the name of some package
    if name in sys.modules:
        raise UserError(f"--load {path}: another file of this name is loaded; rename one")
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    before = _declared()
    try:
        exec(compile(source, str(file), "exec"), module.__dict__)
        if _declared() == before:
            raise UserError("it declares nothing; decorate with @benchmark, @model or @method")
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        reason = str(error) if isinstance(error, UserError) else one_line(error)
        raise UserError(f"--load {path}: {reason}{line_in(str(file), error)}") from error
    LOADED[file] = hashlib.sha256(source).hexdigest()


def _declared() -> list[tuple[str, Any]]:
    registries: tuple[Mapping[str, Any], ...] = (BENCHMARKS, MODELS, METHODS)
    return [item for entries in registries for item in entries.items() if item[1].origin]


def code_of(config: RunConfig) -> dict[str, str]:
    """Return the user's files that a run executes, with their SHA-256; empty where it is all ours.

    Code that was typed into a notebook has the name of its function.
    """
    names = (config.benchmark, config.model, config.method)
    code = {}
    for name, entries in zip(names, (BENCHMARKS, MODELS, METHODS), strict=True):
        entry: Any = entries.get(name)  # type: ignore[attr-defined]
        if entry is not None and entry.origin is not None:
            label, digest = _hashed(entry.origin)
            code[label] = digest
    return code


def _hashed(function: Callable[..., Any]) -> tuple[str, str]:
    try:
        file = Path(inspect.getfile(function)).resolve()
        if file in LOADED:
            return file.name, LOADED[file]
        if file.exists():
            return file.name, hashlib.sha256(file.read_bytes()).hexdigest()
        return readable(function), hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    except (OSError, TypeError):  # typed at a prompt, or no function
        return readable(function), "unknown"
