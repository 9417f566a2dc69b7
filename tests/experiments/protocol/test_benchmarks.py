"""The benchmarks and models: streams, labels, heads, validation data, datasets' files."""

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from avalanche.benchmarks.classic import PermutedMNIST
from avalanche.benchmarks.datasets import default_dataset_location
from small_data import small_config, write_cifar, write_mnist
from torch import nn

from experiments.errors import UserError
from experiments.protocol.benchmarks import BENCHMARKS, make_benchmark
from experiments.protocol.methods import METHODS
from experiments.protocol.models import MODELS, make_model
from experiments.protocol.tuned_settings import make_config, source_of
from experiments.running.run import run

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own

PAIRS = [(name, scenario) for name, spec in BENCHMARKS.items() for scenario in spec.scenarios]


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    """A data root with small files in the formats of all datasets."""
    root = tmp_path_factory.mktemp("data")
    write_mnist(root)
    write_mnist(root, "fashionmnist", "FashionMNIST")
    write_cifar(root, 10, per_class=40)
    write_cifar(root, 100)
    return root


@pytest.fixture
def small_root(small_files, monkeypatch):
    """The same; torchvision, which knows the real CIFAR by MD5 sums, takes it for whole."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    return small_files


def labels_of(stream):
    return [sorted(set(map(int, e.dataset.targets))) for e in stream]


def images_of(experience):
    return {sample[0].numpy().tobytes() for sample in experience.dataset.eval()}


# Streams


@pytest.mark.parametrize(("name", "scenario"), PAIRS)
def test_streams_have_the_experiences_labels_and_tasks_of_their_scenario(
    name, scenario, small_root
):
    spec = BENCHMARKS[name]
    benchmark = make_benchmark(name, scenario, small_root)
    size = spec.classes // spec.experiences
    for stream in (benchmark.train_stream, benchmark.test_stream):
        assert len(stream) == spec.experiences
        tasks = range(spec.experiences) if scenario == "task" else [0] * spec.experiences
        assert [list(e.task_labels) for e in stream] == [[task] for task in tasks]
        for i, labels in enumerate(labels_of(stream)):
            if spec.shared_labels:
                assert labels == list(range(spec.classes))
            else:
                first = i * size if scenario == "class" else 0
                assert labels == list(range(first, first + size))
        assert stream[0].dataset.eval()[0][0].shape == torch.Size(spec.shape)


@pytest.mark.parametrize(("name", "scenario"), PAIRS)
def test_the_usual_model_has_the_heads_of_the_scenario(name, scenario):
    spec = BENCHMARKS[name]
    labels = spec.count_labels(scenario, spec.experiences)
    shared = spec.shared_labels or scenario == "class"
    assert labels == (spec.classes if shared else spec.classes // spec.experiences)
    model = make_model(spec.model, spec.shape, labels, scenario == "task")
    classifier = getattr(model, MODELS[spec.model].classifier)
    head = classifier.classifiers["0"].classifier if scenario == "task" else classifier
    assert head.out_features == labels


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scenario"), PAIRS)
def test_every_benchmark_is_learnt_from_its_files(name, scenario, small_root):
    """Joint training on what the small files hold: a bright row that tells the class.

    Settings with which many seeds learn it: the numbers differ between machines.
    """
    # A hundred classes take long: that they run and are counted is enough here.
    epochs = {"cnn": 15, "paper-cnn": 4}.get(BENCHMARKS[name].model, 10)
    epochs = {"split-cifar100": 2, "permuted-mnist": 5}.get(name, epochs)
    hyper = {"lr": 0.05} if name == "split-cifar10" else METHODS["joint"].defaults
    config = small_config("joint", scenario, name, epochs=epochs, batch_size=10, hyper=hyper)
    result = run(config, small_root)
    counts = np.array(result["confusion_matrix"])
    assert counts.sum() == sum(
        len(e.dataset) for e in make_benchmark(name, scenario, small_root).test_stream
    )
    if name != "split-cifar100":
        assert result["average_accuracy"] > (0.3 if name == "mnist-fmnist" else 0.6)


def test_permutations_are_avalanches_and_follow_the_seed(small_root):
    ours = make_benchmark("permuted-mnist", "domain", small_root, experiences=3, seed=5)
    theirs = PermutedMNIST(3, seed=5, dataset_root=small_root / "mnist")
    other = make_benchmark("permuted-mnist", "domain", small_root, experiences=3, seed=6)
    assert len(ours.train_stream) == 3
    for mine, plain, different in zip(
        ours.train_stream, theirs.train_stream, other.train_stream, strict=True
    ):
        assert torch.equal(mine.dataset[7][0], plain.dataset[7][0])
        assert not torch.equal(mine.dataset[7][0], different.dataset[7][0])
    assert len({mine.dataset[7][0].numpy().tobytes() for mine in ours.train_stream}) == 3


def test_mnist_comes_before_fashion_mnist(small_root):
    both = make_benchmark("mnist-fmnist", "domain", small_root)
    for name, experience in zip(("split-mnist", "split-fmnist"), both.train_stream, strict=True):
        (alone,) = make_benchmark(name, "class", small_root, experiences=1).train_stream
        assert images_of(experience) == images_of(alone)


@pytest.mark.parametrize(("name", "number"), [("split-digits", 2), ("split-cifar100", 20)])
def test_split_benchmarks_have_as_many_experiences_as_asked_for(name, number, small_root):
    spec = BENCHMARKS[name]
    benchmark = make_benchmark(name, "class", small_root, experiences=number)
    seen = labels_of(benchmark.train_stream)
    assert len(seen) == number
    assert [label for labels in seen for label in labels] == list(range(spec.classes))


@pytest.mark.parametrize(
    ("name", "scenario", "number", "message"),
    [
        ("permuted-mnist", "class", 10, "permuted-mnist has no scenario 'class'; .* domain"),
        ("split-mnist", "class", 3, "cannot have 3 experiences; choose from 1, 2, 5, 10"),
        ("mnist-fmnist", "domain", 3, "cannot have 3 experiences; choose from 2"),
        ("permuted-mnist", "domain", 5000, "choose from 1 to 1000"),
    ],
)
def test_what_a_benchmark_cannot_be_is_one_clear_line(name, scenario, number, message):
    with pytest.raises(UserError, match=message):
        make_benchmark(name, scenario, experiences=number)
    with pytest.raises(UserError, match=message):
        make_config(name, scenario, "naive", experiences=number)


# Validation data


@pytest.mark.parametrize(("name", "scenario"), PAIRS)
def test_validation_uses_training_data_alone_and_keeps_labels(name, scenario, small_root):
    final = make_benchmark(name, scenario, small_root)
    tuning = make_benchmark(name, scenario, small_root, validation=True)
    for whole, trained, held_out, test in zip(
        final.train_stream,
        tuning.train_stream,
        tuning.test_stream,
        final.test_stream,
        strict=True,
    ):
        kept, out = images_of(trained), images_of(held_out)
        assert kept | out == images_of(whole)
        assert not kept & out
        assert not (kept | out) & images_of(test)
        assert len(out) / len(kept | out) == pytest.approx(0.2, abs=0.01)
        assert set(whole.dataset.targets) == set(held_out.dataset.targets)
        assert list(whole.task_labels) == list(held_out.task_labels)


def test_an_image_held_out_is_held_out_under_every_permutation(small_root):
    tuning = make_benchmark("permuted-mnist", "domain", small_root, validation=True)
    pixels = [
        {tuple(np.sort(s[0].numpy().ravel())) for s in e.dataset.eval()} for e in tuning.test_stream
    ]
    assert all(held_out == pixels[0] for held_out in pixels)


def test_train_share_takes_a_part_of_each_class():
    whole = make_benchmark("split-digits", "class", validation=True)
    part = make_benchmark("split-digits", "class", validation=True, train_share=0.25)
    for one, other, test, same in zip(
        whole.train_stream, part.train_stream, whole.test_stream, part.test_stream, strict=True
    ):
        assert images_of(other) < images_of(one)
        assert images_of(test) == images_of(same)
        assert len(other.dataset) == pytest.approx(len(one.dataset) / 4, abs=2)


# Datasets


def has(folder):
    return (Path(default_dataset_location(folder.split("/")[0])) / folder.split("/")[1]).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scenario", "folder", "counted"),
    [
        ("split-mnist", "task", "mnist/MNIST", 11996),
        ("split-mnist", "class", "mnist/MNIST", 11996),
        ("split-fmnist", "domain", "fashionmnist/FashionMNIST", 12000),
        ("split-cifar10", "task", "cifar10/cifar-10-batches-py", 10000),
    ],
)
def test_the_real_data_is_learnt(name, scenario, folder, counted):
    """On a tenth of the training data, one pass; the last experience is what it has just seen."""
    if not has(folder):
        pytest.skip(f"{folder} is not in Avalanche's default folder")
    config = small_config("classp", scenario, name, validation=True, train_share=0.1, batch_size=32)
    result = run(config)
    (accuracies,) = result["accuracy_matrix"]
    assert np.sum(result["confusion_matrix"]) == counted
    assert accuracies[-1] > (0.7 if name == "split-cifar10" else 0.85)


@pytest.mark.slow
def test_the_real_mnist_and_fashion_mnist_are_ten_classes_each():
    for folder in ("mnist/MNIST", "fashionmnist/FashionMNIST"):
        if not has(folder):
            pytest.skip(f"{folder} is not in Avalanche's default folder")
    both = make_benchmark("mnist-fmnist", "domain")
    assert [len(e.dataset) for e in both.train_stream] == [60000, 60000]
    assert [len(e.dataset) for e in both.test_stream] == [10000, 10000]


@pytest.mark.parametrize(
    ("name", "dataset", "folder"),
    [
        ("split-mnist", "MNIST", "mnist"),
        ("permuted-mnist", "MNIST", "mnist"),
        ("split-fmnist", "Fashion-MNIST", "fashionmnist"),
        ("split-cifar10", "CIFAR-10", "cifar10"),
        ("split-cifar100", "CIFAR-100", "cifar100"),
        ("mnist-fmnist", "MNIST", "mnist"),
    ],
)
def test_missing_data_without_network_is_one_clear_line(
    name, dataset, folder, tmp_path, monkeypatch
):
    def no_network(*args, **kwargs):
        raise URLError("no network")

    for module in ("mnist", "cifar"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.download_and_extract_archive", no_network
        )
    with pytest.raises(UserError) as caught:
        make_benchmark(name, BENCHMARKS[name].scenarios[0], tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{dataset} is not whole in {tmp_path / folder} ")
    assert "no network" in line
    assert "--data-root" in line
    assert "\n" not in line


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_dataset_file_cut_in_half_is_one_clear_line(name, tmp_path):
    write_mnist(tmp_path)
    file = tmp_path / "mnist" / "MNIST" / "raw" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"MNIST in .*mnist is damaged .*delete that folder"):
        make_benchmark("split-mnist", "class", tmp_path)


def test_a_cifar_file_cut_in_half_is_one_clear_line(tmp_path, monkeypatch):
    write_cifar(tmp_path, 10)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    file = tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"CIFAR-10 in .*cifar10 is damaged .*delete that folder"):
        make_benchmark("split-cifar10", "class", tmp_path)


# Models


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("multi_head", [False, True])
def test_models_take_their_samples_and_give_their_labels(name, multi_head):
    shape = (3, 32, 32)
    model = make_model(name, shape, 7, multi_head)
    x = torch.randn(4, *shape)
    tasks = {"task_labels": torch.zeros(4, dtype=torch.long)} if multi_head else {}
    assert model(x, **tasks).shape == (4, 7)


def test_sizes_are_the_fields():
    def count(name, shape, labels):
        return sum(p.numel() for p in make_model(name, shape, labels, False).parameters())

    assert count("mlp-400", (1, 28, 28), 10) == 784 * 400 + 400 + 400 * 400 + 400 + 4010
    assert count("resnet18", (3, 32, 32), 10) == 11_173_962
    # PyTorch's MNIST example has the same layers.
    assert count("paper-cnn", (1, 28, 28), 10) == 1_199_882
    assert count("cnn", (3, 32, 32), 10) == 620_362


def test_resnet_keeps_the_size_of_small_images():
    model = make_model("resnet18", (3, 32, 32), 10, False)
    seen = []
    model.layer1.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(torch.zeros(1, 3, 32, 32))
    assert seen == [torch.Size([1, 64, 32, 32])]


@pytest.mark.parametrize(
    ("model", "benchmark"), [("cnn", "split-digits"), ("simple-cnn", "split-mnist")]
)
def test_a_model_that_does_not_fit_is_one_clear_line(model, benchmark):
    with pytest.raises(UserError, match=f"model '{model}' takes images of .*--model"):
        make_config(benchmark, "class", "naive", model=model)


def test_another_model_and_number_of_experiences_are_used(small_root):
    config = make_config(
        "split-mnist", "class", "naive", model="mlp-256", experiences=2, epochs=(2, 1)
    )
    result = run(config, small_root)
    assert result["parameters"] == 784 * 256 + 256 + 256 * 256 + 256 + 2570
    assert np.shape(result["accuracy_matrix"]) == (2, 2)


# The paper's experiment


def test_the_papers_experiment_has_its_network_epochs_and_phases(small_root):
    config = make_config("mnist-fmnist", "domain", "classp")
    assert source_of(config) == "published"
    assert (config.model, config.epochs, config.batch_size) == ("paper-cnn", (4, 1), 32)
    assert [config.epochs_in(i) for i in range(3)] == [4, 1, 1]
    assert config.hyper == {
        "lr": 0.2,
        "threshold": 0.5,
        "epsilon": 1e-5,
        "power": 1.0,
        "apply_decay": True,
        "paper_phases": True,
    }
    strategy = METHODS["classp"].build(
        nn.Linear(1, 1), config.hyper, {"criterion": nn.CrossEntropyLoss()}
    )
    (plugin,) = [p for p in strategy.plugins if hasattr(p, "phases")]
    assert [phase["apply_decay"] for phase in plugin.phases] == [False, True]
    assert run(config, small_root)["setting"] == "published"
