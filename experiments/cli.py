"""The commands. The heavy imports wait until one needs them."""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.arguments import make_parser
from experiments.configfile import read_words
from experiments.errors import UserError, print_error, print_interrupted

if TYPE_CHECKING:
    from experiments.protocol.benchmarks import Benchmark
    from experiments.protocol.config import RunConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 for failed runs, 2 for what the user can mend.

    Args:
        arguments: the command line without the program. Default: ``sys.argv[1:]``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser(
        {
            "compare": _compare,
            "run": _run,
            "search": _search,
            "report": _report,
            "list": _list,
            "sensitivity": _sensitivity,
            "defaults": _defaults,
            "subset-ranking": _subset_ranking,
            "side-by-side": _side_by_side,
            "speed": _speed,
        }
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an encoding may lack ± or a folder's name
            stream.reconfigure(errors="backslashreplace")
    options = parser.parse_args(words)
    # Avalanche imports a package of solvers that nothing here uses. Worker processes import it
    # before any code of ours could tell them.
    warnings.filterwarnings("ignore", message="no QP solver found")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    try:
        if getattr(options, "config", None) is not None:
            words = read_words(options.config, words, options.known)
            options = parser.parse_args(words)
        options.command_line = shlex.join(["python", "-m", "experiments", *words])
        code = options.function(options)
        sys.stdout.flush()
        return code
    except ModuleNotFoundError as error:
        print_error(f"{error}; pip install '.[experiments]' brings it")
        return 2
    except UserError as error:
        print_error(str(error))
        return 2
    except OSError as error:  # a full disk, a closed pipe
        print_error(str(error))
        _drop_output_that_nobody_takes()
        return 2
    except KeyboardInterrupt:
        print_interrupted()
        return 130


def _drop_output_that_nobody_takes() -> None:
    """Python would write it again at its end, and fail with lines of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _compare(options: argparse.Namespace) -> int:
    from experiments.protocol.methods import count_steps
    from experiments.reporting.report import write_report
    from experiments.running.compare import run_all
    from experiments.running.records import Results

    methods = _methods(options)
    overrides: dict[str, dict[str, str]] = defaultdict(dict)
    for text in options.overrides:
        place, value = _split_override(text, "METHOD.KEY=VALUE")
        method, dot, key = place.partition(".")
        if not dot or method not in methods:
            raise UserError(
                f"--set {text}: {method!r} is none of the methods compared; write METHOD.KEY=VALUE"
            )
        overrides[method][key] = value
    configs = [
        _config(options, method, seed, overrides[method])
        for seed in range(options.seeds)
        for method in methods
    ]
    results = Results(_output(options))
    failures = run_all(
        configs,
        results,
        options.data_root,
        options.jobs,
        count_steps,
        options.command_line,
        options.engine,
        options.ray_address,
        options.tensorboard,
    )
    finished = list(results.finished(configs).values())
    if finished:
        print(write_report(finished, results.folder, failures))
        print(f"\nreport.html, table.md, table.csv and the figures are in {results.folder}")
        if options.tensorboard:
            print(f"to watch them: tensorboard --logdir {results.folder / 'tensorboard'}")
    if failures:
        reasons = "; ".join(sorted({failure["error"] for failure in failures}))
        print_error(f"{len(failures)} of {len(configs)} runs failed: {reasons}")
        return 1
    return 0


def _run(options: argparse.Namespace) -> int:
    overrides = dict(_split_override(text, "KEY=VALUE") for text in options.overrides)
    config = _config(options, options.method, options.seed, overrides)
    from tqdm import tqdm

    from experiments.protocol.methods import count_steps
    from experiments.reporting.tables import plain_table, table_rows
    from experiments.running.compare import attempt
    from experiments.running.records import Results, current_commit

    warnings.simplefilter("ignore")
    results = Results(_output(options))
    logs = results.logs if options.tensorboard else None
    with tqdm(total=count_steps(config), unit="exp", desc=config.method, delay=1) as bar:
        result = attempt(config, options.data_root, bar.update, logs)
    made_by = {"command": options.command_line, "commit": current_commit()}
    path = results.save(result | made_by)
    if "error" in result:
        print_error(f"{result['error']} (recorded in {path})")
        return 1
    print(plain_table(table_rows([result])))
    print(f"\nrecorded in {path}")
    if logs:
        print(f"to watch it: tensorboard --logdir {logs(config)}")
    return 0


def _search(options: argparse.Namespace) -> int:
    from experiments.protocol.tuned_settings import adopt
    from experiments.running.processes import available_cores
    from experiments.running.run import find_device
    from experiments.tuning.search import search

    spec = _benchmark(options)
    find_device(options.device)
    # A journal says what its trials were run with, and one of CPU runs names no device.
    device = {} if options.device == "cpu" else {"device": options.device}
    settings = search(
        options.benchmark,
        options.scenario,
        _methods(options),
        _output(options) / "search",
        options.trials,
        options.tuning_seeds,
        options.epochs_choices or spec.epochs_choices,
        options.batch_size or spec.batch_size,
        options.data_root,
        options.train_share,
        options.jobs or available_cores(),
        options.finalists,
        options.finalist_seeds,
        **_given(options, "model", "experiences"),
        **device,
    )
    for method, setting in settings.items():
        print(method, json.dumps(setting.as_dict()))
    if options.adopt:
        adopt(options.benchmark, options.scenario, settings, options.model)
    return 0


def _report(options: argparse.Namespace) -> int:
    from experiments.reporting.report import write_report
    from experiments.running.records import Results

    finished: dict[tuple[str, str], list[Any]] = defaultdict(list)
    failed: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for result in Results(options.folder).load():
        group = (result["config"]["benchmark"], result["config"]["scenario"])
        (failed if "error" in result else finished)[group].append(result)
    if not finished:
        raise UserError(f"there are no finished runs in {options.folder}")
    for group, results in finished.items():
        folder = options.folder
        if len(finished) > 1:
            folder /= "-".join(group)
        print(write_report(results, folder, failed[group]))
        print(f"\nwritten to {folder}\n")
    return 0


def _sensitivity(options: argparse.Namespace) -> int:
    from experiments.tuning.sensitivity import write_sensitivity

    _benchmark(options)  # checks the names
    print(
        write_sensitivity(
            options.benchmark,
            options.scenario,
            _methods(options),
            options.seeds,
            options.output,
            options.jobs,
            options.data_root,
            options.command_line,
        )
    )
    return 0


def _defaults(options: argparse.Namespace) -> int:
    from experiments.tuning.defaults import search_defaults

    print(search_defaults(options.trials, options.first, options.output, options.data_root))
    return 0


def _subset_ranking(options: argparse.Namespace) -> int:
    from experiments.tuning.subset_ranking import rank_subset

    print(rank_subset(options.folder, options.methods, options.jobs, options.data_root))
    return 0


def _side_by_side(options: argparse.Namespace) -> int:
    from experiments.reporting.side_by_side import side_by_side

    print("\n\n".join(side_by_side(options.folders)))
    return 0


def _speed(options: argparse.Namespace) -> int:
    from experiments.speed.cases import measure_speed

    names = ("cases", "pairs", "rounds", "threads", "device", "quick", "data_root", "output")
    try:
        measure_speed(**{name: getattr(options, name) for name in names})
    except KeyboardInterrupt:  # nothing is kept that the command could go on from
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _list(options: argparse.Namespace) -> int:
    registries = _registries()
    width = max(len(name) for entries in registries.values() for name in entries)
    for kind, entries in registries.items():
        print(f"{kind}s:")
        for name, entry in entries.items():
            lines = [entry if isinstance(entry, str) else entry.description]
            if kind == "benchmark":
                lines.append(f"model {entry.model}; scenarios {', '.join(entry.scenarios)}")
            elif kind == "method":
                lines.append(", ".join(f"{key}={value}" for key, value in entry.defaults.items()))
            for label, line in zip((name, ""), lines, strict=False):
                print(f"  {label:{width}}  {line}")
    return 0


def _split_override(text: str, form: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: write {form}")
    return key, value


def _config(
    options: argparse.Namespace, method: str, seed: int, overrides: dict[str, str]
) -> RunConfig:
    from experiments.protocol.config import parse_value
    from experiments.protocol.methods import METHODS
    from experiments.protocol.tuned_settings import make_config, require_known
    from experiments.running.run import find_device

    _benchmark(options)
    if getattr(options, "engine", "local") == "local":  # a cluster may have what is not here
        find_device(options.device)
    known = METHODS[_known("method", method)].defaults
    require_known(method, overrides)
    return make_config(
        options.benchmark,
        options.scenario,
        method,
        seed,
        {key: parse_value(text, known[key], key) for key, text in overrides.items()},
        device=options.device,
        **_given(options, "model", "experiences", "epochs", "batch_size"),
    )


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options of these names that were given."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _methods(options: argparse.Namespace) -> list[str]:
    from experiments.protocol.methods import METHODS

    usual = [name for name, method in METHODS.items() if method.usual]
    return [_known("method", name) for name in dict.fromkeys(options.methods or usual)]


def _benchmark(options: argparse.Namespace) -> Benchmark:
    """Return the benchmark, and fill in its default scenario."""
    from experiments.protocol.benchmarks import BENCHMARKS

    spec = BENCHMARKS[_known("benchmark", options.benchmark)]
    options.scenario = _known("scenario", options.scenario or spec.scenarios[0])
    if options.model is not None:
        _known("model", options.model)
    return spec


def _known(kind: str, name: str) -> str:
    names = _registries()[kind]
    if name not in names:
        raise UserError(f"unknown {kind} {name!r}; choose from {', '.join(names)}")
    return name


def _registries() -> dict[str, Mapping[str, Any]]:
    from experiments.protocol.benchmarks import BENCHMARKS, SCENARIOS
    from experiments.protocol.methods import METHODS
    from experiments.protocol.models import MODELS

    return {"benchmark": BENCHMARKS, "scenario": SCENARIOS, "method": METHODS, "model": MODELS}


def _output(options: argparse.Namespace) -> Path:
    return options.output or Path("results") / f"{options.benchmark}-{options.scenario}"
