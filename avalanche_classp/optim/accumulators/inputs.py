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
    Reduce,
    State,
    Update,
    require_numbers,
    require_type,
)
from avalanche_classp.optim.rule import Rule, accumulator_dtype, apply_threshold
from avalanche_classp.optim.sharding import is_dtensor

__all__ = ["InputsAccumulator", "new_moments", "observe_", "rows_wanted"]

EVERY = 25
"""Steps between renewals of basis and root; fewer at the beginning: 1, 2, 4, 8, 16."""

NEW_DIRECTIONS = 32
"""Directions that a renewal may take into the basis, the largest of a mini-batch's."""

MANY_ROWS, FEW_ROWS = 512, 32
"""Rows of a mini-batch that are enough: for exact moments and new directions; for the others."""

CANDIDATES = 128
"""Rows among which it looks for them; of more, random combinations."""


def new_moments(param: Tensor, rank: int, constant: bool) -> State:
    """Return the state of a weight without history.

    Args:
        param: the weight, of shape (outputs, ...).
        rank: directions that are told apart.
        constant: whether a 1 for a bias stands before the inputs.

    Returns:
        ``basis``, V of shape (inputs, directions); ``moments``, S; ``rest``, the sum of what lies
        outside of V; ``factor``, the root for each direction of V, and ``free``, that of all
        others; ``step`` and ``renewed``, the steps taken and those at the last renewal;
        ``constant``. Before a renewal ``rows`` holds the mini-batches' rows.
    """
    inputs = param.shape[1:].numel() + constant
    kind: Any = {"dtype": accumulator_dtype(param), "device": param.device}
    directions = min(rank, inputs)
    return {
        "basis": torch.eye(inputs, directions, **kind),
        "moments": torch.zeros(directions, directions, **kind),
        "rest": torch.zeros((), **kind),
        "factor": torch.ones(directions, **kind),
        "free": 1.0,
        "step": 0,
        "renewed": -1,
        "constant": constant,
    }


def is_due(state: Mapping[str, Any]) -> bool:
    """Tell whether basis and root are to be renewed in this step."""
    since = state["step"] - state["renewed"]
    return since >= min(EVERY, max(1, state["renewed"]))


def rows_wanted(state: Mapping[str, Any]) -> int:
    """Return how many rows of the next mini-batch are enough, about."""
    return MANY_ROWS if is_due(state) else FEW_ROWS


@torch.no_grad()
def observe_(state: State, rows: Tensor) -> None:
    """Add the mean of x xᵀ over the rows of a mini-batch.

    Args:
        state: :func:`new_moments`'s; changed in place.
        rows: of shape (rows, inputs), without the 1 for a bias. What is not finite does not count.
    """
    basis, constant, count = state["basis"], state["constant"], len(rows)
    V = basis[int(constant) :]
    inside = torch.addmm(basis[0], rows, V) if constant else rows @ V
    outside = rows.square().sum() / count + constant - inside.square().sum() / count
    usable = outside.isfinite()
    inside = torch.where(usable, inside, 0.0)
    state["moments"].addmm_(inside.T, inside, alpha=1 / count)
    state["rest"] += torch.where(usable, outside, 0.0)
    if is_due(state):
        rows = torch.nn.functional.pad(rows, (int(constant), 0), value=1.0)
        rows = torch.where(usable, rows, 0.0)
        state["rows"] = torch.cat([state["rows"], rows]) if "rows" in state else rows


def shrink(moments: Tensor, rule: Rule) -> Tensor:
    """Return (1 + moments / epsilon)^(-1/power), what a step is multiplied with."""
    return (1 + moments / rule.epsilon) ** (-1 / rule.power)


