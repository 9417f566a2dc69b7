"""Bad input of the command line: it works, or one line says what is wrong, and no file is hurt.

Runs take no time here: what `run` would measure is made up, and processes are this one.
"""

import contextlib
import gzip
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from bad_input import SCALE, TRIED, examples, json_values
from conftest import file_size_limit
from hypothesis import given
from hypothesis import strategies as st
from small_data import in_this_process, small_config, write_cifar, write_mnist

from experiments.cli import COMMANDS, main
from experiments.protocol import tuned_settings as settings
from experiments.reporting import report
from experiments.running import compare
from experiments.running.records import Results
from experiments.running.run import run
from experiments.tuning import search

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own
parametrize = pytest.mark.parametrize


def made_up(config, *ignored, **also_ignored):
    """Return a result without a run."""
    return {
        "config": config.as_dict(),
        "setting": "given",
        "average_accuracy": 0.5,
        "forgetting": 0.1,
        "backward_transfer": -0.1,
        "forward_transfer": 0.0,
        "learning_accuracy": 0.75,
        "accuracy_matrix": [[0.5] * config.experiences] * config.experiences,
        "accumulator_maps": [[[1.0, 2.0], [0.5, 0.0]]] * 2,
        "eval_seconds": [1.0, 2.0],
        "seconds_per_experience": 1.0,
        "state_bytes": [4],
        "state_bytes_per_parameter": 4.0,
        "peak_memory_bytes": 10**9,
        "peak_device_bytes": None,
        "environment": {"python": "3"},
    }


class Here:
    """An engine that is this process."""

    def run(self, work, configs, progress):
        for config in configs:
            yield config, work(config, progress=lambda: None)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Nothing is run, drawn or downloaded; relative paths lead into a folder of the tests'."""

    def no_network(*arguments, **options):
        raise URLError("no network")

    folder = tmp_path_factory.mktemp("commands")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "fsync", lambda file: None)  # it takes most of the time
        patch.setattr(compare, "run", made_up)
        patch.setattr(search, "run", made_up)
        patch.setattr(compare, "make_engine", lambda *arguments: Here())
        patch.setattr(search, "in_processes", in_this_process)
        if SCALE == 1:
            patch.setattr(report, "draw_figures", lambda rows, title: {})
        for module in ("mnist", "cifar"):
            name = f"torchvision.datasets.{module}.download_and_extract_archive"
            patch.setattr(name, no_network)
        yield folder


def command(*words):
    """Try a command line, and return its exit code and its error."""
    TRIED["command line"] += 1
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
            assert code == 0  # --help
    return code, judged(code, err.getvalue())


def judged(code, error):
    """Check what is printed with an exit code, and return the line that tells the error."""
    lines = [line for line in error.splitlines() if "error: " in line]
    assert code in (0, 1, 2)
    assert len(lines) == (code != 0), error
    assert "Traceback" not in error
    assert not lines or error.rstrip().endswith(lines[0].rstrip()), error
    return lines[0] if lines else ""


def refused(*words):
    code, line = command(*words)
    assert code != 0, words
    return line


# Words

JUNK = [
    "",
    " ",
    "x",
    "-1",
    "-x",
    "--",
    "0",
    "1",
    "1.5",
    "1e3",
    "0x1",
    "nan",
    "inf",
    "-inf",
    "1e400",
]
JUNK += [
    "9" * 30,
    "9" * 5000,
    "١",
    "½",
    "None",
    "true",
    "a\nb",
    "\u2028",
    "\x1b[31m",
    "\\",
    "'",
    "🙂",
]
JUNK += [
    "{}",
    "%s",
    "a" * 5000,
    "*",
    "~",
    "$HOME",
    "=",
    "lr=",
    "=1",
    "lr==1",
    "lr=x",
    "classp.lr=nan",
]
ENDLESS = ("--trials", "--tuning-seeds", "--seeds")
"""Where a large number means much work, and is no error."""
OPTIONS = {
    "run": ["--method", "--seed", "--epochs", "--batch-size", "--set", "--device"],
    "compare": ["--methods", "--seeds", "--epochs", "--batch-size", "--set", "--device", "--jobs"],
    "search": ["--methods", "--trials", "--tuning-seeds", "--train-share", "--jobs", "--device"],
}
COMMON = ["--benchmark", "--scenario", "--model", "--experiences", "--config"]
QUICK = {
    "run": [],
    "compare": ["--methods", "classp", "--seeds", "1"],
    "search": ["--methods", "naive", "--trials", "1", "--tuning-seeds", "1"],
}
PLAUSIBLE = [
    "split-digits",
    "mnist-fmnist",
    "class",
    "task",
    "naive",
    "classp",
    "mlp-256",
    "cnn",
    "2",
]
PLAUSIBLE += ["1,2", "lr=0.1", "classp.power=2", "naive.lr=1", "cpu", "5", "10", "0.5", "100"]


