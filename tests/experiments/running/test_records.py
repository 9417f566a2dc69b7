"""The records file: appended to safely, by several processes, and read once."""

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import file_size_limit
from small_data import small_config

from experiments.cli import main
from experiments.errors import UserError
from experiments.running import records
from experiments.running.files import write_atomically
from experiments.running.records import Results, current_commit

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


def fake_result(method, seed, accuracy, **fields):
    config = small_config(method, seed=seed)
    return {
        "config": config.as_dict(),
        "average_accuracy": accuracy,
        "forgetting": 0.1,
        "backward_transfer": -0.1,
        "forward_transfer": 0.0,
        "learning_accuracy": 0.9,
        "peak_memory_bytes": 10**9,
        "peak_device_bytes": None,
        "eval_seconds": [1.0],
        "setting": "default",
        "accuracy_matrix": [[accuracy] * 5] * 5,
        "seconds_per_experience": 1.0,
        "state_bytes_per_parameter": 4.0,
        **fields,
    }


def lines_of(folder):
    return gzip.decompress((folder / "records.jsonl.gz").read_bytes()).splitlines()


def members_of(path):
    """Return where each gzip member of the file ends."""
    with open(path, "rb") as file:
        return [end for end, _ in records._members(file)]


def accuracies(folder):
    return [result["average_accuracy"] for result in Results(folder).load()]


def test_a_copy_of_a_record_is_no_further_seed(tmp_path):
    path = Results(tmp_path).save(fake_result("naive", 0, 0.5))
    path.write_bytes(path.read_bytes() * 2)
    assert accuracies(tmp_path) == [0.5]


def test_the_last_record_of_a_run_counts(tmp_path):
    results = Results(tmp_path)
    config = small_config("naive")
    results.save({"config": config.as_dict(), "error": "boom"})
    assert not results.finished([config])
    results.save(fake_result("naive", 0, 0.5))
    assert accuracies(tmp_path) == [0.5]
    assert len(lines_of(tmp_path)) == 2
    results.compact()
    assert accuracies(tmp_path) == [0.5]
    assert len(lines_of(tmp_path)) == 1


def test_a_record_without_a_number_is_named(tmp_path, capsys):
    Results(tmp_path).save(fake_result("naive", 0, 0.5))
    path = Results(tmp_path).save(fake_result("naive", 1, 0.5, forgetting="much"))
    assert main(["report", str(tmp_path)]) == 2
    assert f"line 2 of {path} is not a whole record" in capsys.readouterr().err


def test_results_are_found_by_their_config(tmp_path):
    results = Results(tmp_path)
    results.save({"config": small_config("naive", seed=1).as_dict(), "error": "boom"})
    results.save(fake_result("naive", 0, 0.5))
    wanted = [small_config("naive", seed=i) for i in range(3)]
    assert [r["average_accuracy"] for r in results.finished(wanted).values()] == [0.5]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"schema": 1}', b'{"schema": 99}', b"\x00"]
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_file_is_named_and_kept(content, packed, tmp_path, capsys):
    path = Results(tmp_path).save(fake_result("naive", 0, 0.5))
    content = gzip.compress(content + b"\n") if packed else content + b"\n"
    path.write_bytes(content)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert error.count("\n") == 1
    with pytest.raises(UserError, match=str(path)):
        Results(tmp_path).save(fake_result("naive", 0, 0.5))
    assert path.read_bytes() == content


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=f"cannot write {path}: No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_cut_off_anywhere_costs_itself_alone(tmp_path, capsys):
    """As a crash leaves it; it is read without, and the next record takes its place."""
    for seed in range(2):
        path = Results(tmp_path).save(fake_result("naive", seed, 0.5))
    good = path.read_bytes()
    first, second = members_of(path)
    assert second == len(good)
    for size in range(first + 1, second):
        path.write_bytes(good[:size])
        assert len(Results(tmp_path).load()) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert path.stat().st_size == size
    Results(tmp_path).save(fake_result("naive", 1, 0.5))
    assert path.read_bytes() == good
    assert len(Results(tmp_path).load()) == 2


def test_a_compact_file_cut_off_is_refused(tmp_path):
    results = Results(tmp_path)
    for seed in range(3):
        path = results.save(fake_result("naive", seed, 0.5))
    results.compact()
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(UserError, match=r"is not a whole records file .*cut off"):
        Results(tmp_path).save(fake_result("naive", 4, 0.5))
    assert path.read_bytes() == content[:-20]


