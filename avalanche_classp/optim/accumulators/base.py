"""What every kind of accumulator can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from avalanche_classp.optim.rule import Rule, accumulator_dtype, largest_usable_gradient
from avalanche_classp.optim.sharding import local

__all__ = [
    "Accumulator",
    "Reduce",
    "State",
    "Update",
    "has_values",
    "require_numbers",
    "require_type",
]

State = dict[str, Any]
"""What an optimizer's ``state`` holds of one parameter."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Reduce:
    """The mean of sums over the processes of a group, and one process's tensors in all."""

    def __init__(self, group: Any) -> None:
        self.group = group

    @property
    def rank(self) -> int:
        """The place of this process in the group."""
        return torch.distributed.get_rank(self.group)

    @property
    def size(self) -> int:
        """The number of processes."""
        return torch.distributed.get_world_size(self.group)

    def mean_(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over the processes."""
        torch.distributed.all_reduce(tensor, group=self.group)
        tensor /= self.size

    def same_(self, tensor: Tensor) -> None:
        """Replace a tensor by that of the first process."""
        first = torch.distributed.get_global_rank(self.group, 0)
        torch.distributed.broadcast(tensor, first, group=self.group)


class Update(NamedTuple):
    """A parameter that a step updates.

    Attributes:
        param: the parameter.
        grad: its gradient; of a DTensor this process's part, summed over the processes.
        state: its state, with a history of the kind.
        bias: of a weight whose inputs are watched, the bias that moves with it.
        reduce: how the processes that train one model share what each has seen.
    """

    param: Tensor
    grad: Tensor
    state: State
    bias: Tensor | None = None
    reduce: Reduce | None = None


class Accumulator(ABC):
    """A kind of accumulator."""

    key: str
    """The entry of a state by which it is known to be of this kind."""

    def takes(self, param: Tensor) -> bool:
        """Tell whether a parameter can have such a history."""
        return True

    def limit(self, param: Tensor, power: float) -> float:
        """Return the largest |g| that the accumulator can take."""
        return largest_usable_gradient(accumulator_dtype(param), power)

    def refusal(self, param: Tensor) -> str | None:
        """Say what in a parameter or its gradient the kind cannot handle, or None."""
        return None

    @abstractmethod
    def new(self, param: Tensor, group: Mapping[str, Any], bias: Tensor | None = None) -> State:
        """Return the state of a parameter without history; see :class:`Update` for the bias."""

    @abstractmethod
    def update_(self, updates: Sequence[Update], rule: Rule, group: Mapping[str, Any]) -> None:
        """Accumulate, precondition and step, in place, for parameters of one group."""

    @abstractmethod
    def resize(self, state: Mapping[str, Any], param: Tensor) -> State | None:
        """Return a history for a parameter that may have grown or moved; not always a copy.

        What is new, at the end of each dimension, begins without history. None if the parameter has
        changed its shape otherwise.
        """

    @abstractmethod
    def shape(self, state: Mapping[str, Any], param: Tensor) -> torch.Size:
        """Return the shape that a parameter with this history has had."""

    @abstractmethod
    def consolidate_(self, state: State, factor: float, epsilon: float) -> None:
        """Multiply a history in place, up to what can be told from rounding."""

    @abstractmethod
    def diagonal(self, state: Mapping[str, Any], param: Tensor) -> Tensor:
        """Return the history of each weight by itself, of the parameter's shape."""

    @abstractmethod
    def require_loadable(self, name: str, state: Mapping[str, Any], param: Tensor) -> None:
        """Raise TypeError or ValueError if a saved state is not one of such a parameter."""

    def fit_(self, state: State, param: Tensor, group: Mapping[str, Any]) -> None:
        """Bring a state to where ``model.to()`` has put the parameter."""
        dtype = accumulator_dtype(param)
        for name, value in state.items():
            if isinstance(value, Tensor) and (value.device, value.dtype) != (param.device, dtype):
                state[name] = value.to(param.device, dtype)


def has_values(tensor: Tensor) -> bool:
    """Tell whether a tensor has values to look at: not on meta, nor in a FakeTensorMode."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def require_type(what: str, value: Any, *types: type) -> None:
    """Raise TypeError if a part of a state_dict is of another type."""
    if not isinstance(value, types) or isinstance(value, bool):
        names = " or ".join(t.__name__ for t in types)
        raise TypeError(f"state_dict's {what} must be a {names}, got {type(value).__name__}")


def require_numbers(what: str, saved: Tensor, param: Tensor, least: float) -> None:
    """Raise ValueError if a saved tensor is not dense, finite and at least ``least``."""
    lost = saved.is_meta and not param.is_meta
    if saved.dtype not in DTYPES or saved.layout != torch.strided or lost:
        raise ValueError(
            f"state_dict's {what} must be dense and of a real floating-point dtype, got "
            f"{saved.dtype}, {saved.layout} on {saved.device}"
        )
    part = local(saved)
    if part.numel() and has_values(part):
        low, high = (end.item() for end in torch.aminmax(part))
        if not (low >= least and -torch.inf < low and high < torch.inf):
            at_least = "" if least == -torch.inf else f" and at least {least}"
            raise ValueError(
                f"state_dict's {what} must be finite{at_least}, but goes from {low} to {high}: it "
                f"is damaged, load another"
            )
