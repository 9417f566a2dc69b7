"""compare and tune from Python, with functions of the user's own."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.training import Naive
from torch import nn
from torch.utils.data import TensorDataset

import experiments
from experiments import compare, method, tune
from experiments.errors import UserError
from experiments.protocol.benchmarks import BENCHMARKS
from experiments.protocol.methods import METHODS
from experiments.protocol.models import MODELS
from experiments.protocol.tuned_settings import Setting

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


@pytest.fixture(autouse=True)
def as_before():
    """Take out what a test declares."""
    kept = (BENCHMARKS, MODELS, METHODS)
    before = [dict(entries) for entries in kept]
    yield
    for entries, old in zip(kept, before, strict=True):
        entries.clear()
        entries.update(old)


def easy(seed):
    def data(count):
        targets = torch.arange(count) % 4
        data = TensorDataset(torch.eye(4)[targets], targets)
        data.targets = targets.tolist()
        return data

    return nc_benchmark(data(80), data(20), 2, task_labels=False, seed=seed)


def net(classes):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes))


def sgd(model, hyper, common):
    return Naive(model=model, optimizer=torch.optim.SGD(model.parameters(), **hyper), **common)


def test_the_names_are_listed_and_others_refused():
    assert {"compare", "tune", "benchmark"} <= set(dir(experiments))
    with pytest.raises(AttributeError, match="has no attribute 'compute'"):
        _ = experiments.compute


@pytest.mark.slow
def test_functions_are_tuned_and_compared(tmp_path, capfd):
    mine = method(sgd, name="mine", defaults={"lr": 0.1})
    methods = ["naive", mine, "classp"]
    torch.set_num_threads(2)
    # With these threads a forked process would wait for ever.
    _ = torch.randn(600, 600) @ torch.randn(600, 600)
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    tuned = tune(easy, lambda classes: net(classes), methods, trials=2, tuning_seeds=1)
    assert set(tuned.settings) == {"naive", "mine", "classp"}
    assert list(tuned.ranking["validation_accuracy"]) == sorted(
        tuned.ranking["validation_accuracy"], reverse=True
    )
    compared = compare(easy, net, methods, seeds=2, settings=tuned.settings, output=tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    table = compared.table
    assert set(table["method"]) == {"naive", "mine", "classp"} and set(table["n"]) == {2}
    runs = [r["average_accuracy"] for r in compared.records if r["config"]["method"] == "mine"]
    mean = table.set_index("method")["average_accuracy"]["mine"]
    assert mean == pytest.approx(100 * sum(runs) / 2, abs=1e-3)
    config = compared.records[0]["config"]
    setting = tuned.settings[config["method"]]
    assert config["epochs"] == setting.epochs and setting.hyper.items() <= config["hyper"].items()
    assert (tmp_path / "report.html").exists()
    assert compared.report(tmp_path / "again").read_text().startswith("<!")
    assert set(compared.figures(tmp_path / "f")) == {p.name for p in (tmp_path / "f").iterdir()}
    assert "mine" in repr(compared) and "mine" in repr(tuned)
    # What is finished in a folder is not done again.
    capfd.readouterr()
    again = compare(easy, net, methods, seeds=2, settings=tuned.settings, output=tmp_path)
    assert again.table.equals(table) and "exp/s" not in capfd.readouterr().err


@pytest.mark.slow
def test_settings_by_hand_and_names_alone():
    settings = {"naive": {"lr": 0.5}, "classp": Setting(2, 16, {"lr": 0.01})}
    compared = compare(
        "split-digits", methods=["naive", "classp"], seeds=1, settings=settings, jobs=1
    )
    naive, classp = sorted(
        (r["config"] for r in compared.records), key=lambda config: -config["hyper"]["lr"]
    )
    assert naive["hyper"]["lr"] == 0.5 and naive["model"] == "mlp-256"
    assert (classp["epochs"], classp["batch_size"], classp["hyper"]["lr"]) == (2, 16, 0.01)


def test_a_run_that_fails_is_no_error_but_all_of_them_are():
    def broken(model, hyper, common):
        raise RuntimeError("broken on purpose")

    method(broken)
    compared = compare(easy, net, ["naive", "broken"], seeds=1, epochs=1)
    assert len(compared.records) == len(compared.failures) == 1
    with pytest.raises(UserError, match="no run succeeded: RuntimeError: broken on purpose"):
        compare(easy, net, ["broken"], seeds=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"benchmark": "split-digit"},
            "unknown benchmark 'split-digit'; did you mean split-digits",
        ),
        ({"model": "mlp"}, "unknown model 'mlp'"),
        ({"methods": ["naiv"]}, "unknown method 'naiv'; did you mean naive"),
        ({"methods": [sgd]}, "sgd is not declared; decorate it with @benchmark, @model or @method"),
        ({"settings": {"ewc": {}}}, "settings has 'ewc', which is none of the methods compared"),
        ({"settings": {"naive": {"rl": 1}}}, "naive has no hyper-parameter 'rl'; choose from lr"),
        ({"device": "cuda:77"}, "device 'cuda:77' cannot be used here"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(arguments, message):
    arguments = {"benchmark": "split-digits", "methods": ["naive"]} | arguments
    with pytest.raises(UserError, match=message):
        compare(**arguments)


def test_the_package_is_light_to_import():
    code = "import experiments, sys; assert not {'torch', 'avalanche', 'optuna'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
