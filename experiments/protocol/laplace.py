"""Kronecker-factored online Laplace approximation: a quadratic penalty with correlated weights.

H. Ritter, A. Botev, D. Barber, "Online structured Laplace approximations for overcoming
catastrophic forgetting", 2018, https://arxiv.org/abs/1805.07810. It stores no samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from .projections import add_to_gradient, kernel_of, layers, rows_of

__all__ = ["KroneckerLaplacePlugin"]


class KroneckerLaplacePlugin(SupervisedPlugin):
    """Pulls each layer's weights W back to where the last experience ended, W*.

    The penalty is ``strength / 2 · Σ tr((W - W*)ᵀ G (W - W*) A)``, a sum over the experiences so
    far. A and G are the factors of the Fisher information of an experience, at its end: the means
    of x xᵀ over the layer's inputs, with a 1 for the bias, and of g gᵀ over the loss's gradients
    at its outputs, with labels drawn from the model's own answers. Of a convolution, A sums over
    positions and G is their mean (Grosse and Martens, 2016, https://arxiv.org/abs/1602.01407).

    Heads that belong to one task alone are left out: no other task trains them.

    Args:
        strength: λ, beside the mean loss and the mean Fisher information.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
        """By layer's name: A and G of each experience."""
        self.ends: dict[str, Tensor] = {}

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        for name, layer in layers(strategy.model):
            if name in self.ends and layer.weight.grad is not None:
                way = kernel_of(layer) - self.ends[name]
                pull = sum(G @ way @ A for A, G in self.factors[name])
                add_to_gradient(layer, self.strength * torch.as_tensor(pull))

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        seen = 0
        training = strategy.model.training
        strategy.model.eval()
        with _recorded(strategy.model) as recorded:
            for mini_batch in strategy.dataloader:
                strategy.mbatch = mini_batch
                strategy._unpack_minibatch()
                output = strategy.forward()
                y = torch.distributions.Categorical(logits=output.detach()).sample()
                loss = nn.functional.cross_entropy(output, y, reduction="sum")
                trained = [p for p in strategy.model.parameters() if p.requires_grad]
                torch.autograd.grad(loss, trained, allow_unused=True)
                for name, (x, g) in recorded.items():
                    A, G = sums.get(name, (0, 0))
                    sums[name] = (A + x.T @ x, G + len(y) / len(g) * g.T @ g)
                seen += len(y)
        strategy.model.train(training)
        for name, layer in layers(strategy.model):
            A, G = sums[name]
            self.factors.setdefault(name, []).append((A / seen, G / seen))
            self.ends[name] = kernel_of(layer)


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yield each layer's inputs, and the gradients at its outputs, in the last pass as rows."""
    recorded: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Any:
        def hook(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = rows_of(layer, args[0].detach())

            def keep(gradient: Tensor) -> None:
                channels = gradient.movedim(1, -1) if gradient.dim() == 4 else gradient
                recorded[name] = (x, channels.flatten(0, -2))

            output.register_hook(keep)

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers(model)]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
