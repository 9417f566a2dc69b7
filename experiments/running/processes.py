"""Worker processes with one thread each that end with their parent, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

# Spawned and not forked: torch's threads do not survive a fork.
CONTEXT = multiprocessing.get_context("spawn")

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment of a process beside which others work. The libraries read it when they are loaded."""


class WorkerDiedError(Exception):
    """A worker has ended; the message says how, to follow "its process"."""


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Worker:
    """A process that does one piece of work after the other.

    It has a pipe of its own and shares nothing with other workers: one that is killed cannot leave
    a lock taken or a message half written that the others would wait for.

    Attributes:
        pipe: can be waited for with ``multiprocessing.connection.wait``; see :meth:`receive`.
    """

    def __init__(self) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have it call ``function(*arguments, send)``.

        Args:
            function: importable by name. It can ``send`` objects; what it returns is sent last.
            *arguments: can be pickled.
        """
        with suppress(BrokenPipeError):  # it died while it had nothing to do: receive will tell
            self.pipe.send((function, arguments))

    def receive(self) -> Any:
        """Return the next object that it sent; wait for it.

        Raises:
            WorkerDiedError: it has died and sends nothing any more.
        """
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(timeout=10)
            code = self._process.exitcode
            self.stop()
            raise WorkerDiedError(_describe_exit(code)) from None

    def stop(self) -> None:
        """End it without waiting for what it is doing."""
        self._process.terminate()
        self._process.join()
        self.pipe.close()


def make_pool(size: int) -> ProcessPoolExecutor:
    """Make a pool of so many processes."""
    return ProcessPoolExecutor(size, CONTEXT, _start)


def stop(pool: ProcessPoolExecutor) -> None:
    """End the pool's processes without waiting for what they are doing."""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        process.terminate()


def _describe_exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def _serve(pipe: Connection) -> None:
    _start()
    while True:
        # Receiving the function imports its module, and with that torch: not before _start.
        function, arguments = pipe.recv()
        pipe.send(function(*arguments, pipe.send))


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(ONE_THREAD)


def _end_with_parent() -> None:
    """Wait for the parent's end, also by SIGKILL, and do not outlive it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
