"""The methods: Avalanche's strategies and CLASSP, each with its hyper-parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.training import EWC, Naive
from torch import nn

from avalanche_classp import CLASSP, PAPER_PHASES, CLASSPOptimizer, CLASSPPlugin
from experiments.protocol.avalanche_fixes import (
    FixedJointTraining,
    FixedLwFPlugin,
    FixedMASPlugin,
    FixedReplayPlugin,
    FixedRWalkPlugin,
    FixedSIPlugin,
)
from experiments.protocol.config import Hyper, RunConfig

Build = Callable[[nn.Module, Hyper, dict[str, Any]], Any]


@dataclass(frozen=True)
class Method:
    """A method by name.

    Attributes:
        description: one line.
        defaults: its hyper-parameters with the values used where nothing was searched.
        build: makes the strategy from a model, hyper-parameters and Avalanche's common arguments.
        usual: it is compared where no methods are named.
    """

    description: str
    defaults: Hyper
    build: Build
    usual: bool = True


def _on_sgd(model: nn.Module, hyper: Hyper, common: dict[str, Any], *plugins: Any) -> Any:
    return Naive(model=model, optimizer=_sgd(model, hyper["lr"]), plugins=list(plugins), **common)


def _sgd(model: nn.Module, lr: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def _require(holds: bool, name: str, value: Any, condition: str) -> None:
    """Check what Avalanche does not: it would give NaN, or go on with nonsense."""
    if not holds:
        raise ValueError(f"{name} must be {condition}, got {value!r}")


def _adagrad(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    optimizer = torch.optim.Adagrad(model.parameters(), lr=float(hyper["lr"]))
    return Naive(model=model, optimizer=optimizer, **common)


def _adam(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=float(hyper["lr"]),
        betas=(float(hyper["beta1"]), float(hyper["beta2"])),
        eps=float(hyper["eps"]),
    )
    return Naive(model=model, optimizer=optimizer, **common)


# How Avalanche's methods differ from their papers, where they run and are used as they are:
# - EWC, online EWC and RWalk take the squared gradient of a mini-batch's mean loss for the Fisher
#   information (the papers: of each sample), so the useful λ grows with the batch size; there is no
#   ½ before λ.
# - EWC, online EWC and MAS measure importance on the training data as it is trained on, random
#   augmentation included; MAS in training mode (with dropout, and batch norm learns on).
# - SI sums gradients that include its own penalty's (the paper: the loss's alone), cuts
#   importances off at 0.001 (Maltoni and Lomonaco, 2019, https://arxiv.org/abs/1806.08568) and
#   leaves batch norm free. With Avalanche's eps of 1e-7, 96 % of the importances stand at that
#   limit after the first experience of split-digits, with eps 0.1 it is 1 % (lr 0.01, 10 epochs).
# - MAS takes the absolute gradient of a mini-batch's mean (the paper: of each sample), mixes old
#   and new importances by alpha (the paper: adds them).
# - LwF's distillation lacks the factor temperature², and alpha is the same in every experience.
# - RWalk takes its gradients in a second pass of each mini-batch, in evaluation mode; where delta_t
#   exceeds the iterations of the first experience, only the Fisher information is left.
# - Replay adds as many stored samples to each mini-batch, which is then twice as large.


def _ewc(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    return EWC(
        model=model,
        optimizer=_sgd(model, hyper["lr"]),
        ewc_lambda=hyper["ewc_lambda"],
        mode="separate",
        **common,
    )


def _ewc_online(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    decay_factor = hyper["decay_factor"]
    _require(decay_factor <= 1, "decay_factor", decay_factor, "from 0 to 1")
    return EWC(
        model=model,
        optimizer=_sgd(model, hyper["lr"]),
        ewc_lambda=hyper["ewc_lambda"],
        mode="online",
        decay_factor=decay_factor,
        **common,
    )


def _si(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    _require(hyper["eps"] > 0, "eps", hyper["eps"], "greater than 0")
    plugin = FixedSIPlugin(si_lambda=hyper["si_lambda"], eps=hyper["eps"])
    return _on_sgd(model, hyper, common, plugin)


def _mas(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    _require(hyper["alpha"] <= 1, "alpha", hyper["alpha"], "from 0 to 1")
    plugin = FixedMASPlugin(lambda_reg=hyper["lambda_reg"], alpha=hyper["alpha"])
    return _on_sgd(model, hyper, common, plugin)


def _lwf(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    temperature = hyper["temperature"]
    _require(temperature > 0, "temperature", temperature, "greater than 0")
    plugin = FixedLwFPlugin(alpha=hyper["alpha"], temperature=temperature)
    return _on_sgd(model, hyper, common, plugin)


def _rwalk(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    _require(hyper["ewc_alpha"] <= 1, "ewc_alpha", hyper["ewc_alpha"], "from 0 to 1")
    _require(hyper["delta_t"] >= 1, "delta_t", hyper["delta_t"], "at least 1")
    own: dict[str, Any] = {key: hyper[key] for key in ("ewc_lambda", "ewc_alpha", "delta_t")}
    return _on_sgd(model, hyper, common, FixedRWalkPlugin(**own))


def _replay(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    return _on_sgd(model, hyper, common, FixedReplayPlugin(mem_size=hyper["mem_size"]))


def _joint(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    return FixedJointTraining(model=model, optimizer=_sgd(model, hyper["lr"]), **common)


def _classp(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    own: dict[str, Any] = {key: value for key, value in hyper.items() if key != "paper_phases"}
    phases = PAPER_PHASES if hyper.get("paper_phases") else None
    return CLASSP(model=model, phases=phases, **own, **common)


def _with_matrices(method: str, description: str) -> Method:
    """Return a method with CLASSP's matrix accumulators in the place of plain SGD."""
    ours, theirs = METHODS["classp-matrix"].defaults, METHODS[method].defaults

    def build(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
        strategy = METHODS[method].build(model, {key: hyper[key] for key in theirs}, common)
        own: dict[str, Any] = {key: hyper[key] for key in ours}
        strategy.plugins.append(CLASSPPlugin(**own))
        return strategy

    return Method(description, {**theirs, **ours}, build, usual=False)


METHODS = {
    "naive": Method("plain SGD, one experience after the other", {"lr": 0.01}, _on_sgd),
    "adagrad": Method(
        "plain AdaGrad, its sums kept from experience to experience", {"lr": 0.001}, _adagrad
    ),
    "adam": Method(
        "plain Adam, its moments kept from experience to experience",
        {"lr": 0.001, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
        _adam,
    ),
    "ewc": Method(
        "elastic weight consolidation on SGD: a penalty for each experience",
        {"lr": 0.01, "ewc_lambda": 100.0},
        _ewc,
    ),
    "ewc-online": Method(
        "online EWC on SGD: one penalty, old importances fade",
        {"lr": 0.01, "ewc_lambda": 100.0, "decay_factor": 0.9},
        _ewc_online,
    ),
    "si": Method(
        "synaptic intelligence on SGD: importance is a weight's part in the fall of the loss",
        {"lr": 0.01, "si_lambda": 1000.0, "eps": 0.1},
        _si,
    ),
    "mas": Method(
        "memory aware synapses on SGD: importance is what a weight does to the output",
        {"lr": 0.01, "lambda_reg": 1.0, "alpha": 0.5},
        _mas,
    ),
    "lwf": Method(
        "learning without forgetting on SGD: the former model's answers on the new data are kept",
        {"lr": 0.01, "alpha": 1.0, "temperature": 2.0},
        _lwf,
    ),
    "rwalk": Method(
        "Riemannian walk on SGD: importance is Fisher information plus a score along the path",
        {"lr": 0.01, "ewc_lambda": 0.1, "ewc_alpha": 0.9, "delta_t": 10},
        _rwalk,
    ),
    "replay": Method(
        "SGD with stored samples in each mini-batch: a reference, the others store none",
        {"lr": 0.01, "mem_size": 200},
        _replay,
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
    "classp-matrix": Method(
        "CLASSP with matrix accumulators (rank above 0), an extension: a history for directions",
        {
            "lr": 0.02,
            "threshold": 0.0,
            "epsilon": 0.02,
            "power": 1.5,
            "rank": 128,
            "both_sides": False,
        },
        _classp,
    ),
}
"""All methods by name."""

METHODS |= {
    "classp-consolidated": Method(
        "classp-matrix whose accumulators are multiplied when an experience begins, an extension",
        {**METHODS["classp-matrix"].defaults, "consolidation": 3.0},
        _classp,
        usual=False,
    ),
    **{
        f"{method}-matrix": _with_matrices(
            method, f"{method} with matrix accumulators in SGD's place"
        )
        for method in ("ewc", "si", "mas", "lwf")
    },
}


def count_steps(config: RunConfig) -> int:
    """Return how often a run of this config trains and evaluates."""
    return 1 if config.method == "joint" else config.experiences
