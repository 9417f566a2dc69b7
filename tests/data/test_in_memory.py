"""The in-memory data path: bit for bit Avalanche's own, which is the oracle everywhere."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import re
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mypy.api
import numpy as np
import pytest
import torch
from avalanche.benchmarks import (
    CLScenario,
    CLStream,
    EagerCLStream,
    benchmark_from_datasets,
    benchmark_with_validation_stream,
    nc_benchmark,
    ni_benchmark,
    split_online_stream,
    task_incremental_benchmark,
    tensors_benchmark,
    with_classes_timeline,
    with_task_labels,
)
from avalanche.benchmarks.classic import PermutedMNIST, SplitCIFAR10, SplitFMNIST, SplitMNIST
from avalanche.benchmarks.classic.cmnist import PixelsPermutation
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from avalanche.benchmarks.utils import AvalancheDataset, as_classification_dataset
from avalanche.benchmarks.utils.classification_dataset import lookup
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from avalanche.benchmarks.utils.data_loader import (
    GroupBalancedDataLoader,
    ReplayDataLoader,
    TaskBalancedDataLoader,
)
from avalanche.benchmarks.utils.dataset_traversal_utils import single_flat_dataset
from avalanche.benchmarks.utils.ffcv_support.ffcv_components import has_ffcv_support
from avalanche.benchmarks.utils.transform_groups import TransformGroups
from avalanche.benchmarks.utils.transforms import MultiParamTransformCallable
from avalanche.evaluation.metrics import (
    accuracy_metrics,
    confusion_matrix_metrics,
    loss_metrics,
)
from avalanche.training import (
    AGEM,
    EWC,
    MAS,
    JointTraining,
    LwF,
    Naive,
    Replay,
    SynapticIntelligence,
)
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer
from conftest import build, same, seed_everything, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_data import write_cifar, write_mnist
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torch.utils.data._utils.collate import default_collate_fn_map
from torchvision import transforms
from torchvision.datasets import CIFAR10, FashionMNIST

import avalanche_classp.data.in_memory
from avalanche_classp import CLASSP, in_memory
from avalanche_classp.data.batch_transforms import (
    NUMBER,
    TENSOR,
    BatchTransform,
    ElementSpec,
    NotBatchableError,
)
from avalanche_classp.data.sample_store import SampleSource

UNTOUCHED = dict(default_collate_fn_map)

TO_TENSOR, NORMALIZE = transforms.ToTensor(), transforms.Normalize((0.1,), (0.2,))

# --- data -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a folder with small files as those of MNIST, Fashion-MNIST and CIFAR-10."""
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder, per_class=8)
    write_mnist(folder, "fashionmnist", "FashionMNIST", per_class=8)
    with pytest.MonkeyPatch.context() as patch:
        write_cifar(folder, 10, per_class=10, monkeypatch=patch)
        yield folder


def split_mnist(root, **options):
    return SplitMNIST(5, seed=1, dataset_root=root / "mnist", **options)


def tasks_of_mnist(root):
    return split_mnist(root, return_task_id=True, class_ids_from_zero_in_each_exp=True)


def augmented_mnist(root):
    augmented = transforms.Compose(
        [
            transforms.Compose([transforms.RandomCrop((24, 26), padding=(1, 3)), None]),
            transforms.Normalize((0.1,), (0.3,)),
            transforms.RandomVerticalFlip(0.3),
        ]
    )
    augmented.transforms[0].transforms.pop()
    return split_mnist(root, train_transform=augmented, eval_transform=None)


def permuted_mnist(root):
    return PermutedMNIST(3, seed=1, dataset_root=root / "mnist")


def fashion(root):
    return SplitFMNIST(5, seed=1, dataset_root=root / "fashionmnist")


def augmented_fashion(root):
    augmented = [
        transforms.RandomHorizontalFlip(),
        transforms.RandomCrop([28, 20], padding=[2, 0, 1, 5], fill=7),
        transforms.ToTensor(),
    ]
    return SplitFMNIST(
        5,
        seed=1,
        dataset_root=root / "fashionmnist",
        class_ids_from_zero_from_first_exp=True,
        train_transform=transforms.Compose(augmented),
        eval_transform=transforms.ToTensor(),
    )


def cifar(root):
    return SplitCIFAR10(5, seed=1, dataset_root=root / "cifar10")


def resized_cifar(root):
    """Return a benchmark whose images go through what only PIL can do."""
    prepared = [transforms.Resize(20), transforms.CenterCrop((18, 24)), transforms.Grayscale(3)]
    return SplitCIFAR10(
        5,
        seed=1,
        dataset_root=root / "cifar10",
        train_transform=transforms.Compose(
            [*prepared, transforms.RandomCrop(18, padding=2), transforms.ToTensor()]
        ),
        eval_transform=transforms.Compose(
            [*prepared, transforms.Pad(1), transforms.PILToTensor(), transforms.CenterCrop(16)]
        ),
    )


