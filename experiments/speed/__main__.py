"""The benchmarks of speed and memory: python -m experiments.speed [CASE …].

Everything is measured in one process on one machine, in turn (one, the other, one, …), so that
what disturbs the machine disturbs both. Ratios are taken within a pair and reported as their
median, with the lowest and the highest.

Cases: step (a step against AdaGrad's), matrix (matrix accumulators in a training step),
split-mnist, permuted-mnist, split-cifar10 (Avalanche's data loading against in_memory, training and
evaluation), classp (against naive SGD and EWC), metrics (CLASSP with classp_metrics against
without), growth (5, 20 and 100 experiences), long (500 small experiences), saturation (accumulators
over 10⁸ steps), startup (imports).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.arguments import positive, script_parser
from experiments.errors import exit_code
from experiments.running.run import find_device
from experiments.speed.growth import measure_growth
from experiments.speed.long import measure_long, measure_saturation
from experiments.speed.loop import CASES, measure_classp, measure_loading, measure_metrics
from experiments.speed.matrix import measure_matrix
from experiments.speed.measure import machine
from experiments.speed.startup import measure_startup
from experiments.speed.step import measure_step

ALL_CASES = (
    "step",
    "matrix",
    *CASES,
    "classp",
    "metrics",
    "growth",
    "long",
    "saturation",
    "startup",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, print it, and return the exit code."""
    options = _parse(arguments)
    return exit_code(lambda: _measure_all(options), resumable=False)


def _measure_all(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    device = find_device(options.device)
    print(machine(options.threads, device), flush=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No loggers specified")
        for case in options.cases or ALL_CASES:
            _measure(case, options, device)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser("experiments.speed", __doc__)
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(ALL_CASES)}; default all"
    )
    parser.add_argument(
        "--pairs", type=positive, default=5, help="pairs of runs (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=40, help="turns in step (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=positive, default=1, help="torch's (default: %(default)s)"
    )
    parser.add_argument(
        "--device", default="cpu", help="of step and matrix; the rest is of a CPU (default: cpu)"
    )
    parser.add_argument("--quick", action="store_true", help="one pair, short streams")
    parser.add_argument("--data-root", type=Path, help="folder of the datasets")
    parser.add_argument("--output", type=Path, help="folder for the growth figure (default: none)")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.cases) - set(ALL_CASES)):
        parser.error(f"unknown case {unknown[0]!r}; cases are {', '.join(ALL_CASES)}")
    return options


def _measure(case: str, options: argparse.Namespace, device: torch.device) -> None:
    pairs = 1 if options.quick else options.pairs
    rounds = 2 if options.quick else options.rounds
    if case == "step":
        measure_step(rounds, device)
    elif case == "matrix":
        measure_matrix(rounds, device)
    elif case == "startup":
        measure_startup(pairs)
    elif case == "long":
        measure_long(20 if options.quick else 500)
    elif case == "saturation":
        measure_saturation([10**3] if options.quick else [10**6, 10**7, 10**8])
    elif case == "growth":
        lengths = (2, 3) if options.quick else (5, 20, 100)
        measure_growth(lengths, options.data_root, options.output)
    elif case == "classp":
        measure_classp(pairs, options.data_root)
    elif case == "metrics":
        measure_metrics(pairs, options.data_root)
    else:
        experiences = CASES[case].experiences[not options.quick]
        measure_loading(case, CASES[case], experiences, pairs, options.data_root)


if __name__ == "__main__":
    sys.exit(main())
