"""The network taken apart: its features and its head, and heads that are class means.

NCM and FeCAM train the network with a usual head, whose place another one takes in evaluations: the
nearest class mean, or the nearest by each class's own covariance. Feature distillation holds the
features still.
"""

from __future__ import annotations

from typing import Any

from avalanche.models.helper_method import MultiTaskDecorator
from avalanche.models.utils import FeatureExtractorModel
from avalanche.training.utils import get_last_fc_layer
from torch import Tensor, nn

__all__ = ["WithPrototypes", "split"]


def split(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Take the head off a model.

    Returns:
        What makes the features, and the head: the last linear layer, or one head per task.
    """
    if isinstance(model, MultiTaskDecorator):
        return model.model, getattr(model, model.classifier_name)
    name, head = get_last_fc_layer(model)
    if not name:
        return nn.Flatten(), head
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, nn.Identity())
    return model, head


class WithPrototypes(FeatureExtractorModel):
    """A model with one head in training and another in evaluations.

    Args:
        model: the model; its own head is for training.
        prototypes: Avalanche's ``NCMClassifier`` or ``FeCAMClassifier``.
    """

    def __init__(self, model: nn.Module, prototypes: Any) -> None:
        super().__init__(*split(model))
        self.eval_classifier = prototypes

    def forward(self, x: Tensor) -> Tensor:
        """Return scores of shape (batch, labels)."""
        if self.training:
            return super().forward(x)
        return self.eval_classifier(self.feature_extractor(x))
