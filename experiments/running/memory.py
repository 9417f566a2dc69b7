"""How much memory a method needs beside the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from avalanche.core import BasePlugin
from avalanche.models.packnet import PackNetModule
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.regularization import RegularizationMethod
from avalanche.training.utils import ParamData
from torch import Tensor, nn

_OPENED = (BasePlugin, RegularizationMethod, ParamData)
"""Avalanche's objects that hold a method's tensors. What else a plugin refers to (datasets, data
loaders, optimizers, the strategy itself) is not the method's."""

_KEPT_IN_MODEL = ("class_means_dict", "class_cov_dict", "saved_weights")
"""Attributes of modules that are a method's."""


def method_state_bytes(strategy: Any) -> int:
    """Count the bytes that a method keeps between experiences, beside the model itself.

    That is, each storage once:

    - every tensor in the optimizer's state: accumulators, moments, step counts;
    - every tensor that a plugin holds: importances, saved parameters, former models, and the
      working arrays that Avalanche's methods leave in place for the next experience;
    - the samples in a replay buffer, as the model gets them: their number × (bytes of the
      transformed input + 8 for the label). Avalanche's buffer refers to the training data, which
      would have to be copied where the data itself is not kept.

    - what Avalanche's methods keep in the model: PackNet's masks, CWR*'s saved weights, the means
      and covariances of NCM and FeCAM (not what is computed from them, such as an inverse);
    - the same of generative replay's generator.

    The model's parameters, their gradients, its buffers, and the metrics are not counted. SI has
    two arrays more on a GPU than on a CPU: weights and gradients that it copies to the CPU.
    """
    parameters = list(strategy.model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    modules = list(strategy.model.modules())
    masks = [b for m in modules if isinstance(m, PackNetModule) for b in m.buffers(recurse=False)]
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*parameters, *gradients, *strategy.model.buffers())
    } - {mask.untyped_storage().data_ptr() for mask in masks}
    held = [strategy.optimizer.state, strategy.plugins, masks]
    for module in modules:
        held += [vars(module).get(name) for name in _KEPT_IN_MODEL]
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in _tensors(held, set()))
    }
    tensors = sum(size for address, size in storages.items() if address not in own)
    buffers = [p.storage_policy.buffer for p in strategy.plugins if isinstance(p, ReplayPlugin)]
    generator = getattr(strategy, "generator_strategy", None)
    made_by = 0 if generator is None else method_state_bytes(generator)
    return tensors + made_by + sum(_samples_bytes(buffer) for buffer in buffers)


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, np.ndarray):
        yield torch.from_numpy(value)
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
