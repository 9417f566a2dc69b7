"""Torchvision's transforms on whole mini-batches, bit for bit what they do sample by sample."""

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
class ElementSpec:
    """What one element of a sample (its image, its target …) is before or after a transform."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def require(self, fits: bool) -> None:
        """Refuse to apply a transform to this element if it does not fit."""
        if not fits:
            raise NotBatchableError(f"it is applied to a {self.kind} of shape {self.shape}")

    def image_dimensions(self) -> tuple[int, int]:
        """Return which dimensions of a mini-batch are an image's rows and columns."""
        if self.kind == IMAGE:
            return 1, 2
        self.require(self.kind == TENSOR and len(self.shape) >= 2)
        return len(self.shape) - 1, len(self.shape)


@dataclass(frozen=True)
class Step:
    """One transform on a mini-batch.

    ``apply`` gets the mini-batch, which it may change, and a tensor per draw. ``draws`` says what
    is drawn for one sample: n for a ``randint`` below n, None for a ``rand``.
    """

    apply: Callable[..., Tensor]
    draws: tuple[int | None, ...] = ()


class BatchTransform:
    """A sequence of transforms, flattened, as one function of mini-batches.

    NotBatchableError where one of them cannot be applied to a mini-batch of this spec.
    """

    def __init__(self, chain: Sequence[Any], spec: ElementSpec) -> None:
        self._steps: list[Step] = []
        for transform in chain:
            if not is_batchable(transform):
                raise NotBatchableError(f"{transform!r} is not known to be deterministic")
            try:
                step, spec = _MAKERS[type(transform)](transform, spec)
            except NotBatchableError as error:
                raise NotBatchableError(f"{transform!r}: {error}") from None
            self._steps.append(step)
        if spec.kind == IMAGE:
            raise NotBatchableError("PIL images cannot be collated")
        self._draws = [high for step in self._steps for high in step.draws]
        self.is_random = bool(self._draws)

    def draw(self, samples: int) -> list[Tensor]:
        """Draw random numbers from torch's generator; return a tensor for each draw.

        They are drawn for one sample after the other, as if each went through all transforms.
        """
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


def flatten(transform: Any) -> Iterator[Any]:
    """Yield the transforms that this one consists of, in order; none for None."""
    if type(transform) is transforms.Compose:
        for part in transform.transforms:
            yield from flatten(part)
    elif transform is not None:
        yield transform


def is_batchable(transform: Any) -> bool:
    """Tell whether transforms of this type can be applied to mini-batches."""
    if type(transform) is partial:  # of all functions, the one that Avalanche maps classes with
        return transform.func is lookup and len(transform.args) == 1 and not transform.keywords
    return type(transform) in _MAKERS


def is_deterministic(transform: Any, vouched: bool) -> bool:
    """Tell whether a transform gives the same result for a sample each time.

    Of transforms that torchvision has not written the user may have vouched for it.
    """
    kind = type(transform)
    if is_batchable(transform) and kind not in _RANDOM:
        return True
    own = kind.__module__.startswith("torchvision.") and kind is not transforms.Lambda
    return kind in _APPLIED_ONCE or (vouched and not own)


