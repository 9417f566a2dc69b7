"""The commands of ``python -m experiments``. The heavy imports wait until one needs them.

A command is a dataclass: its fields are the options, of the command line and of config files
alike, and their docstrings the help. tyro (MIT) reads them. It was chosen over jsonargparse because
that has no plain ``--methods a b`` for a field and tells a wrong value in six lines; both are
alive, and imported in less than 0.1 s. To tell each mistake in one line takes tyro's parse events,
which are private: hence its exact version in pyproject.toml.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import io
import operator
import os
import shlex
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from tyro import _errors as events
from tyro.conf import Positional, UseAppendAction, arg, subcommand
from tyro.constructors import PrimitiveConstructorSpec

from .configfile import read_words, without_config
from .errors import INSTALL, UserError, nearest, print_error, print_interrupted
from .protocol.benchmarks import BENCHMARKS, SCENARIOS, Benchmark, require_possible
from .protocol.config import (
    Epochs,
    RunConfig,
    format_value,
    parse_epochs,
    parse_value,
    parse_whole,
)
from .protocol.loading import load_files
from .protocol.losses import LOSSES, USUAL_LOSS
from .protocol.methods import METHODS, count_steps, why_not
from .protocol.models import MODELS, require_model
from .protocol.pretrained import PRETRAINED
from .protocol.tuned_settings import (
    FIRST_EXPERIENCE,
    STREAM,
    explain,
    find_setting,
    make_config,
    require_known,
    require_settings,
    unchecked_config,
)

PROGRAM = "classp" if Path(sys.argv[0]).stem == "classp" else f"python -m {__package__}"
MOST_SEEDS = 10_000
"""More is a slip, and the list of runs would not fit in memory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 for failed runs, 2 for what the user can mend.

    Args:
        arguments: the command line without the program. Default: ``sys.argv[1:]``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an encoding may lack ± or a folder's name
            stream.reconfigure(errors="backslashreplace")
    # Avalanche imports a package of solvers that nothing here uses. Worker processes import it
    # before any code of ours could tell them.
    warnings.filterwarnings("ignore", message="no QP solver found")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    resumable = True
    try:
        if words == ["--version"]:
            from avalanche_classp import __version__

            print(f"avalanche-classp {__version__}")
            return 0
        command, words = parse(words)
        resumable = command.resumable
        load_files(command.load)
        code = command.run(shlex.join([*PROGRAM.split(), *words]))
        sys.stdout.flush()
        return code
    except ModuleNotFoundError as error:
        print_error(f"{error}; {INSTALL} brings it")
    except UserError as error:
        print_error(str(error))
    except OSError as error:  # a full disk, a closed pipe
        if not isinstance(error, BrokenPipeError):  # `| head` has seen enough
            print_error(str(error))
        _drop_output_that_nobody_takes()
    except KeyboardInterrupt:
        print_interrupted(resumable)
        return 130
    return 2


