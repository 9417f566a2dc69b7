"""Accumulators that follow their parameters, by name, into a model that has changed.

This module needs torch alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from avalanche_classp.optim.matrix import fitted_sketch
from avalanche_classp.optim.optimizer import CLASSPOptimizer, has_history
from avalanche_classp.optim.rule import accumulator_dtype

__all__ = ["CarryReport", "carry_accumulators", "fitted"]

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

    A parameter that is larger has the old history at its beginning in every dimension (its rows
    0 to n - 1, as with heads that get more classes) and zero elsewhere; weights that you copy to
    other places need their histories copied in the same way. The old optimizer stays as it is.
    In Avalanche, CLASSPPlugin does this by itself for models that grow in place.

    Args:
        old_optimizer: holds the accumulators.
        old_named: ``old_model.named_parameters()``.
        new_optimizer: over the new model's parameters; accumulators that it has for them are
            replaced.
        new_named: ``new_model.named_parameters()``. To rename, change the names here.

    Returns:
        What was carried, grown and dropped.

    Raises:
        TypeError: an optimizer is no CLASSPOptimizer, or what is named no parameters.
        ValueError: a named parameter of the new model is not in ``new_optimizer``, or none of the
            old model has a history.

    Example:
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
    known = {p for group in new_optimizer.param_groups for p in group["params"]}
    old_parameters = _by_name("old_named", old_named)
    if old_optimizer.state and not any(p in old_optimizer.state for p in old_parameters.values()):
        raise ValueError(
            "old_named holds no parameter that old_optimizer has trained; give it the "
            "named_parameters() of the model that it has trained"
        )
    parameters = _by_name("new_named", new_named)
    if strangers := [name for name, p in parameters.items() if p not in known]:
        raise ValueError(f"new_named holds {strangers[0]!r}, which is not in new_optimizer")
    report = CarryReport()
    for name, old_param in old_parameters.items():
        history = old_optimizer.state.get(old_param)
        if not has_history(history):
            continue
        param = parameters.pop(name, None)
        if param is None:
            report.dropped[name] = "the new model has no such parameter"
            continue
        shapes = tuple(old_param.shape), tuple(param.shape)
        carried = fitted(history, param)
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
        pairs = list(named.items() if isinstance(named, Mapping) else named)
    except TypeError:
        raise TypeError(
            f"{argument} must be (name, parameter) pairs, as model.named_parameters(), got "
            f"{type(named).__name__}"
        ) from None
    for pair in pairs:
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        if not (is_pair and isinstance(pair[1], Tensor)):
            raise TypeError(
                f"{argument} must hold (name, parameter) pairs, as model.named_parameters() does, "
                f"but holds a {type(pair).__name__}"
            )
    return dict(pairs)


def fitted(history: Mapping[str, Any], param: Tensor) -> dict[str, Any] | None:
    """Return a parameter's state for what it has become: on its device, zero where it has grown.

    None if the parameter has not grown but changed its shape otherwise. Not always a copy.
    """
    if "sketch" in history:
        return fitted_sketch(history, param)
    accumulator = _fitted_accumulator(history["accumulator"], param)
    return None if accumulator is None else {"accumulator": accumulator}


def _fitted_accumulator(history: Tensor, param: Tensor) -> Tensor | None:
    if history.shape == param.shape:
        return history.to(param.device, accumulator_dtype(param))
    same_rank = history.dim() == param.dim()
    if not same_rank or any(o > n for o, n in zip(history.shape, param.shape, strict=True)):
        return None
    grown = torch.zeros_like(param, dtype=accumulator_dtype(param), requires_grad=False)
    grown[tuple(slice(size) for size in history.shape)] = history.to(param.device)
    return grown
