"""The experiments: runs, comparisons, reports, and what a user can get wrong."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
from small_data import small_config, without_times
from torch import nn
from torch.utils.data import TensorDataset

import avalanche_classp
from avalanche_classp import CLASSP
from experiments.cli import main
from experiments.errors import UserError
from experiments.protocol.benchmarks import BENCHMARKS, SCENARIOS
from experiments.protocol.config import RunConfig, parse_value
from experiments.protocol.methods import METHODS, why_not
from experiments.protocol.tuned_settings import (
    SETTINGS_FILE,
    Setting,
    adopted,
    make_config,
    read_settings,
    searched_setting,
    source_of,
)
from experiments.running.records import Results
from experiments.running.run import run

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


OF_CLASSES = [method for method in METHODS if why_not(method, "class") is None]


@pytest.fixture(scope="module")
def results():
    """One quick result for each method that the scenario has."""
    return {method: run(small_config(method)) for method in OF_CLASSES}


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


@pytest.mark.slow
@pytest.mark.parametrize("method", OF_CLASSES)
def test_the_same_config_gives_the_same_numbers(method, results):
    assert without_times(run(small_config(method))) == without_times(results[method])


@pytest.mark.parametrize("method", sorted(set(OF_CLASSES) - {"joint"}))
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize(
    ("method", "scenario"),
    [(m, scenario) for m in METHODS for scenario in SCENARIOS if why_not(m, scenario) is None],
)
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
    read_settings.cache_clear()
    request.addfinalizer(read_settings.cache_clear)
    own = make_config("split-digits", "class", "classp")
    other = make_config("split-digits", "class", "classp", model="mlp-400")
    assert (source_of(own), source_of(other)) == ("searched", "transferred")
    assert other.hyper == own.hyper
    setting = {"classp": Setting(3, 32, {"lr": 0.5})}
    where, content = adopted("split-digits", "class", setting, "mlp-400")
    assert where == path
    path.write_text(content, encoding="utf-8")
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        (
            "compare --benchmark split-mnits",
            "unknown benchmark 'split-mnits'; did you mean split-mnist",
        ),
        ("compare --scenario instance", "unknown scenario 'instance'"),
        ("compare --methods naive sgd", "unknown method 'sgd'"),
        ("run --method ''", "unknown method"),
        ("run --model mlp", "unknown model 'mlp'; did you mean mlp-400 or mlp-256?"),
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
    ("words", "message"),
    [
        ("", "name a command; choose from compare, run, search"),
        ("train", "unknown command 'train'"),
        ("serch", "unknown command 'serch'; did you mean search?"),
        ("compare --seeds 0", "--seeds must be a whole number of at least 1, got 0"),
        ("compare --seeds x", "--seeds must be a whole number of at least 1, got x"),
        ("compare --seeds 10001", "--seeds must be at most 10000, got 10001"),
        ("run --seed -1", "--seed must be a whole number of at least 0, got -1"),
        ("run --seed", "--seed needs a value"),
        ("run --x 1", "unknown option '--x'; choose from --load, --benchmark"),
        ("run --sed 1", "unknown option '--sed'; did you mean --seed"),
        ("run --epochs 1,0", "--epochs must be a whole number of at least 1, got 0"),
        ("compare --engine slurm", "--engine must be local or ray, got 'slurm'"),
        ("compare --methods", "--methods needs a value"),
        ("report", "folder must be given"),
        ("report a b", "unknown option 'b'"),
        ("sensitivity --jobs 0", "--jobs must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_words_are_one_line_that_names_the_help(words, message, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    name = words.split()[0] if "command" not in message else ""
    help_ = " ".join(["python -m experiments", *([name] if name else []), "--help"])
    assert error.endswith(f"; `{help_}` explains it\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["compare --benchmark split-mnits", "run --method ewcc", "run --set lrr=1", "serch"]
)
def test_a_wrong_name_is_told_without_torch_or_avalanche(words):
    program = (
        "import sys\nfrom experiments.cli import main\n"
        f"assert main({words.split()!r}) == 2\n"
        "print([name for name in ('torch', 'avalanche', 'optuna') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
    assert "did you mean" in done.stderr


def test_help_names_commands_and_options(capsys):
    for words, shown in (
        (["--help"], ["compare", "subset-ranking", "side-by-side"]),
        (["compare", "--help"], ["--methods METHOD", "--set [METHOD.]KEY=VALUE", "(default: 3)"]),
        (["run", "--help"], ["--set KEY=VALUE", "--tensorboard, --no-tensorboard"]),
    ):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert all(text in out for text in shown)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"avalanche-classp {avalanche_classp.__version__}\n"


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
        ("learning_rate = 1", "has the unknown key 'learning_rate'; known are load, benchmark, "),
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


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in (*BENCHMARKS, *SCENARIOS, *METHODS):
        assert f"\n  {name} " in out


def test_the_mean_accuracy_so_far_is_reported():
    """And a run that reports nothing ends with the same accuracies."""
    told = []
    config = small_config("classp", "class", validation=True)
    reported = run(config, report=lambda i, measure: told.append((i, measure())))
    assert [experiences for experiences, _ in told] == [1, 2, 3, 4]
    assert all(0 <= accuracy <= 1 for _, accuracy in told)
    assert reported["accuracy_matrix"] == run(config)["accuracy_matrix"]
