"""How much memory a method needs beside the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from avalanche.core import BasePlugin
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.regularization import RegularizationMethod
from avalanche.training.utils import ParamData
from torch import Tensor, nn

_OPENED = (BasePlugin, RegularizationMethod, ParamData)
"""Avalanche's objects that hold a method's tensors. What else a plugin refers to (datasets, data
loaders, optimizers, the strategy itself) is not the method's."""


def method_state_bytes(strategy: Any) -> int:
    """Count the bytes that a method keeps between experiences, beside the model itself.

    That is, each storage once:

    - every tensor in the optimizer's state: accumulators, moments, step counts;
    - every tensor that a plugin holds: importances, saved parameters, former models, and the
      working arrays that Avalanche's methods leave in place for the next experience;
    - the samples in a replay buffer, as the model gets them: their number × (bytes of the
      transformed input + 8 for the label). Avalanche's buffer refers to the training data, which
      would have to be copied where the data itself is not kept.

    The model's parameters, their gradients, its buffers, and the metrics are not counted. SI has
    two arrays more on a GPU than on a CPU: weights and gradients that it copies to the CPU.
    """
    parameters = list(strategy.model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*parameters, *gradients, *strategy.model.buffers())
    }
    held = [strategy.optimizer.state, strategy.plugins]
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in _tensors(held, set()))
    }
    tensors = sum(size for address, size in storages.items() if address not in own)
    buffers = [p.storage_policy.buffer for p in strategy.plugins if isinstance(p, ReplayPlugin)]
    return tensors + sum(_samples_bytes(buffer) for buffer in buffers)


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, Mapping):
        # The keys of an optimizer's state are the parameters themselves.
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item, seen)
    elif isinstance(value, _OPENED):
        yield from _tensors(vars(value), seen)


def _samples_bytes(dataset: Any) -> int:
    # In evaluation nothing is drawn at random, which would change the training that follows.
    samples = dataset.eval()
    if not len(samples):
        return 0
    sample, label, *_ = samples[0]
    return len(samples) * (sample.nbytes + torch.as_tensor(label).nbytes)
