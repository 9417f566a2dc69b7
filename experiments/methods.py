"""The methods: Avalanche's strategies and CLASSP, each with its hyper-parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.training import EWC, JointTraining, Naive
from torch import nn

from avalanche_classp import CLASSP, PAPER_PHASES, CLASSPOptimizer
from experiments.config import Hyper, RunConfig

Build = Callable[[nn.Module, Hyper, dict[str, Any]], Any]


@dataclass(frozen=True)
class Method:
    """A method by name.

    Attributes:
        description: one line.
        defaults: its hyper-parameters with the values used where nothing was searched.
        build: makes the strategy from a model, hyper-parameters and Avalanche's common arguments.
    """

    description: str
    defaults: Hyper
    build: Build


def _sgd(model: nn.Module, lr: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def _naive(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    return Naive(model=model, optimizer=_sgd(model, hyper["lr"]), **common)


def _adagrad(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    optimizer = torch.optim.Adagrad(model.parameters(), lr=float(hyper["lr"]))
    return Naive(model=model, optimizer=optimizer, **common)


def _ewc(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    return EWC(
        model=model,
        optimizer=_sgd(model, hyper["lr"]),
        ewc_lambda=hyper["ewc_lambda"],
        mode="separate",
        **common,
    )


def _joint(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    return JointTraining(model=model, optimizer=_sgd(model, hyper["lr"]), **common)


def _classp(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    own: dict[str, Any] = {key: value for key, value in hyper.items() if key != "paper_phases"}
    phases = PAPER_PHASES if hyper["paper_phases"] else None
    return CLASSP(model=model, phases=phases, **own, **common)


METHODS = {
    "naive": Method("plain SGD, one experience after the other", {"lr": 0.01}, _naive),
    "adagrad": Method(
        "plain AdaGrad, its sums kept from experience to experience", {"lr": 0.001}, _adagrad
    ),
    "ewc": Method(
        "elastic weight consolidation (Avalanche's, a penalty for each experience) on SGD",
        {"lr": 0.01, "ewc_lambda": 100.0},
        _ewc,
    ),
    "joint": Method(
        "SGD on all experiences at once: what forgetting costs the others", {"lr": 0.1}, _joint
    ),
    "classp": Method(
        "CLASSP",
        {
            **{
                name: inspect.signature(CLASSPOptimizer).parameters[name].default
                for name in ("lr", "threshold", "epsilon", "power", "apply_decay")
            },
            "paper_phases": False,
        },
        _classp,
    ),
}
"""All methods by name."""


def count_steps(config: RunConfig) -> int:
    """Return how often a run of this config trains and evaluates."""
    return 1 if config.method == "joint" else config.experiences
