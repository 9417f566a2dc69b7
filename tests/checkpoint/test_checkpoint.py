"""Checkpoints: what is resumed is what was never stopped, and what is damaged is found."""

import collections
import contextlib
import importlib
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import checkpoint_runs
import numpy as np
import pytest
import torch
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.logging import CSVLogger
from avalanche.training import EWC, JointTraining, Naive, Replay
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from checkpoint_runs import Run, StoppedError, outcome, plain, same
from conftest import (
    SGD,
    On,
    accumulators,
    build,
    file_size_limit,
    fit,
    growing_head,
    linear_head,
    naive,
    seed_everything,
    weights,
)
from torch import nn

import avalanche_classp
from avalanche_classp import (
    CLASSP,
    CheckpointError,
    checkpointed,
    mend_save_checkpoint,
)
from avalanche_classp.checkpoint.decoding import decode
from avalanche_classp.checkpoint.encoding import collect_initial_state, encode
from avalanche_classp.checkpoint.file import VERSION, read_file, write_file

parametrize = pytest.mark.parametrize
DATA = Path(__file__).parents[1] / "data"
CPU = torch.device("cpu")
BOUNDARY, WITHIN = {}, {"every_epochs": 1}


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def interrupted(folder, stops, method="classp", variant="", again=None, **kwargs):
    """Stop runs after some iterations each, building all anew, and return the last one's outcome.

    Args:
        folder: of the checkpoints.
        stops: after how many iterations; the last run is not stopped.
        method: of `Run`, as the variant.
        variant: of `Run`.
        again: called with a run instead of `Run.go`.
        **kwargs: of `checkpointed`.
    """
    for iterations in stops:
        run = Run(method, variant)
        run.stopper.left = iterations
        with pytest.raises(StoppedError):
            again(run, folder, **kwargs) if again else run.go(folder, **kwargs)
        assert any(Path(folder).iterdir())
    run = Run(method, variant)
    seed_everything(9)  # what the checkpoint holds counts
    return again(run, folder, **kwargs) if again else run.go(folder, **kwargs)


# --- the same as never stopped --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Metric Top1_Acc_Stream used by the EarlyStopping")  # at first
@parametrize(
    ("method", "variant"),
    [
        *((method, "") for method in checkpoint_runs.METHODS),
        *((method, "heads") for method in ("classp", "ewc", "lwf")),
        *((method, "in_memory") for method in ("classp", "naive")),
    ],
)
def test_a_stopped_run_ends_the_same(tmp_path, method, variant):
    # 3 iterations an epoch, 3 epochs an experience: it goes on from within the first, then from
    # after it. The oracle makes no checkpoints.
    found = interrupted(tmp_path, [5, 7], method, variant, **WITHIN)
    assert same(found, Run(method, variant).go())
    assert files(tmp_path) == files(tmp_path)[-2:]


@parametrize("method", ["classp", "ewc"])
def test_checkpoints_between_experiences_alone(tmp_path, method):
    assert same(interrupted(tmp_path, [11, 12], method), Run(method).go())
    assert files(tmp_path) == ["00000002.checkpoint", "00000003.checkpoint"]


def test_every_second_epoch(tmp_path):
    assert same(interrupted(tmp_path, [7, 8], every_epochs=2), Run("classp").go())
    # One within each experience and one after it.
    assert files(tmp_path) == ["00000005.checkpoint", "00000006.checkpoint"]


def test_the_comparison_finds_what_is_lost(tmp_path, monkeypatch):
    whole = Run("classp").go()
    monkeypatch.setattr(avalanche_classp.checkpoint.resume, "decode_random_state", lambda *a: None)
    found = interrupted(tmp_path, [5], **WITHIN)
    assert not same(found["model"], whole["model"])
    assert not same(found["random"], whole["random"])


def test_the_strategy_at_hand_goes_on_after_an_exception(tmp_path):
    run = Run("classp")
    run.stopper.left = 13
    with pytest.raises(StoppedError):
        run.go(tmp_path, **WITHIN)
    run.stopper.left = math.inf
    assert same(run.go(tmp_path, **WITHIN), Run("classp").go())


