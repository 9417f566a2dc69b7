"""Ways to take a CLASSP step; the tests hold each to ``rule.classp_update_``.

* ``single_tensor``: the rule, parameter by parameter, whole or in blocks that stay in the caches.
  Whole is the ground truth.
* ``multi_tensor``: one operation over all parameters of a device, so few launches on a GPU.
* ``compiled``: one pass over memory on a GPU, by ``torch.compile``.
* ``cpu_kernel``: one pass over memory on a CPU, by a kernel in C++. ``torch.compile`` is no
  substitute there: it needs the same C++ compiler, in every process, and its step takes 1.3 to 2
  times as long with the powers 1 and 2, 5 to 10 times with 1.5 (0.27 and 1.8 M parameters, one
  thread).

Gradients are checked before anything changes. To book what is not finite while the step runs, and
to undo it, would need a copy of weights and accumulators: twice the writing, to save one reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from avalanche_classp.optim.backends import compiled, cpu_kernel, multi_tensor, single_tensor
from avalanche_classp.optim.backends.single_tensor import Triple
from avalanche_classp.optim.rule import Rule

__all__ = ["Backend", "Triple", "choose_backend", "find_nonfinite", "update_"]

Backend = Callable[[Sequence[Triple], Rule], None]


def choose_backend(device: torch.device, foreach: bool | None, fused: bool | None) -> Backend:
    """Return the backend for the parameters on a device, by their group's settings."""
    if fused and device.type != "cpu":
        return compiled.update_
    if fused:
        return cpu_kernel.update_ if cpu_kernel.build() else single_tensor.update_in_blocks_
    if foreach or (foreach is None and device.type == "cuda"):
        return multi_tensor.update_
    if foreach is None and device.type == "cpu":
        ready = fused is None and cpu_kernel.found()
        return cpu_kernel.update_ if ready else single_tensor.update_in_blocks_
    return single_tensor.update_


def update_(
    triples: Sequence[Triple], rule: Rule, foreach: bool | None, fused: bool | None
) -> None:
    """Apply the rule to dense parameters in place, with the backend that suits each device."""
    by_device: dict[torch.device, list[Triple]] = {}
    for triple in triples:
        by_device.setdefault(triple[0].device, []).append(triple)
    for device, some in by_device.items():
        choose_backend(device, foreach, fused)(some, rule)


def find_nonfinite(
    grads: Sequence[Tensor], limits: Sequence[float], fused: Sequence[bool | None]
) -> list[int]:
    """Return which gradients have an entry that is NaN or, without its sign, above the limit.

    Each has a limit, and its group's setting of ``fused``. Of sparse gradients give the values.
    Waits once for each device that is not the CPU.
    """
    bad: list[int] = []
    for_kernel: dict[tuple[torch.dtype, float], list[int]] = {}
    elsewhere: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, (grad, limit) in enumerate(zip(grads, limits, strict=True)):
        if grad.numel() == 0:
            continue
        if fused[i] is not False and cpu_kernel.found() and cpu_kernel.takes(grad):
            for_kernel.setdefault((grad.dtype, limit), []).append(i)
        elif grad.is_cpu and type(grad) is Tensor:
            if not _is_usable(grad, limit):
                bad.append(i)
        else:
            elsewhere.setdefault((grad.device, grad.dtype), []).append(i)
    for (_, limit), some in for_kernel.items():
        if not cpu_kernel.usable([grads[i] for i in some], limit):
            bad += [i for i in some if not cpu_kernel.usable([grads[i]], limit)]
    for some in elsewhere.values():
        largest = torch.stack(torch._foreach_norm([grads[i] for i in some], math.inf)).tolist()
        # Not value > limit, which is False for NaN.
        bad += [i for i, value in zip(some, largest, strict=True) if not value <= limits[i]]
    return sorted(bad)


def _is_usable(grad: Tensor, limit: float) -> bool:
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