def _drop_output_that_nobody_takes() -> None:
    """Python would write it again at its end, and fail with lines of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Kinds of options


def _words(parse: Callable[[list[str]], Any], metavar: str, count: Any = 1) -> Any:
    return PrimitiveConstructorSpec(
        nargs=count,
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [format_value(value)],
    )


def _one(parse: Callable[[str], Any], metavar: str) -> Any:
    return _words(lambda words: parse(words[0]), metavar)


def _several(parse: Callable[[str], Any], metavar: str) -> Any:
    def read(words: list[str]) -> tuple[Any, ...]:
        if not words:
            raise ValueError("needs a value")
        return tuple(map(parse, words))

    return _words(read, f"{metavar} [{metavar} ...]", "*")


def _path(text: str) -> Path:
    if "\0" in text:  # a config file can say it
        raise ValueError(f"must be a path, got {text!r}")
    return Path(text)


def _default(text: str) -> Any:
    """Tell of a default that the value does not tell."""
    return arg(help_behavior_hint=f"(default: {text})")


_seed_count = functools.partial(parse_whole, most=MOST_SEEDS)
_natural = functools.partial(parse_whole, least=0)

Name = Annotated[str, _one(str, "NAME")]
Count = Annotated[int, _one(parse_whole, "N")]
Natural = Annotated[int, _one(_natural, "N")]
Seeds = Annotated[int, _one(_seed_count, "N")]
Device = Annotated[str, _one(str, "DEVICE")]
File = Annotated[Path, _one(_path, "FILE")]
Folder = Annotated[Path, _one(_path, "FOLDER")]
Folders = Annotated[tuple[Path, ...], _several(_path, "FOLDER")]
Methods = Annotated[tuple[str, ...], _several(str, "METHOD")]
AllMethods = Annotated[Methods, _default("the usual ones, as `list` shows")]
Jobs = Annotated[int | None, _one(parse_whole, "N"), _default("as many as cores")]
Output = Annotated[Path | None, _one(_path, "FOLDER"), _default("results/BENCHMARK-SCENARIO")]
DataRoot = Annotated[Path | None, _one(_path, "FOLDER"), _default("~/.avalanche/data")]
Settings = Annotated[
    str | None, _one(str, "WAY"), _default("searched values where there are any, else defaults")
]
_as_searched = _default("as searched, else the benchmark's")


# What commands have in common


@dataclass(kw_only=True)
class Command:
    """A command."""

    resumable: ClassVar[bool] = True
    """The same command goes on after an interruption."""
    load: Annotated[tuple[File, ...], UseAppendAction, arg(metavar="FILE.py")] = ()
    """a file that declares benchmarks, models and methods of your own"""

    def run(self, command_line: str) -> int:
        """Do it and return the exit code."""
        raise NotImplementedError


def _refuse_file(folder: Path) -> None:
    """Raise UserError if results cannot go to a folder, because it or one above it is a file."""
    try:
        there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    except OSError as error:  # a name that is too long
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    if there.exists() and not there.is_dir():
        raise UserError(f"cannot write {folder}: {there} is a file; name another folder")


@dataclass(kw_only=True)
class _OnStream(Command):
    benchmark: Name = "split-digits"
    """split-digits needs no download"""
    scenario: Annotated[
        str | None, _one(str, "NAME"), _default("class, or the benchmark's only one")
    ] = None
    """task, domain or class"""
    model: Annotated[str | None, _one(str, "NAME"), _default("the benchmark's usual one")] = None
    """the model"""
    experiences: Annotated[
        int | None, _one(parse_whole, "N"), _default("the benchmark's usual number")
    ] = None
    """number of experiences"""
    loss: Annotated[str | None, _one(str, "NAME"), _default(USUAL_LOSS)] = None
    """what networks are trained with"""
    device: Device = "cpu"
    """torch device"""
    output: Output = None
    """where results go"""
    data_root: DataRoot = None
    """where datasets lie or are downloaded to"""
    config: Annotated[Path | None, _one(_path, "FILE"), _default("none")] = None
    """a TOML file that holds these options; what is typed is above it"""

    def check_stream(self) -> tuple[Benchmark, str]:
        """Return the benchmark and the scenario.

        Raises:
            UserError: a name is unknown, or they do not go together.
        """
        spec = BENCHMARKS[_known("benchmark", self.benchmark, BENCHMARKS)]
        scenario = _known("scenario", self.scenario or spec.scenarios[0], SCENARIOS)
        if self.model is not None:
            require_model(self.model)
        if self.loss is not None:
            _known("loss", self.loss, LOSSES)
        require_possible(self.benchmark, scenario, self.experiences or spec.experiences)
        _refuse_file(self.folder)
        return spec, scenario

    @property
    def folder(self) -> Path:
        """Where results go."""
        scenario = self.scenario or BENCHMARKS[self.benchmark].scenarios[0]
        return self.output or Path("results") / f"{self.benchmark}-{scenario}"

    def given(self, *names: str) -> dict[str, Any]:
        """Return the options of these names that were given."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(kw_only=True)