def test_a_finished_run_is_loaded_and_has_nothing_left(tmp_path):
    finished = Run("classp").go(tmp_path)
    run = Run("classp")
    (last_but_one, last) = files(tmp_path)
    assert list(checkpointed(run.benchmark.train_stream, run.strategy, tmp_path)) == []
    assert same(outcome(run.strategy), finished)
    assert files(tmp_path) == [last_but_one, last]


def test_the_model_stays_the_callers(tmp_path):
    Run("classp").go(tmp_path)
    run = Run("classp")
    body = run.model[0].weight
    checkpointed(run.benchmark.train_stream, run.strategy, tmp_path)
    assert run.strategy.model is run.model
    assert run.model[0].weight is body
    assert run.model[4].classifier.weight.shape[0] == run.model[4].classifier.out_features == 6
    assert run.strategy.optimizer.param_groups[0]["params"][0] is body


def body_with_more(run, folder, **kwargs):
    """Evaluate before, train a whole stream, then once more."""
    stream = [run.benchmark.train_stream]
    for part in checkpointed(stream, run.strategy, folder, **kwargs) if folder else stream:
        run.strategy.eval(run.benchmark.test_stream)
        run.strategy.train(part, eval_streams=[])
        run.strategy.train(part[0], eval_streams=[])
    return outcome(run.strategy)


def test_a_loop_that_trains_several_times(tmp_path):
    found = interrupted(tmp_path, [8, 17], again=body_with_more, **WITHIN)
    assert same(found, body_with_more(Run("classp"), None))


def online(run, folder, **kwargs):
    seed_everything(3)  # the stream shuffles when it is made
    boundaries = {"experience_size": 8, "access_task_boundaries": True}
    stream = list(split_online_stream(run.benchmark.train_stream, **boundaries))
    for part in checkpointed(stream, run.strategy, folder, **kwargs) if folder else stream:
        run.strategy.train(part, eval_streams=[])
    return outcome(run.strategy)


def test_an_online_stream(tmp_path):
    found = interrupted(tmp_path, [6, 17], again=online, **WITHIN)
    assert same(found, online(Run("classp"), None))


def drawing(model, **kwargs):
    def draw(strategy):
        chosen = torch.randperm(len(strategy.adapted_dataset))[:10].tolist()
        strategy.adapted_dataset = strategy.adapted_dataset.subset(chosen)

    plugins = [On(after_train_dataset_adaptation=draw)]
    return plain(Naive)(model, plugins=plugins, **kwargs)


def test_samples_drawn_by_a_plugin_are_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoint_runs.METHODS, "drawing", drawing)
    found = interrupted(tmp_path, [3, 5], "drawing", **WITHIN)  # 2 iterations an epoch
    assert same(found, Run("drawing").go())


def collecting(run, folder, **kwargs):
    run.strategy.results = results = []
    stream = run.benchmark.train_stream
    for experience in checkpointed(stream, run.strategy, folder, **kwargs) if folder else stream:
        run.strategy.train(experience, eval_streams=[])
        results.append(run.strategy.eval(run.benchmark.test_stream))
    return {**outcome(run.strategy), "results": results}


def test_results_that_the_loop_collects(tmp_path):
    found = interrupted(tmp_path, [14, 8], again=collecting, **WITHIN)
    assert len(found["results"]) == 3
    assert same(found, collecting(Run("classp"), None))


def joint(run, folder, **kwargs):
    stream = [run.benchmark.train_stream]
    for whole in checkpointed(stream, run.strategy, folder, **kwargs) if folder else stream:
        run.strategy.train(whole, eval_streams=[])
    return outcome(run.strategy)


def test_joint_training_has_one_long_experience(tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoint_runs.METHODS, "joint", plain(JointTraining))
    found = interrupted(tmp_path, [12, 10], "joint", again=joint, **WITHIN)
    assert same(found, joint(Run("joint"), None))


def with_workers(run, folder, **kwargs):
    stream = run.benchmark.train_stream[:1]
    for part in checkpointed(stream, run.strategy, folder, **kwargs) if folder else stream:
        run.strategy.train(part, eval_streams=[], num_workers=1)
    return outcome(run.strategy)


