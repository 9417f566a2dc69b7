"""Faster ways to take a CLASSP step; the tests hold each to ``rule.classp_update_``.

* loop: the rule, parameter by parameter. The ground truth; its temporaries are as large as a
  parameter.
* blocks: the same tensor operations on blocks that stay in the caches, in buffers that are kept.
* foreach: one operation over all parameters of a device, so few launches on a GPU.
* fused: one pass over memory, by a compiled kernel on a CPU and ``torch.compile`` on a GPU.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from avalanche_classp.optim import kernel
from avalanche_classp.optim.rule import (
    Rule,
    classp_update_,
    cutoff,
    largest_usable_gradient,
    root_may_vanish,
)

__all__ = ["Path", "Triple", "choose_path", "update_", "usable"]

Triple = tuple[Tensor, Tensor, Tensor]
"""A parameter, its dense gradient, and its accumulator."""

Path = Callable[[Sequence[Triple], Rule], None]

_BLOCK = 1 << 18
"""Entries: enough for the cost of a call not to count, few enough for the caches."""

_SMALL = 1 << 13
"""Entries whose temporaries cost less than views of buffers."""


def choose_path(device: torch.device, foreach: bool | None, fused: bool | None) -> Path:
    """Return the path for the parameters on a device.

    Args:
        device: where they are.
        foreach: the group's setting.
        fused: the group's setting.
    """
    if fused:
        if device.type == "cpu":
            return _kernel if kernel.build() else _blocks
        return _compiled
    if foreach or (foreach is None and device.type == "cuda"):
        return _foreach
    if foreach is None and device.type == "cpu":
        return _blocks if fused is False or not kernel.found() else _exact_kernel
    return _loop


def update_(
    triples: Sequence[Triple], rule: Rule, foreach: bool | None, fused: bool | None
) -> None:
    """Apply the rule to dense parameters, on the path that suits each device.

    Args:
        triples: what to update, in place.
        rule: the hyper-parameters.
        foreach: as :class:`~avalanche_classp.CLASSPOptimizer`.
        fused: likewise.
    """
    by_device: dict[torch.device, list[Triple]] = {}
    for triple in triples:
        by_device.setdefault(triple[0].device, []).append(triple)
    for device, some in by_device.items():
        choose_path(device, foreach, fused)(some, rule)


def usable(
    grads: Sequence[Tensor], limits: Sequence[float], fused: Sequence[bool | None]
) -> list[bool]:
    """Tell of each gradient whether no entry is NaN or, without its sign, above a limit.

    Waits once for each device that is not the CPU.

    Args:
        grads: gradients, or the values of sparse ones.
        limits: a limit for each, above 0.
        fused: the setting of each one's group.
    """
    verdicts = [True] * len(grads)
    for_kernel: dict[tuple[torch.dtype, float], list[int]] = {}
    elsewhere: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, (grad, limit) in enumerate(zip(grads, limits, strict=True)):
        if grad.numel() == 0:
            continue
        if fused[i] is not False and kernel.found() and kernel.takes(grad):
            for_kernel.setdefault((grad.dtype, limit), []).append(i)
        elif grad.is_cpu and type(grad) is Tensor:
            verdicts[i] = _usable_on_cpu(grad, limit)
        else:
            elsewhere.setdefault((grad.device, grad.dtype), []).append(i)
    for (_, limit), some in for_kernel.items():
        if not kernel.usable([grads[i] for i in some], limit):
            for i in some:
                verdicts[i] = kernel.usable([grads[i]], limit)
    for some in elsewhere.values():
        largest = torch.stack(torch._foreach_norm([grads[i] for i in some], math.inf)).tolist()
        for i, value in zip(some, largest, strict=True):
            verdicts[i] = value <= limits[i]  # False for NaN
    return verdicts


def _usable_on_cpu(grad: Tensor, limit: float) -> bool:
    if grad.dtype in (torch.float32, torch.float64) and grad.is_contiguous():
        # A sum of squares takes half the time, and no entry is above its root.
        flat = grad.view(-1)
        if torch.dot(flat, flat).item() < _sure_sum(grad.dtype, limit):
            return True
    low, high = (end.item() for end in torch.aminmax(grad))
    return -limit <= low and high <= limit  # False for NaN


@lru_cache(maxsize=256)
def _sure_sum(dtype: torch.dtype, limit: float) -> float:
    """Return a sum of squares below which no entry is above the limit, rounding included."""
    return 0.9 * min(limit * limit, torch.finfo(dtype).max)


def _loop(triples: Sequence[Triple], rule: Rule) -> None:
    for triple in triples:
        classp_update_(*triple, rule)


def _exact_kernel(triples: Sequence[Triple], rule: Rule) -> None:
    """Take the kernel where it gives the rule's own bits, so that no result depends on it."""
    (_kernel if rule.power in (1, 2) and kernel.is_exact() else _blocks)(triples, rule)


