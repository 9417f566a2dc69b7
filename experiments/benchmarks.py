"""The benchmarks: streams of experiences in the scenarios task, domain and class.

The scenarios are those of van de Ven and Tolias, "Three scenarios for continual learning", 2019,
https://arxiv.org/abs/1904.07734: *task* has a head for each experience and tells the model which
to use; *domain* shares one head, labels start from zero in each experience; *class* has one head
for all classes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import (
    CLScenario,
    benchmark_from_datasets,
    nc_benchmark,
    with_classes_timeline,
    with_task_labels,
)
from avalanche.benchmarks.classic import SplitMNIST
from avalanche.benchmarks.datasets import default_dataset_location
from torch import nn
from torch.utils.data import TensorDataset

from experiments.errors import UserError, one_line
from experiments.models import make_mlp

SCENARIOS = {
    "task": "a head for each experience, the task label says which",
    "domain": "one head, the same labels in every experience",
    "class": "one head for all classes, no task label",
}

VALIDATION_SHARE = 0.2
"""Share of each class's training data that a validation run evaluates on."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark by name.

    Attributes:
        description: one line.
        experiences: number of experiences.
        classes: number of classes in all.
        input_size: numbers per sample.
        hidden_size: units of each of the model's two hidden layers.
        epochs: default epochs per experience.
        epochs_choices: what the search may choose from, for every method.
        batch_size: default mini-batch size.
        load: makes the class-incremental or label-sharing benchmark, see ``make_benchmark``.
    """

    description: str
    experiences: int
    classes: int
    input_size: int
    hidden_size: int
    epochs: int
    epochs_choices: tuple[int, ...]
    batch_size: int
    load: Callable[..., CLScenario]


def make_benchmark(
    name: str,
    scenario: str,
    data_root: Path | None = None,
    validation: bool = False,
    train_share: float = 1.0,
) -> CLScenario:
    """Make a benchmark with a train and a test stream of as many experiences.

    The classes come in the order of their numbers, as in the literature.

    Args:
        name: one of :data:`BENCHMARKS`.
        scenario: one of :data:`SCENARIOS`.
        data_root: folder that holds or receives the datasets, each in a folder of its own.
            Default: Avalanche's, ``~/.avalanche/data``.
        validation: cut the test stream from the training data, see :data:`VALIDATION_SHARE`; the
            test data is not used at all.
        train_share: with ``validation``, the share of each class's other training data to keep.

    Raises:
        UserError: the data is not there and cannot be downloaded, or is damaged.
    """
    spec = BENCHMARKS[name]
    options = {
        "n_experiences": spec.experiences,
        "fixed_class_order": list(range(spec.classes)),
        "class_ids_from_zero_in_each_exp": scenario != "class",
    }
    multi_head = scenario == "task"
    benchmark = spec.load(data_root, multi_head, options)
    return _with_validation_as_test(benchmark, train_share) if validation else benchmark


def make_model(name: str, scenario: str) -> nn.Module:
    """Make the benchmark's model for the scenario, initialised from torch's current seed."""
    spec = BENCHMARKS[name]
    return make_mlp(
        spec.input_size, count_labels(name, scenario), spec.hidden_size, 2, scenario == "task"
    )


def count_labels(name: str, scenario: str) -> int:
    """Return how many labels a head of the model tells apart."""
    spec = BENCHMARKS[name]
    return spec.classes if scenario == "class" else spec.classes // spec.experiences


def _with_validation_as_test(benchmark: CLScenario, train_share: float) -> CLScenario:
    """Put a class-balanced part of each training experience in the test experience's place."""
    rng = np.random.default_rng(0)  # the same part for every method and seed
    train, test = [], []
    for experience in benchmark.train_stream:
        targets = np.asarray(list(experience.dataset.targets))
        kept: list[int] = []
        held_out: list[int] = []
        for label in np.unique(targets):
            places = rng.permutation(np.flatnonzero(targets == label)).tolist()
            cut = int(VALIDATION_SHARE * len(places))
            held_out += places[:cut]
            kept += places[cut : cut + math.ceil(train_share * (len(places) - cut))]
        train.append(experience.dataset.subset(sorted(kept)))
        test.append(experience.dataset.subset(sorted(held_out)))
    split = with_task_labels(with_classes_timeline(benchmark_from_datasets(train=train, test=test)))
    for stream in (split.train_stream, split.test_stream):
        for experience in stream:
            # Avalanche 0.6.0 makes it a set here, and MultiHeadClassifier takes lists only.
            experience.classes_in_this_experience = sorted(experience.classes_in_this_experience)
    return split


def _load_split_digits(
    data_root: Path | None, multi_head: bool, options: dict[str, Any]
) -> CLScenario:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 8 - 1, dtype=torch.float32)  # grey values 0 to 16
    targets = torch.tensor(labels)
    parts = train_test_split(range(len(targets)), test_size=0.3, random_state=0, stratify=targets)
    train, test = (TensorDataset(images[part], targets[part]) for part in parts)
    return nc_benchmark(train, test, task_labels=multi_head, **options)


def _load_split_mnist(
    data_root: Path | None, multi_head: bool, options: dict[str, Any]
) -> CLScenario:
    folder = _dataset_folder(data_root, "mnist")
    return _loaded(
        "MNIST",
        folder,
        lambda: SplitMNIST(return_task_id=multi_head, dataset_root=folder, **options),
    )


def _dataset_folder(data_root: Path | None, name: str) -> Path:
    return Path(default_dataset_location(name)) if data_root is None else data_root / name


def _loaded(dataset: str, folder: Path, load: Callable[[], CLScenario]) -> CLScenario:
    try:
        # torchvision prints of every mirror that it tries.
        with redirect_stdout(io.StringIO()):
            return load()
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, TypeError) as error:
        if not (isinstance(error, OSError) or "download" in str(error)):
            raise UserError(
                f"{dataset} in {folder} is damaged ({one_line(error)}); delete that folder to "
                f"have it downloaded again"
            ) from error
        raise UserError(
            f"{dataset} is not in {folder} and could not be downloaded ({one_line(error)}); "
            f"connect to the network, or put torchvision's files there and name the folder above "
            f"it with --data-root"
        ) from error


BENCHMARKS = {
    "split-digits": Benchmark(
        description="scikit-learn's 1797 bundled 8×8 digits in 5 × 2 classes, nothing downloaded",
        experiences=5,
        classes=10,
        input_size=64,
        hidden_size=256,
        epochs=10,
        epochs_choices=(1, 3, 10),
        batch_size=32,
        load=_load_split_digits,
    ),
    "split-mnist": Benchmark(
        description="MNIST in 5 × 2 classes",
        experiences=5,
        classes=10,
        input_size=28 * 28,
        hidden_size=400,
        epochs=1,
        epochs_choices=(1, 2),
        batch_size=128,
        load=_load_split_mnist,
    ),
}
"""All benchmarks by name."""