def renew_(state: State, rule: Rule, reduce: Reduce | None = None) -> None:
    """Turn the basis to A's eigenvectors, with new ones for the least, and take A's root.

    Args:
        state: :func:`new_moments`'s; changed in place.
        rule: the hyper-parameters.
        reduce: how the processes that train one model share what each has seen. Default: there is
            one process.
    """
    basis, moments, rest = state["basis"], state["moments"], state["rest"]
    inputs, directions = basis.shape
    rows = state.pop("rows", basis.new_zeros(0, inputs))
    if reduce or len(rows) > CANDIDATES:
        # A generator of its own: the user's random numbers stay as they are.
        seed = state["step"] + (reduce.rank << 32 if reduce else 0)
        generator = torch.Generator("cpu").manual_seed(seed)
        mix = torch.randn(CANDIDATES, len(rows), generator=generator, device="cpu")
        rows = mix.to(rows) @ rows
    if reduce:
        for tensor in (moments, rest, rows):
            reduce.mean_(tensor)
    outside = rows - rows @ basis @ basis.T
    energy = outside.square().sum()
    # In float64: in float32 it may not converge where most of the matrix is almost zero.
    _, vectors = torch.linalg.eigh((outside @ outside.T).double())
    most = min(NEW_DIRECTIONS, len(rows), inputs - directions)
    largest = vectors[:, len(rows) - most :].to(rows)
    new, triangle = torch.linalg.qr(outside.T @ largest)
    # These rows stand for all that has been outside; before anything was, they count for nothing.
    share = rest.clamp_min(0) / energy.clamp_min(1e-30)
    extended = torch.block_diag(moments, triangle @ triangle.T * share.clamp_min(1e-12))
    values, vectors = (found.to(basis) for found in torch.linalg.eigh(extended.double()))
    # Rounding adds up over renewals.
    basis, _ = torch.linalg.qr(torch.cat([basis, new], 1) @ vectors[:, -directions:])
    if reduce:
        for tensor in (basis, values):
            reduce.same_(tensor)
    values = values[-directions:].clamp_min(0)
    rest = (moments.trace() + rest - values.sum()).clamp_min(0)
    others = torch.maximum(rest / max(inputs - directions, 1), values[0] / 2)
    state |= {
        "basis": basis,
        "moments": torch.diag(values),
        "rest": rest,
        "factor": shrink(values, rule),
        "free": shrink(others, rule).item(),
        "renewed": state["step"],
    }


