"""The experiments: runs, comparisons, reports, and what a user can get wrong."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import avalanche.training
import numpy as np
import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import (
    accuracy_metrics,
    bwt_metrics,
    forgetting_metrics,
    forward_transfer_metrics,
)
from avalanche.models import SimpleMLP
from avalanche.training.plugins import EvaluationPlugin
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from small_data import small_config, without_times, write_mnist
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_classp import CLASSP
from experiments.cli import main
from experiments.errors import DivergedError, UserError
from experiments.protocol.benchmarks import BENCHMARKS, SCENARIOS
from experiments.protocol.config import RunConfig, parse_value
from experiments.protocol.methods import METHODS
from experiments.protocol.tuned_settings import (
    SETTINGS_FILE,
    Setting,
    _settings,
    adopt,
    make_config,
    searched_setting,
    source_of,
)
from experiments.running.records import Results
from experiments.running.run import run
from experiments.tuning import defaults, sensitivity
from experiments.tuning import subset_ranking as share
from experiments.tuning.search import search

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


@pytest.fixture(scope="module")
def results():
    """One quick result for each method."""
    return {method: run(small_config(method)) for method in METHODS}


# Runs


def test_a_run_equals_a_plain_avalanche_script():
    """No code of the experiments but the numbers in the config: the accuracy matrix is the same."""
    own = {"lr": 0.003, "threshold": 1e-6, "epsilon": 1e-4, "power": 1.5}
    hyper = {**METHODS["classp"].defaults, **own}
    ours = run(small_config(hyper=hyper, epochs=2, seed=3))

    torch.manual_seed(3)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 8 - 1, dtype=torch.float32), torch.tensor(labels)
    train, test = train_test_split(range(len(y)), test_size=0.3, random_state=0, stratify=y)
    benchmark = nc_benchmark(
        TensorDataset(x[train], y[train]),
        TensorDataset(x[test], y[test]),
        n_experiences=5,
        task_labels=False,
        fixed_class_order=list(range(10)),
    )
    evaluator = EvaluationPlugin(
        accuracy_metrics(experience=True),
        forgetting_metrics(stream=True),
        bwt_metrics(stream=True),
        forward_transfer_metrics(stream=True),
        loggers=[],
    )
    strategy = CLASSP(
        model=SimpleMLP(10, 64, hidden_size=256, hidden_layers=2, drop_rate=0.0),
        criterion=nn.CrossEntropyLoss(),
        lr=0.003,
        threshold=1e-6,
        epsilon=1e-4,
        power=1.5,
        train_mb_size=64,
        train_epochs=2,
        eval_mb_size=512,
        evaluator=evaluator,
        eval_every=0,
    )
    strategy.eval(benchmark.test_stream)
    matrix = []
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        metrics = strategy.eval(benchmark.test_stream)
        name = "Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp00"
        matrix.append([metrics[f"{name}{i}"] for i in range(5)])
    assert ours["accuracy_matrix"] == matrix
    assert ours["average_accuracy"] == pytest.approx(np.mean(matrix[-1]))
    for key, name in (
        ("forgetting", "StreamForgetting"),
        ("backward_transfer", "StreamBWT"),
        ("forward_transfer", "StreamForwardTransfer"),
    ):
        assert ours[key] == metrics[f"{name}/eval_phase/test_stream"]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_config_gives_the_same_numbers(method, results):
    assert without_times(run(small_config(method))) == without_times(results[method])


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"joint"}))
def test_what_is_made_of_the_matrix_follows_its_definition(method, results):
    """Avalanche's metrics, and our own learning accuracy, by hand from the accuracies."""
    result = results[method]
    matrix, initial = np.array(result["accuracy_matrix"]), np.array(result["initial_accuracies"])
    assert matrix.shape == (5, 5)
    learnt = np.diag(matrix)
    before = np.diag(matrix[:-1, 1:])  # of an experience, just before training on it
    assert result["average_accuracy"] == pytest.approx(matrix[-1].mean())
    assert result["learning_accuracy"] == pytest.approx(learnt.mean())
    assert result["forgetting"] == pytest.approx((learnt - matrix[-1])[:-1].mean())
    assert result["backward_transfer"] == pytest.approx((matrix[-1] - learnt)[:-1].mean())
    assert result["forward_transfer"] == pytest.approx((before - initial[1:]).mean())


