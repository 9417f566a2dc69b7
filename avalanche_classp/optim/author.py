"""CLASSP with the keywords of the author's released class, so that his scripts run here.

Read from CLASSP.py and experiment_CV.py, O. Ludwig, 2024.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from avalanche_classp.optim.accumulators import diagonal
from avalanche_classp.optim.checks import require_flag
from avalanche_classp.optim.hyperparameters import validate
from avalanche_classp.optim.optimizer import CLASSPOptimizer

__all__ = ["CLASSP_optimizer"]


class CLASSP_optimizer(CLASSPOptimizer):
    r"""CLASSPOptimizer with the interface of the author's released code.

    ``from avalanche_classp import CLASSP_optimizer`` takes the place of ``from CLASSP import
    CLASSP_optimizer``. The rule is :class:`~avalanche_classp.CLASSPOptimizer`'s, the paper's;
    ``docs/paper.md`` says where the released code differs. With ``threshold=0`` and ``power=1``
    the steps of one group are those of the released code. With a threshold above 0 or another
    power, a script that uses the released interface gets a UserWarning at its first step.

    Args:
        params, lr, threshold, epsilon, power: as :class:`~avalanche_classp.CLASSPOptimizer`'s, with
            its defaults. The released code has 0.2, 0.5, 1e-5 and 1.
        apply_scaling: the released name of ``apply_decay``; give one of the two. A parameter group
            may have it, too.
        **hyperparameters: the others of :class:`~avalanche_classp.CLASSPOptimizer`.

    Raises:
        TypeError, ValueError: see :class:`~avalanche_classp.CLASSPOptimizer`.

    The released methods that save and load files are not here; ``torch.save(o.state_dict(), path)``
    and ``o.load_state_dict(torch.load(path))`` do the same.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = CLASSP_optimizer([w], lr=0.2, threshold=0, epsilon=0.5, power=1)
        >>> w.grad = torch.tensor([0.5, 1.5])
        >>> optimizer.step(lr=0.1, threshold=0, apply_scaling=False)
        >>> w.detach()
        tensor([0.9500, 0.8500])
        >>> optimizer.average_grad_sum()
        1.0
    """

    _released_interface = False
    _has_warned = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        threshold: float | None = None,
        epsilon: float | None = None,
        power: float | None = None,
        apply_scaling: bool | None = None,
        **hyperparameters: Any,
    ) -> None:
        hyperparameters["apply_scaling"] = apply_scaling
        self._rename(hyperparameters)
        super().__init__(params, lr, threshold, epsilon, power, **hyperparameters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have ``apply_scaling``."""
        if isinstance(param_group, dict):
            param_group = dict(param_group)
            self._rename(param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        lr: float | Tensor | Callable[[], float] | None = None,
        threshold: float | None = None,
        epsilon: float | None = None,
        power: float | None = None,
        apply_scaling: bool | None = None,
        closure: Callable[[], float] | None = None,
    ) -> float | None:
        """Perform one update, with other values of the hyper-parameters for this step alone.

        Args:
            lr: for all groups, as the others. Default (None): the group's own. A function is taken
                for the closure, which torch's optimizers have first.
            threshold: likewise.
            epsilon: likewise.
            power: likewise.
            apply_scaling: likewise.
            closure: re-evaluates the model and returns the loss (optional).

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError, ValueError: a value of a wrong type or out of its range.
            NonFiniteGradientError, RuntimeError: as
                :meth:`CLASSPOptimizer.step <avalanche_classp.CLASSPOptimizer.step>`.
        """
        if callable(lr):
            lr, closure = None, lr
        values = {"lr": lr, "threshold": threshold, "epsilon": epsilon, "power": power}
        given: dict[str, Any] = {k: value for k, value in values.items() if value is not None}
        validate(given)
        given["apply_scaling"] = apply_scaling
        self._rename(given)
        self._released_interface |= bool(given)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._rename(group, replace=True)  # where a script has set it since
        own = [{name: group[name] for name in given} for group in self.param_groups]
        try:
            for group in self.param_groups:
                group.update(given)
            self._warn_of_differences()
            self._update_parameters()
        finally:
            for group, before in zip(self.param_groups, own, strict=True):
                group.update(before)
        return loss

    def average_grad_sum(self) -> float:
        """Return the mean of the accumulators over all weights that have one; 0 before a step."""
        params = [p for group in self.param_groups for p in group["params"]]
        found = [d for p in params if (d := diagonal(self.state.get(p), p)) is not None]
        total = sum(history.sum(dtype=torch.float64).item() for history in found)
        return total / max(1, sum(history.numel() for history in found))

    def _rename(self, values: dict[str, Any], replace: bool = False) -> None:
        """Call ``apply_scaling`` ``apply_decay``, the name that the groups have."""
        apply_scaling = values.pop("apply_scaling", None)
        if apply_scaling is None:
            return
        require_flag("apply_scaling", apply_scaling)
        apply_decay = values.get("apply_decay")
        if apply_decay not in (None, apply_scaling) and not replace:
            raise ValueError(
                f"apply_scaling={apply_scaling} and apply_decay={apply_decay} are two names of "
                f"one value; give one of them"
            )
        values["apply_decay"] = apply_scaling
        self._released_interface = True

    def _warn_of_differences(self) -> None:
        """Warn, once, a script of the released code whose steps the paper wants otherwise."""
        if self._has_warned or not self._released_interface:
            return
        parts = []
        for group in self.param_groups:
            threshold, power = group["threshold"], group["power"]
            if threshold > 0:
                parts.append(
                    f"threshold={threshold} stops each weight whose squared gradient is not above "
                    f"it (the released code stops none below 1, and all else)"
                )
            if power != 1:
                parts.append(f"power={power} accumulates |g|**{power} (the released code |g|)")
        if parts:
            self._has_warned = True
            warnings.warn(
                f"CLASSP_optimizer follows the paper where the author's released code does not: "
                f"{'; '.join(dict.fromkeys(parts))}. threshold=0 with power=1 gives the steps of "
                f"the released code",
                UserWarning,
                stacklevel=5,
            )