class _Training(_OnStream):
    epochs: Annotated[Epochs | None, _one(parse_epochs, "N[,N...]"), _as_searched] = None
    """of each experience, the last number for all that follow"""
    batch_size: Annotated[int | None, _one(parse_whole, "N"), _as_searched] = None
    """training mini-batch size"""
    settings: Settings = None
    """how values are chosen: defaults, first-experience, transfer or oracle, as docs/protocol.md
    explains, or a search's folder or settings file; what is given with other options is above it"""
    tensorboard: bool = True
    """write a log directory for each run, for `tensorboard --logdir FOLDER/tensorboard`"""
    dry_run: bool = False
    """say what would be run, with which values, and stop"""

    def configs(
        self, methods: Sequence[str], overrides: Mapping[str, Mapping[str, str]], local: bool
    ) -> list[RunConfig]:
        """Return the config of each method with seed 0.

        Args:
            methods: their names.
            overrides: by method, the values of hyper-parameters as they were typed.
            local: the device is this machine's.

        Raises:
            UserError: something is unknown, wrong, or cannot be used here.
        """
        _, scenario = self.check_stream()
        hyper = {method: _values(method, overrides.get(method, {})) for method in methods}
        if local:
            from .running.run import find_device

            find_device(self.device)
        fixed = self.given("device", "model", "experiences", "epochs", "batch_size", "loss")
        fixed["settings"] = self.settings
        stream = self.given("model", "loss")
        require_settings(self.settings, self.benchmark, scenario, methods, **stream)
        return [
            make_config(self.benchmark, scenario, method, 0, hyper[method], **fixed)
            for method in methods
        ]


def _print_settings(configs: Sequence[RunConfig]) -> None:
    """Print each method's values with where they come from."""
    print("settings:")
    by_method = {config.method: config for config in configs}
    width = max(map(len, by_method))
    for method, config in by_method.items():
        print(f"  {method:{width}}  {_explained(config)}")
    sys.stdout.flush()


def _print_plan(configs: Sequence[RunConfig], folder: Path) -> None:
    """Say how many runs there are to do."""
    from .running.records import Results

    count = f"{len(configs)} run{'s' * (len(configs) > 1)}"
    done = len(Results(folder).finished(configs))
    print(f"{count}, {done} of them finished in {folder}; nothing was run")


def _explained(config: RunConfig) -> str:
    values = {**config.hyper, "epochs": config.epochs, "batch_size": config.batch_size}
    return explain(values, config.sources)


def _known(kind: str, name: str, names: Mapping[str, Any]) -> str:
    if name not in names:
        raise UserError(f"unknown {kind} {name!r}; {nearest(name, names)}")
    return name


def _known_methods(
    names: Sequence[str], scenario: str | None = None, loss: str | None = None
) -> list[str]:
    """Return the names once each; without any, the usual ones that can be run so."""
    usual = [
        name
        for name, method in METHODS.items()
        if method.usual and not (scenario and why_not(name, scenario, loss or USUAL_LOSS))
    ]
    return [_known("method", name, METHODS) for name in dict.fromkeys(names or usual)]


