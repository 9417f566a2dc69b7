"""Seeing the inputs of a model's layers, for ``history="inputs"``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

__all__ = ["WatchReport", "Watcher", "find_layers", "rows_of"]


INPUTS = ("input", "query", "key", "value")
"""The names of inputs that are given by keyword, in the order of the layers' arguments."""


@dataclass(frozen=True)
class WatchReport:
    """What :meth:`CLASSPOptimizer.watch` found, by the parameters' names; ``print`` shows it.

    Attributes:
        covered: parameters that have a history of their layer's inputs.
        others: parameters that keep a history of weights, each with the reason.
    """

    covered: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"history of inputs: {len(self.covered)} parameters, {len(self.others)} others"]
        lines += [f"  inputs   {name}" for name in self.covered]
        lines += [f"  weights  {name}: {reason}" for name, reason in self.others.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Layer:
    """A module whose inputs are seen, and the parameters that they are multiplied with."""

    module: nn.Module
    weight: Tensor
    bias: Tensor | None


Observe = Callable[[Layer, tuple[Any, ...], int], None]


class Watcher:
    """A forward hook on one layer.

    Args:
        layer: the layer.
        observe: called with the layer, the arguments of a call, and the number of the call.
    """

    def __init__(self, layer: Layer, observe: Observe) -> None:
        self.layer, self.observe, self.calls, self.unrepeated = layer, observe, 0, 0
        self.handle = layer.module.register_forward_pre_hook(self, with_kwargs=True)

    def remove(self) -> None:
        """Look no longer."""
        self.handle.remove()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Look at the arguments of a call."""
        # A copy of the model has this hook, too.
        if module is not self.layer.module or not (module.training and torch.is_grad_enabled()):
            return
        # Activation checkpointing repeats a call in the backward pass.
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and self.unrepeated:
            self.unrepeated -= 1
            return
        device_type = self.layer.weight.device.type
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            self.calls += 1
            self.unrepeated += not in_backward
            given = (*args, *(keywords[name] for name in INPUTS if name in keywords))
            self.observe(self.layer, given, self.calls)

    # What torch.compiler.disable sets, whose import takes seconds.
    __call__._torchdynamo_disable = True  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Watcher:
        """Return itself: a copy of the model is not watched."""
        return self

    def __reduce__(self) -> Any:
        """Leave a hook that does nothing in a pickled model."""
        return (_Blind, ())


class _Blind:
    def __call__(self, *args: Any) -> None:
        """Do nothing."""


def find_layers(model: nn.Module) -> Iterator[Layer]:
    """Return the layers whose inputs can be seen.

    ``nn.Linear``, ``nn.Conv1d`` to ``3d`` and the joint projection of ``nn.MultiheadAttention``;
    a parametrized weight counts as the parameter that it is made of, if that has its shape.
    """
    for module in model.modules():
        if isinstance(module, NonDynamicallyQuantizableLinear):
            continue  # Attention's output projection, which attention does not call.
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            weight = _parameter(module, "weight")
            bias = _parameter(module, "bias")
        elif isinstance(module, nn.MultiheadAttention):
            weight, bias = module.in_proj_weight, module.in_proj_bias
        else:
            continue
        lazy = isinstance(weight, nn.parameter.UninitializedParameter)
        if weight is not None and not lazy and weight.numel():
            yield Layer(module, weight, bias)


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    if nn.utils.parametrize.is_parametrized(module, name):
        parts = module.parametrizations[name]  # type: ignore[index]
        original = getattr(parts, "original", None)
        same = original is not None and original.shape == getattr(module, name).shape
        return original if same else None
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Parameter) else None


def rows_of(
    module: nn.Module, args: tuple[Any, ...], most: int = 512, seed: int = 0
) -> list[Tensor]:
    """Return what a layer's weight is multiplied with in a call, as rows of shape (rows, inputs).

    One tensor for each input: attention has queries, keys and values.

    Args:
        module: the layer.
        args: the arguments of the call.
        most: rows that are enough; there may be up to twice as many.
        seed: says which are taken where there are more.
    """
    if isinstance(module, nn.MultiheadAttention):
        distinct = {id(x): x for x in args[:3]}
        return [_few(x.detach().flatten(0, -2), most, seed) for x in distinct.values()]
    x = args[0].detach()
    if isinstance(module, nn.Linear):
        return [_few(x.reshape(-1, x.shape[-1]), most, seed)]
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return [_patches(module, x, most, seed)]


def _few(rows: Tensor, most: int, seed: int) -> Tensor:
    apart = max(1, len(rows) // most)
    return rows[seed % apart :: apart]


def _patches(module: Any, x: Tensor, most: int, seed: int) -> Tensor:
    """Return patches at random positions; of a grouped convolution each group's are rows."""
    size = len(module.kernel_size)
    if x.dim() == size + 1:
        x = x[None]
    # A few samples have patches enough.
    x = _few(x, max(1, most // 8), seed)
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    else:
        pad = [p for padding in reversed(module.padding) for p in (padding, padding)]
        x = nn.functional.pad(x, pad)
    for i, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        x = x.unfold(2 + i, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    batch, channels = x.shape[:2]
    positions = x.shape[2 : 2 + size]
    x = x.movedim(1, 1 + size)
    count = batch * positions.numel()
    if count > most:
        # A generator of its own: the user's random numbers stay as they are.
        generator = torch.Generator("cpu").manual_seed(seed)
        chosen = torch.randint(count, (most,), generator=generator, device="cpu").to(x.device)
        x = x[tuple(torch.unravel_index(chosen, (batch, *positions)))]
    rows = x.reshape(-1, channels, *module.kernel_size)
    return rows.reshape(len(rows) * module.groups, -1)
