"""CLASSP as an Avalanche plugin, beside any strategy and any other plugin."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from avalanche.benchmarks import OnlineCLExperience
from avalanche.core import SupervisedPlugin
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from avalanche_classp import made_anew
from avalanche_classp.avalanche_internals import refuse_nested
from avalanche_classp.optim.accumulators import has_history, kind_of
from avalanche_classp.optim.hyperparameters import (
    SPECS,
    Hyperparameters,
    documented,
    validate,
    validated_factor,
)
from avalanche_classp.optim.optimizer import CLASSPOptimizer
from avalanche_classp.stuck import why_stuck
from avalanche_classp.takeover import (
    is_scheduled,
    listed,
    refuse_dead_references,
    replacement,
    step_hooks,
)

__all__ = ["PAPER_PHASES", "CLASSPPlugin"]

PAPER_PHASES: tuple[Mapping[str, Any], ...] = (
    {"apply_decay": False},
    {"apply_decay": True, "threshold": 0.0},
)
"""The paper's schedule for ``phases=``.

The first experience trains without decay, above the groups' threshold: the accumulators grow, the
steps are SGD's. From the second on the accumulators suppress the steps, and every non-zero gradient
counts. The paper's vision experiment (MNIST, then Fashion-MNIST) uses it with lr 0.2, threshold
0.5, epsilon 1e-5 and power 1.
"""

SAMPLES_PER_EPSILON = 10_000
"""With a history of inputs: what the first experience's samples are divided by."""

_PHASE_KEYS = tuple(name for name, spec in SPECS.items() if spec.phase)


