"""The CLASSP optimizer: AdaGrad generalised to any power, with sparse updates.

Paper: Oswaldo Ludwig, "CLASSP: a Biologically-Inspired Approach to Continual Learning through
Adjustment Suppression and Sparsity Promotion", 2024, https://arxiv.org/abs/2405.09637.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from avalanche_classp.optim import state_dict as saved
from avalanche_classp.optim.accumulators import KINDS, Accumulator, Update, kind_for, kind_of
from avalanche_classp.optim.accumulators.base import DTYPES, Reduce, has_values
from avalanche_classp.optim.accumulators.inputs import InputsAccumulator
from avalanche_classp.optim.backends import find_nonfinite
from avalanche_classp.optim.hyperparameters import (
    SPECS,
    documented,
    require_consistent,
    resolve,
    validate,
    validated_factor,
)
from avalanche_classp.optim.rule import rule_of
from avalanche_classp.optim.sharding import bad_anywhere, is_dtensor, local_gradient
from avalanche_classp.optim.watch import Layer, Watcher, WatchReport, find_layers, rows_of

__all__ = ["CLASSPOptimizer", "NonFiniteGradientError"]


class NonFiniteGradientError(RuntimeError):
    """A gradient that :class:`CLASSPOptimizer` refuses; no weight or accumulator has changed."""


class _Entry(NamedTuple):
    """A parameter with a gradient, and its places among the groups and in its group."""

    group_index: int
    place: int
    param: Tensor
    grad: Tensor
    kind: Accumulator


@documented()
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

    lr is a length in weight space, not a rate: choose the distance that you would let a weight go,
    0.001 to 0.1 for usual initialisations. ``docs/choosing.md`` says how to choose all values.

    Args:
        params: iterable of parameters, of ``(name, parameter)`` pairs, or of dicts that define
            parameter groups; each group may set every hyper-parameter itself. Any shape; float64,
            float32, bfloat16 and float16.
        {hyperparameters}

    All ways to take a step give the same numbers: with the powers 1 and 2 to the last bit on a CPU
    with AVX2, with others but for rounding. Only ``foreach=True``, ``foreach=False`` and a GPU's
    default need memory in proportion to the parameters during a step.

    Raises:
        TypeError: an argument of a wrong type, or complex or integer parameters.
        ValueError: an argument out of its range or without effect; the message names it and the
            value. A group that was changed to epsilon 0 is refused by :meth:`step`.
        NonFiniteGradientError: from :meth:`step`, with ``nonfinite="raise"``.

    Sparse gradients (``torch.nn.Embedding(sparse=True)``) work and touch the rows that they name
    only; parameters whose grad is None are left alone; ``p.grad`` is never modified.

    The accumulators follow their parameters when ``model.to(...)`` changes device or dtype after
    construction. With ``torch.amp.GradScaler`` call ``scaler.step(optimizer)`` as usual: it divides
    the gradients by the scale first, so the threshold compares true gradients
    (``docs/training_loops.md`` shows it in Avalanche). The same holds for accumulated and
    clipped gradients: what counts is ``p.grad`` as it is when :meth:`step` is called.

    A float32 accumulator takes no addition below half of its last digit: with a constant
    :math:`|g|` it stops growing after :math:`2^{24} \approx 1.7 \cdot 10^7` steps. With power=1
    float32 weights larger than 2 lr do not take such small steps either. If so many are to count
    use ``model.double()``.

    Where the accumulated history cannot be represented (``epsilon=0`` and a gradient so small
    that ``|g|**power`` is zero in the dtype) the weight stays as it is.

    The author's released code differs from the paper and is not followed; ``docs/paper.md`` says
    where. With power=1 its runs are this optimizer's with threshold=0. The paper's equation (1)
    sums the history up to the step before, its pseudo-code, followed here, adds the current
    gradient first.

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

    _biases: dict[Tensor, Tensor | None] = {}  # noqa: RUF012 -- replaced, never changed
    """Watched weights, each with the bias that moves with it."""
    _watchers: list[Watcher] = []  # noqa: RUF012 -- likewise
    _reduce: Reduce | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        threshold: float | None = None,
        epsilon: float | None = None,
        power: float | None = None,
        apply_decay: bool | None = None,
        *,
        history: str | None = None,
        rank: int | None = None,
        both_sides: bool | None = None,
        nonfinite: str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in SPECS}
        # The defaults are checked even if every group overrides them.
        validate(given)
        if not isinstance(params, Iterable):
            raise TypeError(
                f"params must be an iterable of parameters, of (name, parameter) pairs or of "
                f"dicts, got {params!r}"
            )
        super().__init__(params, resolve(given))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; hyper-parameters that it does not name are the constructor's.

        A group with a history of its own has that history's defaults for lr, epsilon, power and
        what the history alone has.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        if isinstance(param_group, dict):
            if not isinstance(param_group.get("params"), Iterable):
                raise TypeError(
                    f"params of a group must be a parameter or an iterable of them, got "
                    f"{param_group.get('params')!r}"
                )
            own = {name: param_group[name] for name in SPECS if param_group.get(name) is not None}
            history = own.get("history", self.defaults["history"])
            inherited = {
                name: self.defaults[name]
                for name, spec in SPECS.items()
                if history == self.defaults["history"] or not spec.defaults
            }
            validate({**inherited, **own})
            param_group = {**param_group, **resolve({**inherited, **own})}
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in DTYPES:
                del self.param_groups[-1]
                raise TypeError(
                    f"CLASSPOptimizer takes real floating-point parameters of 16 to 64 bits; got "
                    f"one of {p.dtype} and shape {tuple(p.shape)}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return ``state``, ``param_groups`` and ``version``; see torch's ``Optimizer.state_dict``.

        The accumulators are the optimizer's own tensors, not copies.
        """
        return {**super().state_dict(), "version": saved.VERSION}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        The accumulators go to the devices of the parameters, wherever they were saved.

        Raises:
            TypeError, ValueError: it is no CLASSPOptimizer's, of another version, or its groups or
                shapes are not this optimizer's. Nothing has been changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        loaded: dict[str, Any] = {}

        def check(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            saved.require_loadable(state_dict, optimizer.param_groups)
            loaded.update(state_dict)

        def copy(optimizer: Optimizer) -> None:
            saved.copy_accumulators(loaded, optimizer)

        # After the user's own pre-hooks, and before the post-hooks.
        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(copy, prepend=True),
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
        self._update_parameters()
        return loss

    def _update_parameters(self) -> None:
        """Take the step that the gradients ask for."""
        entries = self._entries()
        with ExitStack() as stack:
            for device_type in {entry.param.device.type for entry in entries} - {"meta"}:
                if torch.is_autocast_enabled(device_type):
                    # Products of accumulators need their own precision.
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            self._require_finite(entries)
            updates: dict[tuple[int, Accumulator], list[Update]] = {}
            biases = [self._biases.get(e.param) if self._biases else None for e in entries]
            with_weight = {id(bias) for bias in biases if bias is not None}
            for entry, bias in zip(entries, biases, strict=True):
                if id(entry.param) in with_weight:
                    continue
                state = self._state_of(entry)
                update = Update(entry.param, entry.grad, state, bias, self._reduce)
                updates.setdefault((entry.group_index, entry.kind), []).append(update)
            for (group_index, kind), some in updates.items():
                group = self.param_groups[group_index]
                rule = rule_of(group)
                if group["history"] == "inputs" and kind.key == "accumulator":
                    # lr is SGD's rate where nothing is remembered, here as in the layers.
                    rule = rule._replace(lr=rule.lr * rule.epsilon ** (1 / rule.power))
                kind.update_(some, rule, group)

    def watch(self, model: torch.nn.Module) -> WatchReport:
        """See the inputs of a model's layers from now on; ``history="inputs"`` needs it.

        Forward hooks look in training mode with gradients only. Linear layers, convolutions and the
        joint projection of attention are seen; all other parameters keep a history of weights.
        Call it again when a layer was replaced, such as a head that grows: histories stay with
        their parameters. A copy of the model is not watched, and a copy of the optimizer watches
        none.

        Args:
            model: a model over parameters of this optimizer. With DistributedDataParallel give the
                wrapped one, so that all processes accumulate the same.

        Returns:
            Which parameters are covered.

        Raises:
            ValueError: no group has ``history="inputs"``, none of its parameters is the model's, or
                the model has no layer whose inputs can be seen.
        """
        groups = {
            id(p): group
            for group in self.param_groups
            if group["history"] == "inputs"
            for p in group["params"]
        }
        if not groups:
            raise ValueError("watch needs a group with history='inputs'; this optimizer has none")
        names = {id(p): name for name, p in model.named_parameters()}
        if not groups.keys() & names.keys():
            raise ValueError("watch needs the model that this optimizer trains; it has none of it")
        for watcher in self._watchers:
            watcher.remove()
        covered: set[int] = set()
        self._biases, self._watchers = {}, []
        parallel = isinstance(model, torch.nn.parallel.DistributedDataParallel)
        self._reduce = Reduce(model.process_group) if parallel else None
        for layer in find_layers(model):
            group = groups.get(id(layer.weight))
            if group is None:
                continue
            bias = layer.bias
            together = bias is not None and groups.get(id(bias)) is group
            self._biases[layer.weight] = bias if together else None
            covered |= {id(layer.weight), *([id(bias)] if together else [])}
            self._watchers.append(Watcher(layer, self._observe))
        report = WatchReport()
        for key, name in names.items():
            if key in covered:
                report.covered.append(name)
            elif key in groups:
                report.others[name] = "no layer whose inputs can be seen multiplies with it"
        if not self._watchers:
            raise ValueError(
                "watch found no layer whose inputs can be seen (linear, convolution, attention); "
                "use history='weights' for this model"
            )
        return report

    def _observe(self, layer: Layer, args: tuple[Any, ...], call: int) -> None:
        """Accumulate what a layer was given."""
        weight = layer.weight
        group = next(g for g in self.param_groups if any(p is weight for p in g["params"]))
        kind, state = kind_for(weight, group), self.state[weight]
        assert isinstance(kind, InputsAccumulator)
        if kind.key not in state:
            state.update(kind.new(weight, group, self._biases[weight]))
        kind.fit_(state, weight, group)
        for rows in rows_of(layer.module, args, kind.rows_wanted(state), call):
            kind.observe_(state, rows.to(state[kind.key]))

    @torch.no_grad()
    def consolidate(self, factor: float) -> None:
        r"""Multiply what every parameter has accumulated; call it when a task has ended.

        An extension, not in the paper. From then on what was learnt counts factor times as much as
        what comes. So steps can be large while a task is learnt and small where a former one was:

        .. math::

            A \leftarrow \max(A, \min(\textit{factor} \cdot A, C))

        The ceiling :math:`C` keeps the numbers usable however often it is called. It is the square
        root of the largest number of the accumulator's dtype. For a history of directions it is, in
        each direction, epsilon times :math:`2^{20}` (float64: :math:`2^{49}`), beside which a
        history as large as epsilon can just be told from rounding.

        Args:
            factor: >= 1; 1 changes nothing.

        Raises:
            TypeError, ValueError: it is no number, or out of its range.
        """
        factor = validated_factor("factor", factor)
        if factor == 1:
            return
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p)
                if state and (kind := kind_of(state)):
                    kind.consolidate_(state, factor, group["epsilon"])

    def _state_of(self, entry: _Entry) -> dict[str, Any]:
        """Return a parameter's state, on the device where ``model.to()`` put the parameter."""
        state, group = self.state[entry.param], self.param_groups[entry.group_index]
        if entry.kind.key not in state:
            state.update(entry.kind.new(entry.param, group, self._biases.get(entry.param)))
        entry.kind.fit_(state, entry.param, group)
        return state

    def _kind_of(self, p: Tensor, group: Mapping[str, Any]) -> Accumulator:
        if group["history"] != "inputs":
            return kind_for(p, group)
        if not self._watchers:
            raise RuntimeError(
                "history='inputs' needs to see the inputs of the layers; call "
                "optimizer.watch(model) before the first forward pass"
            )
        return kind_for(p, group) if p in self._biases else KINDS["weights"]

    def _entries(self) -> list[_Entry]:
        """Return the parameters that have gradients, each gradient brought here once.

        Raises:
            RuntimeError, ValueError: what :meth:`step` says, but for non-finite gradients.
        """
        entries = []
        for group_index, group in enumerate(self.param_groups):
            require_consistent(group)
            for index, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                where = f"parameter {index} of group {group_index}"
                kind, grad = self._kind_of(p, group), p.grad
                if grad.layout not in (torch.strided, torch.sparse_coo):
                    raise RuntimeError(
                        f"CLASSPOptimizer takes dense and sparse COO gradients; {where} has one of "
                        f"layout {grad.layout}"
                    )
                if refusal := kind.refusal(p):
                    raise RuntimeError(
                        f"history={group['history']!r} takes whole parameters with dense "
                        f"gradients; {where} is {refusal}: give it history='weights'"
                    )
                state: Any = self.state.get(p)
                if isinstance(kind, InputsAccumulator) and not state and not self._reduce:
                    raise RuntimeError(
                        f"{where} has a gradient, but its layer's inputs were never seen: call the "
                        f"layer itself, in training mode, after watch; or put the parameter into a "
                        f"group with history='weights'"
                    )
                has_one = state is not None and kind.key in state
                if state and not has_one and (held := kind_of(state)):
                    raise RuntimeError(
                        f"{where} has a history of another kind ({held.key}) than its group's "
                        f"history={group['history']!r}; make an optimizer for another kind"
                    )
                shape = kind.shape(state, p) if has_one else p.shape
                # A kernel knows no shapes and would write beyond the tensors.
                if not grad.shape == p.shape == shape:
                    raise RuntimeError(
                        f"{where} has the shape {tuple(p.shape)}, its gradient "
                        f"{tuple(grad.shape)} and its accumulator {tuple(shape)}: its data was "
                        f"replaced; make an optimizer for the new shape, and carry what was "
                        f"accumulated with avalanche_classp.carry_accumulators"
                    )
                entries.append(_Entry(group_index, index, p, local_gradient(p, grad), kind))
        return entries

    def _require_finite(self, entries: list[_Entry]) -> None:
        """Raise if a gradient of a group with ``nonfinite="raise"`` cannot be used."""
        groups = self.param_groups
        checked = [
            entry
            for entry in entries
            if groups[entry.group_index]["nonfinite"] == "raise" and has_values(entry.grad)
        ]
        # An uncoalesced gradient is summed first: its parts may be finite and its sum not.
        found = find_nonfinite(
            [e.grad.coalesce().values() if e.grad.is_sparse else e.grad for e in checked],
            [e.kind.limit(e.param, float(groups[e.group_index]["power"])) for e in checked],
            [groups[e.group_index]["fused"] for e in checked],
        )
        params = [p for group in groups for p in group["params"]]
        if not found and not any(map(is_dtensor, params)):
            return
        # Of all parameters, as many in each process: one without a gradient here may have one
        # elsewhere.
        places = [(g, i) for g, group in enumerate(groups) for i in range(len(group["params"]))]
        bad = [places.index((checked[i].group_index, checked[i].place)) for i in found]
        if any(group["nonfinite"] == "raise" for group in groups):
            bad = bad_anywhere(bad, params)
        if not bad:
            return
        group_index, index = places[bad[0]]
        group = groups[group_index]
        names = group.get("param_names")
        # Avalanche appends parameters to groups without their names.
        name = f" {names[index]!r}" if names and index < len(names) else ""
        raise NonFiniteGradientError(
            f"non-finite gradient (NaN, infinite, or too large for sums of |g|**power with "
            f"power={group['power']}) in parameter{name} {index} of group {group_index}, shape "
            f"{tuple(params[bad[0]].shape)}; {len(bad)} of {len(checked)} gradients are affected "
            f"and nothing was changed. Find its cause, drop the batch, or pass nonfinite='skip' to "
            f"leave such weights as they are"
        )
