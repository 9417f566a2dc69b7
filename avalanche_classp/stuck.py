"""Settings that cannot work, told from the first epoch: weights that stay, a loss that stays.

It looks once, at the end of the first epoch, at up to 256 weights of each parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from avalanche_classp import made_anew
from avalanche_classp.optim.accumulators import diagonal

__all__ = ["why_stuck"]

_SLOWER = 1e-3
"""Of what SGD with the same lr moves weights: less is too little."""
_MANY_STEPS = 1000
"""More do not count: gradients turn around, and histories should slow down long trainings."""
_FEWEST_STEPS = 40
"""Fewer tell nothing."""
_FALL, _LEARNT = 0.01, 0.2
"""A loss that falls by less than this share has not fallen, unless it is below the other."""


def why_stuck(
    strategy: Any, notes: Mapping[str, made_anew.Note], steps: int, losses: Sequence[Tensor]
) -> str | None:
    """Return what is wrong after the first epoch and what to change; None if nothing is.

    Args:
        strategy: a strategy whose optimizer is a CLASSPOptimizer.
        notes: of the weights before the epoch, by parameter's name.
        steps: of the optimizer since then.
        losses: of all mini-batches since then.
    """
    if min(steps, len(losses)) < _FEWEST_STEPS:
        return None
    optimizer = strategy.optimizer
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    moved, by_sgd, history = 0.0, 0.0, "weights"
    trained: list[Tensor] = []
    for name, p in strategy.model.named_parameters():
        if p not in groups or name not in notes or p.grad is None or p.grad.is_sparse:
            continue
        noted, group = notes[name], groups[p]
        if not made_anew.fits(noted, p):
            continue
        now, grad = (made_anew.sampled(values, noted["shape"]) for values in (p, p.grad))
        moved += sum(abs(a - b) for a, b in zip(now, noted["began"], strict=True))
        by_sgd += float(group["lr"]) * min(steps, _MANY_STEPS) * sum(map(abs, grad))
        trained.append(p)
        history = group["history"]
    if moved < _SLOWER * by_sgd:
        share = moved / by_sgd
        what = f"the weights moved {share:.0e} of what SGD moves them with this lr"
        accumulators = (diagonal(optimizer.state.get(p), p) for p in trained)
        if not any(a is not None and a.count_nonzero() for a in accumulators):
            return f"{what}, because no gradient passes the threshold; lower threshold"
        remedy = "raise epsilon or lr" if history == "inputs" else "lower epsilon, or raise lr"
        return f"{what}: the accumulators let almost nothing through; {remedy}"
    values = torch.stack([loss.float() for loss in losses])
    quarter = len(losses) // 4
    first, last = values[:quarter].mean().item(), values[-quarter:].mean().item()
    if last > max((1 - _FALL) * first, _LEARNT):
        direction = "lower lr" if last > first else "raise lr if it goes on like this"
        return f"the loss has not fallen (from {first:.3g} to {last:.3g}); {direction}"
    return None
