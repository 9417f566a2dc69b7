"""One run: train a method on a stream, evaluate after each experience, return the result."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from avalanche.benchmarks import CLScenario
from avalanche.evaluation.metrics import (
    MaxRAM,
    accuracy_metrics,
    bwt_metrics,
    confusion_matrix_metrics,
    forgetting_metrics,
    forward_transfer_metrics,
    timing_metrics,
)
from avalanche.training import JointTraining
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from avalanche_classp import in_memory
from avalanche_classp.optim.optimizer import NonFiniteGradientError

from ..errors import DivergedError, UserError
from ..protocol.benchmarks import BENCHMARKS, make_benchmark, sample_shape
from ..protocol.config import RunConfig
from ..protocol.loading import code_of
from ..protocol.losses import make_loss
from ..protocol.methods import METHODS
from ..protocol.models import Shape, make_model
from ..protocol.tuned_settings import source_of
from .accumulator_maps import accumulator_map
from .memory import method_state_bytes
from .tensorboard import Board, open_board

EVAL_BATCH_SIZE = 512

Report = Callable[[int, Callable[[], float]], None]


def run(
    config: RunConfig,
    data_root: Path | None = None,
    progress: Callable[[], object] = lambda: None,
    logs: Path | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Train and evaluate one config, on one thread, with Avalanche's loop and metrics.

    A validation run is evaluated after the last experience only, but for what ``report`` asks.

    Args:
        config: what to run.
        data_root: see :func:`make_benchmark`.
        progress: called after each experience is trained and evaluated.
        logs: TensorBoard log directory, emptied first; see :mod:`.tensorboard`. The
            numbers are the same with and without. Default: none.
        report: called in a validation run after each experience but the last with the number of
            experiences so far and a function that measures the mean accuracy on them; what it
            raises ends the run, and what it measures changes nothing of it.

    Returns:
        The result, as JSON can hold it; ``experiments/results/README.md`` explains every key.

    Raises:
        UserError: the data or the device is missing.
        DivergedError: the weights, or CLASSP's gradients, became non-finite.
    """
    with open_board(logs, config) as board:
        result = _run(config, data_root, progress, board, report)
        board.finish(result)
    return result


