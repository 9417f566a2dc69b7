"""CLASSP as an Avalanche strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, Unpack

import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor
from torch.nn import CrossEntropyLoss, Module
from torch.optim import Optimizer

from avalanche_classp.optim.checks import require_whole
from avalanche_classp.optim.hyperparameters import SPECS, Hyperparameters, documented
from avalanche_classp.plugin import CLASSPPlugin

__all__ = ["CLASSP"]


class _Arguments(Hyperparameters, total=False):
    peval_mode: str


@documented()
class CLASSP(SupervisedTemplate):
    """Continual learning with CLASSP, used like ``avalanche.training.EWC``.

    It stores no data, needs no task labels, and keeps one number per weight. All arguments are
    keywords.

    Args:
        model: the model.
        criterion: the loss, called with the model's output and the targets. Default (None): a
            CrossEntropyLoss of its own.
        optimizer: a torch optimizer whose parameter groups, with their lr, CLASSP takes over; a
            CLASSPOptimizer is used as it is and then holds all hyper-parameters. Default (None):
            a CLASSPOptimizer over all parameters of the model.
        phases: hyper-parameters that change at experience boundaries, such as
            ``PAPER_PHASES``; see :class:`~avalanche_classp.CLASSPPlugin`. Default: none.
        consolidation: what accumulators are multiplied by when the next experience begins; see
            :class:`~avalanche_classp.CLASSPPlugin`. Default (1): off.
        {hyperparameters}
        train_mb_size: training mini-batch size. Default: 1.
        train_epochs: training epochs per experience. Default: 1.
        eval_mb_size: evaluation mini-batch size. Default (None): ``train_mb_size``.
        device: where the model is trained. Default: ``"cpu"``.
        plugins: more plugins; the list is copied. Default: none.
        evaluator: an EvaluationPlugin or a function that makes one. Default: Avalanche's.
        eval_every: epochs between evaluations; -1 for none, 0 for one after each experience.
            Default: -1.
        **base_kwargs: further arguments of ``SupervisedTemplate``.

    Raises:
        TypeError, ValueError: a wrong type or value; else as
            :class:`~avalanche_classp.CLASSPPlugin`. At once.

    Mixed precision: Avalanche's loop has none, and a subclass adds it; see
    ``docs/training_loops.md``.

    Source: https://arxiv.org/abs/2405.09637
    """

    def __init__(
        self,
        *,
        model: Module,
        criterion: Callable[..., Tensor] | None = None,
        optimizer: Optimizer | None = None,
        phases: Sequence[Mapping[str, Any]] | None = None,
        consolidation: float = 1.0,
        train_mb_size: int = 1,
        train_epochs: int = 1,
        eval_mb_size: int | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[SupervisedPlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = default_evaluator,
        eval_every: int = -1,
        **base_kwargs: Unpack[_Arguments],
    ) -> None:
        if not isinstance(model, Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
        if not (criterion is None or callable(criterion)):
            raise TypeError(f"criterion must be callable or None, got {criterion!r}")
        if not (isinstance(evaluator, EvaluationPlugin | NoneType) or callable(evaluator)):
            raise TypeError(f"evaluator must be an EvaluationPlugin or make one, got {evaluator!r}")
        require_whole("train_mb_size", train_mb_size)
        require_whole("train_epochs", train_epochs, 0)
        require_whole("eval_every", eval_every, -1)
        if eval_mb_size is not None:
            require_whole("eval_mb_size", eval_mb_size)
        _require_plugins(plugins)
        keywords: dict[str, Any] = dict(base_kwargs)
        hyperparameters: Any = {n: keywords.pop(n) for n in SPECS if n in keywords}
        classp = CLASSPPlugin(phases=phases, consolidation=consolidation, **hyperparameters)
        if optimizer is None:
            optimizer = classp.make_optimizer(model.parameters())
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=CrossEntropyLoss() if criterion is None else criterion,
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[*(plugins or ()), classp],
            evaluator=evaluator,
            eval_every=eval_every,
            **keywords,
        )
        classp.take_over(self)


def _require_plugins(plugins: Any) -> None:
    """Raise for what Avalanche would silently never call, or call wrongly."""
    if isinstance(plugins, str) or not isinstance(plugins, Sequence | NoneType):
        raise TypeError(f"plugins must be a sequence of plugins, got {plugins!r}")
    for i, plugin in enumerate(plugins or ()):
        if plugin is None or isinstance(plugin, type | str | int | float):
            raise TypeError(f"plugins[{i}] must be a plugin, got {plugin!r}")
