"""The losses that a network can be trained with, by name; torch waits until one is made."""

from __future__ import annotations

from typing import Any

USUAL_LOSS = "cross-entropy"

LOSSES = {
    USUAL_LOSS: "softmax cross-entropy over all outputs",
    "masked-cross-entropy": "the same over the experience's own classes alone, class-incremental",
    "squared-error": "mean squared difference from the one-hot label, over all outputs",
}
"""All losses by name, with one line each."""


def make_loss(name: str, keep_old_classes: bool = False) -> Any:
    """Make a loss of outputs of shape (batch, labels) and labels of shape (batch,).

    Args:
        name: one of :data:`LOSSES`.
        keep_old_classes: the masked loss sees earlier experiences' classes, too: for methods that
            have samples of them.
    """
    from torch import nn

    if name == "masked-cross-entropy":
        from .avalanche_fixes import FixedMaskedCrossEntropy

        return FixedMaskedCrossEntropy(mask="seen" if keep_old_classes else "new")
    if name == "squared-error":
        return _squared_error
    return nn.CrossEntropyLoss()


def _squared_error(output: Any, y: Any) -> Any:
    from torch.nn import functional

    return functional.mse_loss(output, functional.one_hot(y, output.shape[1]).to(output))