def is_integer(dtype: torch.dtype) -> bool:
    """Tell whether it is a type of whole numbers."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


# --- one step for each type -----------------------------------------------------------------------


def _to_tensor(transform: Any, spec: ElementSpec) -> tuple[Step, ElementSpec]:
    spec.require(spec.kind == IMAGE)

    def apply(batch: Tensor) -> Tensor:
        batch = batch.unsqueeze(1) if batch.dim() == 3 else batch.permute(0, 3, 1, 2)
        floats = batch.to(torch.get_default_dtype(), memory_format=torch.contiguous_format)
        return floats.div_(255)

    shape = (*spec.shape[2:], *spec.shape[:2]) if len(spec.shape) == 3 else (1, *spec.shape)
    return Step(apply), ElementSpec(TENSOR, shape, torch.get_default_dtype())


def _normalize(transform: Any, spec: ElementSpec) -> tuple[Step, ElementSpec]:
    spec.require(spec.kind == TENSOR and len(spec.shape) >= 3 and spec.dtype.is_floating_point)
    if transform.inplace:
        raise NotBatchableError("it changes its input")
    mean, std = (
        torch.as_tensor(values, dtype=spec.dtype).view(-1, 1, 1)
        for values in (transform.mean, transform.std)
    )
    if (std == 0).any():
        raise NotBatchableError("it divides by zero")

    def apply(batch: Tensor) -> Tensor:
        return batch.sub_(mean).div_(std)

    return Step(apply), spec


def _permute_pixels(transform: Any, spec: ElementSpec) -> tuple[Step, ElementSpec]:
    permutation = torch.as_tensor(transform.permutation)
    spec.require(spec.kind == TENSOR and permutation.numel() == torch.Size(spec.shape).numel())

    def apply(batch: Tensor) -> Tensor:
        return batch.flatten(1).index_select(1, permutation).view(batch.shape)

    return Step(apply), spec


def _map_classes(transform: Any, spec: ElementSpec) -> tuple[Step, ElementSpec]:
    mapping = transform.args[0]
    spec.require(not spec.shape and is_integer(spec.dtype) and isinstance(mapping, list | tuple))
    table = torch.tensor(mapping, dtype=torch.int64)
    return Step(lambda batch: table[batch.long()]), ElementSpec(NUMBER, (), torch.int64)


def _random_crop(transform: Any, spec: ElementSpec) -> tuple[Step, ElementSpec]:
    row, column = spec.image_dimensions()
    height, width = spec.shape[row - 1], spec.shape[column - 1]
    left, top, right, bottom = _four_sides(transform.padding)
    fits = isinstance(transform.fill, int) and (spec.kind == TENSOR or 0 <= transform.fill <= 255)
    constant = transform.padding_mode == "constant" and fits
    high, wide = transform.size
    rows, columns = height + top + bottom - high + 1, width + left + right - wide + 1
    if not constant or min(left, top, right, bottom) < 0:
        raise NotBatchableError("only a constant padding with a whole number is known")
    if rows < 1 or columns < 1:
        raise NotBatchableError(f"the crop is larger than the samples of shape {spec.shape}")
    padding = [left, right, top, bottom]
    if spec.kind == IMAGE and len(spec.shape) == 3:
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

    shape = list(spec.shape)
    shape[row - 1], shape[column - 1] = high, wide
    # torchvision draws nothing where there is one place only.
    draws = () if rows == columns == 1 else (rows, columns)
    return Step(apply, draws), ElementSpec(spec.kind, tuple(shape), spec.dtype)


def _four_sides(padding: Any) -> tuple[int, int, int, int]:
    """Return what torchvision's padding means: left, top, right, bottom."""
    sides = [padding or 0] if isinstance(padding, int | None) else list(padding)
    left, top, right, bottom = sides * (4 // len(sides))
    return left, top, right, bottom


def _random_flip(dimension: str, transform: Any, spec: ElementSpec) -> tuple[Step, ElementSpec]:
    row, column = spec.image_dimensions()
    flipped = row if dimension == "rows" else column

    def apply(batch: Tensor, values: Tensor) -> Tensor:
        chosen = values < transform.p
        batch[chosen] = batch[chosen].flip(flipped)
        return batch

    return Step(apply, (None,)), spec


_Maker = Callable[[Any, ElementSpec], tuple[Step, ElementSpec]]

_RANDOM: dict[type, _Maker] = {
    transforms.RandomCrop: _random_crop,
    transforms.RandomHorizontalFlip: partial(_random_flip, "columns"),
    transforms.RandomVerticalFlip: partial(_random_flip, "rows"),
}

_MAKERS: dict[type, _Maker] = {
    transforms.ToTensor: _to_tensor,
    transforms.Normalize: _normalize,
    PixelsPermutation: _permute_pixels,
    partial: _map_classes,
    **_RANDOM,
}

_APPLIED_ONCE = {
    *(transforms.CenterCrop, transforms.ConvertImageDtype, transforms.Grayscale, transforms.Pad),
    *(transforms.LinearTransformation, transforms.PILToTensor, transforms.Resize),
    transforms.ToPILImage,
}
"""Deterministic, but without a step: they are applied to each sample once."""