def test_times_and_memory_are_measured(results):
    for method, result in results.items():
        trained, evaluated = result["train_seconds"], result["eval_seconds"]
        assert len(trained) == (1 if method == "joint" else 5)
        assert len(evaluated) == (2 if method == "joint" else 6)
        assert min(trained + evaluated) > 0
        assert sum(trained) + sum(evaluated) < result["wall_seconds"]
        assert result["seconds_per_experience"] == pytest.approx(sum(trained) / 5)
        # Python with torch takes more than 100 MiB, and there is not more than the machine has.
        most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert 100 * 2**20 < result["peak_memory_bytes"] < most
        assert result["peak_device_bytes"] is None


def test_peak_memory_sees_what_a_run_takes(monkeypatch):
    """A run that holds 300 MiB more for a moment has a peak of about as much more."""
    usual = run(small_config("naive"))["peak_memory_bytes"]
    train = avalanche.training.Naive.train

    def greedy(self, *args, **kwargs):
        held = torch.ones(300 * 2**20 // 4)
        time.sleep(0.2)
        del held
        return train(self, *args, **kwargs)

    monkeypatch.setattr(avalanche.training.Naive, "train", greedy)
    peak = run(small_config("naive"))["peak_memory_bytes"]
    assert peak - usual == pytest.approx(300 * 2**20, rel=0.3)


def test_joint_training_is_evaluated_once_and_forgets_nothing(results):
    assert np.shape(results["joint"]["accuracy_matrix"]) == (1, 5)
    for key in ("forgetting", "backward_transfer", "forward_transfer", "learning_accuracy"):
        assert results["joint"][key] is None
    assert results["joint"]["average_accuracy"] > 0.7 > results["naive"]["average_accuracy"]


def test_the_confusion_matrix_counts_the_test_data(results):
    counts = np.array(results["naive"]["confusion_matrix"])
    assert counts.sum() == 540
    correct = np.trace(counts) / counts.sum()
    assert correct == pytest.approx(results["naive"]["average_accuracy"], abs=0.02)


@pytest.mark.parametrize(
    ("method", "bytes_per_parameter"),
    [("naive", [0] * 5), ("classp", [4] * 5), ("ewc", [8, 16, 24, 32, 40]), ("joint", [0])],
)
def test_state_is_counted_to_the_byte(method, bytes_per_parameter, results):
    """EWC keeps the weights and their importances for each experience."""
    parameters = results[method]["parameters"]
    assert results[method]["state_bytes"] == [n * parameters for n in bytes_per_parameter]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_in_every_scenario(method, scenario, validation):
    result = run(small_config(method, scenario, validation=validation, train_share=1.0))
    assert 0 < result["average_accuracy"] <= 1
    json.dumps(result)


# Configs and settings


def test_configs_are_frozen_and_survive_json():
    config = small_config(hyper={"lr": 0.1, "power": 2.0})
    with pytest.raises(AttributeError):
        config.seed = 1
    with pytest.raises(TypeError):
        config.hyper["lr"] = 1
    again = RunConfig.from_dict(json.loads(json.dumps(config.as_dict())))
    assert again == config
    assert again.key() == config.key() != small_config(seed=1).key()


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("seed", -1, "-1"),
        ("epochs", 0, "0"),
        ("epochs", (2, 0), "0"),
        ("epochs", (), "none"),
        ("experiences", 0, "0"),
        ("batch_size", 1.5, "1.5"),
        ("train_share", 0.5, "0.5"),
    ],
)
def test_configs_refuse_wrong_values(name, value, shown):
    with pytest.raises(UserError, match=f"{name} must be .*got {shown}"):
        small_config(**{name: value})


def test_several_epochs_survive_json_and_are_for_one_experience_each():
    config = small_config(epochs=(3, 1))
    again = RunConfig.from_dict(json.loads(json.dumps(config.as_dict())))
    assert again == config
    assert again.key() == config.key()
    assert [again.epochs_in(i) for i in range(4)] == [3, 1, 1, 1]


