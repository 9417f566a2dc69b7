"""A training step with histories of directions against one with plain SGD and the paper's rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD, Optimizer

from avalanche_classp import CLASSPOptimizer

from ..protocol.models import Shape, make_model
from .measure import in_turn, ratio

BATCH_SIZE = 128

STEPS = 25
"""Steps that are timed together: a history of inputs renews its root once in as many."""

MODELS: dict[str, Shape] = {"mlp-256": (1, 28, 28), "mlp-1000": (1, 28, 28), "cnn": (3, 32, 32)}
WAYS: dict[str, dict[str, Any]] = {
    "paper's rule": {},
    "rank 32": {"history": "gradients", "rank": 32, "epsilon": 1.0},
    "rank 128": {"history": "gradients", "rank": 128, "epsilon": 1.0},
    "rank 128, both sides": {
        "history": "gradients",
        "rank": 128,
        "epsilon": 1.0,
        "both_sides": True,
    },
    "inputs, rank 32": {"history": "inputs", "rank": 32},
    "inputs, rank 64": {"history": "inputs", "rank": 64},
    "inputs, rank 128": {"history": "inputs", "rank": 128},
}


def measure_directions(rounds: int, device: torch.device) -> None:
    """Print what a whole training step takes: forward, backward, and the optimizer's."""
    print(
        f"\nA training step, {BATCH_SIZE} samples, the mean of {STEPS}, n = {rounds}; ratios "
        f"paired within a round"
    )
    for name, shape in MODELS.items():
        model = make_model(name, shape, 10, multi_head=False).to(device)
        x = torch.rand(BATCH_SIZE, *shape, device=device)
        y = torch.randint(10, (BATCH_SIZE,), device=device)
        calls = {"sgd": _step(model, x, y, partial(SGD, lr=1e-3))}
        for way, own in WAYS.items():
            calls[way] = _step(model, x, y, partial(CLASSPOptimizer, lr=1e-3, **own))
        seconds = in_turn(calls, rounds, calls=1, device=device)
        print(f"\n{name}")
        for way, values in seconds.items():
            print(f"  {way:<22} {1e3 * median(values) / STEPS:7.2f} ms")
        for way in WAYS:
            print(f"  {way} / sgd: {ratio(seconds[way], seconds['sgd'])}")


def _step(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, make: Callable[..., Optimizer]
) -> Callable[[], object]:
    """Return what trains a copy of the model for STEPS steps."""
    own = copy.deepcopy(model)
    optimizer = make(own.parameters())
    if isinstance(optimizer, CLASSPOptimizer) and optimizer.defaults["history"] == "inputs":
        optimizer.watch(own)

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            functional.cross_entropy(own(x), y).backward()
            optimizer.step()

    return steps
