"""A step of CLASSP against a step of AdaGrad, on parameters of four sizes."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Adagrad

from avalanche_classp import CLASSPOptimizer, kernel
from experiments.models import make_model
from experiments.speed.measure import in_turn, ratio

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp-256": lambda: make_model("mlp-256", (1, 28, 28), 10, multi_head=False),
    "mlp-1000": lambda: make_model("mlp-1000", (1, 28, 28), 10, multi_head=False),
    "resnet18": lambda: make_model("resnet18", (3, 32, 32), 10, multi_head=False),
    "100M": lambda: nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(6))),
}

# What is compared with what.
PAIRS = (
    ("blocks, power 1", "adagrad"),
    ("blocks, power 2", "adagrad"),
    ("blocks, power 2, threshold", "adagrad"),
    ("default, power 1", "adagrad"),
    ("default, power 2", "adagrad"),
    ("default, power 2, threshold", "adagrad"),
    ("default, power 1", "adagrad fused"),
    ("fused, power 1", "adagrad fused"),
    ("fused, power 2", "adagrad fused"),
    ("fused, power 2, threshold", "adagrad fused"),
    ("fused, power 1, skip", "adagrad fused"),
    ("fused, power 2, skip", "adagrad fused"),
    ("fused, power 1.5", "adagrad fused"),
    ("fused, power 1.7", "adagrad fused"),
    ("fused, power 1.7", "pow"),
    ("fused, power 1", "copy"),
    ("fused, power 1, skip", "copy"),
)


def measure_step(rounds: int) -> None:
    """Print what a step takes, for each model and way."""
    compiler = kernel.build()
    print("\nA step; microseconds, and ratios paired within a round (median, lowest, highest).")
    print("copy: of as many bytes as a step reads and writes (20 for each parameter).")
    print("pow: torch.pow, once for each weight; a step with power 1.7 needs it twice.")
    print("blocks: what runs by default where no kernel was built; default: where one was.")
    print("threshold: 1e-6, else 0; skip: nonfinite='skip', without the check of all gradients.")
    if not compiler:
        print("No C++ compiler: fused and default are the blocks, too.")
    for name, make in MODELS.items():
        params = list(make().parameters())
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3
        seconds = in_turn(_contenders(params), rounds if name != "100M" else max(3, rounds // 4))
        millions = sum(p.numel() for p in params) / 1e6
        rounds_made = len(seconds["copy"])
        print(f"\n{name}, {millions:.2f} M parameters in {len(params)} tensors, n = {rounds_made}")
        for way, values in seconds.items():
            print(f"  {way:<28} {1e6 * median(values):>9.0f} µs")
        for first, second in PAIRS:
            print(f"  {first} / {second}: {ratio(seconds[first], seconds[second])}")


def _contenders(params: list[Parameter]) -> dict[str, Callable[[], Any]]:
    def classp(power: float, **choice: Any) -> Callable[[], Any]:
        return CLASSPOptimizer(params, lr=1e-6, power=power, **choice).step

    contenders: dict[str, Callable[[], Any]] = {
        "adagrad": Adagrad(params, lr=1e-6).step,
        "adagrad fused": Adagrad(params, lr=1e-6, fused=True).step,
    }
    for way, choice in {
        "blocks": {"fused": False},
        "default": {},
        "fused": {"fused": True},
    }.items():
        contenders[f"{way}, power 1"] = classp(1, **choice)
        contenders[f"{way}, power 2"] = classp(2, **choice)
        contenders[f"{way}, power 2, threshold"] = classp(2, threshold=1e-6, **choice)
    contenders["fused, power 1, skip"] = classp(1, fused=True, nonfinite="skip")
    contenders["fused, power 2, skip"] = classp(2, fused=True, nonfinite="skip")
    contenders["fused, power 1.5"] = classp(1.5, fused=True)
    contenders["fused, power 1.7"] = classp(1.7, fused=True)
    size = sum(p.numel() for p in params)
    source = torch.rand(5 * size // 2)
    target = torch.empty_like(source)
    contenders["pow"] = lambda: torch.pow(source[:size], 1.7, out=target[:size])
    contenders["copy"] = lambda: target.copy_(source)
    return contenders