def _kernel(triples: Sequence[Triple], rule: Rule) -> None:
    taken: dict[torch.dtype, list[Triple]] = {}
    others = []
    for triple in triples:
        if kernel.takes(*triple):
            taken.setdefault(triple[0].dtype, []).append(triple)
        else:
            others.append(triple)
    for some in taken.values():
        kernel.update_(some, rule)
    _blocks(others, rule)


def _blocks(triples: Sequence[Triple], rule: Rule) -> None:
    for param, grad, accumulator in triples:
        small = param.numel() <= _SMALL
        flat = None if small else _flattened(param, grad, accumulator)
        if flat is None:
            classp_update_(param, grad, accumulator, rule)
        else:
            buffers = _buffers(accumulator.dtype)
            for p, g, a in _cut(flat):
                _update_block_(p, g, a, rule, *(b[: p.numel()] for b in buffers))


def _update_block_(p: Tensor, g: Tensor, a: Tensor, rule: Rule, x: Tensor, y: Tensor) -> None:
    """Apply the rule to a block, in two buffers of its size."""
    if g.dtype != a.dtype:
        g = x.copy_(g)
    if rule.threshold > 0:
        g = torch.ops.aten.hardshrink.out(g, cutoff(rule.threshold, a.dtype), out=x)
    if rule.skip_nonfinite:
        usable = torch.abs(g, out=y) <= largest_usable_gradient(a.dtype, rule.power)
        g = torch.where(usable, g, y.zero_(), out=x)
    step = rule.lr if rule.maximize else -rule.lr

    if rule.power == 2:
        a.addcmul_(g, g)
    else:
        torch.abs(g, out=y)
        a.add_(y if rule.power == 1 else y.pow_(rule.power))
    if not rule.apply_decay:
        p.add_(g, alpha=step)
        return
    torch.add(a, rule.epsilon, out=y)
    if root_may_vanish(a.dtype, rule.epsilon, rule.power):
        if rule.power == 2:
            torch.mul(g, y.rsqrt_(), out=y)
        else:
            torch.div(g, y if rule.power == 1 else y.pow_(1 / rule.power), out=y)
        p.add_(y.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_(-1, 1), alpha=step)
    elif rule.power == 2:
        p.addcmul_(g, y.rsqrt_(), value=step)
    else:
        p.addcdiv_(g, y if rule.power == 1 else y.pow_(1 / rule.power), value=step)


def _flattened(*tensors: Tensor) -> list[Tensor] | None:
    """Return views with one dimension, or None where the tensors' memory is not in one order."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    first = tensors[0]
    if first.layout != torch.strided or any(t.stride() != first.stride() for t in tensors):
        return None
    if not kernel.is_dense(tuple(first.shape), first.stride()):
        return None
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]


def _cut(flat: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    size = flat[0].numel()
    if size <= _BLOCK:
        yield flat
        return
    for begin in range(0, size, _BLOCK):
        yield [t[begin : begin + _BLOCK] for t in flat]


_kept = threading.local()


def _buffers(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return two buffers; kept, since fresh memory costs more than what is done with it."""
    if not hasattr(_kept, "buffers"):
        _kept.buffers = {}
    if dtype not in _kept.buffers:
        _kept.buffers[dtype] = tuple(torch.empty(2, _BLOCK, dtype=dtype).unbind())
    return _kept.buffers[dtype]


