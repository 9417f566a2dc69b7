"""Worker processes with one thread each that end with their parent, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..protocol.loading import LOADED, load_files

TRIES = 2

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment of a process beside which others work. The libraries read it when they are loaded."""


class WorkerDiedError(Exception):
    """A worker has ended; the message says how, to follow "its process"."""


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    jobs: int | None = None,
    begun: Callable[[int], object] = lambda number: None,
    told: Callable[[int, Any], object] = lambda number, message: None,
    start: str = "spawn",
) -> Generator[tuple[int, Any]]:
    """Call ``function(*task, send)`` for every task and yield results in the order they end.

    Each process has one thread and one task at a time. A task whose process is killed is begun
    again after the others. Closing the generator ends the processes.

    They are spawned and not forked, because torch's threads do not survive a fork. Functions that
    no other process can import, those of a notebook say, need a fork: CPU runs with one thread get
    along with it.

    Args:
        function: importable by name. It can ``send`` objects while it works.
        tasks: the arguments, which can be pickled.
        jobs: number of processes. Default: one for each core.
        begun: is told the number of each task that is begun, also again.
        told: is told the task's number and what it sent.
        start: how processes are started, ``spawn`` or ``fork``; ``here``: there are none, this one
            does the tasks one after the other.

    Yields:
        The task's number and result; a WorkerDiedError where its process died :data:`TRIES` times.

    Raises:
        Exception: what the function raised.
    """
    if start == "here":
        for number, task in enumerate(tasks):
            begun(number)
            yield number, function(*task, partial(told, number))
        return
    waiting = deque((number, 1) for number in range(len(tasks)))
    busy: dict[Connection, tuple[_Worker, int, int]] = {}
    idle: list[_Worker] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < (jobs or available_cores()):
                number, attempt = waiting.popleft()
                worker = idle.pop() if idle else _Worker(start)
                busy[worker.pipe] = worker, number, attempt
                begun(number)
                worker.begin(function, tasks[number])
            for pipe in [pipe for pipe in connection.wait(busy) if isinstance(pipe, Connection)]:
                worker, number, attempt = busy[pipe]
                try:
                    kind, value = worker.receive()
                except WorkerDiedError as death:
                    del busy[pipe]
                    if attempt < TRIES:
                        waiting.append((number, attempt + 1))
                    else:
                        yield number, WorkerDiedError(f"its process {death}, in {attempt} tries")
                    continue
                if kind == "message":
                    told(number, value)
                    continue
                del busy[pipe]
                idle.append(worker)
                if kind == "error":
                    raise value
                yield number, value
    finally:
        for worker in (*(worker for worker, _, _ in busy.values()), *idle):
            worker.stop()


class _Worker:
    """A process that does one task after the other.

    It has a pipe of its own and shares nothing with other workers: one that is killed cannot leave
    a lock taken or a message half written that the others would wait for.
    """

    def __init__(self, start: str) -> None:
        context: Any = multiprocessing.get_context(start)
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, list(LOADED)))
        with warnings.catch_warnings():  # Python warns of forks beside threads
            warnings.simplefilter("ignore")
            self._process.start()
        theirs.close()

    def begin(self, function: Callable[..., Any], task: tuple[Any, ...]) -> None:
        """Have it do a task."""
        with suppress(BrokenPipeError):  # it died while it had nothing to do: receive will tell
            self.pipe.send((function, task))

    def receive(self) -> tuple[str, Any]:
        """Return the next thing that it tells, and its kind; wait for it.

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


def _describe_exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def _serve(pipe: Connection, files: Sequence[Path]) -> None:
    _start()
    while True:
        # Receiving the function imports its module, and with that torch: not before _start.
        function, task = pipe.recv()
        try:
            load_files(files)
            answer = "result", function(*task, lambda message: pipe.send(("message", message)))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised in the parent
            error.add_note(traceback.format_exc())
            answer = "error", error
        pipe.send(answer)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(ONE_THREAD)
    warnings.simplefilter("ignore")
    if torch := sys.modules.get("torch"):  # forked: it would wait for threads that are not here
        torch.set_num_threads(1)


def _end_with_parent() -> None:
    """Wait for the parent's end, also by SIGKILL, and do not outlive it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
