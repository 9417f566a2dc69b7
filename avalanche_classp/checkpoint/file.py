"""Files that are whole or not there: written atomically, with a checksum, read without code.

A file is a line with the format's version, a line with the SHA-256 of the rest in hexadecimal
digits, and the rest: what ``torch.save`` makes of tensors and plain containers. Once the checksum
is right ``torch.load(weights_only=True)`` reads it, and calls nothing that a file names.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

__all__ = ["CheckpointError", "read_content", "read_file", "verified", "write_file"]

VERSION = 1
"""Of the format. A release reads the versions up to its own."""

TEMPORARY = ".tmp"
"""What follows the name of a file that is being written."""

_FIRST_LINE = re.compile(rb"avalanche-classp checkpoint ([0-9]{1,9})\n")
_LENGTH_OF_HASH = 64


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message says which and what to do."""


def write_file(path: Path, content: dict[str, Any]) -> None:
    """Write a whole file or, with a CheckpointError, none."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getbuffer()
    first = b"avalanche-classp checkpoint %d\n" % VERSION
    second = hashlib.sha256(payload).hexdigest().encode() + b"\n"
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            file.write(first + second)
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name != "nt":  # make the renaming last; Windows does, and opens no folders
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {error.strerror}; see to it that it can be "
            f"written and start again: training goes on from the checkpoint before"
        ) from error
    finally:
        if os.path.lexists(temporary):
            temporary.unlink()


def verified(path: Path) -> memoryview:
    """Return the part of a file that holds its content; CheckpointError if it is not whole."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    found = _FIRST_LINE.match(data)
    if found is None:
        raise CheckpointError(
            f"{path} is no checkpoint of avalanche-classp, or its beginning is lost; move it away"
        )
    if int(found[1]) > VERSION:
        raise CheckpointError(
            f"{path} has version {int(found[1])}, and this release of avalanche-classp reads "
            f"versions up to {VERSION}; use a newer release"
        )
    begin = found.end() + _LENGTH_OF_HASH + 1
    payload = memoryview(data)[begin:]
    if data[found.end() : begin] != hashlib.sha256(payload).hexdigest().encode() + b"\n":
        raise CheckpointError(f"{path} is truncated or corrupt: its checksum is wrong; delete it")
    return payload


def read_file(path: Path, device: torch.device) -> dict[str, Any]:
    """Return the content of a whole file; see :func:`read_content`."""
    content = read_content(verified(path), path, device)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no checkpoint; move it away")
    return content


def read_content(payload: memoryview, path: Path, device: torch.device) -> Any:
    """Return what ``torch.save`` wrote, without running code from it.

    Tensors that were not on a CPU go to the device.
    """

    def place(storage: Any, location: str) -> Any:
        return storage if location == "cpu" or device.type == "cpu" else storage.to(device=device)

    try:
        return torch.load(io.BytesIO(payload), map_location=place, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} does not hold tensors and plain containers alone, or not in a form that torch "
            f"{torch.__version__} reads; move it away"
        ) from error
