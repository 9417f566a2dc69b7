"""A stream that was not used while the history of inputs was designed.

Fashion-MNIST in four experiences of 15,000 images each, turned by 0, 90, 180 and 270 degrees; every
image comes once, and all ten classes are in each experience.
"""

import numpy as np
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche_classp.experiments import benchmark
from torch.utils.data import TensorDataset
from torchvision.datasets import FashionMNIST


def turned(train):
    """Return a quarter of the images for each turn."""
    from avalanche.benchmarks.datasets import default_dataset_location

    data = FashionMNIST(str(default_dataset_location("fashionmnist")), train=train)
    images = ((data.data / 255 - 0.286) / 0.353)[:, None]
    places = np.random.default_rng(0).permutation(len(images))
    experiences = []
    for turns, part in enumerate(np.array_split(places, 4)):
        x, y = torch.rot90(images[part], turns, (2, 3)), data.targets[part]
        dataset = TensorDataset(x, y)
        dataset.targets = y.tolist()
        experiences.append(as_classification_dataset(dataset))
    return experiences


@benchmark(
    name="quarter-turns",
    scenario="domain",
    model="mlp-256",
    batch_size=128,
    epochs=1,
    epochs_choices=(1, 2),
    deterministic=True,
)
def quarter_turns(seed):
    """Return the stream, the same for every seed."""
    return benchmark_from_datasets(train=turned(True), test=turned(False))
