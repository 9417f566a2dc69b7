r"""A history of a layer's inputs without loss: recursive least squares.

The rule is that of :mod:`~avalanche_classp.optim.accumulators.inputs`. Kept is not A but its
inverse, :math:`P = (I + A / \epsilon)^{-1}`, which takes rows R with mean :math:`R^\top R`:

.. math::

    P \leftarrow P - P R^\top (\epsilon I + R P R^\top)^{-1} R P, \qquad
    [W\, b] \leftarrow [W\, b] - lr \cdot G \, P^{1/p}

So every step has the current mini-batch in it, and nothing is renewed where p = 1. A mini-batch of
more than :data:`EXACT_ROWS` rows counts by :data:`ROWS`: their mean, and sums of all deviations
from it with random signs, whose second moments are right on average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from avalanche_classp.optim.accumulators.base import Reduce, State, require_numbers, require_type
from avalanche_classp.optim.accumulators.inputs import InputsAccumulator, is_due
from avalanche_classp.optim.rule import Rule, accumulator_dtype

__all__ = ["ExactInputsAccumulator"]

EXACT_ROWS = 64
"""A mini-batch of no more rows counts as it is."""

ROWS = 32
"""Rows that a larger one counts by."""

MOST_ROWS = 512
"""Positions of a convolution among which they are taken."""


class ExactInputsAccumulator(InputsAccumulator):
    """The inverse of a layer's moments.

    A state holds ``inverse``, P of shape (inputs, inputs), for ``epsilon``; ``constant``, whether a
    1 for a bias stands before the inputs; ``step`` and ``renewed``, the steps taken and those at
    the last root; with another power than 1 ``root``, P to the 1/power. Between a forward pass and
    its step ``rows`` holds what was given.
    """

    key = "inverse"

    def new(self, param: Tensor, group: Mapping[str, Any], bias: Tensor | None = None) -> State:
        """Return the inverse of no history: the identity."""
        constant = bias is not None
        inputs = param.shape[1:].numel() + constant
        dtype = accumulator_dtype(param)
        return {
            "inverse": torch.eye(inputs, dtype=dtype, device=param.device),
            "epsilon": float(group["epsilon"]),
            "step": 0,
            "renewed": -1,
            "constant": constant,
        }

    def rows_wanted(self, state: Mapping[str, Any]) -> int:
        """Return how many rows of the next mini-batch are enough, about."""
        return MOST_ROWS

    @torch.no_grad()
    def observe_(self, state: State, rows: Tensor) -> None:
        """Keep a mini-batch's rows, of shape (rows, inputs), until the step."""
        rows = torch.nn.functional.pad(rows, (int(state["constant"]), 0), value=1.0)
        # What is not finite counts for nothing.
        rows = torch.where(rows.square().sum().isfinite(), rows / len(rows) ** 0.5, 0.0)
        held = [state["rows"]] if "rows" in state else []
        seed = 2 * state["step"] + len(held)
        rows = torch.cat([*held, _mixed(rows, seed)])
        # Many passes without a step need no more memory than some.
        state["rows"] = _mixed(rows, seed + 1) if len(rows) > 8 * ROWS else rows

    def renew_(self, state: State, rule: Rule, reduce: Reduce | None = None) -> None:
        """Take what was seen since the last step into the inverse."""
        P, epsilon = state["inverse"], rule.epsilon
        if state["epsilon"] != epsilon:
            change = state["epsilon"] / epsilon
            P = state["inverse"] = _with_history(P, lambda history: history * change)
            state["epsilon"] = epsilon
        R = state.pop("rows", P.new_zeros(0, len(P)))
        if reduce:
            seed = state["step"] + (reduce.rank << 32)
            R = _signed_sums(R, seed, ROWS)
            reduce.mean_(R)
            R = R * reduce.size**0.5  # sums with random signs over the processes, too
        if len(R):
            RP = R @ P
            K = RP @ R.T
            K.diagonal().add_(epsilon)
            L, failed = torch.linalg.cholesky_ex(K)
            scaled = torch.linalg.solve_triangular(L, RP, upper=False)
            usable = (failed == 0) & scaled.isfinite().all()
            scaled = torch.where(usable, scaled, 0.0)
            P.addmm_(scaled.T, scaled, alpha=-1)
        if rule.power == 1:
            state.pop("root", None)
        elif is_due(state) or "root" not in state:
            values, vectors = torch.linalg.eigh(P.double())
            root = vectors * values.clamp_min(0) ** (1 / rule.power) @ vectors.T
            state["root"], state["renewed"] = root.to(P), state["step"]

    def descend_(
        self,
        weight: Tensor,
        bias: Tensor | None,
        gradients: tuple[Tensor, Tensor | None],
        state: Mapping[str, Any],
        step: float,
    ) -> None:
        """Add step · G P^(1/power) to [W b]."""
        P, constant = state.get("root", state["inverse"]), int(state["constant"])
        G, g = gradients
        weight.addmm_(G, P[constant:, constant:], alpha=step)
        if g is not None:
            weight.addr_(g, P[0, 1:], alpha=step)
            if bias is not None:
                bias.add_(G @ P[1:, 0] + g * P[0, 0], alpha=step)

    def resize(self, state: Mapping[str, Any], param: Tensor) -> State | None:
        """Return the history, with none for new inputs."""
        if param.dim() < 2:
            return None
        P = state["inverse"].to(param.device, accumulator_dtype(param))
        more = param.shape[1:].numel() + state["constant"] - len(P)
        if more < 0:
            return None
        resized = {k: v for k, v in state.items() if k not in ("rows", "root")}
        resized["inverse"] = torch.block_diag(P, torch.eye(more).to(P)) if more else P
        return resized

    def shape(self, state: Mapping[str, Any], param: Tensor) -> torch.Size:
        """Return the parameter's shape where its inputs are as many, or else outputs × inputs."""
        return self.shape_with(len(state["inverse"]) - state["constant"], param)

    def consolidate_(self, state: State, factor: float, epsilon: float) -> None:
        """Multiply the history, up to where epsilon would be lost in rounding."""
        ceiling = 1 / (8 * torch.finfo(state["inverse"].dtype).eps)
        state["inverse"] = _with_history(
            state["inverse"], lambda history: history * (ceiling / history).clamp(1, factor)
        )
        state.pop("root", None)

    def diagonal(self, state: Mapping[str, Any], param: Tensor) -> Tensor:
        """Return A's diagonal, each input's, without a bias's."""
        P, constant = state["inverse"], int(state["constant"])
        values, vectors = torch.linalg.eigh(P.double())
        history = state["epsilon"] * (1 / values.clamp(1e-12, 1) - 1)
        own = (vectors.square() @ history)[constant:].to(P)
        return own.view(param.shape[1:]).expand(param.shape)

    def require_loadable(self, name: str, state: Mapping[str, Any], param: Tensor) -> None:
        """Raise if a part is missing, not finite, or of other inputs than the parameter's."""
        what = f"inverse of parameter {name}"
        P = state["inverse"]
        require_type(what, P, Tensor)
        require_type(f"epsilon of parameter {name}", state.get("epsilon"), float)
        self.require_counts(name, state)
        require_numbers(what, P, param, -torch.inf)
        inputs = param.shape[1:].numel() + state["constant"] if param.dim() >= 2 else -1
        if P.shape != (inputs, inputs):
            raise ValueError(
                f"state_dict's {what} has the shape {tuple(P.shape)}, the parameter "
                f"{tuple(param.shape)}; if the model has grown use "
                f"avalanche_classp.carry_accumulators"
            )


def _mixed(rows: Tensor, seed: int) -> Tensor:
    """Return :data:`ROWS` rows R with the same RᵀR on average; up to EXACT_ROWS stay."""
    if len(rows) <= EXACT_ROWS:
        return rows
    mean = rows.mean(0, keepdim=True)
    return torch.cat([mean * len(rows) ** 0.5, _signed_sums(rows - mean, seed, ROWS - 1)])


def _signed_sums(rows: Tensor, seed: int, count: int) -> Tensor:
    # A generator of its own: the user's random numbers stay as they are.
    generator = torch.Generator("cpu").manual_seed(seed)
    signs = torch.randint(2, (count, len(rows)), generator=generator, device="cpu")
    return (signs.to(rows) * 2 - 1) @ rows / count**0.5


def _with_history(P: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return (I + B')^-1 for P = (I + B)^-1, B' with other eigenvalues."""
    values, vectors = torch.linalg.eigh(P.double())
    values = 1 / (1 + change((1 / values.clamp(1e-12, 1) - 1).clamp_min(1e-30)))
    return (vectors * values @ vectors.T).to(P)
