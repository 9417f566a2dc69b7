"""A step of CLASSP against a step of AdaGrad, on parameters of four sizes."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Adagrad

from avalanche_classp import CLASSPOptimizer
from avalanche_classp.optim.backends import cpu_kernel as kernel

from ..protocol.models import make_model
from .measure import in_turn, ratio

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
PAIRS_ON_AN_ACCELERATOR = (
    ("default, power 1", "adagrad"),
    ("default, power 1, skip", "adagrad"),
    ("default, power 1.5", "adagrad"),
    ("default, power 2", "adagrad"),
    ("default, power 2, threshold", "adagrad"),
    ("fused, power 1", "adagrad"),
    ("fused, power 1, skip", "adagrad"),
    ("fused, power 1", "copy"),
    ("fused, power 1, skip", "copy"),
)


def measure_step(rounds: int, device: torch.device) -> None:
    """Print what a step takes, for each model and way."""
    on_cpu = device.type == "cpu"
    print("\nA step; microseconds, and ratios paired within a round (median, lowest, highest).")
    print("copy: of as many bytes as a step reads and writes (20 for each parameter).")
    if on_cpu:
        print("pow: torch.pow, once for each weight; a step with power 1.7 needs it twice.")
        print("blocks: what runs by default where no kernel was built; default: where one was.")
    print("threshold: 1e-6, else 0; skip: nonfinite='skip', without the check of all gradients.")
    if on_cpu and not kernel.build():
        print("No C++ compiler: fused and default are the blocks, too.")
    for name, make in MODELS.items():
        params = list(make().to(device).parameters())
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3
        turns = rounds if name != "100M" else max(3, rounds // 4)
        seconds = in_turn(_contenders(params), turns, device=device)
        millions = sum(p.numel() for p in params) / 1e6
        print(f"\n{name}, {millions:.2f} M parameters in {len(params)} tensors, n = {turns}")
        for way, values in seconds.items():
            print(f"  {way:<28} {1e6 * median(values):>9.0f} µs")
        for first, second in PAIRS if on_cpu else PAIRS_ON_AN_ACCELERATOR:
            print(f"  {first} / {second}: {ratio(seconds[first], seconds[second])}")


def _contenders(params: list[Parameter]) -> dict[str, Callable[[], Any]]:
    device = params[0].device
    size = sum(p.numel() for p in params)
    source = torch.rand(5 * size // 2, device=device)
    target = torch.empty_like(source)
    contenders: dict[str, Callable[[], Any]] = {
        "adagrad": Adagrad(params, lr=1e-6).step,
        "copy": lambda: target.copy_(source),
    }

    def add(name: str, power: float, **choice: Any) -> None:
        contenders[name] = CLASSPOptimizer(params, lr=1e-6, power=power, **choice).step

    if device.type != "cpu":
        for way, fused in ("default", None), ("fused", True):
            add(f"{way}, power 1", 1, fused=fused)
            add(f"{way}, power 1, skip", 1, fused=fused, nonfinite="skip")
        add("default, power 1.5", 1.5)
        add("default, power 2", 2)
        add("default, power 2, threshold", 2, threshold=1e-6)
        return contenders
    contenders["adagrad fused"] = Adagrad(params, lr=1e-6, fused=True).step
    for way, fused in ("blocks", False), ("default", None), ("fused", True):
        add(f"{way}, power 1", 1, fused=fused)
        add(f"{way}, power 2", 2, fused=fused)
        add(f"{way}, power 2, threshold", 2, threshold=1e-6, fused=fused)
    add("fused, power 1, skip", 1, fused=True, nonfinite="skip")
    add("fused, power 2, skip", 2, fused=True, nonfinite="skip")
    add("fused, power 1.5", 1.5, fused=True)
    add("fused, power 1.7", 1.7, fused=True)
    contenders["pow"] = lambda: torch.pow(source[:size], 1.7, out=target[:size])
    return contenders
