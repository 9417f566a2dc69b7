"""Kinds of text that lie wherever the experiments are installed; nothing is downloaded.

They differ between installations: a record holds the size and checksum of each.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.metadata
import io
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["KINDS", "Text", "load"]

MOST_BYTES = 1_500_000
"""Of one kind."""

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "lib2to3", "pydoc_data"}
"""Folders of other packages, of tests, which some installations lack, and of a manual."""
LICENCE = re.compile(r"(licen[cs]e|copying|notice)", re.IGNORECASE)


@dataclass(frozen=True)
class Text:
    """The bytes of one kind of text, as whole numbers.

    Attributes:
        train: what is trained on.
        validation: what choices are made by.
        test: what the final runs are measured on.
        checksum: SHA-256 of the three together, in hexadecimal digits.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    checksum: str


Pieces = Iterator[tuple[str, str]]
"""Names, and texts that belong together: a name's text is all in one part."""


def _sources() -> Iterator[tuple[str, bytes]]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if not LEFT_OUT & set(name.parts):
            yield name.as_posix(), path.read_bytes()


def _docstrings() -> Pieces:
    """Yield the documentation strings of each module of the standard library."""
    for name, source in _sources():
        nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED))
        yield name, "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def _code() -> Pieces:
    """Yield the modules of the standard library without strings of a line's own and comments."""
    for name, source in _sources():
        lines = source.decode(tokenize.detect_encoding(io.BytesIO(source).readline)[0]).splitlines()
        dropped: set[int] = set()
        line_begins = True
        for token in tokenize.tokenize(io.BytesIO(source).readline):
            (first, start), (last, _) = token.start, token.end
            if token.type == tokenize.COMMENT:
                lines[first - 1] = lines[first - 1][:start].rstrip()
                dropped |= {first} if not lines[first - 1] else set()
            elif token.type == tokenize.STRING and line_begins:
                dropped |= set(range(first, last + 1))
            if token.type not in (tokenize.COMMENT, tokenize.NL):
                line_begins = token.type in (
                    *(tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING),
                )
        kept = (line for number, line in enumerate(lines, 1) if number not in dropped)
        yield name, "\n".join(kept)


def _licences() -> Pieces:
    """Yield the paragraphs of the installed packages' licences, each once."""
    files = sorted(
        str(file.locate())
        for package in importlib.metadata.distributions()
        for file in package.files or ()
        if LICENCE.search(file.name) and file.suffix not in (".py", ".pyc")
    )
    seen = set()
    for name in files:
        path = Path(name)
        for paragraph in re.split(r"\n\s*\n", path.read_text("utf-8", "replace")) * path.is_file():
            words = " ".join(paragraph.split())
            if len(words) > 40 and words not in seen:
                seen.add(words)
                yield words, paragraph


def _headers() -> Pieces:
    """Yield Python's C headers."""
    folder = Path(sysconfig.get_path("include"))
    for path in sorted(folder.rglob("*.h")):
        yield path.relative_to(folder).as_posix(), path.read_text("utf-8", "replace")


def _tables() -> Pieces:
    """Yield the numbers of scikit-learn's bundled data sets, fifty lines at a time."""
    import sklearn

    for path in sorted((Path(sklearn.__file__).parent / "datasets" / "data").glob("*.csv*")):
        data = path.read_bytes()
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()
        for i in range(0, len(lines), 50):
            yield f"{path.name} {i}", "\n".join(lines[i : i + 50])


KINDS: dict[str, Callable[[], Pieces]] = {
    "docstrings": _docstrings,
    "code": _code,
    "licences": _licences,
    "headers": _headers,
    "tables": _tables,
}
"""The kinds in their order; the model is trained on the first and tuned on the others."""


@cache
def load(kind: str) -> Text:
    """Return a kind of text: a tenth each for validation and test, drawn by the pieces' names.

    Raises:
        ValueError: this installation has less than 20,000 bytes of it for a part.
    """
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    size = 0
    for name, text in _shuffled(KINDS[kind]()):
        if not text.strip() or size > MOST_BYTES:
            continue
        size += len(text)
        draw = hashlib.sha256(f"part {name}".encode()).digest()[0] % 10
        parts["validation" if draw == 0 else "test" if draw == 1 else "train"].append(text)
    joined = {part: "\n\n".join(texts).encode() for part, texts in parts.items()}
    for part, data in joined.items():
        if len(data) < 20_000:
            raise ValueError(f"this installation has {len(data)} bytes of {kind} for {part}")
    checksum = hashlib.sha256(b"\0".join(joined.values())).hexdigest()
    return Text(
        **{part: torch.frombuffer(bytearray(d), dtype=torch.uint8) for part, d in joined.items()},
        checksum=checksum,
    )


def _shuffled(pieces: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return them in an order of their own, so that a limit takes some of everything."""
    return sorted(pieces, key=lambda piece: hashlib.sha256(piece[0].encode()).digest())
