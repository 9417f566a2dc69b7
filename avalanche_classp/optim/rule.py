"""The CLASSP update rule as tensor operations: the ground truth of every faster path.

Paper: O. Ludwig, 2024, https://arxiv.org/abs/2405.09637; the pseudo-code is followed.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Rule",
    "accumulator_dtype",
    "classp_update_",
    "cutoff",
    "largest_usable_gradient",
    "passed",
    "root_may_vanish",
    "sparse_update_",
]


class Rule(NamedTuple):
    """The hyper-parameters of one parameter group.

    Attributes:
        lr: see :class:`~avalanche_classp.CLASSPOptimizer`, here and below.
        threshold: compared with g², strictly.
        epsilon: added to A inside the root.
        power: p.
        apply_decay: whether A scales the step.
        maximize: negate the gradient.
        skip_nonfinite: leave weights alone whose g or ``|g|**power`` is not finite.
    """

    lr: float
    threshold: float
    epsilon: float
    power: float
    apply_decay: bool
    maximize: bool = False
    skip_nonfinite: bool = False


def classp_update_(param: Tensor, grad: Tensor, accumulator: Tensor, rule: Rule) -> None:
    """Apply the rule to one dense parameter, in place.

    Args:
        param: the weights w, any shape; changed in place.
        grad: their gradients g, the same shape; left as they are.
        accumulator: A, the same shape, float32 or float64; changed in place.
        rule: the hyper-parameters.
    """
    dtype = accumulator.dtype
    g = passed(grad, dtype, rule)
    step = rule.lr if rule.maximize else -rule.lr

    if rule.power == 1:
        accumulator.add_(g.abs())
    elif rule.power == 2:
        accumulator.addcmul_(g, g)
    else:
        accumulator.add_(g.abs().pow_(rule.power))

    if not rule.apply_decay:
        param.add_(g, alpha=step)
        return
    history = accumulator + rule.epsilon
    if root_may_vanish(dtype, rule.epsilon, rule.power):
        # Without history 0/0: no step. Where underflow took digits the step stays within lr.
        u = g * history.rsqrt_() if rule.power == 2 else g / history.pow_(1 / rule.power)
        param.add_(u.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_(-1, 1), alpha=step)
    elif rule.power == 2:
        # Not sqrt, which goes through MKL and is not rounded to the last bit.
        param.addcmul_(g, history.rsqrt_(), value=step)
    else:
        param.addcdiv_(g, history.pow_(1 / rule.power), value=step)


def passed(grad: Tensor, dtype: torch.dtype, rule: Rule) -> Tensor:
    """Return the gradients in the dtype, zero where the threshold or ``skip_nonfinite`` stops them.

    A zero gradient changes neither A nor w, so what follows needs no mask.
    """
    g = grad.to(dtype)
    if rule.threshold > 0:
        # hardshrink keeps the gradients with |g| > cutoff and makes the others zero.
        g = torch.nn.functional.hardshrink(g, cutoff(rule.threshold, dtype))
    if rule.skip_nonfinite:
        g = torch.where(g.abs() <= largest_usable_gradient(dtype, rule.power), g, 0.0)
    return g


def sparse_update_(param: Tensor, grad: Tensor, accumulator: Tensor, rule: Rule) -> None:
    """Apply the rule to the entries that a sparse COO gradient names.

    The others have gradient zero, and the rule leaves such weights alone.
    """
    if grad.dim() == 0:
        classp_update_(param, grad.to_dense(), accumulator, rule)
        return
    grad = grad.coalesce()  # each entry once, repeated ones summed
    where = tuple(grad.indices())
    weights, history = param[where], accumulator[where]
    classp_update_(weights, grad.values(), history, rule)
    param[where] = weights
    accumulator[where] = history


def accumulator_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter's accumulator is kept."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


@lru_cache(maxsize=256)
def cutoff(threshold: float, dtype: torch.dtype) -> float:
    """Return the largest c of the dtype with c² <= threshold, so that g² > threshold ⇔ |g| > c.

    Squaring the gradient instead would underflow (float32 below 3e-23, float16 below 2e-4) and
    make small gradients vanish at threshold 0.
    """
    exact = Fraction(threshold)
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
    if Fraction(largest.item()) ** 2 <= exact:
        return largest.item()
    c = torch.tensor(math.sqrt(threshold), dtype=dtype)
    while Fraction(c.item()) ** 2 > exact:
        c = torch.nextafter(c, -largest)
    return c.item()


@lru_cache(maxsize=256)
def largest_usable_gradient(dtype: torch.dtype, power: float) -> float:
    """Return the largest |g| with which no accumulator ever becomes infinite.

    A sum stops growing when the terms are below half its last digit. With terms of at most
    max · eps / 4 that happens before it reaches max.
    """
    info = torch.finfo(dtype)
    log2_of_term = math.log2(info.max) + math.log2(info.eps) - 2
    # A little less, for the rounding of ``|g|**power``.
    return min(info.max, 2 ** min(log2_of_term / power, 1023) * (1 - 1e-6))


@lru_cache(maxsize=256)
def root_may_vanish(dtype: torch.dtype, epsilon: float, power: float) -> bool:
    """Tell whether (epsilon + A)^(1/power) can be zero, or lose its digits, in the dtype."""
    tiny = torch.finfo(dtype).tiny
    return epsilon < tiny or math.log(epsilon) / power < math.log(tiny)