def some_tensors(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(size) % 6
    return torch.randn(size, 6, generator=generator), targets[torch.randperm(size)]


def plain_tensors(root):
    train, test = TensorDataset(*some_tensors(50)), TensorDataset(*some_tensors(20, 1))
    return nc_benchmark(train, test, 3, task_labels=True, class_ids_from_zero_in_each_exp=True)


def parts_of_tensors(root):
    """Return a benchmark on a subset of a concatenation."""
    parts = [TensorDataset(*some_tensors(30, seed)) for seed in range(3)]
    whole = Subset(ConcatDataset(parts), list(range(85, 3, -2)))
    whole.targets = [int(whole[i][1]) for i in range(len(whole))]
    return ni_benchmark(whole, whole, n_experiences=2, seed=1)


def avalanches_tensors(root):
    return tensors_benchmark(
        [some_tensors(31), some_tensors(20, 1)], [some_tensors(9, 2)], task_labels=[0, 1]
    )


def without_task_labels(root):
    """Return a benchmark as Avalanche's newer makers have it, with a dataset of three elements."""
    x, y = some_tensors(40)
    dataset = TensorDataset(x.double(), y, x[:, :2].t().contiguous().t())
    dataset.targets = y
    dataset = as_classification_dataset(dataset)
    return with_classes_timeline(benchmark_from_datasets(train=[dataset], test=[dataset.eval()]))


def several_tasks(root):
    """Return a benchmark whose experiences hold three tasks of different sizes each."""
    benchmark = tasks_of_mnist(root)
    datasets = [experience.dataset for experience in benchmark.train_stream]
    train = [
        datasets[0].concat(datasets[1].subset(range(7))).concat(datasets[2].subset([4, 2])),
        datasets[3],
    ]
    test = [experience.dataset for experience in benchmark.test_stream]
    return with_task_labels(benchmark_from_datasets(train=train, test=test))


def nested(root):
    """Return a benchmark with a concatenation in a concatenation, in no order."""
    tensors = [some_tensors(size, size) for size in (18, 19, 20)]
    benchmark = tensors_benchmark(tensors, tensors, task_labels=[0, 1, 2])
    parts = [experience.dataset for experience in benchmark.train_stream]
    inner = parts[0].concat(parts[1]).subset([9, 20, 3, 18, 36, 5])
    inner = type(inner)([inner], transform_groups=TransformGroups({"train": doubled, "eval": None}))
    whole = parts[2].concat(inner).subset([16, 3, 22, 20, 25, 2, 23, 23])
    return with_task_labels(benchmark_from_datasets(train=[whole.concat(parts[0])]))


def transformed_by_itself(root):
    folder = root / "fashionmnist"
    train, test = (FashionMNIST(folder, train, transforms.ToTensor()) for train in (True, False))
    chain = transforms.Compose([transforms.RandomCrop(27), transforms.Normalize(0.2, 0.3)])
    return nc_benchmark(train, test, 5, False, seed=1, train_transform=chain)


def doubled(x):
    return 2 * x


MADE = {
    function.__name__: function
    for function in (
        split_mnist,
        tasks_of_mnist,
        augmented_mnist,
        permuted_mnist,
        fashion,
        augmented_fashion,
        cifar,
        resized_cifar,
        plain_tensors,
        parts_of_tensors,
        avalanches_tensors,
        without_task_labels,
        several_tasks,
        transformed_by_itself,
    )
}


@pytest.fixture(scope="module", params=MADE)
def stock(request, root):
    return MADE[request.param](root)


# --- comparing ------------------------------------------------------------------------------------


@contextmanager
def never_one_by_one(monkeypatch):
    """Fail where a sample is loaded alone, or a warning says that it will be."""

    def refuse(self, index):
        raise AssertionError(f"sample {index} was loaded alone")

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("error", message="in_memory")
        patch.setattr(avalanche_classp.data.in_memory.InMemoryDataset, "load_sample", refuse)
        yield


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def assert_same_batches(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert type(one) is type(other) is list
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype
            assert a.stride() == b.stride()
            assert torch.equal(a, b)


def loaded(make_loader, dataset, seed=3, epochs=2):
    """Return the mini-batches of some epochs, and the random generators' states afterwards."""
    seed_everything(seed)
    loader = make_loader(dataset)
    batches = [batch for _ in range(epochs) for batch in loader]
    return batches, random_states()


def assert_same_loading(make_loader, stock, fast):
    """Compare the mini-batches of two datasets, and what is left of the random numbers."""
    batches, state = loaded(make_loader, stock)
    fast_batches, fast_state = loaded(make_loader, fast)
    assert batches
    assert_same_batches(batches, fast_batches)
    assert state == fast_state


def pairs_of_datasets(stock, fast):
    for name in stock.streams:
        for one, other in zip(stock.streams[name], fast.streams[name], strict=True):
            yield one.dataset, other.dataset


def task_balanced(dataset, **options):
    if not hasattr(dataset, "targets_task_labels"):
        return DataLoader(dataset, **options)
    return TaskBalancedDataLoader(dataset, **({"oversample_small_groups": True} | options))


LOADERS = {
    "training": partial(task_balanced, batch_size=9, shuffle=True),
    "drop_last": partial(task_balanced, batch_size=7, shuffle=True, drop_last=True),
    "in order": partial(DataLoader, batch_size=5),
    "torch's": partial(DataLoader, batch_size=1000, shuffle=True),
    "two datasets": lambda d: GroupBalancedDataLoader(
        [d.subset([2, 0, 1]), d], batch_size=8, shuffle=True
    ),
}


# --- the same mini-batches ------------------------------------------------------------------------


@pytest.mark.parametrize("make_loader", LOADERS.values(), ids=LOADERS)
def test_mini_batches_are_avalanches_bit_for_bit(stock, make_loader, monkeypatch):
    with never_one_by_one(monkeypatch):
        fast = in_memory(stock)
    for one, other in pairs_of_datasets(stock, fast):
        for view in (AvalancheDataset.train, AvalancheDataset.eval):
            with never_one_by_one(monkeypatch):
                fast_batches, fast_state = loaded(make_loader, view(other))
            batches, state = loaded(make_loader, view(one))
            assert_same_batches(batches, fast_batches)
            assert state == fast_state


@pytest.mark.parametrize("make", [cifar, several_tasks])
def test_stock_datasets_and_their_benchmark_are_not_changed(make, root):
    stock, untouched = make(root), make(root)
    before = [repr(dataset) for dataset, _ in pairs_of_datasets(stock, stock)]
    in_memory(stock)
    assert [repr(dataset) for dataset, _ in pairs_of_datasets(stock, stock)] == before
    for one, other in pairs_of_datasets(stock, untouched):
        assert type(one) is type(other)
        assert_same_loading(LOADERS["in order"], one, other)


@pytest.mark.parametrize("make", [split_mnist, cifar, augmented_fashion])
def test_torchs_default_dtype_is_heeded(make, root):
    stock = make(root)
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast = in_memory(stock)
        for one, other in pairs_of_datasets(stock, fast):
            assert_same_loading(LOADERS["training"], one, other)
    finally:
        torch.set_default_dtype(torch.float32)


def test_concatenations_in_concatenations(root):
    stock = nested(root)
    with pytest.warns(UserWarning, match="doubled"):
        in_memory(stock)
    fast = in_memory(stock, deterministic=True)
    for one, other in pairs_of_datasets(stock, fast):
        for view in (AvalancheDataset.train, AvalancheDataset.eval):
            assert_same_loading(LOADERS["in order"], view(one), view(other))


@pytest.mark.slow
def test_workers_load_the_same(root):
    make_loader = partial(task_balanced, batch_size=20, shuffle=True, num_workers=2)
    stock = cifar(root)
    one, other = next(iter(pairs_of_datasets(stock, in_memory(stock))))
    batches, state = loaded(make_loader, one, epochs=1)
    fast_batches, fast_state = loaded(make_loader, other, epochs=1)
    assert_same_batches(batches, [list(batch) for batch in fast_batches])
    assert state == fast_state


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 2**40),
    epochs=st.integers(1, 3),
    shuffle=st.booleans(),
    tasks=st.integers(1, 3),
)
def test_any_size_batch_size_and_seed(size, batch_size, seed, epochs, shuffle, tasks):
    stock = tensors_benchmark(
        [some_tensors(size + i, i) for i in range(tasks)],
        [some_tensors(size)],
        task_labels=list(range(tasks)),
    )
    fast = in_memory(stock)
    one, other = (
        sum((e.dataset for e in b.train_stream[1:]), start=b.train_stream[0].dataset)
        for b in (stock, fast)
    )
    make_loader = partial(task_balanced, batch_size=max(tasks, batch_size), shuffle=shuffle)
    batches, state = loaded(make_loader, one, seed % 2**32, epochs)
    fast_batches, fast_state = loaded(make_loader, other, seed % 2**32, epochs)
    assert_same_batches(batches, fast_batches)
    assert state == fast_state


