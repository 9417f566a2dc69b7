"""The models: the field's usual one for each benchmark."""

from __future__ import annotations

from avalanche.models import SimpleMLP, as_multitask
from torch import nn


def make_mlp(
    input_size: int, classes: int, hidden_size: int, hidden_layers: int, multi_head: bool
) -> nn.Module:
    """Make a multi-layer perceptron with ReLU and without dropout.

    Args:
        input_size: numbers per sample.
        classes: outputs, of each head if ``multi_head``.
        hidden_size: units per hidden layer.
        hidden_layers: number of hidden layers.
        multi_head: give every task label a head of its own (Avalanche's MultiHeadClassifier).
    """
    mlp = SimpleMLP(
        num_classes=classes,
        input_size=input_size,
        hidden_size=hidden_size,
        hidden_layers=hidden_layers,
        drop_rate=0.0,
    )
    return as_multitask(mlp, "classifier") if multi_head else mlp
