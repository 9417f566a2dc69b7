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
from avalanche.benchmarks.utils.flat_data import ConstantSequence, FlatData
from avalanche.benchmarks.utils.transform_groups import EmptyTransformGroups
from avalanche.benchmarks.utils.transforms import MultiParamCompose, TupleTransform
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from avalanche_classp.batch_transforms import NotBatchableError, Pipeline, flat
from avalanche_classp.sample_store import Source

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
        TypeError: ``benchmark`` is not an Avalanche benchmark of datasets.
        ValueError: later, when samples are loaded: what was said to be deterministic draws random
            numbers, or samples that are to be kept differ in shape.
    """
    if not isinstance(benchmark, CLScenario):
        raise TypeError(
            f"benchmark must be an Avalanche benchmark such as SplitMNIST(5), got {benchmark!r}"
        )
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
    if new_class is None or dataset.collate_fn is not default_collate:
        _warn(f"a {type(dataset).__name__} with collate_fn={dataset.collate_fn!r} is not known")
        return dataset
    tree = _taken(dataset._flat_data, None, source)
    new = _built(new_class, tree, list(dataset._data_attributes.values()), dataset)
    reasons = [new.reason_against(group) for group in ("train", "eval")]
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
    if not runs or any(dataset.plan() is None for dataset, _ in runs):
        return default_collate([list(sample) for sample in samples])
    batches = [dataset.load_batch(places) for dataset, places in runs]
    if len(batches) == 1:
        return batches[0]
    return [torch.cat(elements) for elements in zip(*batches, strict=True)]


class _InMemory(AvalancheDataset):
    """What the dataset classes below add to those of Avalanche."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forget()

    def _forget(self) -> None:
        self._size = len(self)
        self._planned: tuple[Any, _Plan | None] = (None, None)
        self._attribute_columns: dict[str, tuple[DataAttribute, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_planned": (None, None), "_attribute_columns": {}}

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int and 0 <= index < self._size:
            return _Sample(self, index)
        return super().__getitem__(index)

    def __hash__(self) -> int:
        return id(self)

    def load_sample(self, index: int) -> list[Any]:
        """Load one sample as Avalanche does."""
        return super().__getitem__(index)

    def load_batch(self, indices: list[int]) -> list[Tensor]:
        """Load a mini-batch; there must be a plan."""
        plan = self.plan()
        assert plan is not None
        index = torch.tensor(indices)
        return plan.load(index) + [c.index_select(0, index) for c in self._appended()]

    def plan(self) -> _Plan | None:
        """Return how to load mini-batches of the current transforms, None if one by one."""
        # Avalanche makes a new _flat_data where it changes transforms.
        if self._planned[0] is not self._flat_data:
            try:
                plan = _Plan(self._flat_data)
                self._appended()
            except NotBatchableError:
                plan = None
            self._planned = (self._flat_data, plan)
        return self._planned[1]

    def reason_against(self, group: str) -> str | None:
        """Return why mini-batches of the group's transforms cannot be loaded, None if they can."""
        try:
            _Plan(self._flat_data.with_transforms(group))
            self._appended()
        except NotBatchableError as error:
            return str(error)
        return None

    def _appended(self) -> list[Tensor]:
        """Return the attributes that Avalanche appends to the samples, the task label mostly."""
        columns = []
        for name, attribute in self._data_attributes.items():
            if attribute.use_in_getitem:
                known = self._attribute_columns.get(name)
                if known is None or known[0] is not attribute:
                    known = self._attribute_columns[name] = attribute, _values(attribute)
                columns.append(known[1])
        return columns

    def subset(self, indices: Any) -> Any:
        """Return the dataset of these samples."""
        places = [int(i) for i in indices]
        if not places:
            return super().subset(places)
        tree = _taken(self._flat_data, torch.tensor(places))
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


# --- Avalanche's trees of subsets, concatenations and transforms ----------------------------------


class _Rows(Dataset[Any]):
    """Chosen samples of a source: the only kind of leaf in an in-memory dataset's tree."""

    # Before each epoch Avalanche looks in all samples for a dataset of FFCV's, at 3 µs a sample.
    # It gives that up, and rightly, at a leaf with a transform and no target_transform.
    transform = None

    def __init__(self, source: Source, rows: Tensor) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.source.dataset[int(self.rows[index])]


_Part = tuple[Any, Tensor | None, Tensor | None]
"""A dataset, which of its samples (None for all), and their places among those wanted."""


def _parts(node: Any, wanted: Tensor | None) -> list[_Part] | None:
    """Say which samples of which datasets a subset or concatenation has; None for other datasets.

    The places are None if all that is wanted comes from one dataset.
    """
    own: Any = None
    if isinstance(node, FlatData):
        children, own = node._datasets, node._indices
    elif type(node) is Subset:
        children, own = [node.dataset], node.indices
    elif type(node) is ConcatDataset:
        children = node.datasets
    else:
        return None
    if own is not None:
        indices = torch.tensor([int(i) for i in own], dtype=torch.int64)
        wanted = indices if wanted is None else indices[wanted]
    if len(children) == 1:
        return [(children[0], wanted, None)]
    starts = torch.tensor([0, *ConcatDataset.cumsum(children)])
    if wanted is None:
        places = torch.arange(int(starts[-1])).split(starts.diff().tolist())
        return [(child, None, where) for child, where in zip(children, places, strict=True)]
    which = torch.bucketize(wanted, starts[1:], right=True)
    parts: list[_Part] = []
    for i in which.unique().tolist():
        where = (which == i).nonzero().flatten()
        parts.append((children[i], wanted[where] - starts[i], where))
    return parts if len(parts) > 1 else [(*parts[0][:2], None)]


def _taken(node: Any, wanted: Tensor | None, source: Callable[[Any], Source] | None = None) -> Any:
    """Return a tree of the wanted samples whose leaves hold no others, with the same transforms.

    Args:
        node: a tree of Avalanche's.
        wanted: places of the samples, None for all.
        source: gives the source of a plain dataset; None to leave those as they are.
    """
    if isinstance(node, _Rows):
        return node if wanted is None else _Rows(node.source, node.rows[wanted])
    parts = _parts(node, wanted)
    if parts is None:
        if source is not None:
            return _Rows(source(node), torch.arange(len(node)) if wanted is None else wanted)
        return node if wanted is None else Subset(node, wanted.tolist())
    children = [_taken(child, inner, source) for child, inner, _ in parts]
    order = None
    if len(parts) > 1:
        places = torch.cat([where for _, _, where in parts if where is not None])
        if (places.diff() < 0).any():
            order = places.argsort().tolist()
    frozen, current = (copy.copy(groups) for groups in _transform_groups(node))
    return AvalancheDataset(
        children, indices=order, frozen_transform_groups=frozen, transform_groups=current
    )


def _transform_groups(node: Any) -> list[Any]:
    """Return a node's frozen and other transforms, as they are applied; None where it has none."""
    found = [getattr(node, f"{name}transform_groups", None) for name in ("_frozen_", "_")]
    return [None if _is_empty(groups) else groups for groups in found]


def _is_empty(groups: Any) -> bool:
    # Avalanche puts a transform into such a group where it replaces a dataset's transforms.
    return isinstance(groups, EmptyTransformGroups) and not any(groups.transform_groups.values())


def _pair_transforms(node: Any, group: str) -> list[TupleTransform]:
    """Return the node's transforms of whole samples, in the order of their application."""
    try:
        found = [groups[group] for groups in _transform_groups(node) if groups is not None]
    except KeyError:
        raise NotBatchableError(f"there are no transforms for {group!r}") from None
    pairs: list[TupleTransform] = []
    for transform in found:
        parts = transform.transforms if type(transform) is MultiParamCompose else [transform]
        for part in parts:
            if part is not None and type(part) is not TupleTransform:
                raise NotBatchableError(f"{part!r} transforms inputs and targets together")
        pairs += [part for part in parts if part is not None]
    return pairs


class _Route:
    """Samples of one source that go through the same transforms."""

    def __init__(self, source: Source, chains: list[list[Any]]) -> None:
        prepared = [source.prepare(i, chain) for i, chain in enumerate(chains)]
        self._elements: list[tuple[Any, Pipeline]] = prepared

    def draw(self, samples: int) -> list[Tensor]:
        return self._elements[0][1].draw(samples)

    def load(self, rows: Tensor, drawn: list[Tensor]) -> list[Tensor]:
        return [
            pipeline(stored.take(rows), drawn if i == 0 else ())
            for i, (stored, pipeline) in enumerate(self._elements)
        ]


class _Plan:
    """How to load mini-batches of a tree: every sample's route and its row in the source.

    Raises:
        NotBatchableError: if some samples have no route.
    """

    def __init__(self, tree: Any) -> None:
        self._routes: list[_Route] = []
        self._rows = torch.empty(len(tree), dtype=torch.int64)
        self._route_of = torch.zeros(len(tree), dtype=torch.int64)
        known: dict[Any, int] = {}
        group = tree._transform_groups.current_group
        for leaf, rows, where, pairs in _leaves(tree, None, torch.arange(len(tree)), group, []):
            if not isinstance(leaf, _Rows):
                raise NotBatchableError(f"a {type(leaf).__name__} was added later")
            source = leaf.source
            chains = [
                [t for pair in pairs if i < len(pair.transforms) for t in flat(pair.transforms[i])]
                for i in range(source.width)
            ]
            key = (id(source), tuple(tuple(map(id, chain)) for chain in chains))
            if key not in known:
                known[key] = len(self._routes)
                self._routes.append(_Route(source, chains))
            self._rows[where] = leaf.rows if rows is None else leaf.rows[rows]
            self._route_of[where] = known[key]

    def load(self, index: Tensor) -> list[Tensor]:
        rows = self._rows[index]
        if len(self._routes) == 1:
            route = self._routes[0]
            return route.load(rows, route.draw(len(rows)))
        route_of = self._route_of[index]
        drawn: dict[int, list[list[Tensor]]] = {}
        # Random numbers are drawn in the order of the samples.
        routes, lengths = torch.unique_consecutive(route_of, return_counts=True)
        for i, samples in zip(routes.tolist(), lengths.tolist(), strict=True):
            drawn.setdefault(i, []).append(self._routes[i].draw(samples))
        places, batches = [], []
        for i, runs in drawn.items():
            where = (route_of == i).nonzero().flatten()
            together = [torch.cat(values) for values in zip(*runs, strict=True)]
            places.append(where)
            batches.append(self._routes[i].load(rows[where], together))
        order = torch.cat(places).argsort()
        return [torch.cat(parts)[order] for parts in zip(*batches, strict=True)]


def _leaves(
    node: Any, wanted: Tensor | None, places: Tensor, group: str, outer: list[TupleTransform]
) -> Iterator[tuple[Any, Tensor | None, Tensor, list[TupleTransform]]]:
    """Yield the leaves, which of their samples, where these belong, and all their transforms."""
    parts = None if isinstance(node, _Rows) else _parts(node, wanted)
    if parts is None:
        yield node, wanted, places, outer
        return
    inner = _pair_transforms(node, group) + outer
    for child, chosen, where in parts:
        yield from _leaves(child, chosen, places if where is None else places[where], group, inner)
