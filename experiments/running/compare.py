"""Many runs: in parallel, finished ones skipped, failures recorded."""

from __future__ import annotations

import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from ..errors import UserError, one_line
from ..protocol.benchmarks import require_data
from ..protocol.config import RunConfig
from ..protocol.loading import code_of
from .engines import make_engine
from .files import write_atomically
from .records import Record, Results, current_commit, describe_failure
from .run import run


def run_all(
    configs: Sequence[RunConfig],
    results: Results,
    data_root: Path | None = None,
    jobs: int | None = None,
    steps: Callable[[RunConfig], int] = lambda config: 1,
    command: str = "",
    engine: str = "local",
    ray_address: str | None = None,
    tensorboard: bool = False,
) -> list[dict[str, Any]]:
    """Do the runs that are not done yet and save each as it ends.

    A run that raises is saved as a failure and the others go on; it is tried again next time.
    Ctrl-C, a kill and a lost process or machine cost the unfinished runs alone.

    Args:
        configs: what to run.
        results: where finished runs are found and saved.
        data_root: see :func:`make_benchmark`; the same on every machine.
        jobs: runs at a time; for the default see the engine.
        steps: how often a run reports progress.
        command: saved with each result, to say what made it.
        engine: where runs are done, see :func:`experiments.running.engines.make_engine`.
        ray_address: see :class:`experiments.running.engines.RayEngine`.
        tensorboard: write a TensorBoard log directory for each run; on a cluster when it ends.

    Returns:
        The failures, as ``{"config": ..., "error": ...}``.

    Raises:
        UserError: the data is not there and cannot be downloaded, the engine cannot be used, or
            results cannot be written.
    """
    chosen = make_engine(engine, jobs, ray_address)
    finished = results.finished(configs)
    _tell_of_other_code(finished.values(), results)
    done = set(finished)
    todo = [c for c in {c.key(): c for c in configs}.values() if c.key() not in done]
    if not todo:
        return []
    if data_root is not None:
        data_root = data_root.absolute()
    for config in {(c.benchmark, c.scenario, c.model): c for c in todo}.values():
        require_data(config.benchmark, config.scenario, data_root, config.model)
    failures = []
    logs = results.logs if tensorboard else None
    attempt_it = attempt_afar if engine == "ray" else attempt
    work = partial(attempt_it, data_root=data_root, logs=logs)
    made_by = {"command": command, "commit": current_commit()}
    with _Bar(configs, done, steps) as bar, closing(chosen.run(work, todo, bar.show)) as ended:
        for config, result in ended:
            _write_logs(results.logs(config), result.pop("logs", {}))
            results.save(result | made_by)
            if "error" in result:
                failures.append(result)
                bar.write(f"FAILED {describe_failure(result)}")
            bar.end(config)
    results.compact()
    return failures


def _tell_of_other_code(records: Iterable[Record], results: Results) -> None:
    """Say on standard error which runs are kept although the user's code has changed since."""
    other = [r for r in records if r.get("code", {}) != code_of(RunConfig.from_dict(r["config"]))]
    if other:
        files = sorted({name for record in other for name in record.get("code", {})})
        tqdm.write(
            f"note: {len(other)} finished runs in {results.folder} are kept, though "
            f"{', '.join(files) or 'your code'} has changed since; give another output folder to "
            f"have them done again",
            file=sys.stderr,
        )


def attempt(
    config: RunConfig,
    data_root: Path | None,
    progress: Callable[[], object],
    logs: Callable[[RunConfig], Path] | None = None,
) -> dict[str, Any]:
    """Return the run's result, or its failure: ``config``, ``error`` and perhaps ``traceback``.

    Args:
        config: see :func:`experiments.run.run`, as what follows.
        data_root: likewise.
        progress: likewise.
        logs: returns a run's log directory. Default: none.
    """
    try:
        return run(config, data_root, progress, logs and logs(config))
    except UserError as error:
        return {"config": config.as_dict(), "error": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is recorded and shown
        return {
            "config": config.as_dict(),
            "error": one_line(error),
            "traceback": traceback.format_exc(),
        }


def attempt_afar(
    config: RunConfig,
    data_root: Path | None,
    progress: Callable[[], object],
    logs: Callable[[RunConfig], Path] | None = None,
) -> dict[str, Any]:
    """Do the same on a machine that may not have the log directory: the result carries its files.

    They are under ``logs``, the contents by name.
    """
    if logs is None:
        return attempt(config, data_root, progress)
    with tempfile.TemporaryDirectory() as folder:
        result = attempt(config, data_root, progress, lambda config: Path(folder) / "logs")
        files = {path.name: path.read_bytes() for path in Path(folder).glob("logs/*")}
    return result | {"logs": files}


def _write_logs(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a log directory that came from elsewhere, in the place of an older one."""
    if files:
        shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        write_atomically(folder / name, content)


class _Bar:
    """A progress bar over the steps of all runs, with the time that is left at the mean speed."""

    def __init__(
        self, configs: Sequence[RunConfig], done: set[str], steps: Callable[[RunConfig], int]
    ) -> None:
        self._all = {config.key(): steps(config) for config in configs}
        self._now = {key: self._all[key] if key in done else 0 for key in self._all}
        self._ended = set(done)
        self._bar = tqdm(
            total=sum(self._all.values()),
            initial=sum(self._now.values()),
            unit="exp",
            smoothing=0,
            desc=self._count(),
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def show(self, config: RunConfig, steps: int) -> None:
        """Show how many steps a run has done; less than before if it was begun again."""
        key = config.key()
        if key not in self._ended:  # a message may be late
            self._bar.update(steps - self._now[key])
            self._now[key] = steps

    def end(self, config: RunConfig) -> None:
        """Show that a run is over."""
        key = config.key()
        self.show(config, self._all[key])
        self._ended.add(key)
        self._bar.set_description_str(self._count(), refresh=False)
        self._bar.set_postfix_str(f"last: {config.method}, seed {config.seed}")

    def write(self, line: str) -> None:
        """Write a line above the bar."""
        self._bar.write(line, file=sys.stderr)

    def _count(self) -> str:
        return f"{len(self._ended)}/{len(self._all)} runs"
