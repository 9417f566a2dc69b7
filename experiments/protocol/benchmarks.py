"""The benchmarks: streams of experiences in the scenarios task, domain and class.

The scenarios are those of van de Ven and Tolias, "Three scenarios for continual learning", 2019,
https://arxiv.org/abs/1904.07734: *task* has a head for each experience and tells the model which
to use; *domain* shares one head, labels start from zero in each experience; *class* has one head
for all classes.

Nothing here imports torch or Avalanche before a benchmark is made, so that names are checked at
once.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, one_line
from .config import Hyper
from .models import Shape
from .pretrained import is_pretrained

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

SCENARIOS = {
    "task": "a head for each experience, the task label says which",
    "domain": "one head, the same labels in every experience",
    "class": "one head for all classes, no task label",
}

VALIDATION_SHARE = 0.2
"""Share of each class's training data that a validation run evaluates on."""


@dataclass(frozen=True)
class Stream:
    """What a benchmark's ``load`` is asked for.

    Attributes:
        scenario: one of the benchmark's scenarios.
        experiences: number of experiences.
        classes: number of the benchmark's classes.
        seed: for what is random in a benchmark.
        data_root: folder of the datasets, or None for Avalanche's.
    """

    scenario: str
    experiences: int
    classes: int
    seed: int
    data_root: Path | None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark by name.

    Attributes:
        description: one line.
        experiences: default number of experiences.
        experiences_choices: the numbers of experiences that it can have.
        classes: number of classes in all.
        shape: a sample's shape.
        model: name of the default model.
        batch_size: default mini-batch size.
        load: makes Avalanche's benchmark.
        scenarios: the scenarios that it has, the default first.
        epochs: default epochs per experience; several for one after the other.
        epochs_choices: what the search may choose from, for every method.
        shared_labels: every experience has all classes.
        random: its seed counts.
        published: hyper-parameters by method's name, where a paper gives them.
        deterministic: reading a sample gives the same each time, although in_memory cannot tell.
        origin: the user's function that it was declared with; None for a built-in one.
        partner: the benchmark whose searched settings ``--settings transfer`` takes, if there is
            one of the same kind.
        images: the name of torchvision's dataset and its folder, for a pretrained network.
    """

    description: str
    experiences: int
    experiences_choices: Sequence[int]
    classes: int
    shape: Shape
    model: str
    batch_size: int
    load: Callable[[Stream], CLScenario]
    scenarios: tuple[str, ...] = ("class", "domain", "task")
    epochs: int | tuple[int, ...] = 1
    epochs_choices: tuple[int, ...] = (1, 2)
    shared_labels: bool = False
    random: bool = False
    published: Mapping[str, Hyper] = field(default_factory=dict)
    deterministic: bool = False
    origin: Callable[..., Any] | None = None
    partner: str | None = None
    images: tuple[str, str] | None = None

    def count_labels(self, scenario: str, experiences: int) -> int:
        """Return how many labels a head of the model tells apart."""
        if scenario == "class" or self.shared_labels:
            return self.classes
        return self.classes // experiences


def make_benchmark(
    name: str,
    scenario: str,
    data_root: Path | None = None,
    *,
    model: str | None = None,
    experiences: int | None = None,
    seed: int = 0,
    validation: bool = False,
    train_share: float = 1.0,
    first_only: bool = False,
) -> CLScenario:
    """Make a benchmark with a train and a test stream of as many experiences.

    The classes come in the order of their numbers, as in the literature.

    Args:
        name: one of :data:`BENCHMARKS`.
        scenario: one of the benchmark's scenarios.
        data_root: folder that holds or receives the datasets, each in a folder of its own.
            Default: Avalanche's, ``~/.avalanche/data``.
        model: with the name of a pretrained network the samples are its features, computed the
            first time. Default: the samples as they are.
        experiences: number of experiences. Default: the benchmark's.
        seed: draws the permutations of ``permuted-mnist``; the others have nothing random.
        validation: cut the test stream from the training data, see :data:`VALIDATION_SHARE`; the
            test data is not used at all.
        train_share: with ``validation``, the share of each class's other training data to keep.
        first_only: with ``validation``, keep the first experience alone.

    Raises:
        UserError: a scenario or number of experiences that the benchmark does not have, data
            that is not there and cannot be downloaded, or is damaged, or a pretrained network
            that cannot be had.
    """
    spec = BENCHMARKS[name]
    experiences = spec.experiences if experiences is None else experiences
    require_possible(name, scenario, experiences)
    stream = Stream(scenario, experiences, spec.classes, seed, data_root)
    if model is not None and is_pretrained(model):
        benchmark = _of_features(name, model, stream)
    else:
        benchmark = spec.load(stream)
    if not validation:
        return benchmark
    kept = benchmark.train_stream[:1] if first_only else benchmark.train_stream
    return _with_validation_as_test(kept, train_share, same_images=spec.shared_labels)


def require_data(
    name: str, scenario: str, data_root: Path | None = None, model: str | None = None
) -> None:
    """Have a benchmark's data downloaded, once and before several processes need it.

    With a pretrained network's name as ``model`` its features are computed.

    Raises:
        UserError: as :func:`make_benchmark`.
    """
    # Few experiences: Avalanche takes long to make many.
    fewest = min(BENCHMARKS[name].experiences_choices)
    make_benchmark(name, scenario, data_root, model=model, experiences=fewest)


def sample_shape(name: str, model: str, benchmark: CLScenario) -> Shape:
    """Return the shape of a benchmark's samples, which are features for a pretrained network."""
    if is_pretrained(model):
        return tuple(benchmark.train_stream[0].dataset[0][0].shape)
    return BENCHMARKS[name].shape