@pytest.mark.slow
@parametrize("name", OPTIONS)
def test_every_option_refuses_or_takes_every_word(name, tmp_path):
    for option in [*OPTIONS[name], *COMMON]:
        for word in JUNK:
            if not (option in ENDLESS and word.isdecimal() and len(word) < 5000):
                command(name, *QUICK[name], "--output", tmp_path / "out", f"{option}={word}")
        command(name, option)


@given(data=st.data())
@examples(100)
def test_generated_words_are_taken_or_refused(data, folder):
    name = data.draw(st.sampled_from(sorted(OPTIONS)))
    words = [name, *QUICK[name], "--output", folder / "words"]
    for option in data.draw(st.lists(st.sampled_from([*OPTIONS[name], *COMMON]), max_size=3)):
        word = data.draw(st.sampled_from([*JUNK, *PLAUSIBLE]) | st.text(max_size=8))
        if not (option in ENDLESS and word.strip().isdecimal()):
            words += [option, word] if data.draw(st.booleans()) else [f"{option}={word}"]
    command(*words)


@parametrize(
    "words",
    [
        *("", "x", "run x", "report", "report a b", "list x", "--x", "run --no-tensorboard=1"),
        *("compare --seeds 10001", f"compare --seeds {10**30}", "compare --methods", "run --seed"),
        *("search --trials 0", "search --tuning-seeds 0", "search --jobs 0", "compare --jobs 0"),
        *("compare --engine x", "compare --set classp=1"),
        *("compare --set .lr=1", "compare --set classp.=1", "run --config a --config b"),
        *("run --device hpu", "run --device privateuseone", "run --device cuda:99"),
        "search --device cuda:99",
        *("search --train-share nan", "search --train-share 0", "search --train-share -0.1"),
    ],
)
def test_what_makes_no_sense_is_refused(words):
    refused(*words.split())


@pytest.mark.slow
def test_more_jobs_than_there_is_work_are_no_error(tmp_path):
    assert command("search", *QUICK["search"], "--jobs", 10**30, "--output", tmp_path)[0] == 0


# Config files

toml_numbers = st.integers() | st.floats() | st.booleans()


def as_toml(value):
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(k)} = {as_toml(v)}' for k, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(as_toml, value))}]"
    return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


@given(
    name=st.sampled_from(sorted(OPTIONS)),
    table=st.dictionaries(
        st.sampled_from(["method", "methods", "seed", "seeds", "epochs", "batch_size", "set"])
        | st.sampled_from(["device", "model", "jobs", "tensorboard", "experiences", "adopt", "x"])
        | st.text(max_size=3),
        json_values
        | st.sampled_from([1, 2, "naive", ["classp"], {"lr": 0.1}, {"classp": {"lr": 1}}]),
        max_size=3,
    ),
)
@examples(100)
def test_config_files_of_any_kind_work_or_are_refused(name, table, folder):
    table.pop("adopt", None)  # it would write this checkout's settings
    if any(isinstance(table.get(k), int) and table[k] > 3 for k in ("seeds", "seed")):
        table["seeds"] = -1
    path = folder / "c.toml"
    path.write_text("".join(f"{json.dumps(k)} = {as_toml(v)}\n" for k, v in table.items()))
    before = path.read_bytes()
    command(name, "--config", path, *QUICK[name], "--output", folder / "config")
    assert path.read_bytes() == before


