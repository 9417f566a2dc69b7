"""Small runs that can be stopped anywhere and started again, for test_checkpoint.py."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.evaluation.metrics import (
    accuracy_metrics,
    bwt_metrics,
    class_accuracy_metrics,
    confusion_matrix_metrics,
    forgetting_metrics,
    loss_metrics,
)
from avalanche.models import IncrementalClassifier
from avalanche.training import EWC, MAS, LwF, Naive, SynapticIntelligence
from avalanche.training.plugins import (
    EarlyStoppingPlugin,
    EvaluationPlugin,
    EWCPlugin,
    LRSchedulerPlugin,
    RWalkPlugin,
)
from conftest import (
    BATCH,
    FEATURES,
    HIDDEN,
    SGD,
    accumulators,
    growing_head,
    make_benchmark,
    many_heads,
    seed_everything,
    weights,
)
from torch import nn

from avalanche_classp import (
    CLASSP,
    PAPER_PHASES,
    CLASSPOptimizer,
    CLASSPPlugin,
    checkpointed,
    classp_metrics,
    in_memory,
)
from avalanche_classp.checkpoint.file import VERSION
from avalanche_classp.checkpoint.values import NotSaved

EPOCHS = 3


def growing() -> nn.Module:
    """Return a model with all that has a state: a head that grows, batch norm and dropout."""
    body = (nn.Linear(FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(0.2))
    return nn.Sequential(*body, IncrementalClassifier(HIDDEN, initial_out_features=2))


def plain(strategy: type, optimizer: Any = SGD, **of_strategy: Any) -> Any:
    """Return a function that makes a strategy of Avalanche with one of torch's optimizers."""

    def make(model: nn.Module, **kwargs: Any) -> Any:
        torch_optimizer = optimizer(model.parameters(), lr=0.05)
        return strategy(model=model, optimizer=torch_optimizer, **of_strategy, **kwargs)

    return make


def momentum(params: Any, lr: float) -> Any:
    return SGD(params, lr=lr, momentum=0.9)


def classp(model: nn.Module, **kwargs: Any) -> Any:
    return CLASSP(model=model, lr=0.05, phases=PAPER_PHASES, **kwargs)


def matrix(model: nn.Module, **kwargs: Any) -> Any:
    return CLASSP(
        model=model, lr=0.05, epsilon=0.1, history="gradients", rank=4, consolidation=3.0, **kwargs
    )


