"""Weights that were made anew: their accumulated history protects nothing any more.

Between two trainings weights may change without a step of the optimizer. Some strategies train
from scratch (GDumb, FromScratchTraining). Others, and users, go back to a better epoch, average
models or repair some units. A parameter counts as made anew if

* all of its weights that training had moved have changed since then, and
* they changed by at least as much as training had moved them since their history began.

So a parameter counts that is initialised anew or set back to where it began. One does not that is
set back to a better epoch, averaged with others, rounded to another dtype, grown, or made anew in
part. At most 256 weights of each parameter, which are kept as numbers, decide.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from avalanche_classp.optim.sharding import local

__all__ = ["Note", "fits", "has_moved", "is_made_anew", "note", "note_again", "sampled"]

Note = dict[str, Any]
"""A parameter's shape, and sampled weights: when its history began, and when last looked at."""

_SAMPLE = 256
_ROUNDING = 1e-3


def note(param: Tensor) -> Note | None:
    """Return a note of a parameter whose history begins; None if it has no values."""
    if is_lazy(param) or param.is_meta or param.numel() == 0:
        return None
    shape = tuple(local(param).shape)
    began = sampled(param, shape)
    return {"shape": shape, "began": began, "last": began}


def fits(noted: Note, param: Tensor) -> bool:
    """Tell whether a parameter still has the weights that were noted: it may have grown."""
    if is_lazy(param) or param.is_meta:
        return False
    then, now = noted["shape"], local(param).shape
    return len(then) == len(now) and all(a <= b for a, b in zip(then, now, strict=True))


def note_again(noted: Note, param: Tensor) -> None:
    """Note where the weights are now; of one that has grown, those that it began with."""
    noted["last"] = sampled(param, noted["shape"])


def has_moved(noted: Note, param: Tensor) -> bool:
    """Tell whether weights have changed since they were last noted."""
    return fits(noted, param) and sampled(param, noted["shape"]) != noted["last"]


def is_made_anew(noted: Note, param: Tensor) -> bool:
    """Tell whether a parameter was made anew since it was last noted; see this module."""

    def rounded(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=param.dtype, device="cpu").double()

    if not fits(noted, param):
        return False
    now = rounded(sampled(param, noted["shape"]))
    last, began = rounded(noted["last"]), rounded(noted["began"])
    by_training = last != began
    changed = now != last
    if not changed[by_training if by_training.any() else slice(None)].all():
        return False
    return bool((now - last).norm() >= (1 - _ROUNDING) * (last - began).norm())


@torch.no_grad()
def sampled(param: Tensor, shape: tuple[int, ...]) -> list[float]:
    """Return at most 256 numbers of a tensor, always those of the same places."""
    values = local(param).detach()
    if len(shape) == 0:
        return [values.item()]
    where = torch.unravel_index(_places(torch.Size(shape).numel()), shape)
    return values[tuple(index.to(values.device) for index in where)].double().tolist()


@lru_cache(maxsize=256)
def _places(size: int) -> Tensor:
    """Return which weights of a parameter of this size are looked at."""
    if size <= _SAMPLE:
        return torch.arange(size, device="cpu")
    # A generator of its own: training draws the same random numbers as without.
    generator = torch.Generator(device="cpu").manual_seed(size)
    return torch.randint(size, (_SAMPLE,), generator=generator, device="cpu")
