"""The pages of the docs: links lead somewhere, code runs, the site builds without a warning."""

import importlib.util
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.datasets import default_dataset_location
from avalanche.models import SimpleMLP
from torch.utils.data import TensorDataset

from avalanche_classp import CLASSP
from experiments.cli import parse

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MNIST = Path(default_dataset_location("mnist")) / "MNIST" / "raw"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
CODE = {page: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in PAGES[1:]}


def anchors(page):
    """Return the anchors of a page's headings, as MyST makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor and target.name == "protocol.md":  # it includes another file
            target = ROOT / "experiments" / "results" / "README.md"
        if anchor:
            assert anchor in anchors(target), link


def small_benchmark():
    data = TensorDataset(torch.randn(40, 784), torch.arange(40) % 10)
    return nc_benchmark(data, data, n_experiences=2, task_labels=False)


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
@pytest.mark.parametrize("page", [page for page in CODE if CODE[page]], ids=lambda page: page.stem)
def test_code_in_the_docs_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = SimpleMLP()
    names = {
        "torch": torch,
        "benchmark": small_benchmark(),
        "model": model,
        "strategy": CLASSP(model=model, train_mb_size=8),
    }
    for block in CODE[page]:
        if "SplitMNIST" in block and not MNIST.is_dir():
            pytest.skip("MNIST is not in Avalanche's default folder")
        exec(block, names)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


@pytest.mark.slow
def test_the_notebook_runs_and_ends_in_a_figure(monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stored = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zmq and asyncio
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    assert "image/png" in outputs(notebook)[-1]["data"]
    accuracies = [
        [
            float(accuracy)
            for output in outputs(which)
            for accuracy in re.findall(r"on all ten digits: (\d+) %", output.get("text", ""))
        ]
        for which in (stored, notebook)
    ]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=5)
    assert len(accuracies[0]) == 2


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "myst_nb", "furo", "latex2mathml"):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed: pip install '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "CLASSP" in page and 'href="tutorial.html"' in page


@pytest.mark.slow
def test_the_optimizer_needs_torch_alone():
    """README: `pip install --no-deps .` is enough where torch is installed."""
    code = """
import sys
for name in ("avalanche", "torchvision", "sklearn", "experiments"):
    sys.modules[name] = None
import torch
from avalanche_classp import CLASSPOptimizer
w = torch.nn.Parameter(torch.ones(3, 2))
for history in ("weights", "gradients"):
    w.grad = torch.ones(3, 2)
    CLASSPOptimizer([w], history=history).step()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


COMMANDS = [
    pytest.param(command, id=f"{page.parent.name}-{page.stem}-{number}")
    for page in [*PAGES, *sorted((ROOT / "experiments" / "results").glob("**/README.md"))]
    for number, command in enumerate(
        re.findall(
            r"`python -m experiments ([a-z][^`]*)`",
            page.read_text(encoding="utf-8"),
        )
        + re.findall(
            r"^    (?:.* && )?python -m experiments ([a-z].*)$",
            page.read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    )
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_docs_are_understood(command):
    places = {"$ALL": "naive classp", "$FIVE": "naive", "$HALF": "half", "SCENARIO": "class"}
    places["$STREAM"] = "--benchmark permuted-mnist"
    for name, value in places.items():
        command = command.replace(name, value)
    command = re.sub(r"=(RANK|FACTOR)\b", "=2", command.replace("EPOCHS", "1"))
    words = shlex.split(command)
    if "--config" in words:  # the file is not there
        del words[words.index("--config") : words.index("--config") + 2]
    parse([word for word in words if word != "..."])