def _run(
    config: RunConfig,
    data_root: Path | None,
    progress: Callable[[], object],
    board: Board,
    report: Report | None,
) -> dict[str, Any]:
    # With one thread a run gives the same numbers alone and beside others.
    torch.set_num_threads(1)
    RNGManager.set_random_seeds(config.seed)
    device = find_device(config.device)
    spec = BENCHMARKS[config.benchmark]
    labels = spec.count_labels(config.scenario, config.experiences)
    benchmark = _benchmark(
        config.benchmark,
        config.scenario,
        data_root,
        model=config.model,
        experiences=config.experiences,
        seed=config.seed if spec.random else 0,
        validation=config.validation,
        train_share=config.train_share,
        first_only=config.first_only,
    )
    shape = sample_shape(config.benchmark, config.model, benchmark)
    model = make_model(config.model, shape, labels, config.scenario == "task")
    strategy = METHODS[config.method].build(
        model,
        config.hyper,
        {
            "criterion": make_loss(config.loss, METHODS[config.method].has_old_samples),
            "train_mb_size": config.batch_size,
            "eval_mb_size": EVAL_BATCH_SIZE,
            "device": device,
            "evaluator": _evaluator(labels, board),
            "eval_every": 0,  # Avalanche's forward transfer insists on it
        },
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    memory = MaxRAM(every=0.05)
    memory.start_thread()
    started = time.perf_counter()
    try:
        steps = _train(strategy, benchmark, config, shape, progress, board, report)
    except NonFiniteGradientError as error:
        raise DivergedError(f"the training diverged, try a lower lr: {error}") from error
    finally:
        wall_seconds = time.perf_counter() - started
        memory.stop_thread()
    train_seconds = [step["train_seconds"] for step in steps if "train_seconds" in step]
    # Heads may have come on the way.
    parameters = sum(p.numel() for p in strategy.model.parameters())
    return {
        "config": config.as_dict(),
        "setting": source_of(config),
        **({"code": code} if (code := code_of(config)) else {}),
        "sources": dict(config.sources),
        **_accuracies(steps),
        "confusion_matrix": steps[-1]["confusion_matrix"],
        "accumulator_maps": [step["map"] for step in steps if step.get("map") is not None],
        "train_seconds": train_seconds,
        "eval_seconds": [step["eval_seconds"] for step in steps if "eval_seconds" in step],
        "seconds_per_experience": sum(train_seconds) / config.experiences,
        "wall_seconds": wall_seconds,
        "parameters": parameters,
        "state_bytes": [step["state_bytes"] for step in steps if "state_bytes" in step],
        "state_bytes_per_parameter": steps[-1]["state_bytes"] / parameters,
        "peak_memory_bytes": int(memory.result() * 2**20),
        "peak_device_bytes": (
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        ),
        "environment": _environment(),
    }


@lru_cache(maxsize=2)
def _benchmark(name: str, *arguments: Any, **options: Any) -> CLScenario:
    """Make a benchmark, or take one of the last: a search asks for the same two again and again.

    Avalanche takes half a minute for the ten experiences of PermutedMNIST.
    """
    made = make_benchmark(name, *arguments, **options)
    return in_memory(made, deterministic=BENCHMARKS[name].deterministic)


def _train(
    strategy: Any,
    benchmark: Any,
    config: RunConfig,
    shape: Shape,
    progress: Callable[[], object],
    board: Board,
    report: Report | None,
) -> list[dict[str, Any]]:
    """Evaluate, then train experience by experience (joint training: all at once) and evaluate.

    Returns what was measured before training (nothing for a validation run) and after each
    experience.
    """
    test = benchmark.test_stream
    stream = benchmark.train_stream
    parts = [stream] if isinstance(strategy, JointTraining) else list(stream)
    steps = [{} if config.validation else _read_metrics(strategy.eval(test), len(test))]
    for i, part in enumerate(parts):
        strategy.train_epochs = config.epochs_in(i)
        begin = time.perf_counter() - board.seconds
        strategy.train(part, eval_streams=[])
        # Avalanche times epochs, which leaves out what EWC does after the last one.
        seconds = time.perf_counter() - board.seconds - begin
        _require_finite(strategy.model)
        step: dict[str, Any] = {
            "train_seconds": seconds,
            "state_bytes": method_state_bytes(strategy),
        }
        if part is parts[-1] or not config.validation:
            step |= _read_metrics(strategy.eval(test), len(test))
            step["map"] = accumulator_map(strategy, shape)
        elif report is not None:
            report(i + 1, partial(_mean_accuracy, strategy, test[: i + 1]))
        steps.append(step)
        board.after_experience(strategy)
        progress()
    return steps


def _require_finite(model: nn.Module) -> None:
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise DivergedError(
            "the training diverged: the weights are no longer finite; try a lower lr"
        )


def _accuracies(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the accuracies and what follows from them; transfer needs several evaluations."""
    matrix = [step["accuracies"] for step in steps[1:] if "accuracies" in step]
    last = steps[-1]
    several = len(matrix) > 1
    return {
        "average_accuracy": sum(matrix[-1]) / len(matrix[-1]),
        "forgetting": last["forgetting"] if several else None,
        "backward_transfer": last["backward_transfer"] if several else None,
        "forward_transfer": last["forward_transfer"] if several else None,
        "learning_accuracy": (
            sum(row[i] for i, row in enumerate(matrix)) / len(matrix) if several else None
        ),
        "initial_accuracies": steps[0].get("accuracies"),
        "accuracy_matrix": matrix,
    }


def _mean_accuracy(strategy: Any, stream: Any) -> float:
    with torch.random.fork_rng():  # the run goes on as if nobody had looked
        accuracies = _by_experience(strategy.eval(stream)).values()
    return sum(accuracies) / len(accuracies)


def _by_experience(measured: Mapping[str, Any]) -> dict[int, float]:
    """Return the accuracy on each experience by its number."""
    return {
        int(key.rsplit("/Exp", 1)[1]): accuracy
        for key, accuracy in measured.items()
        if key.startswith("Top1_Acc_Exp/eval_phase/")
    }


def _read_metrics(measured: Mapping[str, Any], experiences: int) -> dict[str, Any]:
    def value(metric: str) -> Any:
        found = [v for k, v in measured.items() if k.startswith(metric)]
        return found[-1] if found else None

    accuracies = _by_experience(measured)
    return {
        "accuracies": [accuracies[i] for i in range(experiences)],
        "forgetting": value("StreamForgetting/eval_phase/"),
        "backward_transfer": value("StreamBWT/eval_phase/"),
        "forward_transfer": value("StreamForwardTransfer/eval_phase/"),
        "eval_seconds": value("Time_Stream/eval_phase/"),
        "confusion_matrix": value("ConfusionMatrix_Stream/eval_phase/").tolist(),
    }


def _evaluator(labels: int, board: Board) -> EvaluationPlugin:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No loggers specified")
        return EvaluationPlugin(
            accuracy_metrics(experience=True),
            forgetting_metrics(stream=True),
            bwt_metrics(stream=True),
            forward_transfer_metrics(stream=True),
            timing_metrics(stream=True),
            confusion_matrix_metrics(num_classes=labels, stream=True, save_image=False),
            *board.metrics,
            loggers=board.loggers,
        )


def find_device(name: str) -> torch.device:
    """Return the torch device of this name.

    Raises:
        UserError: it is unknown or cannot be used on this machine.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used here ({reason}); try cpu") from None
    return device


def _environment() -> dict[str, str]:
    packages = ("torch", "torchvision", "avalanche-lib", "numpy")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "threads": "1",
    }


def cpu_model() -> str:
    """Return the processor's name."""
    with suppress(OSError):  # no Linux
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