def _split_override(text: str, form: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: write {form}")
    return key, value


def _overrides(texts: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return by method what ``--set KEY=VALUE`` (for all) and ``METHOD.KEY=VALUE`` say."""
    overrides: dict[str, dict[str, str]] = defaultdict(dict)
    for text in sorted(texts, key=lambda text: "." in text.partition("=")[0]):  # of one: above
        place, value = _split_override(text, "METHOD.KEY=VALUE, or KEY=VALUE for all methods")
        method, dot, key = place.rpartition(".")
        if not dot:
            lacking = [method for method in methods if key not in METHODS[method].defaults]
            if lacking:
                raise UserError(
                    f"--set {text}: {', '.join(lacking)} {'have' if lacking[1:] else 'has'} no "
                    f"{key}; write METHOD.KEY=VALUE for each of the others"
                )
        elif method not in methods:
            raise UserError(
                f"--set {text}: {method!r} is none of the methods compared; write METHOD.KEY=VALUE"
            )
        for one in [method] if dot else methods:
            overrides[one][key] = value
    return overrides


def _values(method: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Return a method's hyper-parameters as numbers.

    Raises:
        UserError: it has none of such a name, or a value is wrong.
    """
    require_known(method, texts)
    known = METHODS[method].defaults
    return {key: parse_value(text, known[key], key) for key, text in texts.items()}


# The commands


@dataclass(kw_only=True)
class Compare(_Training):
    """Run every method with every seed, in parallel processes, and write a table and figures.

    Finished runs are skipped, so the same command goes on after an interruption; a run that fails
    is recorded and tried again next time.

    python -m experiments compare --methods classp ewc --set classp.lr=0.01 --seeds 5
    """

    methods: AllMethods = ()
    """the methods"""
    seeds: Seeds = 3
    """seeds 0 to N-1 for each method"""
    set: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="[METHOD.]KEY=VALUE")] = ()
    """a hyper-parameter, without METHOD for all of them"""
    jobs: Jobs = None
    """runs at a time"""
    engine: Literal["local", "ray"] = "local"
    """run in processes of this machine, or on a Ray cluster"""
    ray_address: Annotated[
        str | None, _one(str, "HOST:PORT"), _default("RAY_ADDRESS, else Ray is started here")
    ] = None
    """address of the cluster"""

    def known_methods(self, scenario: str) -> list[str]:
        """Return the methods that were named, else the usual ones that were tuned alike.

        Those are the ones that ``settings`` has; without it, where any were searched, these.
        """
        methods = _known_methods(self.methods, scenario, self.loss)
        if self.methods:
            return methods
        stream = (self.benchmark, scenario)
        alike = []
        for method in methods:
            found = find_setting(self.settings, *stream, method, **self.given("model", "loss"))
            if found and (self.settings or found[1].kind in ("searched", "transferred")):
                alike.append(method)
        left_out = [method for method in methods if method not in alike]
        if not alike or not left_out:
            return methods
        print(
            f"left out: {', '.join(left_out)}; nothing was searched for them (--methods names "
            f"them, --settings defaults runs all untuned)"
        )
        return alike

    def run(self, command_line: str) -> int:
        _, scenario = self.check_stream()
        methods = self.known_methods(scenario)
        overrides = _overrides(self.set, methods)
        from .reporting.report import require_no_foreign, write_report

        # A cluster may have a device that is not here.
        first = self.configs(methods, overrides, local=self.engine == "local")
        configs = [
            dataclasses.replace(config, seed=seed) for seed in range(self.seeds) for config in first
        ]
        require_no_foreign(self.folder)
        _print_settings(first)
        if self.dry_run:
            _print_plan(configs, self.folder)
            return 0
        from .running.compare import run_all
        from .running.records import Results

        results = Results(self.folder)
        failures = run_all(
            configs,
            results,
            self.data_root,
            self.jobs,
            count_steps,
            command_line,
            self.engine,
            self.ray_address,
            self.tensorboard,
        )
        finished = list(results.finished(configs).values())
        if finished:
            print(write_report(finished, self.folder, failures))
            print(f"\nreport.html, table.md, table.csv and the figures are in {self.folder}")
            if self.tensorboard:
                print(f"to watch them: tensorboard --logdir {self.folder / 'tensorboard'}")
        if failures:
            reasons = "; ".join(sorted({failure["error"] for failure in failures}))
            print_error(f"{len(failures)} of {len(configs)} runs failed: {reasons}")
            return 1
        return 0


