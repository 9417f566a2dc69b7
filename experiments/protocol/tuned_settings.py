"""A method's setting on a stream, and where each of its values comes from.

A setting is chosen in one of four ways, :data:`WAYS`, or read from a file that a search has
written. Where the user names none, it is what the search with the whole stream chose, else a
paper's, else the defaults.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, nearest, one_line
from .benchmarks import BENCHMARKS, require_images, require_possible
from .config import Epochs, Hyper, RunConfig, format_value
from .losses import LOSSES, USUAL_LOSS, make_loss
from .methods import METHODS, why_not
from .models import MODELS, make_model
from .pretrained import is_pretrained

WAYS = {
    "defaults": "the method's defaults, the same for all streams",
    "first-experience": "searched with the first experience's training data alone",
    "transfer": "searched on the partner stream: MNIST's for Fashion-MNIST and back",
    "oracle": "searched with validation data of the whole stream",
}
"""The four ways to choose values."""

STREAM, FIRST_EXPERIENCE = "stream", "first-experience"
"""What a search sees: validation data of the whole stream, or of the first experience alone."""

SETTINGS_FILE = Path(__file__).with_name("tuned_settings.json")
"""What the searches on whole streams chose, by stream and method (see results/README.md)."""

FIRST_EXPERIENCE_FILE = Path(__file__).with_name("first_experience_settings.json")
"""What the searches on first experiences chose."""


@dataclass(frozen=True)
class Setting:
    """Epochs, batch size and hyper-parameters of a method on a stream.

    Attributes:
        epochs: see :class:`RunConfig`.
        batch_size: see :class:`RunConfig`.
        hyper: the hyper-parameters that were chosen; the others keep their defaults.
        searched_on: what the search saw, ``stream`` or ``first-experience``.
    """

    epochs: Epochs
    batch_size: int
    hyper: Hyper = field(default_factory=dict)
    searched_on: str = STREAM

    def __post_init__(self) -> None:
        if self.searched_on not in (STREAM, FIRST_EXPERIENCE):
            raise ValueError(f"searched_on is {self.searched_on!r}")

    def as_dict(self) -> dict[str, Any]:
        """Return the setting as JSON can hold it; it names no ``searched_on`` for a stream."""
        values = asdict(self)
        if self.searched_on == STREAM:
            del values["searched_on"]
        return values


class Source(NamedTuple):
    """Where a value comes from.

    Attributes:
        kind: ``given`` (by the user), ``searched`` (on the whole stream), ``first-experience``,
            ``transferred`` (searched on another stream or with another model), ``published`` (a
            paper's) or ``default``.
        place: what was searched on, as BENCHMARK/SCENARIO or BENCHMARK/SCENARIO/MODEL.
    """

    kind: str
    place: str = ""

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read what ``str`` writes."""
        kind, _, place = text.partition(" ")
        return cls(kind, place)

    def __str__(self) -> str:
        return f"{self.kind} {self.place}".rstrip()

    @property
    def words(self) -> str:
        """The source for people."""
        words = {
            "searched": f"searched on {self.place}",
            "transferred": f"searched on {self.place}",
            "first-experience": f"searched on the first experience of {self.place}",
            "published": "from a paper",
        }
        return words.get(self.kind, self.kind)


Settings = Mapping[str, Mapping[str, Setting]]


@cache
def read_settings(path: Path) -> Settings:
    """Return the settings of a file by stream and method.

    Raises:
        UserError: it cannot be read, or is no file of settings.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = {
            place: {method: Setting(**entry) for method, entry in methods.items()}
            for place, methods in content.items()
        }
        for place, methods in settings.items():
            benchmark, scenario, *model = place.split("/")
            for method, entry in methods.items():
                values = (entry.epochs, entry.batch_size, entry.hyper)
                RunConfig(benchmark, scenario, method, "".join(model), 1, 0, *values)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, UserError) as error:
        ours = path in (SETTINGS_FILE, FIRST_EXPERIENCE_FILE)
        remedy = "restore it with git" if ours else "name a settings.json that a search has written"
        raise UserError(f"{path} cannot be read ({one_line(error)}); {remedy}") from error
    return settings


def place_of(benchmark: str, scenario: str, model: str | None = None) -> str:
    """Return what settings are listed under; the benchmark's own model, or None, is not named."""
    own = model in (None, BENCHMARKS[benchmark].model)
    return f"{benchmark}/{scenario}" if own else f"{benchmark}/{scenario}/{model}"


def searched_setting(
    benchmark: str, scenario: str, method: str, model: str | None = None
) -> Setting | None:
    """Return what the search on the stream chose with this model, or None if there was none."""
    return read_settings(SETTINGS_FILE).get(place_of(benchmark, scenario, model), {}).get(method)


def find_setting(
    way: str | None,
    benchmark: str,
    scenario: str,
    method: str,
    model: str | None = None,
    loss: str = USUAL_LOSS,
) -> tuple[Setting, Source] | None:
    """Return a method's setting on a stream and where it comes from.

    Args:
        way: one of :data:`WAYS`, or the path of a search's folder or settings file. Default: what
            was searched on the stream with this model, else with the benchmark's own, else a
            paper's, else the defaults.
        benchmark: the benchmark's name.
        scenario: the scenario's name.
        method: the method's name.
        model: the model's name. Default: the benchmark's own.
        loss: the loss's name; with another than the usual one only a path has searched values.

    Returns:
        The setting and its source; None where this way has none for the method.

    Raises:
        UserError: the way is unknown, the stream has no partner, or the file cannot be read.
    """
    spec = BENCHMARKS[benchmark]
    default = Setting(spec.epochs, spec.batch_size), Source("default")
    own = place_of(benchmark, scenario, model)
    if way == "defaults" or (way is not None and not METHODS[method].defaults):
        return default
    if way is not None and way not in WAYS:
        return _from_file(way, own, method)
    on = _partner(benchmark) if way == "transfer" else benchmark
    places = [place_of(on, scenario, model)]
    if way is None:
        places.append(place_of(benchmark, scenario))
    file = FIRST_EXPERIENCE_FILE if way == "first-experience" else SETTINGS_FILE
    for place in places if loss == USUAL_LOSS else []:
        setting = read_settings(file).get(place, {}).get(method)
        if setting is not None:
            return setting, _source(setting, place, own)
    if way is None and method in spec.published:
        setting = Setting(spec.epochs, spec.batch_size, spec.published[method])
        return setting, Source("published")
    return default if way is None else None


def _partner(benchmark: str) -> str:
    partner = BENCHMARKS[benchmark].partner
    if partner is None:
        known = ", ".join(name for name, spec in BENCHMARKS.items() if spec.partner is not None)
        raise UserError(f"--settings transfer: {benchmark} has no partner stream; {known} have one")
    return partner


def _from_file(way: str, own: str, method: str) -> tuple[Setting, Source] | None:
    """Return what a file has for the stream, or for the only stream that it has."""
    path = Path(way)
    if path.is_dir():
        inside = [path / "settings.json", path / "search" / "settings.json"]
        path = next((file for file in inside if file.is_file()), inside[0])
    elif not path.is_file():
        raise UserError(
            f"--settings {way}: it is neither {', '.join(WAYS)}, nor a search's folder or settings "
            f"file that is there"
        )
    settings = read_settings(path)
    if own not in settings and len(settings) > 1:
        raise UserError(
            f"--settings {way}: {path} has nothing for {own}, but {', '.join(settings)}"
        )
    place = own if own in settings else next(iter(settings), own)
    setting = settings.get(place, {}).get(method)
    return None if setting is None else (setting, _source(setting, place, own))


def _source(setting: Setting, place: str, own: str) -> Source:
    searched = "searched" if setting.searched_on == STREAM else setting.searched_on
    return Source(searched if place == own else "transferred", place)


def require_settings(
    way: str | None,
    benchmark: str,
    scenario: str,
    methods: Sequence[str],
    model: str | None = None,
    loss: str = USUAL_LOSS,
) -> None:
    """Check that a way has a setting for each method.

    Raises:
        UserError: it lacks one; the message names all such methods.
    """
    stream = (benchmark, scenario)
    lacking = [m for m in methods if find_setting(way, *stream, m, model, loss) is None]
    if lacking:
        on = _partner(benchmark) if way == "transfer" else benchmark
        place = place_of(on, scenario, model) + (f" with {loss}" if loss != USUAL_LOSS else "")
        raise UserError(
            f"--settings {way}: nothing was searched for {', '.join(lacking)} on {place}; leave "
            f"them out, or search them (`search --help`)"
        )


def source_of(config: RunConfig) -> str:
    """Return the kind of the config's setting: of its sources the one that is not ``default``.

    ``given`` where the user gave any value, or the config was made by hand.
    """
    kinds = {Source.parse(source).kind for source in config.sources.values()}
    if "given" in kinds or not kinds:
        return "given"
    return next(iter(sorted(kinds - {"default"})), "default")


def explain(values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """Return "key=value, key=value (source); key=value (source)" for people.

    Args:
        values: epochs, batch size and hyper-parameters by name.
        sources: where they come from, as :class:`RunConfig` has it.
    """
    groups: dict[str, list[str]] = {}
    for key, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else format_value(value)
        groups.setdefault(sources.get(key, ""), []).append(f"{key}={text}")
    return "; ".join(
        ", ".join(texts) + (f" ({Source.parse(source).words})" if source else "")
        for source, texts in groups.items()
    )


def adopted(
    benchmark: str, scenario: str, settings: Mapping[str, Setting], model: str | None = None
) -> tuple[Path, str]:
    """Return the file that settings, by method, go to, and what it then has to hold."""
    first = {setting.searched_on for setting in settings.values()} == {FIRST_EXPERIENCE}
    path = FIRST_EXPERIENCE_FILE if first else SETTINGS_FILE
    read_settings.cache_clear()  # another process may have changed it
    chosen = {place: dict(methods) for place, methods in read_settings(path).items()}
    read_settings.cache_clear()  # it is changed now
    chosen.setdefault(place_of(benchmark, scenario, model), {}).update(settings)
    return path, settings_json(chosen)


def settings_json(settings: Settings) -> str:
    """Return settings, by stream and method, as a file holds them."""
    content = {
        place: {method: setting.as_dict() for method, setting in methods.items()}
        for place, methods in settings.items()
    }
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def require_known(method: str, hyper: Iterable[str]) -> None:
    """Check the names of a method's hyper-parameters.

    Raises:
        UserError: the method has none of such a name.
    """
    known = METHODS[method].defaults
    for key in hyper:
        if key not in known:
            raise UserError(f"{method} has no hyper-parameter {key!r}; {nearest(key, known)}")


def make_config(
    benchmark: str,
    scenario: str,
    method: str,
    seed: int = 0,
    hyper: Hyper | None = None,
    settings: str | Setting | None = None,
    **fixed: Any,
) -> RunConfig:
    """Make a run's config: the method's setting, and above it what the user says.

    Args:
        benchmark: the benchmark's name.
        scenario: the scenario's name.
        method: the method's name.
        seed: the seed.
        hyper: hyper-parameters that the user sets.
        settings: how the setting is chosen, see :func:`find_setting`; or what a search of this
            stream has found.
        **fixed: other RunConfig fields that the user sets, such as ``epochs``.

    Raises:
        UserError: an unknown hyper-parameter, a value out of range, a model, scenario or number
            of experiences that does not go with the benchmark, a scenario or loss that does not
            go with the method, or no setting that was chosen so.
    """
    config = unchecked_config(benchmark, scenario, method, seed, hyper, settings, **fixed)
    _require_builds(config)
    spec = BENCHMARKS[benchmark]
    if is_pretrained(config.model):
        require_images(benchmark, config.model)
    elif config.model != spec.model or MODELS[config.model].origin is not None:
        make_model(config.model, spec.shape, spec.classes, multi_head=False)
    return config


def unchecked_config(
    benchmark: str,
    scenario: str,
    method: str,
    seed: int = 0,
    hyper: Hyper | None = None,
    settings: str | Setting | None = None,
    **fixed: Any,
) -> RunConfig:
    """Do the same without building anything: it needs no torch."""
    spec = BENCHMARKS[benchmark]
    model, loss = fixed.get("model"), fixed.get("loss", USUAL_LOSS)
    if loss not in LOSSES:
        raise UserError(f"unknown loss {loss!r}; {nearest(loss, LOSSES)}")
    if reason := why_not(method, scenario, loss):
        raise UserError(reason)
    if isinstance(settings, Setting):
        own = place_of(benchmark, scenario, model)
        setting, source = settings, _source(settings, own, own)
    else:
        require_settings(settings, benchmark, scenario, [method], model, loss)
        found = find_setting(settings, benchmark, scenario, method, model, loss)
        assert found is not None
        setting, source = found
    given = hyper or {}
    values = {**METHODS[method].defaults, **setting.hyper, **given}
    require_known(method, values)
    for key, value in values.items():
        if value < 0:
            raise UserError(f"{key} of {method} must be at least 0, got {value!r}")
    sources = {key: Source("default") for key in values}
    sources |= dict.fromkeys(setting.hyper, source)
    # A paper's hyper-parameters go with the benchmark's own epochs and batch size.
    other = Source("default") if source.kind == "published" else source
    sources |= {"epochs": other, "batch_size": other}
    sources |= dict.fromkeys([*given, *({"epochs", "batch_size"} & set(fixed))], Source("given"))
    usual: dict[str, Any] = {
        "model": spec.model,
        "experiences": spec.experiences,
        "epochs": setting.epochs,
        "batch_size": setting.batch_size,
    }
    config = RunConfig(
        benchmark=benchmark,
        scenario=scenario,
        method=method,
        seed=seed,
        hyper=values,
        sources={key: str(where) for key, where in sources.items()},
        **(usual | fixed),
    )
    require_possible(benchmark, scenario, config.experiences)
    return config


def _require_builds(config: RunConfig) -> None:
    """Have the method check its own arguments: better now than in the middle of a comparison."""
    from torch import nn

    if METHODS[config.method].origin is not None:  # it may expect a certain model
        return
    common = {"criterion": make_loss(config.loss)}
    try:
        METHODS[config.method].build(nn.Linear(1, 1), config.hyper, common)
    except (ValueError, TypeError) as error:
        raise UserError(f"{config.method}: {error}") from error
