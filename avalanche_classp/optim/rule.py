"""The CLASSP update rule as tensor operations: the ground truth of every faster backend.

Paper: O. Ludwig, 2024, https://arxiv.org/abs/2405.09637; the pseudo-code is followed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Rule",
    "accumulator_dtype",
    "apply_threshold",
    "classp_update_",
    "cutoff",
    "denominator_underflows",
    "largest_usable_gradient",
    "rule_of",
    "sparse_update_",
]


class Rule(NamedTuple):
    """The hyper-parameters of one parameter group, as plain numbers.

    :class:`~avalanche_classp.CLASSPOptimizer` says what each is; ``skip_nonfinite`` is
    ``nonfinite="skip"``.
    """

    lr: float
    threshold: float
    epsilon: float
    power: float
    apply_decay: bool
    maximize: bool = False
    skip_nonfinite: bool = False

    @property
    def step(self) -> float:
        """What a scaled gradient is multiplied by before it is added to the weights."""
        return self.lr if self.maximize else -self.lr


def rule_of(group: Mapping[str, Any]) -> Rule:
    """Return the update rule of a parameter group."""
    return Rule(
        lr=float(group["lr"]),
        threshold=float(group["threshold"]),
        epsilon=float(group["epsilon"]),
        power=float(group["power"]),
        apply_decay=group["apply_decay"],
        maximize=group["maximize"],
        skip_nonfinite=group["nonfinite"] == "skip",
    )


def classp_update_(
    param: Tensor,
    grad: Tensor,
    accumulator: Tensor,
    rule: Rule,
    buffers: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Apply the rule to one dense parameter, in place.

    Args:
        param: the weights w, any shape; changed in place.
        grad: their gradients g, the same shape; left as they are.
        accumulator: A, the same shape, float32 or float64; changed in place.
        rule: the hyper-parameters.
        buffers: two tensors of A's shape and dtype to work in. Default (None): fresh memory. The
            numbers are the same.
    """
    y = buffers[1] if buffers else None
    g = apply_threshold(grad, accumulator.dtype, rule, buffers)

    if rule.power == 2:
        accumulator.addcmul_(g, g)
    else:
        size = torch.abs(g, out=y)
        if rule.power == 1.5:
            size.sqrt_().pow_(3)  # a quarter of pow's time, and its number but for rounding
        elif rule.power != 1:
            size.pow_(rule.power)
        accumulator.add_(size)

    if not rule.apply_decay:
        param.add_(g, alpha=rule.step)
        return
    root = torch.add(accumulator, rule.epsilon, out=y)
    if rule.power == 2:
        root.rsqrt_()  # not sqrt, which goes through MKL and is not rounded to the last bit
    elif rule.power != 1:
        root.pow_(1 / rule.power)
    if denominator_underflows(accumulator.dtype, rule.epsilon, rule.power):
        # Without history 0/0: no step. Where underflow took digits the step stays within lr.
        u = torch.mul(g, root, out=y) if rule.power == 2 else torch.div(g, root, out=y)
        param.add_(u.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_(-1, 1), alpha=rule.step)
    elif rule.power == 2:
        param.addcmul_(g, root, value=rule.step)
    else:
        param.addcdiv_(g, root, value=rule.step)


def apply_threshold(
    grad: Tensor,
    dtype: torch.dtype,
    rule: Rule,
    buffers: tuple[Tensor, Tensor] | None = None,
    limit: float | None = None,
) -> Tensor:
    """Return the gradients in the dtype, zero where the threshold or ``skip_nonfinite`` stops them.

    A zero gradient changes neither A nor w, so what follows needs no mask.

    Args:
        grad: the gradients.
        dtype: the accumulator's.
        rule: the hyper-parameters.
        buffers: see :func:`classp_update_`.
        limit: what ``skip_nonfinite`` lets through. Default: :func:`largest_usable_gradient`.
    """
    x, y = buffers or (None, None)
    g = grad if x is None or grad.dtype == dtype else x.copy_(grad)
    g = g.to(dtype)
    if rule.threshold > 0:
        # hardshrink keeps the gradients with |g| > cutoff and makes the others zero.
        c = cutoff(rule.threshold, dtype)
        if x is None:
            g = torch.nn.functional.hardshrink(g, c)
        else:
            g = torch.ops.aten.hardshrink.out(g, c, out=x)
    if rule.skip_nonfinite:
        usable = torch.abs(g, out=y) <= (limit or largest_usable_gradient(dtype, rule.power))
        g = torch.where(usable, g, torch.zeros((), dtype=dtype, device=g.device), out=x)
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
    # On the CPU whatever torch's default device is.
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype, device="cpu")
    if Fraction(largest.item()) ** 2 <= exact:
        return largest.item()
    c = torch.tensor(math.sqrt(threshold), dtype=dtype, device="cpu")
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
def denominator_underflows(dtype: torch.dtype, epsilon: float, power: float) -> bool:
    """Tell whether (epsilon + A)^(1/power) can be zero, or lose its digits, in the dtype."""
    tiny = torch.finfo(dtype).tiny
    return epsilon < tiny or math.log(epsilon) / power < math.log(tiny)
