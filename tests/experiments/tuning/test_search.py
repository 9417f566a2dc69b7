"""The search of settings: budgets, pruning, finalists, going on after an interruption."""

import csv
import json
import math
from statistics import median

import pytest
from small_data import in_this_process, write_mnist

from experiments.cli import main
from experiments.errors import DivergedError
from experiments.running.run import run
from experiments.tuning.search import search

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_search_holds_what_is_set_and_takes_another_loss(tmp_path, monkeypatch):
    configs = []

    def note(config, *rest, **options):
        configs.append(config)
        return run(config, *rest, **options)

    monkeypatch.setattr("experiments.tuning.search.run", note)
    monkeypatch.setattr("experiments.tuning.search.in_processes", in_this_process)
    words = ["search", "--methods", "ewc", "--trials", "2", "--tuning-seeds", "1"]
    words += ["--output", str(tmp_path), "--train-share", "0.2", "--loss", "squared-error"]
    assert main([*words, "--set", "ewc.ewc_lambda=7", "--finalists", "1"]) == 0
    assert {config.hyper["ewc_lambda"] for config in configs} == {7.0}
    assert {config.loss for config in configs} == {"squared-error"}
    assert len({config.hyper["lr"] for config in configs}) == 2
    assert main([*words, "--set", "ewc.ewc_lambda=8"]) == 2  # another search's folder


def test_search_runs_its_trials_on_the_device(tmp_path, monkeypatch):
    devices = []

    def note(config, *rest, **options):
        devices.append(config.device)
        return run(config, *rest, **options)

    monkeypatch.setattr("experiments.tuning.search.run", note)
    monkeypatch.setattr("experiments.tuning.search.in_processes", in_this_process)
    words = ["search", "--methods", "naive", "--trials", "2", "--tuning-seeds", "1"]
    words += ["--output", str(tmp_path), "--train-share", "0.2"]
    assert main([*words, "--device", "cpu:0", "--finalists", "1", "--finalist-seeds", "1"]) == 0
    assert devices == ["cpu:0"] * 3


def test_search_cuts_hopeless_trials_short(tmp_path, monkeypatch):
    """One that is below the median of those that came as far; it counts, and goes on as one."""
    monkeypatch.setattr("experiments.tuning.search.FEWEST_TO_COMPARE", 1)
    ended = []
    monkeypatch.setattr(
        "experiments.tuning.search.run",
        lambda config, root, report: _fake_run(config, report, ended),
    )
    words = ["split-digits", "class", ["naive"], tmp_path, 12, 1, (1,), 32]
    monkeypatch.setattr("experiments.tuning.search.in_processes", in_this_process)
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


def test_a_trial_is_compared_with_its_first_tuning_seed_alone(tmp_path, monkeypatch):
    told = []

    def fake_run(config, root, report):
        told.append((config.seed, report is not None))
        return {"average_accuracy": 0.5}

    monkeypatch.setattr("experiments.tuning.search.run", fake_run)
    monkeypatch.setattr("experiments.tuning.search.in_processes", in_this_process)
    search("split-digits", "class", ["naive"], tmp_path, 2, 2, (1,), 32)
    assert told == [(1000, True), (1001, False)] * 2


def test_search_runs_the_best_trials_with_more_seeds_and_chooses_by_all(tmp_path, monkeypatch):
    """What was best with the first seed fails with another."""
    seen = []

    def fake_run(config, root, report=None):
        seen.append((config.seed, config.hyper["lr"]))
        if config.seed == 1002 and config.hyper["lr"] == lrs[0]:
            raise DivergedError("too fast")
        return {
            "average_accuracy": _fake_accuracy(config.hyper["lr"]) + 0.01 * (config.seed - 1000)
        }

    monkeypatch.setattr("experiments.tuning.search.run", fake_run)
    monkeypatch.setattr("experiments.tuning.search.in_processes", in_this_process)
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


def test_finalists_have_all_of_the_data_and_are_chosen_by_it_alone(tmp_path, monkeypatch):
    """With a part of it a faster rate is better."""

    def fake_run(config, root, report=None):
        lr = config.hyper["lr"]
        return {"average_accuracy": _fake_accuracy(lr if config.train_share == 1 else lr / 10)}

    monkeypatch.setattr("experiments.tuning.search.run", fake_run)
    monkeypatch.setattr("experiments.tuning.search.in_processes", in_this_process)
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


def _fake_run(config, report, ended):
    for i in range(1, 5):
        report(i, lambda i=i: _fake_accuracy(config.hyper["lr"]) / i)
    ended.append(config)
    return {"average_accuracy": _fake_accuracy(config.hyper["lr"]) / 5}


def test_a_search_on_the_first_experience_leaves_what_it_cannot_see(tmp_path, monkeypatch, capsys):
    configs = []

    def fake_run(config, data_root, report):
        configs.append(config)
        return {"average_accuracy": 1.0 if config.hyper["lr"] > 1e-3 else 0.5}

    monkeypatch.setattr("experiments.tuning.search.run", fake_run)
    monkeypatch.setattr("experiments.tuning.search.in_processes", in_this_process)
    words = ["search", "--on", "first-experience", "--methods", "ewc", "--trials", "12"]
    assert main([*words, "--tuning-seeds", "1", "--output", str(tmp_path)]) == 0
    assert all(config.first_only and config.validation for config in configs)
    assert {config.hyper["ewc_lambda"] for config in configs} == {100.0}  # the default
    good = [config for config in configs if config.hyper["lr"] > 1e-3]
    fewest = min(config.epochs for config in good)
    lowest = min(config.hyper["lr"] for config in good if config.epochs == fewest)
    folder = tmp_path / "search-first-experience"
    (chosen,) = json.loads((folder / "settings.json").read_text())["split-digits/class"].values()
    assert chosen["hyper"] == {"lr": lowest}
    assert (chosen["epochs"], chosen["searched_on"]) == (fewest, "first-experience")
    printed = capsys.readouterr().out
    command = printed.splitlines()[-1].strip()
    assert command.endswith(
        f"run --method ewc --benchmark=split-digits --scenario=class --settings={folder}"
    )
    assert "100.0      12" in printed  # validation accuracy and trials
    assert main([*command.split("experiments ")[1].split(), "--dry-run"]) == 0
    assert f"lr={lowest:.4g}" in capsys.readouterr().out
    assert main(["list", "--settings", str(folder)]) == 0
    assert "(searched on the first experience of split-digits/class)" in capsys.readouterr().out
