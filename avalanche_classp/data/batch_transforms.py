"""Torchvision's transforms on whole mini-batches, bit for bit what they do sample by sample.

A transform of one of the types in ``_STEPS`` becomes a :class:`Step`; any other transform cannot
run on a mini-batch. Random transforms draw for one sample after the other from torch's global
generator, in the order in which they would draw if each sample went through all transforms alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from avalanche.benchmarks.classic.cmnist import PixelsPermutation
from avalanche.benchmarks.utils.classification_dataset import lookup
from torch import Tensor
from torchvision import transforms

IMAGE, TENSOR, NUMBER = "PIL image", "tensor", "number"
"""What a transform gets for one sample; a mini-batch of images is uint8, (B, H, W[, 3])."""


class NotBatchableError(Exception):
    """Why samples must go through their transforms one by one."""


@dataclass(frozen=True)
class Step:
    """One transform on a mini-batch.

    Attributes:
        apply: called with the mini-batch, which it may change, and a tensor per draw.
        draws: what the transform draws for one sample: n for a ``randint`` below n, None for a
            ``rand``.
    """

    apply: Callable[..., Tensor]
    draws: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Form:
    """What one sample looks like between two transforms: its kind, shape and dtype."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def sides(self) -> tuple[int, int]:
        """Return which dimensions of a mini-batch are an image's rows and columns."""
        if self.kind == IMAGE:
            return 1, 2
        if self.kind == TENSOR and len(self.shape) >= 2:
            return len(self.shape) - 1, len(self.shape)
        raise NotBatchableError(f"it is applied to a {self.kind} of shape {self.shape}")


class Pipeline:
    """A sequence of transforms as one function of mini-batches.

    Args:
        chain: the transforms, flat (see :func:`flat`).
        form: what the first one gets.

    Raises:
        NotBatchableError: if one of them is of another type than those known here.
    """

    def __init__(self, chain: Sequence[Any], form: Form) -> None:
        self._steps: list[Step] = []
        for transform in chain:
            if not is_batchable(transform):
                raise NotBatchableError(f"{transform!r} is not known to be deterministic")
            try:
                step, form = _STEPS[type(transform)](transform, form)
            except NotBatchableError as error:
                raise NotBatchableError(f"{transform!r}: {error}") from None
            self._steps.append(step)
        if form.kind == IMAGE:
            raise NotBatchableError("PIL images cannot be collated")
        self._draws = [high for step in self._steps for high in step.draws]

    @property
    def is_random(self) -> bool:
        """Whether the transforms draw random numbers."""
        return bool(self._draws)

    def draw(self, samples: int) -> list[Tensor]:
        """Draw for so many samples, one after the other; return a tensor for each draw."""
        # torch.rand and torch.randint are uniform_ and random_ on a new tensor, at twice the time.
        drawn = [
            torch.empty(samples) if high is None else torch.empty(samples, dtype=torch.int64)
            for high in self._draws
        ]
        for sample in zip(*(tensor.unbind() for tensor in drawn), strict=True):
            for cell, high in zip(sample, self._draws, strict=True):
                if high is None:
                    cell.uniform_()
                else:
                    cell.random_(0, high)
        return drawn

    def __call__(self, batch: Tensor, drawn: Sequence[Tensor]) -> Tensor:
        """Transform a mini-batch, which is overwritten, with what was drawn for its samples."""
        draws = iter(drawn)
        for step in self._steps:
            batch = step.apply(batch, *(next(draws) for _ in step.draws))
        return batch


def flat(transform: Any) -> Iterator[Any]:
    """Yield the transforms that this one consists of, in order; none for None."""
    if type(transform) is transforms.Compose:
        for part in transform.transforms:
            yield from flat(part)
    elif transform is not None:
        yield transform


def is_batchable(transform: Any) -> bool:
    """Tell whether there is a step for transforms of this type."""
    if type(transform) is partial:  # of all functions, the one that Avalanche maps classes with
        return transform.func is lookup and len(transform.args) == 1 and not transform.keywords
    return type(transform) in _STEPS


def is_random(transform: Any) -> bool:
    """Tell whether the transform has a step that may draw random numbers."""
    return type(transform) in _RANDOM


def is_deterministic(transform: Any) -> bool:
    """Tell whether the transform is known to give the same result for a sample each time."""
    known = is_batchable(transform) and not is_random(transform)
    return known or type(transform) in _DETERMINISTIC