def test_data_from_worker_processes(tmp_path):
    found = interrupted(tmp_path, [4], again=with_workers, **WITHIN)
    assert same(found, with_workers(Run("classp"), None))


# --- killed processes -----------------------------------------------------------------------------


def start(*words):
    """Start a fresh interpreter."""
    command = [sys.executable, checkpoint_runs.__file__, *map(str, words)]
    root = Path(avalanche_classp.__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_runs_killed_at_any_moment_end_the_same(tmp_path):
    folder = tmp_path / "checkpoints"
    with start("kill", tmp_path, 20) as process:
        counts = json.loads(process.communicate()[0])
    print(counts)
    assert counts["killed"] >= 20 and counts["while_writing"] >= 1
    assert counts["same"] == counts["ended"]
    # The unfinished run that is left goes on in a fresh process, which is killed as soon as it has
    # made a checkpoint, and then in this one.
    before = set(folder.glob("*.checkpoint"))
    with start("resume", tmp_path) as process:
        while not set(folder.glob("*.checkpoint")) - before:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert same(Run("classp").go(folder, **WITHIN), Run("classp").go())


# --- damaged files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    seed_everything()
    strategy = CLASSP(model=growing_head(), train_mb_size=8, evaluator=None)
    for experience in checkpointed(checkpoint_runs.make_benchmark().train_stream, strategy, folder):
        strategy.train(experience)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """Return a folder with the checkpoints after the second and the third experience."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resumed(folder, tiny, **kwargs):
    strategy = CLASSP(model=growing_head(), train_mb_size=8, evaluator=None)
    return strategy, checkpointed(tiny.train_stream, strategy, folder, **kwargs)


def damages(good):
    """Yield what may become of a file, with what the error says."""
    yield b"", "no checkpoint of avalanche-classp"
    yield b"\0" * len(good), "no checkpoint of avalanche-classp"
    yield b"accuracy,loss\n0.5,1\n", "no checkpoint of avalanche-classp"
    for size in [1, 30, 31, 32, 90, 97, 98, *range(100, len(good), 997), len(good) - 1]:
        yield good[:size], "no checkpoint of avalanche-classp|truncated or corrupt"
    yield good + b"\n", "truncated or corrupt"
    for place in [33, 96, 97, *range(98, len(good), 997)]:
        changed = bytearray(good)
        changed[place] ^= 16
        yield bytes(changed), "truncated or corrupt"
    yield good.replace(b"checkpoint 1\n", b"checkpoint 2\n", 1), "version 2.*up to 1.*newer"
    foreign = io.BytesIO()
    torch.save(linear_head().state_dict(), foreign)
    yield foreign.getvalue(), "no checkpoint of avalanche-classp"
    yield pickle.dumps({"state": 1}), "no checkpoint of avalanche-classp"


def test_every_damage_is_found_and_named(folder, tmp_path):
    good = (folder / "00000003.checkpoint").read_bytes()
    assert VERSION == 1
    path, tried = tmp_path / "bad.checkpoint", 0
    for bad, says in damages(good):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=says) as caught:
            read_file(path, CPU)
        assert str(path) in str(caught.value)
        tried += 1
    assert tried > 30
    for bad_path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
            read_file(bad_path, CPU)


@parametrize("how", ["truncated", "foreign", "half-written"])
def test_the_last_good_one_is_taken_and_kept(folder, tiny, how):
    newest = folder / "00000003.checkpoint"
    if how == "half-written":
        shutil.move(newest, f"{newest}.tmp")
    else:
        data = newest.read_bytes()
        newest.write_bytes(data[:-10] if how == "truncated" else b"hello")
    if how == "half-written":  # nothing is wrong: it was never there
        strategy, rest = resumed(folder, tiny)
        assert files(folder) == ["00000002.checkpoint"]
    else:
        says = r"00000003\.checkpoint.*Going on from .*00000002\.checkpoint"
        with pytest.warns(UserWarning, match=says):
            strategy, rest = resumed(folder, tiny)
    assert [e.current_experience for e in rest] == [2]  # ends without training: saved all the same
    # The damaged one is left to the user, and does not count.
    kept = {"half-written": ["02", "03"]}.get(how, ["02", "03", "04"])
    assert files(folder) == [f"000000{n}.checkpoint" for n in kept]
    assert strategy.clock.train_exp_counter == 2


def test_without_a_good_one_there_is_one_error(folder, tiny):
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used") as caught:
        resumed(folder, tiny)
    assert all(name in str(caught.value) for name in files(folder))
    assert str(caught.value).endswith("Name another folder to start anew")


def test_other_files_are_left_alone(folder, tiny):
    (folder / "notes.txt").write_text("mine")
    (folder / "mine.checkpoint").write_text("mine")
    _, rest = resumed(folder, tiny)
    assert list(rest) == []
    assert {"notes.txt", "mine.checkpoint"} < set(files(folder))


def test_as_many_are_kept_as_asked(tiny, tmp_path):
    strategy, rest = resumed(tmp_path, tiny, keep=3)
    for experience in rest:
        strategy.train(experience)
    assert len(files(tmp_path)) == 3


class Exploit:
    def __reduce__(self):
        return (os.mkdir, ("exploited",))


def test_loading_runs_no_code_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.checkpoint"
    write_file(path, {"done": Exploit()})  # with a checksum that is right
    with pytest.raises(CheckpointError, match="does not hold tensors and plain containers alone"):
        read_file(path, CPU)
    assert not Path("exploited").exists()
    pickle.loads(pickle.dumps(Exploit()))
    assert Path("exploited").exists()  # so it would have


@parametrize("name", ["antigravity:X", "subprocess:Popen", "torch.nn:X", "builtins:dict"])
def test_classes_are_not_taken_by_name(name):
    strategy = naive(linear_head())
    content = encode(strategy, collect_initial_state(strategy))
    record = {"kind": "object", "class": name, "attributes": {}}
    content["strategy"]["attributes"]["clock"]["attributes"]["other"] = record
    with pytest.raises(CheckpointError, match=r"strategy\.plugins\[2\]\.other was .* is nothing"):
        fresh = naive(linear_head())
        decode(fresh, content, collect_initial_state(fresh))
    assert "antigravity" not in sys.modules


# --- files that cannot be written -----------------------------------------------------------------


def train_the_rest(folder, tiny):
    strategy, rest = resumed(folder, tiny)
    for experience in rest:
        strategy.train(experience)


@contextlib.contextmanager
def without_root():
    """Give up the right to write everywhere, where this process has it."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        importlib.invalidate_caches()  # of folders that could not be read meanwhile


def test_a_full_disk_leaves_what_was_there(folder, tiny):
    (folder / "00000003.checkpoint").unlink()
    before = (folder / "00000002.checkpoint").read_bytes()
    message = r"cannot write .*00000003\.checkpoint: File too"
    with file_size_limit(10_000), pytest.raises(CheckpointError, match=message):
        train_the_rest(folder, tiny)
    assert files(folder) == ["00000002.checkpoint"]
    assert (folder / "00000002.checkpoint").read_bytes() == before
    train_the_rest(folder, tiny)
    assert files(folder) == ["00000002.checkpoint", "00000003.checkpoint"]


def test_a_folder_that_is_read_only(folder, tiny):
    (folder / "00000003.checkpoint").unlink()
    folder.chmod(0o555)
    for parent in folder.parents:
        if Path(tempfile.gettempdir()) in parent.parents:
            parent.chmod(0o755)
    with without_root():
        with pytest.raises(CheckpointError, match=r"cannot write .*: Permission denied; see to it"):
            train_the_rest(folder, tiny)
        with pytest.raises(CheckpointError, match=r"cannot use the folder .*: Permission denied"):
            train_the_rest(folder / "new", tiny)
    folder.chmod(0o755)
    assert files(folder) == ["00000002.checkpoint"]


def test_a_folder_that_is_a_file(tmp_path, tiny):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(CheckpointError, match=f"cannot use the folder {path} for checkpoints"):
        resumed(path, tiny)


# --- what is kept ---------------------------------------------------------------------------------


def through_a_file(plugin, twin, tmp_path):
    """Return a plugin's state in a second plugin."""
    path = tmp_path / "state"
    strategy = naive(linear_head(), plugin)
    plugin.strategy = strategy  # leads back to where it came from
    plugin.view = strategy.model[0].weight.detach()[1:3]
    write_file(path, encode(strategy, collect_initial_state(strategy)))
    other = naive(linear_head(), twin)
    decode(other, read_file(path, CPU), collect_initial_state(other))
    assert twin.strategy is other
    return other


class Holder(On):
    pass


def test_all_kinds_of_values_come_back(tmp_path):
    plugin, twin = Holder(), Holder()
    plugin.values = {
        "atoms": [None, True, 3, 0.1, 1j, "x", b"x", float("inf")],
        "containers": [(1, [2]), {3, 1}, frozenset([4]), {(1, "a"): 2}],
        "deque": collections.deque([1, 2], maxlen=2),
        "counter": collections.Counter("aab"),
        "ordered": collections.OrderedDict(b=1, a=2),
        "defaults": collections.defaultdict(list, {1: [2]}),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "array": np.arange(3, dtype=np.int16),
        "number": np.float64(0.1),
        "tensor": torch.arange(3.0).to(torch.bfloat16),
    }
    through_a_file(plugin, twin, tmp_path)
    for key, value in plugin.values.items():
        got = twin.values[key]
        assert type(got) is type(value)
        assert repr(got) == repr(value)
    assert twin.values["deque"].maxlen == 2
    twin.values["defaults"]["new"].append(1)


def test_generators_go_on(tmp_path):
    plugin, twin = Holder(), Holder()
    for seed, holder in enumerate((plugin, twin)):
        holder.generators = [
            random.Random(seed),
            np.random.default_rng(seed),
            torch.Generator().manual_seed(seed),
        ]
    through_a_file(plugin, twin, tmp_path)

    def draws(holder):
        python, numpy, generator = holder.generators
        return [python.random(), numpy.random(), torch.rand(1, generator=generator).item()]

    assert draws(plugin) == draws(twin)


def test_what_is_shared_stays_shared(tmp_path):
    plugin, twin = Holder(), Holder()
    plugin.a = plugin.b = [1]
    plugin.loop = [plugin.a]
    plugin.loop.append(plugin.loop)
    other = through_a_file(plugin, twin, tmp_path)
    assert twin.a is twin.b is twin.loop[0] and twin.loop[1] is twin.loop
    with torch.no_grad():
        other.model[0].weight.fill_(7)
    assert (twin.view == 7).all()  # a view of the model's memory, as synaptic intelligence has them


def test_code_stays_that_of_the_script(tmp_path):
    plugin, twin = Holder(), Holder()
    plugin.function, twin.function = len, max
    through_a_file(plugin, twin, tmp_path)
    assert twin.function is max
    with pytest.raises(CheckpointError, match=r"plugins\[0\]\.function was .* is nothing"):
        through_a_file(plugin, Holder(), tmp_path)


class Items(dict):
    pass


class Slots:
    __slots__ = ("value",)


@parametrize(
    ("value", "named"),
    [
        (threading.Lock(), "_thread.lock"),
        (Items(a=1), "Items"),
        (Slots(), "Slots"),
        (iter([1]), "list_iterator"),
        (torch.utils.data.TensorDataset(), "TensorDataset"),
        (np.array(["a"]), "numpy.ndarray"),
        (np.longdouble(1), "numpy.longdouble"),
        (nn.UninitializedParameter(), "UninitializedParameter"),
    ],
)
def test_what_cannot_be_kept_is_refused_at_once(tiny, tmp_path, value, named):
    plugin = Holder()
    plugin.held = [value]
    with pytest.raises(CheckpointError, match=rf"strategy\.plugins\[0\]\.held\[0\] is a .*{named}"):
        checkpointed(tiny.train_stream, naive(linear_head(), plugin), tmp_path)


class Own:
    pass


@parametrize("late", [Own, lambda: [Own()], lambda: len, lambda: torch.optim.SGD([torch.ones(1)])])
def test_what_could_not_be_made_again_is_refused_when_it_is_saved(tiny, tmp_path, late):
    def keep(strategy):
        strategy.plugins[0].held = late()

    plugin = On(after_training_exp=keep)
    strategy = naive(linear_head(), plugin)
    with pytest.raises(CheckpointError, match=r"plugins\[0\]\.held.* was not there at the beginn"):
        for experience in checkpointed(tiny.train_stream, strategy, tmp_path):
            strategy.train(experience)
    plugin.held = late()  # if it is there at the beginning it is fine
    for experience in checkpointed(tiny.train_stream, strategy, tmp_path):
        strategy.train(experience)
    assert len(files(tmp_path)) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Avalanche's own
def test_stored_samples_are_refused(tiny, tmp_path):
    strategy = naive(linear_head(), ReplayPlugin(mem_size=5))
    with pytest.raises(CheckpointError, match=r"AvalancheDataset.*mend_save_checkpoint\(\)"):
        for experience in checkpointed(tiny.train_stream, strategy, tmp_path):
            strategy.train(experience)
    assert files(tmp_path) == []


@parametrize(
    ("change", "says"),
    [
        ({"plugins": [Holder()]}, "plugins CLASSPPlugin, .* then, Holder, CLASSPPlugin, .* now"),
        ({"model": nn.Linear(6, 2)}, "model Sequential then, Linear now"),
        (
            {"evaluator": EvaluationPlugin(accuracy_metrics(epoch=True))},
            "metrics none then, EpochAccuracy now",
        ),
    ],
)
def test_a_strategy_built_differently_is_refused(folder, tiny, change, says):
    arguments = {"model": growing_head(), "evaluator": None, **change}
    with pytest.raises(CheckpointError, match=f"{says}; build the strategy as it was built then"):
        checkpointed(tiny.train_stream, CLASSP(**arguments), folder)


def test_the_part_that_does_not_fit_is_named(folder, tiny):
    model = growing_head()
    model[1] = nn.ReLU()
    with pytest.raises(CheckpointError, match=r"model\._modules\['1'\] was Tanh, and is ReLU"):
        strategy = CLASSP(model=model, train_mb_size=8, evaluator=None)
        checkpointed(tiny.train_stream, strategy, folder)


@parametrize(
    "record",
    [
        {"kind": "script", "class": "builtins:builtin_function_or_method", "path": "os.system"},
        {"kind": "enum", "class": "os:system", "member": "x"},
        {"kind": "enum", "class": "enum:Enum", "member": "system"},
        {"kind": "enum", "class": "antigravity:X", "member": "x"},
        {"kind": "namedtuple", "class": "subprocess:Popen", "items": ["true"]},
        {"kind": "method", "name": "__class__", "self": {"kind": "list", "items": []}},
        {"kind": "state_dict", "class": "os:system", "path": None, "state": {}},
        {"kind": "torch", "name": "os"},
    ],
)
def test_a_file_cannot_name_code_that_is_not_the_scripts(record):
    strategy = naive(linear_head())
    content = encode(strategy, collect_initial_state(strategy))
    content["strategy"]["attributes"]["clock"]["attributes"]["other"] = record
    with pytest.raises(CheckpointError, match=r"strategy\.plugins\[2\]\.other was .* is nothing"):
        fresh = naive(linear_head())
        decode(fresh, content, collect_initial_state(fresh))
    assert "antigravity" not in sys.modules


# --- loggers --------------------------------------------------------------------------------------


class Logged(Run):
    def __init__(self, folder, stop=math.inf):
        metrics = accuracy_metrics(epoch=True, experience=True), loss_metrics(epoch=True)
        evaluator = EvaluationPlugin(*metrics, loggers=CSVLogger(folder))
        super().__init__("naive", evaluator=evaluator)
        self.stopper.left = stop


def test_the_rows_of_a_csv_logger_are_those_of_a_run_never_stopped(tmp_path):
    Logged(tmp_path / "whole").go()
    for stop in (5, 10):
        with pytest.raises(StoppedError):
            Logged(tmp_path / "logs", stop).go(tmp_path / "checkpoints", **WITHIN)
    Logged(tmp_path / "logs").go(tmp_path / "checkpoints", **WITHIN)
    for name in ("training_results.csv", "eval_results.csv"):
        rows = (tmp_path / "whole" / name).read_text()
        assert rows.count("\n") > 9
        assert (tmp_path / "logs" / name).read_text() == rows


# --- arguments ------------------------------------------------------------------------------------


@parametrize(
    ("arguments", "error", "says"),
    [
        ({"folder": 3}, TypeError, "folder must be a path, got 3"),
        ({"every_epochs": 0}, ValueError, "every_epochs must be at least 1, got 0"),
        ({"every_epochs": 1.5}, TypeError, "every_epochs must be a whole number, got 1.5"),
        ({"keep": 1}, ValueError, "keep must be at least 2, got 1"),
        ({"keep": None}, TypeError, "keep must be a whole number, got None"),
        ({"strategy": 5}, TypeError, "strategy must be an Avalanche strategy, got 5"),
        ({"stream": 5}, TypeError, "stream must be a sequence of experiences, got 5"),
    ],
)
def test_bad_arguments(tmp_path, tiny, arguments, error, says):
    arguments = {"stream": tiny.train_stream, "strategy": None, "folder": tmp_path} | arguments
    if arguments["strategy"] is None:
        arguments["strategy"] = naive(linear_head())
    with pytest.raises(error, match=says):
        checkpointed(**arguments)


def test_several_processes_are_refused(tmp_path, tiny, monkeypatch):
    strategy = naive(linear_head())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="one process"):
        checkpointed(tiny.train_stream, strategy, tmp_path)


