"""What the in-memory data path gains end to end, and what CLASSP and its metrics cost on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from avalanche.benchmarks.utils.data_loader import TaskBalancedDataLoader
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from avalanche_classp import classp_metrics, in_memory

from ..protocol.benchmarks import BENCHMARKS, make_benchmark
from ..protocol.config import Hyper
from ..protocol.methods import METHODS
from ..protocol.models import make_model
from ..running.timing import Clocked
from .measure import ratio

TRAIN_BATCH, EVAL_BATCH = 128, 512
HYPER: dict[str, Hyper] = {
    "naive": {"lr": 0.05},
    "ewc": {"lr": 0.05, "ewc_lambda": 1.0},
    "classp": {},
}
"""Hyper-parameters other than the methods' defaults."""


@dataclass(frozen=True)
class Case:
    """A benchmark with a model, on Avalanche's data path and on the in-memory one.

    Attributes:
        model: name of the model.
        experiences: number of experiences, with ``--quick`` and without.
        target: how many times faster the in-memory path is to be.
    """

    model: str
    experiences: tuple[int, int]
    target: float


CASES = {
    "split-mnist": Case("mlp-400", (5, 5), 4.0),
    "permuted-mnist": Case("mlp-256", (1, 3), 4.0),
    "split-cifar10": Case("cnn", (5, 5), 1.5),
}


@dataclass
class Seconds:
    """What a run took, and the weights that it ended with."""

    train: list[float]
    evaluation: float
    weights: list[torch.Tensor]

    @property
    def total(self) -> float:
        """Seconds of training and evaluation."""
        return sum(self.train) + self.evaluation


def measure_loading(name: str, case: Case, quick: bool, pairs: int, data_root: Path | None) -> None:
    """Compare plain SGD, training and evaluation after each experience, on both data paths."""
    experiences = case.experiences[not quick]
    stock = _benchmark(name, experiences, data_root)
    turns: list[tuple[Seconds, Seconds]] = []
    for _ in range(pairs):
        slow = _run("naive", stock, case.model, name)
        began = time.perf_counter()
        fast_benchmark = in_memory(stock)
        preparation = time.perf_counter() - began
        fast = _run("naive", fast_benchmark, case.model, name)
        fast.train[0] += preparation
        turns.append((slow, fast))
    same = all(
        torch.equal(a, b)
        for slow, fast in turns
        for a, b in zip(slow.weights, fast.weights, strict=True)
    )
    print(f"\n{name}, {case.model}, {experiences} experiences, same weights: {same}")
    print(f"mini-batches of {TRAIN_BATCH} in training and {EVAL_BATCH} in evaluation")
    _print_ratio("train and eval", turns, lambda run: run.total, f"target {case.target}")
    _print_ratio("train", turns, lambda run: sum(run.train))
    _print_ratio("eval", turns, lambda run: run.evaluation)
    _print_shares(case.model, name, stock, turns)


def measure_classp(pairs: int, data_root: Path | None) -> None:
    """Compare CLASSP with naive SGD and with EWC, all on the in-memory path."""
    benchmark = in_memory(_benchmark("split-mnist", 5, data_root))
    turns = [
        [_run(method, benchmark, "mlp-400", "split-mnist") for method in ("naive", "classp", "ewc")]
        for _ in range(pairs)
    ]
    print("\nsplit-mnist, mlp-400, seconds of training in memory, one epoch per experience")
    naive, later = zip(*(((sgd, ours), (ewc, ours)) for sgd, ours, ewc in turns), strict=True)
    _print_ratio("naive / CLASSP", naive, lambda run: sum(run.train), "target 0.952 (1 / 1.05)")
    what = "EWC / CLASSP, from the second experience on"
    _print_ratio(what, later, lambda run: sum(run.train[1:]), "target 1")


METRICS: dict[str, dict[str, Any]] = {
    "none": {},
    "epoch": {"epoch": True},
    "epoch, per layer": {"epoch": True, "per_layer": True},
    "experience": {"experience": True},
    "minibatch": {"minibatch": True},
}


