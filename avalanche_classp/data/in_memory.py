"""The in-memory data path: Avalanche's own loops and loaders, mini-batches at once.

Avalanche's loaders ask a dataset for one sample after the other and then collate them. Here a
sample only knows its position, and collating loads the whole mini-batch: one index operation, then
the transforms on all samples together.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, TypeVar

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

from avalanche_classp.data import avalanche_internals as internals
from avalanche_classp.data.batch_transforms import NotBatchableError
from avalanche_classp.data.dataset_tree import BatchLoader, select_samples
from avalanche_classp.data.sample_store import SampleSource

__all__ = ["in_memory"]

Benchmark = TypeVar("Benchmark", bound=CLScenario)


def in_memory(benchmark: Benchmark, *, deterministic: bool = False) -> Benchmark:
    """Return the benchmark with the same data, streams and experiences, loaded faster.

    Every strategy, plugin and loader of Avalanche gets the same mini-batches as before, bit for
    bit and in the same order, and leaves torch's random generator in the same state::

        benchmark = in_memory(SplitMNIST(5))

    *Datasets.* MNIST, Fashion-MNIST, KMNIST, CIFAR-10 and CIFAR-100 as Avalanche and torchvision
    have them, TensorDataset and Avalanche's tensor benchmarks, with subsets and concatenations of
    them. Samples with other datasets or transforms are loaded by Avalanche one by one, and a
    warning says why.

    *Transforms of torchvision.transforms* (not of its ``v2``). On whole mini-batches: ToTensor,
    Normalize, PermutedMNIST's permutation, RandomCrop with constant padding, RandomHorizontalFlip,
    RandomVerticalFlip. Applied once, with the results kept: CenterCrop, ConvertImageDtype,
    Grayscale, LinearTransformation, PILToTensor, Pad, Resize, ToPILImage.

    *Memory.* 8 bytes per sample and experience. The datasets' own arrays are used as they are, so
    ten permutations of MNIST take no more than one. A result that is kept takes its own bytes,
    once the sample has been used.

    Args:
        benchmark: any benchmark whose experiences have datasets. It is not changed.
        deterministic: your word that each dataset and each transform of your own gives the same
            result for a sample each time. It is then applied once, and the result kept.
            Default: False.

    Raises:
        TypeError: ``benchmark`` is not an Avalanche benchmark of datasets, or ``deterministic``
            is no bool.
        ValueError: now or when a sample is first loaded: what you said to be deterministic draws
            random numbers, or samples that are to be kept differ in shape.
    """
    if not isinstance(benchmark, CLScenario):
        raise TypeError(
            f"benchmark must be an Avalanche benchmark such as SplitMNIST(5), got {benchmark!r}"
        )
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic must be True or False, got {deterministic!r}")
    _register_collate()
    sources: dict[int, SampleSource] = {}

    def source_of(dataset: Any) -> SampleSource:
        return sources.setdefault(id(dataset), SampleSource(dataset, deterministic))

    new = copy.copy(benchmark)
    streams = [_convert_stream(stream, new, source_of) for stream in benchmark.streams.values()]
    CLScenario.__init__(new, streams)
    return new


_SourceOf = Callable[[Any], SampleSource]


def _convert_stream(stream: Any, benchmark: CLScenario, source_of: _SourceOf) -> Any:
    experiences = (_convert_experience(experience, source_of) for experience in stream)
    if isinstance(stream, SequenceCLStream):
        return EagerCLStream(stream.name, list(experiences), benchmark)
    return CLStream(stream.name, experiences, benchmark)


def _convert_experience(experience: Any, source_of: _SourceOf) -> Any:
    dataset = getattr(experience, "dataset", None)
    if not isinstance(dataset, AvalancheDataset):
        raise TypeError(
            f"benchmark must have experiences with an AvalancheDataset, but experience "
            f"{experience.current_experience} has {dataset!r}"
        )
    new = copy.copy(experience)
    internals.set_dataset(new, _convert_dataset(dataset, source_of))
    return new


def _convert_dataset(dataset: AvalancheDataset, source_of: _SourceOf) -> Any:
    """Return the dataset as one of the classes below, or as it is where that is of no use."""
    if len(dataset) == 0 or isinstance(dataset, InMemoryDataset):
        return dataset
    new_class = _IN_MEMORY_CLASSES.get(type(dataset))
    if new_class is None:
        _warn(f"a {type(dataset).__name__} is none of Avalanche's classification datasets")
        return dataset
    if dataset.collate_fn is not default_collate:
        _warn(f"the {type(dataset).__name__} has a collate_fn of its own")
        return dataset
    tree = select_samples(internals.data_tree(dataset), None, source_of)
    new = new_class.from_tree(tree, internals.data_attributes(dataset), dataset)
    reasons = [view.reason_against_batches() for view in (new.train(), new.eval())]
    for reason in dict.fromkeys(reasons):
        if reason is not None:
            _warn(reason)
    return new if None in reasons else dataset


def _warn(reason: str) -> None:
    warnings.warn(f"in_memory leaves samples to be loaded one by one: {reason}", stacklevel=2)


class LazySample(Sequence[Any]):
    """A sample that is loaded when somebody looks into it; in a mini-batch nobody does."""

    __slots__ = ("dataset", "elements", "position")

    def __init__(self, dataset: InMemoryDataset, position: int) -> None:
        self.dataset, self.position = dataset, position
        self.elements: list[Any] | None = None

    def _load(self) -> list[Any]:
        if self.elements is None:
            self.elements = self.dataset.load_sample(self.position)
        return self.elements

    def __len__(self) -> int:
        return len(self._load())

    def __getitem__(self, item: Any) -> Any:
        return self._load()[item]

    def __repr__(self) -> str:
        return repr(self._load())


def _register_collate() -> None:
    """Have torch's default_collate call _collate where a mini-batch begins with a LazySample."""
    internals.default_collate_fn_map[LazySample] = _collate


