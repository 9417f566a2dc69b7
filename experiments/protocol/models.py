"""The models: the field's usual ones for the benchmarks, by name; torch waits until one is made."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..errors import UserError, nearest
from .pretrained import PRETRAINED, is_pretrained, load_tail

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int, ...]
"""A sample's shape: (numbers,) or (channels, height, width)."""


@dataclass(frozen=True)
class Model:
    """A model by name.

    Attributes:
        description: one line.
        make: makes the model from a sample's shape and the number of labels.
        classifier: name of its last layer, which becomes one head per task in the scenario task;
            empty for the last that is a Linear layer or ends in one.
        channels: what a sample must have as its first dimension, if it must be an image.
        origin: the user's function that it was declared with; None for a built-in one.
    """

    description: str
    make: Callable[[Shape, int], nn.Module]
    classifier: str
    channels: tuple[int, ...] | None = None
    origin: Callable[..., Any] | None = None


def make_model(name: str, shape: Shape, labels: int, multi_head: bool) -> nn.Module:
    """Make a model, initialised from torch's current seed.

    Args:
        name: one of :data:`MODELS`, or a pretrained network's.
        shape: a sample's shape; with a pretrained network, of its features.
        labels: outputs, of each head if ``multi_head``.
        multi_head: give every task label a head of its own (Avalanche's MultiHeadClassifier).

    Raises:
        UserError: the model is unknown, or does not take samples of that shape.
    """
    require_model(name)
    model = _on_pretrained(name) if is_pretrained(name) else MODELS[name]
    if model.channels is not None and (len(shape) != 3 or shape[0] not in model.channels):
        channels = " or ".join(map(str, model.channels))
        raise UserError(
            f"model {name!r} takes images of {channels} channels, and the benchmark's samples have "
            f"the shape {shape}; choose another --model"
        )
    from avalanche.models import MultiTaskModule, as_multitask

    made: Any = model.make(shape, labels)
    if multi_head and not isinstance(made, MultiTaskModule):
        made = as_multitask(made, model.classifier or _last_layer(name, made))
    made.sizes = (math.prod(shape), labels, multi_head)
    return made


def _last_layer(name: str, made: nn.Module) -> str:
    from torch import nn

    for attribute, layer in reversed(list(made.named_children())):
        last = layer[-1] if isinstance(layer, nn.Sequential) and len(layer) else layer
        if isinstance(last, nn.Linear):
            return attribute
    raise UserError(
        f"model {name!r} has no attribute that is a Linear layer or a Sequential that ends in one, "
        f"to make a head for each task of; return a MultiTaskModule"
    )


def require_model(name: str) -> None:
    """Check a model's name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in MODELS and not is_pretrained(name):
        known = [*MODELS, *PRETRAINED]
        raise UserError(f"unknown model {name!r}; {nearest(name, known)}")


def sizes_of(model: nn.Module) -> tuple[int, int, bool]:
    """Return what :func:`make_model` made it for, for methods that make layers of their own.

    Returns:
        The numbers in a sample, the labels of a head, and whether each task label has one.
    """
    sizes: Any = getattr(model, "sizes", (1, 1, False))  # one on which settings are only checked
    return sizes


def _with_classifier(features: list[nn.Module], size: int, labels: int) -> nn.Module:
    """Return layers that end in a vector of this size, and a linear classifier."""
    from torch import nn

    layers = {"features": nn.Sequential(*features), "classifier": nn.Linear(size, labels)}
    return nn.Sequential(OrderedDict(layers))


def _paper_cnn(shape: Shape, labels: int) -> nn.Module:
    """Make the network of the paper's vision experiment, https://arxiv.org/abs/2405.09637.

    Two 3×3 convolutions of 32 and 64 channels with ReLU, maximum over 2×2, dropout 0.25, a hidden
    layer of 128 units, dropout 0.5.
    """
    from torch import nn

    channels, height, width = shape
    features = [
        *(nn.Conv2d(channels, 32, 3), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten()),
        *(nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128), nn.ReLU()),
        nn.Dropout(0.5),
    ]
    return _with_classifier(features, 128, labels)


def _strided_cnn(shape: Shape, labels: int) -> nn.Module:
    """Make a network that a CPU trains in about a quarter of a millisecond per 32×32 image.

    Three 3×3 convolutions with stride 2 and 32, 64 and 128 channels, and a hidden layer of 256
    units; ReLU throughout, no normalisation and no dropout, so that what forgets is the weights.
    """
    from torch import nn

    channels, height, width = shape
    sizes = (channels, 32, 64, 128)
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        height, width = (height + 1) // 2, (width + 1) // 2
    layers += [nn.Flatten(), nn.Linear(sizes[-1] * height * width, 256), nn.ReLU()]
    return _with_classifier(layers, 256, labels)


def _on_pretrained(name: str) -> Model:
    """Return a linear classifier of features, behind what of the pretrained network learns."""

    def make(shape: Shape, labels: int) -> nn.Module:
        import torch
        from torch import nn

        tail = load_tail(name) or nn.Flatten()
        size = tail(torch.zeros(1, *shape)).shape[1]
        return _with_classifier([tail], size, labels)

    return Model("", make, "classifier")


def _mlp(hidden_size: int) -> Model:
    def make(shape: Shape, labels: int) -> nn.Module:
        from avalanche.models import SimpleMLP

        return SimpleMLP(
            num_classes=labels,
            input_size=math.prod(shape),
            hidden_size=hidden_size,
            hidden_layers=2,
            drop_rate=0.0,
        )

    return Model(f"MLP with two hidden layers of {hidden_size}, ReLU", make, "classifier")


def _simple_cnn(shape: Shape, labels: int) -> nn.Module:
    from avalanche.models import SimpleCNN

    return SimpleCNN(num_classes=labels)


def _resnet18(shape: Shape, labels: int) -> nn.Module:
    from torch import nn
    from torchvision.models import resnet18

    model = resnet18(num_classes=labels)
    # The usual stem for small images: no stride, no pooling.
    model.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


MODELS = {
    "mlp-256": _mlp(256),
    "mlp-400": _mlp(400),
    "mlp-1000": _mlp(1000),
    "cnn": Model(
        "three convolutions with stride 2 and a hidden layer: 0.6 M parameters, quick on a CPU",
        _strided_cnn,
        "classifier",
        (1, 3),
    ),
    "simple-cnn": Model(
        "Avalanche's SimpleCNN: five convolutions, dropout",
        _simple_cnn,
        "classifier",
        (3,),
    ),
    "resnet18": Model(
        "torchvision's ResNet-18 with a stem for small images: 11 M parameters, for a GPU",
        _resnet18,
        "fc",
        (1, 3),
    ),
    "paper-cnn": Model(
        "the CNN of the paper's vision experiment: two convolutions, dropout",
        _paper_cnn,
        "classifier",
        (1, 3),
    ),
}
"""All models by name."""
