"""Every benchmark of speed and memory by name.

Everything is measured in one process on one machine, in turn (one, the other, one, …), so that
what disturbs the machine disturbs both. Ratios are taken within a pair and reported as their
median, with the lowest and the highest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError

ALL_CASES = {
    "step": "an optimizer step against AdaGrad's",
    "directions": "histories of directions in a training step",
    "split-mnist": "Avalanche's data loading against in_memory, training and evaluation",
    "permuted-mnist": "the same with permuted pixels",
    "split-cifar10": "the same with a small CNN",
    "classp": "CLASSP against naive SGD and EWC",
    "metrics": "CLASSP with classp_metrics against without",
    "growth": "5, 20 and 100 experiences",
    "long": "500 small experiences",
    "saturation": "accumulators over 10⁸ steps",
    "startup": "imports",
}
"""What can be measured, each with one line."""


def measure_speed(
    cases: Sequence[str] = (),
    pairs: int = 5,
    rounds: int = 40,
    threads: int = 1,
    device: str = "cpu",
    quick: bool = False,
    data_root: Path | None = None,
    output: Path | None = None,
) -> None:
    """Measure one case after the other, and print what each took.

    Args:
        cases: names of :data:`ALL_CASES`. Default: all.
        pairs: pairs of runs.
        rounds: turns of each contender in step and directions.
        threads: torch's threads.
        device: torch device of step and directions; the other cases use the CPU.
        quick: one pair, and short streams.
        data_root: folder of the datasets.
        output: folder for the figure of growth. Default: none.

    Raises:
        UserError: a case is unknown, or the device cannot be used.
    """
    if unknown := sorted(set(cases) - set(ALL_CASES)):
        raise UserError(f"unknown case {unknown[0]!r}; cases are {', '.join(ALL_CASES)}")
    # A wrong name is refused before these take their seconds.
    import torch

    from ..running.run import find_device
    from . import directions, growth, long, loop, startup, step
    from .measure import machine

    chosen_device = find_device(device)
    torch.set_num_threads(threads)
    pairs, rounds = (1, 2) if quick else (pairs, rounds)
    lengths = (2, 3) if quick else (5, 20, 100)
    steps = [10**3] if quick else [10**6, 10**7, 10**8]
    measures: dict[str, Callable[[], None]] = {
        "step": lambda: step.measure_step(rounds, chosen_device),
        "directions": lambda: directions.measure_directions(rounds, chosen_device),
        "classp": lambda: loop.measure_classp(pairs, data_root),
        "metrics": lambda: loop.measure_metrics(pairs, data_root),
        "growth": lambda: growth.measure_growth(lengths, data_root, output),
        "long": lambda: long.measure_long(20 if quick else 500),
        "saturation": lambda: long.measure_saturation(steps),
        "startup": lambda: startup.measure_startup(pairs),
    }
    print(machine(threads, chosen_device), flush=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No loggers specified")
        for case in cases or ALL_CASES:
            if case in loop.CASES:
                loop.measure_loading(case, loop.CASES[case], quick, pairs, data_root)
            else:
                measures[case]()
