"""The seam that parallel runs go through, and its two engines: local processes, and Ray.

An engine does one thing: it does a piece of work for every config, somewhere, and hands each result
over as it ends. What is run, where results go and what is shown is the business of
:func:`experiments.running.compare.run_all`, the same for both.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from tqdm import tqdm

from ..errors import UserError, one_line
from ..protocol.config import RunConfig
from ..protocol.loading import LOADED, load_files
from .processes import (
    ONE_THREAD,
    WorkerDiedError,
    available_cores,
    in_processes,
)

Result = dict[str, Any]
Progress = Callable[[RunConfig, int], object]
"""Is told how many steps a run has done; fewer than before where it had to begin again."""


class Work(Protocol):
    """Does a run. It is importable by name and raises no Exception."""

    def __call__(self, config: RunConfig, *, progress: Callable[[], object]) -> Result:
        """Return the run's result or failure; call ``progress`` after each step."""


class Engine(Protocol):
    """A way to do many runs at once."""

    def run(
        self, work: Work, configs: Sequence[RunConfig], progress: Progress
    ) -> Generator[tuple[RunConfig, Result]]:
        """Do the work for every config and yield each with its result, in the order they end.

        A run that is lost with its process or machine is begun again; one that is lost again and
        again ends as a failure, ``{"config": ..., "error": ...}``. Closing the generator ends the
        unfinished runs.

        Raises:
            UserError: the engine cannot be used.
        """


def make_engine(name: str, jobs: int | None = None, ray_address: str | None = None) -> Engine:
    """Make an engine.

    Args:
        name: ``local`` for :class:`LocalEngine`, ``fork`` or ``here`` for one that starts its
            processes so, ``ray`` for :class:`RayEngine`.
        jobs: see the engine.
        ray_address: see :class:`RayEngine`.

    Raises:
        UserError: an unknown name, or an address for an engine that has none.
    """
    if name == "ray":
        return RayEngine(jobs, ray_address)
    starts = {"local": "spawn", "fork": "fork", "here": "here"}
    if name not in starts:
        raise UserError(f"unknown engine {name!r}; choose from {', '.join(starts)}, ray")
    if ray_address is not None:
        raise UserError(f"--ray-address {ray_address} is for --engine ray")
    return LocalEngine(jobs, starts[name])


@dataclass(eq=False)
class _Run:
    """A run on its way through an engine."""

    config: RunConfig
    progress: Progress
    tries: int = 0
    steps: int = 0

    def begin(self) -> RunConfig:
        self.tries += 1
        self.step(0)
        return self.config

    def step(self, steps: int) -> None:
        self.steps = steps
        self.progress(self.config, steps)

    def failure(self, error: str, details: str | None = None) -> Result:
        result = {"config": self.config.as_dict(), "error": error}
        return result if details is None else {**result, "traceback": details}


class LocalEngine:
    """Processes of this machine; see :func:`experiments.running.processes.in_processes`.

    Args:
        jobs: number of processes. Default: one for each core.
        start: how they are started.
    """

    def __init__(self, jobs: int | None = None, start: str = "spawn") -> None:
        self.jobs = jobs
        self.start = start

    def run(
        self, work: Work, configs: Sequence[RunConfig], progress: Progress
    ) -> Generator[tuple[RunConfig, Result]]:
        """See :meth:`Engine.run`."""
        runs = [_Run(config, progress) for config in configs]
        outcomes = in_processes(
            _work_in_process,
            [(work, config) for config in configs],
            self.jobs,
            begun=lambda number: runs[number].begin(),
            told=lambda number, _: runs[number].step(runs[number].steps + 1),
            start=self.start,
        )
        with closing(outcomes):
            for number, outcome in outcomes:
                died = isinstance(outcome, WorkerDiedError)
                yield configs[number], runs[number].failure(str(outcome)) if died else outcome


def _work_in_process(work: Work, config: RunConfig, send: Callable[[Any], None]) -> Result:
    return work(config, progress=lambda: send(None))


