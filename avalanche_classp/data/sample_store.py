"""The samples of a plain dataset as tensors: arrays that it holds, or results that are kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.datasets.external_datasets.mnist import TensorMNIST
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, KMNIST, MNIST, FashionMNIST

from avalanche_classp.data.avalanche_internals import TensorClassificationDataset
from avalanche_classp.data.batch_transforms import (
    IMAGE,
    NUMBER,
    TENSOR,
    BatchTransform,
    ElementSpec,
    NotBatchableError,
    flatten,
    is_batchable,
    is_deterministic,
    is_integer,
)


class ArrayColumn:
    """One element of each sample (the image, the target …) of a dataset that holds it as an array.

    ``chain`` are the transforms that the dataset itself applies to it.
    """

    def __init__(self, data: Tensor, kind: str, chain: Sequence[Any] = ()) -> None:
        self.data, self.chain = data, tuple(chain)
        self.spec = ElementSpec(kind, tuple(data.shape[1:]), data.dtype)

    def item(self, row: int) -> Any:
        """Return the element of one sample as the first transform gets it."""
        value = self.data[row]
        if self.spec.kind == IMAGE:
            return Image.fromarray(value.numpy())
        return value.item() if self.spec.kind == NUMBER else value.clone()

    def take(self, rows: Tensor) -> Tensor:
        """Return the elements of these samples as a new tensor."""
        return self.data.index_select(0, rows)


class CachedColumn:
    """One element of each sample, computed when it is first needed and kept.

    ValueError, from ``take`` too, where an element has another shape or type than the first one, or
    was computed with random numbers. ``name`` is what computes them, for messages.
    """

    def __init__(self, compute: Callable[[int], Any], size: int, name: str) -> None:
        self._compute, self._name = compute, name
        first, self.spec = self._computed(0)
        self._is_cached = torch.zeros(size, dtype=torch.bool)
        # The operating system gives this memory when it is first written to.
        self._data = torch.empty((size, *first.shape), dtype=first.dtype)
        self._data[0], self._is_cached[0] = first, True

    def take(self, rows: Tensor) -> Tensor:
        """Return the elements of these samples as a new tensor."""
        for row in rows[~self._is_cached[rows]].unique().tolist():
            value, spec = self._computed(row)
            if spec != self.spec:
                raise ValueError(
                    f"in_memory: {self._name} gives samples that differ ({self.spec} and {spec}) "
                    f"and cannot be held as one tensor; use the benchmark without in_memory"
                )
            self._data[row], self._is_cached[row] = value, True
        return self._data.index_select(0, rows)

    def _computed(self, row: int) -> tuple[Tensor, ElementSpec]:
        before = _random_states()
        computed = self._compute(row)
        if _random_states() != before:
            raise ValueError(
                f"in_memory: {self._name} draws random numbers, so it must not be applied once "
                f"and kept; leave out deterministic=True"
            )
        value, kind = _as_tensor(computed)
        return value, ElementSpec(kind, tuple(value.shape), value.dtype)


class SampleSource:
    """A plain dataset, neither subset nor concatenation, and its samples as tensors.

    ``deterministic``: the user vouches for the dataset and for transforms not torchvision's own.
    """

    def __init__(self, dataset: Any, deterministic: bool) -> None:
        self.dataset, self.deterministic = dataset, deterministic
        self._cached: dict[Any, CachedColumn] = {}

    def __reduce__(self) -> Any:  # checkpoints hold the dataset alone, as without in_memory
        return type(self), (self.dataset, self.deterministic)

    @cached_property
    def _arrays(self) -> list[ArrayColumn] | None:
        return _find_arrays(self.dataset)

    @cached_property
    def elements(self) -> int:
        """Number of elements of each sample; NotBatchableError where looking may change it."""
        if self._arrays is not None:
            return len(self._arrays)
        if not self.deterministic:
            raise NotBatchableError(
                f"a {type(self.dataset).__name__} is not known to give the same samples each time"
            )
        sample = self.dataset[0]
        if not isinstance(sample, tuple | list):
            raise NotBatchableError(f"its samples are {type(sample).__name__}, not tuples")
        return len(sample)

    def prepare(
        self, element: int, chain: Sequence[Any]
    ) -> tuple[ArrayColumn | CachedColumn, BatchTransform]:
        """Split an element's transforms in what is computed once and what runs on mini-batches.

        NotBatchableError where they must be applied sample by sample each time.
        """
        column: ArrayColumn | CachedColumn | None = None
        if self._arrays is not None:
            column = self._arrays[element]
            chain = (*column.chain, *chain)
        cut = max((i + 1 for i, t in enumerate(chain) if not is_batchable(t)), default=0)
        if cut or column is None:
            column = self._cached_column(element, tuple(chain[:cut]))
        transform = BatchTransform(chain[cut:], column.spec)
        if transform.is_random and element > 0:
            raise NotBatchableError("a transform of the targets is random")
        return column, transform

    def _cached_column(self, element: int, chain: tuple[Any, ...]) -> CachedColumn:
        for transform in chain:
            if not is_deterministic(transform, self.deterministic):
                raise NotBatchableError(f"{transform!r} is not known to be deterministic")
        arrays, dataset = self._arrays, self.dataset

        def compute(row: int) -> Any:  # holds the transforms, so that their ids stay theirs
            value = dataset[row][element] if arrays is None else arrays[element].item(row)
            for transform in chain:
                value = transform(value)
            return value

        key = (element, *map(id, chain))
        if key not in self._cached:
            name = ", ".join([type(dataset).__name__, *map(repr, chain)])
            self._cached[key] = CachedColumn(compute, len(dataset), name)
        return self._cached[key]


def _find_arrays(dataset: Any) -> list[ArrayColumn] | None:
    """Return the arrays that the dataset holds, None where it is of another type than these."""
    if type(dataset) is TensorDataset:
        return [ArrayColumn(tensor, TENSOR) for tensor in dataset.tensors]
    if type(dataset) is TensorClassificationDataset:
        first, targets, *others = dataset.tensors
        if not is_integer(targets.dtype):
            return None
        rest = [ArrayColumn(tensor, TENSOR) for tensor in others]
        return [ArrayColumn(first, TENSOR), ArrayColumn(targets.long(), NUMBER), *rest]
    if type(dataset) not in (TensorMNIST, MNIST, FashionMNIST, KMNIST, CIFAR10, CIFAR100):
        return None
    images, targets = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    if images.dtype != torch.uint8 or images.shape[3:] not in ((), (3,)):
        return None
    chain = list(flatten(dataset.transform))
    if type(dataset) is TensorMNIST:  # it makes float32 tensors as ToTensor does
        if torch.get_default_dtype() != torch.float32:
            return None
        chain = [transforms.ToTensor(), *chain]
    target_chain = list(flatten(dataset.target_transform))
    return [ArrayColumn(images, IMAGE, chain), ArrayColumn(targets.long(), NUMBER, target_chain)]


def _as_tensor(value: Any) -> tuple[Tensor, str]:
    if isinstance(value, Image.Image):
        if value.mode not in ("L", "RGB"):
            raise NotBatchableError(f"a PIL image of mode {value.mode!r}")
        return torch.from_numpy(np.array(value)), IMAGE
    try:
        collated = default_collate([value])
    except TypeError:
        collated = None
    if not isinstance(collated, Tensor):
        raise NotBatchableError(f"samples hold a {type(value).__name__}")
    return collated[0], TENSOR if isinstance(value, Tensor) else NUMBER


def _random_states() -> tuple[Any, ...]:
    _, keys, *rest = np.random.get_state(legacy=True)
    states = torch.get_rng_state(), torch.as_tensor(keys)
    return *(state.numpy().tobytes() for state in states), random.getstate(), *rest
