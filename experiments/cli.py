"""The command line. The heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.errors import UserError

if TYPE_CHECKING:
    from experiments.benchmarks import Benchmark
    from experiments.config import RunConfig

DEFAULT_METHODS = ("naive", "adagrad", "ewc", "classp", "joint")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 for failed runs, 2 for what the user can mend.

    Args:
        arguments: the command line without the program. Default: ``sys.argv[1:]``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    options.command_line = shlex.join(["python", "-m", "experiments", *words])
    # Avalanche imports a package of solvers that nothing here uses. Worker processes import it
    # before any code of ours could tell them.
    warnings.filterwarnings("ignore", message="no QP solver found")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    try:
        return options.function(options)
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install '.[experiments]' brings it", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted: finished runs are saved, the same command goes on from there",
            file=sys.stderr,
        )
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Compare continual-learning methods on Avalanche's benchmarks.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    compare = _command(commands, "compare", _compare, "methods × seeds on one benchmark; a table")
    _benchmark_options(compare)
    compare.add_argument(
        "--methods",
        nargs="+",
        default=list(DEFAULT_METHODS),
        metavar="METHOD",
        help=f"default: {' '.join(DEFAULT_METHODS)}",
    )
    compare.add_argument(
        "--seeds",
        type=_positive,
        default=3,
        metavar="N",
        help="seeds 0 to N-1 for each method (default: 3)",
    )
    _run_options(compare, "METHOD.KEY=VALUE")
    compare.add_argument(
        "--jobs", type=_positive, metavar="N", help="parallel processes (default: one per core)"
    )

    run = _command(commands, "run", _run, "one run")
    _benchmark_options(run)
    run.add_argument("--method", default="classp", metavar="METHOD", help="default: classp")
    run.add_argument("--seed", type=_natural, default=0, metavar="S", help="default: 0")
    _run_options(run, "KEY=VALUE")

    search = _command(commands, "search", _search, "settings, the same budget for every method")
    _benchmark_options(search)
    search.add_argument(
        "--methods", nargs="+", default=list(DEFAULT_METHODS), metavar="METHOD", help="default: all"
    )
    search.add_argument(
        "--trials",
        type=_positive,
        default=30,
        metavar="N",
        help="trials for each method (default: 30)",
    )
    search.add_argument(
        "--tuning-seeds",
        type=_positive,
        default=2,
        metavar="N",
        help="seeds that each trial is run with (default: 2)",
    )
    search.add_argument(
        "--train-share",
        type=float,
        default=1.0,
        metavar="X",
        help="train on this share of the training data (default: 1.0)",
    )
    search.add_argument(
        "--jobs", type=_positive, metavar="N", help="methods at a time (default: one per core)"
    )
    search.add_argument(
        "--adopt",
        action="store_true",
        help="make the result this checkout's default settings (experiments/settings.json)",
    )

    report = _command(commands, "report", _report, "tables and figures again, from result files")
    report.add_argument("folder", type=Path, help="a folder that compare or run has written")

    _command(commands, "list", _list, "benchmarks, scenarios and methods, each with one line")
    return parser


def _command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(function=function)
    return parser


def _benchmark_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--benchmark",
        default="split-digits",
        metavar="NAME",
        help="default: split-digits, which needs no download",
    )
    parser.add_argument("--scenario", default="class", metavar="NAME", help="default: class")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where results go (default: results/BENCHMARK-SCENARIO)",
    )
    parser.add_argument(
        "--data-root",
        type=Path,
        metavar="FOLDER",
        help="where datasets lie or are downloaded to (default: ~/.avalanche/data)",
    )


def _run_options(parser: argparse.ArgumentParser, form: str) -> None:
    parser.add_argument("--epochs", type=_positive, metavar="N", help="default: as searched")
    parser.add_argument("--batch-size", type=_positive, metavar="N", help="default: as searched")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar=form,
        dest="overrides",
        help="a hyper-parameter; may be repeated",
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")


def _positive(text: str) -> int:
    return _whole(text, 1)


def _natural(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text}")
    return int(text)


def _compare(options: argparse.Namespace) -> int:
    from experiments.compare import run_all
    from experiments.methods import count_steps
    from experiments.report import write_report
    from experiments.resultfiles import Results

    methods = list(dict.fromkeys(options.methods))
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
    )
    finished = results.finished(configs)
    if finished:
        print(write_report(finished, results.folder, failures))
        print(f"\ntable.md, table.csv, accuracy.png and runs/ are in {results.folder}")
    if failures:
        reasons = "; ".join(sorted({failure["error"] for failure in failures}))
        print(f"error: {len(failures)} of {len(configs)} runs failed: {reasons}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> int:
    overrides = dict(_split_override(text, "KEY=VALUE") for text in options.overrides)
    config = _config(options, options.method, options.seed, overrides)
    from tqdm import tqdm

    from experiments.compare import attempt
    from experiments.methods import count_steps
    from experiments.report import plain_table, table_rows
    from experiments.resultfiles import Results

    warnings.simplefilter("ignore")
    with tqdm(total=count_steps(config), unit="exp", desc=config.method, delay=1) as bar:
        result = attempt(config, options.data_root, bar.update)
    path = Results(_output(options)).save(result | {"command": options.command_line})
    if "error" in result:
        print(f"error: {result['error']} (recorded in {path})", file=sys.stderr)
        return 1
    print(plain_table(table_rows([result])))
    print(f"\nresult file: {path}")
    return 0


def _search(options: argparse.Namespace) -> int:
    from experiments.config import SETTINGS_FILE
    from experiments.processes import available_cores
    from experiments.resultfiles import write_atomically
    from experiments.search import search

    spec = _benchmark(options)
    settings = search(
        options.benchmark,
        options.scenario,
        [_known("method", name) for name in dict.fromkeys(options.methods)],
        _output(options) / "search",
        options.trials,
        options.tuning_seeds,
        spec.epochs_choices,
        spec.batch_size,
        options.data_root,
        options.train_share,
        options.jobs or available_cores(),
    )
    for method, setting in settings.items():
        print(method, json.dumps(setting.as_dict()))
    if options.adopt:
        chosen = json.loads(SETTINGS_FILE.read_text(encoding="utf-8"))
        place = chosen.setdefault(f"{options.benchmark}/{options.scenario}", {})
        place.update({method: setting.as_dict() for method, setting in settings.items()})
        write_atomically(SETTINGS_FILE, json.dumps(chosen, indent=1, sort_keys=True) + "\n")
    return 0


def _report(options: argparse.Namespace) -> int:
    from experiments.report import write_report
    from experiments.resultfiles import Results

    finished: dict[tuple[str, str], list[Any]] = defaultdict(list)
    failed: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for result in Results(options.folder).load():
        group = (result["config"]["benchmark"], result["config"]["scenario"])
        (failed if "error" in result else finished)[group].append(result)
    if not finished:
        raise UserError(f"there are no finished runs in {options.folder / 'runs'}")
    for group, results in finished.items():
        folder = options.folder
        if len(finished) > 1:
            folder /= "-".join(group)
        print(write_report(results, folder, failed[group]))
        print(f"\nwritten to {folder}\n")
    return 0


def _list(options: argparse.Namespace) -> int:
    from experiments.benchmarks import BENCHMARKS, SCENARIOS
    from experiments.methods import METHODS

    for title, entries in (
        ("benchmarks", {name: spec.description for name, spec in BENCHMARKS.items()}),
        ("scenarios", SCENARIOS),
        ("methods", {name: method.description for name, method in METHODS.items()}),
    ):
        print(f"{title}:")
        for name, text in entries.items():
            print(f"  {name:14}{text}")
    for name, method in METHODS.items():
        print(f"hyper-parameters of {name}: {', '.join(method.defaults)}")
    return 0


def _split_override(text: str, form: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: write {form}")
    return key, value


def _config(
    options: argparse.Namespace, method: str, seed: int, overrides: dict[str, str]
) -> RunConfig:
    from experiments.config import Setting, parse_value
    from experiments.methods import METHODS, make_config, require_known
    from experiments.run import find_device

    spec = _benchmark(options)
    find_device(options.device)
    known = METHODS[_known("method", method)].defaults
    require_known(method, overrides)
    return make_config(
        options.benchmark,
        options.scenario,
        method,
        seed,
        Setting(spec.epochs, spec.batch_size, {}),
        {key: parse_value(text, known[key], key) for key, text in overrides.items()},
        device=options.device,
        **{
            key: value
            for key, value in (("epochs", options.epochs), ("batch_size", options.batch_size))
            if value is not None
        },
    )


def _benchmark(options: argparse.Namespace) -> Benchmark:
    from experiments.benchmarks import BENCHMARKS

    _known("scenario", options.scenario)
    return BENCHMARKS[_known("benchmark", options.benchmark)]


def _known(kind: str, name: str) -> str:
    from experiments.benchmarks import BENCHMARKS, SCENARIOS
    from experiments.methods import METHODS

    groups: dict[str, Mapping[str, Any]] = {
        "benchmark": BENCHMARKS,
        "scenario": SCENARIOS,
        "method": METHODS,
    }
    names = groups[kind]
    if name not in names:
        raise UserError(f"unknown {kind} {name!r}; choose from {', '.join(names)}")
    return name


def _output(options: argparse.Namespace) -> Path:
    return options.output or Path("results") / f"{options.benchmark}-{options.scenario}"
