"""Many runs: in parallel processes, finished ones skipped, failures recorded."""

from __future__ import annotations

import queue
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.benchmarks import make_benchmark
from experiments.config import RunConfig
from experiments.errors import UserError, one_line
from experiments.processes import CONTEXT, available_cores, make_pool, stop
from experiments.resultfiles import Results, describe_failure
from experiments.run import run

_progress_queue: Any = None  # in a worker: where it reports finished experiences


def run_all(
    configs: Sequence[RunConfig],
    results: Results,
    data_root: Path | None = None,
    jobs: int | None = None,
    steps: Callable[[RunConfig], int] = lambda config: 1,
    command: str = "",
) -> list[dict[str, Any]]:
    """Do the runs that are not done yet and save each as it ends.

    A run that raises is saved as a failure and the others go on; it is tried again next time.
    Ctrl-C, a kill and a lost process cost the unfinished runs alone.

    Args:
        configs: what to run.
        results: where finished runs are found and saved.
        data_root: see :func:`experiments.benchmarks.make_benchmark`.
        jobs: processes, each with one thread. Default: one for each core.
        steps: how often a run reports progress.
        command: saved with each result, to say what made it.

    Returns:
        The failures, as ``{"config": ..., "error": ...}``.

    Raises:
        UserError: the data is not there and cannot be downloaded, or results cannot be written.
    """
    done = {RunConfig.from_dict(r["config"]).key() for r in results.finished(configs)}
    todo = [config for config in configs if config.key() not in done]
    if not todo:
        return []
    for config in {(c.benchmark, c.scenario): c for c in todo}.values():
        # Downloaded once, and not by each process.
        make_benchmark(config.benchmark, config.scenario, data_root)
    reports = CONTEXT.Queue()
    failures = []
    bar = tqdm(
        total=sum(map(steps, todo)),
        unit="exp",
        desc=f"{len(todo)} runs" + (f", {len(done)} done before" if done else ""),
    )
    size = min(jobs or available_cores(), len(todo))
    with bar, make_pool(size, _report_to, reports) as pool:
        pending = {pool.submit(_run_in_worker, config, data_root): config for config in todo}
        try:
            while pending:
                ended, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(_drain(reports))
                for future in ended:
                    result = _outcome(future, pending.pop(future)) | {"command": command}
                    results.save(result)
                    if "error" in result:
                        failures.append(result)
                        bar.write(f"FAILED {describe_failure(result)}")
            bar.update(_drain(reports))
        except BaseException:
            stop(pool)
            raise
    return failures


def _report_to(reports: Any) -> None:
    global _progress_queue
    _progress_queue = reports


def _run_in_worker(config: RunConfig, data_root: Path | None) -> dict[str, Any]:
    return attempt(config, data_root, lambda: _progress_queue.put(1))


def attempt(
    config: RunConfig, data_root: Path | None, progress: Callable[[], object]
) -> dict[str, Any]:
    """Return the run's result, or its failure: ``config``, ``error`` and perhaps ``traceback``."""
    try:
        return run(config, data_root, progress)
    except UserError as error:
        return {"config": config.as_dict(), "error": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is recorded and shown
        return {
            "config": config.as_dict(),
            "error": one_line(error),
            "traceback": traceback.format_exc(),
        }


def _outcome(future: Future[dict[str, Any]], config: RunConfig) -> dict[str, Any]:
    try:
        return future.result()
    except BrokenProcessPool:
        error = "a worker process was killed (out of memory?) while this run was waiting or running"
        return {"config": config.as_dict(), "error": error}


def _drain(reports: Any) -> int:
    count = 0
    try:
        while True:
            count += reports.get_nowait()
    except queue.Empty:
        return count