@dataclass(kw_only=True)
class Run(_Training):
    """Train and evaluate one method with one seed, and record it.

    python -m experiments run --method ewc --seed 3
    """

    method: Name = "classp"
    """the method"""
    seed: Natural = 0
    """seeds model, data order and benchmark"""
    set: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="KEY=VALUE")] = ()
    """a hyper-parameter"""

    def run(self, command_line: str) -> int:
        method = _known("method", self.method, METHODS)
        overrides = dict(_split_override(text, "KEY=VALUE") for text in self.set)
        (config,) = self.configs([method], {method: overrides}, local=True)
        config = dataclasses.replace(config, seed=self.seed)
        _print_settings([config])
        if self.dry_run:
            _print_plan([config], self.folder)
            return 0
        from tqdm import tqdm

        from .reporting.tables import plain_table, table_rows
        from .running.compare import attempt
        from .running.records import Results, current_commit

        warnings.simplefilter("ignore")
        results = Results(self.folder)
        logs = results.logs if self.tensorboard else None
        with tqdm(total=count_steps(config), unit="exp", desc=method, delay=1) as bar:
            result = attempt(config, self.data_root, bar.update, logs)
        path = results.save(result | {"command": command_line, "commit": current_commit()})
        if "error" in result:
            print_error(f"{result['error']} (recorded in {path})")
            return 1
        print(plain_table(table_rows([result])))
        print(f"\nrecorded in {path}")
        if logs:
            print(f"to watch it: tensorboard --logdir {logs(config)}")
        return 0


@dataclass(kw_only=True)
class Search(_OnStream):
    """Choose every method's settings on validation data, with the same budget for each.

    Epochs and hyper-parameters are chosen on data cut from the training data. The same command
    goes on after an interruption.

    python -m experiments search --scenario domain --trials 60 --methods classp ewc
    """

    methods: AllMethods = ()
    """the methods"""
    trials: Count = 30
    """trials for each method"""
    tuning_seeds: Count = 2
    """seeds that each trial is run with"""
    finalists: Natural = 0
    """run the best N trials of each method with more seeds, and choose the best mean over all of
    them; with --train-share over these alone, which have all data"""
    finalist_seeds: Count = 3
    """with so many more"""
    train_share: float = 1.0
    """train on this share of the training data"""
    batch_size: Annotated[int | None, _one(parse_whole, "N"), _default("the benchmark's")] = None
    """of every trial"""
    epochs_choices: Annotated[
        tuple[int, ...], _several(parse_whole, "N"), _default("the benchmark's usual ones")
    ] = ()
    """what every method chooses its epochs from"""
    set: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="METHOD.KEY=VALUE")] = ()
    """a hyper-parameter that is not searched"""
    jobs: Jobs = None
    """methods at a time"""
    on: Literal["stream", "first-experience"] = "stream"
    """what a trial sees: the whole stream, or the first experience alone, on which it is trained
    and measured"""
    dry_run: bool = False
    """say what would be run, and stop"""
    adopt: bool = False
    """make the result this checkout's settings, for --settings oracle or first-experience"""

    def run(self, command_line: str) -> int:
        spec, scenario = self.check_stream()
        methods = _known_methods(self.methods, scenario, self.loss)
        held = _overrides(self.set, methods)
        from .protocol.tuned_settings import adopted
        from .running.files import write_atomically
        from .running.processes import available_cores
        from .running.run import find_device
        from .tuning.search import rank, search

        find_device(self.device)
        # A journal says what its trials were run with, and one of CPU runs names no device.
        device = {} if self.device == "cpu" else {"device": self.device}
        folder = self.folder / ("search" if self.on == STREAM else f"search-{FIRST_EXPERIENCE}")
        if self.dry_run:
            runs = self.trials * self.tuning_seeds + self.finalists * self.finalist_seeds
            more = f" and {self.finalists} finalists × {self.finalist_seeds}" * (self.finalists > 0)
            print(
                f"{', '.join(methods)}: {self.trials} trials × {self.tuning_seeds} seeds{more}, at "
                f"most {len(methods) * runs} runs, in {folder}; nothing was run"
            )
            return 0
        settings = search(
            self.benchmark,
            scenario,
            methods,
            folder,
            self.trials,
            self.tuning_seeds,
            self.epochs_choices or spec.epochs_choices,
            self.batch_size or spec.batch_size,
            self.data_root,
            self.train_share,
            self.jobs or available_cores(),
            self.finalists,
            self.finalist_seeds,
            held={name: _values(name, texts) for name, texts in held.items()},
            on=self.on,
            **self.given("model", "experiences", "loss"),
            **device,
        )
        ranking = rank(settings, folder / "trials.csv")
        print(ranking.to_string(index=False, float_format="%.1f"))
        commands = [["run", "--method", ranking["method"][0]]]
        if len(settings) > 1:
            commands.append(["compare", "--methods", *ranking["method"]])
        stream = self.given("benchmark", "model", "experiences", "loss", "data_root")
        stream |= {"scenario": scenario, "settings": folder, **device}
        words = [f"--{key.replace('_', '-')}={value}" for key, value in stream.items()]
        words += [f"--load={path}" for path in self.load]
        print("to use it:")
        for command in commands:
            print(f"  {shlex.join([*PROGRAM.split(), *command, *words])}")
        if self.adopt:
            write_atomically(*adopted(self.benchmark, scenario, settings, self.model))
        return 0


