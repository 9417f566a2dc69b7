"""The CLASSP optimizer: AdaGrad generalised to any power, with sparse updates.

Paper: Oswaldo Ludwig, "CLASSP: a Biologically-Inspired Approach to Continual Learning through
Adjustment Suppression and Sparsity Promotion", 2024, https://arxiv.org/abs/2405.09637.

This module needs torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeGuard, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from avalanche_classp.optim.backends import update_, usable
from avalanche_classp.optim.matrix import (
    absorb_rows_,
    consolidate_,
    fitted_sketch,
    matrix_update_,
    new_sketch,
    sides_of,
    size_of,
    takes_matrix,
    widen_,
)
from avalanche_classp.optim.rule import (
    Rule,
    accumulator_dtype,
    largest_usable_gradient,
    sparse_update_,
)
from avalanche_classp.optim.sharding import bad_anywhere, is_dtensor, local, local_gradient

__all__ = [
    "CLASSPOptimizer",
    "CLASSP_optimizer",
    "NonFiniteGradientError",
    "checked_consolidation",
    "has_history",
    "rule_of",
    "validate_hyperparameters",
]

_NONFINITE_POLICIES = ("raise", "skip")

STATE_VERSION = 3
"""The version of what ``state_dict()`` returns. Raised when older releases could misread it; what
release 0.1.0 wrote has none and counts as 0."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_ALWAYS_SAVED = ("params", "lr", "threshold", "epsilon", "power", "apply_decay")
"""Keys that a saved group of every version has."""


class NonFiniteGradientError(RuntimeError):
    """A gradient that :class:`CLASSPOptimizer` refuses; no weight or accumulator has changed."""


