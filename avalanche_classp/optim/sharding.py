"""Parameters whose parts lie in several processes (DTensors, as FSDP2 and tensor parallelism make).

The rule treats every weight by itself, so each process applies it to its own part. They must agree
on one thing only: whether a gradient is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["bad_anywhere", "is_dtensor", "local", "local_gradient"]


def is_dtensor(tensor: Any) -> bool:
    """Tell whether a tensor is a DTensor, without importing torch.distributed."""
    return type(tensor) not in (Tensor, Parameter) and hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """Return this process's part of a DTensor, sharing its memory; other tensors as they are."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_gradient(param: Any, grad: Any) -> Tensor:
    """Return the gradient of this process's part of a parameter, summed over the processes."""
    if is_dtensor(param) and is_dtensor(grad) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local(grad)


def bad_anywhere(bad: Sequence[int], params: Sequence[Any]) -> list[int]:
    """Return the positions in ``params`` that any process with parts of them has found."""
    found = list(bad)
    for mesh in dict.fromkeys(p.device_mesh for p in params if is_dtensor(p)):
        flags = torch.zeros(len(params), dtype=torch.int32, device="cpu")
        flags[found] = 1
        flags = flags.to(mesh.device_type)
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group)
        found = flags.nonzero().flatten().tolist()
    return found