BAD_TOML = [b"\xff\xfe", b"\0", b"seed = 1\nseed = 2", b"seed = 2020-01-01"]
BAD_TOML += [
    b"seed=[]",
    b"seed=[1,2]",
    b"method=''",
    b"method=[]",
    b'output="a\\u0000b"',
    b"help=true",
]
BAD_TOML += [b"[set]\n'a\\nb'=1", b'set={"a\\nb"=1}', b"tensorboard=1", b"config='x'", b"set=[]"]
BAD_TOML += [
    b'device="a\\nb"',
    b"seed=" + b"9" * 5000,
    b"seed=-1",
    b"epochs=[1,0]",
    b"epochs='1,,2'",
]
BAD_TOML += [
    b"seed=1e3",
    b"[[set]]\nlr=1",
    b"[set.classp]\nlr=1",
    b"['']\na=1",
    b"''=1",
    b"seed=nan",
]
BAD_TOML += [
    b"seed='--help'",
    b"batch_size=99999999999",
    b"data_root=[]\n",
    b'data-root="a\\u0000"',
]


def test_a_wrong_config_file_is_refused(tmp_path):
    path = tmp_path / "c.toml"
    for content in BAD_TOML:
        path.write_bytes(content)
        if content != b"data_root=[]\n":
            refused("run", "--config", path, "--output", tmp_path / "out")


@given(content=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
@examples(50)
def test_config_files_of_any_bytes_work_or_are_refused(content, folder):
    (folder / "c.toml").write_bytes(content)
    command("run", "--config", folder / "c.toml", "--output", folder / "config")


# Folders that are not there, cannot be written, or are none

NO_FOLDERS = ["/proc/none", "/sys/none", "/dev/null/none", "/dev/full/none", "a" * 300, "file"]
NO_FOLDERS += ["file/none", "b/" + "a" * 300]


@parametrize("path", NO_FOLDERS, ids=lambda path: path[:12])
def test_what_is_no_folder_is_refused(path, folder):
    (folder / "file").write_text("mine")
    for name in OPTIONS:
        line = refused(name, *QUICK[name], "--output", path)
        assert "cannot write" in line or "too long" in line
    refused("report", path)
    refused("run", "--config", path)
    refused(
        "run", "--data-root", path, "--benchmark", "split-mnist", "--no-tensorboard", "--config=x"
    )
    assert (folder / "file").read_text() == "mine"


@parametrize("name", ["table.md", "table.csv", "report.html"])
def test_a_table_that_cannot_be_written_is_refused(name, tmp_path):
    Results(tmp_path).save(made_up(small_config()))
    (tmp_path / name).mkdir()
    assert "cannot write" in refused("report", tmp_path)


def test_a_name_that_no_encoding_has_is_written(tmp_path):
    """A folder whose name is Latin-1, as old disks have them; a table says where it was written."""
    path = tmp_path / os.fsdecode(b"caf\xe9")
    assert command("run", "--no-tensorboard", "--output", path)[0] == 0
    assert command("report", path)[0] == 0
    assert b"caf" in (path / "table.md").read_bytes()


# Records


def one_result(folder):
    """Make a folder with one record, of a seed that the commands below do not run."""
    shutil.rmtree(folder, ignore_errors=True)
    return Results(folder).save(made_up(small_config(seed=7)))


def try_report(path):
    """Report on a folder with a file that may be damaged; it stays as it is."""
    before = path.read_bytes()
    code, line = command("report", path.parent)
    assert code == 0 or "no finished runs" in line or str(path) in line
    assert path.read_bytes() == before
    return code


@given(data=st.data())
@examples(60)
def test_a_result_with_other_bytes_is_named_or_reported(data, folder):
    path = one_result(folder / "bytes")
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)) | st.just(len(content)))
    content = content[:start] + data.draw(st.binary(max_size=4)) + content[end:]
    path.write_bytes(content)
    try_report(path)


