"""Time and memory of methods as experiences come and come."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from tqdm import tqdm

from avalanche_classp import in_memory
from experiments.protocol.benchmarks import BENCHMARKS, make_benchmark
from experiments.protocol.methods import METHODS
from experiments.protocol.models import make_model
from experiments.running.memory import method_state_bytes

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
    rows: list[dict[str, Any]] = []
    experiences = tqdm(benchmark.train_stream, unit="experience", desc="growth")
    for i, experience in enumerate(experiences):
        for name, strategy in strategies.items():
            began = time.perf_counter()
            strategy.train(experience, eval_streams=[])
            seconds = time.perf_counter() - began
            size = method_state_bytes(strategy)
            rows.append(
                {"method": name, "experience": i + 1, "seconds": seconds, "state_bytes": size}
            )
    samples = len(benchmark.train_stream[0].dataset)
    print(
        f"\nGrowth on {BENCHMARK}, {MODEL} ({parameters} parameters), {samples} samples an "
        f"experience, mini-batches of {BATCH}, one epoch"
    )
    for name in METHOD_NAMES:
        own = [row for row in rows if row["method"] == name]
        print(f"  {name}: {'; '.join(_at(own, n, parameters) for n in sorted(lengths))}")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        with open(output / "growth.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, "seconds": f"{row['seconds']:.4f}"} for row in rows)
        draw(rows, output / "growth.png")


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


def _at(rows: Sequence[dict[str, Any]], experience: int, parameters: int) -> str:
    """Say what the experiences up to one took; of the time the median of the last five."""
    last = rows[max(0, experience - 5) : experience]
    seconds = median(row["seconds"] for row in last)
    size = last[-1]["state_bytes"] / parameters
    return f"{seconds:.2f} s and {size:.1f} bytes a parameter at {experience}"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw seconds and bytes over experiences."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name in METHOD_NAMES:
        own = [row for row in rows if row["method"] == name]
        x = [row["experience"] for row in own]
        axes[0].plot(x, [row["seconds"] for row in own], label=name)
        if name != "naive":
            axes[1].plot(x, [row["state_bytes"] / 2**20 for row in own], label=name)
    axes[0].set(xlabel="experience", ylabel="seconds of training", ylim=0)
    axes[1].set(xlabel="experience", ylabel="state in MiB", ylim=0)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
