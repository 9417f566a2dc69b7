"""What the README and the results' README promise."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from avalanche_classp import CLASSPOptimizer
from experiments.cli import Compare, parse
from experiments.protocol.tuned_settings import place_of
from experiments.reporting.side_by_side import side_by_side
from experiments.reporting.tables import COLUMNS, cell, markdown_table, table_rows
from experiments.running.records import Results
from experiments.tuning.sensitivity import write_sensitivity

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + "".join(
    page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("**/*.md"))
)
RESULTS = ROOT / "experiments" / "results"
COMPARISONS = sorted(folder.parent for folder in RESULTS.glob("*/records.jsonl.gz"))
ABLATIONS = sorted(page.parent for page in RESULTS.glob("ablation/*/table.md"))
UNTUNED = [
    RESULTS / "untuned" / name
    for name in (
        *("split-mnist-class", "split-fmnist-class", "split-digits-class"),
        *("split-mnist-domain", "split-fmnist-domain", "permuted-mnist-domain"),
        *("split-mnist-task", "split-fmnist-task"),
    )
]
UNSEEN = RESULTS / "unseen" / "quarter-turns"
PRETRAINED = [
    RESULTS / "pretrained" / f"split-cifar10-class{loss}" for loss in ("", "-squared-error")
]
NEGATIVE = RESULTS / "negative"
NINE = ("naive", "adagrad", "adam", "ewc", "ewc-online", "si", "mas", "lwf", "rwalk")
SENSITIVITIES = sorted(table.parent for table in RESULTS.glob("ablation/*/sensitivity.csv"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Avalanche's own
def test_the_examples_run_as_printed(capsys):
    ten_lines, plugin = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (promised,) = re.findall(r"^    (\d+) % of all ten digits$", README, re.MULTILINE)
    (of_sgd,) = re.findall(r"`(torch\.optim\.SGD.*?)` in its place it is", README)
    (promised_of_sgd,) = re.findall(r"in its place it is (\d+) %", README)
    names = {}
    exec(ten_lines, names)
    with_sgd = re.sub(r"CLASSPOptimizer\(.*\)\n.*watch.*", of_sgd, ten_lines)
    exec(with_sgd, {})
    accuracy, accuracy_of_sgd = map(int, re.findall(r"(\d+) %", capsys.readouterr().out))
    assert accuracy == pytest.approx(int(promised), abs=5)
    assert accuracy_of_sgd == pytest.approx(int(promised_of_sgd), abs=5)
    exec(plugin, names)
    names["strategy"].plugins[0].take_over(names["strategy"])
    (group,) = names["strategy"].optimizer.param_groups
    assert isinstance(names["strategy"].optimizer, CLASSPOptimizer)
    assert (group["lr"], group["history"]) == (1.0, "inputs")


def test_the_readme_is_short():
    assert len(README.encode()) <= 9 * 1024


def test_the_table_of_the_readme_follows_from_the_result_files():
    for name, stream in (
        ("split-mnist-class", "MNIST, new classes"),
        ("split-fmnist-class", "Fashion-MNIST, new classes"),
        ("split-mnist-domain", "MNIST, same labels"),
        ("split-fmnist-domain", "Fashion-MNIST, same labels"),
        ("permuted-mnist-domain", "MNIST, permuted pixels"),
        ("split-mnist-task", "MNIST, a head each"),
    ):
        cells = accuracies(RESULTS / name)
        untuned = accuracies(RESULTS / "untuned" / name)
        best = max(NINE, key=lambda method: float(cells[method].split()[0]))
        fixed = f"ridge {untuned['ridge']}" if "ridge" in untuned else "–"
        expected = (
            f"| {stream} | {best} {cells[best]} | {cells['classp']} | {cells['classp-matrix']} | "
            f"{untuned['classp-inputs']} | {fixed} |"
        )
        assert expected in README
    of_owm = [accuracies(folder)["owm"] for folder in UNTUNED[:2]]
    assert f"OWM, untuned, has {of_owm[0]} and {of_owm[1]} there" in " ".join(README.split())


def accuracies(folder):
    """Return the accuracies of a comparison by method, as tables show them."""
    return {row["method"]: accuracy(row) for row in table_rows(Results(folder).load())}


def test_the_margins_of_the_docs_follow_from_the_result_files():
    """docs/results.md: how far the extension is ahead of the next baseline, paired by seed."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    margins = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(margins) == 9
    for name, margin in margins:
        rows = {row["method"]: row for row in table_rows(Results(RESULTS / name).load())}
        differences = [rows[method]["extension_difference"] for method in NINE]
        mean = max(mean for mean, _half in differences)
        assert f"{-mean:.1f}" == margin
        assert all(mean + half < 0 for mean, half in differences), name


