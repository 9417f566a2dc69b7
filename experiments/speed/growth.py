"""Time and memory of methods as experiences come and come."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from tqdm import tqdm

from avalanche_classp import in_memory

from ..protocol.benchmarks import BENCHMARKS, make_benchmark
from ..protocol.methods import METHODS
from ..protocol.models import make_model
from ..running.matrix_figures import new_figure
from ..running.memory import method_state_bytes

METHOD_NAMES = ("naive", "classp", "ewc", "ewc-online", "si")
BENCHMARK, MODEL, BATCH = "permuted-mnist", "mlp-256", 128
TRAIN_SHARE = 0.1


def measure_growth(lengths: Sequence[int], data_root: Path | None, output: Path | None) -> None:
    """Print seconds and bytes over streams of these lengths; write and draw the longest.

    The methods take turns, experience by experience.

    Args:
        lengths: numbers of experiences; the longest is run, the others are its beginning.
        data_root: see :func:`experiments.protocol.benchmarks.make_benchmark`.
        output: folder that receives ``growth.csv`` and ``growth.png``. Default: none.
    """
    longest = max(lengths)
    spec = BENCHMARKS[BENCHMARK]
    benchmark = in_memory(
        make_benchmark(
            BENCHMARK,
            spec.scenarios[0],
            data_root,
            experiences=longest,
            validation=True,
            train_share=TRAIN_SHARE,
        )
    )
    strategies = {name: _strategy(name) for name in METHOD_NAMES}
    parameters = sum(p.numel() for p in strategies["naive"].model.parameters())
    rows = []
    for i, experience in enumerate(tqdm(benchmark.train_stream, unit="experience", desc="growth")):
        for name, strategy in strategies.items():
            began = time.perf_counter()
            strategy.train(experience, eval_streams=[])
            seconds = time.perf_counter() - began
            rows.append((name, i + 1, seconds, method_state_bytes(strategy)))
    frame = pd.DataFrame(rows, columns=["method", "experience", "seconds", "state_bytes"])
    samples = len(benchmark.train_stream[0].dataset)
    print(
        f"\nGrowth on {BENCHMARK}, {MODEL} ({parameters} parameters), {samples} samples an "
        f"experience, mini-batches of {BATCH}, one epoch"
    )
    for name in METHOD_NAMES:
        own = frame[frame["method"] == name]
        print(f"  {name}: {'; '.join(_at(own, n, parameters) for n in sorted(lengths))}")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        frame.to_csv(output / "growth.csv", index=False, float_format="%.4f", lineterminator="\n")
        draw(frame, output / "growth.png")


def _strategy(name: str) -> Any:
    RNGManager.set_random_seeds(0)
    spec = BENCHMARKS[BENCHMARK]
    return METHODS[name].build(
        make_model(MODEL, spec.shape, spec.classes, multi_head=False),
        METHODS[name].defaults,
        {
            "criterion": nn.CrossEntropyLoss(),
            "train_mb_size": BATCH,
            "eval_mb_size": BATCH,
            "device": torch.device("cpu"),
            "evaluator": EvaluationPlugin(),
            "eval_every": -1,
        },
    )


def _at(own: pd.DataFrame, experience: int, parameters: int) -> str:
    """Say what the experiences up to one took; of the time the median of the last five."""
    last = own[own["experience"].between(experience - 4, experience)]
    size = last["state_bytes"].iloc[-1] / parameters
    return f"{last['seconds'].median():.2f} s and {size:.1f} bytes a parameter at {experience}"


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Draw seconds and bytes over experiences."""
    figure = new_figure(9, 3.6)
    seconds, state = figure.subplots(1, 2)
    for name, own in frame.groupby("method", sort=False):
        look = {"label": name, "color": METHODS[str(name)].style.colour}
        seconds.plot(own["experience"], own["seconds"], **look)
        if name != "naive":
            state.plot(own["experience"], own["state_bytes"] / 2**20, **look)
    seconds.set(xlabel="experience", ylabel="seconds of training", ylim=0)
    state.set(xlabel="experience", ylabel="state in MiB", ylim=0)
    seconds.legend()
    figure.savefig(path, dpi=110)
