"""How CLASSPPlugin replaces an optimizer: what the new one takes over, and what is refused."""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from avalanche.training.templates.base import BaseTemplate
from torch.optim import Optimizer

from avalanche_classp.optim.hyperparameters import SPECS
from avalanche_classp.optim.optimizer import CLASSPOptimizer

__all__ = ["is_scheduled", "listed", "refuse_dead_references", "replacement", "step_hooks"]

_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
"""Choices of implementation: nothing is lost with them."""
_CARRIED = set(SPECS) - set(_IMPLEMENTATION)
"""What a group of another optimizer hands on where it has it."""

# Private attributes of torch's Optimizer.
_STEP_HOOKS = "_optimizer_step_post_hooks"
_HOOKS = (
    "_optimizer_step_pre_hooks",
    _STEP_HOOKS,
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_SCHEDULERS_MARK = "_wrapped_by_lr_sched"
"""What torch's schedulers leave on ``optimizer.step``; ReduceLROnPlateau leaves nothing."""


def replacement(optimizer: Optimizer, given: Mapping[str, Any]) -> CLASSPOptimizer:
    """Return a CLASSPOptimizer with the parameter groups and the hooks of another optimizer.

    Of what is given lr is for all groups, the rest for groups that do not name it. A UserWarning
    names settings, or a ``step`` set on the optimizer, that have no counterpart.
    """
    signature = inspect.signature(type(optimizer)).parameters
    settings = {*signature, *optimizer.defaults, *_IMPLEMENTATION, "initial_lr"} - _CARRIED
    groups: list[dict[str, Any]] = []
    ignored: dict[str, Any] = {}
    for group in optimizer.param_groups:
        kept = {key: value for key, value in group.items() if key not in settings}
        if "lr" in given:
            kept["lr"] = given["lr"]
        names, params = kept.pop("param_names", ()), group["params"]
        named = len(names) == len(params) > 0
        kept["params"] = list(zip(names, params, strict=True)) if named else list(params)
        groups.append(kept)
        ignored |= {
            key: value
            for key, value in group.items()
            if key in signature
            and key not in (*_CARRIED, *_IMPLEMENTATION, "params")
            # AdamW decays by default; that is lost as well, and without decay nothing is.
            and (bool(value) if key == "weight_decay" else value != signature[key].default)
        }
    if "step" in vars(optimizer) and not is_scheduled(optimizer):
        ignored["step"] = vars(optimizer)["step"]
    if ignored:
        warnings.warn(
            f"CLASSPPlugin replaces {type(optimizer).__name__}, and CLASSP has no counterpart for "
            f"{listed(ignored)}: ignored",
            stacklevel=2,
        )
    classp = CLASSPOptimizer(groups, **given)
    for name in _HOOKS:
        # The dicts themselves: a handle removes its hook, and what is registered later counts.
        setattr(classp, name, getattr(optimizer, name))
    return classp


def listed(values: Mapping[str, Any]) -> str:
    """Return ``key=value, …``."""
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def step_hooks(optimizer: Optimizer) -> Iterable[Any]:
    """Return the hooks that are called after each step."""
    return getattr(optimizer, _STEP_HOOKS).values()


def is_scheduled(optimizer: Optimizer) -> bool:
    """Tell whether a scheduler of torch has left its mark on an optimizer."""
    return hasattr(vars(optimizer).get("step"), _SCHEDULERS_MARK)


def refuse_dead_references(plugins: Sequence[Any], optimizer: Optimizer) -> None:
    """Raise ValueError if something would go on with an optimizer that is being replaced.

    That is a plugin that holds it or an object with it, and a scheduler, whoever holds that: an
    object with a ``step`` method whose attribute ``optimizer`` it is.
    """
    for user, found in _users(plugins, optimizer):
        raise ValueError(
            f"{found} the {type(optimizer).__name__} that CLASSPPlugin replaces, and would go on "
            f"with a dead optimizer; build a CLASSPOptimizer, give it to {type(user).__name__} and "
            f"pass it to the strategy as optimizer="
        )


_CONTAINERS = (Mapping, list, tuple, set, frozenset)


def _users(plugins: Sequence[Any], optimizer: Optimizer) -> Iterator[tuple[Any, str]]:
    """Yield what works on an optimizer, and where it was found."""
    for plugin in plugins:
        for attribute, value in getattr(plugin, "__dict__", {}).items():
            items = value.values() if isinstance(value, Mapping) else value
            for held in items if isinstance(value, _CONTAINERS) else (value,):
                if held is optimizer or _works_on(held, optimizer):
                    yield held, f"{type(plugin).__name__}.{attribute} holds"
    has_step: dict[type, bool] = {}
    for thing in gc.get_objects():
        of = type(thing)
        if of not in has_step:
            has_step[of] = callable(getattr(of, "step", None))
        if has_step[of] and _works_on(thing, optimizer):
            yield thing, f"{of.__name__} is a scheduler of"


def _works_on(holder: Any, optimizer: Optimizer) -> bool:
    attributes = getattr(holder, "__dict__", {})
    # A strategy has its optimizer replaced.
    return attributes.get("optimizer") is optimizer and not isinstance(holder, BaseTemplate)
