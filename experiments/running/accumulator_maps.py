"""Maps of the first layer's accumulators: which inputs became protected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from avalanche_classp import CLASSPOptimizer
from avalanche_classp.metrics import layers


def accumulator_map(strategy: Any, shape: tuple[int, ...]) -> list[list[float]] | None:
    """Return the mean accumulator of the weights that leave each input, as an image.

    For a linear layer the mean is over units and channels; for a convolution it is over input
    channels, and the filters' images are tiled.

    Args:
        strategy: a strategy after training.
        shape: a sample's, as :class:`Benchmark` has it; a vector with a
            square number of entries is taken for an image.

    Returns:
        Rows of numbers with three digits; None without CLASSP, or where there is no such image.
    """
    if not isinstance(strategy.optimizer, CLASSPOptimizer):
        return None
    first = next((layer for layer in layers(strategy) if layer.param.dim() in (2, 4)), None)
    if first is None:
        return None
    A = first.accumulator.double().cpu()
    image = _of_filters(A) if A.dim() == 4 else _of_inputs(A.mean(0), shape)
    if image is None:
        return None
    return [[float(f"{value:.3g}") for value in row] for row in image.tolist()]


def _of_inputs(values: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    if len(shape) == 3 and values.numel() == math.prod(shape):
        return values.view(shape).mean(0)
    side = math.isqrt(values.numel())
    return values.view(side, side) if shape == (side * side,) else None


def _of_filters(A: Tensor) -> Tensor:
    filters = A.mean(1)
    count, height, width = filters.shape
    columns = math.ceil(math.sqrt(count))
    lines = -(-count // columns)
    tiles = torch.zeros(lines * columns, height, width, dtype=A.dtype)
    tiles[:count] = filters
    tiled = tiles.view(lines, columns, height, width).transpose(1, 2)
    return tiled.reshape(lines * height, columns * width)
