"""A method's setting on a benchmark: what the search chose, else a paper's, else the defaults."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest, one_line
from .benchmarks import BENCHMARKS, require_possible
from .config import Epochs, Hyper, RunConfig
from .losses import LOSSES, USUAL_LOSS, make_loss
from .methods import METHODS, why_not
from .models import MODELS, make_model

SETTINGS_FILE = Path(__file__).with_name("tuned_settings.json")
"""What the search chose for each benchmark, scenario and method (see results/README.md)."""


@dataclass(frozen=True)
class Setting:
    """Epochs, batch size and hyper-parameters of a method on a benchmark and scenario."""

    epochs: Epochs
    batch_size: int
    hyper: Hyper = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the setting as JSON can hold it."""
        return asdict(self)


@cache
def _settings() -> dict[str, dict[str, dict[str, Any]]]:
    try:
        settings = json.loads(SETTINGS_FILE.read_text(encoding="utf-8"))
        for place, methods in settings.items():
            benchmark, scenario, *model = place.split("/")
            for method, entry in methods.items():
                RunConfig(benchmark, scenario, method, "".join(model), 1, 0, **entry)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, UserError) as error:
        raise UserError(
            f"{SETTINGS_FILE} cannot be read ({one_line(error)}); restore it with git"
        ) from error
    return settings


def place_of(benchmark: str, scenario: str, model: str | None = None) -> str:
    """Return what settings are listed under; the benchmark's own model, or None, is not named."""
    own = model in (None, BENCHMARKS[benchmark].model)
    return f"{benchmark}/{scenario}" if own else f"{benchmark}/{scenario}/{model}"


def searched_setting(
    benchmark: str, scenario: str, method: str, model: str | None = None
) -> Setting | None:
    """Return what the search chose with this model, or None where nothing was searched."""
    entry = _settings().get(place_of(benchmark, scenario, model), {}).get(method)
    return None if entry is None else Setting(**entry)


def source_of(config: RunConfig) -> str:
    """Return where the config's setting comes from.

    ``searched`` (chosen on validation data), ``transferred`` (likewise, but with the benchmark's
    own model), ``published`` (a paper's values), ``default`` (not tuned) or ``given`` (by the
    user, in part or wholly).
    """
    spec = BENCHMARKS[config.benchmark]
    defaults = METHODS[config.method].defaults
    usual = Setting(spec.epochs, spec.batch_size)
    published = spec.published.get(config.method)
    place = (config.benchmark, config.scenario, config.method)
    searched = config.loss == USUAL_LOSS
    for source, setting in (
        ("searched", searched_setting(*place, config.model) if searched else None),
        ("transferred", searched_setting(*place) if searched else None),
        ("published", None if published is None else replace(usual, hyper=published)),
        ("default", usual),
    ):
        if setting is not None and (config.epochs, config.batch_size, config.hyper) == (
            setting.epochs,
            setting.batch_size,
            {**defaults, **setting.hyper},
        ):
            return source
    return "given"


def adopted(
    benchmark: str, scenario: str, settings: Mapping[str, Setting], model: str | None = None
) -> str:
    """Return what :data:`SETTINGS_FILE` has to hold for these settings, by method."""
    _settings.cache_clear()  # another process may have changed it
    chosen = _settings()
    _settings.cache_clear()  # it is changed now
    place = chosen.setdefault(place_of(benchmark, scenario, model), {})
    place.update({method: setting.as_dict() for method, setting in settings.items()})
    return json.dumps(chosen, indent=1, sort_keys=True) + "\n"


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
    **fixed: Any,
) -> RunConfig:
    """Make a run's config: the method's setting, and above it what the user says.

    Where nothing was searched with the model, what was searched with the benchmark's own is used;
    nothing was searched with another loss than the usual one.

    Args:
        benchmark: the benchmark's name.
        scenario: the scenario's name.
        method: the method's name.
        seed: the seed.
        hyper: hyper-parameters that the user sets.
        **fixed: other RunConfig fields that the user sets, such as ``epochs``.

    Raises:
        UserError: an unknown hyper-parameter, a value out of range, a model, scenario or number
            of experiences that does not go with the benchmark, or a scenario or loss that does not
            go with the method.
    """
    spec = BENCHMARKS[benchmark]
    loss = fixed.get("loss", USUAL_LOSS)
    if loss not in LOSSES:
        raise UserError(f"unknown loss {loss!r}; {nearest(loss, LOSSES)}")
    if reason := why_not(method, scenario, loss):
        raise UserError(reason)
    usual_setting = Setting(spec.epochs, spec.batch_size, spec.published.get(method, {}))
    setting = (
        (
            searched_setting(benchmark, scenario, method, fixed.get("model"))
            or searched_setting(benchmark, scenario, method)
            or usual_setting
        )
        if loss == USUAL_LOSS
        else usual_setting
    )
    values = {**METHODS[method].defaults, **setting.hyper, **(hyper or {})}
    require_known(method, values)
    for key, value in values.items():
        if value < 0:
            raise UserError(f"{key} of {method} must be at least 0, got {value!r}")
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
        **(usual | fixed),
    )
    require_possible(benchmark, scenario, config.experiences)
    _require_builds(config)
    if config.model != spec.model or MODELS[config.model].origin is not None:
        make_model(config.model, spec.shape, spec.classes, multi_head=False)
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
