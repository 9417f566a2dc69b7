"""What the tests of bad input share: how an input is tried and counted, and what to try.

Each input must work, or give one clear error. pytest's summary says how many were tried. More of
the generated ones, and others each time: ``BAD_INPUT_SCALE=50 python -m pytest tests/test_bad_*``.
"""

from __future__ import annotations

import decimal
import fractions
import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from avalanche_classp import NonFiniteGradientError

TRIED: Counter[str] = Counter()
"""How many inputs were tried, by where: ``API`` and ``command line``."""

SCALE = int(os.environ.get("BAD_INPUT_SCALE", "1"))


def examples(count: int) -> Any:
    """Return hypothesis' settings for so many examples."""
    return settings(
        max_examples=count * SCALE,
        derandomize=SCALE == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


CLEAR = (TypeError, ValueError, NonFiniteGradientError)
"""What wrong input raises; not what comes from going on with it, such as AttributeError."""


def attempt(call: Callable[[], Any], *names: str, errors: tuple[type, ...] = CLEAR) -> bool:
    """Count an input of the API and return whether it works.

    Args:
        call: tries it.
        *names: one of them must be in the message if it is refused; none: any message will do.
        errors: that it may be refused with.
    """
    TRIED["API"] += 1
    try:
        call()
    except errors as error:
        assert type(error) in errors, f"{type(error).__name__}: {error}"
        assert str(error).strip()
        assert not names or any(name in str(error) for name in names), str(error)
        return False
    return True


NUMBERS = [
    *(0, 1, -1, 2**31, 2**63, 2**64, -(2**63), True, False),
    *(0.0, -0.0, 0.5, 1.5, -1e-3, 1e-320, 1e-45, 1e-38, 1e38, 3.5e38, 1e300, 1.7e308),
    *(math.nan, math.inf, -math.inf, 1j, fractions.Fraction(1, 3), decimal.Decimal("0.5")),
    *(np.float32(0.5), np.float16(2), np.int64(3), np.float64(math.nan), np.bool_(True)),
]
OTHERS = [
    *(
        None,
        "",
        "x",
        "0.1",
        "lr",
        b"0.1",
        (),
        [],
        {},
        set(),
        [0.1],
        {"lr": 0.1},
        object(),
        len,
        int,
    ),
    *(np.array(0.1), np.array([1, 2]), torch.tensor(0.1), torch.tensor([0.1]), torch.tensor([])),
    *(torch.tensor(math.nan), torch.tensor([1.0, 2.0]), torch.tensor(1j), torch.tensor(True)),
    *(torch.tensor(1, device="meta"), torch.ones(2, 3), range(3), iter([]), Ellipsis),
]
JUNK = [*NUMBERS, *OTHERS]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
"""What JSON can hold."""

anything = (
    st.sampled_from(JUNK)
    | st.floats()
    | st.integers()
    | st.text(max_size=5)
    | st.complex_numbers()
    | st.binary(max_size=3)
    | json_values
)


def changed(data: st.DataObject, tree: Any, values: st.SearchStrategy[Any]) -> Any:
    """Return a copy of nested dicts and lists in which one thing is gone or is another value."""
    keys = sorted(tree, key=str) if isinstance(tree, dict) else range(len(tree))
    copied = dict(tree) if isinstance(tree, dict) else list(tree)
    key = data.draw(st.sampled_from(list(keys)))
    inner = tree[key]
    if isinstance(inner, dict | list) and inner and data.draw(st.integers(0, 3)):
        copied[key] = changed(data, inner, values)
    elif data.draw(st.integers(0, 9)):
        copied[key] = data.draw(values)
    else:
        del copied[key]
    return copied