def test_what_is_no_result_is_named(folder):
    path = one_result(folder / "foreign")
    packed = path.read_bytes()
    good = gzip.decompress(packed)
    lines = (
        *(b"null", b"2", b'"x"', b"{}", b"[]", b"\xef\xbb\xbf[]", b"\n" + good),
        good.replace(b"lr", b"l\xff"),
        *(b'{"schema": 99}', b'{"schema": []}', good[: len(good) // 2], b"\0" * 100),
    )
    bytes_ = (b"{}", good, b"\0" * 100, packed + b"x", packed[:-1] + b"x", b"x" + packed)
    cut_off = gzip.compress(good + good)[:-9]
    for content in (*map(gzip.compress, lines), *bytes_, cut_off):
        path.write_bytes(content)
        assert try_report(path) == 2
        assert str(path) in refused("compare", *QUICK["compare"], "--output", folder / "foreign")
        assert list(path.parent.iterdir()) == [path]  # nothing was begun
    path.unlink()
    path.mkdir()
    assert str(path) in refused("report", folder / "foreign")


# The search's journal and settings


def test_a_journal_cut_off_goes_on_and_a_damaged_one_is_refused(tmp_path):
    words = ["search", *QUICK["search"], "--output", tmp_path]
    assert command(*words)[0] == 0
    path = tmp_path / "search" / "naive.journal"
    good = path.read_bytes()
    lines = good.splitlines(keepends=True)
    cuts = [len(b"".join(lines[:n])) + more for n in range(1, len(lines)) for more in (1, 15)]
    for size in [*cuts, len(good) - 1]:
        path.write_bytes(good[:size])  # as a kill leaves it
        assert command(*words)[0] == 0
        assert command(*words)[0] == 0
    for content in (
        *(b"garbage\n", b"garbage", b"\xff\xfe\0", b"[]\n" + good, b'{"op_code": 99}\n', b"null\n"),
        *(b"[" * 10**5 + b"\n", b"".join(lines[:2]) + b"{\n" + b"".join(lines[2:])),
        *(good.replace(b'"epochs"', b'"epoch"'), good.replace(b'"hyper"', b'"hypers"')),
        *(good.replace(b"split-digits", b"split-mnist"), good.replace(b"0.2", b"x")),
    ):
        path.write_bytes(content)
        line = refused(*words) if content != good else ""
        assert "journal" in line or "other arguments" in line or content == good
        assert path.read_bytes().startswith(content)  # Optuna appends a line to what it can read
    path.write_bytes(good)
    other = path.with_name("other.journal")
    other.write_text("mine")
    assert str(other) in refused(*words)
    assert (other.read_text(), path.read_bytes()) == ("mine", good)
    path.unlink()
    path.mkdir()
    refused(*words)


def test_damaged_settings_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    good = settings.SETTINGS_FILE.read_text()
    monkeypatch.setattr(settings, "SETTINGS_FILE", path)
    entry = {"epochs": 1, "batch_size": 1, "hyper": {"lr": 0.1}}
    bad = [
        None,
        5,
        "x",
        [],
        {"epochs": 0},
        entry | {"epochs": "x"},
        entry | {"hyper": {"lr": None}},
    ]
    bad += [entry | {"hyper": 5}, entry | {"x": 1}, entry | {"batch_size": -1}]
    contents = ["", "{", "[]", "null", "[" * 10**5, good[: len(good) // 2], '{"a": 5}', '{"a": []}']
    for content in [*contents, *(json.dumps({"split-digits/class": {"classp": x}}) for x in bad)]:
        path.write_text(content)
        settings.read_settings.cache_clear()
        assert str(path) in refused("run", "--output", tmp_path / "out")
        assert path.read_text() == content
    path.unlink()
    settings.read_settings.cache_clear()
    assert str(path) in refused("run", "--output", tmp_path / "out")
    monkeypatch.undo()
    settings.read_settings.cache_clear()


# Data


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def really_run(monkeypatch):
    monkeypatch.setattr(compare, "run", run)


FILES = [f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
ON_MNIST = ["run", "--method", "naive", "--no-tensorboard", "--benchmark"]


def test_damaged_mnist_is_one_line(tmp_path, really_run):
    write_mnist(tmp_path, per_class=4)
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    words = ["--data-root", tmp_path, "--output", tmp_path / "out"]
    for path in [raw / f"{name}-ubyte" for name in FILES]:
        good = path.read_bytes()
        for content in (good[: len(good) // 2], b"", b"x" * 100, good + b"x", b"\0" * 99, good[:8]):
            path.write_bytes(content)
            for benchmark in ("split-mnist", "permuted-mnist"):
                assert "MNIST" in refused(*ON_MNIST, benchmark, *words)
            assert path.read_bytes() == content
        path.unlink()
        assert "--data-root" in refused(*ON_MNIST, "split-mnist", *words)
        path.write_bytes(good)


def test_labels_that_do_not_fit_are_one_line(tmp_path, really_run):
    write_mnist(tmp_path, per_class=4)
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    words = ["--data-root", tmp_path, "--output", tmp_path / "out"]
    file = raw / f"{FILES[1]}-ubyte"
    labels = np.frombuffer(file.read_bytes()[8:], np.uint8)
    for wrong in (
        *(np.where(labels == 9, 77, labels), labels + 10, labels * 0, labels[:9], labels[:0]),
        *(np.where(labels == 3, 2, labels), np.where(labels // 2 == 1, 0, labels)),
    ):
        write_idx(file, wrong)
        for scenario in ("class", "domain", "task"):
            refused(*ON_MNIST, "split-mnist", "--scenario", scenario, *words)
    write_idx(file, np.where(np.arange(len(labels)) == 5, 77, labels))
    refused(*ON_MNIST, "permuted-mnist", "--experiences", 1, *words)


def test_few_samples_are_learnt(tmp_path, really_run):
    write_mnist(tmp_path, per_class=2)
    words = ["--data-root", tmp_path, "--output", tmp_path / "out"]
    for name in ("naive", "classp", "replay", "ewc"):
        size = ["--method", name, "--batch-size", 2**32 - 1]
        assert command(*ON_MNIST, "split-mnist", *words, *size)[0] == 0


def test_damaged_cifar_is_one_line(tmp_path, really_run, monkeypatch):
    write_cifar(tmp_path, 10, monkeypatch=monkeypatch)
    for path in sorted((tmp_path / "cifar10" / "cifar-10-batches-py").iterdir()):
        good = path.read_bytes()
        for content in (good[: len(good) // 2], b"", b"x" * 100, good[1:]):
            path.write_bytes(content)
            line = refused(
                *ON_MNIST, "split-cifar10", "--data-root", tmp_path, "--output", tmp_path
            )
            assert "CIFAR-10" in line
        path.write_bytes(good)


# A full disk, a closed pipe


@parametrize("size", [0, 100, 1000, 2000, 4000])
def test_a_full_disk_is_one_line_and_hurts_no_file(size, tmp_path):
    path = Results(tmp_path).save(made_up(small_config(seed=7)))
    assert command("report", tmp_path)[0] == 0
    assert command("search", *QUICK["search"], "--output", tmp_path)[0] == 0
    codes = []
    for words in (
        ["run", "--no-tensorboard"],
        ["run", "--method", "naive"],
        ["compare", *QUICK["compare"]],
        ["search", *QUICK["search"], "--methods", "adam"],
        ["report"],
    ):
        where = [tmp_path] if words[0] == "report" else ["--output", tmp_path]
        before = path.read_bytes()
        with file_size_limit(size):
            code, line = command(*words, *where)
        codes.append(code)
        assert code == 0 or "File too large" in line
        assert not list(tmp_path.rglob("*.tmp"))
        assert Results(tmp_path).finished([small_config(seed=7)])
        if code:
            assert path.read_bytes() == before
    assert any(codes)


@pytest.mark.slow
def test_output_that_nobody_takes_is_one_line_at_most():
    """In processes of their own: into a full device, and into a pipe that is closed."""
    program = [sys.executable, "-m", "experiments", "list"]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full, open(writer, "w") as closed:
        outputs = {"No space left on device": full, "Broken pipe": closed}
        processes = {
            message: subprocess.Popen(
                program, cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True
            )
            for message, output in outputs.items()
        }
        for message, process in processes.items():
            TRIED["command line"] += 1
            _, error = process.communicate()
            assert process.returncode == 2
            # Whoever closes a pipe, like `head`, has seen enough.
            told = re.fullmatch(f"error: .*{message}.*\n", error)
            assert bool(told) == (message != "Broken pipe")
            assert error.count("\n") <= 1


@parametrize(("name", "kept"), [("report", True), ("speed", False)])
def test_what_is_interrupted_says_whether_it_goes_on(name, kept, monkeypatch, capsys):
    def interrupt(self, command_line):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS[name], "run", interrupt)
    assert main([name, "folder"]) == 130
    rest = ": finished runs are saved, the same command goes on from there" * kept
    assert capsys.readouterr().err == f"interrupted{rest}\n"
