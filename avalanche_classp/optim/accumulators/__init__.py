"""The kinds of accumulators: what a history remembers, one file for each kind.

A kind has no numbers of its own: those of a parameter stand in the optimizer's ``state``. A further
kind is a class with the methods of :class:`~avalanche_classp.optim.accumulators.base.Accumulator`,
an entry in :data:`KINDS`, and its name and defaults in ``optim/hyperparameters.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from avalanche_classp.optim.accumulators.base import Accumulator, Update
from avalanche_classp.optim.accumulators.exact_inputs import ExactInputsAccumulator
from avalanche_classp.optim.accumulators.gradients import GradientsAccumulator
from avalanche_classp.optim.accumulators.inputs import InputsAccumulator
from avalanche_classp.optim.accumulators.weights import WeightsAccumulator

__all__ = ["KINDS", "Accumulator", "Update", "diagonal", "has_history", "kind_for", "kind_of"]

KINDS: dict[str, Accumulator] = {
    "weights": WeightsAccumulator(),
    "gradients": GradientsAccumulator(),
    "inputs": InputsAccumulator(),
    "inputs, exact": ExactInputsAccumulator(),
}
"""The kinds by the name of their history; that of inputs has two."""


def kind_for(param: Tensor, group: Mapping[str, Any]) -> Accumulator:
    """Return the kind that a parameter has in a group; what the history's own does not take."""
    kind = KINDS[group["history"]]
    if group["history"] == "inputs":
        inputs, rank = param.shape[1:].numel(), group["rank"]
        kind = KINDS["inputs, exact" if rank is None or rank >= inputs else "inputs"]
    return kind if kind.takes(param) else KINDS["weights"]


def kind_of(state: Mapping[str, Any] | None) -> Accumulator | None:
    """Return the kind of a parameter's state, or None if it holds no history."""
    # By the keys: Avalanche leaves an empty dict for a new head.
    return next((kind for kind in KINDS.values() if state and kind.key in state), None)


def has_history(state: Mapping[str, Any] | None) -> bool:
    """Tell whether an optimizer's state of a parameter holds a history."""
    return kind_of(state) is not None


def diagonal(state: Mapping[str, Any] | None, param: Tensor) -> Tensor | None:
    """Return the history of each weight by itself, of the parameter's shape; None without one."""
    kind = kind_of(state)
    return None if kind is None or state is None else kind.diagonal(state, param)
