"""The rule as one kernel that ``torch.compile`` makes, for GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from avalanche_classp.optim.backends.multi_tensor import by_dtype
from avalanche_classp.optim.backends.single_tensor import Triple
from avalanche_classp.optim.rule import (
    Rule,
    cutoff,
    denominator_underflows,
    largest_usable_gradient,
)

__all__ = ["compilable_update_", "update_"]


class _Constants(NamedTuple):
    """What ``torch.compile`` may take for constant: all of a rule but the learning rate."""

    cutoff: float
    limit: float | None
    epsilon: float
    power: float
    apply_decay: bool
    underflows: bool


def update_(triples: Sequence[Triple], rule: Rule) -> None:
    """Apply the rule to parameters of one device; the first call compiles."""
    for lists in by_dtype(triples):
        dtype = lists[2][0].dtype
        constants = _Constants(
            cutoff(rule.threshold, dtype),
            largest_usable_gradient(dtype, rule.power) if rule.skip_nonfinite else None,
            rule.epsilon,
            rule.power,
            rule.apply_decay,
            denominator_underflows(dtype, rule.epsilon, rule.power),
        )
        # A tensor, so that schedulers do not make it compile again.
        step = torch.tensor(rule.step, dtype=dtype, device="cpu")
        _compiled()(*lists, step, constants)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., None]:
    return torch.compile(compilable_update_)


def compilable_update_(
    params: list[Tensor],
    grads: list[Tensor],
    accumulators: list[Tensor],
    step: Tensor,
    rule: _Constants,
) -> None:
    """Apply the rule as operations that a compiler makes one kernel of."""
    for p, g, a in zip(params, grads, accumulators, strict=True):
        g = g.to(a.dtype)
        chosen = g.abs() > rule.cutoff
        if rule.limit is not None:
            chosen &= g.abs() <= rule.limit
        u = torch.where(chosen, g, 0.0)
        if rule.power == 2:
            a.add_(u * u)
        elif rule.power == 1.5:
            a.add_(u.abs() * u.abs().sqrt())
        else:
            a.add_(u.abs() ** rule.power)
        if rule.apply_decay:
            base = a + rule.epsilon
            u = u * base.rsqrt() if rule.power == 2 else u / base ** (1 / rule.power)
            if rule.underflows:
                u = u.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(-1, 1)
        p.add_(u * step)