def scheduled(model: nn.Module, **kwargs: Any) -> Any:
    optimizer = CLASSPOptimizer(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    plugins = [LRSchedulerPlugin(scheduler)]
    return CLASSP(model=model, optimizer=optimizer, plugins=plugins, **kwargs)


def classp_beside_ewc(model: nn.Module, **kwargs: Any) -> Any:
    plugins = [CLASSPPlugin(threshold=1e-6), EWCPlugin(ewc_lambda=1.0)]
    return plain(Naive)(model, plugins=plugins, **kwargs)


def stopping_early(model: nn.Module, **kwargs: Any) -> Any:
    plugins = [EarlyStoppingPlugin(patience=2, val_stream_name="test_stream")]
    return plain(Naive)(model, plugins=plugins, **kwargs)


def walking(model: nn.Module, **kwargs: Any) -> Any:
    return plain(Naive)(model, plugins=[RWalkPlugin(delta_t=2)], **kwargs)


METHODS = {
    "classp": classp,
    "classp-matrix": matrix,
    "classp-scheduled": scheduled,
    "classp-and-ewc": classp_beside_ewc,
    "naive": plain(Naive, momentum),
    "adam": plain(Naive, torch.optim.Adam),
    "early-stopping": stopping_early,
    "ewc": plain(EWC, ewc_lambda=1.0),
    "ewc-online": plain(EWC, ewc_lambda=1.0, mode="online", decay_factor=0.5),
    "si": plain(SynapticIntelligence, si_lambda=1.0),
    "mas": plain(MAS, lambda_reg=1.0, alpha=0.5),
    "lwf": plain(LwF, alpha=1.0, temperature=2.0),
    "rwalk": walking,
}


class StoppedError(Exception):
    """What ends a run in the place of SIGKILL, where one process is enough."""


class Stopper(NotSaved):
    """A plugin that stops a run after some iterations. It is no part of the state."""

    def __init__(self) -> None:
        self.left = math.inf

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise StoppedError


class Run:
    """A benchmark and a strategy, built in the same way each time."""

    def __init__(self, method: str, variant: str = "", epochs: int = EPOCHS, **kwargs: Any) -> None:
        seed_everything(0)
        heads = variant == "heads"
        self.benchmark = make_benchmark(tasks=(0, 1, 2) if heads else None)
        if variant == "in_memory":
            self.benchmark = in_memory(self.benchmark)
        self.model = many_heads() if heads else growing()
        metrics = [
            accuracy_metrics(minibatch=True, epoch=True, experience=True, stream=True),
            loss_metrics(epoch_running=True, experience=True),
            forgetting_metrics(experience=True, stream=True),
            bwt_metrics(experience=True),
            class_accuracy_metrics(stream=True),
            confusion_matrix_metrics(num_classes=6, stream=True, save_image=False),
        ]
        if method.startswith("classp"):
            metrics.append(classp_metrics(epoch=True, experience=True))
        arguments = {
            "train_mb_size": BATCH,
            "train_epochs": epochs,
            "eval_every": 1,
            "evaluator": EvaluationPlugin(*metrics),
            "criterion": nn.CrossEntropyLoss(),
        }
        self.strategy = METHODS[method](self.model, **(arguments | kwargs))
        self.stopper = Stopper()
        self.strategy.plugins.append(self.stopper)

    def go(self, folder: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Train to the end, with checkpoints if there is a folder, and return what came out."""
        stream: Any = self.benchmark.train_stream
        if folder is not None:
            stream = checkpointed(stream, self.strategy, folder, **kwargs)
        for experience in stream:
            # Data for the periodic evaluations, which early stopping needs.
            self.strategy.train(experience, eval_streams=[self.benchmark.test_stream])
            self.strategy.eval(self.benchmark.test_stream)
        return outcome(self.strategy)


def outcome(strategy: Any) -> dict[str, Any]:
    """Return weights, optimizer, counters, metrics and random states."""
    return {
        "model": strategy.model.state_dict(),
        "optimizer": strategy.optimizer.state_dict(),
        "clock": dict(vars(strategy.clock)),
        "metrics": dict(strategy.evaluator.get_all_metrics()),
        "last": strategy.evaluator.get_last_metrics(),
        "random": [random.random(), np.random.rand(), torch.rand(2)],
    }


def same(a: Any, b: Any) -> bool:
    """Tell whether two outcomes are the same, bit for bit; NaN is NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b or (a != a and b != b)


# --- processes that are killed --------------------------------------------------------------------


def child(work: Callable[[], object]) -> int:
    """Fork a process that does some work and ends with 0, or with 1 after an exception."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:  # noqa: BLE001 -- or it would go on where its parent does
        traceback.print_exc()
        os._exit(1)


def killed(pid: int, wait: Callable[[], object]) -> bool:
    """Wait as told, then kill the process; tell whether that is what it died of."""
    wait()
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the run failed with exit code {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill_often(folder: Path, kills: int) -> dict[str, Any]:
    """Kill runs at random moments, every second one while it writes a checkpoint.

    A run that comes to its end all the same is compared with an undisturbed one, and another begun.

    Returns:
        How many were killed, how many of these left a half-written file behind, how many runs
        came to their end and how many of these were the same. The folder holds an unfinished run.
    """
    dice = random.Random(0)
    checkpoints, end = folder / "checkpoints", folder / "end.pt"
    counts = {"killed": 0, "while_writing": 0, "ended": 0, "same": 0}
    undisturbed = Run("classp").go()

    def work() -> None:
        torch.save(Run("classp").go(checkpoints, every_epochs=1), end)

    def writes() -> bool:
        return checkpoints.is_dir() and any(n.endswith(".tmp") for n in os.listdir(checkpoints))

    def until_it_writes() -> None:
        latest = time.monotonic() + 1
        while not writes() and time.monotonic() < latest:
            pass
        time.sleep(dice.uniform(0, 0.001))

    def unfinished() -> bool:
        made = sorted(checkpoints.glob("*.checkpoint"))
        return bool(made) and int(made[-1].stem) < 3 * EPOCHS

    while counts["killed"] < kills or not unfinished():
        at_random = counts["killed"] % 2 == 0
        # A run takes longer than this, checkpoints and all.
        wait = (lambda: time.sleep(dice.uniform(0, 0.2))) if at_random else until_it_writes
        pid = child(work)
        if killed(pid, wait):
            counts["killed"] += 1
            counts["while_writing"] += writes()
        else:
            counts["ended"] += 1
            counts["same"] += same(torch.load(end, weights_only=False), undisturbed)
            shutil.rmtree(checkpoints)
    return counts


# --- the stored example ---------------------------------------------------------------------------


def example(benchmark: Any, folder: Path, **kwargs: Any) -> tuple[Any, Any]:
    """Return a strategy, and what is left to train of it."""
    strategy = CLASSP(model=growing_head(), train_mb_size=8, train_epochs=3, evaluator=None)
    return strategy, checkpointed(benchmark.train_stream, strategy, folder, **kwargs)


def write_example(folder: Path) -> None:
    """Write the checkpoint after 2 of 3 epochs of experience 1, and the weights that it holds."""
    seed_everything(0)
    with tempfile.TemporaryDirectory() as made:
        strategy, rest = example(make_benchmark(), Path(made), every_epochs=1)
        left = iter(range(15))

        def stop(*_: Any) -> None:  # a hook, for the plugins must be those of the test
            if next(left, None) is None:
                raise StoppedError

        strategy.model.register_forward_pre_hook(stop)
        with contextlib.suppress(StoppedError):
            for experience in rest:
                strategy.train(experience)
        shutil.copy(Path(made) / "00000005.checkpoint", folder / f"version-{VERSION}.checkpoint")
    stored = {"weights": weights(strategy.model), "accumulators": accumulators(strategy)}
    torch.save(stored, folder / f"version-{VERSION}-weights.pt")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    task, folder = sys.argv[1], Path(sys.argv[2])
    if task == "kill":
        print(json.dumps(kill_often(folder, int(sys.argv[3]))))
    elif task == "example":
        write_example(folder)
    else:
        Run("classp").go(folder / "checkpoints", every_epochs=1)
        time.sleep(60)  # to be killed