IMAGES = {
    "grey": np.random.default_rng(0).integers(0, 256, (12, 9, 11), dtype=np.uint8),
    "colour": np.random.default_rng(1).integers(0, 256, (12, 9, 11, 3), dtype=np.uint8),
}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(IMAGES)),
    as_tensors=st.booleans(),
    size=st.tuples(st.integers(1, 9), st.integers(1, 11)),
    padding=st.none()
    | st.integers(0, 4)
    | st.lists(st.integers(0, 4), min_size=2, max_size=2)
    | st.tuples(*[st.integers(0, 4)] * 4),
    fill=st.integers(0, 255),
    p=st.floats(0, 1),
    order=st.permutations(range(4)),
    seed=st.integers(0, 1000),
)
def test_augmentations_are_torchvisions(kind, as_tensors, size, padding, fill, p, order, seed):
    made = [
        transforms.RandomCrop(size, padding=padding, fill=fill),
        transforms.RandomHorizontalFlip(p),
        transforms.RandomVerticalFlip(p),
        transforms.RandomCrop(size),
    ]
    chain = [made[i] for i in order]
    dataset = CIFAR10.__new__(CIFAR10)  # or anything else that is known to hold images
    dataset.data, dataset.targets = IMAGES[kind], list(range(12))
    # A crop to the whole image, after which a smaller one is impossible, is not what is tested.
    chain = chain if order.index(0) < order.index(3) or padding is None else chain[::-1]
    to_tensor = transforms.ToTensor()
    dataset.transform = transforms.Compose(
        [to_tensor, *chain] if as_tensors else [*chain, to_tensor]
    )
    dataset.target_transform = None

    torch.manual_seed(seed)
    expected = torch.stack([dataset[i][0] for i in range(12)])
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    stored, pipeline = SampleSource(dataset, deterministic=False).prepare(0, [])
    batch = pipeline(stored.take(torch.arange(12)), pipeline.draw(12))
    assert torch.equal(batch, expected)
    assert torch.equal(state, torch.get_rng_state())
    assert (dataset.data == IMAGES[kind]).all()


# --- the same training ----------------------------------------------------------------------------


def small_model(shape=784, labels=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(shape, 8), nn.ReLU(), nn.Linear(8, labels))


TRAINED = {
    "naive": Naive,
    "EWC": partial(EWC, ewc_lambda=10.0),
    "EWC online": partial(EWC, ewc_lambda=10.0, mode="online", decay_factor=0.5),
    "replay": partial(Replay, mem_size=30),
    "class-balanced replay": partial(
        Naive, plugins=[ReplayPlugin(30, 5, storage_policy=ClassBalancedBuffer(30))]
    ),
    "LwF": partial(LwF, alpha=1.0, temperature=2.0),
    "MAS": MAS,
    "SI": partial(SynapticIntelligence, si_lambda=1.0),
    "AGEM": partial(AGEM, patterns_per_exp=10, sample_size=12),
    "joint": JointTraining,
    "CLASSP": partial(CLASSP, lr=0.05, threshold=1e-6, optimizer=None),
}


