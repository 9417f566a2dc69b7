"""One run: train a method on a stream, evaluate after each experience, return the result."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from avalanche.evaluation.metrics import (
    accuracy_metrics,
    confusion_matrix_metrics,
    forgetting_metrics,
    timing_metrics,
)
from avalanche.training import JointTraining
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from avalanche_classp.optimizer import NonFiniteGradientError
from experiments.benchmarks import count_labels, make_benchmark, make_model
from experiments.config import RunConfig
from experiments.errors import DivergedError, UserError
from experiments.methods import METHODS
from experiments.statebytes import method_state_bytes

EVAL_BATCH_SIZE = 512


def run(
    config: RunConfig,
    data_root: Path | None = None,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Train and evaluate one config, on one thread, with Avalanche's loop and metrics.

    Args:
        config: what to run.
        data_root: see :func:`experiments.benchmarks.make_benchmark`.
        progress: called after each experience is trained and evaluated. A validation run is
            evaluated after the last one only: the search needs no more.

    Returns:
        The result, as JSON can hold it; ``experiments/results/README.md`` explains every key.

    Raises:
        UserError: the data or the device is missing.
        DivergedError: CLASSP's gradients became non-finite.
    """
    # With one thread a run gives the same numbers alone and beside others.
    torch.set_num_threads(1)
    RNGManager.set_random_seeds(config.seed)
    device = find_device(config.device)
    benchmark = make_benchmark(
        config.benchmark, config.scenario, data_root, config.validation, config.train_share
    )
    model = make_model(config.benchmark, config.scenario)
    evaluator = _evaluator(count_labels(config.benchmark, config.scenario))
    strategy = METHODS[config.method].build(
        model,
        config.hyper,
        {
            "criterion": nn.CrossEntropyLoss(),
            "train_mb_size": config.batch_size,
            "train_epochs": config.epochs,
            "eval_mb_size": EVAL_BATCH_SIZE,
            "device": device,
            "evaluator": evaluator,
        },
    )

    started = time.perf_counter()
    try:
        steps = _train(strategy, benchmark, progress, only_at_the_end=config.validation)
    except NonFiniteGradientError as error:
        raise DivergedError(f"the training diverged, try a lower lr: {error}") from error
    experiences = len(benchmark.train_stream)
    train_seconds = [step["train_seconds"] for step in steps]
    # Heads may have come on the way.
    parameters = sum(p.numel() for p in strategy.model.parameters())
    evaluated = [step for step in steps if "accuracies" in step]
    matrix = [step["accuracies"] for step in evaluated]
    return {
        "config": config.as_dict(),
        "average_accuracy": sum(matrix[-1]) / experiences,
        # With one evaluation there is no earlier accuracy; Avalanche says 0 then.
        "forgetting": evaluated[-1]["forgetting"] if len(evaluated) > 1 else None,
        "accuracy_matrix": matrix,
        "confusion_matrix": steps[-1]["confusion_matrix"],
        "train_seconds": train_seconds,
        "eval_seconds": [step["eval_seconds"] for step in evaluated],
        "seconds_per_experience": sum(train_seconds) / experiences,
        "wall_seconds": time.perf_counter() - started,
        "parameters": parameters,
        "state_bytes": [step["state_bytes"] for step in steps],
        "state_bytes_per_parameter": steps[-1]["state_bytes"] / parameters,
        "environment": _environment(),
    }


def _train(
    strategy: Any, benchmark: Any, progress: Callable[[], object], only_at_the_end: bool
) -> list[dict[str, Any]]:
    """Train experience by experience (all at once for joint training), evaluating after each."""
    stream = benchmark.train_stream
    parts = [stream] if isinstance(strategy, JointTraining) else list(stream)
    steps = []
    for part in parts:
        begin = time.perf_counter()
        strategy.train(part, eval_streams=[])
        # Avalanche times epochs, which leaves out what EWC does after the last one.
        seconds = time.perf_counter() - begin
        step = {"train_seconds": seconds, "state_bytes": method_state_bytes(strategy)}
        if part is parts[-1] or not only_at_the_end:
            measured = strategy.eval(benchmark.test_stream)
            step |= _read_metrics(measured, len(benchmark.test_stream))
        steps.append(step)
        progress()
    return steps


def _read_metrics(measured: Mapping[str, Any], experiences: int) -> dict[str, Any]:
    def value(metric: str) -> Any:
        found = [v for k, v in measured.items() if k.startswith(metric)]
        return found[-1] if found else None

    accuracies = {
        int(key.rsplit("/Exp", 1)[1]): accuracy
        for key, accuracy in measured.items()
        if key.startswith("Top1_Acc_Exp/eval_phase/")
    }
    return {
        "accuracies": [accuracies[i] for i in range(experiences)],
        "forgetting": value("StreamForgetting/eval_phase/"),
        "eval_seconds": value("Time_Stream/eval_phase/"),
        "confusion_matrix": value("ConfusionMatrix_Stream/eval_phase/").tolist(),
    }


def _evaluator(labels: int) -> EvaluationPlugin:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No loggers specified")
        return EvaluationPlugin(
            accuracy_metrics(experience=True),
            forgetting_metrics(stream=True),
            timing_metrics(stream=True),
            confusion_matrix_metrics(num_classes=labels, stream=True, save_image=False),
            loggers=[],
        )


def find_device(name: str) -> torch.device:
    """Return the torch device of this name.

    Raises:
        UserError: it is unknown or cannot be used on this machine.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used here ({reason}); try cpu") from None
    return device


def _environment() -> dict[str, str]:
    packages = ("torch", "torchvision", "avalanche-lib", "numpy")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": "1",
    }
