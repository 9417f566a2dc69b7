"""What the README and the results' README promise."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from avalanche.benchmarks.datasets import default_dataset_location

from avalanche_classp import CLASSPOptimizer
from experiments.cli import Compare, parse
from experiments.protocol.tuned_settings import place_of
from experiments.reporting.side_by_side import side_by_side
from experiments.reporting.tables import markdown_table, table_rows
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
SENSITIVITIES = sorted(table.parent for table in RESULTS.glob("ablation/*/sensitivity.csv"))


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
def test_the_examples_run_as_printed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, checkpoints, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    names = {}
    exec(first, names)
    accuracy = names["strategy"].evaluator.get_last_metrics()
    assert accuracy["Top1_Acc_Stream/eval_phase/test_stream/Task000"] > 0.3
    exec(checkpoints, names)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    exec(second, names)
    names["strategy"].plugins[0].take_over(names["strategy"])
    (group,) = names["strategy"].optimizer.param_groups
    assert isinstance(names["strategy"].optimizer, CLASSPOptimizer)
    assert (group["lr"], group["threshold"]) == (1e-3, 1e-6)


@pytest.mark.skipif(
    not (Path(default_dataset_location("mnist")) / "MNIST" / "raw").is_dir(),
    reason="MNIST is not in Avalanche's default folder",
)
def test_the_example_with_mnist_runs():
    *_, third = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(third, names)
    assert len(names["benchmark"].train_stream) == 5


def test_the_config_file_of_the_readme_is_understood(tmp_path):
    (content,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
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


@pytest.mark.parametrize("folder", COMPARISONS + ABLATIONS, ids=lambda folder: folder.name)
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
