"""The wheel and the sdist: complete, accepted by an index, and of use without the clone."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import avalanche_classp

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*words, **options):
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the wheel and the sdist, built from a copy, so that the clone stays as it is."""
    for name in ("build", "twine"):
        pytest.importorskip(name)
    source = tmp_path_factory.mktemp("source") / "clone"
    ignored = shutil.ignore_patterns(".git", "results", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    run("-m", "build", "--no-isolation", "--outdir", source / "dist", source)
    (wheel,) = (source / "dist").glob("*.whl")
    (sdist,) = (source / "dist").glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_the_package_the_experiments_and_nothing_else(built):
    wheel, _ = built
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {
        f"{parent}{path.relative_to(ROOT)}"
        for top, parent in (("avalanche_classp", ""), ("experiments", "avalanche_classp/"))
        for path in (ROOT / top).rglob("*")
        if "results" not in path.parts
        and (
            path.suffix in (".py", ".cpp", ".typed")
            or path.name.endswith(("_settings.json", "report.html"))
        )
    }
    assert {name for name in names if ".dist-info/" not in name} == package


def test_an_index_would_take_both(built):
    assert run("-m", "twine", "check", "--strict", *built).count("PASSED") == 2


def test_both_have_the_one_version(built):
    version = avalanche_classp.__version__
    wheel, sdist = built
    assert wheel.name.startswith(f"avalanche_classp-{version}-")
    with tarfile.open(sdist) as archive:
        assert f"avalanche_classp-{version}/pyproject.toml" in archive.getnames()
    citation = ROOT / "CITATION.cff"
    if citation.is_file():
        assert f"\nversion: {version}\n" in citation.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(built, tmp_path_factory):
    """Return a folder in which the wheel alone is installed."""
    folder = tmp_path_factory.mktemp("installed") / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, built[0])
    return folder


def environment(*folders):
    return {"PYTHONPATH": ":".join(map(str, folders)), "PATH": "/usr/bin:/bin"}


def test_the_readmes_ten_lines_run_without_the_clone(site, tmp_path):
    ten_lines = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    where = "\nimport avalanche_classp\nprint(avalanche_classp.__file__)\n"
    output = run("-c", ten_lines + where, cwd=tmp_path, env=environment(site))
    assert "% of all ten digits" in output
    assert str(site) in output


OWN_MODEL = """
from torch import nn
from avalanche_classp.experiments import model

@model
def mine(classes):
    return nn.Linear(64, classes)
"""


def test_the_command_works_without_the_clone(site, tmp_path):
    (tmp_path / "mine.py").write_text(OWN_MODEL)
    options = {"cwd": tmp_path, "env": environment(site)}
    classp = site / "bin" / "classp"
    assert "split-digits" in run(classp, "list", **options)
    assert "\nusage: classp compare" in "\n" + run(classp, "compare", "--help", **options)
    words = [
        "--load",
        "mine.py",
        "--model",
        "mine",
        "--methods",
        "naive",
        "classp",
        "--seeds",
        "1",
        "--epochs",
        "1",
    ]
    output = run(classp, "compare", *words, "--jobs", "2", **options)
    assert "split-digits, class-incremental" in output
    folder = tmp_path / "results" / "split-digits-class"
    assert {"records.jsonl.gz", "report.html"} <= {path.name for path in folder.iterdir()}
    (line, _) = gzip.decompress((folder / "records.jsonl.gz").read_bytes()).splitlines()
    record = json.loads(line)
    assert record["commit"] is None and list(record["code"]) == ["mine.py"]
    assert record["command"].startswith("classp compare --load mine.py")
    code = "from avalanche_classp.experiments import compare; print(compare.__module__)"
    assert run("-c", code, **options) == "avalanche_classp.experiments.api\n"


def test_the_command_without_the_extra_says_which(site, tmp_path):
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError(\"No module named 'tyro'\")")
    done = subprocess.run(
        [sys.executable, str(site / "bin" / "classp"), "list"],
        env=environment(tmp_path, site),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    install = 'pip install "avalanche-classp[experiments]"'
    assert done.returncode == 2
    assert done.stderr == f"error: No module named 'tyro'; {install} brings it\n"
