"""Every private attribute of Avalanche 0.6 and of torch that the in-memory data path uses."""

from __future__ import annotations

from typing import Any

from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.classification_dataset import (
    _TensorClassificationDataset as TensorClassificationDataset,
)
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from avalanche.benchmarks.utils.flat_data import FlatData
from avalanche.benchmarks.utils.transform_groups import EmptyTransformGroups
from torch.utils.data._utils.collate import default_collate_fn_map

__all__ = ["FlatData", "TensorClassificationDataset", "default_collate_fn_map"]


def set_dataset(experience: Any, dataset: AvalancheDataset) -> None:
    """Give an experience another dataset; its ``dataset`` is a property without a setter."""
    experience._dataset = dataset


def data_tree(dataset: AvalancheDataset) -> Any:
    """Return the tree of subsets, concatenations and transforms that holds the samples."""
    return dataset._flat_data


def data_attributes(dataset: AvalancheDataset) -> list[DataAttribute]:
    """Return targets, task labels and further values of the samples."""
    return list(dataset._data_attributes.values())


def current_group(tree: Any) -> str:
    """Return which transforms a tree applies: ``"train"``, ``"eval"`` or another group."""
    return tree._transform_groups.current_group


def children_and_indices(node: FlatData) -> tuple[list[Any], Any]:
    """Return the datasets that a node concatenates, and which samples it takes; None for all."""
    return node._datasets, node._indices


def transform_groups(node: Any) -> list[Any]:
    """Return a node's frozen and other transforms, as they are applied; None where it has none."""
    found = [getattr(node, f"{name}transform_groups", None) for name in ("_frozen_", "_")]
    return [None if _is_empty(groups) else groups for groups in found]


def _is_empty(groups: Any) -> bool:
    # Avalanche puts a transform into such a group where it replaces a dataset's transforms.
    return isinstance(groups, EmptyTransformGroups) and not any(groups.transform_groups.values())