# --- a stored checkpoint --------------------------------------------------------------------------


def test_a_checkpoint_of_version_1_keeps_loading(tmp_path, tiny):
    """Written by `PYTHONPATH=.:tests python tests/checkpoint/checkpoint_runs.py example FOLDER`."""
    shutil.copy(DATA / "version-1.checkpoint", tmp_path / "00000005.checkpoint")
    stored = torch.load(DATA / "version-1-weights.pt", weights_only=True)
    strategy, rest = checkpoint_runs.example(tiny, tmp_path, every_epochs=1)
    clock = strategy.clock
    assert (clock.train_exp_counter, clock.train_exp_epochs, clock.train_iterations) == (1, 2, 15)
    assert same(weights(strategy.model), stored["weights"])
    assert same(accumulators(strategy), stored["accumulators"])
    assert strategy.model[2].classifier.out_features == 4
    for experience in rest:
        strategy.train(experience)
    assert clock.train_iterations == 27
    assert strategy.model[2].classifier.out_features == 6


# --- Avalanche's own ------------------------------------------------------------------------------


@pytest.fixture
def unmended():
    """Undo afterwards what mend_save_checkpoint does to the process."""
    before = set(vars(torch.optim))
    yield
    for name in set(vars(torch.optim)) - before:
        delattr(torch.optim, name)


@pytest.mark.filterwarnings("ignore")  # Avalanche's own, and dill's
def test_avalanches_checkpoints_work_when_mended(tiny, tmp_path, unmended):
    path = tmp_path / "strategy.pkl"
    methods = {EWC: {"ewc_lambda": 1.0}, Replay: {"mem_size": 5}}

    def make(method):
        model = growing_head()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        return build(method, model, optimizer=optimizer, **methods[method])

    stopped = {method: fit(make(method), tiny.train_stream[:1]) for method in methods}
    with pytest.raises(pickle.PicklingError):
        save_checkpoint(stopped[EWC], path)
    mend_save_checkpoint()
    for method in methods:
        save_checkpoint(stopped[method], path)
        again, done = maybe_load_checkpoint(make(method), path)
        assert done == 1
        fit(again, tiny.train_stream[done:])
        whole = fit(make(method), tiny.train_stream)
        assert same(weights(again.model), weights(whole.model))
