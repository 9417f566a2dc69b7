"""A history for each direction of a layer's inputs, taken from gradients.

An extension of CLASSP, not in its paper. The inputs of a layer are correlated, as pixels and
activations are. So protecting single weights does not protect the function: a step along a
direction that earlier experiences used is made of many weights that each moved little. Orthogonal
weights modification (Zeng et al., 2019, arXiv:1810.01256) takes directions from the inputs of the
layers; this takes them from the gradients.
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
from avalanche_classp.optim.rule import (
    Rule,
    accumulator_dtype,
    apply_threshold,
    largest_usable_gradient,
)
from avalanche_classp.optim.sharding import is_dtensor

__all__ = ["ROWS", "GradientsAccumulator", "new_sketch", "sketch_update_"]

ROWS = 8
"""Random combinations of a gradient's rows that are remembered of each step."""


INPUTS, OUTPUTS = "", "out_"
"""What the names of a state's tensors begin with: the right side's, and the left side's."""


def sides_of(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the sides that a state has a history of."""
    return (INPUTS, OUTPUTS) if "out_sketch" in state else (INPUTS,)


def size_of(param: Tensor, side: str) -> int:
    """Return the number of a parameter's inputs, or of its outputs."""
    return len(param) if side == OUTPUTS else param.shape[1:].numel()


def columns_for(param: Tensor, rank: int, side: str) -> int:
    """Return how many columns a sketch has: rank, or as many as make one number per weight."""
    size = size_of(param, side)
    return min(rank, size, max(ROWS, param.numel() // max(size, 1)))


def new_sketch(param: Tensor, rank: int, both_sides: bool = False) -> dict[str, Any]:
    """Return the state of a parameter of shape (out, ...) without history.

    ``sketch`` is B of shape (inputs, columns), with orthogonal columns; all dimensions but the
    first count as the inputs. ``escaped`` is ρ, ``step`` the number of updates. With ``both_sides``
    also ``out_sketch`` and ``out_escaped``, those of the outputs.
    """
    kind: Any = {"dtype": accumulator_dtype(param), "device": param.device}
    state: dict[str, Any] = {"step": 0}
    for side in (INPUTS, OUTPUTS) if both_sides else (INPUTS,):
        columns = columns_for(param, rank, side)
        state[side + "sketch"] = torch.zeros(size_of(param, side), columns, **kind)
        state[side + "escaped"] = torch.zeros((), **kind)
    return state


def sketch_update_(param: Tensor, grad: Tensor, state: dict[str, Any], rule: Rule) -> None:
    r"""Apply the rule with a history of directions to one dense parameter, in place.

    With the parameter as a matrix W (out × inputs) and its gradient G, entries that the threshold
    stops being zero:

    .. math::

        A \leftarrow A + G^\top G \, \lVert G \rVert_F^{\,p-2}, \qquad
        W \leftarrow W - lr \cdot G \, (\epsilon I + A)^{-1/p}

    A single weight has CLASSP's own rule. With p = 2 it is AdaGrad with a full matrix (Duchi et
    al., 2011, section 1.1) for the inputs, the right half of Shampoo (Gupta et al., 2018). For
    other powers the factor keeps what CLASSP has: the steps do not change with the scale of the
    gradients, epsilon apart. A weight that the threshold stops is not moved.

    With a history of the outputs, too, half of the root is each side's, as in Shampoo:

    .. math::

        L \leftarrow L + G G^\top \, \lVert G \rVert_F^{\,p-2}, \qquad
        W \leftarrow W - lr \cdot (\epsilon I + L)^{-1/2p} \, G \, (\epsilon I + A)^{-1/2p}

    Then what was much used is protected as a pair, a direction of the inputs into one of the
    outputs, and the same inputs may still be put to another use.

    A is not stored. It is :math:`B B^\top + \rho I` with B of few columns, by Frequent Directions
    (Liberty, 2013) that keep what escapes them as ρ (Luo et al., 2019), and of each gradient a few
    random combinations of its rows count, whose expectation is :math:`G^\top G`. They are drawn
    anew, and the same, for each number of the step. So it is with L.

    The state is :func:`new_sketch`'s; epsilon must be above 0.

    References:
        E. Liberty, "Simple and deterministic matrix sketching", 2013, arXiv:1206.0594. L. Luo et
        al., "Robust Frequent Directions with application in online learning", 2019,
        arXiv:1705.05067. V. Feinberg et al., "Sketchy: memory-efficient adaptive regularization
        with Frequent Directions", 2023, arXiv:2302.03764. V. Gupta, T. Koren, Y. Singer, "Shampoo:
        preconditioned stochastic tensor optimization", 2018, arXiv:1802.09568.
    """
    dtype = state["sketch"].dtype
    limit = largest_usable_norm(dtype, rule.power) / grad.numel() ** 0.5
    G = apply_threshold(grad.flatten(1), dtype, rule, limit=limit)
    # A gradient of zero: inf, and nothing to remember.
    scale = (G.norm() ** (rule.power / 2 - 1)).nan_to_num(nan=0.0, posinf=0.0)
    for side in sides_of(state):
        _merge_(state, side, scale * _some_rows(G.T if side == OUTPUTS else G, state["step"]))
    state["step"] += 1
    U = _suppressed(G, state, rule) if rule.apply_decay else G
    if rule.threshold > 0 or rule.skip_nonfinite:
        U = torch.where(G == 0, 0.0, U)
    param.add_(U.reshape(param.shape), alpha=rule.lr if rule.maximize else -rule.lr)


def _some_rows(G: Tensor, step: int) -> Tensor:
    """Return ROWS random combinations K of G's rows, E KᵀK = GᵀG; of no more rows G itself."""
    if len(G) <= ROWS:
        return G
    # Drawn on the CPU, so that every device has the same.
    generator = torch.Generator("cpu").manual_seed(step)
    mix = torch.randn(ROWS, len(G), generator=generator, dtype=torch.float64, device="cpu")
    return (mix / ROWS**0.5).to(G) @ G


def _merge_(state: dict[str, Any], side: str, rows: Tensor) -> None:
    """Put rows into the side's sketch; what it has no columns for escapes."""
    sketch = state[side + "sketch"]
    M = torch.cat([sketch, rows.T], 1)
    values, vectors = torch.linalg.eigh(M.T @ M)
    rank = sketch.shape[1]
    kept = values[-rank:].clamp_min(0)
    floor = values[-rank - 1].clamp_min(0)
    # Below that a value is rounding, and its vector any.
    real = kept > torch.finfo(sketch.dtype).eps * kept[-1]
    shrink = torch.where(real, ((kept - floor).clamp_min(0) / kept).sqrt(), 0.0)
    state[side + "sketch"] = M @ (vectors[:, -rank:] * shrink)
    state[side + "escaped"] = state[side + "escaped"] + floor


def _suppressed(G: Tensor, state: Mapping[str, Any], rule: Rule) -> Tensor:
    """Return G (epsilon I + A)^(-1/power), or with outputs half of the root on each side."""
    sides = sides_of(state)
    exponent = -1 / (rule.power * len(sides))
    for side in sides:
        B, least = state[side + "sketch"], state[side + "escaped"] + rule.epsilon
        values = B.square().sum(0)
        free = least**exponent
        change = torch.where(values > 0, ((least + values) ** exponent - free) / values, 0.0)
        if side == OUTPUTS:
            G = free * G + B @ (change[:, None] * (B.T @ G))
        else:
            G = free * G + ((G @ B) * change) @ B.T
    return G


def largest_usable_norm(dtype: torch.dtype, power: float) -> float:
    """Return a ‖G‖ so small that neither its square nor a sum of ‖G‖^power becomes infinite."""
    largest = torch.finfo(dtype).max
    return min(0.5 * largest**0.5, largest_usable_gradient(dtype, power))


class GradientsAccumulator(Accumulator):
    """Sketches of what :func:`sketch_update_` accumulates; see :func:`new_sketch` for the state."""

    key = "sketch"

    def takes(self, param: Tensor) -> bool:
        """Tell whether it is a matrix with entries: vectors and numbers keep the paper's rule."""
        return param.dim() >= 2 and param.numel() > 0

    def limit(self, param: Tensor, power: float) -> float:
        """Return the largest |g| of a gradient whose norm can be used."""
        return largest_usable_norm(accumulator_dtype(param), power) / param.numel() ** 0.5

    def refusal(self, param: Tensor) -> str | None:
        """Refuse DTensors and sparse gradients."""
        if is_dtensor(param):
            return "a DTensor"
        sparse = param.grad is not None and param.grad.is_sparse
        return "one with a sparse gradient" if sparse else None

    def new(self, param: Tensor, group: Mapping[str, Any], bias: Tensor | None = None) -> State:
        """Return an empty sketch."""
        return new_sketch(param, group["rank"], group["both_sides"])

    def update_(self, updates: Sequence[Update], rule: Rule, group: Mapping[str, Any]) -> None:
        """Apply :func:`sketch_update_` to each."""
        for param, grad, state, *_ in updates:
            sketch_update_(param, grad, state, rule)

    def fit_(self, state: State, param: Tensor, group: Mapping[str, Any]) -> None:
        """Follow the parameter, and give sketches the columns that new outputs bring."""
        super().fit_(state, param, group)
        for side in sides_of(state):
            sketch = state[side + "sketch"]
            missing = columns_for(param, group["rank"], side) - sketch.shape[1]
            if missing > 0:
                state[side + "sketch"] = torch.nn.functional.pad(sketch, (0, missing))

    def resize(self, state: Mapping[str, Any], param: Tensor) -> State | None:
        """Return the sketches with rows of zeros for new inputs and outputs."""
        if param.dim() < 2:
            return None
        resized = dict(state)
        for side in sides_of(state):
            for name in (side + "sketch", side + "escaped"):
                resized[name] = state[name].to(param.device, accumulator_dtype(param))
            more = size_of(param, side) - len(state[side + "sketch"])
            if more < 0:
                return None
            if more:
                sketch = resized[side + "sketch"]
                resized[side + "sketch"] = torch.nn.functional.pad(sketch, (0, 0, 0, more))
        return resized

    def shape(self, state: Mapping[str, Any], param: Tensor) -> torch.Size:
        """Return the parameter's shape where inputs and outputs are as many, or else these."""
        outputs = len(state["out_sketch"]) if "out_sketch" in state else len(param)
        before = torch.Size((outputs, len(state["sketch"])))
        return param.shape if before == param.flatten(1).shape else before

    def consolidate_(self, state: State, factor: float, epsilon: float) -> None:
        """Multiply the history of each direction, up to where epsilon would be lost in rounding."""
        for side in sides_of(state):
            sketch, escaped = state[side + "sketch"], state[side + "escaped"]
            ceiling = epsilon / (8 * torch.finfo(sketch.dtype).eps)
            # Columns are orthogonal: the squared length of one is the history of its direction.
            values = sketch.square().sum(0)
            grown = (ceiling / values).clamp(1, factor)
            state[side + "sketch"] = sketch * grown.sqrt()
            state[side + "escaped"] = escaped * (ceiling / escaped).clamp(1, factor)

    def diagonal(self, state: Mapping[str, Any], param: Tensor) -> Tensor:
        """Return A's diagonal, each input's; with both sides the geometric mean of A's and L's."""
        own = [
            state[side + "sketch"].square().sum(1) + state[side + "escaped"]
            for side in sides_of(state)
        ]
        if len(own) == 1:
            return own[0].view(param.shape[1:]).expand(param.shape)
        return (own[1][:, None] * own[0]).sqrt().view(param.shape)

    def require_loadable(self, name: str, state: Mapping[str, Any], param: Tensor) -> None:
        """Raise if a sketch is not finite or not of the parameter's inputs or outputs."""
        step: Any = state.get("step")
        require_type(f"step of parameter {name}", step, int)
        for side in sides_of(state):
            for key, dimensions, least in (("sketch", 2, -torch.inf), ("escaped", 0, 0)):
                what = f"{side}{key} of parameter {name}"
                saved: Any = state.get(side + key)
                require_type(what, saved, Tensor)
                if saved.dim() != dimensions:
                    raise ValueError(f"state_dict's {what} has the shape {tuple(saved.shape)}")
                require_numbers(what, saved, param, least)
            size, columns = state[side + "sketch"].shape
            matches = param.dim() >= 2 and size == size_of(param, side) and 0 < columns <= size
            if not matches or step < 0:
                raise ValueError(
                    f"state_dict's sketch of parameter {name} is for {size} "
                    f"{'outputs' if side == OUTPUTS else 'inputs'}, with a sketch of shape "
                    f"{(size, columns)} and step {step}, the parameter has the shape "
                    f"{tuple(param.shape)}; if the model has grown use "
                    f"avalanche_classp.carry_accumulators"
                )
