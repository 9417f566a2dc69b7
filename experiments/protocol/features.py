"""Features of images under a network that never changes: computed once, kept on disk.

They lie below the data root in ``features/DATASET-MODEL-KEY``; the key is a SHA-256 of the
network's weights, its resizing and the images, so other weights never meet old features. A file
holds :data:`CHUNK` images in float16 (means of ReLU6 lie in [0, 6]; rounding is below 0.002 there),
with its own SHA-256 before it. Files are written whole or not at all: whoever is killed goes on
from the last one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError

__all__ = ["CHUNK", "Backbone", "cached_features"]

CHUNK = 500
"""Images in a file."""

BATCH = 50
"""Images that pass the network together: the activations of so few stay in a CPU's cache."""


class Backbone(nn.Module):
    """Enlarges and normalises images, and gives a network's features.

    Args:
        network: takes normalised images of shape (batch, 3, side, side), gives (batch, features).
        side: what images are enlarged to, bilinearly, in pixels.
        mean: of each channel, of values in [0, 1].
        std: the standard deviation likewise.
    """

    size: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, side: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.network, self.side = network, side
        self.register_buffer("size", torch.tensor(side))
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return features for uint8 images of shape (batch, height, width, 3)."""
        pixels = images.permute(0, 3, 1, 2).float() / 255  # in channels_last, as they lay
        size = (self.side, self.side)
        pixels = nn.functional.interpolate(pixels, size, mode="bilinear", align_corners=False)
        features: Tensor = self.network((pixels - self.mean) / self.std)
        return features


def cached_features(backbone: nn.Module, images: np.ndarray[Any, Any], folder: Path) -> Tensor:
    """Return the features of all images, computed where they are not on disk.

    Args:
        backbone: a :class:`Backbone` in evaluation mode.
        images: uint8, of shape (images, height, width, 3).
        folder: the features go to a folder of its name and the key.

    Returns:
        float32, of shape (images, ...).

    Raises:
        UserError: the folder cannot be written.
    """
    from tqdm import tqdm

    folder = folder.with_name(f"{folder.name}-{_key(backbone, images)}")
    parts = []
    name = f"features {folder.name}"
    with torch.inference_mode(), tqdm(total=len(images), unit="image", desc=name, delay=2) as bar:
        for start in range(0, len(images), CHUNK):
            path = folder / f"{start:06}"
            part = _read(path)
            if part is None:
                part = _compute(backbone, images[start : start + CHUNK], bar.update)
                _write(path, part)
            else:
                bar.update(len(part))
            parts.append(part)
    return torch.from_numpy(np.concatenate(parts)).float()


def _compute(
    backbone: nn.Module, images: np.ndarray[Any, Any], progress: Callable[[int], object]
) -> np.ndarray[Any, Any]:
    computed = []
    for batch in torch.from_numpy(images).split(BATCH):
        computed.append(backbone(batch).half())
        progress(len(batch))
    return torch.cat(computed).numpy()


def _key(backbone: nn.Module, images: np.ndarray[Any, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().cpu().numpy().tobytes())
    digest.update(images.tobytes())
    return digest.hexdigest()[:12]


def _write(path: Path, features: np.ndarray[Any, Any]) -> None:
    stream = BytesIO()
    np.save(stream, features)
    content = stream.getvalue()
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _read(path: Path) -> np.ndarray[Any, Any] | None:
    """Return a file's features, or None where there is none or it is damaged."""
    if not path.is_file():
        return None
    whole = path.read_bytes()
    if hashlib.sha256(whole[32:]).digest() != whole[:32]:
        return None
    features: np.ndarray[Any, Any] = np.load(BytesIO(whole[32:]))
    return features