def accuracy(row):
    (column,) = (column for column in COLUMNS if column.key == "average_accuracy")
    return cell(column, row[column.key])


def test_what_a_learning_rate_twice_as_large_costs():
    """README and docs/choosing.md: half of the searched lr, it, and twice as much."""
    table = (RESULTS / "ablation" / "sensitivity-split-mnist-class" / "sensitivity.csv").read_text()
    rows = [row for row in csv.DictReader(table.splitlines()) if row["key"] == "lr"]
    for method in ("adagrad", "classp", "classp-matrix"):
        values = [float(row["average_accuracy"]) for row in rows if row["method"] == method]
        half, searched, twice = (f"{value:.1f}" for value in values[1:4])
        assert re.search(rf"\| `{method}`.* \| {half} \| {searched} \| {twice} \|", PAGES)
    lost = [
        -float(row["difference"])
        for row in rows
        if row["method"].startswith("classp") and 1.5 < ratio(row, rows) < 3
    ]
    assert (
        f"twice the searched one costs {lost[0]:.0f} points (paper's rule) and {lost[1]:.0f}"
        in (README)
    )


def ratio(row, rows):
    (searched,) = (r for r in rows if r["method"] == row["method"] and r["searched"] == "True")
    return float(row["value"]) / float(searched["value"])


def test_the_config_file_of_the_docs_is_understood(tmp_path):
    (content,) = re.findall(r"```toml\n(.*?)```", PAGES, re.DOTALL)
    path = tmp_path / "permuted.toml"
    path.write_text(content)
    options, _ = parse(["compare", "--config", str(path), "--epochs", "2"])
    assert isinstance(options, Compare)
    assert (options.benchmark, options.seeds, options.epochs) == ("permuted-mnist", 5, 2)
    assert options.set == ("classp.lr=0.03", "classp.threshold=1e-06")


def test_the_update_rule_of_the_readme_is_the_optimizers():
    """The README's rule, by hand, on one weight."""
    assert "if g² > threshold:" in README
    assert "A ← A + |g|^power " in README
    assert "w ← w − lr · g / (epsilon + A)^(1/power) " in README
    w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = CLASSPOptimizer([w], lr=0.1, threshold=0.01, epsilon=0.5, power=1.5)
    a, expected = 0.0, 1.0
    for g in (0.3, 0.05, -0.7):
        w.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        if g**2 > 0.01:
            a += abs(g) ** 1.5
            expected -= 0.1 * g / (0.5 + a) ** (1 / 1.5)
    assert w.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "folder",
    [*COMPARISONS, *ABLATIONS, *UNTUNED, *PRETRAINED, UNSEEN, NEGATIVE / "same-lr"],
    ids=lambda folder: folder.name,
)
def test_published_tables_follow_from_the_result_files(folder):
    results = Results(folder).load()
    searched = any(result["setting"] == "searched" for result in results)
    assert len({result["config"]["seed"] for result in results}) >= (5 if searched else 2)
    assert not any(result["config"]["validation"] for result in results)
    table = markdown_table(table_rows(results))
    page = (folder / "table.md").read_text(encoding="utf-8")
    assert table in page
    assert re.search(r"Made by `python -m experiments compare .*`", page)


