"""The hyper-parameters, each declared once: name, type, defaults, range and what it does.

Validation, the signatures of the optimizer, the plugin and the strategy, and the ``Args`` of their
docstrings come from :class:`Hyperparameters`.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict, TypeVar, get_type_hints

import torch
from torch import Tensor

from avalanche_classp.optim.checks import require_flag, require_number, require_whole

__all__ = [
    "HISTORIES",
    "SPECS",
    "Hyperparameters",
    "documented",
    "resolve",
    "validate",
    "validated_factor",
]

HISTORIES = ("weights", "gradients", "inputs")
"""The kinds of history: what :data:`history` may be."""

Check = Callable[[str, Any], None]


@dataclass(frozen=True)
class Spec:
    """What is declared of a hyper-parameter.

    Attributes:
        doc: what it does, one or more sentences.
        check: raises TypeError or ValueError, naming the argument and the value.
        default: with ``history="weights"``; None where it has no effect there.
        defaults: of other histories, by their names.
        only: the histories in which it has an effect. Default: all.
        phase: whether it may change at an experience's boundary.
    """

    doc: str
    check: Check
    default: Any = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = HISTORIES
    phase: bool = False

    def default_for(self, history: str) -> Any:
        """Return the default with a history."""
        return self.defaults.get(history, self.default)


def _nonnegative(name: str, value: Any) -> None:
    # What float32 cannot hold would fail in the middle of a step.
    if not 0 <= require_number(name, value) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")


def _learning_rate(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_meta:
            where = " on meta" if value.is_meta else ""
            raise ValueError(
                f"{name} must be one number, got a tensor of shape {tuple(value.shape)}{where}"
            )
        value = value.item()
    _nonnegative(name, value)


def _positive(name: str, value: Any) -> None:
    if not 0 < require_number(name, value) < math.inf:
        raise ValueError(f"{name} must be finite and greater than 0, got {value!r}")


def _one_of(*choices: str) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")

    return check


class Hyperparameters(TypedDict, total=False):
    """Keywords of CLASSPOptimizer, CLASSPPlugin and CLASSP; None stands for the default."""

    lr: Annotated[
        float | Tensor | None,
        Spec(
            "Step length, >= 0 (α in the paper). A one-element tensor works too.",
            _learning_rate,
            1e-3,
            {"gradients": 0.02, "inputs": 1.0},
            phase=True,
        ),
    ]
    threshold: Annotated[
        float | None,
        Spec(
            "A weight changes only where its squared gradient is greater, >= 0. With 0 every "
            "non-zero gradient counts.",
            _nonnegative,
            0.0,
            phase=True,
        ),
    ]
    epsilon: Annotated[
        float | None,
        Spec(
            "Added to A where the step is divided, never stored in it, >= 0 (ε in the paper); > 0 "
            "with a history of directions.",
            _nonnegative,
            1e-8,
            {"gradients": 0.02, "inputs": 1.0},
            phase=True,
        ),
    ]
    power: Annotated[
        float | None,
        Spec(
            "Exponent of the accumulated gradients, > 0 (p in the paper).",
            _positive,
            1.5,
            {"inputs": 1.0},
            phase=True,
        ),
    ]
    apply_decay: Annotated[
        bool | None,
        Spec("Whether the accumulators scale the steps.", require_flag, True, phase=True),
    ]
    history: Annotated[
        str | None,
        Spec(
            'What is accumulated. ``"weights"``: one number for each weight, the paper\'s rule. '
            '``"gradients"``: an extension; parameters of two or more dimensions have a history '
            'for each direction of their layer\'s inputs, taken from gradients. ``"inputs"``: '
            "another extension; the directions of what each layer was given. It needs "
            "``watch(model)``, which plugin and strategy call. See "
            ":mod:`avalanche_classp.optim.accumulators`. Each kind has defaults of its own.",
            _one_of(*HISTORIES),
            "weights",
            {"gradients": "gradients", "inputs": "inputs"},
        ),
    ]
    rank: Annotated[
        int | None,
        Spec(
            "With a history of directions: how many are told apart, >= 1. The state is about rank "
            "numbers for each input of a layer. None, with a history of inputs: all, exactly; the "
            "state has inputs × inputs numbers.",
            require_whole,
            None,
            {"gradients": 128},
            only=("gradients", "inputs"),
        ),
    ]
    both_sides: Annotated[
        bool | None,
        Spec(
            'With ``history="gradients"``: whether the directions of the outputs have a history, '
            "too. It is read once, when a parameter's history begins.",
            require_flag,
            None,
            {"gradients": False},
            only=("gradients",),
        ),
    ]
    maximize: Annotated[
        bool | None,
        Spec("Maximize the objective instead of minimizing it.", require_flag, False),
    ]
    nonfinite: Annotated[
        str | None,
        Spec(
            "What to do about a gradient that is NaN, infinite, or so large that a sum of "
            '``|g|**power`` could become infinite. ``"raise"``: NonFiniteGradientError, before '
            'anything has changed. ``"skip"``: these weights and their accumulators stay as they '
            "are.",
            _one_of("raise", "skip"),
            "raise",
        ),
    ]
    foreach: Annotated[
        bool | None,
        Spec(
            "True: few operations over all parameters. False: a loop over the parameters. None: "
            "the fastest way that needs no compiler.",
            require_flag,
        ),
    ]
    fused: Annotated[
        bool | None,
        Spec(
            "True: one pass over memory, by a kernel that is compiled once for the machine (CPU, "
            "needs a C++ compiler) or by ``torch.compile`` (GPU). False: never. None: the kernel "
            "where it lies ready.",
            require_flag,
        ),
    ]


SPECS: dict[str, Spec] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(Hyperparameters, include_extras=True).items()
}
"""The declarations by name."""

_OF_SOME_HISTORIES = {name: spec.only for name, spec in SPECS.items() if spec.only != HISTORIES}


def validate(values: Mapping[str, Any]) -> None:
    """Check the hyper-parameters among ``values``; other keys, and None, are left alone.

    TypeError or ValueError names the argument and the value.
    """
    for name, value in values.items():
        if name in SPECS and value is not None:
            SPECS[name].check(name, value)
    if values.get("foreach") and values.get("fused"):
        raise ValueError("foreach and fused cannot both be True; give one of them")
    history = values.get("history") or SPECS["history"].default
    for name, value in values.items():
        if name in SPECS and value is not None and history not in (only := SPECS[name].only):
            raise ValueError(
                f"{name}={value!r} has no effect with history={history!r}; leave it out or give "
                f"history={' or '.join(map(repr, only))}"
            )
    require_positive_epsilon(history, values.get("epsilon"))


def require_positive_epsilon(history: str, epsilon: Any) -> None:
    """Raise ValueError where a history of directions has epsilon 0."""
    if history != "weights" and epsilon == 0:
        raise ValueError(
            f"epsilon must be greater than 0 with history={history!r}, got {epsilon!r}"
        )


def require_consistent(group: Mapping[str, Any]) -> None:
    """Raise ValueError where a group was changed to what its history cannot use."""
    history = group["history"]
    SPECS["history"].check("history", history)
    for name, only in _OF_SOME_HISTORIES.items():
        missing = group[name] is None and SPECS[name].default_for(history) is not None
        if missing or (group[name] is not None and history not in only):
            raise ValueError(
                f"a group was changed to history={history!r} with {name}={group[name]!r}; a "
                f"history is chosen when the optimizer is made"
            )
    require_positive_epsilon(history, group["epsilon"])


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return all hyper-parameters: what is given, and the history's defaults for the others."""
    history = values.get("history") or SPECS["history"].default
    return {
        name: spec.default_for(history) if values.get(name) is None else values[name]
        for name, spec in SPECS.items()
    }


