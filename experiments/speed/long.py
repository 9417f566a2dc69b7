"""Long streams: what 500 experiences cost, and what 10⁸ steps do to a float32 accumulator.

The rule's sums are taken step after step as the optimizer takes them, by numpy over the steps at
once: 10⁸ calls of ``step`` would take an hour.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from numpy.typing import DTypeLike, NDArray
from sklearn.datasets import load_digits
from torch import nn

from avalanche_classp import CLASSP, CLASSPOptimizer, classp_metrics

from ..protocol.models import make_model
from ..running.memory import method_state_bytes

SAMPLES, BATCH, EPOCHS = 256, 32, 2
LR, EPSILON, START = 0.001, 1e-4, 0.05
"""Of the weights whose way is measured."""

_PART = 10**7
"""Steps at once, for the memory's sake."""

Draw = Callable[[np.random.Generator, int], NDArray[Any]]

DRAWS: dict[str, Draw] = {
    "g = 1": lambda rng, n: np.ones(n, np.float32),
    "g = ±1": lambda rng, n: rng.choice(np.array([-1, 1], np.float32), n),
    "g normal": lambda rng, n: rng.standard_normal(n, np.float32),
    "g log-normal, sigma 2": lambda rng, n: np.exp(2 * rng.standard_normal(n, np.float32)),
}
"""Gradients, by what they are like."""


def measure_long(experiences: int) -> None:
    """Train one strategy on digits whose pixels are permuted anew in each experience.

    A new strategy takes its turn with each experience, to tell what the stream's length costs from
    what else the machine does.

    Args:
        experiences: at least 20.
    """
    torch.manual_seed(0)
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    x = x.float() / 8 - 1
    parts: list[Any] = []
    for _ in range(experiences):
        chosen, order = torch.randperm(len(x))[:SAMPLES], torch.randperm(64)
        parts.append((x[chosen][:, order], y[chosen]))
    benchmark = tensors_benchmark(parts, parts[:1], task_labels=[0] * experiences)
    strategy = _strategy()
    seconds, ratios, resident, state = [], [], [], []
    for experience in benchmark.train_stream:
        seconds.append(_seconds(strategy, experience))
        ratios.append(seconds[-1] / _seconds(_strategy(), experience))
        resident.append(_resident_bytes())
        state.append(method_state_bytes(strategy))
    tenth = experiences // 10
    starts = range(0, 10 * tenth, tenth)
    grown = (resident[-1] - resident[tenth]) / 2**20
    print(
        f"\nCLASSP on {experiences} experiences of permuted digits, mlp-256, {SAMPLES} samples, "
        f"{EPOCHS} epochs, mini-batches of {BATCH}, with classp_metrics\n"
        f"  an experience / the same with a new strategy, medians of tenths of the stream: "
        f"{', '.join(f'{median(ratios[i : i + tenth]):.3f}' for i in starts)}\n"
        f"  milliseconds an experience: {1000 * median(seconds):.1f}\n"
        f"  resident memory {resident[tenth] / 2**20:.1f} MiB after {tenth + 1} experiences, "
        f"{grown:+.2f} MiB at the end\n"
        f"  state {state[0]} bytes after the first experience, {state[-1]} after the last"
    )


def _strategy() -> CLASSP:
    evaluator = EvaluationPlugin(
        accuracy_metrics(epoch=True),
        classp_metrics(experience=True),
        loggers=[],
        collect_all=False,  # else Avalanche keeps every value of every metric
    )
    return CLASSP(
        model=make_model("mlp-256", (64,), 10, multi_head=False),
        lr=0.001,
        train_mb_size=BATCH,
        train_epochs=EPOCHS,
        evaluator=evaluator,
    )


def _seconds(strategy: CLASSP, experience: Any) -> float:
    began = time.perf_counter()
    strategy.train(experience)
    return time.perf_counter() - began


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()


def measure_saturation(steps: Sequence[int]) -> None:
    """Print where accumulators stop growing, and what that does to the weights.

    Args:
        steps: numbers of steps, the largest last.
    """
    print("\nWhere the accumulator of |g| = 1 and power 1 stops growing")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        print(f"  of {_name(dtype)} weights: {_last_count(dtype):.0f}")
    for dtype in (torch.bfloat16, torch.float16):
        print(f"  if it were {_name(dtype)} itself: {_last_sum(dtype):.0f}")
    print("\nfloat32 accumulator / exact sum, after so many steps")
    for power in (1, 2):
        for name, draw in DRAWS.items():
            found = ", ".join(f"{_share(draw, power, n):.4f} at {n:.0e}" for n in steps)
            print(f"  power {power}, {name}: {found}")
    print(
        f"\nHow far a weight of {START} has gone after {steps[-1]:.0e} steps, in lr ({LR}), with "
        f"accumulator and weight in\n  float32 and float32 | float64 and float32 | float64 and "
        f"float64"
    )
    for power in (1, 2):
        for name, draw in list(DRAWS.items())[:3]:
            kinds = (np.float32, np.float32), (np.float64, np.float32), (np.float64, np.float64)
            found = " | ".join(
                f"{(walk(draw, power, steps[-1], *kind)[1] - START) / LR:.3f}" for kind in kinds
            )
            print(f"  power {power}, {name}: {found}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _last_count(dtype: torch.dtype) -> float:
    """Return where an optimizer's accumulator stops that has counted nearly 2²⁴ ones."""
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    optimizer = CLASSPOptimizer([weight], lr=LR, epsilon=EPSILON, power=1.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.state[weight]["accumulator"].fill_(2**24 - 3)
    for _ in range(10):
        optimizer.step()
    return optimizer.state[weight]["accumulator"].item()


def _last_sum(dtype: torch.dtype) -> float:
    total = torch.zeros((), dtype=dtype)
    while (after := total + 1) != total:
        total = after
    return total.item()


def _share(draw: Draw, power: int, steps: int) -> float:
    kept, _ = walk(draw, power, steps, np.float32, np.float32)
    exact, _ = walk(draw, power, steps, np.float64, np.float64)
    return kept / exact


def walk(
    draw: Draw,
    power: int,
    steps: int,
    accumulator_dtype: DTypeLike,
    weight_dtype: DTypeLike,
) -> tuple[float, float]:
    """Return accumulator and weight after so many steps of the rule, with power 1 or 2.

    Args:
        draw: makes the gradients.
        power: 1 or 2.
        steps: how many.
        accumulator_dtype: what the accumulator, and the step before it is added, are rounded to.
        weight_dtype: what the weight is rounded to.
    """
    rng = np.random.default_rng(0)
    accumulator, weight = 0.0, START
    for done in range(0, steps, _PART):
        g = draw(rng, min(_PART, steps - done)).astype(accumulator_dtype)
        history = np.abs(g) if power == 1 else g * g
        history[0] += g.dtype.type(accumulator)
        # One sum after the other; np.sum would add in pairs.
        history = np.add.accumulate(history)
        accumulator = float(history[-1])
        history += g.dtype.type(EPSILON)
        g *= g.dtype.type(-LR)
        g /= history if power == 1 else np.sqrt(history)
        moves = g.astype(weight_dtype)
        moves[0] += moves.dtype.type(weight)
        weight = float(np.add.accumulate(moves)[-1])
    return accumulator, weight
