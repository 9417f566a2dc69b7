r"""A history for each direction of a layer's inputs, taken from the inputs themselves.

An extension of CLASSP, not in its paper. For a layer with weight W and bias b, whose input is 1:

.. math::

    A \leftarrow A + \operatorname{mean} x x^\top, \qquad
    [W\, b] \leftarrow [W\, b] - lr \cdot G \, (I + A / \epsilon)^{-1/p}

The mean is over the rows of a mini-batch: samples, or sampled positions of a convolution. With
squared error, p = 1, lr · epsilon = 1 and each sample seen once this is recursive least squares: a
linear layer then equals ridge regression on all that was seen, whatever the order. With p → ∞ or
epsilon → ∞ it is SGD.

A is kept as :math:`V S V^\top + \rho (I - V V^\top)`: an orthonormal basis V of ``rank``
directions, the moments S in it, and the mean ρ of all others. S grows with every mini-batch; V and
the root are renewed now and then. With as many directions as inputs nothing is lost.

Related: G. Zeng et al., "Continual learning of context-dependent processing in neural networks"
(OWM), 2019, https://arxiv.org/abs/1810.01256, takes mean inputs and p = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from avalanche_classp.optim.accumulators.base import (
    Accumulator,
    State,
    Update,
    require_numbers,
    require_type,
)
from avalanche_classp.optim.rule import Rule, accumulator_dtype, apply_threshold
from avalanche_classp.optim.sharding import is_dtensor

__all__ = ["InputsAccumulator", "new_moments", "observe_"]

EVERY = 25
"""Steps between renewals of basis and root; fewer at the beginning: 1, 2, 4, 8, 16."""

NEW_DIRECTIONS = 128
"""Random combinations of a mini-batch's rows that a renewal may take into the basis."""


def new_moments(param: Tensor, rank: int, constant: bool) -> State:
    """Return the state of a weight without history.

    Args:
        param: the weight, of shape (outputs, ...).
        rank: directions that are told apart.
        constant: whether a 1 for a bias stands before the inputs.

    Returns:
        ``basis``, V of shape (inputs, directions); ``moments``, S; ``rest``, the sum of what lies
        outside of V; ``factor``, the root in V's directions, and ``free``, that of the others;
        ``step`` and ``renewed``, the steps taken and those at the last renewal; ``constant``.
    """
    inputs = param.shape[1:].numel() + constant
    kind: Any = {"dtype": accumulator_dtype(param), "device": param.device}
    directions = min(rank, inputs)
    return {
        "basis": torch.eye(inputs, directions, **kind),
        "moments": torch.zeros(directions, directions, **kind),
        "rest": torch.zeros((), **kind),
        "factor": torch.eye(directions, **kind),
        "free": torch.ones((), **kind),
        "step": 0,
        "renewed": -1,
        "constant": constant,
    }


def is_due(state: Mapping[str, Any]) -> bool:
    """Tell whether basis and root are to be renewed in this step."""
    since = state["step"] - state["renewed"]
    return since >= min(EVERY, max(1, state["renewed"]))


@torch.no_grad()
def observe_(state: State, rows: Tensor, reduce: Any = None) -> None:
    """Add the mean of x xᵀ over the rows of a mini-batch.

    Args:
        state: :func:`new_moments`'s; changed in place.
        rows: of shape (rows, inputs). What is not finite does not count.
        reduce: a :class:`~avalanche_classp.optim.watch.Reduce` of the processes that share the
            state. Default: none do.
    """
    basis = state["basis"]
    whole = basis.shape[0] == basis.shape[1]
    if not whole and is_due(state):
        _renew_basis_(state, rows)
        for name in ("basis", "moments", "rest") if reduce else ():
            reduce.same_(state[name])
        basis = state["basis"]
    inside = rows if whole else rows @ basis
    moments = inside.T @ inside / len(rows)
    rest = (rows.square().sum() - inside.square().sum()).clamp_min(0) / len(rows)
    if reduce:
        reduce.mean_(moments)
        reduce.mean_(rest)
    usable = moments.isfinite().all() & rest.isfinite()
    state["moments"] += torch.where(usable, moments, 0.0)
    state["rest"] += torch.where(usable, rest, 0.0)


