"""Matrix accumulators: a history for every direction of a layer's inputs, not for every weight.

An extension of CLASSP, not in its paper. Where the inputs of a layer are correlated, as pixels and
activations are, what protects single weights protects no function: a step along a direction that
earlier experiences used is made of many weights that each moved little. With an accumulator matrix
the history is that of directions. Orthogonal weights modification (Zeng et al., 2019,
arXiv:1810.01256) protects directions, too; it takes them from the inputs of the layers, and this
from the gradients alone, so that it is an optimizer like any other.

This module needs torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from avalanche_classp.optim.rule import Rule, accumulator_dtype, passed

__all__ = [
    "absorb_rows_",
    "consolidate_",
    "diagonal",
    "fitted_sketch",
    "matrix_update_",
    "new_sketch",
    "sides_of",
    "size_of",
    "takes_matrix",
    "widen_",
]

ROWS = 8
"""Random combinations of a gradient's rows that are remembered of each step."""


def takes_matrix(param: Tensor, rank: int) -> bool:
    """Tell whether a parameter has a matrix accumulator: vectors and numbers never have."""
    return rank > 0 and param.dim() >= 2


SIDES = ("", "out_")
"""What the names of a state's tensors begin with: those of inputs, and those of outputs."""


def sides_of(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return those of :data:`SIDES` that a state has a history of."""
    return SIDES if "out_sketch" in state else SIDES[:1]


def size_of(param: Tensor, side: str) -> int:
    """Return the number of a parameter's inputs, or of its outputs."""
    return len(param) if side else param.shape[1:].numel()


def columns_for(param: Tensor, rank: int, side: str) -> int:
    """Return how many columns a sketch has: rank, or as many as make one number per weight."""
    inputs, outputs = size_of(param, ""), size_of(param, SIDES[1])
    size, others = (outputs, inputs) if side else (inputs, outputs)
    return min(rank, size, max(ROWS, others))


def new_sketch(param: Tensor, rank: int, both_sides: bool = False) -> dict[str, Any]:
    """Return the state of a parameter without history.

    Args:
        param: of shape (out, ...); all dimensions but the first count as the inputs.
        rank: see :func:`columns_for`.
        both_sides: whether to have a history of the outputs, too.

    Returns:
        ``sketch``, B of shape (inputs, columns), with orthogonal columns; ``shed``, ρ; ``step``,
        the number of updates. With ``both_sides`` also ``out_sketch`` and ``out_shed``, those of
        outputs.
    """
    kind: Any = {"dtype": accumulator_dtype(param), "device": param.device}
    state: dict[str, Any] = {"step": 0}
    for side in SIDES if both_sides else SIDES[:1]:
        columns = columns_for(param, rank, side)
        state[side + "sketch"] = torch.zeros(size_of(param, side), columns, **kind)
        state[side + "shed"] = torch.zeros((), **kind)
    return state


def matrix_update_(param: Tensor, grad: Tensor, state: dict[str, Any], rule: Rule) -> None:
    r"""Apply the rule with a matrix accumulator to one dense parameter, in place.

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
    (Liberty, 2013) that keep what they shed as ρ (Luo et al., 2019), and of each gradient a few
    random combinations of its rows count, whose expectation is :math:`G^\top G`. They are drawn
    anew, and the same, for each number of the step. So it is with L.

    Args:
        param: the weights; changed in place.
        grad: their gradient, the same shape; left as it is.
        state: :func:`new_sketch`'s; changed in place.
        rule: the hyper-parameters; epsilon above 0.

    References:
        E. Liberty, "Simple and deterministic matrix sketching", 2013, arXiv:1206.0594. L. Luo et
        al., "Robust Frequent Directions with application in online learning", 2019,
        arXiv:1705.05067. V. Feinberg et al., "Sketchy: memory-efficient adaptive regularization
        with Frequent Directions", 2023, arXiv:2302.03764. V. Gupta, T. Koren, Y. Singer, "Shampoo:
        preconditioned stochastic tensor optimization", 2018, arXiv:1802.09568.
    """
    G = passed(grad.flatten(1), state["sketch"].dtype, rule)
    # A gradient of zero: inf, and nothing to remember.
    scale = (G.norm() ** (rule.power / 2 - 1)).nan_to_num(nan=0.0, posinf=0.0)
    for side in sides_of(state):
        _merge_(state, side, scale * _some_rows(G.T if side else G, state["step"]))
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
    generator = torch.Generator().manual_seed(step)
    mix = torch.randn(ROWS, len(G), generator=generator, dtype=torch.float64)
    return (mix / ROWS**0.5).to(G) @ G


def _merge_(state: dict[str, Any], side: str, rows: Tensor) -> None:
    """Put rows into the side's sketch; shed what it has no columns for."""
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
    state[side + "shed"] = state[side + "shed"] + floor


def consolidate_(state: dict[str, Any], factor: float, epsilon: float) -> None:
    """Multiply a history in place; see :meth:`~avalanche_classp.CLASSPOptimizer.consolidate`."""
    for side in sides_of(state):
        sketch, shed = state[side + "sketch"], state[side + "shed"]
        ceiling = epsilon / (8 * torch.finfo(sketch.dtype).eps)
        # Columns are orthogonal: the squared length of one is the history of its direction.
        values = sketch.square().sum(0)
        grown = (ceiling / values).clamp(1, factor)
        state[side + "sketch"] = sketch * grown.sqrt()
        state[side + "shed"] = shed * (ceiling / shed).clamp(1, factor)


def absorb_rows_(state: dict[str, Any]) -> None:
    """Bring a state to this form in place: before version 3 some rows waited outside the sketch."""
    for side in sides_of(state):
        if (rows := state.pop(side + "rows", None)) is not None:
            _merge_(state, side, rows.T)


def _suppressed(G: Tensor, state: Mapping[str, Any], rule: Rule) -> Tensor:
    """Return G (epsilon I + A)^(-1/power), or with outputs half of the root on each side."""
    sides = sides_of(state)
    exponent = -1 / (rule.power * len(sides))
    for side in sides:
        B, least = state[side + "sketch"], state[side + "shed"] + rule.epsilon
        values = B.square().sum(0)
        free = least**exponent
        change = torch.where(values > 0, ((least + values) ** exponent - free) / values, 0.0)
        if side:
            G = free * G + B @ (change[:, None] * (B.T @ G))
        else:
            G = free * G + ((G @ B) * change) @ B.T
    return G


def diagonal(state: Mapping[str, Any], param: Tensor) -> Tensor:
    """Return the diagonal of A, which is each input's, as a tensor of the parameter's shape.

    With a history of the outputs: the geometric mean of A's and of L's.
    """
    both = [_own(state, side) for side in sides_of(state)]
    if len(both) == 1:
        return both[0].view(param.shape[1:]).expand(param.shape)
    return (both[1][:, None] * both[0]).sqrt().view(param.shape)


def _own(state: Mapping[str, Any], side: str) -> Tensor:
    return state[side + "sketch"].square().sum(1) + state[side + "shed"]


def widen_(state: dict[str, Any], param: Tensor, rank: int) -> None:
    """Give sketches the columns that they lack, in place: outputs may have been added."""
    for side in sides_of(state):
        sketch = state[side + "sketch"]
        missing = columns_for(param, rank, side) - sketch.shape[1]
        if missing > 0:
            state[side + "sketch"] = torch.nn.functional.pad(sketch, (0, missing))


def fitted_sketch(state: Mapping[str, Any], param: Tensor) -> dict[str, Any] | None:
    """Return a history for a parameter that may have grown, on its device; not always a copy.

    New inputs and outputs (at the end) begin without history. None if there are fewer of those that
    it is of than before, or the parameter has become a vector.
    """
    if param.dim() < 2:
        return None
    fitted = dict(state)
    for side in sides_of(state):
        for name in (side + "sketch", side + "shed"):
            fitted[name] = state[name].to(param.device, accumulator_dtype(param))
        more = size_of(param, side) - len(state[side + "sketch"])
        if more < 0:
            return None
        if more:
            sketch = fitted[side + "sketch"]
            fitted[side + "sketch"] = torch.nn.functional.pad(sketch, (0, 0, 0, more))
    return fitted