def test_the_epochs_of_each_experience_are_trained():
    """By the number of steps that Avalanche's clock has counted after each experience."""
    steps = []
    train = avalanche.training.Naive.train

    def counting(self, *args, **kwargs):
        train(self, *args, **kwargs)
        steps.append(self.clock.train_iterations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(avalanche.training.Naive, "train", counting)
        run(small_config("naive", epochs=(3, 1), batch_size=1000))
    assert steps == [3, 4, 5, 6, 7]  # each experience is one mini-batch


def test_a_result_says_where_its_setting_comes_from():
    searched = make_config("split-digits", "class", "classp")
    assert source_of(searched) == "searched"
    assert source_of(make_config("split-digits", "class", "classp", seed=7)) == "searched"
    assert source_of(make_config("split-digits", "class", "classp", hyper={"lr": 0.5})) == "given"
    assert source_of(make_config("split-digits", "class", "classp", epochs=7)) == "given"
    unsearched = make_config("split-cifar100", "class", "replay")
    assert source_of(unsearched) == "default"


def test_a_setting_belongs_to_the_model_that_it_was_searched_with(tmp_path, monkeypatch, request):
    path = tmp_path / "settings.json"
    path.write_text(SETTINGS_FILE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr("experiments.protocol.tuned_settings.SETTINGS_FILE", path)
    _settings.cache_clear()
    request.addfinalizer(_settings.cache_clear)
    own = make_config("split-digits", "class", "classp")
    other = make_config("split-digits", "class", "classp", model="mlp-400")
    assert (source_of(own), source_of(other)) == ("searched", "transferred")
    assert other.hyper == own.hyper
    adopt("split-digits", "class", {"classp": Setting(3, 32, {"lr": 0.5})}, "mlp-400")
    after = make_config("split-digits", "class", "classp", model="mlp-400")
    assert (source_of(after), after.hyper["lr"], after.epochs) == ("searched", 0.5, 3)
    assert make_config("split-digits", "class", "classp") == own


def test_configs_refuse_unknown_keys():
    with pytest.raises(UserError, match="learning_rate"):
        RunConfig.from_dict({**small_config().as_dict(), "learning_rate": 1})
    with pytest.raises(UserError, match="naive has no hyper-parameter 'power'"):
        make_config("split-digits", "class", "naive", 0, {"power": 1})


SEARCHED = [
    *(("split-digits", scenario, (1, 3, 10)) for scenario in SCENARIOS),
    ("split-mnist", "class", (1, 2)),
    ("split-mnist", "task", (2, 8)),  # with --epochs-choices
]


@pytest.mark.parametrize(("benchmark", "scenario", "epochs"), SEARCHED)
@pytest.mark.parametrize("method", ["naive", "adagrad", "ewc", "classp", "joint"])
def test_every_method_has_searched_settings(benchmark, scenario, epochs, method):
    setting = searched_setting(benchmark, scenario, method)
    assert setting is not None
    assert setting.epochs in epochs
    assert set(setting.hyper) <= set(METHODS[method].defaults)


def test_values_are_parsed_as_their_default_is():
    assert parse_value("1e-3", 1.0, "lr") == 1e-3
    assert parse_value("FALSE", True, "apply_decay") is False
    assert parse_value("3", 1, "n") == 3
    for text, like in (("nan", 1.0), ("x", 1.0), ("1", True), ("1.5", 1)):
        with pytest.raises(UserError, match=f"key must be .*{text}"):
            parse_value(text, like, "key")


# The command line

TINY = ["--epochs", "1", "--batch-size", "256"]


def in_a_process(*words, **kwargs):
    command = [sys.executable, "-m", "experiments", *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def table_without_times(folder):
    with open(folder / "table.csv", encoding="utf-8") as file:
        return [
            {key: value for key, value in row.items() if "seconds" not in key and "peak" not in key}
            for row in csv.DictReader(file)
        ]


def test_compare_survives_a_kill_and_ends_in_the_same_table(tmp_path):
    words = ["compare", "--seeds", 2, "--methods", "naive", "ewc", "classp", *TINY]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = in_a_process(*words, "--output", killed)
    while process.poll() is None and len(Results(killed).load()) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = Results(killed).by_key()
    assert len(kept) >= 2

    assert main([*map(str, words), "--output", str(killed)]) == 0
    ended = Results(killed).by_key()
    assert all(ended[key]["wall_seconds"] == kept[key]["wall_seconds"] for key in kept)
    assert len(ended) == 6

    # One after the other in this process, for the same numbers as in parallel ones.
    for method in ("naive", "ewc", "classp"):
        for seed in (0, 1):
            one = ["run", "--method", method, "--seed", str(seed), "--output", str(whole), *TINY]
            assert main(one) == 0
    assert main(["report", str(whole)]) == 0
    assert table_without_times(killed) == table_without_times(whole)
    for name in ("table.md", "accuracy.png"):
        assert (killed / name).stat().st_size > 500


def test_compare_goes_on_after_a_failed_run_and_says_so(tmp_path, capsys):
    words = ["compare", "--seeds", "1", "--methods", "naive", "classp", *TINY]
    words += ["--set", "classp.lr=1e30", "--set", "classp.apply_decay=false"]
    words += ["--output", str(tmp_path), "--jobs", "1"]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert "naive" in captured.out
    assert "error: 1 of 2 runs failed: the training diverged" in captured.err
    (failure,) = [r for r in Results(tmp_path).load() if "error" in r]
    assert failure["config"]["method"] == "classp"
    assert (
        "**Failed:** classp, seed 0: the training diverged" in (tmp_path / "table.md").read_text()
    )

    # It is tried again, and the page made from the files alone is the same.
    page = (tmp_path / "table.md").read_text()
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").read_text() == page
    assert f"Made by `python -m experiments {' '.join(words)}`." in page


@pytest.mark.parametrize(
    "words",
    [
        ["--set", "lr=1e30", "--set", "apply_decay=false"],
        ["--method", "naive", "--set", "lr=1e39"],
        ["--device", "meta"],
    ],
)
def test_a_failed_run_is_one_line_and_recorded(words, tmp_path, capsys):
    assert main(["run", *words, *TINY, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    (failure,) = Results(tmp_path).load()
    assert failure["error"] in error


def test_ctrl_c_ends_in_one_line(tmp_path):
    process = in_a_process("compare", "--seeds", 20, "--output", tmp_path, start_new_session=True)
    while process.poll() is None and not Results(tmp_path).load():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith("interrupted: finished runs are saved")
    assert "Traceback" not in error
    Results(tmp_path).load()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("compare --benchmark split-mnits", "unknown benchmark 'split-mnits'"),
        ("compare --scenario instance", "unknown scenario 'instance'"),
        ("compare --methods naive sgd", "unknown method 'sgd'"),
        ("run --method ''", "unknown method"),
        ("run --model mlp", "unknown model 'mlp'; choose from mlp-256"),
        ("run --model cnn", "model 'cnn' takes images of 1 or 3 channels"),
        ("run --experiences 3", "split-digits cannot have 3 experiences"),
        ("run --benchmark permuted-mnist --scenario task", "has no scenario 'task'"),
        ("compare --ray-address 1.2.3.4:5", "--ray-address 1.2.3.4:5 is for --engine ray"),
        ("run --config none.toml", "cannot read --config none.toml: No such file or directory"),
        ("run --set lr", "--set lr: write KEY=VALUE"),
        ("run --set momentum=1", "classp has no hyper-parameter 'momentum'"),
        ("run --set lr=fast", "lr must be a finite number, got 'fast'"),
        ("run --set lr=nan", "lr must be a finite number, got 'nan'"),
        ("run --set lr=-1", "lr of classp must be at least 0, got -1.0"),
        ("run --set power=0", "classp: power must be finite and greater than 0"),
        ("compare --set lr=1", "write METHOD.KEY=VALUE"),
        ("compare --methods naive --set replay.lr=1", "'replay' is none of the methods compared"),
        ("run --device tpu", "device 'tpu' cannot be used here"),
        ("report no-such-folder", "there are no finished runs in no-such-folder"),
        ("search --methods sgd", "unknown method 'sgd'"),
        ("search --train-share 2", "train_share must be in (0, 1]"),
        ("run --seed 4294967296", "seed must be a whole number from 0 to 4294967295"),
        ("run --batch-size 99999999999999999999999", "batch_size must be a whole number"),
    ],
)
def test_wrong_input_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([word.strip("'") for word in words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        "",
        "train",
        "compare --seeds 0",
        "compare --seeds x",
        "run --seed -1",
        "run --x 1",
        "run --epochs 1,0",
        "compare --engine slurm",
    ],
)
def test_wrong_words_show_the_usage(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2
    assert "usage: python -m experiments" in capsys.readouterr().err


def test_a_config_file_says_what_the_command_line_can(tmp_path):
    """The same run, once from a file and once from words; the user's words are above the file."""
    path = tmp_path / "run.toml"
    path.write_text(
        'benchmark = "split-digits"\nscenario = "domain"\nmethods = ["naive", "classp"]\n'
        "seeds = 1\nepochs = [2, 1]\nbatch_size = 99\n"
        "[set.classp]\nlr = 0.5\napply_decay = false\nthreshold = 1e-6\n"
    )
    output = ["--output", str(tmp_path / "file"), "--batch-size", "256"]
    assert main(["compare", "--config", str(path), *output, "--set", "classp.lr=0.001"]) == 0
    words = ["compare", "--scenario", "domain", "--methods", "naive", "classp", "--seeds", "1"]
    words += ["--epochs", "2,1", "--batch-size", "256", "--output", str(tmp_path / "words")]
    words += ["--set", "classp.lr=0.001", "--set", "classp.apply_decay=false"]
    assert main([*words, "--set", "classp.threshold=1e-6"]) == 0
    file, word = (Results(tmp_path / name).load() for name in ("file", "words"))
    assert len(file) == 2
    for one, other in zip(file, word, strict=True):
        assert one["config"] == other["config"]
        assert one["average_accuracy"] == other["average_accuracy"]
        assert "--config" not in one["command"]  # the command alone gives it again
        assert "--set classp.apply_decay=false" in one["command"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seeds = ", "is no TOML file: Invalid value"),
        ("learning_rate = 1", "has the unknown key 'learning_rate'; known are benchmark, "),
        ("config = 'x'", "has the unknown key 'config'"),
        ("set = 1", "set must be a table of hyper-parameters, got 1"),
        ("seed = true", "seed must be a text or a number, or a list of them, got True"),
        ("benchmark = 'mnist'", "unknown benchmark 'mnist'"),
        ("[set]\nlr = 'fast'", "lr must be a finite number, got 'fast'"),
        ("[set]\nlr = [1]", "lr must be a finite number, got '[1]'"),
    ],
)
def test_a_wrong_config_file_is_one_line(content, message, tmp_path, capsys):
    path = tmp_path / "wrong.toml"
    path.write_text(content)
    assert main(["run", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_output_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert main(["run", "--method", "naive", *TINY, "--output", str(file)]) == 2
    assert f"error: cannot write {file}" in capsys.readouterr().err.splitlines()[-1]


def test_a_search_without_data_costs_no_trials(tmp_path, capsys):
    write_mnist(tmp_path)
    folder = tmp_path / "mnist" / "MNIST" / "raw"
    file = folder / "t10k-images-idx3-ubyte"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    words = [
        "search",
        "--benchmark",
        "split-mnist",
        "--methods",
        "naive",
        "--trials",
        "1",
        "--tuning-seeds",
        "1",
    ]
    words += ["--data-root", str(tmp_path), "--output", str(tmp_path), "--jobs", "1"]
    assert main(words) == 2
    assert "is damaged" in capsys.readouterr().err
    file.write_bytes(whole)
    assert main(words) == 0
    assert (tmp_path / "search" / "trials.csv").read_text().count("naive") == 1


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in (*BENCHMARKS, *SCENARIOS, *METHODS):
        assert f"\n  {name} " in out


def test_search_gives_every_method_its_trials_and_goes_on_where_it_stopped(tmp_path):
    words = ["search", "--methods", "naive", "classp", "--tuning-seeds", "1", "--jobs", "2"]
    words += ["--output", str(tmp_path), "--train-share", "0.2"]
    assert main([*words, "--trials", "2"]) == 0
    first = (tmp_path / "search" / "trials.csv").read_text().splitlines()
    assert main([*words, "--trials", "3"]) == 0
    with open(tmp_path / "search" / "trials.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["classp"] * 3 + ["naive"] * 3
    assert set(first) <= set((tmp_path / "search" / "trials.csv").read_text().splitlines())
    assert main([*words, "--scenario", "domain", "--trials", "3"]) == 2  # another search's folder
    settings = json.loads((tmp_path / "search" / "settings.json").read_text())
    best = max(rows[3:], key=lambda row: float(row["validation_accuracy"]))
    chosen = settings["split-digits/class"]["naive"]
    assert chosen["hyper"] == json.loads(best["hyper"])
    assert chosen["epochs"] == int(best["epochs"])


def test_search_takes_other_choices_of_epochs(tmp_path):
    words = ["search", "--methods", "naive", "--trials", "2", "--tuning-seeds", "1"]
    words += ["--train-share", "0.2", "--output", str(tmp_path)]
    assert main([*words, "--epochs-choices", "2"]) == 0
    with open(tmp_path / "search" / "trials.csv", encoding="utf-8") as file:
        assert [row["epochs"] for row in csv.DictReader(file)] == ["2", "2"]
    assert main([*words, "--epochs-choices", "4"]) == 2  # another search's folder


def test_search_runs_its_trials_on_the_device(tmp_path, monkeypatch):
    devices = []

    def note(config, *rest, **options):
        devices.append(config.device)
        return run(config, *rest, **options)

    monkeypatch.setattr("experiments.tuning.search.run", note)
    monkeypatch.setattr(
        "experiments.tuning.search.make_pool", lambda jobs: ThreadPoolExecutor(jobs)
    )
    words = ["search", "--methods", "naive", "--trials", "2", "--tuning-seeds", "1"]
    words += ["--output", str(tmp_path), "--train-share", "0.2"]
    assert main([*words, "--device", "cpu:0", "--finalists", "1", "--finalist-seeds", "1"]) == 0
    assert devices == ["cpu:0"] * 3


def test_search_cuts_hopeless_trials_short(tmp_path, monkeypatch):
    """One that is below the median of those that came as far; it counts, and goes on as one."""
    monkeypatch.setattr("experiments.tuning.search.FEWEST_TO_COMPARE", 1)
    ended = []
    monkeypatch.setattr(
        "experiments.tuning.search.run", lambda config, root, judge: _fake_run(config, judge, ended)
    )
    words = ["split-digits", "class", ["naive"], tmp_path, 12, 1, (1,), 32]
    monkeypatch.setattr(
        "experiments.tuning.search.make_pool", lambda jobs: ThreadPoolExecutor(jobs)
    )
    search(*words)
    with open(tmp_path / "trials.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    accuracies = [_fake_accuracy(json.loads(row["hyper"])["lr"]) for row in rows]
    whole: list[float] = []
    half_way: list[float] = []
    for row, accuracy in zip(rows, accuracies, strict=True):
        value = accuracy / 2
        cut = bool(half_way) and value < median(half_way)
        half_way.append(value)
        assert row["cut_after"] == ("2" if cut else "")
        assert row["validation_accuracy"] == ("" if cut else f"{accuracy / 5:.6f}")
        whole += [] if cut else [accuracy / 5]
    assert 1 < len(whole) < 12
    assert len(ended) == len(whole)


def test_search_runs_the_best_trials_with_more_seeds_and_chooses_by_all(tmp_path, monkeypatch):
    """What was best with the first seed fails with another."""
    seen = []

    def fake_run(config, root, judge=None):
        seen.append((config.seed, config.hyper["lr"]))
        if config.seed == 1002 and config.hyper["lr"] == lrs[0]:
            raise DivergedError("too fast")
        return {
            "average_accuracy": _fake_accuracy(config.hyper["lr"]) + 0.01 * (config.seed - 1000)
        }

    monkeypatch.setattr("experiments.tuning.search.run", fake_run)
    monkeypatch.setattr(
        "experiments.tuning.search.make_pool", lambda jobs: ThreadPoolExecutor(jobs)
    )
    words = ["split-digits", "class", ["naive"], tmp_path, 6, 1, (1,), 32]
    search(*words)
    lrs = sorted({lr for _, lr in seen}, key=_fake_accuracy, reverse=True)
    seen.clear()
    for _ in range(2):
        chosen = search(*words, finalists=2, finalist_seeds=2)
        assert sorted(seen) == sorted((seed, lr) for seed in (1001, 1002) for lr in lrs[:2])
    assert chosen["naive"].hyper["lr"] == lrs[1]
    with open(tmp_path / "trials.csv", encoding="utf-8") as file:
        rows = {json.loads(row["hyper"])["lr"]: row for row in csv.DictReader(file)}
    best, second = (_fake_accuracy(lr) for lr in lrs[:2])
    assert float(rows[lrs[0]]["all_seeds"]) == pytest.approx((2 * best + 0.01) / 3, abs=1e-6)
    assert float(rows[lrs[1]]["all_seeds"]) == pytest.approx(second + 0.01, abs=1e-6)
    assert {row["all_seeds"] for lr, row in rows.items() if lr not in lrs[:2]} == {""}


def test_finalists_have_all_of_the_data_and_are_judged_by_it_alone(tmp_path, monkeypatch):
    """With a part of it a faster rate is better."""

    def fake_run(config, root, judge=None):
        lr = config.hyper["lr"]
        return {"average_accuracy": _fake_accuracy(lr if config.train_share == 1 else lr / 10)}

    monkeypatch.setattr("experiments.tuning.search.run", fake_run)
    monkeypatch.setattr(
        "experiments.tuning.search.make_pool", lambda jobs: ThreadPoolExecutor(jobs)
    )
    words = ["split-digits", "class", ["naive"], tmp_path, 6, 1, (1,), 32]
    chosen = search(*words, train_share=0.5, finalists=6, finalist_seeds=1)
    with open(tmp_path / "trials.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rates = [json.loads(row["hyper"])["lr"] for row in rows]
    assert chosen["naive"].hyper["lr"] == max(rates, key=_fake_accuracy)
    assert chosen["naive"].hyper["lr"] != max(rates, key=lambda lr: _fake_accuracy(lr / 10))
    for rate, row in zip(rates, rows, strict=True):
        assert float(row["all_seeds"]) == pytest.approx(_fake_accuracy(rate), abs=1e-6)


def _fake_accuracy(lr):
    return 1 / (1 + abs(math.log10(lr) + 2))


def _fake_run(config, judge, ended):
    for i in range(1, 5):
        judge(i, lambda i=i: _fake_accuracy(config.hyper["lr"]) / i)
    ended.append(config)
    return {"average_accuracy": _fake_accuracy(config.hyper["lr"]) / 5}


def test_a_judge_is_told_the_mean_accuracy_so_far():
    """And a run that nobody judges ends with the same accuracies."""
    told = []
    config = small_config("classp", "class", validation=True)
    judged = run(config, judge=lambda i, measure: told.append((i, measure())))
    assert [experiences for experiences, _ in told] == [1, 2, 3, 4]
    assert all(0 <= accuracy <= 1 for _, accuracy in told)
    assert judged["accuracy_matrix"] == run(config)["accuracy_matrix"]


def test_sensitivity_varies_one_hyper_parameter_and_keeps_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sensitivity, "RATES", (0.5, 1e9))
    words = ["--benchmark", "split-digits", "--scenario", "domain", "--methods", "naive", "ewc"]
    words += ["--seeds", "2", "--jobs", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sensitivity, "FACTORS", (1e-30,))
    assert sensitivity.main(words) == 0
    searched = searched_setting("split-digits", "domain", "ewc").hyper
    with open(tmp_path / "sensitivity.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["key"], row["searched"], row["n"]) for row in rows] == [
        ("naive", "lr", "False", "2"),
        ("naive", "lr", "True", "2"),
        ("naive", "lr", "False", "0"),
        ("ewc", "ewc_lambda", "False", "2"),
        ("ewc", "ewc_lambda", "True", "2"),
        ("ewc", "lr", "False", "2"),
        ("ewc", "lr", "True", "2"),
        ("ewc", "lr", "False", "0"),
    ]
    runs = Results(tmp_path).load()
    assert len(runs) == 2 * 7  # ewc's searched setting ran once
    without_penalty = [
        100 * result["average_accuracy"]
        for result in runs
        if result["config"]["hyper"].get("ewc_lambda", 1) < 1e-20
    ]
    assert len(without_penalty) == 2
    assert float(rows[3]["value"]) == pytest.approx(1e-30 * searched["ewc_lambda"], rel=1e-5)
    assert float(rows[3]["average_accuracy"]) == pytest.approx(sum(without_penalty) / 2, rel=1e-5)
    difference = float(rows[3]["average_accuracy"]) - float(rows[4]["average_accuracy"])
    assert float(rows[3]["difference"]) == pytest.approx(difference, abs=1e-3)
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert "no run ended" in capsys.readouterr().out
    assert sensitivity.main([*words[:4], "--methods", "rwalk", "--output", str(tmp_path)]) == 2
    assert "nothing was searched for rwalk on split-digits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "words", "limit"),
    [
        (defaults, "--trials 0", "a whole number of at least 1"),
        (sensitivity, "--seeds 0", "a whole number of at least 1"),
        (sensitivity, "--seeds 1000000000", "at most 10000"),
        (sensitivity, "--jobs 0", "a whole number of at least 1"),
        (share, "folder --methods ewc --jobs 0", "a whole number of at least 1"),
    ],
)
def test_the_scripts_refuse_a_wrong_number_in_one_line(script, words, limit, capsys):
    with pytest.raises(SystemExit) as error:
        script.main(words.split())
    assert error.value.code == 2
    *_, option, value = words.split()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"argument {option}: must be {limit}, got {value}")


def test_trials_of_a_part_are_run_again_with_all_data(tmp_path, capsys):
    words = ["split-digits", "domain", ["naive"], tmp_path, 3, 1, (1,), 32]
    search(*words, train_share=0.2)
    for _ in range(2):
        assert share.main([str(tmp_path), "--methods", "naive", "--jobs", "1"]) == 0
        assert "naive: 3 trials, rank correlation" in capsys.readouterr().out
    with open(tmp_path / "trials.csv", encoding="utf-8") as file:
        trials = list(csv.DictReader(file))
    with open(tmp_path / "share.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, trial in zip(rows, trials, strict=True):
        assert float(row["part"]) == pytest.approx(float(trial["validation_accuracy"]), abs=1e-6)
        config = make_config(
            "split-digits",
            "domain",
            "naive",
            1000,
            json.loads(trial["hyper"]),
            epochs=1,
            validation=True,
        )
        assert float(row["whole"]) == run(config)["average_accuracy"]
    assert share.main([str(tmp_path), "--methods", "ewc"]) == 2
    assert "holds no search of ewc" in capsys.readouterr().err
    search("split-digits", "domain", ["si"], tmp_path, 1, 1, (1,), 32, train_share=0.2)
    assert share.main([str(tmp_path), "--methods", "si"]) == 2
    assert "no two trials of si" in capsys.readouterr().err
    search("split-digits", "domain", ["adam"], tmp_path / "all", 1, 1, (1,), 32)
    assert share.main([str(tmp_path / "all"), "--methods", "adam"]) == 2
    assert "with all of the data already" in capsys.readouterr().err


def test_what_a_choice_by_a_part_costs():
    """Ranks 1 2 3 4 become 1 2 4 3: 1 - 6 · 2 / (4 · 15) = 0.8 (Spearman)."""
    values = ((0.1, 0.2), (0.2, 0.3), (0.3, 0.9), (0.4, 0.8))
    rows = [{"method": "si", "part": part, "whole": whole} for part, whole in values]
    assert share.summary(rows) == (
        "si: 4 trials, rank correlation 0.80, the choice costs 10.0 points"
    )


def test_the_search_for_defaults_means_over_benchmarks_and_goes_on(tmp_path, monkeypatch, capsys):
    """A benchmark with three scenarios counts as much as one with one."""
    seen, lrs = [], []

    def fake_run(config, data_root):
        seen.append((config.benchmark, config.scenario, config.epochs, config.seed))
        lrs.append(config.hyper["lr"])
        if config.scenario == "task":
            raise DivergedError("too fast")
        return {"average_accuracy": config.hyper["lr"] if config.scenario == "class" else 0.75}

    places = {"split-digits": {"train_share": 0.5}, "permuted-mnist": {"experiences": 3}}
    monkeypatch.setattr(defaults, "run", fake_run)
    monkeypatch.setattr(defaults, "require_data", lambda *args: None)
    monkeypatch.setattr(defaults, "PLACES", places)
    words = ["--output", str(tmp_path)]
    for trials in (1, 3):
        assert defaults.main([*words, "--trials", str(trials)]) == 0
    assert len(seen) == 3 * 4  # the first trial was not done again
    searched = searched_setting("split-digits", "class", "classp").hyper
    assert lrs[0] == 0.01 and lrs[4] == searched["lr"]
    assert seen[:4] == [
        *(("split-digits", scenario, 10, 1000) for scenario in ("class", "domain", "task")),
        ("permuted-mnist", "domain", 1, 1000),
    ]
    with open(tmp_path / "defaults.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    for row in rows:
        lr = json.loads(row["hyper"])["lr"]
        assert float(row["mean_accuracy"]) == pytest.approx(((lr + 0.75 + 0) / 3 + 0.75) / 2)
        assert row["split-digits/task"] == "0.000000"
    best = max(rows, key=lambda row: float(row["mean_accuracy"]))
    assert capsys.readouterr().out.splitlines()[-1].endswith(best["hyper"])
    monkeypatch.setattr(defaults, "PLACES", {"split-digits": {}})
    assert defaults.main([*words, "--trials", "3"]) == 2
    assert "other benchmarks" in capsys.readouterr().err
    words = ["--output", str(tmp_path / "tried"), "--trials", "1", "--try"]
    for lr in ("-1", "nan", "1"):
        assert defaults.main([*words, lr, "1e-8", "1.5"]) == 2
        assert "outside of what is searched" in capsys.readouterr().err
    assert not (tmp_path / "tried").exists()
    assert defaults.main([*words, "1e-3", "1e-8", "1.5"]) == 0
    tried = json.loads(capsys.readouterr().out.split(" ", 1)[1])
    assert tried == {"lr": 1e-3, "threshold": 0.0, "epsilon": 1e-8, "power": 1.5}