@dataclass(kw_only=True)
class Report(Command):
    """Write the tables and figures of a folder's records again.

    python -m experiments report results/split-digits-class
    """

    folder: Positional[Folder]
    """what compare or run has written"""

    def run(self, command_line: str) -> int:
        from .reporting.report import write_report
        from .running.records import Results

        finished: dict[tuple[str, str], list[Any]] = defaultdict(list)
        failed: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for result in Results(self.folder).load():
            group = (result["config"]["benchmark"], result["config"]["scenario"])
            (failed if "error" in result else finished)[group].append(result)
        if not finished:
            raise UserError(f"there are no finished runs in {self.folder}")
        for group, results in finished.items():
            folder = self.folder
            if len(finished) > 1:
                folder /= "-".join(group)
            print(write_report(results, folder, failed[group]))
            print(f"\nwritten to {folder}\n")
        return 0


@dataclass(kw_only=True)
class List(Command):
    """Name the benchmarks, scenarios, methods, losses and models, and the values that runs use."""

    benchmark: Name = "split-digits"
    """the benchmark that the values are for"""
    scenario: Annotated[
        str | None, _one(str, "NAME"), _default("class, or the benchmark's only one")
    ] = None
    """task, domain or class"""
    settings: Settings = None
    """how values are chosen, as for run"""

    def run(self, command_line: str) -> int:
        spec = BENCHMARKS[_known("benchmark", self.benchmark, BENCHMARKS)]
        scenario = _known("scenario", self.scenario or spec.scenarios[0], SCENARIOS)
        require_possible(self.benchmark, scenario, spec.experiences)
        values = {name: self._values_of(name, scenario) for name in METHODS}
        registries: dict[str, Mapping[str, Any]] = {
            "benchmarks": BENCHMARKS,
            "scenarios": SCENARIOS,
            f"methods, with what `run` uses on {self.benchmark} {scenario}": METHODS,
            "losses": LOSSES,
            "models": MODELS,
            "pretrained networks, NAME@PIXELS for another size": PRETRAINED,
        }
        width = max(len(name) for entries in registries.values() for name in entries)
        for kind, entries in registries.items():
            print(f"{kind}:")
            for name, entry in entries.items():
                lines = [entry if isinstance(entry, str) else entry.description]
                if entries is BENCHMARKS:
                    lines.append(f"model {entry.model}; scenarios {', '.join(entry.scenarios)}")
                elif entries is METHODS:
                    only = set(entry.scenarios) != set(SCENARIOS)
                    scenarios = f"; scenario {', '.join(entry.scenarios)}" if only else ""
                    lines += [entry.family + scenarios, values[name]]
                for label, line in zip((name, "", ""), lines, strict=False):
                    print(f"  {label:{width}}  {line}")
        return 0

    def _values_of(self, method: str, scenario: str) -> str:
        if reason := why_not(method, scenario):
            return reason
        if find_setting(self.settings, self.benchmark, scenario, method) is None:
            return f"nothing for --settings {self.settings}"
        return _explained(
            unchecked_config(self.benchmark, scenario, method, settings=self.settings)
        )