def require_possible(name: str, scenario: str, experiences: int) -> None:
    """Check that the benchmark has this scenario and can have so many experiences.

    Raises:
        UserError: it has not.
    """
    spec = BENCHMARKS[name]
    if scenario not in spec.scenarios:
        raise UserError(
            f"{name} has no scenario {scenario!r}; choose from {', '.join(spec.scenarios)}"
        )
    if experiences not in spec.experiences_choices:
        choices = spec.experiences_choices
        text = f"{choices[0]} to {choices[-1]}" if isinstance(choices, range) else _listed(choices)
        raise UserError(f"{name} cannot have {experiences} experiences; choose from {text}")


def require_images(name: str, model: str) -> tuple[str, str]:
    """Return what a benchmark has for pretrained networks, see :class:`Benchmark`.

    Raises:
        UserError: it has no colour images.
    """
    images = BENCHMARKS[name].images
    if images is None:
        known = _listed(other for other, spec in BENCHMARKS.items() if spec.images)
        raise UserError(f"model {model!r} takes colour images, as {known} have, and not {name}")
    return images


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _with_validation_as_test(
    stream: Iterable[Any], train_share: float, same_images: bool
) -> CLScenario:
    """Make a benchmark whose test experiences are a class-balanced part of these training ones.

    With ``same_images`` all experiences hold out the same places: an image that is held out in
    one is not trained on, differently permuted, in another.
    """
    import numpy as np

    rng = np.random.default_rng(0)  # the same part for every method and seed
    train, test = [], []
    for experience in stream:
        if same_images:
            rng = np.random.default_rng(0)
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
    return benchmark_of(train, test)


def benchmark_of(train: Sequence[Any], test: Sequence[Any]) -> CLScenario:
    """Make a benchmark of Avalanche's datasets, one for each experience, with task labels."""
    from avalanche.benchmarks import (
        benchmark_from_datasets,
        with_classes_timeline,
        with_task_labels,
    )

    made = with_task_labels(with_classes_timeline(benchmark_from_datasets(train=train, test=test)))
    for stream in (made.train_stream, made.test_stream):
        for experience in stream:
            # Avalanche 0.6.0 makes it a set here, and MultiHeadClassifier takes lists only.
            experience.classes_in_this_experience = sorted(experience.classes_in_this_experience)
    return made


def _options(stream: Stream) -> dict[str, Any]:
    """Return what Avalanche's makers of split benchmarks have in common."""
    return {
        "n_experiences": stream.experiences,
        "fixed_class_order": list(range(stream.classes)),
        "class_ids_from_zero_in_each_exp": stream.scenario != "class",
    }


def _split_digits(stream: Stream) -> CLScenario:
    import torch
    from avalanche.benchmarks import nc_benchmark
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch.utils.data import TensorDataset

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 8 - 1, dtype=torch.float32)  # grey values 0 to 16
    targets = torch.tensor(labels)
    parts = train_test_split(range(len(targets)), test_size=0.3, random_state=0, stratify=targets)
    train, test = (TensorDataset(images[part], targets[part]) for part in parts)
    return nc_benchmark(train, test, task_labels=stream.scenario == "task", **_options(stream))


def _split(maker: str, dataset: str, folder: str) -> Callable[[Stream], CLScenario]:
    """Return a loader that splits a dataset by Avalanche's maker of benchmarks with this name."""

    def load(stream: Stream) -> CLScenario:
        from avalanche.benchmarks import classic

        make = getattr(classic, maker)
        root = _dataset_folder(stream.data_root, folder)
        options = _options(stream) | {"return_task_id": stream.scenario == "task"}
        return _loaded(dataset, root, lambda: make(dataset_root=root, **options))

    return load


def _of_features(name: str, model: str, stream: Stream) -> CLScenario:
    """Make a split benchmark whose samples are a pretrained network's features of its images."""
    from avalanche.benchmarks import nc_benchmark
    from torch import as_tensor
    from torch.utils.data import TensorDataset
    from torchvision import datasets

    from .features import cached_features
    from .pretrained import load_backbone

    dataset, folder = require_images(name, model)
    root = _dataset_folder(stream.data_root, folder)
    make = getattr(datasets, dataset)
    parts = _loaded(
        dataset, root, lambda: [make(root, train=train, download=True) for train in (True, False)]
    )
    backbone = load_backbone(model)
    place = root.parent / "features"
    tensors = []
    for part, kind in zip(parts, ("train", "test"), strict=True):
        of = place / f"{folder}-{kind}-{model.replace('/', '-').replace(':', '-')}"
        features, targets = cached_features(backbone, part.data, of), as_tensor(part.targets)
        tensors.append(TensorDataset(features, targets))
    return nc_benchmark(*tensors, task_labels=stream.scenario == "task", **_options(stream))


