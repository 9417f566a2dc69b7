"""Accumulators that follow their parameters, by name, into a model that has changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from avalanche_classp.optim.accumulators import KINDS, kind_for, kind_of
from avalanche_classp.optim.optimizer import CLASSPOptimizer

__all__ = ["CarryReport", "carry_accumulators"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class CarryReport:
    """What :func:`carry_accumulators` did, by the parameters' names; ``print`` shows it.

    Attributes:
        carried: histories taken over as they are.
        grown: histories that now stand at the beginning of a larger parameter, with the old and
            the new shape; the rest of it begins at zero.
        dropped: histories that are lost, each with the reason.
        new: parameters of the new model that begin without history.
    """

    carried: list[str] = field(default_factory=list)
    grown: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"CLASSP histories: {len(self.carried)} carried, {len(self.grown)} grown, "
            f"{len(self.dropped)} dropped; {len(self.new)} parameters begin without"
        ]
        lines += [f"  carried {name}" for name in self.carried]
        lines += [f"  grown   {name}: {old} → {new}" for name, (old, new) in self.grown.items()]
        lines += [f"  dropped {name}: {reason}" for name, reason in self.dropped.items()]
        lines += [f"  new     {name}" for name in self.new]
        return "\n".join(lines)


def carry_accumulators(
    old_optimizer: CLASSPOptimizer,
    old_named: Iterable[tuple[str, Tensor]],
    new_optimizer: CLASSPOptimizer,
    new_named: Iterable[tuple[str, Tensor]],
) -> CarryReport:
    """Copy the accumulators of a model to those of the model that replaces it.

    A parameter that is larger has the old history at its beginning in every dimension (its rows 0
    to n - 1, as with heads that get more classes) and zero elsewhere. Weights that you copy to
    other places need their histories copied in the same way. In Avalanche, CLASSPPlugin does this
    by itself for models that grow in place.

    Args:
        old_optimizer: holds the accumulators; it stays as it is.
        old_named: ``old_model.named_parameters()``.
        new_optimizer: over the new model's parameters; its accumulators for them are replaced.
        new_named: ``new_model.named_parameters()``. To rename, change the names here.

    Returns:
        What was carried, grown and dropped.

    Raises:
        TypeError, ValueError: no CLASSPOptimizer, no parameters, a parameter of the new model that
            is not in ``new_optimizer``, or an old model without any history.

    Example:
        >>> import torch
        >>> small, large = torch.nn.Linear(3, 2), torch.nn.Linear(3, 5)
        >>> old = CLASSPOptimizer(small.parameters())
        >>> small(torch.ones(1, 3)).sum().backward()
        >>> old.step()
        >>> new = CLASSPOptimizer(large.parameters())
        >>> print(carry_accumulators(old, small.named_parameters(), new, large.named_parameters()))
        CLASSP histories: 0 carried, 2 grown, 0 dropped; 0 parameters begin without
          grown   weight: (2, 3) → (5, 3)
          grown   bias: (2,) → (5,)
    """
    for name, optimizer in (("old_optimizer", old_optimizer), ("new_optimizer", new_optimizer)):
        if not isinstance(optimizer, CLASSPOptimizer):
            raise TypeError(f"{name} must be a CLASSPOptimizer, got {type(optimizer).__name__}")
    groups = {p: group for group in new_optimizer.param_groups for p in group["params"]}
    old_parameters = _by_name("old_named", old_named)
    if old_optimizer.state and not any(p in old_optimizer.state for p in old_parameters.values()):
        raise ValueError(
            "old_named holds no parameter that old_optimizer has trained; give it the "
            "named_parameters() of the model that it has trained"
        )
    parameters = _by_name("new_named", new_named)
    if strangers := [name for name, p in parameters.items() if p not in groups]:
        raise ValueError(f"new_named holds {strangers[0]!r}, which is not in new_optimizer")
    report = CarryReport()
    for name, old_param in old_parameters.items():
        history = old_optimizer.state.get(old_param)
        kind = kind_of(history)
        if kind is None or history is None:
            continue
        param = parameters.pop(name, None)
        if param is None:
            report.dropped[name] = "the new model has no such parameter"
            continue
        # What watch(model) does not find keeps a history of weights.
        wanted = {kind_for(param, groups[param])}
        if groups[param]["history"] == "inputs":
            wanted.add(KINDS["weights"])
        if kind not in wanted:
            report.dropped[name] = "new_optimizer has another kind of history for it"
            continue
        shapes = tuple(old_param.shape), tuple(param.shape)
        carried = kind.resize(history, param)
        if carried is None:
            report.dropped[name] = f"{shapes[0]} → {shapes[1]} is not growth"
            continue
        new_optimizer.state[param] = {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in carried.items()
        }
        if shapes[0] == shapes[1]:
            report.carried.append(name)
        else:
            report.grown[name] = shapes
    report.new.extend(parameters)
    return report


def _by_name(argument: str, named: Any) -> dict[str, Tensor]:
    try:
        found = dict(named)
    except (TypeError, ValueError):
        found = {"": None}
    for value in found.values():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{argument} must hold (name, parameter) pairs, as model.named_parameters() does, "
                f"got {named!r:.50}"
            )
    return found