def _collate(samples: Sequence[Any], *, collate_fn_map: Any = None) -> list[Any]:
    """Load a mini-batch at once, or one by one where a sample's dataset cannot do that."""
    runs: list[tuple[InMemoryDataset, list[int]]] = []
    if all(type(sample) is LazySample for sample in samples):
        for _, group in groupby(samples, key=lambda sample: id(sample.dataset)):
            run = list(group)
            runs.append((run[0].dataset, [sample.position for sample in run]))
    if not runs or any(dataset.reason_against_batches() for dataset, _ in runs):
        return default_collate([list(sample) for sample in samples])
    batches = [dataset.load_batch(indices) for dataset, indices in runs]
    if len(batches) == 1:
        return batches[0]
    return [torch.cat(elements) for elements in zip(*batches, strict=True)]


class InMemoryDataset(AvalancheDataset):
    """What the dataset classes below add to those of Avalanche."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._size = len(self)

    @classmethod
    def from_tree(cls, tree: Any, attributes: list[DataAttribute], like: AvalancheDataset) -> Any:
        """Return a dataset of this tree and these attributes, otherwise like another dataset."""
        new = cls([tree], data_attributes=attributes, collate_fn=like.collate_fn)
        return new.with_transforms(internals.current_group(internals.data_tree(like)))

    def __getstate__(self) -> dict[str, Any]:
        # Avalanche copies a dataset and then changes the copy's transforms or attributes.
        return {key: value for key, value in self.__dict__.items() if key != "_batch_loader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register_collate()  # this may be another process

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int and 0 <= index < self._size:
            return LazySample(self, index)
        return super().__getitem__(index)

    def load_sample(self, index: int) -> list[Any]:
        """Load one sample as Avalanche does."""
        return super().__getitem__(index)

    def load_batch(self, indices: list[int]) -> list[Tensor]:
        """Load a mini-batch; there must be no reason against it."""
        loader, appended = self._batch_loader
        index = torch.tensor(indices)
        return loader.load(index) + [column.index_select(0, index) for column in appended]

    def reason_against_batches(self) -> str | None:
        """Return why samples must be loaded one by one; None if mini-batches can be loaded."""
        return self._batch_loader if isinstance(self._batch_loader, str) else None

    @cached_property
    def _batch_loader(self) -> Any:
        """The loader, and the attributes to append to samples; or the reason why it cannot be."""
        attributes = [a for a in internals.data_attributes(self) if a.use_in_getitem]
        try:
            return BatchLoader(internals.data_tree(self)), [_as_column(a) for a in attributes]
        except NotBatchableError as error:
            return str(error)

    def subset(self, indices: Any) -> Any:
        """Return the dataset of these samples."""
        chosen = [int(i) for i in indices]
        if not chosen:
            return super().subset(chosen)
        tree = select_samples(internals.data_tree(self), torch.tensor(chosen))
        attributes = [attribute.subset(chosen) for attribute in internals.data_attributes(self)]
        return self.from_tree(tree, attributes, self)


class _InMemoryAvalancheDataset(InMemoryDataset):
    pass


class _InMemoryClassificationDataset(InMemoryDataset, ClassificationDataset):
    pass


class _InMemoryTaskAware(InMemoryDataset, TaskAwareClassificationDataset):
    pass


class _InMemoryTaskAwareSupervised(InMemoryDataset, TaskAwareSupervisedClassificationDataset):
    pass


_IN_MEMORY_CLASSES: dict[type, type[InMemoryDataset]] = {
    AvalancheDataset: _InMemoryAvalancheDataset,
    ClassificationDataset: _InMemoryClassificationDataset,
    TaskAwareClassificationDataset: _InMemoryTaskAware,
    TaskAwareSupervisedClassificationDataset: _InMemoryTaskAwareSupervised,
}


def _as_column(attribute: DataAttribute) -> Tensor:
    constant = isinstance(attribute.data, ConstantSequence)
    count = 1 if constant else len(attribute)
    values = default_collate([attribute[i] for i in range(count)])
    if not isinstance(values, Tensor):
        raise NotBatchableError(f"the attribute {attribute.name!r} is not made of numbers")
    return values.expand(len(attribute)) if constant else values