class CLASSPOptimizer(Optimizer):
    r"""Implements CLASSP, an optimizer for continual learning without stored data or task labels.

    A weight that has been changed much changes less from then on (a generalised AdaGrad), and a
    weight changes only when its gradient is above a threshold (sparse updates leave room for
    later tasks). Beside the weights it keeps one number per weight, the accumulator :math:`A`.

    .. math::

        \begin{aligned}
            &\textbf{for every weight } w \textbf{ with gradient } g
                \textbf{ and accumulator } A \ (A_0 = 0):                               \\
            &\hspace{5mm} \textbf{if } g^2 > \textit{threshold}:                        \\
            &\hspace{10mm} A \leftarrow A + |g|^{\,\textit{power}}                      \\
            &\hspace{10mm} w \leftarrow w - \textit{lr} \cdot
                g \,/\, (\textit{epsilon} + A)^{1/\textit{power}}
                \hspace{5mm} \textbf{(apply\_decay=True)}                               \\
            &\hspace{10mm} w \leftarrow w - \textit{lr} \cdot g
                \hspace{5mm} \textbf{(apply\_decay=False: } A \textbf{ still grows)}    \\
            &\hspace{5mm} \textbf{otherwise } w \textbf{ and } A \textbf{ stay as they are}
        \end{aligned}

    * :math:`g` is the gradient of one weight (of minus the loss with ``maximize=True``). The
      comparison is strict and exact: :math:`g^2` is never rounded, so gradients too small or too
      large to be squared in their dtype are treated like any other.
    * :math:`A` has the weight's shape; it is kept in the weight's dtype, and in float32 for
      float16 and bfloat16 weights, where small gradients would soon no longer add up.
      ``state[p]["accumulator"]`` holds it.
    * The current gradient enters :math:`A` before the step. So
      :math:`|g| / (\textit{epsilon} + A)^{1/\textit{power}} \le 1`: no weight ever moves by more
      than lr in one step while ``apply_decay=True``.
    * ``power=2, threshold=0`` is AdaGrad: :class:`torch.optim.Adagrad` with ``eps=0`` and
      ``initial_accumulator_value=epsilon``. ``apply_decay=False, threshold=0`` is plain SGD.

    How to choose values. The defaults are a compromise over five benchmarks, chosen on validation
    data (experiments/results has the trials); a search on your own stream finds better ones. With
    ``power=1`` a weight's whole travel is bounded by about
    :math:`\textit{lr} \cdot (1 + \ln(A_\text{end} / A_\text{start}))`, where both count epsilon
    in and :math:`A_\text{start}` has the first gradient: lr is a length in weight space, not a
    rate. Choose it as the distance that you would let a weight go (0.001 to 0.1 for
    usual initialisations), not as SGD's lr. A smaller ``power`` forgives less: the effective rate
    falls like :math:`A^{-1/\textit{power}}`. ``epsilon`` is the history that every weight is born
    with: far below a typical :math:`|g|^\textit{power}` each weight's first step has length lr
    whatever its gradient, far above it the optimizer starts as SGD with the rate
    :math:`\textit{lr} / \textit{epsilon}^{1/\textit{power}}`. ``threshold`` compares with a
    squared gradient, so 1e-6 means "leave weights with a gradient below 1e-3 alone"; gradients
    shrink with larger batches, and so should the threshold.

    Args:
        params: iterable of parameters, of ``(name, parameter)`` pairs, or of dicts that define
            parameter groups; each group may set its own lr, threshold, epsilon, power and
            apply_decay. Any shape; float64, float32, bfloat16 and float16.
        lr: step length, >= 0 (α in the paper; a one-element tensor works too). Default: 1e-3.
        threshold: a weight changes where its squared gradient is greater, >= 0; 0 lets every
            non-zero gradient through. Default: 0.
        epsilon: stands inside the root and is added to every accumulator, >= 0 (ε). Default: 1e-8.
        power: exponent of the accumulated gradients, > 0 (p). Default: 1.5.
        apply_decay: whether the accumulators scale the steps. Default: True.
        maximize: maximize the objective instead of minimizing it. Default: False.
        nonfinite: what to do about a gradient that is NaN or infinite, or so large that a sum of
            ``|g|**power`` could become infinite (in float32 above 1e31 with power 1, above 3e15
            with power 2). ``"raise"``: :meth:`step` raises a NonFiniteGradientError (a
            RuntimeError) that names the parameter, before any weight or accumulator has changed;
            catch it to drop the batch. ``"skip"``: these weights and their accumulators stay as
            they are, the others are updated. In no case does such a gradient enter an
            accumulator, which would freeze the weight for good. The check reads all gradients
            once more and makes the host wait for a GPU once a step; ``"skip"`` does neither.
            Default: ``"raise"``.
        foreach: whether to take few operations over all parameters (True) or a loop over the
            parameters (False), as torch's optimizers do. Default (None): the fastest path that
            needs no compiler; on a GPU that is foreach, on a CPU the rule on blocks that fit in
            the caches, or the kernel of ``fused`` if this machine has it already.
        fused: whether to go through memory only once. On a CPU, with float32 and float64, a
            kernel that the C++ compiler at hand builds at the first step, in about two seconds,
            once for the machine (``python -m avalanche_classp.build_kernel`` does it ahead of
            time); that is announced, and where it fails a UserWarning says why and the default
            path is taken. On a GPU ``torch.compile``, not yet measured on one. False: never, nor
            a kernel that lies ready. Default (None): see ``foreach``.
        rank: 0 is the paper's rule: a history for every weight. Above 0, an extension of ours:
            every parameter with two dimensions or more has a matrix accumulator, a history for
            every direction of its layer's inputs, in a sketch of so many columns (16 to 256
            were tried); vectors keep the rule above. With the gradient G as a matrix,
            outputs × inputs,
            :math:`A \leftarrow A + G^\top G \lVert G \rVert^{p-2}` and
            :math:`W \leftarrow W - lr \cdot G (\epsilon I + A)^{-1/p}`; see
            ``avalanche_classp/matrix.py``. It keeps rank numbers for each input of a layer, but
            not more than there are weights (of layers with less than 8 outputs, 8 for each input).
            Each step takes a few matrix products and an eigenvalue decomposition of rank + 8 rows.
            Epsilon must be above 0, and counts more: :math:`lr / \epsilon^{1/p}` is SGD's rate in
            directions that are still free; begin with 0.1 to 0.3 for it. ``foreach`` and ``fused``
            do not concern such parameters. Default: 0.
        both_sides: with rank above 0, whether there is such a history of the outputs, too,
            :math:`L \leftarrow L + G G^\top \lVert G \rVert^{p-2}`, and
            :math:`W \leftarrow W - lr \cdot (\epsilon I + L)^{-1/2p} \, G \,
            (\epsilon I + A)^{-1/2p}`. It counts when a parameter's history begins.
            Default: False.

    All paths give the same numbers: with the powers 1 and 2 to the last bit on a CPU with AVX2,
    else but for rounding. Only ``foreach=True``, ``foreach=False`` and a GPU's default need memory
    in proportion to the parameters during a step.

    Raises:
        TypeError: an argument of a wrong type, or complex or integer parameters.
        ValueError: an argument out of its range, or rank above 0 with epsilon 0 (from :meth:`step`
            where a group was changed); the message names it and the value.
        NonFiniteGradientError: from :meth:`step`, with ``nonfinite="raise"``.

    Sparse gradients (``torch.nn.Embedding(sparse=True)``) work and touch the rows that they name
    only; parameters whose grad is None are left alone; ``p.grad`` is never modified.

    The accumulators follow their parameters when ``model.to(...)`` changes device or dtype after
    construction. With ``torch.amp.GradScaler`` call ``scaler.step(optimizer)`` as usual: it divides
    the gradients by the scale first, so the threshold compares true gradients
    (:class:`~avalanche_classp.CLASSP` shows it in Avalanche). The same holds for accumulated and
    clipped gradients: what counts is ``p.grad`` as it is when :meth:`step` is called.

    A float32 accumulator takes no addition below half of its last digit: it stops growing where
    :math:`|g|^\textit{power} < A \cdot 2^{-24}`, with a constant :math:`|g|` after
    :math:`2^{24} \approx 1.7 \cdot 10^7` steps, and the effective rate then stays as it is. With
    ``power=1`` a step is at most :math:`\textit{lr} \cdot 2^{-24}` there, which float32 weights
    larger than 2 lr do not take either. If so many steps are to count use ``model.double()``.

    Where the accumulated history cannot be represented (``epsilon=0`` and a gradient so small
    that ``|g|**power`` is zero in the dtype) the weight stays as it is.

    Differences from the author's released code, which is not followed: there
    ``(grad**2).any() > threshold`` compares a boolean with the threshold (any threshold below 1
    does nothing, 1 or more stops all learning), ``add_(|g|) ** power`` throws the power away, and
    one group's lr leaks into the next. With power=1 its runs are this optimizer's with
    threshold=0. The paper's equation (1) sums the history up to the step before, its pseudo-code
    adds the current gradient first; the pseudo-code is followed.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
        >>> optimizer = CLASSPOptimizer([w], lr=0.1, threshold=0.01, epsilon=0.5, power=1.0)
        >>> w.grad = torch.tensor([0.5, -0.05, 1.5])  # 0.05² is below the threshold
        >>> optimizer.step()
        >>> w.detach()
        tensor([0.9500, 1.0000, 0.9250])
        >>> optimizer.state[w]["accumulator"]
        tensor([0.5000, 0.0000, 1.5000])

    References:
        O. Ludwig, 2024, https://arxiv.org/abs/2405.09637. The limit case power=2: J. Duchi,
        E. Hazan, Y. Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
        Optimization", JMLR 12, 2011.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        threshold: float = 0.0,
        epsilon: float = 1e-8,
        power: float = 1.5,
        apply_decay: bool = True,
        *,
        maximize: bool = False,
        nonfinite: str = "raise",
        foreach: bool | None = None,
        fused: bool | None = None,
        rank: int = 0,
        both_sides: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "threshold": threshold,
            "epsilon": epsilon,
            "power": power,
            "apply_decay": apply_decay,
            "maximize": maximize,
            "nonfinite": nonfinite,
            "foreach": foreach,
            "fused": fused,
            "rank": rank,
            "both_sides": both_sides,
        }
        # The defaults are checked even if every group overrides them.
        validate_hyperparameters(defaults)
        if not isinstance(params, Iterable):
            raise TypeError(
                f"params must be an iterable of parameters, of (name, parameter) pairs or of "
                f"dicts, got {params!r}"
            )
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("nonfinite", "raise")
            group.setdefault("foreach", None)
            group.setdefault("fused", None)
            group.setdefault("rank", 0)
            group.setdefault("both_sides", False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; hyper-parameters that it does not name are the constructor's.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        if isinstance(param_group, dict):
            validate_hyperparameters({**self.defaults, **param_group})
            if not isinstance(param_group.get("params"), Iterable):
                raise TypeError(
                    f"params of a group must be a parameter or an iterable of them, got "
                    f"{param_group.get('params')!r}"
                )
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in _DTYPES:
                del self.param_groups[-1]
                raise TypeError(
                    f"CLASSPOptimizer takes real floating-point parameters of 16 to 64 bits; got "
                    f"one of {p.dtype} and shape {tuple(p.shape)}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return ``state``, ``param_groups`` and ``version``; see torch's ``Optimizer.state_dict``.

        The accumulators are the optimizer's own tensors, not copies.
        """
        return {**super().state_dict(), "version": STATE_VERSION}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` of this or an older release returned.

        The accumulators go to the devices of the parameters, wherever they were saved.

        Raises:
            TypeError, ValueError: it is no CLASSPOptimizer's, of a newer version, or its groups or
                shapes are not this optimizer's. Nothing has been changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        loaded: dict[str, Any] = {}

        def note(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            _require_loadable(state_dict, optimizer.param_groups)
            loaded.update(state_dict)

        def take_whole_accumulators(optimizer: Optimizer) -> None:
            # torch shares the tensors with the state_dict, where two optimizers would both add to
            # them, and casts them to the parameter's dtype, which would round the float32
            # accumulators of half-precision parameters.
            saved_ids = [i for group in loaded["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for saved_id, p in zip(saved_ids, params, strict=True):
                for name, saved in loaded["state"].get(saved_id, {}).items():
                    if isinstance(saved, Tensor):
                        self.state[p][name] = saved.to(
                            device=p.device, dtype=accumulator_dtype(p), copy=True
                        )
                if p in self.state:
                    absorb_rows_(self.state[p])

        # After the user's own pre-hooks, and before the post-hooks.
        hooks = (
            self.register_load_state_dict_pre_hook(note),
            self.register_load_state_dict_post_hook(take_whole_accumulators, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one update.

        Args:
            closure: re-evaluates the model and returns the loss (optional).

        Returns:
            What the closure returned, or None.

        Raises:
            NonFiniteGradientError: a non-finite gradient in a group with ``nonfinite="raise"``.
            RuntimeError: a sparse gradient of another layout than COO, or a parameter whose data
                was replaced by data of another shape than its gradient or accumulator has. In all
                cases nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        self._check_gradients()
        for group in self.param_groups:
            rule = rule_of(group)
            dense = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                if takes_matrix(p, group["rank"]):
                    matrix_update_(p, p.grad, self._sketch_of(p, group), rule)
                    continue
                grad = local_gradient(p, p.grad)
                weights, accumulator = local(p), local(self._accumulator_of(p))
                if grad.is_sparse:
                    sparse_update_(weights, grad, accumulator, rule)
                else:
                    dense.append((weights, grad, accumulator))
            update_(dense, rule, group["foreach"], group["fused"])
        return loss

    @torch.no_grad()
    def consolidate(self, factor: float) -> None:
        r"""Multiply what every parameter has accumulated; call it when a task has ended.

        An extension, not in the paper. From then on what was learnt counts factor times as much as
        what comes, which lets steps be large while a task is learnt and small where a former one
        was:

        .. math::

            A \leftarrow \max(A, \min(\textit{factor} \cdot A, C))

        The ceiling :math:`C` keeps the numbers usable however often it is called: the square root
        of the largest number of the accumulator's dtype, and of a matrix accumulator, direction by
        direction, epsilon times :math:`2^{20}` (float64: :math:`2^{49}`), beside which a history
        as large as epsilon can just be told from rounding.

        Args:
            factor: >= 1; 1 changes nothing.

        Raises:
            TypeError, ValueError: it is no number, or out of its range.
        """
        factor = checked_consolidation("factor", factor)
        if factor == 1:
            return
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                if "sketch" in state:
                    consolidate_(state, factor, group["epsilon"])
                if "accumulator" in state:
                    accumulator = local(state["accumulator"])
                    raised = (accumulator * factor).clamp_max_(
                        torch.finfo(accumulator.dtype).max ** 0.5
                    )
                    torch.maximum(accumulator, raised, out=accumulator)

    def _accumulator_of(self, p: Tensor) -> Tensor:
        """Return a parameter's accumulator: zero at first, later where ``model.to()`` put it."""
        state = self.state[p]
        dtype = accumulator_dtype(p)
        # The key and not the dict: Avalanche leaves an empty dict for a new head.
        if "accumulator" not in state:
            state["accumulator"] = torch.zeros_like(
                p, dtype=dtype, memory_format=torch.preserve_format
            )
        accumulator = state["accumulator"]
        if accumulator.device != p.device or accumulator.dtype != dtype:
            accumulator = state["accumulator"] = accumulator.to(p.device, dtype)
        return accumulator

    def _sketch_of(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return a parameter's matrix accumulator, like :meth:`_accumulator_of`."""
        state = self.state[p]
        if "sketch" not in state:
            state.update(new_sketch(p, group["rank"], group["both_sides"]))
        elif (state["sketch"].device, state["sketch"].dtype) != (p.device, accumulator_dtype(p)):
            state.update(fitted_sketch(state, p) or {})
        widen_(state, p, group["rank"])
        return state

    def _check_gradients(self) -> None:
        """Raise, before anything is changed, if a gradient cannot be used."""
        for group in self.param_groups:
            _require_positive_epsilon(group)
        grads, limits, fused, places = [], [], [], []
        params = [
            (group_index, index, p)
            for group_index, group in enumerate(self.param_groups)
            for index, p in enumerate(group["params"])
        ]
        for place, (group_index, index, p) in enumerate(params):
            group = self.param_groups[group_index]
            if p.grad is None:
                continue
            if p.grad.layout not in (torch.strided, torch.sparse_coo):
                raise RuntimeError(
                    f"CLASSPOptimizer takes dense and sparse COO gradients; parameter {index} of "
                    f"group {group_index} has one of layout {p.grad.layout}"
                )
            if takes_matrix(p, group["rank"]) and (is_dtensor(p) or p.grad.is_sparse):
                kind = "a DTensor" if is_dtensor(p) else "one with a sparse gradient"
                raise RuntimeError(
                    f"matrix accumulators take whole parameters with dense gradients; parameter "
                    f"{index} of group {group_index}, which has rank={group['rank']}, is {kind}: "
                    f"give it rank=0"
                )
            history = self.state.get(p, {}).get("accumulator", p)
            # A kernel knows no shapes and would write beyond the tensors.
            if not p.grad.shape == p.shape == history.shape:
                raise RuntimeError(
                    f"parameter {index} of group {group_index} has the shape {tuple(p.shape)}, its "
                    f"gradient {tuple(p.grad.shape)} and its accumulator {tuple(history.shape)}: "
                    f"its data was replaced; make an optimizer for the new shape, and carry what "
                    f"was accumulated with avalanche_classp.carry_accumulators"
                )
            if group["nonfinite"] == "skip":
                continue
            grad = local_gradient(p, p.grad)
            # An uncoalesced gradient is summed first: its parts may be finite and its sum not.
            grads.append(grad.coalesce().values() if grad.is_sparse else grad)
            limits.append(largest_usable_gradient(accumulator_dtype(p), float(group["power"])))
            fused.append(group["fused"])
            places.append(place)
        verdicts = usable(grads, limits, fused)
        bad = [place for place, good in zip(places, verdicts, strict=True) if not good]
        if any(group["nonfinite"] == "raise" for group in self.param_groups):
            bad = bad_anywhere(bad, [p for _, _, p in params])
        if not bad:
            return
        group_index, index, p = params[bad[0]]
        group = self.param_groups[group_index]
        names = group.get("param_names")
        # Avalanche appends parameters to groups without their names.
        name = f" {names[index]!r}" if names and index < len(names) else ""
        raise NonFiniteGradientError(
            f"non-finite gradient (NaN, infinite, or too large for sums of |g|**power with "
            f"power={group['power']}) in parameter{name} {index} of group {group_index}, shape "
            f"{tuple(p.shape)}; {len(bad)} of {len(verdicts)} gradients are affected "
            f"and nothing was changed. Find its cause, drop the batch, or pass nonfinite='skip' to "
            f"leave such weights as they are"
        )


def rule_of(group: Mapping[str, Any]) -> Rule:
    """Return the update rule of a parameter group."""
    return Rule(
        lr=float(group["lr"]),
        threshold=float(group["threshold"]),
        epsilon=float(group["epsilon"]),
        power=float(group["power"]),
        apply_decay=group["apply_decay"],
        maximize=group["maximize"],
        skip_nonfinite=group["nonfinite"] == "skip",
    )


def has_history(state: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Tell whether an optimizer's state of a parameter holds a history."""
    # The keys and not the dict: Avalanche leaves an empty dict for a new head.
    return state is not None and ("accumulator" in state or "sketch" in state)


def _require_loadable(
    state_dict: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]]
) -> None:
    """Raise if this is not the state of a CLASSPOptimizer with such parameters."""
    version = state_dict.get("version", 0)
    if type(version) is not int or not 0 <= version <= STATE_VERSION:
        raise ValueError(
            f"state_dict has version {version!r}, and this release of avalanche-classp reads "
            f"versions up to {STATE_VERSION}; load it with a newer release"
        )
    if missing := [key for key in ("state", "param_groups") if key not in state_dict]:
        raise ValueError(f"state_dict is no optimizer's: it has no {missing[0]!r}")
    state, saved_groups = state_dict["state"], state_dict["param_groups"]
    _require_type("state", state, Mapping)
    _require_type("param_groups", saved_groups, list, tuple)
    ids: set[int | str] = set()
    for i, group in enumerate(saved_groups):
        _require_type(f"param_groups[{i}]", group, Mapping)
        if missing := [key for key in _ALWAYS_SAVED if key not in group]:
            raise ValueError(
                f"state_dict is no CLASSPOptimizer's: its param_groups[{i}] has no {missing[0]!r}"
            )
        try:
            validate_hyperparameters(group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"state_dict's param_groups[{i}]: {error}") from None
        _require_type(f"param_groups[{i}]['params']", group["params"], list, tuple)
        for saved_id in group["params"]:
            _require_type(f"parameter {saved_id!r}", saved_id, int, str)
            if saved_id in ids:
                raise ValueError(f"state_dict's param_groups name parameter {saved_id!r} twice")
            ids.add(saved_id)
    # If the numbers differ, torch says so.
    as_many = len(ids) == sum(len(group["params"]) for group in param_groups)
    for saved_id, values in state.items():
        _require_type(f"state[{saved_id!r}]", values, Mapping)
        if has_history(values) and saved_id not in ids and as_many:
            raise ValueError(
                f"state_dict's param_groups do not name parameter {saved_id!r}, of which it has an "
                f"accumulator"
            )
    for saved_group, group in zip(saved_groups, param_groups, strict=False):
        for saved_id, p in zip(saved_group["params"], group["params"], strict=False):
            values = state.get(saved_id, {})
            if "sketch" in values:
                _require_sketch(saved_id, values, p)
            if "accumulator" in values:
                _require_accumulator(saved_id, values["accumulator"], p)


def _require_accumulator(saved_id: int | str, saved: Any, p: Tensor) -> None:
    _require_type(f"accumulator of parameter {saved_id}", saved, Tensor)
    if is_dtensor(saved) != is_dtensor(p):
        raise ValueError(
            f"state_dict's accumulator of parameter {saved_id} is a "
            f"{type(saved).__name__}, the parameter a {type(p).__name__}; load it with "
            f"torch.distributed.checkpoint.state_dict.set_optimizer_state_dict and "
            f"full_state_dict=True"
        )
    if saved.shape != p.shape:
        raise ValueError(
            f"state_dict's accumulator of parameter {saved_id} has the shape "
            f"{tuple(saved.shape)}, the parameter {tuple(p.shape)}; if the model has grown "
            f"use avalanche_classp.carry_accumulators"
        )
    _require_numbers(f"accumulator of parameter {saved_id}", saved, p, 0)


def _require_sketch(saved_id: int | str, values: Mapping[str, Any], p: Tensor) -> None:
    step: Any = values.get("step")
    _require_type(f"step of parameter {saved_id}", step, int)
    for side in sides_of(values):
        # Before version 3 there were rows, too.
        waiting = [(side + "rows", 2, -math.inf)] if side + "rows" in values else []
        for name, dimensions, least in (
            (side + "sketch", 2, -math.inf),
            (side + "shed", 0, 0),
            *waiting,
        ):
            what = f"{name} of parameter {saved_id}"
            _require_type(what, values.get(name), Tensor)
            if values[name].dim() != dimensions:
                raise ValueError(f"state_dict's {what} has the shape {tuple(values[name].shape)}")
            _require_numbers(what, values[name], p, least)
        sketch = values[side + "sketch"]
        size, columns = sketch.shape
        matches = p.dim() >= 2 and size == size_of(p, side) and 0 < columns <= size and step >= 0
        if not matches or len(values.get(side + "rows", sketch)) != size:
            raise ValueError(
                f"state_dict's matrix accumulator of parameter {saved_id} is for {size} "
                f"{'outputs' if side else 'inputs'}, with a sketch of shape "
                f"{tuple(sketch.shape)} and step {step}, the parameter has the shape "
                f"{tuple(p.shape)}; if the model has grown use avalanche_classp.carry_accumulators"
            )


def _require_numbers(what: str, saved: Tensor, p: Tensor, least: float) -> None:
    lost = saved.is_meta and not p.is_meta
    if saved.dtype not in _DTYPES or saved.layout != torch.strided or lost:
        raise ValueError(
            f"state_dict's {what} must be dense and of a real floating-point dtype, got "
            f"{saved.dtype}, {saved.layout} on {saved.device}"
        )
    part = local(saved)
    if part.numel() and not part.is_meta:
        low, high = (end.item() for end in torch.aminmax(part))
        if not (low >= least and -math.inf < low and high < math.inf):
            at_least = "" if least == -math.inf else f" and at least {least}"
            raise ValueError(
                f"state_dict's {what} must be finite{at_least}, but goes from {low} to {high}: it "
                f"is damaged, load another"
            )


def _require_type(what: str, value: Any, *types: type) -> None:
    if not isinstance(value, types) or isinstance(value, bool):
        names = " or ".join(t.__name__ for t in types)
        raise TypeError(f"state_dict's {what} must be a {names}, got {type(value).__name__}")


CLASSP_optimizer = CLASSPOptimizer
"""The name in the author's code; same keywords."""


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _validate_lr(value: Any) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_meta:
            where = " on meta" if value.is_meta else ""
            raise ValueError(
                f"lr must be one number, got a tensor of shape {tuple(value.shape)}{where}"
            )
        value = value.item()
    _validate_nonnegative("lr", value)


def _validate_nonnegative(name: str, value: Any) -> None:
    # What float32 cannot hold would fail in the middle of a step.
    if not 0 <= _number(name, value) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")


def _validate_power(value: Any) -> None:
    if not 0 < _number("power", value) < math.inf:
        raise ValueError(f"power must be finite and greater than 0, got {value!r}")


def checked_consolidation(name: str, value: Any) -> float:
    """Return a factor for :meth:`CLASSPOptimizer.consolidate`.

    Raises:
        TypeError, ValueError: it is no number, or out of its range; the message says ``name``.
    """
    factor = _number(name, value)
    if not 1 <= factor <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be finite and at least 1, got {value!r}")
    return factor


def _validate_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(
            f"{name} must be True or False, got {value!r} of type {type(value).__name__}"
        )


def _validate_choice(name: str, value: Any) -> None:
    if value is not None:
        _validate_flag(name, value)


def _validate_rank(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"rank must be a whole number, got {value!r} of type {type(value).__name__}"
        )
    if value < 0:
        raise ValueError(f"rank must be at least 0, got {value!r}")


def _require_positive_epsilon(values: Mapping[str, Any]) -> None:
    rank, epsilon = values.get("rank"), values.get("epsilon")
    if rank and epsilon == 0:
        raise ValueError(f"epsilon must be greater than 0 with rank={rank!r}, got {epsilon!r}")


def _validate_nonfinite(value: Any) -> None:
    if not isinstance(value, str) or value not in _NONFINITE_POLICIES:
        raise ValueError(f"nonfinite must be one of {_NONFINITE_POLICIES}, got {value!r}")


_VALIDATORS: dict[str, Callable[[Any], None]] = {
    "lr": _validate_lr,
    "threshold": lambda value: _validate_nonnegative("threshold", value),
    "epsilon": lambda value: _validate_nonnegative("epsilon", value),
    "power": _validate_power,
    "apply_decay": lambda value: _validate_flag("apply_decay", value),
    "maximize": lambda value: _validate_flag("maximize", value),
    "nonfinite": _validate_nonfinite,
    "foreach": lambda value: _validate_choice("foreach", value),
    "fused": lambda value: _validate_choice("fused", value),
    "rank": _validate_rank,
    "both_sides": lambda value: _validate_flag("both_sides", value),
}


def validate_hyperparameters(values: Mapping[str, Any]) -> None:
    """Check the CLASSP hyper-parameters among ``values``; other keys are left to the caller.

    Raises:
        TypeError: a value of a wrong type; the message names the argument and the value.
        ValueError: a value out of its range; likewise.
    """
    for name, value in values.items():
        if name in _VALIDATORS:
            _VALIDATORS[name](value)
    if values.get("foreach") and values.get("fused"):
        raise ValueError("foreach and fused cannot both be True; give one of them")
    _require_positive_epsilon(values)