def _permuted_mnist(stream: Stream) -> CLScenario:
    from avalanche.benchmarks.classic import PermutedMNIST

    root = _dataset_folder(stream.data_root, "mnist")
    return _loaded(
        "MNIST",
        root,
        lambda: PermutedMNIST(stream.experiences, seed=stream.seed, dataset_root=root),
    )


def _mnist_fmnist(stream: Stream) -> CLScenario:
    whole = Stream("class", 1, stream.classes, stream.seed, stream.data_root)
    parts = [BENCHMARKS[name].load(whole) for name in ("split-mnist", "split-fmnist")]
    return benchmark_of(
        [part.train_stream[0].dataset for part in parts],
        [part.test_stream[0].dataset for part in parts],
    )


def _dataset_folder(data_root: Path | None, name: str) -> Path:
    from avalanche.benchmarks.datasets import default_dataset_location

    return Path(default_dataset_location(name)) if data_root is None else data_root / name


_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    AssertionError,
    EOFError,
    TypeError,
    LookupError,
    pickle.UnpicklingError,
)
"""What torchvision raises for files that are not there or not whole."""


def _loaded(dataset: str, folder: Path, load: Callable[[], Any]) -> Any:
    try:
        # torchvision prints of every mirror that it tries.
        with redirect_stdout(io.StringIO()):
            return load()
    except _UNREADABLE as error:
        if not (isinstance(error, OSError) or "download" in str(error)):
            raise UserError(
                f"{dataset} in {folder} is damaged ({one_line(error)}); delete that folder to "
                f"have it downloaded again"
            ) from error
        raise UserError(
            f"{dataset} is not whole in {folder} and could not be downloaded ({one_line(error)}); "
            f"connect to the network, or put torchvision's files there and name the folder above "
            f"it with --data-root"
        ) from error


def _ten_classes(shape: Shape, model: str, batch_size: int, **other: Any) -> Benchmark:
    """Return a benchmark of ten classes, two of them in each experience."""
    return Benchmark(
        experiences=5,
        experiences_choices=(1, 2, 5, 10),
        classes=10,
        shape=shape,
        model=model,
        batch_size=batch_size,
        **other,
    )


BENCHMARKS = {
    "split-digits": _ten_classes(
        description="scikit-learn's 1797 bundled 8×8 digits in 5 × 2 classes, nothing downloaded",
        shape=(64,),
        model="mlp-256",
        epochs=10,
        epochs_choices=(1, 3, 10),
        batch_size=32,
        load=_split_digits,
    ),
    "split-mnist": _ten_classes(
        description="MNIST in 5 × 2 classes",
        shape=(1, 28, 28),
        model="mlp-400",
        batch_size=128,
        load=_split("SplitMNIST", "MNIST", "mnist"),
        partner="split-fmnist",
    ),
    "permuted-mnist": Benchmark(
        description="MNIST 10 times (--experiences N), the pixels permuted anew each time",
        experiences=10,
        experiences_choices=range(1, 1001),
        classes=10,
        shape=(1, 28, 28),
        model="mlp-256",
        batch_size=128,
        load=_permuted_mnist,
        scenarios=("domain",),
        shared_labels=True,
        random=True,
    ),
    "split-fmnist": _ten_classes(
        description="Fashion-MNIST in 5 × 2 classes",
        shape=(1, 28, 28),
        model="mlp-400",
        batch_size=128,
        load=_split("SplitFMNIST", "Fashion-MNIST", "fashionmnist"),
        partner="split-mnist",
    ),
    "split-cifar10": _ten_classes(
        description="CIFAR-10 in 5 × 2 classes",
        shape=(3, 32, 32),
        model="cnn",
        batch_size=64,
        load=_split("SplitCIFAR10", "CIFAR-10", "cifar10"),
        images=("CIFAR10", "cifar10"),
    ),
    "split-cifar100": Benchmark(
        description="CIFAR-100 in 10 × 10 classes",
        experiences=10,
        experiences_choices=(1, 2, 4, 5, 10, 20, 25, 50, 100),
        classes=100,
        shape=(3, 32, 32),
        model="cnn",
        batch_size=64,
        load=_split("SplitCIFAR100", "CIFAR-100", "cifar100"),
        images=("CIFAR100", "cifar100"),
    ),
    "mnist-fmnist": Benchmark(
        description="MNIST, then Fashion-MNIST, one head: the paper's vision experiment",
        experiences=2,
        experiences_choices=(2,),
        classes=10,
        shape=(1, 28, 28),
        model="paper-cnn",
        epochs=(4, 1),
        batch_size=32,
        load=_mnist_fmnist,
        scenarios=("domain",),
        shared_labels=True,
        published={
            "classp": {
                "lr": 0.2,
                "threshold": 0.5,
                "epsilon": 1e-5,
                "power": 1.0,
                "paper_phases": True,
            }
        },
    ),
}
"""All benchmarks by name."""