@documented(
    lr=(
        None,
        "For every parameter group, also those with an lr of their own. Default: None, each group "
        "keeps the lr of the optimizer that is replaced. What is right for SGD is mostly too much "
        "for CLASSP, see :class:`~avalanche_classp.CLASSPOptimizer`.",
    )
)
class CLASSPPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Makes any Avalanche strategy train with CLASSP, and keeps what it accumulated.

    When training or evaluation begins, the plugin replaces the strategy's optimizer by a
    :class:`~avalanche_classp.CLASSPOptimizer` with the same parameter groups and hooks. A
    CLASSPOptimizer is used as it is.

    The accumulators follow their parameters by name through what Avalanche does to models and
    optimizers. Heads that grow begin at zero where they are new.

    Args:
        phases: hyper-parameters that change at experience boundaries: a sequence of dicts with keys
            among lr, threshold, epsilon, power and apply_decay. Experience i uses
            ``phases[min(i, len(phases) - 1)]`` in all groups. What a phase does not name has the
            group's original value. Default: None, nothing changes.
        consolidation: an extension: when another experience begins, what was accumulated before is
            multiplied by it, >= 1. What was learnt then counts more than what comes; see
            :meth:`~avalanche_classp.CLASSPOptimizer.consolidate`. Default: 1.0, off.
        {hyperparameters}

    All hyper-parameters but lr are for the groups that do not name them themselves.

    With ``history="inputs"`` and no epsilon given, the first experience sets it: 1 for every 10,000
    samples, and at least 1. A larger experience has more to learn before its directions are held.
    A CLASSPOptimizer keeps its own.

    Raises:
        TypeError, ValueError: an argument or a phase of a wrong type, out of its range or unknown.
            When training begins: a strategy without an optimizer, hyper-parameters both here and
            in a CLASSPOptimizer, a second CLASSPPlugin, or a learning-rate scheduler or a plugin
            that would go on with the optimizer that is replaced. Later: another optimizer in the
            strategy.
        RuntimeError: an experience changed the weights without a step of the optimizer, so CLASSP
            did nothing.

    Warns:
        UserWarning: the replaced optimizer had settings without a counterpart (momentum, weight
            decay); a parameter lost its history, because it changed its shape in a way that is not
            growth or its weights were made anew; an experience ended without a step; settings that
            cannot work: in the first epoch weights hardly moved, or the loss did not fall.

    ``docs/phases.md`` says when an experience counts, and when histories are forgotten. With a
    learning-rate scheduler build the CLASSPOptimizer yourself, and give it to the scheduler and to
    the strategy.

    Example::

        strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
            plugins=[CLASSPPlugin(lr=1e-3, threshold=1e-6)],
        )

    Source: https://arxiv.org/abs/2405.09637
    """

    def __init__(
        self,
        *,
        phases: Sequence[Mapping[str, Any]] | None = None,
        consolidation: float = 1.0,
        **hyperparameters: Unpack[Hyperparameters],
    ) -> None:
        super().__init__()
        refuse_nested(CLASSPPlugin)
        if unknown := hyperparameters.keys() - SPECS.keys():
            raise TypeError(f"CLASSPPlugin has no argument {min(unknown)!r}")
        self.hyperparameters: dict[str, Any] = {
            name: value for name, value in hyperparameters.items() if value is not None
        }
        """What was given; None was left out."""
        validate(self.hyperparameters)
        self.phases = None if phases is None else _validated_phases(phases)
        self.consolidation = validated_factor("consolidation", consolidation)
        self._optimizer: Any = None  # a CLASSPOptimizer since the take-over
        self._chooses_epsilon = False
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.experiences_seen = 0
        """Number of experiences known to be trained to their end: the index of the current one."""
        self._consolidated = 0
        self._within_experience = False  # in an online stream
        self._begins = False  # an experience, with its next epoch
        self._evaluated_model: Any = None
        self._history: dict[str, Mapping[str, Any]] = {}
        self._notes: dict[str, made_anew.Note] = {}
        self._steps = 0
        self._steps_when_noted = 0
        self._phase: Mapping[str, Any] | None = None
        self._before_phase: list[dict[str, Any]] = []
        self._first_losses: list[Tensor] | None = []  # of the first epoch, None after it

    # --- the optimizer ----------------------------------------------------------------------------

    def take_over(self, strategy: Any) -> None:
        """Replace the strategy's optimizer by a CLASSPOptimizer, unless it is one.

        Called when training or evaluation begins; call it earlier to have the optimizer at hand.
        """
        if any(isinstance(p, CLASSPPlugin) and p is not self for p in strategy.plugins):
            raise ValueError("plugins holds more than one CLASSPPlugin; give one")
        optimizer = strategy.optimizer
        if optimizer is None:
            raise ValueError(
                f"{type(strategy).__name__} trains without an optimizer, so CLASSP has nothing to "
                f"do there; leave CLASSPPlugin out"
            )
        if optimizer is self._optimizer:
            return
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
        if isinstance(optimizer, CLASSPOptimizer):
            if self.hyperparameters:
                raise ValueError(
                    f"{listed(self.hyperparameters)} given to the plugin although the optimizer is "
                    f"a CLASSPOptimizer with values of its own; give them in one place"
                )
            self._use(optimizer)
            return
        refuse_dead_references(strategy.plugins, optimizer)
        before = self._optimizer
        strategy.optimizer = replacement(optimizer, self.hyperparameters)
        self._use(strategy.optimizer)
        self._chooses_epsilon = "epsilon" not in self.hyperparameters
        if before is not None:  # the user gave the strategy a new optimizer
            _hand_on_state(before, strategy.optimizer)
        # Of the optimizer, so that copies of plugin and strategy are without it.
        strategy.optimizer._replaced = weakref.ref(optimizer)

    def make_optimizer(self, params: ParamsT) -> CLASSPOptimizer:
        """Make the optimizer that the plugin uses from now on, with its hyper-parameters."""
        optimizer = CLASSPOptimizer(params, **self.hyperparameters)
        self._use(optimizer)
        self._chooses_epsilon = "epsilon" not in self.hyperparameters
        return optimizer

    def _use(self, optimizer: CLASSPOptimizer) -> None:
        before, self._optimizer = self._optimizer, optimizer
        if before is not None and _parameters(before).isdisjoint(_parameters(optimizer)):
            self._start_afresh()
        self._chooses_epsilon = False
        self._phase, self._before_phase = None, []

    def _count_steps(self) -> None:
        """Have each step of the optimizer counted; copies of an optimizer have no hooks."""
        if self._count_step not in step_hooks(self._optimizer):
            self._optimizer.register_step_post_hook(self._count_step)

    def _count_step(self, optimizer: Optimizer, *_: Any) -> None:
        # The hooks of an optimizer that was replaced are shared with it.
        self._steps += optimizer is self._optimizer

    # --- training ---------------------------------------------------------------------------------

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Take over the optimizer."""
        self._start(strategy)
        dead = getattr(self._optimizer, "_replaced", lambda: None)()
        if dead is not None and (is_scheduled(dead) or not strategy.clock.train_iterations):
            refuse_dead_references(strategy.plugins, dead)  # a scheduler came after the take-over

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Take over the optimizer: evaluation may replace a head's tensors."""
        self._start(strategy)
        self._evaluated_model = strategy.model

    def _start(self, strategy: Any) -> None:
        self.take_over(strategy)
        self._count_steps()
        if strategy.optimized_param_id is None:
            # Avalanche would do this later with reset_optimizer_state=True, and after evaluation
            # may have replaced tensors that the optimizer then keeps for good.
            strategy.make_optimizer()

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Note the accumulators by name; Avalanche adapts model and optimizer next."""
        dataset = getattr(strategy.experience, "dataset", None)
        if dataset is not None and len(dataset) == 0:  # Avalanche's loader fails without a word
            number = getattr(strategy.experience, "current_experience", "?")
            raise ValueError(f"experience {number} has no samples; leave it out of the stream")
        if not isinstance(strategy.optimizer, CLASSPOptimizer):  # AR1 makes one each time
            self.take_over(strategy)
            self._count_steps()
        # Added to what is there: if training was interrupted between here and
        # before_training_exp, the optimizer has lost what was noted then.
        self._history |= _histories_by_name(strategy)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Give the accumulators back to the adapted parameters, consolidate, set the phase."""
        _restore_histories(strategy, self._history)
        self._history = {}
        experience = strategy.experience
        if self._within_experience and (not _is_part(experience) or experience.is_first_subexp):
            # Avalanche does not mark the last part where all parts are of the same size.
            self._within_experience = False
            self.experiences_seen += 1
        if self.experiences_seen > self._consolidated:
            self._optimizer.consolidate(self.consolidation)
            self._consolidated = self.experiences_seen
        if self._chooses_epsilon:
            self._choose_epsilon(len(strategy.adapted_dataset))
        self._enter_phase()
        self._begins = True

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Refuse another optimizer; with the first epoch drop the history of weights made anew."""
        optimizer = strategy.optimizer
        if optimizer is not self._optimizer:
            self._refuse_another_optimizer(strategy)
            self._use(optimizer)  # PackNetPlugin resets the optimizer like this
            self._count_steps()
            self._enter_phase()
        if self._begins:
            self._begins = False
            self._drop_histories_of_weights_made_anew(strategy)
        if any(group["history"] == "inputs" for group in optimizer.param_groups):
            optimizer.watch(strategy.model)  # anew: layers may have been replaced

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Note the loss, in the first epoch."""
        if self._first_losses is not None and isinstance(strategy.loss, Tensor):
            self._first_losses.append(strategy.loss.detach())

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Warn once, after the first epoch, of settings that cannot work."""
        losses, self._first_losses = self._first_losses, None
        if losses is None or not self._steps or strategy.optimizer is not self._optimizer:
            return
        if reason := why_stuck(strategy, self._notes, self._steps, losses):
            warnings.warn(f"after the first epoch {reason}", stacklevel=2)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Count the experience, unless it is a part of one that goes on."""
        self._refuse_another_optimizer(strategy)
        if not self._begins:
            self._refuse_training_without_steps(strategy)
            self._note_weights(strategy)
        experience = strategy.experience
        self._within_experience = _is_part(experience) and not experience.is_last_subexp
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

    def _choose_epsilon(self, samples: int) -> None:
        """Fit the epsilon of a history of inputs to the first experience's size."""
        default = SPECS["epsilon"].default_for("inputs")
        for group in self._optimizer.param_groups:
            if group["history"] == "inputs" and group["epsilon"] == default:
                group["epsilon"] = max(default, samples / SAMPLES_PER_EPSILON)
        self._chooses_epsilon = False

    # --- phases -----------------------------------------------------------------------------------

    def _enter_phase(self) -> None:
        """Undo the last phase in every group and apply the next one; do nothing within a phase.

        Values that no phase names are never touched, so that a scheduler may change them.
        """
        if self.phases is None:
            return
        phase = self.phases[min(self.experiences_seen, len(self.phases) - 1)]
        if phase is self._phase:
            return
        groups = self._optimizer.param_groups
        for group, original in zip(groups, self._before_phase, strict=False):
            group.update(original)
        self._before_phase = [{key: group[key] for key in phase} for group in groups]
        for group in groups:
            group.update(phase)
        self._phase = phase

    # --- whether it was CLASSP that changed the weights -------------------------------------------

    def _refuse_another_optimizer(self, strategy: Any) -> None:
        if not isinstance(strategy.optimizer, CLASSPOptimizer):
            raise ValueError(
                f"the strategy's optimizer was replaced by {type(strategy.optimizer).__name__} "
                f"after CLASSPPlugin took it over; CLASSP cannot train {type(strategy).__name__} "
                f"like this: leave CLASSPPlugin out, or what replaces the optimizer"
            )

    def _refuse_training_without_steps(self, strategy: Any) -> None:
        iterations = strategy.clock.train_exp_iterations
        if not iterations or self._steps > self._steps_when_noted:
            return
        where = f"{type(strategy).__name__} has trained {iterations} iterations"
        if any(
            made_anew.has_moved(self._notes[name], p)
            for name, p in strategy.model.named_parameters()
            if name in self._notes
        ):
            raise RuntimeError(
                f"{where} and changed the weights without one step of the optimizer, so CLASSP did "
                f"nothing; choose settings with which it calls optimizer.step() (LaMAML: "
                f"sync_update=True), or leave CLASSPPlugin out"
            )
        warnings.warn(
            f"{where} without one step of the optimizer, so CLASSP has learnt nothing; accumulate "
            f"gradients over fewer mini-batches than an experience has, or look why steps were "
            f"skipped",
            stacklevel=2,
        )

    def _drop_histories_of_weights_made_anew(self, strategy: Any) -> None:
        state = self._optimizer.state
        dropped = []
        if self._steps == self._steps_when_noted:
            for name, p in strategy.model.named_parameters():
                noted = self._notes.get(name)
                if noted and has_history(state.get(p)) and made_anew.is_made_anew(noted, p):
                    del state[p]
                    dropped.append(name)
        if dropped:
            shown = ", ".join(dropped[:4]) + (f" and {len(dropped) - 4} more" * (len(dropped) > 4))
            warnings.warn(
                f"the weights of {shown} were made anew since they were last trained: all of them "
                f"changed without a step of the optimizer, as far as training had moved them; "
                f"their CLASSP histories were dropped",
                stacklevel=2,
            )
        self._note_weights(strategy)

    def _note_weights(self, strategy: Any) -> None:
        """Note where the weights are, and which of them are without history."""
        self._steps_when_noted = self._steps
        for name, p in strategy.model.named_parameters():
            noted = self._notes.get(name)
            if noted and made_anew.fits(noted, p) and has_history(self._optimizer.state.get(p)):
                made_anew.note_again(noted, p)
            elif new := made_anew.note(p):
                self._notes[name] = new


def _parameters(optimizer: Optimizer) -> set[Any]:
    return {p for group in optimizer.param_groups for p in group["params"]}


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


def _hand_on_state(old: CLASSPOptimizer, new: CLASSPOptimizer) -> None:
    for p in _parameters(new) & _parameters(old):
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
    """Give parameters that Avalanche has replaced the histories of the old ones."""
    state = strategy.optimizer.state
    for name, p in strategy.model.named_parameters():
        history = histories.get(name)
        # Avalanche leaves an empty entry where it replaces a parameter. If there is none somebody
        # has reset the optimizer, and wants it so.
        if history is None or p not in state or has_history(state[p]):
            continue
        kind = kind_of(history)
        assert kind is not None
        resized = kind.resize(history, p)
        if resized is not None:
            state[p] = resized
        else:
            warnings.warn(
                f"parameter {name!r} changed its shape from {tuple(kind.shape(history, p))} to "
                f"{tuple(p.shape)}, which is not growth: its CLASSP history was dropped",
                stacklevel=2,
            )


def _is_part(experience: Any) -> bool:
    """Tell whether this is a part of an experience whose boundaries are known."""
    return isinstance(experience, OnlineCLExperience) and experience.access_task_boundaries