def trained(make_strategy, benchmark, shape):
    """Return the final weights, all metrics and the random generators' states."""
    seed_everything(5)
    model = small_model(shape)
    evaluator = EvaluationPlugin(
        accuracy_metrics(minibatch=True, epoch=True, experience=True, stream=True),
        loss_metrics(minibatch=True, experience=True),
        confusion_matrix_metrics(num_classes=10, stream=True, save_image=False),
        loggers=[],
    )
    options = {"train_epochs": 2, "eval_mb_size": 11, "evaluator": evaluator}
    strategy = build(copy.deepcopy(make_strategy), model, **options)
    parts = list(benchmark.train_stream)
    for part in [parts] if isinstance(strategy, JointTraining) else parts:
        strategy.train(part, eval_streams=[benchmark.test_stream])
        strategy.eval(benchmark.test_stream)
    return weights(strategy.model), evaluator.get_all_metrics(), random_states()


def assert_same_training(make_strategy, stock, shape, monkeypatch):
    final, metrics, state = trained(make_strategy, stock, shape)
    with never_one_by_one(monkeypatch):
        fast_final, fast_metrics, fast_state = trained(make_strategy, in_memory(stock), shape)
    assert not same(final, weights(small_model(shape)))
    assert same(final, fast_final)
    assert state == fast_state
    assert metrics.keys() == fast_metrics.keys()
    for name in metrics:
        steps, values = metrics[name]
        fast_steps, fast_values = fast_metrics[name]
        assert steps == fast_steps
        assert [torch.as_tensor(v).tolist() for v in values] == [
            torch.as_tensor(v).tolist() for v in fast_values
        ]


@pytest.mark.parametrize("name", TRAINED)
def test_training_ends_with_the_same_weights_and_metrics(name, root, monkeypatch):
    assert_same_training(TRAINED[name], split_mnist(root), 784, monkeypatch)


@pytest.mark.parametrize("name", ["naive", "replay", "joint", "EWC"])
@pytest.mark.parametrize("make", [cifar, permuted_mnist, several_tasks])
def test_training_ends_the_same_with_other_data(name, make, root, monkeypatch):
    stock = make(root)
    shape = stock.train_stream[0].dataset[0][0].numel()
    assert_same_training(TRAINED[name], stock, shape, monkeypatch)


def test_a_head_per_task_grows_as_before(root):
    from avalanche.models import MTSimpleMLP

    final = []
    for benchmark in (stock := tasks_of_mnist(root), in_memory(stock)):
        seed_everything(2)
        model = MTSimpleMLP(input_size=784, hidden_size=8)
        strategy = build(Naive, model)
        for experience in benchmark.train_stream:
            strategy.train(experience)
        strategy.eval(benchmark.test_stream)
        final.append(weights(strategy.model))
    assert len(final[0]) > len(weights(MTSimpleMLP(input_size=784, hidden_size=8)))
    assert same(*final)


# --- the same benchmark ---------------------------------------------------------------------------

TOLD = ("classes_in_this_experience", "previous_classes", "classes_seen_so_far", "future_classes")


def test_experiences_tell_the_same(stock):
    fast = in_memory(stock)
    assert type(fast) is type(stock)
    assert list(fast.streams) == list(stock.streams)
    for name in stock.streams:
        one, other = getattr(stock, f"{name}_stream"), getattr(fast, f"{name}_stream")
        assert (other.name, len(other)) == (one.name, len(one))
        assert other.benchmark is fast
        assert [e.current_experience for e in other] == [e.current_experience for e in one]
        for a, b in zip(one, other, strict=True):
            assert b.origin_stream is other
            for attribute in (*TOLD, "task_labels"):
                assert hasattr(a, attribute) == hasattr(b, attribute)
                value = getattr(a, attribute, None)
                assert getattr(b, attribute, None) == value
                assert type(getattr(b, attribute, None)) is type(value)
            assert list(b.dataset.targets) == list(a.dataset.targets)
            assert isinstance(b.dataset, type(a.dataset))
    if hasattr(stock, "n_experiences"):
        assert fast.n_experiences == stock.n_experiences
    if hasattr(stock, "n_classes"):
        assert fast.n_classes == stock.n_classes


def test_a_stream_that_is_made_as_it_is_used_stays_so(root):
    made = []

    def experiences(benchmark):
        for experience in benchmark.train_stream:
            made.append(experience.current_experience)
            yield experience

    stock = split_mnist(root)
    fast = in_memory(CLScenario([CLStream("train", experiences(stock))]))
    assert made == []
    assert_same_loading(
        LOADERS["training"],
        stock.train_stream[0].dataset,
        next(iter(fast.train_stream)).dataset,
    )
    assert made == [0]


def test_twice_is_once(root, monkeypatch):
    with never_one_by_one(monkeypatch):
        fast = in_memory(split_mnist(root))
        again = in_memory(fast)
    for one, other in pairs_of_datasets(fast, again):
        assert one is other


def test_avalanche_finds_no_ffcv(stock):
    dataset = in_memory(stock).train_stream[0].dataset
    assert not has_ffcv_support([dataset])
    with pytest.raises(AttributeError, match="target_transform"):  # see SourceSubset
        single_flat_dataset(dataset)


# --- the same views -------------------------------------------------------------------------------