def measure_metrics(pairs: int, data_root: Path | None) -> None:
    """Compare training with classp_metrics to training without, one epoch per experience."""
    benchmark = in_memory(_benchmark("split-mnist", 5, data_root))
    steps = sum(-(-len(e.dataset) // TRAIN_BATCH) for e in benchmark.train_stream)
    seconds: dict[str, list[float]] = {name: [] for name in METRICS}
    inside: dict[str, list[float]] = {name: [] for name in METRICS}
    for _ in range(pairs):
        for name, arguments in METRICS.items():
            metrics = classp_metrics(**arguments) if arguments else []
            seconds[name].append(
                sum(_run("classp", benchmark, "mlp-400", "split-mnist", *metrics).train)
            )
            clocks = [Clocked(metric) for metric in metrics]
            _run("classp", benchmark, "mlp-400", "split-mnist", *clocks)
            inside[name].append(sum(clock.seconds for clock in clocks))
    step = 1000 * median(seconds["none"]) / steps
    print(f"\nsplit-mnist, mlp-400, CLASSP: {steps} steps of {step:.2f} ms, n = {pairs}")
    for name in list(METRICS)[1:]:
        print(
            f"  metrics of {name}: training takes {ratio(seconds[name], seconds['none'])} times as "
            f"long; in the metrics themselves {ratio(inside[name], seconds['none'], 3)} of it"
        )


def _benchmark(name: str, experiences: int, data_root: Path | None) -> Any:
    scenario = BENCHMARKS[name].scenarios[0]
    return make_benchmark(name, scenario, data_root, experiences=experiences)


def _model(model: str, name: str) -> nn.Module:
    spec = BENCHMARKS[name]
    RNGManager.set_random_seeds(0)
    return make_model(model, spec.shape, spec.classes, multi_head=False)


def _run(method: str, benchmark: Any, model: str, name: str, *metrics: Any) -> Seconds:
    common = {
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": TRAIN_BATCH,
        "eval_mb_size": EVAL_BATCH,
        "evaluator": EvaluationPlugin(accuracy_metrics(experience=True), *metrics, loggers=[]),
    }
    hyper = {**METHODS[method].defaults, **HYPER[method]}
    strategy = METHODS[method].build(_model(model, name), hyper, common)
    result = Seconds([], 0.0, [])
    for experience in benchmark.train_stream:
        began = time.perf_counter()
        strategy.train(experience, eval_streams=[])
        trained = time.perf_counter()
        strategy.eval(benchmark.test_stream)
        result.train.append(trained - began)
        result.evaluation += time.perf_counter() - trained
    result.weights = [p.detach().clone() for p in strategy.model.parameters()]
    return result


def _print_ratio(
    what: str,
    turns: Sequence[Sequence[Seconds]],
    seconds: Callable[[Seconds], float],
    target: str = "",
) -> None:
    first, second = ([seconds(run) for run in runs] for runs in zip(*turns, strict=True))
    print(
        f"  {what}: {ratio(first, second)} times, n = {len(first)}; {median(first):.2f} s against "
        f"{median(second):.2f} s{target and f'; {target}'}"
    )


def _print_shares(model: str, name: str, stock: Any, turns: Sequence[Sequence[Seconds]]) -> None:
    """Say what the in-memory time is made of, and what a loader of no cost would give."""
    benchmark = in_memory(stock)
    loading = _loading_seconds(benchmark)
    network = _network_seconds(_model(model, name), benchmark)
    total = median(fast.total for _, fast in turns)
    rest = total - loading - network
    print(
        f"  in memory: the network {network:.2f} s, loading {loading:.2f} s, the rest of "
        f"Avalanche's loop and metrics {rest:.2f} s; without any loading it would be "
        f"{median(slow.total for slow, _ in turns) / (total - loading):.2f} times"
    )


def _loaders(benchmark: Any) -> tuple[list[Any], list[Any]]:
    """Return the loaders of all training and of all test experiences, as Avalanche makes them."""
    train = [
        TaskBalancedDataLoader(
            experience.dataset.train(),
            batch_size=TRAIN_BATCH,
            shuffle=True,
            oversample_small_groups=True,
        )
        for experience in benchmark.train_stream
    ]
    test = [
        TaskBalancedDataLoader(experience.dataset.eval(), batch_size=EVAL_BATCH)
        for experience in benchmark.test_stream
    ]
    return train, test


def _loading_seconds(benchmark: Any) -> float:
    """Return what all training once, and all test experiences after each, take to load."""
    began = time.perf_counter()
    train, test = _loaders(benchmark)
    for loader in train + test * len(train):
        for _ in loader:
            pass
    return time.perf_counter() - began


def _network_seconds(model: nn.Module, benchmark: Any) -> float:
    """Return what the network and SGD take for the same mini-batches, without Avalanche."""
    train, test = (
        [batch for loader in loaders for batch in loader] for loaders in _loaders(benchmark)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    began = time.perf_counter()
    for x, y, _ in train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        for x, _, _ in test * len(benchmark.train_stream):
            model(x)
    return time.perf_counter() - began