@dataclass(kw_only=True)
class Sensitivity(Command):
    """Vary every hyper-parameter that the search chose, with the final seeds and on test data."""

    benchmark: Name = "split-mnist"
    """the benchmark"""
    scenario: Name = "class"
    """task, domain or class"""
    methods: Methods = ("classp", "classp-matrix")
    """the methods"""
    seeds: Seeds = 5
    """seeds 0 to N-1"""
    jobs: Jobs = None
    """runs at a time"""
    output: Annotated[
        Path | None, _one(_path, "FOLDER"), _default("results/sensitivity-BENCHMARK-SCENARIO")
    ] = None
    """where results go"""
    data_root: DataRoot = None
    """where datasets lie or are downloaded to"""

    def run(self, command_line: str) -> int:
        _known("benchmark", self.benchmark, BENCHMARKS)
        _known("scenario", self.scenario, SCENARIOS)
        methods = _known_methods(self.methods)
        from .tuning.sensitivity import write_sensitivity

        options = {**vars(self), "methods": methods, "command": command_line}
        print(write_sensitivity(**options))
        return 0


@dataclass(kw_only=True)
class Defaults(Command):
    """Search one setting of CLASSP on parts of five benchmarks: the library's defaults."""

    trials: Count = 40
    """their number in all"""
    first: Annotated[
        tuple[tuple[float, float, float], ...],
        UseAppendAction,
        arg(name="try", metavar="LR EPSILON POWER"),
    ] = ()
    """what a new search tries first, with threshold 0"""
    output: Folder = Path("results/defaults")
    """keeps the trials"""
    data_root: DataRoot = None
    """where datasets lie or are downloaded to"""

    def run(self, command_line: str) -> int:
        from .tuning.defaults import search_defaults

        print(search_defaults(**vars(self)))
        return 0


@dataclass(kw_only=True)
class SubsetRanking(Command):
    """Tell whether a part of the training data ranks settings as all of it does.

    The trials of a search with --train-share below 1 are run again with all training data.
    """

    folder: Positional[Folder]
    """where the journals of the search are"""
    methods: Methods
    """the methods"""
    jobs: Jobs = None
    """runs at a time"""
    data_root: DataRoot = None
    """where datasets lie or are downloaded to"""

    def run(self, command_line: str) -> int:
        from .tuning.subset_ranking import rank_subset

        print(rank_subset(**vars(self)))
        return 0


@dataclass(kw_only=True)
class SideBySide(Command):
    """Print one table of several comparisons: accuracy, and difference from classp-matrix."""

    folders: Positional[Folders]
    """what compare has written"""

    def run(self, command_line: str) -> int:
        from .reporting.side_by_side import side_by_side

        print("\n\n".join(side_by_side(self.folders)))
        return 0


@dataclass(kw_only=True)
class Language(Command):
    """Tune a small language model on four kinds of text in turn, and measure what it forgets.

    Every method's values are searched first. The texts lie where Python and its packages lie.

    python -m experiments language --seeds 3
    """

    methods: Annotated[Methods, _default("adamw sgd classp classp-inputs")] = ()
    """the methods"""
    seeds: Seeds = 3
    """seeds 0 to N-1 for each method"""
    trials: Count = 6
    """trials of each method's search"""
    output: Folder = Path("results/language")
    """where results go"""

    def run(self, command_line: str) -> int:
        _refuse_file(self.output)
        for package in ("transformers", "peft"):
            if not importlib.util.find_spec(package):
                raise UserError(f"this needs {package}; pip install '.[examples]' brings it")
        from .language.study import METHODS as KNOWN
        from .language.study import study

        methods = [_known("method", name, KNOWN) for name in dict.fromkeys(self.methods or KNOWN)]
        warnings.simplefilter("ignore")
        print(study(self.output, methods, self.seeds, self.trials))
        return 0