def _renew_basis_(state: State, rows: Tensor) -> None:
    """Take the directions of rows that lie outside of the basis into it, for the least in it."""
    basis, moments = state["basis"], state["moments"]
    directions = basis.shape[1]
    most = min(NEW_DIRECTIONS, len(basis) - directions)
    if len(rows) > most:
        generator = torch.Generator("cpu").manual_seed(state["step"])
        mix = torch.randn(most, len(rows), generator=generator, device="cpu")
        rows = mix.to(rows) @ rows
    outside = rows - rows @ basis @ basis.T
    outside = torch.where(outside.square().sum().isfinite(), outside, 0.0)
    new, triangle = torch.linalg.qr(outside.T)
    # These rows stand for all that has been outside; before anything was, they count for nothing.
    share = state["rest"] / triangle.square().sum().clamp_min(1e-30)
    extended = torch.block_diag(moments, triangle @ triangle.T * share.clamp_min(1e-12))
    # In float64: in float32 it may not converge where most of the matrix is almost zero.
    values, vectors = (found.to(basis) for found in torch.linalg.eigh(extended.double()))
    total = moments.trace() + state["rest"]
    kept = torch.cat([basis, new], 1) @ vectors[:, -directions:]
    # Rounding adds up over renewals.
    kept, triangle = torch.linalg.qr(kept)
    state["basis"] = torch.where(triangle.diagonal() < 0, -kept, kept)
    state["moments"] = torch.diag(values[-directions:].clamp_min(0))
    state["rest"] = (total - state["moments"].trace()).clamp_min(0)


def renew_root_(state: State, rule: Rule) -> None:
    """Make ``factor`` and ``free`` from the moments: (I + A / epsilon)^(-1/power)."""
    moments, basis = state["moments"], state["basis"]
    inputs, directions = basis.shape
    scaled = moments / rule.epsilon
    identity = torch.eye(directions, dtype=moments.dtype, device=moments.device)
    if rule.power == 1:
        state["factor"] = torch.cholesky_inverse(torch.linalg.cholesky(identity + scaled))
    else:
        values, vectors = torch.linalg.eigh(scaled)
        roots = (1 + values.clamp_min(0)) ** (-1 / rule.power)
        state["factor"] = (vectors * roots) @ vectors.T
    mean = state["rest"] / max(inputs - directions, 1)
    state["free"] = (1 + mean / rule.epsilon) ** (-1 / rule.power)
    state["renewed"] = state["step"]