def validated_factor(name: str, value: Any) -> float:
    """Return a factor for :meth:`CLASSPOptimizer.consolidate`, if it is one."""
    factor = require_number(name, value)
    if not 1 <= factor <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be finite and at least 1, got {value!r}")
    return factor


_Class = TypeVar("_Class", bound=type)


def documented(**own: tuple[Any, str]) -> Callable[[_Class], _Class]:
    """Return a class decorator that declares hyper-parameters to ``help()`` and ``inspect``.

    The line ``{hyperparameters}`` of the docstring becomes their part of ``Args``. In the signature
    they take the place of ``**hyperparameters``, with the defaults of ``history="weights"``.

    Args:
        **own: a default and a text with the default, for a hyper-parameter that differs here.
    """

    def decorate(cls: _Class) -> _Class:
        pad = " " * 8
        entries = []
        for name, spec in SPECS.items():
            others = [f"{v!r} with history={h!r}" for h, v in spec.defaults.items() if v != h]
            text = f"{spec.doc} Default: {', '.join([repr(spec.default), *others])}."
            text = f"{name}: {own[name][1] if name in own else text}"
            entries += textwrap.wrap(text, 92, initial_indent=pad, subsequent_indent=pad + "    ")
        if cls.__doc__ is None:  # python -OO
            return cls
        cls.__doc__ = cls.__doc__.replace(pad + "{hyperparameters}", "\n".join(entries))
        init: Any = cls.__init__  # type: ignore[misc]
        signature = inspect.signature(init)
        hints = get_type_hints(Hyperparameters)
        parameters = dict(signature.parameters)
        parameters.pop("hyperparameters", None)
        catch_all = dict([parameters.popitem()]) if _is_catch_all(parameters) else {}
        for name, spec in SPECS.items():
            given = parameters.get(name)
            kind = inspect.Parameter.KEYWORD_ONLY if given is None else given.kind
            default = own[name][0] if name in own else spec.default
            parameters[name] = inspect.Parameter(
                name, kind, default=default, annotation=hints[name]
            )
        init.__signature__ = signature.replace(parameters=[*(parameters | catch_all).values()])
        return cls

    return decorate


def _is_catch_all(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return list(parameters.values())[-1].kind is inspect.Parameter.VAR_KEYWORD
