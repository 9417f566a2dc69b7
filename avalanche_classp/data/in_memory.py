"""The in-memory data path: Avalanche's own loops and loaders, mini-batches at once.

Avalanche's loaders ask a dataset for one sample after the other and then collate them. Here the
dataset's samples only say where they lie, and collating them takes the whole mini-batch: one index
operation, then the transforms on all samples together. Loaders, samplers, plugins and metrics stay
Avalanche's, and so do the order of the samples and the random numbers.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from avalanche.benchmarks import CLScenario
from avalanche.benchmarks.scenarios.generic_scenario import (
    CLStream,
    EagerCLStream,
    SequenceCLStream,
)
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.classification_dataset import (
    ClassificationDataset,
    TaskAwareClassificationDataset,
    TaskAwareSupervisedClassificationDataset,
)
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from avalanche.benchmarks.utils.flat_data import ConstantSequence
from torch import Tensor
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from avalanche_classp.data.batch_transforms import NotBatchableError
from avalanche_classp.data.dataset_tree import Plan, taken
from avalanche_classp.data.sample_store import Source

__all__ = ["in_memory"]


def in_memory(benchmark: CLScenario, *, deterministic: bool = False) -> CLScenario:
    """Return the benchmark with the same data, streams and experiences, loaded faster.

    Every strategy, plugin and loader of Avalanche gets the same mini-batches as before, bit for
    bit and in the same order, and leaves torch's random generator in the same state::

        benchmark = in_memory(SplitMNIST(5))

    *Which data.* MNIST, Fashion-MNIST, KMNIST, CIFAR-10 and CIFAR-100 as Avalanche and torchvision
    have them, TensorDataset and Avalanche's tensor benchmarks, with subsets and concatenations of
    them. Where other datasets or other transforms are met, the samples concerned go through
    Avalanche's way one by one, and a warning says why.

    *Which transforms.* On whole mini-batches: ToTensor, Normalize, PermutedMNIST's permutation,
    RandomCrop with constant padding, RandomHorizontalFlip, RandomVerticalFlip. Applied once, and
    the results kept: CenterCrop, ConvertImageDtype, Grayscale, LinearTransformation, PILToTensor,
    Pad, Resize, ToPILImage. These are the classes in ``torchvision.transforms``, not in its
    ``v2``. Any other transform may be random, so none is kept without your word.

    *Memory.* 8 bytes per sample and experience. The arrays that these datasets hold anyway are
    used as they are, so ten permutations of MNIST take no more than one. What is applied once
    takes as many bytes as its result, for every sample that has been used.

    Args:
        benchmark: any benchmark whose experiences have datasets. It is not changed.
        deterministic: your word that all datasets and transforms give the same result for a sample
            each time; torchvision's random transforms are still recognised. What is unknown is
            then applied once, and its result kept. Default: False.

    Raises:
        TypeError: ``benchmark`` is not an Avalanche benchmark of datasets, or ``deterministic``
            is no bool.
        ValueError: now or when a sample is first loaded: what was said to be deterministic draws
            random numbers, or samples that are to be kept differ in shape.
    """
    if not isinstance(benchmark, CLScenario):
        raise TypeError(
            f"benchmark must be an Avalanche benchmark such as SplitMNIST(5), got {benchmark!r}"
        )
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic must be True or False, got {deterministic!r}")
    default_collate_fn_map[_Sample] = _collate
    sources: dict[int, Source] = {}

    def source(dataset: Any) -> Source:
        return sources.setdefault(id(dataset), Source(dataset, deterministic))

    new = copy.copy(benchmark)
    streams = [_stream_in_memory(stream, new, source) for stream in benchmark.streams.values()]
    CLScenario.__init__(new, streams)
    return new


def _stream_in_memory(stream: Any, benchmark: CLScenario, source: Callable[[Any], Source]) -> Any:
    experiences = (_experience_in_memory(experience, source) for experience in stream)
    if isinstance(stream, SequenceCLStream):
        return EagerCLStream(stream.name, list(experiences), benchmark)
    return CLStream(stream.name, experiences, benchmark)


def _experience_in_memory(experience: Any, source: Callable[[Any], Source]) -> Any:
    dataset = getattr(experience, "dataset", None)
    if not isinstance(dataset, AvalancheDataset):
        raise TypeError(
            f"benchmark must have experiences with an AvalancheDataset, but experience "
            f"{experience.current_experience} has {dataset!r}"
        )
    new = copy.copy(experience)
    new._dataset = _dataset_in_memory(dataset, source)
    return new


def _dataset_in_memory(dataset: AvalancheDataset, source: Callable[[Any], Source]) -> Any:
    """Return the dataset as one of the classes below, or as it is where that is of no use."""
    if len(dataset) == 0 or isinstance(dataset, _InMemory):
        return dataset
    new_class = _CLASSES.get(type(dataset))
    if new_class is None:
        _warn(f"a {type(dataset).__name__} is none of Avalanche's classification datasets")
        return dataset
    if dataset.collate_fn is not default_collate:
        _warn(f"the {type(dataset).__name__} has a collate_fn of its own")
        return dataset
    tree = taken(dataset._flat_data, None, source)
    new = _built(new_class, tree, list(dataset._data_attributes.values()), dataset)
    reasons = [view.reason_against_batches() for view in (new.train(), new.eval())]
    for reason in dict.fromkeys(reasons):
        if reason is not None:
            _warn(reason)
    return new if None in reasons else dataset


def _warn(reason: str) -> None:
    warnings.warn(f"in_memory leaves samples to be loaded one by one: {reason}", stacklevel=2)


# --- samples, and mini-batches of them ------------------------------------------------------------


class _Sample(Sequence[Any]):
    """A sample that is loaded when somebody looks into it; in a mini-batch nobody does."""

    __slots__ = ("dataset", "loaded", "place")

    def __init__(self, dataset: _InMemory, place: int) -> None:
        self.dataset = dataset
        self.place = place

    def _load(self) -> list[Any]:
        try:
            return self.loaded
        except AttributeError:
            self.loaded: list[Any] = self.dataset.load_sample(self.place)
            return self.loaded

    def __len__(self) -> int:
        return len(self._load())

    def __getitem__(self, item: Any) -> Any:
        return self._load()[item]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._load())

    def __repr__(self) -> str:
        return repr(self._load())


def _collate(samples: Sequence[Any], *, collate_fn_map: Any = None) -> list[Any]:
    """Make a mini-batch of samples: what default_collate does when the first one is a _Sample."""
    runs: list[tuple[_InMemory, list[int]]] = []
    if all(type(sample) is _Sample for sample in samples):
        for _, group in groupby(samples, key=lambda sample: id(sample.dataset)):
            run = list(group)
            runs.append((run[0].dataset, [sample.place for sample in run]))
    if not runs or any(dataset.reason_against_batches() for dataset, _ in runs):
        return default_collate([list(sample) for sample in samples])
    batches = [dataset.load_batch(places) for dataset, places in runs]
    if len(batches) == 1:
        return batches[0]
    return [torch.cat(elements) for elements in zip(*batches, strict=True)]


class _InMemory(AvalancheDataset):
    """What the dataset classes below add to those of Avalanche."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._size = len(self)

    def __getstate__(self) -> dict[str, Any]:
        # Avalanche copies a dataset and then changes the copy's transforms or attributes.
        return {key: value for key, value in self.__dict__.items() if key != "_prepared"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        default_collate_fn_map[_Sample] = _collate  # this may be another process

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int and 0 <= index < self._size:
            return _Sample(self, index)
        return super().__getitem__(index)

    def load_sample(self, index: int) -> list[Any]:
        """Load one sample as Avalanche does."""
        return super().__getitem__(index)

    def load_batch(self, indices: list[int]) -> list[Tensor]:
        """Load a mini-batch; there must be no reason against it."""
        plan, appended = self._prepared
        index = torch.tensor(indices)
        return plan.load(index) + [column.index_select(0, index) for column in appended]

    def reason_against_batches(self) -> str | None:
        """Return why samples must be loaded one by one; None if mini-batches can be loaded."""
        return self._prepared if isinstance(self._prepared, str) else None

    @cached_property
    def _prepared(self) -> Any:
        """How to load mini-batches of the elements and of what Avalanche appends to them.

        Those are the task label and other attributes. Where it is not possible, the reason.
        """
        attributes = self._data_attributes.values()
        try:
            appended = [_values(attribute) for attribute in attributes if attribute.use_in_getitem]
            return Plan(self._flat_data), appended
        except NotBatchableError as error:
            return str(error)

    def subset(self, indices: Any) -> Any:
        """Return the dataset of these samples."""
        places = [int(i) for i in indices]
        if not places:
            return super().subset(places)
        tree = taken(self._flat_data, torch.tensor(places))
        attributes = [attribute.subset(places) for attribute in self._data_attributes.values()]
        return _built(type(self), tree, attributes, self)


class _AvalancheDataset(_InMemory):
    pass


class _ClassificationDataset(_InMemory, ClassificationDataset):
    pass


class _TaskAwareClassificationDataset(_InMemory, TaskAwareClassificationDataset):
    pass


class _TaskAwareSupervisedClassificationDataset(
    _InMemory, TaskAwareSupervisedClassificationDataset
):
    pass


_CLASSES: dict[type, type[_InMemory]] = {
    AvalancheDataset: _AvalancheDataset,
    ClassificationDataset: _ClassificationDataset,
    TaskAwareClassificationDataset: _TaskAwareClassificationDataset,
    TaskAwareSupervisedClassificationDataset: _TaskAwareSupervisedClassificationDataset,
}


def _built(
    new_class: type[_InMemory], tree: Any, attributes: list[DataAttribute], like: AvalancheDataset
) -> Any:
    new = new_class([tree], data_attributes=attributes, collate_fn=like.collate_fn)
    return new.with_transforms(like._flat_data._transform_groups.current_group)


def _values(attribute: DataAttribute) -> Tensor:
    size = len(attribute)
    constant = isinstance(attribute.data, ConstantSequence)
    values = default_collate([attribute[i] for i in range(1 if constant else size)])
    if not isinstance(values, Tensor):
        raise NotBatchableError(f"the attribute {attribute.name!r} is not made of numbers")
    return values.expand(size) if constant else values
