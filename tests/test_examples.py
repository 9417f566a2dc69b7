"""The examples run as they stand and print what they say."""

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from avalanche.benchmarks.datasets import default_dataset_location

EXAMPLES = Path(__file__).parents[1] / "examples"
TOLERANCE = 6.0
"""How far a number may be from the printed one: other processors round otherwise."""

OF_THEIR_OWN = {"several_processes", "paper_experiment"}
NEEDS = {
    "with_lightning": ("lightning",),
    "with_accelerate": ("accelerate",),
    "with_trainer": ("transformers", "accelerate"),
    "with_peft": ("transformers", "peft"),
}
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def expected_lines(name):
    """Return the lines that the docstring promises."""
    docstring = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    block = docstring.split("Last lines")[1].split("\n\n", 1)[1]
    return [line.strip() for line in block.strip().splitlines()]


def assert_last_lines(name, output):
    expected = expected_lines(name)
    printed = [line.strip() for line in output.splitlines()][-len(expected) :]
    for line, promised in zip(printed, expected, strict=True):
        assert NUMBER.sub("0", line).split() == NUMBER.sub("0", promised).split()
        numbers, wanted = (map(float, NUMBER.findall(text)) for text in (line, promised))
        assert list(numbers) == pytest.approx(list(wanted), abs=TOLERANCE)


@pytest.mark.filterwarnings("ignore")  # Avalanche's and Lightning's own
@pytest.mark.parametrize(
    "name", sorted({path.stem for path in EXAMPLES.glob("*.py")} - OF_THEIR_OWN)
)
def test_an_example_prints_what_it_promises(name, capsys, tmp_path, monkeypatch):
    for package in NEEDS.get(name, ()):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed: pip install {package}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert_last_lines(name, capsys.readouterr().out)


@pytest.mark.slow
def test_the_example_with_several_processes():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "several_processes.py")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_last_lines("several_processes", done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(Path(default_dataset_location(name)).is_dir() for name in ("mnist", "fashionmnist")),
    reason="MNIST or Fashion-MNIST is not in Avalanche's default folder",
)
def test_the_papers_experiment(capsys, monkeypatch):
    root = Path(default_dataset_location("mnist")).parent
    words = ["paper_experiment", "--samples", "1000", "--data-root", str(root)]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(EXAMPLES / "paper_experiment.py"), run_name="__main__")
    assert_last_lines("paper_experiment", capsys.readouterr().out)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80
    assert expected_lines(path.stem)
