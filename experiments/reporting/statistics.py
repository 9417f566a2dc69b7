"""Mean and confidence interval, the only statistics of tables and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

Interval = tuple[float, float]
"""Mean, and half the width of its 95 % confidence interval (NaN for a single value)."""


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean and half the width of its 95 % confidence interval (Student's t).

    Args:
        values: at least one number; of one alone the half width is NaN.
    """
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return float(array.mean()), math.nan
    return float(array.mean()), float(stats.t.ppf(0.975, len(array) - 1) * stats.sem(array))
