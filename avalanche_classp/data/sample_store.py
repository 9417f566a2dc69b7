"""Where the in-memory data path takes samples from: a plain dataset's samples as tensors.

MNIST, CIFAR and TensorDataset hold all their samples as one array already, which is used as it is.
What can only be made sample by sample, but is the same each time, is made once and kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.datasets.external_datasets.mnist import TensorMNIST
from avalanche.benchmarks.utils.classification_dataset import _TensorClassificationDataset
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, KMNIST, MNIST, FashionMNIST

from avalanche_classp.data.batch_transforms import (
    IMAGE,
    NUMBER,
    TENSOR,
    Form,
    NotBatchableError,
    Pipeline,
    flat,
    is_batchable,
    is_deterministic,
    is_torchvisions_own,
    is_whole,
)


class Column:
    """One element of each sample (the image, the target …) of a dataset that holds it as an array.

    Args:
        data: the array, one row per sample.
        kind: what a sample's element is.
        chain: the transforms that the dataset itself applies to it.
    """

    def __init__(self, data: Tensor, kind: str, chain: Sequence[Any] = ()) -> None:
        self.data, self.chain = data, tuple(chain)
        self.form = Form(kind, tuple(data.shape[1:]), data.dtype)

    def item(self, row: int) -> Any:
        """Return the element of one sample as the first transform gets it."""
        value = self.data[row]
        if self.form.kind == IMAGE:
            return Image.fromarray(value.numpy())
        return value.item() if self.form.kind == NUMBER else value.clone()

    def take(self, rows: Tensor) -> Tensor:
        """Return the elements of these samples as a new tensor."""
        return self.data.index_select(0, rows)


class MadeOnce:
    """One element of each sample, made when it is first needed and kept.

    Args:
        make: makes the element of a sample.
        size: number of samples.
        name: what makes them, for messages.
    """

    def __init__(self, make: Callable[[int], Any], size: int, name: str) -> None:
        self._make, self._name = make, name
        self._is_made = torch.zeros(size, dtype=torch.bool)
        value, kind = _as_tensor(self._made(0))
        self.form = Form(kind, tuple(value.shape), value.dtype)
        # The operating system gives this memory when it is first written to.
        self._data = torch.empty((size, *value.shape), dtype=value.dtype)
        self._data[0], self._is_made[0] = value, True

    def take(self, rows: Tensor) -> Tensor:
        """Return the elements of these samples as a new tensor.

        Raises:
            ValueError: an element has another shape or type than the first one, or it was made
                with random numbers.
        """
        for row in rows[~self._is_made[rows]].unique().tolist():
            value, kind = _as_tensor(self._made(row))
            form = Form(kind, tuple(value.shape), value.dtype)
            if form != self.form:
                raise ValueError(
                    f"in_memory: {self._name} gives samples that differ ({self.form} and {form}) "
                    f"and cannot be held as one tensor; use the benchmark without in_memory"
                )
            self._data[row] = value
            self._is_made[row] = True
        return self._data.index_select(0, rows)

    def _made(self, row: int) -> Any:
        before = _random_states()
        value = self._make(row)
        if _random_states() != before:
            raise ValueError(
                f"in_memory: {self._name} draws random numbers, so it must not be applied once "
                f"and kept; leave out deterministic=True"
            )
        return value


class Source:
    """A plain dataset, neither subset nor concatenation, and its samples as tensors.

    Args:
        dataset: the dataset.
        deterministic: whether the user vouches for the dataset and for all transforms that are
            not torchvision's own.
    """

    def __init__(self, dataset: Any, deterministic: bool) -> None:
        self.dataset, self.deterministic = dataset, deterministic
        self._made: dict[tuple[int, tuple[int, ...]], tuple[MadeOnce, tuple[Any, ...]]] = {}

    def __reduce__(self) -> Any:  # checkpoints hold the dataset alone, as without in_memory
        return type(self), (self.dataset, self.deterministic)

    @cached_property
    def _columns(self) -> list[Column] | None:
        return _columns(self.dataset)

    @cached_property
    def width(self) -> int:
        """Number of elements of each sample.

        Raises:
            NotBatchableError: it cannot be known without changing what happens later.
        """
        if self._columns is not None:
            return len(self._columns)
        if not self.deterministic:
            raise NotBatchableError(
                f"a {type(self.dataset).__name__} is not known to give the same samples each time"
            )
        sample = self.dataset[0]
        if not isinstance(sample, tuple | list):
            raise NotBatchableError(f"its samples are {type(sample).__name__}, not tuples")
        return len(sample)

    def prepare(self, element: int, chain: Sequence[Any]) -> tuple[Any, Pipeline]:
        """Split a chain of transforms in what is made once and what runs on mini-batches.

        Args:
            element: which element of each sample they are applied to.
            chain: the transforms, flat.

        Returns:
            The :class:`Column` or :class:`MadeOnce` to take elements from and the
            :class:`Pipeline` to apply to them.

        Raises:
            NotBatchableError: this chain must be applied sample by sample each time.
        """
        stored: Any = None
        if self._columns is not None:
            stored = self._columns[element]
            chain = (*stored.chain, *chain)
        cut = max((i + 1 for i, t in enumerate(chain) if not is_batchable(t)), default=0)
        if cut or stored is None:
            stored = self._made_once(element, tuple(chain[:cut]))
        pipeline = Pipeline(chain[cut:], stored.form)
        if pipeline.is_random and element > 0:
            raise NotBatchableError("a transform of the targets is random")
        return stored, pipeline

    def _made_once(self, element: int, chain: tuple[Any, ...]) -> MadeOnce:
        for transform in chain:
            vouched = self.deterministic and not is_torchvisions_own(transform)
            if not (vouched or is_deterministic(transform)):
                raise NotBatchableError(f"{transform!r} is not known to be deterministic")
        key = (element, tuple(map(id, chain)))
        if key not in self._made:
            name = ", ".join([type(self.dataset).__name__, *map(repr, chain)])
            made = MadeOnce(lambda row: self._make(element, chain, row), len(self.dataset), name)
            self._made[key] = made, chain  # which keeps the ids from being used again
        return self._made[key][0]

    def _make(self, element: int, chain: tuple[Any, ...], row: int) -> Any:
        if self._columns is None:
            value = self.dataset[row][element]
        else:
            value = self._columns[element].item(row)
        for transform in chain:
            value = transform(value)
        return value


def _columns(dataset: Any) -> list[Column] | None:
    """Return the arrays that the dataset holds, None where it is of another type than these."""
    if type(dataset) is TensorDataset:
        return [Column(tensor, TENSOR) for tensor in dataset.tensors]
    if type(dataset) is _TensorClassificationDataset:
        first, targets, *others = dataset.tensors
        if not is_whole(targets.dtype):
            return None
        rest = [Column(tensor, TENSOR) for tensor in others]
        return [Column(first, TENSOR), Column(targets.long(), NUMBER), *rest]
    if type(dataset) not in (TensorMNIST, MNIST, FashionMNIST, KMNIST, CIFAR10, CIFAR100):
        return None
    images, targets = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    if images.dtype != torch.uint8 or images.shape[3:] not in ((), (3,)):
        return None
    chain = list(flat(dataset.transform))
    if type(dataset) is TensorMNIST:  # it makes float32 tensors as ToTensor does
        if torch.get_default_dtype() != torch.float32:
            return None
        chain = [transforms.ToTensor(), *chain]
    target = Column(targets.long(), NUMBER, list(flat(dataset.target_transform)))
    return [Column(images, IMAGE, chain), target]


def _as_tensor(value: Any) -> tuple[Tensor, str]:
    if isinstance(value, Image.Image):
        if value.mode not in ("L", "RGB"):
            raise NotBatchableError(f"a PIL image of mode {value.mode!r}")
        return torch.from_numpy(np.array(value)), IMAGE
    try:
        collated = default_collate([value])
    except TypeError as error:
        raise NotBatchableError(f"samples hold a {type(value).__name__}") from error
    if not isinstance(collated, Tensor):
        raise NotBatchableError(f"samples hold a {type(value).__name__}")
    return collated[0], TENSOR if isinstance(value, Tensor) else NUMBER


def _random_states() -> tuple[Any, ...]:
    _, keys, *rest = np.random.get_state(legacy=True)
    states = torch.get_rng_state(), torch.as_tensor(keys)
    return *(state.numpy().tobytes() for state in states), random.getstate(), *rest
