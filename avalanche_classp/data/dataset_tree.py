"""Avalanche's trees of subsets, concatenations and transforms, loaded whole mini-batches at a time.

The data of an ``AvalancheDataset`` is a tree. Its leaves are plain datasets; each node chooses
samples of its children and transforms them. Asked for one sample, Avalanche walks from the root to
a leaf. :class:`BatchLoader` does that once for all samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.transforms import MultiParamCompose, TupleTransform
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from avalanche_classp.data import avalanche_internals as internals
from avalanche_classp.data.batch_transforms import NotBatchableError, flatten
from avalanche_classp.data.sample_store import SampleSource


class SourceSubset(Dataset[Any]):
    """Chosen rows of a source: the only kind of leaf in an in-memory dataset's tree."""

    # Before each epoch Avalanche looks in all samples for a dataset of FFCV's, at 3 µs a sample.
    # It gives that up, and rightly, at a leaf with a transform and no target_transform.
    transform = None

    def __init__(self, source: SampleSource, rows: Tensor) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.source.dataset[int(self.rows[index])]


def select_samples(
    node: Any, wanted: Tensor | None, source_of: Callable[[Any], SampleSource] | None = None
) -> Any:
    """Return a tree of the wanted samples whose leaves hold no others, with the same transforms.

    None is all samples. ``source_of`` gives the source of a plain dataset; without it plain
    datasets stay as they are.
    """
    if isinstance(node, SourceSubset):
        return node if wanted is None else SourceSubset(node.source, node.rows[wanted])
    parts = _parts(node, wanted)
    if parts is None:
        if source_of is not None:
            rows = torch.arange(len(node)) if wanted is None else wanted
            return SourceSubset(source_of(node), rows)
        return node if wanted is None else Subset(node, wanted.tolist())
    children = [select_samples(child, inner, source_of) for child, inner, _ in parts]
    order = None
    if len(parts) > 1:
        places = torch.cat([where for _, _, where in parts if where is not None])
        if (places.diff() < 0).any():
            order = places.argsort().tolist()
    frozen, current = (copy.copy(groups) for groups in internals.transform_groups(node))
    return AvalancheDataset(
        children, indices=order, frozen_transform_groups=frozen, transform_groups=current
    )


class BatchLoader:
    """Loads mini-batches of a tree: knows every sample's row in its source and its transforms.

    NotBatchableError where some samples must be loaded one by one.
    """

    def __init__(self, tree: Any) -> None:
        self._routes: list[_Route] = []
        known: dict[Any, int] = {}
        found: list[tuple[Tensor, Tensor | None, int]] = []
        for leaf, chosen, places, pairs in _leaves(
            tree, None, None, internals.current_group(tree), []
        ):
            if not isinstance(leaf, SourceSubset):
                raise NotBatchableError(f"a {type(leaf).__name__} was added later")
            chains = [_chain(pairs, element) for element in range(leaf.source.elements)]
            key = (id(leaf.source), tuple(tuple(map(id, chain)) for chain in chains))
            if key not in known:
                known[key] = len(self._routes)
                self._routes.append(_Route(leaf.source, chains))
            found.append((leaf.rows if chosen is None else leaf.rows[chosen], places, known[key]))
        self._rows, self._route_of = found[0][0], None
        if len(found) > 1:
            self._rows, self._route_of = torch.empty(2, len(tree), dtype=torch.int64)
            for rows, places, route in found:
                self._rows[places], self._route_of[places] = rows, route

    def load(self, index: Tensor) -> list[Tensor]:
        """Return the samples with these indices as one tensor for each of their elements."""
        rows = self._rows.index_select(0, index)
        if self._route_of is None or len(self._routes) == 1:
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


class _Route:
    """How samples of one source that go through the same transforms are loaded."""

    def __init__(self, source: SampleSource, chains: list[list[Any]]) -> None:
        self._elements = [source.prepare(i, chain) for i, chain in enumerate(chains)]

    def draw(self, samples: int) -> list[Tensor]:
        return self._elements[0][1].draw(samples)

    def load(self, rows: Tensor, drawn: list[Tensor]) -> list[Tensor]:
        return [
            transform(column.take(rows), drawn if i == 0 else ())
            for i, (column, transform) in enumerate(self._elements)
        ]


_Part = tuple[Any, Tensor | None, Tensor | None]
"""A dataset, which of its samples (None for all), and their places among those wanted."""


def _parts(node: Any, wanted: Tensor | None) -> list[_Part] | None:
    """Say which samples of which datasets a subset or concatenation has; None for other datasets.

    The places are None if all that is wanted comes from one dataset.
    """
    own: Any = None
    if isinstance(node, internals.FlatData):
        children, own = internals.children_and_indices(node)
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


def _leaves(
    node: Any, wanted: Tensor | None, places: Tensor | None, group: str, outer: list[TupleTransform]
) -> Iterator[tuple[Any, Tensor | None, Tensor | None, list[TupleTransform]]]:
    """Yield the leaves, which of their samples, where these belong, and all their transforms."""
    parts = None if isinstance(node, SourceSubset) else _parts(node, wanted)
    if parts is None:
        yield node, wanted, places, outer
        return
    inner = _sample_transforms(node, group) + outer
    for child, chosen, where in parts:
        there = places if where is None else where if places is None else places[where]
        yield from _leaves(child, chosen, there, group, inner)


def _sample_transforms(node: Any, group: str) -> list[TupleTransform]:
    """Return the node's transforms of whole samples, in the order of their application."""
    try:
        found = [groups[group] for groups in internals.transform_groups(node) if groups is not None]
    except KeyError:
        raise NotBatchableError(f"there are no transforms for {group!r}") from None
    transforms: list[TupleTransform] = []
    for transform in found:
        parts = transform.transforms if type(transform) is MultiParamCompose else [transform]
        transforms += [part for part in parts if part is not None]
    for transform in transforms:
        if type(transform) is not TupleTransform:
            raise NotBatchableError(f"{transform!r} transforms inputs and targets together")
    return transforms


def _chain(pairs: list[TupleTransform], element: int) -> list[Any]:
    """Return the transforms of one element of the samples, without ``Compose``."""
    chosen = (pair.transforms[element] for pair in pairs if element < len(pair.transforms))
    return [part for transform in chosen for part in flatten(transform)]
