"""The wheel and the sdist: complete, accepted by an index, and of use without the clone."""

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
        if path.suffix in (".py", ".cpp", ".typed") or path.name == "tuned_settings.json"
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


def test_the_readmes_ten_lines_run_without_the_clone(built, tmp_path):
    wheel, _ = built
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel)
    ten_lines = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    where = "\nimport avalanche_classp\nprint(avalanche_classp.__file__)\n"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"}
    output = run("-c", ten_lines + where, cwd=tmp_path, env=environment)
    assert "% of all ten digits" in output
    assert str(tmp_path / "site") in output
