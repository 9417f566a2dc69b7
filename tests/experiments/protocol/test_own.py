"""Benchmarks, models and methods of the user's own: declared, counted, loaded from files, run."""

import sys
import textwrap

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.models import MultiTaskModule
from avalanche.training import Naive
from torch import nn
from torch.utils.data import TensorDataset

from experiments.cli import main
from experiments.errors import UserError
from experiments.protocol import loading, own
from experiments.protocol.benchmarks import BENCHMARKS, make_benchmark
from experiments.protocol.config import RunConfig
from experiments.protocol.methods import METHODS
from experiments.protocol.models import MODELS, make_model
from experiments.protocol.tuned_settings import make_config
from experiments.running.records import Results
from experiments.running.run import run

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own
parametrize = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def as_before():
    """Take out what a test declares and loads."""
    kept = (BENCHMARKS, MODELS, METHODS, loading.LOADED)
    before = [dict(entries) for entries in kept]
    yield
    for entries, old in zip(kept, before, strict=True):
        entries.clear()
        entries.update(old)
    for name in [name for name in sys.modules if name.startswith("loaded_")]:
        del sys.modules[name]


def samples(count, labels=6):
    """Return images of 1 × 3 × 3, in which the label's pixel is bright."""
    targets = torch.arange(count) % labels
    images = torch.randn(count, 1, 3, 3) * 0.1
    images.view(count, 9)[torch.arange(count), targets] += 2
    data = TensorDataset(images, targets)
    data.targets = targets.tolist()
    return data


def stream(**options):
    options = {"n_experiences": 3, "task_labels": False, "shuffle": False} | options
    return nc_benchmark(samples(60), samples(30), **options)