VIEWS = {
    "subset": lambda d: d.subset([3, 1, 1, 7, 0]),
    "subset of tensor": lambda d: d.subset(torch.tensor([3, 1, 6])),
    "subset of subset": lambda d: d.subset(range(8, 1, -1)).subset([2, 0, 5, 5]),
    "nothing and all": lambda d: d.subset([]) + d + d.subset([]),
    "concat": lambda d: d.subset([5, 2]).concat(d),
    "plus": lambda d: d + d.subset([1]),
    "subset of concat": lambda d: (d.subset(range(6)) + d.eval().train()).subset([9, 0, 8, 1, 1]),
    "split concat": lambda d: d.concat(d.subset(range(5))).subset(range(len(d) - 2, len(d) + 3)),
    "eval": lambda d: d.eval(),
    "train of eval": lambda d: d.eval().subset([4, 2]).train(),
    "frozen": lambda d: d.freeze_transforms().eval(),
    "removed": lambda d: d.replace_current_transform_group(transforms.ToTensor()).eval(),
    "relabelled": lambda d: d.update_data_attribute(
        "targets_task_labels",
        DataAttribute([i % 2 for i in range(len(d))], "targets_task_labels", use_in_getitem=True),
    ),
    "one more element": lambda d: d.update_data_attribute(
        "weight", DataAttribute([i / 7 for i in range(len(d))], "weight", use_in_getitem=True)
    ).subset([2, 2, 3]),
    "in torch's subset": lambda d: Subset(d, [4, 0, 2]),
    "in torch's concatenation": lambda d: ConcatDataset([d, d.subset([2, 1])]),
    "in Avalanche's dataset": lambda d: AvalancheDataset([d, d]),
    "with more transforms": lambda d: AvalancheDataset(
        [d], transform_groups=None, frozen_transform_groups={"train": (None, None)}
    ),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("make", [fashion, cifar, permuted_mnist])
def test_views_hold_the_same(make, name, root):
    stock, view = make(root), VIEWS[name]
    one, other = next(iter(pairs_of_datasets(stock, in_memory(stock))))
    if make is permuted_mnist and name == "frozen":
        one = one.train()[0] and one  # else Avalanche's freezing loses the permutation
    if make is permuted_mnist and name == "removed":
        view = lambda d: d.replace_current_transform_group(None).subset([3, 4])  # noqa: E731
    assert_same_loading(LOADERS["in order"], view(one), view(other))


@pytest.mark.parametrize("view", ["subset", "concat", "subset of concat", "split concat", "frozen"])
def test_views_stay_fast(view, root, monkeypatch):
    fast = in_memory(cifar(root))
    with never_one_by_one(monkeypatch):
        loaded(LOADERS["training"], VIEWS[view](fast.train_stream[0].dataset))


def test_different_transforms_can_be_concatenated_in_any_order(root, monkeypatch):
    """Random and other transforms, of the same and of different sources, draw in order."""
    crop, flip = transforms.RandomCrop(20, padding=1), transforms.RandomHorizontalFlip()
    chains = [crop], [flip, transforms.CenterCrop(20)][1:], [flip, crop, flip]
    stock = [
        made(
            5,
            seed=1,
            dataset_root=root / folder,
            train_transform=transforms.Compose([*chain, *finish]),
        )
        for chain in chains
        for made, folder, finish in (
            (SplitFMNIST, "fashionmnist", [transforms.ToTensor()]),
            (SplitMNIST, "mnist", []),
        )
    ]

    def mixed(benchmarks):
        whole = sum(
            (b.train_stream[i % 5].dataset for i, b in enumerate(benchmarks[1:])),
            start=benchmarks[0].train_stream[0].dataset,
        )
        return whole.subset(np.random.default_rng(0).permutation(len(whole)).tolist())

    with never_one_by_one(monkeypatch):
        fast = mixed([in_memory(benchmark) for benchmark in stock])
        loaded(LOADERS["training"], fast)
    assert_same_loading(LOADERS["training"], mixed(stock), fast)


def test_a_stock_dataset_can_be_added(root):
    stock = split_mnist(root)
    one, other = next(iter(pairs_of_datasets(stock, in_memory(stock))))
    assert_same_loading(LOADERS["training"], one + one, other + one)
    assert_same_loading(LOADERS["training"], one + one, one + other)
    replayed = partial(ReplayDataLoader, batch_size=5, batch_size_mem=3, shuffle=True)
    assert_same_loading(lambda d: replayed(d, one), one, other)
    assert_same_loading(lambda d: replayed(one, d), one, other)


def test_benchmarks_can_be_built_on_top(root):
    def validated(benchmark):
        return benchmark_with_validation_stream(benchmark, 0.3, shuffle=True, seed=2).valid_stream

    def online(benchmark):
        return split_online_stream(benchmark.train_stream, 6, seed=1)

    def by_hand(benchmark):
        datasets = [e.dataset.subset(range(3, 12)) for e in benchmark.train_stream]
        return with_task_labels(benchmark_from_datasets(train=datasets)).train_stream

    def tasks(benchmark):
        return task_incremental_benchmark(benchmark, reset_task_labels=True).train_stream

    stock = cifar(root)
    fast = in_memory(stock)
    for on_top in (validated, online, by_hand, tasks):
        for one, other in zip(on_top(stock), on_top(fast), strict=True):
            assert_same_loading(LOADERS["training"], one.dataset, other.dataset)


def test_single_samples_are_lists_to_look_into(root):
    stock = cifar(root)
    one, other = next(iter(pairs_of_datasets(stock, in_memory(stock))))
    for index in (0, 5, np.int64(3), len(one) - 1):
        seed_everything(1)
        x, y, task = one[index]
        seed_everything(1)
        sample = other[index]
        assert len(sample) == 3
        assert torch.equal(sample[0], x)
        assert list(sample)[1:] == sample[1:] == [y, task]
        assert torch.equal(sample[0], x)  # no new random numbers
        assert repr(y) in repr(sample)
    for index in (len(one), len(one) + 5):
        with pytest.raises(IndexError):
            other[index]
    assert sum(1 for _ in other.eval()) == len(one)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_copies_hold_the_same(copied, root):
    stock = cifar(root)
    one, other = next(iter(pairs_of_datasets(stock, in_memory(stock))))
    loaded(LOADERS["in order"], other)
    assert_same_loading(LOADERS["training"], one, copied(other))


def test_a_dataset_from_another_process_is_fast(root, monkeypatch):
    content = pickle.dumps(in_memory(cifar(root)).train_stream[0].dataset)
    default_collate_fn_map.clear()  # as if in_memory had never been called
    default_collate_fn_map.update(UNTOUCHED)
    dataset = pickle.loads(content)
    with never_one_by_one(monkeypatch):
        loaded(LOADERS["training"], dataset)


# --- unknown transforms and datasets --------------------------------------------------------------


def noise(x):
    return x + torch.rand(1)


def with_transforms(root, train, evaluated=None):
    return split_mnist(root, train_transform=train, eval_transform=evaluated)


@pytest.mark.parametrize(
    "unknown",
    [
        noise,
        transforms.Lambda(noise),
        transforms.RandomRotation(20),
        transforms.RandomErasing(0.5),
        transforms.Compose([transforms.RandomCrop(28, padding=2, padding_mode="reflect")]),
        transforms.Compose([transforms.RandomCrop(28, padding=2), transforms.CenterCrop(20)]),
        transforms.RandomCrop(30, pad_if_needed=True),
        transforms.RandomCrop(20, padding=-2),
        transforms.Normalize((0.1,), (0.2,), inplace=True),
    ],
)
def test_an_unknown_transform_is_applied_each_time(unknown, root, monkeypatch):
    stock = with_transforms(root, unknown, transforms.Normalize((0.1,), (0.2,)))
    with pytest.warns(UserWarning, match="one by one") as warned:
        fast = in_memory(stock)
    last = unknown.transforms[-1] if isinstance(unknown, transforms.Compose) else unknown
    assert any(repr(last) in str(w.message) or "RandomCrop" in str(w.message) for w in warned)
    for one, other in pairs_of_datasets(stock, fast):
        assert_same_loading(LOADERS["training"], one.train(), other.train())
        with never_one_by_one(monkeypatch):
            loaded(LOADERS["in order"], other.eval())
        assert_same_loading(LOADERS["in order"], one.eval(), other.eval())


def test_a_transform_that_comes_later_may_be_unknown(root):
    stock = split_mnist(root)
    one, other = next(iter(pairs_of_datasets(stock, in_memory(stock))))
    later = [d.replace_current_transform_group(noise) for d in (one, other)]
    assert_same_loading(LOADERS["in order"], *later)
    # Batches with samples of both kinds.
    both = [ConcatDataset([d, noisy]) for d, noisy in zip((one, other), later, strict=True)]
    assert_same_loading(LOADERS["torch's"], *both)


def test_a_vouched_transform_is_applied_once_to_each_sample(root, monkeypatch):
    calls = []

    def counted(x):
        calls.append(1)
        return doubled(x)

    chain = [counted, transforms.RandomHorizontalFlip(), transforms.Normalize((0.1,), (0.2,))]
    stock = with_transforms(root, transforms.Compose(chain), transforms.Lambda(counted))
    with never_one_by_one(monkeypatch):
        fast = in_memory(stock, deterministic=True)
        for experience in fast.train_stream:
            for _ in range(3):
                loaded(LOADERS["training"], experience.dataset)
    samples = sum(len(experience.dataset) for experience in fast.train_stream)
    assert samples <= len(calls) <= samples + 3  # the first of each kind is looked at beforehand
    for one, other in pairs_of_datasets(stock, fast):
        assert_same_loading(LOADERS["training"], one, other)


def test_a_vouched_target_transform_is_applied_once(root, monkeypatch):
    mapping = {y: 9 - y for y in range(10)}
    dataset = FashionMNIST(root / "fashionmnist", train=True, target_transform=mapping.get)
    dataset.targets = 9 - dataset.targets
    options = {"train_transform": TO_TENSOR, "eval_transform": TO_TENSOR}
    stock = nc_benchmark(dataset, dataset, 5, task_labels=False, seed=1, **options)
    with pytest.warns(UserWarning, match="one by one"):
        in_memory(stock)
    with never_one_by_one(monkeypatch):
        fast = in_memory(stock, deterministic=True)
        loaded(LOADERS["training"], fast.train_stream[0].dataset)
    for one, other in pairs_of_datasets(stock, fast):
        assert_same_loading(LOADERS["training"], one.train(), other.train())


@pytest.mark.parametrize(
    "draw", [torch.rand, lambda _: np.random.rand(), lambda _: random.random()]
)
def test_a_vouched_transform_that_draws_is_refused(draw, root):
    with pytest.raises(ValueError, match=r"draws random numbers.*deterministic"):
        in_memory(with_transforms(root, lambda x: x + draw(1)), deterministic=True)


def test_torchvisions_random_transforms_are_never_kept(root):
    stock = with_transforms(root, transforms.RandomRotation(20))
    with pytest.warns(UserWarning, match="RandomRotation"):
        fast = in_memory(stock, deterministic=True)
    for one, other in pairs_of_datasets(stock, fast):
        assert_same_loading(LOADERS["training"], one, other)


class Drawn(Dataset):
    """A dataset of a type of its own, of images with one size or several."""

    def __init__(self, sizes=(8,), mode="RGB"):
        self.targets = [i % 4 for i in range(20)]
        self.sizes, self.mode = sizes, mode
        self.asked = []

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        self.asked.append(index)
        size = self.sizes[index % len(self.sizes)]
        pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)
        return Image.fromarray(pixels).convert(self.mode), self.targets[index]


