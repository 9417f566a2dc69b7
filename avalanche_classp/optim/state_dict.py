"""What a saved state of the optimizer must be like, and how it is taken over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from avalanche_classp.optim.accumulators import has_history, kind_of
from avalanche_classp.optim.accumulators.base import require_type
from avalanche_classp.optim.hyperparameters import SPECS, resolve, validate
from avalanche_classp.optim.rule import accumulator_dtype

__all__ = ["VERSION", "copy_accumulators", "require_loadable"]

VERSION = 1
"""The version of what ``state_dict()`` returns; raised when a release could misread another's."""

_ALWAYS_SAVED = ("params", *SPECS)
"""Keys of a saved group."""


def require_loadable(
    state_dict: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]]
) -> None:
    """Raise if this is not the state of a CLASSPOptimizer with such groups."""
    version = state_dict.get("version", VERSION)  # torch.distributed.checkpoint drops it
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"state_dict has version {version!r}, and this release of avalanche-classp reads "
            f"version {VERSION}; load it with the release that saved it"
        )
    if missing := [key for key in ("state", "param_groups") if key not in state_dict]:
        raise ValueError(f"state_dict is no optimizer's: it has no {missing[0]!r}")
    state, saved_groups = state_dict["state"], state_dict["param_groups"]
    require_type("state", state, Mapping)
    require_type("param_groups", saved_groups, list, tuple)
    ids: set[int | str] = set()
    for i, group in enumerate(saved_groups):
        _require_group(i, group)
        for saved_id in group["params"]:
            require_type(f"parameter {saved_id!r}", saved_id, int, str)
            if saved_id in ids:
                raise ValueError(f"state_dict's param_groups name parameter {saved_id!r} twice")
            ids.add(saved_id)
    # If the numbers differ, torch says so. Entries of the user's own pass, as torch's do.
    as_many = len(ids) == sum(len(group["params"]) for group in param_groups)
    for saved_id, values in state.items():
        if saved_id in ids:
            require_type(f"state[{saved_id!r}]", values, Mapping)
        elif as_many and isinstance(values, Mapping) and has_history(values):
            raise ValueError(
                f"state_dict's param_groups do not name parameter {saved_id!r}, of which it has an "
                f"accumulator"
            )
    for saved_group, group in zip(saved_groups, param_groups, strict=False):
        for saved_id, p in zip(saved_group["params"], group["params"], strict=False):
            values = state.get(saved_id)
            if kind := kind_of(values):
                kind.require_loadable(str(saved_id), values, p)


def _require_group(i: int, group: Any) -> None:
    require_type(f"param_groups[{i}]", group, Mapping)
    if missing := [key for key in _ALWAYS_SAVED if key not in group]:
        raise ValueError(
            f"state_dict is no CLASSPOptimizer's: its param_groups[{i}] has no {missing[0]!r}"
        )
    try:
        validate(group)
    except (TypeError, ValueError) as error:
        raise type(error)(f"state_dict's param_groups[{i}]: {error}") from None
    for name, value in resolve(group).items():
        if group[name] is None and value is not None:
            raise TypeError(f"state_dict's param_groups[{i}]: {name} must not be None")
    require_type(f"param_groups[{i}]['params']", group["params"], list, tuple)


def copy_accumulators(state_dict: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Give an optimizer copies of saved accumulators, where its parameters are.

    torch shares the tensors with the state_dict, where two optimizers would both add to them. It
    also casts them to the parameter's dtype, which would round the float32 accumulators of
    half-precision parameters.
    """
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for saved_id, p in zip(saved_ids, params, strict=True):
        for name, value in state_dict["state"].get(saved_id, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[p][name] = value.to(
                    device=p.device, dtype=accumulator_dtype(p), copy=True
                )
