"""The rule as one operation over all parameters of a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from avalanche_classp.optim.backends.single_tensor import Triple
from avalanche_classp.optim.rule import Rule, apply_threshold, denominator_underflows

__all__ = ["by_dtype", "update_"]


def update_(triples: Sequence[Triple], rule: Rule) -> None:
    """Apply the rule to parameters of one device."""
    for params, grads, accumulators in by_dtype(triples):
        _update_(params, grads, accumulators, rule)


def by_dtype(
    triples: Sequence[Triple],
) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Return parameters, gradients and accumulators as lists, for each mix of dtypes."""
    groups: dict[tuple[torch.dtype, ...], list[Triple]] = {}
    for triple in triples:
        groups.setdefault(tuple(t.dtype for t in triple), []).append(triple)
    for some in groups.values():
        params, grads, accumulators = zip(*some, strict=True)
        yield list(params), list(grads), list(accumulators)


def _update_(
    params: list[Tensor], grads: list[Tensor], accumulators: list[Tensor], rule: Rule
) -> None:
    dtype = accumulators[0].dtype
    grads = [apply_threshold(g, dtype, rule) for g in grads]

    if rule.power == 2:
        torch._foreach_addcmul_(accumulators, grads, grads)
    else:
        sizes = torch._foreach_abs(grads)
        if rule.power == 1.5:
            torch._foreach_sqrt_(sizes)
            torch._foreach_pow_(sizes, 3)
        elif rule.power != 1:
            torch._foreach_pow_(sizes, rule.power)
        torch._foreach_add_(accumulators, sizes)
    if not rule.apply_decay:
        torch._foreach_add_(params, grads, alpha=rule.step)
        return
    roots = torch._foreach_add(accumulators, rule.epsilon)
    if rule.power == 2:
        torch._foreach_rsqrt_(roots)
    elif rule.power != 1:
        torch._foreach_pow_(roots, 1 / rule.power)
    if denominator_underflows(dtype, rule.epsilon, rule.power):
        combine = torch._foreach_mul if rule.power == 2 else torch._foreach_div
        moves = [u.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0) for u in combine(grads, roots)]
        torch._foreach_clamp_min_(moves, -1)
        torch._foreach_clamp_max_(moves, 1)
        torch._foreach_add_(params, moves, alpha=rule.step)
    elif rule.power == 2:
        torch._foreach_addcmul_(params, grads, roots, value=rule.step)
    else:
        torch._foreach_addcdiv_(params, grads, roots, value=rule.step)