def net(classes):
    """A small net.

    More of it.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, classes))


def sgd(model, hyper, common):
    return Naive(model=model, optimizer=torch.optim.SGD(model.parameters(), **hyper), **common)


# What is counted


def test_a_benchmark_is_counted_when_it_is_asked():
    made = []

    @own.benchmark
    def mine():
        """Three of them."""
        made.append(0)
        return stream()

    spec = BENCHMARKS["mine"]
    assert spec.description == "Three of them."
    assert spec.scenarios == ("class",) and not spec.random and not made
    assert (spec.experiences, spec.classes, spec.shape) == (3, 6, (1, 3, 3))
    assert spec.experiences_choices == (3,) and spec.model == "cnn"
    assert spec.count_labels("class", 3) == 6
    make_benchmark("mine", "class")
    assert len(made) == 1  # what was counted is used


def test_labels_of_a_head_are_the_largest_of_all_experiences():
    own.benchmark(lambda: stream(class_ids_from_zero_in_each_exp=True), name="d", scenario="domain")
    assert BENCHMARKS["d"].count_labels("domain", 3) == 2


def test_the_default_model_of_vectors_is_an_mlp():
    @own.benchmark(name="mine", scenario="domain")
    def vectors():
        flat = TensorDataset(torch.randn(20, 5), torch.arange(20) % 2)
        flat.targets = (torch.arange(20) % 2).tolist()
        datasets = [as_classification_dataset(flat)] * 2
        return benchmark_from_datasets(train=datasets, test=datasets)

    assert BENCHMARKS["mine"].model == "mlp-256"
    # EWC takes task labels from the mini-batches, and these datasets lack them.
    assert run(small("ewc", scenario="domain"))["average_accuracy"] > 0


def test_random_generators_are_seeded_for_the_function_and_left_alone():
    @own.benchmark
    def drawn(seed):
        order = torch.randperm(60).tolist()
        np.random.shuffle(order)
        data = samples(60)
        data.targets = [data.targets[i] for i in order]
        drawn_orders.append(order)
        return nc_benchmark(data, samples(30), 3, task_labels=False)

    drawn_orders = []
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for seed in (0, 1, 0):
        make_benchmark("drawn", "class", seed=seed)
    assert drawn_orders[0] == drawn_orders[2] != drawn_orders[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert BENCHMARKS["drawn"].random


@parametrize(
    ("function", "options", "message"),
    [
        (lambda: 5, {}, "must return an Avalanche benchmark, got a int"),
        (lambda: 1 / 0, {}, r"failed: ZeroDivisionError: division by zero \(line \d+\)"),
        (stream, {"test_stream": "valid"}, "has no stream 'valid'; it has train, test"),
        (lambda: stream(task_labels=True), {}, "3 different task labels"),
        (stream, {"scenario": "task"}, "1 different task labels"),
        (stream, {"scenario": "tusk"}, "scenario must be task, domain, class, got 'tusk'"),
        (stream, {"name": "split-mnist"}, "'split-mnist' is taken by a built-in one"),
        (stream, {"model": net}, "net is not declared"),
    ],
)
def test_a_wrong_benchmark_is_told_in_a_line(function, options, message):
    with pytest.raises(UserError, match=message):
        own.benchmark(function, **({"name": "wrong"} | options))
        _ = BENCHMARKS["wrong"].shape


def test_unequal_streams_are_told():
    def unequal():
        datasets = [as_classification_dataset(samples(20)) for _ in range(3)]
        return benchmark_from_datasets(train=datasets[:2], test=datasets[2:])

    own.benchmark(unequal)
    with pytest.raises(UserError, match="2 train and 1 test experiences"):
        _ = BENCHMARKS["unequal"].shape


def test_only_a_cell_that_is_run_again_replaces_its_own_entry():
    own.model(net)
    own.model(net, description="again")
    assert MODELS["net"].description == "again"

    def other(classes):
        return net(classes)

    with pytest.raises(UserError, match=r"the model name 'net' is taken by .*test_own\.net"):
        own.model(other, name="net")


# Models


class Zero(nn.Module):
    def __init__(self, outputs=6):
        super().__init__()
        self.body, self.head = nn.Flatten(), nn.Linear(9, outputs)

    def forward(self, x):
        return self.head(self.body(x))


def test_a_model_is_given_the_number_of_classes_if_it_asks_for_it():
    own.model(net)
    own.model(Zero)
    assert make_model("net", (1, 3, 3), 4, multi_head=False)[-1].out_features == 4
    made = make_model("Zero", (1, 3, 3), 6, multi_head=False)
    assert made.head.out_features == 6 and made.training
    assert MODELS["net"].description == "A small net."


def test_the_last_layer_becomes_a_head_per_task():
    own.model(Zero)
    own.model(net)
    for name, attribute in (("Zero", "head"), ("net", "3")):
        made = make_model(name, (1, 3, 3), 2, multi_head=True)
        assert isinstance(made, MultiTaskModule)
        assert made.classifier_name == attribute


@parametrize(
    ("function", "message"),
    [
        (lambda classes: nn.Linear(5, classes), r"does not take samples of \(1, 3, 3\): Runtime"),
        (lambda: Zero(4), "number for each of 6 classes"),
        (lambda: None, "must return an nn.Module, got a NoneType"),
        (lambda a, b: None, "failed: TypeError"),
    ],
)
def test_a_model_that_does_not_fit_is_told_in_a_line(function, message):
    own.model(function, name="wrong")
    with pytest.raises(UserError, match=message):
        make_model("wrong", (1, 3, 3), 6, multi_head=False)


# Runs


def small(method="naive", **options):
    return make_config("mine", method=method, **({"scenario": "class", "epochs": 1} | options))


@parametrize("method", ["naive", "classp", "ewc", "lwf", "replay", "joint", "slda", "momentum"])
def test_methods_run_on_a_benchmark_and_model_of_the_users_own(method):
    own.benchmark(stream, name="mine", model=own.model(net) and net)
    own.method(sgd, name="momentum", defaults={"lr": 0.1, "momentum": 0.9})
    result = run(small(method, epochs=10))
    assert len(result["accuracy_matrix"][0]) == 3
    assert set(result["code"]) == {"test_own.py"}
    assert result["average_accuracy"] >= 1 / 6


def test_the_same_run_gives_the_same_numbers():
    def drawn(seed):
        return stream(shuffle=True, seed=seed)

    own.benchmark(drawn, name="mine")
    first, again = run(small(seed=3)), run(small(seed=3))
    assert first["accuracy_matrix"] == again["accuracy_matrix"]
    assert first["accuracy_matrix"] != run(small(seed=4))["accuracy_matrix"]


def test_validation_data_comes_from_the_train_stream_alone():
    train, test = samples(60), samples(30)
    test.tensors[0][:] = torch.nan  # who looks at it fails
    own.benchmark(
        lambda: nc_benchmark(train, test, 3, task_labels=False, shuffle=False), name="mine"
    )
    made = make_benchmark("mine", "class", validation=True)
    assert [len(e.dataset) for e in made.train_stream] == [16] * 3
    assert [len(e.dataset) for e in made.test_stream] == [4] * 3
    held = torch.stack([x for e in made.test_stream for x, *_ in e.dataset])
    kept = torch.stack([x for e in made.train_stream for x, *_ in e.dataset])
    assert not (held[:, None] == kept[None]).flatten(2).all(2).any()
    assert run(small("classp", validation=True))["average_accuracy"] >= 0


def test_a_task_stream_has_a_head_for_each_task():
    own.benchmark(
        lambda: stream(task_labels=True, class_ids_from_zero_in_each_exp=True),
        name="mine",
        scenario="task",
        model=own.model(net) and net,
    )
    result = run(small("classp", scenario="task", epochs=5))
    assert len(result["confusion_matrix"]) == 2


def test_the_space_of_a_method_without_one_is_its_lr():
    class Trial:
        def suggest_float(self, name, low, high, log):
            return (name, low, high, log)

    own.method(sgd, name="a", defaults={"lr": 0.1, "momentum": 0.5})
    own.method(sgd, name="b", defaults={"momentum": 0.5})
    assert METHODS["a"].space(Trial()) == {"lr": ("lr", 1e-5, 1.0, True)}
    assert METHODS["b"].space(Trial()) == {}
    with pytest.raises(UserError, match=r"defaults\['lr'\] must be a number, true or false"):
        own.method(sgd, name="c", defaults={"lr": "0.1"})


# Files

FILE = textwrap.dedent(
    """
    import torch
    from torch import nn
    from avalanche.benchmarks import nc_benchmark
    from avalanche.training import Naive
    from torch.utils.data import TensorDataset
    from avalanche_classp.experiments import benchmark, method, model

    def data(count):
        targets = torch.arange(count) % 4
        data = TensorDataset(torch.eye(4)[targets], targets)
        data.targets = targets.tolist()
        return data

    @model
    def line(classes):
        return nn.Linear(4, classes)

    @benchmark(model=line, epochs=1)
    def lines():
        return nc_benchmark(data(40), data(20), 2, task_labels=False, shuffle=False)

    @method(defaults={"lr": 0.1})
    def plain(model, hyper, common):
        return Naive(model=model, optimizer=torch.optim.SGD(model.parameters(), **hyper), **common)
    """
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_stream.py"
    path.write_text(FILE)
    return path


def test_a_loaded_file_is_executed_once_and_declares_here(file):
    loading.load_files([file])
    function = BENCHMARKS["lines"].origin
    assert function.__module__ == "loaded_my_stream"
    loading.load_files([file, file.parent / "." / file.name])
    assert BENCHMARKS["lines"].origin is function
    config = make_config("lines", "class", "plain")
    assert loading.code_of(config) == {"my_stream.py": loading.LOADED[file.resolve()]}
    assert loading.code_of(make_config("split-digits", "class", "naive")) == {}


@parametrize(
    ("content", "message"),
    [
        (None, "error: cannot read --load my_stream.py: No such file or directory"),
        ("x = 1\ny = x / 0", "my_stream.py: ZeroDivisionError: division by zero (line 2)"),
        ("x = (", "my_stream.py: SyntaxError: '(' was never closed (my_stream.py, line 1)"),
        ("raise SystemExit(3)", "my_stream.py: SystemExit: 3 (line 1)"),
        ("x = 1", "declares nothing; decorate with @benchmark, @model or @method"),
        (
            "from avalanche_classp.experiments import model\n@model(name='cnn')\ndef f(): pass",
            "the model name 'cnn' is taken by a built-in one; give another name= (line 2)",
        ),
        (b"\x00\xff", "my_stream.py: "),
    ],
)
def test_a_file_that_cannot_be_loaded_is_told_in_a_line(
    content, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "my_stream.py").write_bytes(data)
    assert main(["list", "--load", "my_stream.py"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert "loaded_my_stream" not in sys.modules


def test_list_shows_what_a_file_declares(file, capsys):
    assert main(["list", f"--load={file}"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in ("lines", "line", "plain"))


@pytest.mark.slow
def test_commands_know_what_a_file_declares_and_so_do_their_processes(file, tmp_path, capsys):
    words = ["--load", str(file), "--benchmark", "lines", "--output", str(tmp_path / "out")]
    words += ["--methods", "plain", "classp"]
    assert main(["search", *words, "--trials", "2", "--tuning-seeds", "1", "--jobs", "2"]) == 0
    assert main(["compare", *words, "--seeds", "2", "--jobs", "2"]) == 0
    records = Results(tmp_path / "out").load()
    assert len(records) == 4
    assert all(record["code"] == {file.name: loading.LOADED[file]} for record in records)
    assert "lines, class-incremental" in capsys.readouterr().out
    # The file is changed: what is there is kept, and one line says so.
    loading.LOADED[file] = "other"
    assert main(["compare", *words, "--seeds", "2"]) == 0
    assert "note: 4 finished runs" in capsys.readouterr().err
    assert main(["report", "--load", str(file), str(tmp_path / "out")]) == 0


def test_a_config_file_can_name_files(file, tmp_path, capsys):
    config = tmp_path / "a.toml"
    config.write_text(f'load = ["{file}"]\nbenchmark = "lines"\nmethod = "plain"\n')
    words = ["run", "--config", str(config), "--output", str(tmp_path / "out"), "--no-tensorboard"]
    assert main(words) == 0
    (record,) = Results(tmp_path / "out").load()
    assert RunConfig.from_dict(record["config"]).method == "plain"
    assert f"--load={file}" in record["command"]