def descend_(
    weight: Tensor,
    bias: Tensor | None,
    gradients: tuple[Tensor, Tensor | None],
    state: Mapping[str, Any],
    step: float,
) -> None:
    """Add step · G (I + A / epsilon)^(-1/power) to [W b].

    Args:
        weight: W, of shape (outputs, inputs); changed in place.
        bias: b, or None if it does not move.
        gradients: G in two parts, the weight's and the bias's.
        state: :func:`new_moments`'s.
        step: the learning rate with its sign.
    """
    V, free = state["basis"], state["free"]
    G, g = gradients
    ones, V = V[0], V[int(state["constant"]) :]
    inside = G @ V
    if g is not None:
        inside += g[:, None] * ones
    inside *= state["factor"] - free
    weight.add_(G, alpha=step * free).addmm_(inside, V.T, alpha=step)
    if bias is not None and g is not None:
        bias.add_(g * free + inside @ ones, alpha=step)


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

    def rows_wanted(self, state: Mapping[str, Any]) -> int:
        """Return how many rows of the next mini-batch are enough, about."""
        return rows_wanted(state)

    def observe_(self, state: State, rows: Tensor) -> None:
        """Take the rows of a mini-batch, of shape (rows, inputs), without a 1 for a bias."""
        observe_(state, rows)

    def renew_(self, state: State, rule: Rule, reduce: Reduce | None = None) -> None:
        """Prepare for a step; see :func:`renew_`."""
        if is_due(state):
            renew_(state, rule, reduce)

    def descend_(
        self,
        weight: Tensor,
        bias: Tensor | None,
        gradients: tuple[Tensor, Tensor | None],
        state: Mapping[str, Any],
        step: float,
    ) -> None:
        """Step; see :func:`descend_`."""
        descend_(weight, bias, gradients, state, step)

    def update_(self, updates: Sequence[Update], rule: Rule, group: Mapping[str, Any]) -> None:
        """Renew the root where it is due, precondition, and step; a bias moves with its weight."""
        for param, grad, state, bias, reduce in updates:
            self.renew_(state, rule, reduce)
            state["step"] += 1
            dtype, limit = accumulator_dtype(param), self.limit(param, rule.power)
            G = apply_threshold(grad.flatten(1), dtype, rule, limit=limit)
            g = None
            if state["constant"] and bias is not None and bias.grad is not None:
                g = apply_threshold(bias.grad, dtype, rule, limit=limit)
            # The parameter's own memory, if it lies there in this order and dtype.
            weight = param.flatten(1).to(dtype)
            if not rule.apply_decay:
                weight.add_(G, alpha=rule.step)
                if bias is not None and g is not None:
                    bias.add_(g, alpha=rule.step)
            elif rule.threshold > 0 or rule.skip_nonfinite:
                U, u = torch.zeros_like(G), None if g is None else torch.zeros_like(g)
                self.descend_(U, u, (G, g), state, rule.step)
                weight.add_(U.masked_fill_(G == 0, 0))
                if bias is not None and g is not None and u is not None:
                    bias.add_(u.masked_fill_(g == 0, 0))
            else:
                self.descend_(weight, bias, (G, g), state, rule.step)
            if weight.data_ptr() != param.data_ptr():
                param.copy_(weight.view(param.shape))

    def resize(self, state: Mapping[str, Any], param: Tensor) -> State | None:
        """Return the moments, with zeros for new inputs."""
        if param.dim() < 2:
            return None
        dtype = accumulator_dtype(param)
        resized = {
            name: value.to(param.device, dtype) if isinstance(value, Tensor) else value
            for name, value in state.items()
            if name != "rows"
        }
        more = param.shape[1:].numel() + state["constant"] - len(state["basis"])
        if more < 0:
            return None
        if more:
            resized["basis"] = torch.nn.functional.pad(resized["basis"], (0, 0, 0, more))
        return resized

    def shape(self, state: Mapping[str, Any], param: Tensor) -> torch.Size:
        """Return the parameter's shape where its inputs are as many, or else outputs × inputs."""
        return self.shape_with(len(state["basis"]) - state["constant"], param)

    def shape_with(self, inputs: int, param: Tensor) -> torch.Size:
        """Return the parameter's shape where it has so many inputs, or else outputs × inputs."""
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
            ("factor", 1, 0),
            ("rest", 0, -torch.inf),
        ):
            what = f"{key} of parameter {name}"
            require_type(what, state.get(key), Tensor)
            if state[key].dim() != dimensions:
                raise ValueError(f"state_dict's {what} has the shape {tuple(state[key].shape)}")
            require_numbers(what, state[key], param, least)
        self.require_counts(name, state)
        require_type(f"free of parameter {name}", state.get("free"), int, float)
        inputs, directions = state["basis"].shape
        matches = state["moments"].shape == (directions, directions)
        matches = matches and state["factor"].shape == (directions,)
        known = param.dim() >= 2 and inputs == param.shape[1:].numel() + state["constant"]
        if not (matches and known and 0 < directions <= inputs):
            raise ValueError(
                f"state_dict's moments of parameter {name} are for {inputs} inputs and "
                f"{directions} directions, the parameter has the shape {tuple(param.shape)}; if "
                f"the model has grown use avalanche_classp.carry_accumulators"
            )

    def require_counts(self, name: str, state: Mapping[str, Any]) -> None:
        """Raise if the parts of a saved state that are no tensors are of another type."""
        for key in ("step", "renewed"):
            require_type(f"{key} of parameter {name}", state.get(key), int)
        if not isinstance(state.get("constant"), bool):
            raise TypeError(f"state_dict's constant of parameter {name} must be a bool")
