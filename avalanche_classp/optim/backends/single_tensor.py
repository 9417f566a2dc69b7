"""The rule, parameter by parameter: whole, or in blocks that stay in the caches."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from avalanche_classp.optim.rule import Rule, classp_update_

__all__ = ["Triple", "is_dense", "update_", "update_in_blocks_"]

Triple = tuple[Tensor, Tensor, Tensor]
"""A parameter, its dense gradient, and its accumulator."""

_BLOCK = 1 << 18
"""Entries: enough for the cost of a call not to count, few enough for the caches."""

_SMALL = 1 << 13
"""Entries whose temporaries cost less than views of buffers."""


def update_(triples: Sequence[Triple], rule: Rule) -> None:
    """Apply the rule to whole parameters; temporaries are as large as a parameter."""
    for triple in triples:
        classp_update_(*triple, rule)


def update_in_blocks_(triples: Sequence[Triple], rule: Rule) -> None:
    """Apply the rule to blocks of parameters, in buffers that are kept."""
    for triple in triples:
        flat = None if triple[0].numel() <= _SMALL else _flattened(triple)
        if flat is None:
            classp_update_(*triple, rule)
            continue
        buffers = _buffers(triple[2].dtype)
        for p, g, a in zip(*(t.split(_BLOCK) for t in flat), strict=True):
            x, y = (buffer[: p.numel()] for buffer in buffers)
            classp_update_(p, g, a, rule, (x, y))


def _flattened(tensors: Triple) -> list[Tensor] | None:
    """Return views with one dimension, or None where the tensors' memory is not in one order."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    first = tensors[0]
    if first.layout != torch.strided or any(t.stride() != first.stride() for t in tensors):
        return None
    if not is_dense(tuple(first.shape), first.stride()):
        return None
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]


@lru_cache(maxsize=256)
def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Tell whether such a tensor fills its memory without gaps, in whatever order."""
    expected = 1
    for step, size in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= size
    return True


_kept = threading.local()


def _buffers(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return two buffers; kept, since fresh memory costs more than what is done with it."""
    if not hasattr(_kept, "buffers"):
        _kept.buffers = {}
    if dtype not in _kept.buffers:
        _kept.buffers[dtype] = torch.empty(2, _BLOCK, dtype=dtype, device="cpu").unbind()
    return _kept.buffers[dtype]
