"""The words of the command line: commands, options, their help."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

MOST_SEEDS = 10_000
"""More is a slip, and the list of runs would not fit in memory."""

Command = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """argparse's, with errors of one line, and without its bug with ``--seeds=--``."""

    def error(self, message: str) -> NoReturn:
        super().error(" ".join(message.splitlines()))

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if arg_strings == ["--"]:  # Python 3.11 would make it a list of nothing
            raise argparse.ArgumentError(action, "expected a value, got '--'")
        return super()._get_values(action, arg_strings)


def make_parser(functions: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Make the parser of all commands.

    Args:
        functions: what to do for each command, by name; a parsed command line holds its own as
            ``function``, and the command's parser as ``known``.
    """
    parser = _Parser(
        prog="python -m experiments",
        description="Compare continual-learning methods on Avalanche's benchmarks: the same "
        "stream, model and protocol for all.",
        epilog="`python -m experiments COMMAND --help` explains a command.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    compare = _command(
        commands,
        "compare",
        functions["compare"],
        "methods × seeds on one benchmark, and a table",
        "Run every method with every seed, in parallel processes, and write a table and figures. "
        "Finished runs are skipped, so the same command goes on after an interruption; a run that "
        "fails is recorded and tried again next time.",
        "compare",
        "compare --benchmark split-mnist --scenario task --seeds 5",
        "compare --methods classp ewc --set classp.lr=0.01 --set ewc.ewc_lambda=1000",
    )
    what = _what_to_run(compare)
    what.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="default: all that `list` names up to classp-matrix",
    )
    what.add_argument(
        "--seeds",
        type=seed_count,
        default=3,
        metavar="N",
        help="seeds 0 to N-1 for each method (default: 3)",
    )
    _settings(what, "METHOD.KEY=VALUE")
    where = _where(compare)
    _tensorboard(where)
    add_jobs(where, "runs at a time")
    where.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="run in processes of this machine, or on a Ray cluster (default: local)",
    )
    where.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="HOST:PORT of the cluster (default: the environment variable RAY_ADDRESS; without it "
        "Ray is started on this machine)",
    )

    run = _command(
        commands,
        "run",
        functions["run"],
        "one run",
        "Train and evaluate one method with one seed, and write its result file.",
        "run --method ewc --seed 3",
        "run --set lr=0.01 --set power=2 --epochs 3",
    )
    what = _what_to_run(run)
    what.add_argument("--method", default="classp", metavar="METHOD", help="default: classp")
    what.add_argument("--seed", type=_natural, default=0, metavar="S", help="default: 0")
    _settings(what, "KEY=VALUE")
    _tensorboard(_where(run))

    search = _command(
        commands,
        "search",
        functions["search"],
        "settings, the same budget for every method",
        "Choose every method's epochs and hyper-parameters on validation data cut from the "
        "training data, with the same number of trials for each. The same command goes on after an "
        "interruption.",
        "search --scenario domain --trials 60",
        "search --benchmark split-mnist --train-share 0.2 --methods classp ewc",
    )
    what = _what_to_run(search)
    what.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all")
    what.add_argument(
        "--trials",
        type=positive,
        default=30,
        metavar="N",
        help="trials for each method (default: 30)",
    )
    what.add_argument(
        "--tuning-seeds",
        type=positive,
        default=2,
        metavar="N",
        help="seeds that each trial is run with (default: 2)",
    )
    what.add_argument(
        "--finalists",
        type=_natural,
        default=0,
        metavar="N",
        help="run the best N trials of each method with more seeds, and choose the best mean over "
        "all of them; with --train-share over these alone, which have all data (default: 0)",
    )
    what.add_argument(
        "--finalist-seeds",
        type=positive,
        default=3,
        metavar="N",
        help="with so many more (default: 3)",
    )
    what.add_argument(
        "--train-share",
        type=float,
        default=1.0,
        metavar="X",
        help="train on this share of the training data (default: 1.0)",
    )
    what.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="of every trial (default: the benchmark's usual one)",
    )
    what.add_argument(
        "--epochs-choices",
        type=positive,
        nargs="+",
        metavar="N",
        help="what every method chooses its epochs from (default: the benchmark's usual ones)",
    )
    _device(what)
    where = _where(search)
    add_jobs(where, "methods at a time")
    where.add_argument(
        "--adopt",
        action="store_true",
        help="make the result this checkout's default settings (experiments/settings.json)",
    )

    report = _command(
        commands,
        "report",
        functions["report"],
        "tables and figures again, from result files alone",
        "Read the result files that compare or run has left in a folder, and write its tables and "
        "figures again.",
        "report results/split-digits-class",
    )
    report.add_argument("folder", type=_path, help="a folder that compare or run has written")

    sensitivity = _command(
        commands,
        "sensitivity",
        functions.get("sensitivity"),
        "one hyper-parameter is varied, the others stay as searched",
        "Vary every hyper-parameter that the search chose, with the final seeds and on test data.",
        "sensitivity --benchmark split-mnist --scenario class",
    )
    sensitivity.add_argument("--benchmark", default="split-mnist", metavar="NAME")
    sensitivity.add_argument("--scenario", default="class", metavar="NAME")
    sensitivity.add_argument(
        "--methods", nargs="+", default=["classp", "classp-matrix"], metavar="METHOD"
    )
    sensitivity.add_argument("--seeds", type=seed_count, default=5, metavar="N")
    sensitivity.set_defaults(model=None)

    defaults = _command(
        commands,
        "defaults",
        functions.get("defaults"),
        "one setting of CLASSP for all benchmarks",
        "Search the library's defaults on parts of five benchmarks.",
    )
    defaults.add_argument("--trials", type=positive, default=40, metavar="N")
    defaults.add_argument(
        "--try",
        dest="first",
        nargs=3,
        action="append",
        default=[],
        type=float,
        metavar=("LR", "EPSILON", "POWER"),
        help="what a new search tries first, with threshold 0; may be given several times",
    )

    ranking = _command(
        commands,
        "subset-ranking",
        functions.get("subset-ranking"),
        "whether a part of the training data ranks settings as all of it does",
        "Run the trials of a search with --train-share below 1 again with all training data.",
    )
    ranking.add_argument("folder", type=_path, help="where the journals of the search are")
    ranking.add_argument("--methods", nargs="+", required=True, metavar="METHOD")

    beside = _command(
        commands,
        "side-by-side",
        functions.get("side-by-side"),
        "one number of several comparisons in one table",
        "Print the average accuracy, and its difference from classp-matrix's, of several folders.",
    )
    beside.add_argument("folders", type=_path, nargs="+", metavar="FOLDER")

    speed = _command(
        commands,
        "speed",
        functions.get("speed"),
        "the benchmarks of speed and memory",
        "Measure steps, loading, metrics and long streams.",
        "speed step",
    )
    speed.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    for name, number in (("--pairs", 5), ("--rounds", 40), ("--threads", 1)):
        speed.add_argument(name, type=positive, default=number, metavar="N")
    speed.add_argument("--quick", action="store_true", help="one pair, short streams")
    _device(speed)
    for parser_, default in ((sensitivity, None), (defaults, Path("results/defaults"))):
        parser_.add_argument("--output", type=_path, default=default, metavar="FOLDER")
    speed.add_argument("--output", type=_path, metavar="FOLDER", help="for the figure of growth")
    for parser_ in (sensitivity, ranking):
        add_jobs(parser_, "runs at a time")
    for parser_ in (sensitivity, defaults, ranking, speed):
        parser_.add_argument("--data-root", type=_path, metavar="FOLDER")

    _command(
        commands,
        "list",
        functions["list"],
        "benchmarks, scenarios, methods and models, each with one line",
        "Name the benchmarks, scenarios, methods with their hyper-parameters, and models.",
    )
    return parser


def _command(
    commands: Any, name: str, function: Any, summary: str, description: str, *examples: str
) -> argparse.ArgumentParser:
    lines = "".join(f"\n  python -m experiments {example}" for example in examples)
    parser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 80),
        epilog=f"examples:{lines}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(function=function, known=parser)
    return parser


def _what_to_run(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("what to run")
    group.add_argument(
        "--benchmark",
        default="split-digits",
        metavar="NAME",
        help="default: split-digits, which needs no download",
    )
    group.add_argument(
        "--scenario", metavar="NAME", help="default: class, or the benchmark's only one"
    )
    group.add_argument("--model", metavar="NAME", help="default: the benchmark's usual one")
    group.add_argument(
        "--experiences", type=positive, metavar="N", help="default: the benchmark's usual number"
    )
    return group


def _settings(group: Any, form: str) -> None:
    group.add_argument(
        "--epochs",
        type=_epochs,
        metavar="N[,N...]",
        help="of each experience, the last number for all that follow (default: as searched, else "
        "the benchmark's)",
    )
    group.add_argument("--batch-size", type=positive, metavar="N", help="default: likewise")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar=form,
        dest="overrides",
        help="a hyper-parameter; may be repeated",
    )
    _device(group)


def _where(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("where and how")
    group.add_argument(
        "--output",
        type=_path,
        metavar="FOLDER",
        help="where results go (default: results/BENCHMARK-SCENARIO)",
    )
    group.add_argument(
        "--data-root",
        type=_path,
        metavar="FOLDER",
        help="where datasets lie or are downloaded to (default: ~/.avalanche/data)",
    )
    group.add_argument(
        "--config",
        type=_path,
        metavar="FILE",
        help="a TOML file that holds these options; what is typed is above it",
    )
    return group


def _tensorboard(group: Any) -> None:
    group.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write a log directory for each run, to look at with `tensorboard --logdir "
        "FOLDER/tensorboard` (default: yes)",
    )


def _device(group: Any) -> None:
    group.add_argument("--device", default="cpu", help="torch device (default: cpu)")


def add_jobs(group: Any, what: str) -> None:
    """Add ``--jobs`` to a parser, or to a group of its options.

    Args:
        group: the parser or the group.
        what: what there are so many of at a time.
    """
    group.add_argument(
        "--jobs", type=positive, metavar="N", help=f"{what} (default: as many as cores)"
    )


def _epochs(text: str) -> int | tuple[int, ...]:
    numbers = tuple(positive(number) for number in text.split(","))
    return numbers[0] if len(numbers) == 1 else numbers


def _path(text: str) -> Path:
    if "\0" in text:  # a config file can say it
        raise argparse.ArgumentTypeError(f"must be a path, got {text!r}")
    return Path(text)


def seed_count(text: str) -> int:
    """Read a number of seeds, for argparse."""
    number = positive(text)
    if number > MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_SEEDS}, got {text}")
    return number


def positive(text: str) -> int:
    """Read a whole number of at least 1, for argparse."""
    return _whole(text, 1)


def _natural(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text}")
    return int(text)
