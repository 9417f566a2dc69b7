"""CLASSP as an Avalanche plugin, beside any strategy and any other plugin."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from avalanche.benchmarks import OnlineCLExperience
from avalanche.core import SupervisedPlugin
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from avalanche_classp.optim.accumulators import has_history, kind_of
from avalanche_classp.optim.hyperparameters import validate, validated_factor
from avalanche_classp.optim.optimizer import CLASSPOptimizer

__all__ = ["PAPER_PHASES", "CLASSPPlugin"]

PAPER_PHASES: tuple[Mapping[str, Any], ...] = (
    {"apply_decay": False},
    {"apply_decay": True, "threshold": 0.0},
)
"""The paper's schedule for ``phases=``: the first experience trains without decay, above the
threshold that the parameter groups have (the accumulators grow, the steps are SGD's); from the
second on the accumulators suppress the steps and every non-zero gradient counts. The paper's
vision experiment (MNIST, then Fashion-MNIST) uses it with lr 0.2, threshold 0.5, epsilon 1e-5 and
power 1."""

_PHASE_KEYS = ("lr", "threshold", "epsilon", "power", "apply_decay")
# What an optimizer that is being replaced hands on, where it has it.
_CARRIED_KEYS = (*_PHASE_KEYS, "maximize", "nonfinite", "history", "rank", "both_sides")
# Choices of implementation: nothing is lost with them.
_IMPLEMENTATION_KEYS = ("foreach", "fused", "capturable", "differentiable")


class CLASSPPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Makes any Avalanche strategy train with CLASSP, and carries what it learnt to protect.

    When training (or an evaluation before it) begins, the plugin replaces the strategy's optimizer
    by a :class:`~avalanche_classp.CLASSPOptimizer` with the same parameter groups; a
    CLASSPOptimizer is used as it is. From then on the accumulators survive what Avalanche does to
    models and optimizers: the reset before the first ``train()``, heads that grow (the history of
    the old classes is kept to the bit, new classes start at zero), new heads, and evaluations that
    replace a head's tensors, also in the middle of an experience. They are carried by parameter
    name, and the plugin holds no tensors between experiences.

    Args:
        lr: for every parameter group, also those with an lr of their own. Default (None): each
            group keeps the lr of the optimizer that is replaced; what is right for SGD is mostly
            too much here, see :class:`~avalanche_classp.CLASSPOptimizer`.
        threshold: for every group that does not name it itself, as all that follow. Default
            (None): CLASSPOptimizer's default, as all that follow.
        epsilon: see :class:`~avalanche_classp.CLASSPOptimizer`.
        power: likewise.
        apply_decay: likewise.
        nonfinite: likewise.
        foreach: likewise.
        fused: likewise.
        history: likewise.
        rank: likewise.
        both_sides: likewise.
        phases: hyper-parameters that change at experience boundaries: a sequence of dicts with
            keys among lr, threshold, epsilon, power and apply_decay. Experience i uses
            ``phases[min(i, len(phases) - 1)]`` in all groups; what a phase does not name has the
            group's original value. Default (None): nothing changes.
        consolidation: an extension of ours: when another experience begins what was accumulated
            before is multiplied by it, so that what was learnt counts more than what comes; see
            :meth:`~avalanche_classp.CLASSPOptimizer.consolidate`. >= 1. Default (1): off.

    Raises:
        TypeError: an argument or a phase of a wrong type.
        ValueError: a value out of its range, an unknown key in a phase, no phases; at the start
            of training: hyper-parameters given both here and by a CLASSPOptimizer, a second
            CLASSPPlugin, or another plugin (a learning-rate scheduler) that holds the optimizer
            which is being replaced and would go on with a dead one.

    Warns:
        UserWarning: the optimizer that is replaced had settings without a counterpart (momentum,
            weight decay), or a parameter changed its shape in a way that is not growth, so that
            its history was dropped.

    Experiences are counted when their training is finished, so an interrupted one keeps its
    phase when it is trained again. In an online stream (``split_online_stream``) the boundaries
    count where they are known (``access_task_boundaries=True``): all sub-experiences of one
    experience share its phase. Where they are not known every sub-experience counts as an
    experience of its own; give no phases and no consolidation there, or count on that.

    A learning-rate scheduler needs the optimizer that is really used: build the CLASSPOptimizer
    yourself and give it to the scheduler and to the strategy. Phases that name lr and a scheduler
    do not go together: the later writer wins.

    ``train(..., reset_optimizer_state=True)`` asks Avalanche to forget the optimizer's state, and
    the accumulators are forgotten then. Do so with strategies that initialise the model anew for
    each experience (GDumb, FromScratchTraining): its new weights have no history to protect. If
    you give the strategy another optimizer between two calls of ``train()``, it is replaced as the
    first one was and the accumulators are handed on. EarlyStoppingPlugin takes weights back to an
    earlier epoch; the accumulators keep what was seen since.

    Example::

        strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
            plugins=[CLASSPPlugin(lr=1e-3, threshold=1e-6)],
        )

    Source: https://arxiv.org/abs/2405.09637, the pseudo-code for the rule and the vision experiment
    for :data:`PAPER_PHASES`.
    """

    def __init__(
        self,
        lr: float | Tensor | None = None,
        threshold: float | None = None,
        epsilon: float | None = None,
        power: float | None = None,
        apply_decay: bool | None = None,
        *,
        nonfinite: str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        history: str | None = None,
        rank: int | None = None,
        both_sides: bool | None = None,
        phases: Sequence[Mapping[str, Any]] | None = None,
        consolidation: float = 1.0,
    ) -> None:
        super().__init__()
        given: dict[str, Any] = {
            "lr": lr,
            "threshold": threshold,
            "epsilon": epsilon,
            "power": power,
            "apply_decay": apply_decay,
            "nonfinite": nonfinite,
            "foreach": foreach,
            "fused": fused,
            "history": history,
            "rank": rank,
            "both_sides": both_sides,
        }
        self.hyperparameters = {k: v for k, v in given.items() if v is not None}
        """What was given; None was left out."""
        validate(self.hyperparameters)

        self.phases = None if phases is None else _validated_phases(phases)
        """The phases, or None."""
        self.consolidation = validated_factor("consolidation", consolidation)
        """What accumulators are multiplied by when the next experience begins."""
        self.experiences_seen = 0
        """Number of experiences known to be trained to their end: the index of the current one."""

        self._consolidated = 0
        self._optimizer: CLASSPOptimizer | None = None
        self._phase: Mapping[str, Any] | None = None
        self._before_phase: list[dict[str, Any]] = []
        self._within_experience = False
        self._evaluated_model: Any = None
        self._history: dict[str, Mapping[str, Any]] = {}

    def take_over(self, strategy: Any) -> None:
        """Replace the strategy's optimizer by a CLASSPOptimizer, unless it is one.

        Called when training or evaluation begins; call it earlier to have the optimizer at hand.

        Raises:
            ValueError: as the class says.
        """
        if any(isinstance(p, CLASSPPlugin) and p is not self for p in strategy.plugins):
            raise ValueError("plugins holds more than one CLASSPPlugin; give one")
        optimizer = strategy.optimizer
        if optimizer is self._optimizer:
            return
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
        if not isinstance(optimizer, CLASSPOptimizer):
            _refuse_dead_references(strategy.plugins, optimizer)
            strategy.optimizer = _classp_with_groups_of(optimizer, self.hyperparameters)
            if self._optimizer is not None:  # the user gave the strategy a new optimizer
                _hand_on_state(self._optimizer, strategy.optimizer)
        elif self.hyperparameters:
            raise ValueError(
                f"{_listed(self.hyperparameters)} given to the plugin although the optimizer is a "
                f"CLASSPOptimizer with values of its own; give them in one place"
            )
        self._use(strategy.optimizer)

    def make_optimizer(self, params: ParamsT) -> CLASSPOptimizer:
        """Make the optimizer that the plugin uses from now on, with its hyper-parameters.

        Args:
            params: see :class:`~avalanche_classp.CLASSPOptimizer`.
        """
        optimizer = CLASSPOptimizer(params, **self.hyperparameters)
        self._use(optimizer)
        return optimizer

    def _use(self, optimizer: CLASSPOptimizer) -> None:
        self._optimizer = optimizer
        self._phase, self._before_phase = None, []

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Take over the optimizer."""
        self._start(strategy)

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Take over the optimizer: evaluation may replace a head's tensors."""
        self._start(strategy)
        self._evaluated_model = strategy.model

    def _start(self, strategy: Any) -> None:
        self.take_over(strategy)
        if strategy.optimized_param_id is None:
            # Avalanche would do this later with reset_optimizer_state=True, and after evaluation
            # may have replaced tensors that the optimizer then keeps for good.
            strategy.make_optimizer()

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Note the accumulators by name; Avalanche adapts model and optimizer next.

        Raises:
            ValueError: the experience has no samples: Avalanche's loader would fail without a word.
        """
        dataset = getattr(strategy.experience, "dataset", None)
        if dataset is not None and len(dataset) == 0:
            number = getattr(strategy.experience, "current_experience", "?")
            raise ValueError(f"experience {number} has no samples; leave it out of the stream")
        # Added to what is there: if training was interrupted between here and
        # before_training_exp, the optimizer has lost what was noted then.
        self._history |= _histories_by_name(strategy)

    def before_training_exp(
        self, strategy: Any, reset_optimizer_state: bool = False, **kwargs: Any
    ) -> None:
        """Give the accumulators back to the adapted parameters, consolidate, set the phase."""
        if not reset_optimizer_state:
            _restore_histories(strategy, self._history)
        self._history = {}
        if self._within_experience and _begins_experience(strategy.experience):
            # Avalanche does not mark the last part where all parts are of the same size.
            self._within_experience = False
            self.experiences_seen += 1
        if self.experiences_seen > self._consolidated:
            assert self._optimizer is not None
            self._optimizer.consolidate(self.consolidation)
            self._consolidated = self.experiences_seen
        if self.phases is not None:
            self._enter(self.phases[min(self.experiences_seen, len(self.phases) - 1)])

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Refuse to look on while another optimizer trains (AR1 and L2P make one of their own).

        Raises:
            ValueError: if the strategy or another plugin has replaced the optimizer.
        """
        if strategy.optimizer is not self._optimizer:
            raise ValueError(
                f"the strategy's optimizer was replaced by {type(strategy.optimizer).__name__} "
                f"after CLASSPPlugin took it over; CLASSP cannot train {type(strategy).__name__}"
            )

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Count the experience, unless it is a part of one that goes on."""
        self._within_experience = not _ends_experience(strategy.experience)
        if not self._within_experience:
            self.experiences_seen += 1

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Follow tensors that the evaluation has replaced: training may just go on."""
        evaluated, self._evaluated_model = self._evaluated_model, None
        if strategy.model is not evaluated:
            return  # another plugin evaluates a model of its own, an average for example
        history = _histories_by_name(strategy)
        strategy.make_optimizer()
        _restore_histories(strategy, history)

    def _enter(self, phase: Mapping[str, Any]) -> None:
        """Undo the last phase in every group and apply this one; do nothing within a phase.

        Values that no phase names are never touched, so that a scheduler may change them.
        """
        if phase is self._phase:
            return
        assert self._optimizer is not None
        for group, original in zip(self._optimizer.param_groups, self._before_phase, strict=False):
            group.update(original)
        self._before_phase = [
            {key: group[key] for key in phase} for group in self._optimizer.param_groups
        ]
        for group in self._optimizer.param_groups:
            group.update(phase)
        self._phase = phase


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def _validated_phases(phases: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(phases, str | Mapping) or not isinstance(phases, Sequence):
        raise TypeError(f"phases must be a sequence of dicts, got {phases!r}")
    if not phases:
        raise ValueError(f"phases must hold at least one phase, got {phases!r}")
    for i, phase in enumerate(phases):
        if not isinstance(phase, Mapping):
            raise TypeError(f"phases[{i}] must be a dict of hyper-parameters, got {phase!r}")
        for key in phase:
            if key not in _PHASE_KEYS:
                raise ValueError(f"phases[{i}] has the key {key!r}; known are {_PHASE_KEYS}")
        try:
            validate(phase)
        except (TypeError, ValueError) as error:
            raise type(error)(f"phases[{i}]: {error}") from None
    return tuple(dict(phase) for phase in phases)


def _refuse_dead_references(plugins: Sequence[Any], optimizer: Optimizer) -> None:
    """Raise if a plugin holds the optimizer, or a scheduler of it, that is being replaced."""
    for plugin in plugins:
        for name, value in getattr(plugin, "__dict__", {}).items():
            items = value.values() if isinstance(value, Mapping) else value
            for held in items if isinstance(items, Collection) else (value,):
                if held is optimizer or getattr(held, "optimizer", None) is optimizer:
                    raise ValueError(
                        f"{type(plugin).__name__}.{name} holds the {type(optimizer).__name__} that "
                        f"CLASSPPlugin replaces, and would go on with a dead optimizer; build a "
                        f"CLASSPOptimizer, give it to {type(held).__name__} and pass it to the "
                        f"strategy as optimizer="
                    )


def _classp_with_groups_of(optimizer: Optimizer, given: Mapping[str, Any]) -> CLASSPOptimizer:
    groups = []
    ignored: dict[str, Any] = {}
    signature = inspect.signature(type(optimizer)).parameters
    for group in optimizer.param_groups:
        carried = {key: group[key] for key in _CARRIED_KEYS if key in group}
        if "lr" in given:
            carried["lr"] = given["lr"]
        names = group.get("param_names", ())
        named = len(names) == len(group["params"]) > 0
        params = list(zip(names, group["params"], strict=True)) if named else list(group["params"])
        groups.append({"params": params, **carried})
        ignored |= {
            key: value
            for key, value in group.items()
            if key in signature
            and key not in (*_CARRIED_KEYS, *_IMPLEMENTATION_KEYS, "params")
            # AdamW decays by default; that is lost as well.
            and (value != signature[key].default or (key == "weight_decay" and value))
        }
    if ignored:
        warnings.warn(
            f"CLASSPPlugin replaces {type(optimizer).__name__}, and CLASSP has no counterpart for "
            f"{_listed(ignored)}: ignored",
            stacklevel=2,
        )
    return CLASSPOptimizer(groups, **given)


def _hand_on_state(old: CLASSPOptimizer, new: CLASSPOptimizer) -> None:
    for group in new.param_groups:
        for p in group["params"]:
            if p in old.state:
                new.state[p] = old.state[p]


def _histories_by_name(strategy: Any) -> dict[str, Mapping[str, Any]]:
    """Return what the optimizer holds of each parameter's history, by the parameter's name."""
    state = strategy.optimizer.state
    # Where evaluation has replaced a tensor of the model, the optimizer still holds the one that
    # Avalanche noted under the same name.
    noted = strategy.optimized_param_id or {}
    model = dict(strategy.model.named_parameters())
    found = {}
    for name in {**noted, **model}:
        for p in (model.get(name), noted.get(name)):
            if p is not None and has_history(state.get(p)):
                found[name] = state[p]
                break
    return found


def _restore_histories(strategy: Any, histories: Mapping[str, Mapping[str, Any]]) -> None:
    state = strategy.optimizer.state
    for name, p in strategy.model.named_parameters():
        history = histories.get(name)
        if history is None:
            continue
        kind = kind_of(history)
        assert kind is not None
        carried = kind.resize(history, p)
        if carried is not None:
            state[p] = carried
        else:
            warnings.warn(
                f"parameter {name!r} changed its shape from {tuple(kind.shape(history, p))} to "
                f"{tuple(p.shape)}, which is not growth: its CLASSP history was dropped",
                stacklevel=2,
            )


def _begins_experience(experience: Any) -> bool:
    return not _has_known_boundaries(experience) or experience.is_first_subexp


def _ends_experience(experience: Any) -> bool:
    return not _has_known_boundaries(experience) or experience.is_last_subexp


def _has_known_boundaries(experience: Any) -> bool:
    return isinstance(experience, OnlineCLExperience) and experience.access_task_boundaries