@dataclass(kw_only=True)
class Speed(Command):
    """Measure steps, loading, metrics and long streams.

    python -m experiments speed step
    """

    resumable: ClassVar[bool] = False

    cases: Positional[Annotated[tuple[str, ...], _words(tuple, "[CASE ...]", "*")]] = ()
    """what to measure; default: all"""
    pairs: Count = 5
    """pairs of runs"""
    rounds: Count = 40
    """turns of each contender in step and directions"""
    threads: Count = 1
    """torch's"""
    device: Device = "cpu"
    """of step and directions; the other cases use the CPU"""
    quick: bool = False
    """one pair, and short streams"""
    data_root: DataRoot = None
    """where datasets lie or are downloaded to"""
    output: Annotated[Path | None, _one(_path, "FOLDER"), _default("none")] = None
    """for the figure of growth"""

    def run(self, command_line: str) -> int:
        from .speed.cases import measure_speed

        measure_speed(**{name: value for name, value in vars(self).items() if name != "load"})
        return 0


COMMANDS: dict[str, type[Command]] = {
    "compare": Compare,
    "run": Run,
    "search": Search,
    "report": Report,
    "list": List,
    "sensitivity": Sensitivity,
    "defaults": Defaults,
    "subset-ranking": SubsetRanking,
    "side-by-side": SideBySide,
    "language": Language,
    "speed": Speed,
}
for _command in COMMANDS.values():  # their help has examples
    _command.__doc__ = (_command.__doc__ or "").replace("python -m experiments", PROGRAM)


# Reading a command line


def parse(words: Sequence[str]) -> tuple[Command, list[str]]:
    """Return the command, and the words that say it without ``--config``.

    Raises:
        UserError: a word is wrong, or the config file is.
    """
    command = _parse(words)
    path = getattr(command, "config", None)
    if path is None:
        return command, list(words)
    from_file = read_words(path, type(command))
    _parse([words[0], *from_file])  # what is typed may hide something wrong
    whole = [words[0], *from_file, *without_config(words[1:])]
    return _parse(whole), whole


def _parse(words: Sequence[str]) -> Command:
    kind: Any
    if words and words[0] in COMMANDS:
        kind, program, rest = COMMANDS[words[0]], f"{PROGRAM} {words[0]}", words[1:]
    else:
        kinds = [Annotated[kind, subcommand(name)] for name, kind in COMMANDS.items()]
        kind, program, rest = functools.reduce(operator.or_, kinds), PROGRAM, words
    about = (
        "Compare continual-learning methods on Avalanche's benchmarks: the same stream, model and "
        "protocol for all."
    )
    description = about if program == PROGRAM else None
    with events.on_parse_error(functools.partial(_refuse, words)):
        return tyro.cli(kind, prog=program, description=description, args=list(rest))


def _refuse(words: Sequence[str], event: events.ParseErrorEvent) -> None:
    """Raise the error of one line for an event of tyro's."""
    name = words[0] if words and words[0] in COMMANDS else None
    message = ""
    if isinstance(event, events.InstantiationFailure):
        option = event.argument.display_name() if event.argument else ""
        message = f"{option} {event.message}".strip()
    elif isinstance(event, events.BadValue):
        message = f"{event.argument.display_name()} needs a value"
    elif isinstance(event, events.InvalidChoice):
        choices = " or ".join(event.choices)
        message = f"{event.argument.display_name()} must be {choices}, got {event.value!r}"
    elif isinstance(event, events.MissingArgs):
        missing = [found.arg.display_name() for found in event.missing_arguments]
        message = f"{', '.join(missing)} must be given"
    elif name is None:
        word = next(iter(words), None)
        known = nearest(word or "", COMMANDS)
        message = "name a command" if word is None else f"unknown command {word!r}"
        message += f"; {known}"
    elif isinstance(event, events.UnrecognizedArgs):
        word = event.tokens[0]
        fields = dataclasses.fields(COMMANDS[name])
        options = [f"--{field.name.replace('_', '-')}" for field in fields]
        message = f"unknown option {word!r}; {nearest(word, options)}"
    if message:
        usage = f"`{' '.join([PROGRAM, *([name] if name else []), '--help'])}` explains it"
        raise UserError(f"{message}; {usage}")