def of_dataset(dataset):
    chain = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    return nc_benchmark(dataset, dataset, 2, False, seed=0, train_transform=chain)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_unknown_dataset_is_asked_each_time_or_once(mode, monkeypatch):
    dataset = Drawn(mode=mode)
    stock = of_dataset(dataset)
    with pytest.warns(UserWarning, match="Drawn is not known"):
        untouched = in_memory(stock)
    for one, other in pairs_of_datasets(stock, untouched):
        assert type(one) is type(other)
        assert_same_loading(LOADERS["training"], one.train(), other.train())
    with pytest.warns(UserWarning, match="PIL images cannot be collated"):  # in evaluation
        fast = in_memory(stock, deterministic=True)
    with never_one_by_one(monkeypatch):
        for _ in range(2):
            dataset.asked.clear()
            for experience in fast.train_stream:
                loaded(LOADERS["training"], experience.dataset)
    assert dataset.asked == []
    for one, other in pairs_of_datasets(stock, fast):
        assert_same_loading(LOADERS["training"], one.train(), other.train())


def test_samples_of_different_shapes_are_refused():
    with pytest.warns(UserWarning, match="PIL images cannot be collated"):  # in evaluation
        fast = in_memory(of_dataset(Drawn(sizes=(8, 9))), deterministic=True)
    with pytest.raises(ValueError, match=r"Drawn .*differ.*8, 8, 3.*9, 9, 3.*without in_memory"):
        loaded(LOADERS["in order"], fast.train_stream[0].dataset)


