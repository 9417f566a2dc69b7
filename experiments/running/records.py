"""The records of runs: one compressed file for each comparison.

``records.jsonl.gz`` holds one JSON object per line. Each saved run is appended as a gzip member of
its own, so that a crash costs at most the record being written; ``compact`` makes one member of
them all. ``gzip -dc`` shows the file.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError, one_line
from ..protocol.config import RunConfig
from .files import make_folder, write_atomically

RECORDS = "records.jsonl.gz"
SCHEMA = 3
_NUMBERS = (
    "average_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "learning_accuracy",
    "peak_memory_bytes",
    "peak_device_bytes",
    "seconds_per_experience",
    "state_bytes_per_parameter",
)
"""What the tables are made of; None where a method has none."""

Record = dict[str, Any]
"""A run's result, or its failure: ``{"config": ..., "error": ...}``."""

_HEADER = 8
"""Bytes of a gzip member up to its time."""


class Results:
    """The records of an output folder; each is read once, however often they are asked for.

    The folder is made when something is written; several processes may save to the same.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / RECORDS
        self._forget()

    def _forget(self) -> None:
        self._records: dict[str, Record] = {}
        self._lines = 0
        self._end = 0
        """Where the last whole member that was read ends."""
        self._identity: tuple[int, bytes] | None = None
        """The file that was read: its inode, and its first bytes, as an inode is used again."""

    def save(self, record: Mapping[str, Any]) -> Path:
        """Append a record and return the records file. It replaces an older one of its config.

        Raises:
            UserError: the file cannot be written, or is damaged.
        """
        config = RunConfig.from_dict(record["config"])
        record = {"schema": SCHEMA, **record}
        make_folder(self.folder)
        with self._locked(write=True) as file:
            self._read_on(file)
            member = gzip.compress(_line(record), mtime=0)
            try:
                os.ftruncate(file.fileno(), self._end)  # without what a crash left half written
                rest = member
                while rest:
                    rest = rest[os.write(file.fileno(), rest) :]
                os.fsync(file.fileno())
            except BaseException:
                os.ftruncate(file.fileno(), self._end)
                raise
            self._end += len(member)
            self._lines += 1
            self._records[config.key()] = record
        return self.path

    def compact(self) -> None:
        """Write the file anew as one gzip member, without records that were replaced.

        Only the first seed of each setting keeps its accumulator maps: a figure shows no others,
        and they are nearly all of a record's bytes.

        Raises:
            UserError: the file cannot be written, or is damaged.
        """
        with self._locked(write=True) as file:
            self._read_on(file)
            self._records = self._sorted()
            _drop_further_maps(self._records.values())
            lines = b"".join(map(_line, self._records.values()))
            # The time in the header tells one content from another, and is the same for the same.
            data = gzip.compress(lines, mtime=zlib.crc32(lines))
            write_atomically(self.path, data)
            self._lines, self._end = len(self._records), len(data)
            self._identity = (self.path.stat().st_ino, data[:_HEADER])

    def logs(self, config: RunConfig) -> Path:
        """Return the run's TensorBoard log directory."""
        return self.folder / "tensorboard" / f"{config.method}-{config.seed}-{_digest(config)}"

    def by_key(self) -> dict[str, Record]:
        """Return all records, failures included, in the order of stream, method and seed.

        Each stands under its config's :meth:`~experiments.protocol.config.RunConfig.key`.

        Raises:
            UserError: the file is damaged or of another version; it is left as it is.
        """
        if self.path.exists():
            with self._locked(write=False) as file:
                self._read_on(file)
        else:
            self._forget()
        return self._sorted()

    def load(self) -> list[Record]:
        """Return the records of :meth:`by_key` as a list."""
        return list(self.by_key().values())

    def finished(self, configs: Iterable[RunConfig]) -> dict[str, Record]:
        """Return :meth:`by_key` of these configs, as far as they are there and no failures."""
        wanted = {config.key() for config in configs}
        return {
            key: record
            for key, record in self.by_key().items()
            if "error" not in record and key in wanted
        }

    def _sorted(self) -> dict[str, Record]:
        def place(item: tuple[str, Record]) -> str:
            config = RunConfig.from_dict(item[1]["config"])
            stream = f"{config.benchmark}-{config.scenario}"
            return f"{stream}-{config.method}-{config.seed}-{_digest(config)}"

        return dict(sorted(self._records.items(), key=place))

    @contextmanager
    def _locked(self, write: bool) -> Iterator[BinaryIO]:
        """Open the records file, when nobody else writes it; for writing also when nobody reads."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND if write else os.O_RDONLY
        try:
            while True:
                descriptor = os.open(self.path, flags, 0o644)
                with open(descriptor, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX if write else fcntl.LOCK_SH)
                    # While this waited, another process may have put a compact file in its place.
                    if os.path.samestat(os.fstat(descriptor), self.path.stat()):
                        yield file
                        return
        except OSError as error:
            verb = "write" if write else "read"
            raise UserError(f"cannot {verb} {self.path}: {error.strerror or error}") from error

    def _read_on(self, file: BinaryIO) -> None:
        """Read what has been appended since the last time."""
        status = os.fstat(file.fileno())
        identity = (status.st_ino, file.read(_HEADER))
        if identity != self._identity or status.st_size < self._end:
            self._forget()
            self._identity = identity
        file.seek(self._end)
        try:
            for end, member in _members(file):
                for line in member.splitlines():
                    self._take(line)
                self._end = end
        except _TornError:
            print(
                f"note: the last record of {self.path} was not written to its end and is left out; "
                f"its run is done again",
                file=sys.stderr,
            )
        except (zlib.error, ValueError) as error:
            self._forget()
            raise UserError(
                f"{self.path} is not a whole records file ({one_line(error)}); move it away to "
                f"have its runs done again"
            ) from error

    def _take(self, line: bytes) -> None:
        self._lines += 1
        try:
            record = json.loads(line)
            if record["schema"] != SCHEMA:
                format_ = record["schema"]
                raise ValueError(f"it has the format {format_!r}, and this version reads {SCHEMA}")
            config = _require_whole(record)
        except (UserError, ValueError, KeyError, TypeError) as error:
            number = self._lines
            self._forget()
            raise UserError(
                f"line {number} of {self.path} is not a whole record ({one_line(error)}); take it "
                f"out, or move the file away to have its runs done again"
            ) from error
        record["config"] = config.as_dict()
        self._records[config.key()] = record


class _TornError(Exception):
    """The file ends within a record."""


def _members(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the content of each gzip member from here on, and where it ends in the file.

    Raises:
        _TornError: the file ends within a member of one record.
        ValueError: it ends within a member of several, or holds something else.
        zlib.error: a member is damaged.
    """
    rest = b""
    while True:
        decoder = zlib.decompressobj(wbits=31)
        content, begun = b"", False
        while not decoder.eof:
            chunk, rest = rest or file.read(2**20), b""
            if not chunk and not begun:
                return
            if not chunk:
                if b"\n" in content[:-1]:
                    raise ValueError("it is cut off")
                raise _TornError
            if not begun and chunk[:2] != b"\x1f\x8b"[: len(chunk)]:
                raise ValueError("it is not compressed by gzip")
            begun = True
            content += decoder.decompress(chunk)
        rest = decoder.unused_data
        yield file.tell() - len(rest), content


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _drop_further_maps(records: Iterable[Record]) -> None:
    seen = set()
    for record in sorted(records, key=lambda record: record["config"]["seed"]):
        setting = json.dumps({**record["config"], "seed": None}, sort_keys=True)
        if setting in seen:
            record.pop("accumulator_maps", None)
        elif "error" not in record:
            seen.add(setting)


def _digest(config: RunConfig) -> str:
    """Return what tells a run from all others."""
    return hashlib.sha256(config.key().encode()).hexdigest()[:8]


def describe_failure(record: Mapping[str, Any]) -> str:
    """Return which run failed and why, on one line."""
    config = record["config"]
    return f"{config['method']}, seed {config['seed']}: {record['error']}"


def current_commit() -> str | None:
    """Return the commit of the clone that this code is in, ``-dirty`` if the code was changed.

    None without a clone or without git.
    """
    root = Path(__file__).parents[2]
    code = ("avalanche_classp", "experiments", ":(exclude)experiments/results")

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    if not (root / ".git").exists():  # installed, perhaps inside of another project's clone
        return None
    try:
        commit = git("rev-parse", "HEAD")
        return commit + "-dirty" * bool(git("status", "--porcelain", "--", *code))
    except (OSError, subprocess.CalledProcessError):
        return None


def _require_whole(record: Mapping[str, Any]) -> RunConfig:
    """Return the config; raise if a number is missing."""
    for key in () if "error" in record else _NUMBERS:
        if not isinstance(record[key], int | float | None):
            raise ValueError(f"{key} is {record[key]!r}")
    return RunConfig.from_dict(record["config"])
