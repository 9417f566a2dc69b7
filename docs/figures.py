"""The figures of the README and of docs/results.md, drawn from the committed records.

python docs/figures.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments.running.records import Results

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "experiments" / "results" / "split-mnist-class"
FIGURE = ROOT / "docs" / "images" / "accuracy.png"
NEGATIVE = ROOT / "experiments" / "results" / "negative"
NEGATIVE_FIGURE = ROOT / "docs" / "images" / "negative.png"

# Okabe and Ito's colours, which colour-blind readers tell apart; markers and labels besides.
LINES = {
    "classp-matrix": ('CLASSP, "gradients"', "#E69F00", "*"),
    "adagrad": ("AdaGrad", "#56B4E9", "s"),
    "adam": ("Adam", "#CC79A7", "D"),
    "ewc": ("EWC", "#0072B2", "^"),
    "classp": ("CLASSP, paper's rule", "#D55E00", "*"),
    "naive": ("SGD", "#000000", "o"),
    "lwf": ("LwF", "#009E73", "v"),
}
LABELS_AT = {"classp": 45.3, "ewc": 49.6, "adam": 53.4, "adagrad": 57.4, "lwf": 28.9, "naive": 32.9}
"""Where a label would lie on another one."""


def accuracy_so_far(records, method):
    """Return the mean over the seeds of the accuracy on what was trained, after each experience."""
    matrices = [r["accuracy_matrix"] for r in records if r["config"]["method"] == method]
    curves = [[np.mean(row[: i + 1]) for i, row in enumerate(matrix)] for matrix in matrices]
    return 100 * np.mean(curves, axis=0)


def draw_negative():
    """Draw validation accuracy against lr, of the search that answers the negative result."""
    trials = pd.read_csv(NEGATIVE / "search" / "trials.csv").dropna(subset="validation_accuracy")
    trials["lr"] = [json.loads(hyper)["lr"] for hyper in trials["hyper"]]
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    axes.axvline(3e-4, color="#666666", linestyle="--", linewidth=1)
    axes.text(3.3e-4, 4, "the study's lr for all", color="#666666")
    for method in ("adam", "adagrad", "classp"):
        label, colour, marker = LINES[method]
        found = trials[trials["method"] == method].sort_values("lr")
        accuracy = 100 * found["validation_accuracy"]
        axes.plot(found["lr"], accuracy, color=colour, marker=marker, label=label)
    axes.set(xscale="log", xlabel="lr", ylabel="validation accuracy, %", ylim=(0, 100))
    axes.legend(frameon=False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    figure.savefig(NEGATIVE_FIGURE, dpi=150)


def main():
    """Draw the figures."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    draw_negative()
    records = Results(RECORDS).load()
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    joint = [100 * r["average_accuracy"] for r in records if r["config"]["method"] == "joint"]
    axes.axhline(np.mean(joint), color="#666666", linestyle="--", linewidth=1)
    axes.text(5.12, np.mean(joint), "all data at once", color="#666666", va="center")
    for method, (label, colour, marker) in LINES.items():
        curve = accuracy_so_far(records, method)
        ours = method.startswith("classp")
        x = np.arange(1, len(curve) + 1)
        axes.plot(
            x,
            curve,
            color=colour,
            marker=marker,
            markersize=10 if ours else 6,
            linewidth=3 if ours else 1.5,
            zorder=3 if ours else 2,
        )
        axes.text(
            len(curve) + 0.12,
            LABELS_AT.get(method, curve[-1]),
            label,
            color=colour,
            va="center",
            weight="bold" if ours else "normal",
        )
    axes.set(xlim=(0.9, 5), ylim=(20, 101), xticks=range(1, 6))
    axes.set_xlabel("experiences trained (two digits each)")
    axes.set_ylabel("accuracy on the digits so far, %")
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    figure.savefig(FIGURE, dpi=150)


if __name__ == "__main__":
    main()