def test_an_unknown_kind_of_image_is_left_alone():
    with pytest.warns(UserWarning, match="mode 'CMYK'"):
        fast = in_memory(of_dataset(Drawn(mode="CMYK")), deterministic=True)
    stock = of_dataset(Drawn(mode="CMYK"))
    for one, other in pairs_of_datasets(stock, fast):
        assert_same_loading(LOADERS["training"], one.train(), other.train())


@pytest.mark.parametrize(
    "chain",
    [
        [transforms.RandomCrop(28, padding=1, fill=300), TO_TENSOR],
        [transforms.RandomCrop(28, padding=1, fill=(7,)), TO_TENSOR],
        [TO_TENSOR, TO_TENSOR],
        [NORMALIZE, TO_TENSOR],
        [TO_TENSOR, transforms.Normalize((0.1,), (0.0,))],
        [transforms.RandomHorizontalFlip()],
        [TO_TENSOR, PixelsPermutation(torch.arange(5))],
        [PixelsPermutation(torch.arange(784).flip(0)), TO_TENSOR],
    ],
)
def test_what_torchvision_may_refuse_is_left_to_it(chain, root):
    dataset = FashionMNIST(root / "fashionmnist")
    stock = nc_benchmark(
        dataset,
        dataset,
        5,
        False,
        seed=1,
        train_transform=transforms.Compose(chain),
        eval_transform=TO_TENSOR,
    )
    with pytest.warns(UserWarning, match="in_memory"):
        fast = in_memory(stock)
    outcomes = []
    for one in (stock, fast):
        try:
            outcomes.append(loaded(LOADERS["training"], one.train_stream[0].dataset))
        except (TypeError, ValueError, RuntimeError) as error:
            outcomes.append(str(error))
    if isinstance(outcomes[0], str):
        assert outcomes[0] == outcomes[1]
    else:
        assert_same_batches(outcomes[0][0], outcomes[1][0])


def test_unusual_arrays_are_loaded_one_by_one(root):
    four_channels = CIFAR10(root / "cifar10")
    four_channels.data = four_channels.data[..., [0, 1, 2, 0]]
    parts = [some_tensors(8)[0], torch.arange(8) % 2]
    floats = [(parts[0], parts[1] / 2)]
    halves = tensors_benchmark(floats, floats, task_labels=[0]).train_stream[0].dataset
    whole = tensors_benchmark([parts], [parts], task_labels=[0]).train_stream[0].dataset
    by_dict = TransformGroups({"train": (None, partial(lookup, {0: 3, 1: 2}))})
    mapped = AvalancheDataset([whole], transform_groups=by_dict)
    to_tensor = TransformGroups({"train": transforms.ToTensor()})
    image = AvalancheDataset([four_channels], transform_groups=to_tensor)
    for dataset in (image, halves, mapped):
        stock = benchmark_from_datasets(train=[dataset])
        with pytest.warns(UserWarning, match="in_memory"):
            fast = in_memory(stock)
        for one, other in pairs_of_datasets(stock, fast):
            assert_same_loading(LOADERS["in order"], one, other)


@pytest.mark.parametrize(
    "form",
    [
        ElementSpec(TENSOR, (2,), torch.int64),
        ElementSpec(NUMBER, (), torch.float64),
        ElementSpec(NUMBER, (), torch.bool),
    ],
)
def test_only_whole_numbers_are_mapped_to_classes(form):
    with pytest.raises(NotBatchableError, match="lookup"):
        BatchTransform([partial(lookup, [1, 0])], form)


class Reversed(Subset):
    """A subset that torch's class does not describe."""

    def __getitem__(self, index):
        return super().__getitem__(len(self) - 1 - index)

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def test_a_subset_of_a_type_of_its_own_is_not_looked_through():
    x, y = some_tensors(24)
    subset = Reversed(TensorDataset(x, y), range(24))
    subset.targets = y.flip(0)
    stock = nc_benchmark(subset, subset, 2, False, seed=1)
    with pytest.warns(UserWarning, match="Reversed"):
        fast = in_memory(stock)
    for one, other in pairs_of_datasets(stock, fast):
        assert_same_loading(LOADERS["training"], one, other)