class RayEngine:
    """Tasks on a Ray cluster, each with one CPU.

    This code travels to the cluster's machines by itself, and so do the files that were loaded
    (not what lies beside them). What must be there: the same Python and
    Ray as here, torch and Avalanche, and the dataset in the same folder as here.

    A run that is lost with its process or machine is tried again wherever there is room, three
    times at most. When this program ends, however it ends, its tasks end too.

    A run on ``cuda`` also has a quarter of a GPU, so up to four share one; each sees its own GPU
    alone.

    Args:
        jobs: runs at a time. Default: as many as the cluster has CPUs.
        address: of the cluster: ``HOST:PORT`` or ``auto`` on one of its machines,
            ``ray://HOST:PORT`` elsewhere. Default: the environment variable ``RAY_ADDRESS``. With
            neither, or ``local``, Ray is started on this machine with ``jobs`` CPUs (default: one
            for each core) and stopped at the end.
    """

    TRIES = 4
    GPU_SHARE = 0.25

    def __init__(self, jobs: int | None = None, address: str | None = None) -> None:
        self.jobs = jobs
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"

    def run(
        self, work: Work, configs: Sequence[RunConfig], progress: Progress
    ) -> Generator[tuple[RunConfig, Result]]:
        """See :meth:`Engine.run`."""
        ray = _connect_to_ray(self.address, self.jobs)
        try:
            self._warn_of_missing(ray.cluster_resources(), configs)
            yield from self._run(ray, work, [_Run(config, progress) for config in configs])
        finally:
            ray.shutdown()

    def _warn_of_missing(self, there: Mapping[str, float], configs: Sequence[RunConfig]) -> None:
        gpu = any(self._needs(config)["num_gpus"] for config in configs)
        for resource in ("CPU", "GPU") if gpu else ("CPU",):
            if not there.get(resource):  # it may grow
                line = f"the Ray cluster at {self.address} has no {resource}; the runs wait for one"
                tqdm.write(line, file=sys.stderr)

    def _run(
        self, ray: Any, work: Work, runs: Sequence[_Run]
    ) -> Generator[tuple[RunConfig, Result]]:
        mailbox = _make_mailbox(ray)
        news = mailbox.get.remote()
        waiting = deque(range(len(runs)))
        running: dict[Any, int] = {}  # task to the run's number
        try:
            while waiting or running:
                while waiting and len(running) < (self.jobs or len(runs)):
                    number = waiting.popleft()
                    config = runs[number].begin()
                    task = ray.remote(_work_on_ray).options(**self._needs(config))
                    names = [Path(file.name) for file in LOADED]
                    running[task.remote(work, config, number, mailbox, names)] = number
                (ended,), _ = ray.wait([news, *running])
                if ended == news:
                    number, steps = self._read(ray, news)
                    runs[number].step(steps)
                    news = mailbox.get.remote()
                    continue
                number = running.pop(ended)
                result = self._outcome(ray, ended, runs[number])
                if result is None:
                    waiting.append(number)
                else:
                    yield runs[number].config, result
        finally:
            # Ray complains of a call that is never answered.
            ray.wait([mailbox.put.remote(None), news], num_returns=2, timeout=2)

    def _outcome(self, ray: Any, task: Any, run: _Run) -> Result | None:
        """Return the result or failure; nothing where the run is to be tried again."""
        try:
            return ray.get(task)
        except ray.exceptions.RayTaskError as error:
            return run.failure(_first_line(error.cause), str(error))
        except ray.exceptions.RayError as error:
            if run.tries < self.TRIES:
                return None
            return run.failure(f"lost in {run.tries} tries: {_first_line(error)}", str(error))

    def _read(self, ray: Any, news: Any) -> tuple[int, int]:
        try:
            return ray.get(news)
        except ray.exceptions.RayError as error:
            # The mailbox is where this program is: without it there is no cluster any more.
            reason = _first_line(error)
            raise UserError(f"the Ray cluster at {self.address} has failed: {reason}") from error

    def _needs(self, config: RunConfig) -> dict[str, Any]:
        return {
            "name": f"{config.method} seed {config.seed}",
            "num_cpus": 1,
            "num_gpus": self.GPU_SHARE if config.device.startswith("cuda") else 0,
            # With any retries of its own, Ray tries a run that is out of memory for ever.
            "max_retries": 0,
        }


def _first_line(error: BaseException) -> str:
    # Ray's messages go on for pages.
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}".removesuffix(": ")


def _work_on_ray(
    work: Work, config: RunConfig, number: int, mailbox: Any, files: Sequence[Path]
) -> Result:
    load_files(files)  # in the working directory
    steps = itertools.count(1)
    return work(config, progress=lambda: mailbox.put.remote((number, next(steps))))


class _Mailbox:
    """A Ray actor that passes on what tasks say while they run."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Any] = asyncio.Queue()

    async def put(self, message: Any) -> None:
        await self._messages.put(message)

    async def get(self) -> Any:
        return await self._messages.get()


def _make_mailbox(ray: Any) -> Any:
    # On this program's own machine, the end of which ends all: no other one's end matters to it.
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    actor = ray.remote(_Mailbox).options(
        num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1
    )
    return actor.remote()


def _connect_to_ray(address: str, jobs: int | None) -> Any:
    # Ray reads these when it is imported. Without the second it writes about lost machines on the
    # output that the table goes to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
        import ray.util.scheduling_strategies
    except ModuleNotFoundError as error:
        raise UserError(f"--engine ray: {error}; pip install ray brings it") from None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options |= {
            "num_cpus": jobs or available_cores(),
            "include_dashboard": False,
            "object_store_memory": 80 * 2**20,  # results are small, and so may be /dev/shm
        }
    else:
        _require_an_answer(address)
    with tempfile.TemporaryDirectory() as code:
        _copy_code(code)
        # As the working directory it comes before a checkout that a machine has in the same place.
        environment = {"working_dir": code, "env_vars": ONE_THREAD}
        try:
            ray.init(address, runtime_env=environment, **options)
        except Exception as error:
            reason = one_line(error)
            raise UserError(f"cannot use the Ray cluster at {address}: {reason}") from error
    return ray


def _require_an_answer(address: str) -> None:
    """Find out at once what Ray finds out in minutes and says on pages.

    Raises:
        UserError: nothing listens there.
    """
    try:
        place = urlsplit(address if "://" in address else f"ray://{address}")
        if place.hostname is not None and place.port is not None:
            socket.create_connection((place.hostname, place.port), timeout=10).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({one_line(error)}); name the address that "
            f"`ray start --head` says, with --ray-address or RAY_ADDRESS"
        ) from error


def _copy_code(folder: str) -> None:
    """Copy what the machines of a cluster need of this checkout, and the user's files."""
    import avalanche_classp

    ignored = shutil.ignore_patterns("results", "__pycache__")
    for package in (Path(avalanche_classp.__path__[0]), Path(__file__).parents[1]):
        shutil.copytree(package, Path(folder) / package.name, ignore=ignored)
    for file in LOADED:
        shutil.copy(file, folder)