def test_a_full_disk_costs_the_record_alone(tmp_path):
    results = Results(tmp_path)
    path = results.save(fake_result("naive", 0, 0.5))
    before = path.read_bytes()
    with (
        file_size_limit(len(before) + 50),
        pytest.raises(UserError, match=f"cannot write {path}: File too large"),
    ):
        results.save(fake_result("naive", 1, 0.6))
    assert path.read_bytes() == before
    results.save(fake_result("naive", 1, 0.6))
    assert results.load() == Results(tmp_path).load()
    assert accuracies(tmp_path) == [0.5, 0.6]


_WRITER = """
import json, sys
from pathlib import Path
from experiments.running.records import Results
folder, first, fake = sys.argv[1:]
results, fake = Results(Path(folder)), json.loads(fake)
print("ready", flush=True)
for seed in range(int(first), int(first) + 10**6):
    fake["config"]["seed"] = seed
    results.save(fake)
"""


def write_for_ever(folder, first=0):
    words = [str(folder), str(first), json.dumps(fake_result("naive", 0, 0.5))]
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    return process


def seeds_of(folder):
    return sorted(result["config"]["seed"] for result in Results(folder).load())


@pytest.mark.slow
def test_a_killed_writer_loses_nothing_that_was_saved(tmp_path):
    for _ in range(3):
        saved = len(seeds_of(tmp_path))
        process = write_for_ever(tmp_path, saved)
        while process.poll() is None and len(seeds_of(tmp_path)) < saved + 5:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seeds = seeds_of(tmp_path)
        assert seeds == list(range(len(seeds)))
        assert len(seeds) >= saved + 5


def _save_some(folder, first, count):
    results = Results(folder)
    for seed in range(first, first + count):
        results.save(fake_result("naive", seed, 0.5, accumulator_maps=[[[1.0]]]))
        if seed % 5 == 0:
            results.compact()


@pytest.mark.slow
def test_two_processes_save_and_compact_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_save_some, args=(tmp_path, first, 20)) for first in (0, 20)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        Results(tmp_path).load()
    assert [process.exitcode for process in processes] == [0, 0]
    assert seeds_of(tmp_path) == list(range(40))


def test_maps_of_the_first_seed_alone_are_kept(tmp_path):
    results = Results(tmp_path)
    for method in ("naive", "classp"):
        for seed in (2, 1):
            results.save(fake_result(method, seed, 0.5, accumulator_maps=[[[1.0, 2.0]]]))
    results.compact()
    for found in (results.load(), Results(tmp_path).load()):
        assert [("accumulator_maps" in r, r["config"]["seed"]) for r in found] == [
            *((True, 1), (False, 2)),
            *((True, 1), (False, 2)),
        ]
    size = results.path.stat().st_size
    results.compact()
    assert results.path.stat().st_size == size
    assert len(members_of(results.path)) == 1


def test_a_record_is_read_once(tmp_path, monkeypatch):
    for seed in range(3):
        Results(tmp_path).save(fake_result("naive", seed, 0.5))
    taken = []
    take = Results._take

    def noted(self, line):
        taken.append(line)
        take(self, line)

    monkeypatch.setattr(Results, "_take", noted)
    results = Results(tmp_path)
    for _ in range(3):
        assert len(results.load()) == 3
    results.save(fake_result("naive", 3, 0.5))
    assert len(results.load()) == 4
    results.compact()
    assert len(results.load()) == 4
    assert len(taken) == 3
    Results(tmp_path).save(fake_result("naive", 4, 0.5))
    taken.clear()
    assert len(results.load()) == 5
    assert len(taken) == 1


def test_the_commit_is_the_clones_and_marked_where_the_code_was_changed(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "experiments" / "running" / "records.py"
    published = tmp_path / "experiments" / "results" / "table.md"
    for path in (file, published):
        path.parent.mkdir(parents=True)
        path.write_text("")
    monkeypatch.setattr(records, "__file__", str(file))
    assert current_commit() is None
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    published.write_text("changed")
    assert current_commit() == commit
    file.write_text("changed")
    assert current_commit() == f"{commit}-dirty"


def test_a_compact_file_in_the_same_inode_is_read_from_its_beginning(tmp_path, monkeypatch):
    """A file system gives an inode that has become free to the next file."""
    ours, theirs = Results(tmp_path), Results(tmp_path)
    ours.save(fake_result("naive", 0, 0.5))
    inode, size = ours.path.stat().st_ino, ours.path.stat().st_size
    for seed in range(1, 60):
        theirs.save(fake_result("naive", seed, 0.5 + seed / 997))
    theirs.compact()
    assert theirs.path.stat().st_size > size
    status = os.fstat
    monkeypatch.setattr(
        os, "fstat", lambda file: os.stat_result((*status(file)[:1], inode, *status(file)[2:]))
    )
    monkeypatch.setattr(os.path, "samestat", lambda one, other: True)
    assert len(ours.load()) == 60