def both_flipped(x, y):
    return x.flip(0), 5 - y


PAIRS = {
    "together": ({"train": MultiParamTransformCallable(both_flipped), "eval": None}, "together"),
    "random targets": ({"train": (None, transforms.RandomHorizontalFlip())}, "is random"),
}


@pytest.mark.parametrize(("groups", "reason"), PAIRS.values(), ids=PAIRS)
def test_what_random_or_joint_transforms_do_to_targets_is_done_each_time(groups, reason):
    generator = torch.Generator().manual_seed(0)
    tensors = TensorDataset(*torch.rand(2, 9, 1, 4, 5, generator=generator))
    dataset = AvalancheDataset([tensors], transform_groups=TransformGroups(groups))
    stock = benchmark_from_datasets(train=[dataset])
    with pytest.warns(UserWarning, match=reason):
        fast = in_memory(stock)
    for one, other in pairs_of_datasets(stock, fast):
        assert_same_loading(LOADERS["in order"], one, other)


def test_a_dataset_with_a_collate_fn_of_its_own_is_left_alone():
    def collate(samples):
        return [torch.stack([x for x, *_ in samples]), torch.tensor([y for _, y, *_ in samples])]

    tensors = TensorDataset(*some_tensors(10))
    attributes = [DataAttribute(tensors.tensors[1], "targets")]
    dataset = AvalancheDataset([tensors], data_attributes=attributes, collate_fn=collate)
    with pytest.warns(UserWarning, match="collate_fn"):
        fast = in_memory(benchmark_from_datasets(train=[dataset]))
    assert fast.train_stream[0].dataset is dataset


# --- mistakes, memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, "split-mnist", [1, 2], SplitMNIST])
def test_what_is_no_benchmark_is_refused(wrong):
    with pytest.raises(TypeError, match=r"benchmark must be .*SplitMNIST\(5\), got"):
        in_memory(wrong)


def test_a_stream_is_not_a_benchmark(root):
    with pytest.raises(TypeError, match="benchmark must be"):
        in_memory(split_mnist(root).train_stream)


def test_experiences_without_a_dataset_are_refused():
    stream = EagerCLStream("train", [CLExperience(0, None)])
    with pytest.raises(TypeError, match="experience 0 has None"):
        in_memory(CLScenario([stream]))


def test_arrays_are_shared_not_copied(root):
    for dataset in (
        CIFAR10(root / "cifar10", transform=TO_TENSOR),
        FashionMNIST(root / "fashionmnist", transform=TO_TENSOR),
        TensorDataset(*some_tensors(10)),
    ):
        stored, _ = SampleSource(dataset, deterministic=False).prepare(0, [])
        held = dataset.tensors[0] if isinstance(dataset, TensorDataset) else dataset.data
        assert stored.data.data_ptr() == torch.as_tensor(held).data_ptr()


def test_a_checkpoint_holds_nothing_more_than_the_dataset(root):
    stock = resized_cifar(root)
    one, other = next(iter(pairs_of_datasets(stock, in_memory(stock))))
    loaded(LOADERS["in order"], other)
    assert len(pickle.dumps(other)) < 1.1 * len(pickle.dumps(one))


def test_it_is_one_documented_call():
    import avalanche_classp

    assert avalanche_classp.in_memory is avalanche_classp.in_memory is in_memory
    assert "in_memory" in avalanche_classp.__all__
    assert list(inspect.signature(in_memory).parameters) == ["benchmark", "deterministic"]
    assert "bytes" in in_memory.__doc__


@pytest.mark.slow
def test_a_type_checker_still_knows_the_benchmarks_type(tmp_path):
    repository = Path(__file__).parents[2]
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nmypy_path = {repository}\n"
        "[mypy-avalanche.*,torch.*,torchvision.*]\n"
        "follow_imports = skip\nignore_missing_imports = true\n"
    )
    script = tmp_path / "script.py"
    script.write_text(
        "from avalanche.benchmarks import CLScenario\n"
        "from avalanche_classp import in_memory\n"
        "class Digits(CLScenario):\n"
        "    train_stream: list[str]\n"
        "reveal_type(in_memory(Digits([])))\n"
        "reveal_type(in_memory(Digits([]), deterministic=True).train_stream)\n"
    )
    options = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path)]
    told, _, _ = mypy.api.run([*options, str(script)])
    revealed = re.findall(r'Revealed type is "(.*)"', told)
    names = [name.replace("builtins.", "") for name in revealed]
    assert names == ["script.Digits", "list[str]"], told


# --- real data ------------------------------------------------------------------------------------

DATA = Path.home() / ".avalanche" / "data"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "make"),
    [
        ("mnist", lambda: SplitMNIST(5, seed=0)),
        ("mnist", lambda: PermutedMNIST(2, seed=0)),
        ("fashionmnist", lambda: SplitFMNIST(5, seed=0)),
        ("cifar10", lambda: SplitCIFAR10(5, seed=0)),
    ],
    ids=["SplitMNIST", "PermutedMNIST", "SplitFMNIST", "SplitCIFAR10"],
)
def test_real_data(folder, make, monkeypatch):
    if not (DATA / folder).is_dir():
        pytest.skip(f"{DATA / folder} is not there")
    stock = make()
    with never_one_by_one(monkeypatch):
        fast = in_memory(stock)
    few = np.random.default_rng(0).permutation(10000)[:500].tolist()
    one, other = (b.train_stream[1].dataset.subset(few) for b in (stock, fast))
    assert_same_loading(LOADERS["training"], one, other)
    one, other = (b.test_stream[1].dataset.subset(range(200)) for b in (stock, fast))
    assert_same_loading(LOADERS["in order"], one, other)