@pytest.mark.parametrize("folder", SENSITIVITIES, ids=lambda folder: folder.name)
def test_published_sensitivities_follow_from_the_result_files(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / folder.name)
    published = (copy / "sensitivity.csv").read_text(encoding="utf-8")
    methods = dict.fromkeys(row["method"] for row in csv.DictReader(published.splitlines()))
    config = Results(copy).load()[0]["config"]
    assert not config["validation"]
    write_sensitivity(config["benchmark"], config["scenario"], list(methods), output=copy)
    assert (copy / "sensitivity.csv").read_text(encoding="utf-8") == published
    assert len(Results(copy).load()) == len(Results(folder).load())


def test_the_readme_or_the_docs_show_the_main_tables():
    names = [
        *("split-mnist-class", "split-mnist-domain", "split-mnist-task", "permuted-mnist-domain"),
        *("split-fmnist-class", "split-fmnist-domain", "split-fmnist-task", "mnist-fmnist-domain"),
        *("split-cifar10-task", "split-cifar10-class"),
    ]
    for table in side_by_side([RESULTS / name for name in names]):
        assert table in PAGES


def test_the_docs_show_what_is_untuned():
    assert side_by_side(UNTUNED)[0].strip() in PAGES
    assert side_by_side([UNSEEN])[0].strip() in PAGES
    assert side_by_side(PRETRAINED)[0].strip() in PAGES
    last = {r["config"]["method"]: r["state_bytes"][-1] / 1e6 for r in Results(UNTUNED[0]).load()}
    sizes = (
        f"{last['classp-inputs']:.1f} MB (ridge {last['ridge']:.1f}, streaming LDA "
        f"{last['slda']:.1f}, OWM {last['owm']:.1f}; MNIST)"
    )
    assert sizes in " ".join(PAGES.split())


def test_the_docs_show_the_negative_result():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert side_by_side([NEGATIVE / "same-lr"])[0] in page
    rows = {row["method"]: row for row in table_rows(Results(NEGATIVE / "same-lr").load())}
    adam, classp = rows["adam"], rows["classp"]
    mean, half = adam["difference"]
    assert f"Adam is {mean:.1f} ± {half:.1f} points ahead" in page
    assert f"Adam learns {adam['learning_accuracy'][0]:.1f} %" in page
    assert f"forgets {adam['forgetting'][0]:.1f} points of it" in page
    assert f"forgets {classp['forgetting'][0]:.1f} points and learns" in page
    assert f"learns {classp['learning_accuracy'][0]:.1f} %" in page
    with open(NEGATIVE / "search" / "trials.csv", encoding="utf-8") as file:
        trials = [row for row in csv.DictReader(file) if row["validation_accuracy"]]
    best = {
        method: max(
            float(row["validation_accuracy"])
            for row in trials
            if row["method"] == method and int(row["trial"]) < 10
        )
        for method in ("classp", "adagrad", "adam")
    }
    assert f"The best are {100 * best['classp']:.1f} % (`classp`" in page
    assert f"{100 * best['adagrad']:.1f} (`adagrad`" in page
    assert f"{100 * best['adam']:.1f} (`adam`" in page
    assert best["adam"] == max(
        float(row["validation_accuracy"]) for row in trials if row["method"] == "adam"
    )


@pytest.mark.parametrize("folder", COMPARISONS, ids=lambda folder: folder.name)
def test_published_runs_use_the_settings_that_the_search_chose(folder):
    chosen = json.loads((ROOT / "experiments" / "protocol" / "tuned_settings.json").read_text())
    results = Results(folder).load()
    for result in results:
        config = result["config"]
        place = place_of(config["benchmark"], config["scenario"], config["model"])
        if place not in chosen:
            assert result["setting"] != "searched"
            continue
        assert result["setting"] == "searched"
        setting = chosen[place][config["method"]]
        assert setting["hyper"].items() <= config["hyper"].items()
        assert (setting["epochs"], setting["batch_size"]) == (
            config["epochs"],
            config["batch_size"],
        )


def test_every_key_of_a_result_is_explained():
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    for key in Results(COMPARISONS[0]).load()[0]:
        assert f"`{key}`" in text
