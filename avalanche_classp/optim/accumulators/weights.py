"""One accumulator for each weight: the paper's rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from avalanche_classp.optim import backends
from avalanche_classp.optim.accumulators.base import (
    Accumulator,
    State,
    Update,
    require_numbers,
    require_type,
)
from avalanche_classp.optim.rule import Rule, accumulator_dtype, sparse_update_
from avalanche_classp.optim.sharding import is_dtensor, local

__all__ = ["WeightsAccumulator"]


class WeightsAccumulator(Accumulator):
    """``state["accumulator"]`` is A, of the parameter's shape, float32 or float64."""

    key = "accumulator"

    def new(self, param: Tensor, group: Mapping[str, Any], bias: Tensor | None = None) -> State:
        """Return zeros."""
        zeros = torch.zeros_like(
            param, dtype=accumulator_dtype(param), memory_format=torch.preserve_format
        )
        return {"accumulator": zeros}

    def update_(self, updates: Sequence[Update], rule: Rule, group: Mapping[str, Any]) -> None:
        """Apply the rule; sparse gradients touch the entries that they name."""
        dense = []
        for param, grad, state, *_ in updates:
            weights, accumulator = local(param), local(state["accumulator"])
            if grad.is_sparse:
                sparse_update_(weights, grad, accumulator, rule)
            else:
                dense.append((weights, grad, accumulator))
        backends.update_(dense, rule, group["foreach"], group["fused"])

    def resize(self, state: Mapping[str, Any], param: Tensor) -> State | None:
        """Return A with zeros where the parameter has grown."""
        history, dtype = state["accumulator"], accumulator_dtype(param)
        if history.shape == param.shape:
            return {"accumulator": history.to(param.device, dtype)}
        same_rank = history.dim() == param.dim()
        if not same_rank or any(o > n for o, n in zip(history.shape, param.shape, strict=True)):
            return None
        grown = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        grown[tuple(slice(size) for size in history.shape)] = history.to(param.device)
        return {"accumulator": grown}

    def shape(self, state: Mapping[str, Any], param: Tensor) -> torch.Size:
        """Return A's shape."""
        return state["accumulator"].shape

    def consolidate_(self, state: State, factor: float, epsilon: float) -> None:
        """Multiply A, up to the square root of the dtype's largest number."""
        accumulator = local(state["accumulator"])
        raised = (accumulator * factor).clamp_max_(torch.finfo(accumulator.dtype).max ** 0.5)
        torch.maximum(accumulator, raised, out=accumulator)

    def diagonal(self, state: Mapping[str, Any], param: Tensor) -> Tensor:
        """Return A itself."""
        return state["accumulator"]

    def require_loadable(self, name: str, state: Mapping[str, Any], param: Tensor) -> None:
        """Raise if A is not dense, finite, >= 0 and of the parameter's shape."""
        saved = state["accumulator"]
        what = f"accumulator of parameter {name}"
        require_type(what, saved, Tensor)
        if is_dtensor(saved) != is_dtensor(param):
            raise ValueError(
                f"state_dict's {what} is a {type(saved).__name__}, the parameter a "
                f"{type(param).__name__}; load it with "
                f"torch.distributed.checkpoint.state_dict.set_optimizer_state_dict and "
                f"full_state_dict=True"
            )
        if saved.shape != param.shape:
            raise ValueError(
                f"state_dict's {what} has the shape {tuple(saved.shape)}, the parameter "
                f"{tuple(param.shape)}; if the model has grown use "
                f"avalanche_classp.carry_accumulators"
            )
        require_numbers(what, saved, param, 0)