def precondition(gradient: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return G (I + A / epsilon)^(-1/power) for G of shape (outputs, inputs)."""
    basis, factor, free = state["basis"], state["factor"], state["free"]
    if basis.shape[0] == basis.shape[1]:  # the identity
        return gradient @ factor
    inside = gradient @ basis
    # linear and not addmm, which is many times as slow with a transposed basis on a CPU.
    inside = inside @ factor - free * inside
    return torch.nn.functional.linear(inside, basis).add_(gradient * free)


class InputsAccumulator(Accumulator):
    """Moments of a layer's inputs; see :func:`new_moments` for the state.

    The optimizer's ``watch(model)`` finds the layers and has :func:`observe_` called.
    """

    key = "basis"

    def limit(self, param: Tensor, power: float) -> float:
        """Return the largest |g|; gradients are not accumulated."""
        return torch.finfo(accumulator_dtype(param)).max ** 0.5

    def refusal(self, param: Tensor) -> str | None:
        """Refuse DTensors."""
        return "a DTensor" if is_dtensor(param) else None

    def new(self, param: Tensor, group: Mapping[str, Any], bias: Tensor | None = None) -> State:
        """Return moments of zero."""
        return new_moments(param, group["rank"], bias is not None)

    def update_(self, updates: Sequence[Update], rule: Rule, group: Mapping[str, Any]) -> None:
        """Renew the root where it is due, precondition, and step; a bias moves with its weight."""
        for param, grad, state, bias in updates:
            if state["moments"].numel() and is_due(state):
                renew_root_(state, rule)
            state["step"] += 1
            limit = self.limit(param, rule.power)
            G = apply_threshold(grad.flatten(1), state["basis"].dtype, rule, limit=limit)
            if state["constant"]:
                g = G.new_zeros(len(G))
                if bias is not None and bias.grad is not None:
                    g = apply_threshold(bias.grad, G.dtype, rule, limit=limit)
                G = torch.cat([g[:, None], G], 1)
            U = precondition(G, state) if rule.apply_decay else G
            if rule.threshold > 0 or rule.skip_nonfinite:
                U = torch.where(G == 0, 0.0, U)
            if state["constant"]:
                if bias is not None:
                    bias.add_(U[:, 0], alpha=rule.step)
                U = U[:, 1:]
            param.add_(U.reshape(param.shape), alpha=rule.step)

    def resize(self, state: Mapping[str, Any], param: Tensor) -> State | None:
        """Return the moments, with zeros for new inputs."""
        if param.dim() < 2:
            return None
        dtype = accumulator_dtype(param)
        resized = {
            name: value.to(param.device, dtype) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        more = param.shape[1:].numel() + state["constant"] - len(state["basis"])
        if more < 0:
            return None
        if more:
            resized["basis"] = torch.nn.functional.pad(resized["basis"], (0, 0, 0, more))
        return resized

    def shape(self, state: Mapping[str, Any], param: Tensor) -> torch.Size:
        """Return the parameter's shape where its inputs are as many, or else outputs × inputs."""
        inputs = len(state["basis"]) - state["constant"]
        same = inputs == param.shape[1:].numel()
        return param.shape if same else torch.Size((len(param), inputs))

    def consolidate_(self, state: State, factor: float, epsilon: float) -> None:
        """Multiply the moments, up to where epsilon would be lost in rounding."""
        ceiling = epsilon / (8 * torch.finfo(state["moments"].dtype).eps)
        largest = torch.maximum(state["moments"].diagonal().max(), state["rest"])
        grown = (ceiling / largest).clamp(1, factor)
        state["moments"] = state["moments"] * grown
        state["rest"] = state["rest"] * grown
        state["renewed"] = -1

    def diagonal(self, state: Mapping[str, Any], param: Tensor) -> Tensor:
        """Return A's diagonal, each input's, without a bias's."""
        basis = state["basis"]
        inputs, directions = basis.shape
        inside = ((basis @ state["moments"]) * basis).sum(1)
        outside = 1 - basis.square().sum(1)
        own = inside + outside * state["rest"] / max(inputs - directions, 1)
        own = own[int(state["constant"]) :]
        return own.view(param.shape[1:]).expand(param.shape)

    def require_loadable(self, name: str, state: Mapping[str, Any], param: Tensor) -> None:
        """Raise if a part is missing, not finite, or of other inputs than the parameter's."""
        for key, dimensions, least in (
            ("basis", 2, -torch.inf),
            ("moments", 2, -torch.inf),
            ("factor", 2, -torch.inf),
            ("rest", 0, 0),
            ("free", 0, 0),
        ):
            what = f"{key} of parameter {name}"
            require_type(what, state.get(key), Tensor)
            if state[key].dim() != dimensions:
                raise ValueError(f"state_dict's {what} has the shape {tuple(state[key].shape)}")
            require_numbers(what, state[key], param, least)
        for key in ("step", "renewed"):
            require_type(f"{key} of parameter {name}", state.get(key), int)
        if not isinstance(state.get("constant"), bool):
            raise TypeError(f"state_dict's constant of parameter {name} must be a bool")
        inputs, directions = state["basis"].shape
        square = (directions, directions)
        matches = state["moments"].shape == state["factor"].shape == square
        known = param.dim() >= 2 and inputs == param.shape[1:].numel() + state["constant"]
        if not (matches and known and 0 < directions <= inputs):
            raise ValueError(
                f"state_dict's moments of parameter {name} are for {inputs} inputs and "
                f"{directions} directions, the parameter has the shape {tuple(param.shape)}; if "
                f"the model has grown use avalanche_classp.carry_accumulators"
            )