def _foreach(triples: Sequence[Triple], rule: Rule) -> None:
    for lists in _lists(triples):
        _foreach_update_(*lists, rule)


def _lists(
    triples: Sequence[Triple],
) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Return parameters, gradients and accumulators as lists, for each mix of dtypes."""
    by_dtypes: dict[tuple[torch.dtype, ...], list[Triple]] = {}
    for triple in triples:
        by_dtypes.setdefault(tuple(t.dtype for t in triple), []).append(triple)
    for some in by_dtypes.values():
        params, grads, accumulators = zip(*some, strict=True)
        yield list(params), list(grads), list(accumulators)


def _foreach_update_(
    params: list[Tensor], grads: list[Tensor], accumulators: list[Tensor], rule: Rule
) -> None:
    """Apply the rule to lists of tensors; all of a list have the same dtype and device."""
    dtype = accumulators[0].dtype
    if grads[0].dtype != dtype:
        grads = [g.to(dtype) for g in grads]
    if rule.threshold > 0:
        c = cutoff(rule.threshold, dtype)
        grads = [torch.nn.functional.hardshrink(g, c) for g in grads]
    if rule.skip_nonfinite:
        limit = largest_usable_gradient(dtype, rule.power)
        grads = [torch.where(g.abs() <= limit, g, 0.0) for g in grads]
    step = rule.lr if rule.maximize else -rule.lr

    if rule.power == 2:
        torch._foreach_addcmul_(accumulators, grads, grads)
    else:
        sizes = torch._foreach_abs(grads)
        if rule.power != 1:
            torch._foreach_pow_(sizes, rule.power)
        torch._foreach_add_(accumulators, sizes)
    if not rule.apply_decay:
        torch._foreach_add_(params, grads, alpha=step)
        return
    roots = torch._foreach_add(accumulators, rule.epsilon)
    if rule.power == 2:
        torch._foreach_rsqrt_(roots)
    elif rule.power != 1:
        torch._foreach_pow_(roots, 1 / rule.power)
    if root_may_vanish(dtype, rule.epsilon, rule.power):
        combine = torch._foreach_mul if rule.power == 2 else torch._foreach_div
        moves = [u.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0) for u in combine(grads, roots)]
        torch._foreach_clamp_min_(moves, -1)
        torch._foreach_clamp_max_(moves, 1)
        torch._foreach_add_(params, moves, alpha=step)
    elif rule.power == 2:
        torch._foreach_addcmul_(params, grads, roots, value=step)
    else:
        torch._foreach_addcdiv_(params, grads, roots, value=step)


class _Constants(NamedTuple):
    """What ``torch.compile`` may take for constant: all of a rule but the learning rate."""

    cutoff: float
    limit: float | None
    epsilon: float
    power: float
    apply_decay: bool
    may_vanish: bool


def _compiled(triples: Sequence[Triple], rule: Rule) -> None:
    for lists in _lists(triples):
        dtype = lists[2][0].dtype
        limit = largest_usable_gradient(dtype, rule.power) if rule.skip_nonfinite else None
        constants = _Constants(
            cutoff(rule.threshold, dtype),
            limit,
            rule.epsilon,
            rule.power,
            rule.apply_decay,
            root_may_vanish(dtype, rule.epsilon, rule.power),
        )
        # A tensor, so that schedulers do not make it compile again.
        step = torch.tensor(rule.lr if rule.maximize else -rule.lr, dtype=dtype)
        _compiled_update()(*lists, step, constants)


@lru_cache(maxsize=1)
def _compiled_update() -> Callable[..., None]:
    return torch.compile(_compilable_update_)


def _compilable_update_(
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
        a.add_(u * u if rule.power == 2 else u.abs() ** rule.power)
        if rule.apply_decay:
            base = a + rule.epsilon
            u = u * base.rsqrt() if rule.power == 2 else u / base ** (1 / rule.power)
            if rule.may_vanish:
                u = u.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(-1, 1)
        p.add_(u * step)