def is_whole(dtype: torch.dtype) -> bool:
    """Tell whether it is a type of whole numbers."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def is_torchvisions_own(transform: Any) -> bool:
    """Tell whether torchvision, not the user, has written what the transform does."""
    own = type(transform).__module__.startswith("torchvision.")
    return own and type(transform) is not transforms.Lambda


# --- one step for each type -----------------------------------------------------------------------


def _to_tensor(transform: Any, form: Form) -> tuple[Step, Form]:
    if form.kind != IMAGE:
        raise NotBatchableError(f"it is applied to a {form.kind}")

    def apply(batch: Tensor) -> Tensor:
        batch = batch.unsqueeze(1) if batch.dim() == 3 else batch.permute(0, 3, 1, 2)
        floats = batch.to(torch.get_default_dtype(), memory_format=torch.contiguous_format)
        return floats.div_(255)

    shape = (*form.shape[2:], *form.shape[:2]) if len(form.shape) == 3 else (1, *form.shape)
    return Step(apply), Form(TENSOR, shape, torch.get_default_dtype())


def _normalize(transform: Any, form: Form) -> tuple[Step, Form]:
    fits = form.kind == TENSOR and len(form.shape) >= 3 and form.dtype.is_floating_point
    if not fits or transform.inplace:
        raise NotBatchableError(f"it is applied to a {form.kind} of shape {form.shape}, or inplace")

    mean, std = (
        torch.as_tensor(values, dtype=form.dtype).view(-1, 1, 1)
        for values in (transform.mean, transform.std)
    )
    if (std == 0).any():
        raise NotBatchableError("it divides by zero")

    def apply(batch: Tensor) -> Tensor:
        return batch.sub_(mean).div_(std)

    return Step(apply), form


def _permute_pixels(transform: Any, form: Form) -> tuple[Step, Form]:
    permutation = torch.as_tensor(transform.permutation)
    if form.kind != TENSOR or permutation.numel() != torch.Size(form.shape).numel():
        raise NotBatchableError(f"it is applied to a {form.kind} of shape {form.shape}")

    def apply(batch: Tensor) -> Tensor:
        return batch.flatten(1).index_select(1, permutation).view(batch.shape)

    return Step(apply), form


def _map_classes(transform: Any, form: Form) -> tuple[Step, Form]:
    mapping = transform.args[0]
    if form.shape or not is_whole(form.dtype) or not isinstance(mapping, list | tuple):
        raise NotBatchableError(f"it is applied to a {form.kind} of shape {form.shape}")
    table = torch.tensor(mapping, dtype=torch.int64)
    return Step(lambda batch: table[batch.long()]), Form(NUMBER, (), torch.int64)


def _random_crop(transform: Any, form: Form) -> tuple[Step, Form]:
    row, column = form.sides()
    height, width = form.shape[row - 1], form.shape[column - 1]
    left, top, right, bottom = _four_sides(transform.padding)
    fits = isinstance(transform.fill, int) and (form.kind == TENSOR or 0 <= transform.fill <= 255)
    constant = transform.padding_mode == "constant" and fits
    high, wide = transform.size
    rows, columns = height + top + bottom - high + 1, width + left + right - wide + 1
    if not constant or min(left, top, right, bottom) < 0:
        raise NotBatchableError("only a constant padding with a whole number is known")
    if rows < 1 or columns < 1:
        raise NotBatchableError(f"the crop is larger than the samples of shape {form.shape}")
    padding = [left, right, top, bottom]
    if form.kind == IMAGE and len(form.shape) == 3:
        padding = [0, 0, *padding]  # the channels come last

    def apply(batch: Tensor, tops: Tensor | None = None, lefts: Tensor | None = None) -> Tensor:
        padded = F.pad(batch, padding, value=transform.fill)
        if tops is None:
            return padded
        # Every window that a crop could be, as a view, with the window's sides at the end.
        windows = padded.unfold(row, high, 1).unfold(column, wide, 1)
        windows = windows.movedim((row, column), (1, 2))
        cropped = windows[torch.arange(len(batch)), tops, lefts]
        return cropped.movedim((-2, -1), (row, column))

    shape = list(form.shape)
    shape[row - 1], shape[column - 1] = high, wide
    # torchvision draws nothing where there is one place only.
    draws = () if rows == columns == 1 else (rows, columns)
    return Step(apply, draws), Form(form.kind, tuple(shape), form.dtype)


def _four_sides(padding: Any) -> tuple[int, int, int, int]:
    """Return what torchvision's padding means: left, top, right, bottom."""
    sides = [padding or 0] if isinstance(padding, int | None) else list(padding)
    if len(sides) not in (1, 2, 4):
        raise NotBatchableError(f"it has the padding {padding!r}")
    left, top, right, bottom = sides * (4 // len(sides))
    return left, top, right, bottom


def _random_flip(dimension: str, transform: Any, form: Form) -> tuple[Step, Form]:
    row, column = form.sides()
    flipped = row if dimension == "rows" else column

    def apply(batch: Tensor, values: Tensor) -> Tensor:
        chosen = values < transform.p
        batch[chosen] = batch[chosen].flip(flipped)
        return batch

    return Step(apply, (None,)), form


_Maker = Callable[[Any, Form], tuple[Step, Form]]

_RANDOM: dict[type, _Maker] = {
    transforms.RandomCrop: _random_crop,
    transforms.RandomHorizontalFlip: partial(_random_flip, "columns"),
    transforms.RandomVerticalFlip: partial(_random_flip, "rows"),
}

_STEPS: dict[type, _Maker] = {
    transforms.ToTensor: _to_tensor,
    transforms.Normalize: _normalize,
    PixelsPermutation: _permute_pixels,
    partial: _map_classes,
    **_RANDOM,
}

_DETERMINISTIC = {
    transforms.CenterCrop,
    transforms.ConvertImageDtype,
    transforms.Grayscale,
    transforms.LinearTransformation,
    transforms.PILToTensor,
    transforms.Pad,
    transforms.Resize,
    transforms.ToPILImage,
}
"""These have no step; they are applied to each sample once."""
