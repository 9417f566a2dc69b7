"""Methods that project gradients off the inputs of earlier experiences: OWM and GPM.

Both leave a layer's answer to earlier inputs as it was. They store no samples. The state of
each layer is a matrix of inputs × inputs (OWM), or of inputs × directions (GPM).

A bias counts as the weight of a constant input. Heads that belong to one task alone are not
projected: no other task trains them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.models import MultiTaskModule
from torch import Tensor, nn

__all__ = ["GPMPlugin", "OWMPlugin", "add_to_gradient", "kernel_of", "layers", "rows_of"]

Layer = nn.Linear | nn.Conv2d


class _ProjectionPlugin(SupervisedPlugin):
    """Projects the gradient of every linear and convolutional layer before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.projections: dict[str, Tensor] = {}
        """By layer's name: what is kept of its inputs."""

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        for name, layer in layers(strategy.model):
            if name in self.projections and layer.weight.grad is not None:
                _set_gradient(layer, self._projected(_gradient(layer), self.projections[name]))

    def _projected(self, gradient: Tensor, kept: Tensor) -> Tensor:
        raise NotImplementedError


class OWMPlugin(_ProjectionPlugin):
    """Orthogonal weights modification, by recursive least squares over mini-batch means.

    When an experience has ended, the mean input x of each mini-batch of its data renews every
    layer's P, the identity at first: P ← P - P x xᵀ P / (alpha + xᵀ P x). A gradient G (outputs ×
    inputs) becomes G P.

    Args:
        alpha: > 0; the smaller, the more completely an input is protected.

    Source: G. Zeng et al., "Continual learning of context-dependent processing in neural networks",
    2019, https://arxiv.org/abs/1810.01256.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        with _recorded(strategy.model) as inputs:
            for _ in _forwarded(strategy):
                for name, rows in inputs.items():
                    self._renew(name, rows.mean(0))

    def _renew(self, name: str, x: Tensor) -> None:
        P = self.projections.setdefault(name, torch.eye(len(x), device=x.device))
        Px = P @ x
        P -= torch.outer(Px, Px) / (self.alpha + x @ Px)

    def _projected(self, gradient: Tensor, kept: Tensor) -> Tensor:
        return gradient @ kept


class GPMPlugin(_ProjectionPlugin):
    """Gradient projection memory: gradients keep out of the span of earlier inputs.

    When an experience has ended, as many of the largest new directions of a sample of its inputs
    are added to each layer's basis M as hold the share ``threshold`` of their squares. A gradient G
    (outputs × inputs) becomes G - G M Mᵀ.

    Args:
        threshold: in (0, 1).
        samples: number of training samples that the directions are taken from, as in the paper.

    Source: G. Saha, I. Garg, K. Roy, "Gradient projection memory for continual learning", 2021,
    https://arxiv.org/abs/2103.09762.
    """

    ROWS = 4096
    """Most rows that are decomposed: a convolution has one for each position of its output."""

    def __init__(self, threshold: float, samples: int = 300) -> None:
        super().__init__()
        self.threshold, self.samples = threshold, samples

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        found: dict[str, list[Tensor]] = {}
        with _recorded(strategy.model) as inputs:
            for seen in _forwarded(strategy):
                for name, rows in inputs.items():
                    found.setdefault(name, []).append(rows)
                if seen >= self.samples:
                    break
        for name, parts in found.items():
            rows = torch.cat(parts)
            self._add(name, rows[:: max(1, len(rows) // self.ROWS)])

    def _add(self, name: str, rows: Tensor) -> None:
        basis = self.projections.get(name, rows.new_zeros(rows.shape[1], 0))
        total = rows.square().sum()
        rest = rows - rows @ basis @ basis.T
        _, values, directions = torch.linalg.svd(rest, full_matrices=False)
        held = total - rest.square().sum() + values.square().cumsum(0)
        new = int((held < self.threshold * total).sum()) + 1
        if total - rest.square().sum() >= self.threshold * total:
            new = 0
        self.projections[name] = torch.cat([basis, directions[:new].T], 1)

    def _projected(self, gradient: Tensor, kept: Tensor) -> Tensor:
        return gradient - gradient @ kept @ kept.T


def layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Yield linear and convolutional layers with their names, but heads of one task alone."""
    by_task = tuple(
        f"{name}." for name, module in model.named_modules() if name and _is_multi_head(module)
    )
    for name, module in model.named_modules():
        if isinstance(module, Layer) and not name.startswith(by_task or ("\0",)):
            yield name, module


def _is_multi_head(module: nn.Module) -> bool:
    return isinstance(module, MultiTaskModule) and hasattr(module, "classifiers")


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield each layer's inputs in the last forward pass as rows, with a 1 for the bias."""
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(layer: Layer, args: tuple[Tensor, ...]) -> None:
            inputs[name] = rows_of(layer, args[0])

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers(model)]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def rows_of(layer: Layer, x: Tensor) -> Tensor:
    """Return a layer's inputs as rows, patches of a convolution, with a 1 for the bias."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1 or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            raise ValueError(f"projections take plain convolutions, got {layer}")
        patches = nn.functional.unfold(
            x, layer.kernel_size, layer.dilation, layer.padding, layer.stride
        )
        x = patches.transpose(1, 2).flatten(0, 1)
    rows = x.flatten(0, -2)
    return rows if layer.bias is None else nn.functional.pad(rows, (0, 1), value=1.0)


@torch.no_grad()
def _forwarded(strategy: Any) -> Iterator[int]:
    """Send the experience's mini-batches through the model; yield the number of samples so far."""
    training = strategy.model.training
    strategy.model.eval()
    seen = 0
    for mini_batch in strategy.dataloader:
        strategy.mbatch = mini_batch
        strategy._unpack_minibatch()
        strategy.forward()
        seen += len(strategy.mb_x)
        yield seen
    strategy.model.train(training)


def kernel_of(layer: Layer) -> Tensor:
    """Return a copy of weight and bias side by side, of shape (outputs, inputs)."""
    parts = [layer.weight.detach().flatten(1)]
    if layer.bias is not None:
        parts.append(layer.bias.detach()[:, None])
    return torch.cat(parts, 1)


def add_to_gradient(layer: Layer, more: Tensor) -> None:
    """Add a tensor of :func:`kernel_of`'s shape to a layer's gradients."""
    _set_gradient(layer, _gradient(layer) + more)


def _gradient(layer: Layer) -> Tensor:
    return torch.cat([g.flatten(1) for g in _gradients(layer)], 1)


def _set_gradient(layer: Layer, gradient: Tensor) -> None:
    for own in _gradients(layer):
        columns = own.shape[1:].numel()
        own.copy_(gradient[:, :columns].reshape(own.shape))
        gradient = gradient[:, columns:]


def _gradients(layer: Layer) -> list[Tensor]:
    """Return views of the weight's and the bias's gradient, the latter as a column."""
    gradients = [p.grad for p in (layer.weight, layer.bias) if p is not None and p.grad is not None]
    return [g[:, None] if g.dim() == 1 else g for g in gradients]
