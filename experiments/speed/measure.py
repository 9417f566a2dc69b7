"""How the benchmarks measure, compare and print."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from statistics import median

import torch

from ..running.run import cpu_model

CPU = torch.device("cpu")


def machine(threads: int, device: torch.device) -> str:
    """Return a line on the processor, the accelerator if one is used, and the versions."""
    packages = ("torch", "torchvision", "avalanche-lib", "numpy")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    processor = f"{os.cpu_count()} × {cpu_model()}"
    if device.type == "cuda":
        processor += f", {torch.cuda.get_device_name(device)}"
    return f"{processor}, {threads} thread(s); Python {platform.python_version()}, {versions}"


def in_turn(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    calls: int = 3,
    device: torch.device = CPU,
) -> dict[str, list[float]]:
    """Time each contender in turn, over and over, so that what disturbs one disturbs all.

    Args:
        contenders: what to time, by name.
        rounds: how often each has its turn.
        calls: calls in a turn, of which the median counts.
        device: where they work; a call's time lasts until it is done there.

    Returns:
        Seconds of a call, one number for each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            turn = []
            for _ in range(calls):
                began = time.perf_counter()
                call()
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
                turn.append(time.perf_counter() - began)
            seconds[name].append(median(turn))
    return seconds


def ratio(first: Sequence[float], second: Sequence[float], digits: int = 2) -> str:
    """Return the median of the paired ratios with the lowest and the highest."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    middle, low, high = (f"{x:.{digits}f}" for x in (median(ratios), min(ratios), max(ratios)))
    return f"{middle} [{low} to {high}]"
