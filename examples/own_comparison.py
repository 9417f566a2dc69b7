"""Your own images, your own small CNN and a method of your own in a tuned comparison.

    python examples/own_comparison.py

The images lie in `images/train/CLASS/*.png` and `images/test/CLASS/*.png` of the working directory.
Without them the example writes some first, digits of scikit-learn. The command line takes the same
file: `classp compare --load own_comparison.py --benchmark images`. Last lines:

    3 methods were tuned with 3 trials and compared with 2 seeds
    the report is own-results/report.html
"""

from pathlib import Path

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.training import Naive
from sklearn.datasets import load_digits
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Grayscale, Resize, ToTensor
from torchvision.utils import save_image

from avalanche_classp.experiments import benchmark, compare, method, model, tune

FOLDER = Path("images")


@model
def small_cnn(classes):
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * 4 * 4, classes)),
    )


# Reading an image gives the same each time: it is read once and kept in memory.
@benchmark(model=small_cnn, scenario="class", deterministic=True)
def images(seed):
    if not FOLDER.exists():
        write_digits(FOLDER)
    to_tensor = Compose([Grayscale(), Resize((8, 8)), ToTensor()])
    train, test = (ImageFolder(FOLDER / part, to_tensor) for part in ("train", "test"))
    return nc_benchmark(train, test, n_experiences=5, task_labels=False, seed=seed)


@method(
    defaults={"lr": 0.01, "momentum": 0.9},
    space=lambda trial: {"lr": trial.suggest_float("lr", 1e-4, 0.3, log=True)},
)
def momentum(model, hyper, common):
    optimizer = torch.optim.SGD(model.parameters(), **hyper)
    return Naive(model=model, optimizer=optimizer, **common)


def write_digits(folder):
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("train" if number % 4 else "test") / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.tensor(image) / 16, path)


if __name__ == "__main__":
    methods = ["naive", "classp-inputs", momentum]
    tuned = tune(images, methods=methods, trials=3, tuning_seeds=1, epochs_choices=[1, 2])
    print(tuned)
    compared = compare(images, methods=methods, seeds=2, settings=tuned.settings)
    print(compared)
    page = compared.report("own-results")
    print(f"{len(tuned.settings)} methods were tuned with 3 trials and compared with 2 seeds")
    print(f"the report is {page}")
