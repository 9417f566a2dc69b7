"""The engines: the same numbers wherever runs are done, and nothing lost with a process or machine.

Workers import this module: what takes seconds to import is imported by the functions that need it.
"""

import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments.errors import UserError
from experiments.protocol.config import RunConfig
from experiments.running.engines import LocalEngine, RayEngine, make_engine

TESTS = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own
PATIENCE = 300
"""Seconds after which something that should happen will not; imports are slow on a busy machine."""


def wait_until(condition, what):
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.02)
    return found


# Work that takes no time. What it does is the config's method, its scenario a folder to write in.


def config_of(what, folder, seed=0, device="cpu"):
    return RunConfig("benchmark", str(folder), what, "model", 2, seed, 1, 1, device=device)


def play(config, *, progress):
    """Do what the config's method says, and leave a line about it in a file of the run's own."""
    with open(Path(config.scenario) / f"{config.method}-{config.seed}", "a+") as file:
        file.seek(0)
        first = not file.read()
        file.write(f"{os.getpid()} {time.monotonic()}\n")
    progress()
    match config.method:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "die once" if first:
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "raise":
            raise RuntimeError("a mistake\nwith details")
        case "nap":
            time.sleep(1)
        case "wait":
            time.sleep(PATIENCE)
    progress()
    import experiments

    threads = {key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    code = Path(experiments.__file__).parent
    with open(Path(config.scenario) / f"{config.method}-{config.seed}", "a") as file:
        file.write(f"{os.getpid()} {time.monotonic()}\n")
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"config": config.as_dict(), "threads": threads, "code": str(code), "gpu": gpu}


def lines(config):
    """Return who began or ended the run, and when."""
    text = (Path(config.scenario) / f"{config.method}-{config.seed}").read_text()
    return [(int(pid), float(when)) for pid, when in map(str.split, text.splitlines())]


def play_all(engine, configs):
    """Return the results in the configs' order, and the progress of each run."""
    progress = {config.key(): [] for config in configs}
    results = {}
    for config, result in engine.run(play, configs, lambda c, n: progress[c.key()].append(n)):
        assert config.key() not in results
        results[config.key()] = result
        assert RunConfig.from_dict(result["config"]) == config
    return [results[config.key()] for config in configs], list(progress.values())


# The local engine


@pytest.mark.slow
def test_local_processes_share_the_work(tmp_path):
    configs = [config_of("work", tmp_path, seed) for seed in range(7)]
    results, progress = play_all(LocalEngine(2), configs)
    assert len({lines(config)[0][0] for config in configs} - {os.getpid()}) == 2
    assert progress == [[0, 1, 2]] * 7
    assert all(set(result["threads"].values()) == {"1"} for result in results)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_no_more_processes_than_runs(tmp_path):
    (result,), _ = play_all(LocalEngine(50), [config_of("work", tmp_path)])
    assert "error" not in result


@pytest.mark.slow
def test_a_run_that_kills_its_process_costs_no_other(tmp_path):
    what = ["work", "die", "work", "die once", "exit", "work", "work"]
    configs = [config_of(name, tmp_path, seed) for seed, name in enumerate(what)]
    results, progress = play_all(LocalEngine(2), configs)
    errors = {name: result.get("error") for name, result in zip(what, results, strict=True)}
    assert errors == {
        "work": None,
        "die once": None,
        "die": "its process was killed by SIGKILL (out of memory?), in 2 tries",
        "exit": "its process ended with exit code 3, in 2 tries",
    }
    assert progress[1] == [0, 1, 0, 1]
    assert progress[3] == [0, 1, 0, 1, 2]
    assert all(len(lines(configs[i])) == 2 for i in (0, 2, 5, 6))


@pytest.mark.slow
def test_closing_ends_the_processes(tmp_path):
    configs = [config_of(name, tmp_path) for name in ("work", "wait")]
    with closing(LocalEngine(2).run(play, configs, lambda config, steps: None)) as ended:
        config, _ = next(ended)
        assert config.method == "work"
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


def test_unknown_engines_and_idle_addresses_are_refused():
    with pytest.raises(
        UserError, match="unknown engine 'slurm'; choose from local, fork, here, ray"
    ):
        make_engine("slurm")
    with pytest.raises(UserError, match="--ray-address host:1 is for --engine ray"):
        make_engine("local", ray_address="host:1")


# Real runs on the local engine


def grid():
    """Return the configs of quick runs, one of which diverges."""
    from small_data import small_config

    from experiments.protocol.methods import METHODS

    hyper = METHODS["classp"].defaults | {"lr": 1e30, "apply_decay": False}
    methods = ("naive", "classp", "ewc")
    quick = [small_config(method, seed=seed) for seed in range(3) for method in methods]
    return [small_config("classp", seed=7, hyper=hyper), *quick]


FAILED = "FAILED classp, seed 7: the training diverged"


def numbers(result):
    """Return what is the same wherever a run was done."""
    from small_data import without_times

    skip = {"schema", "command", "commit"}
    if result["config"]["seed"] > 0:
        skip.add("accumulator_maps")  # of the first seed alone they are kept
    return {k: v for k, v in without_times(result).items() if k not in skip}


@pytest.fixture(scope="module")
def alone():
    """Return each run's numbers by itself, in this process."""
    from experiments.running.compare import attempt

    return {config.key(): numbers(attempt(config, None, lambda: None)) for config in grid()}


def saved(folder):
    """Return the numbers in the folder's result files; refuses two files of one run."""
    from experiments.running.records import Results

    results = Results(folder).load()
    return {RunConfig.from_dict(result["config"]).key(): numbers(result) for result in results}


def finished(folder):
    """Return the finished runs and what tells one doing of a run from another."""
    from experiments.running.records import Results

    results = Results(folder).by_key().items()
    return {key: result["wall_seconds"] for key, result in results if "error" not in result}


@pytest.mark.slow
def test_a_worker_killed_in_the_midst_costs_nothing(tmp_path, alone, capsys):
    from experiments.protocol.methods import count_steps
    from experiments.running.compare import attempt, run_all
    from experiments.running.records import Results

    # One is done before, and not again.
    results = Results(tmp_path)
    results.save(attempt(grid()[1], None, lambda: None))
    (done,) = finished(tmp_path).items()
    killed = []

    def kill_one():
        wait_until(lambda: len(finished(tmp_path)) > 1, "a result")
        killed.append(multiprocessing.active_children()[0].pid)
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    (failure,) = run_all(grid(), results, jobs=2, steps=count_steps)
    killer.join()
    assert killed
    assert saved(tmp_path) == alone
    assert done in finished(tmp_path).items()
    assert "diverged" in failure["error"]
    shown = re.split(r"[\r\n]+", capsys.readouterr().err.strip())
    assert "1/10 runs:  10%" in shown[0]
    assert any(line.strip().startswith(FAILED) for line in shown)
    assert "10/10 runs: 100%" in shown[-1]


# Ray

GRID = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from test_engines import grid
from experiments.running.compare import run_all
from experiments.protocol.methods import count_steps
from experiments.running.records import Results
folder, address = sys.argv[1:]
sys.exit(len(run_all(grid(), Results(Path(folder)), None, None, count_steps, "", "ray", address)))
"""
"""Does the grid on a Ray cluster and exits with the number of failures."""

WAIT = """
import sys
import ray, test_engines
from experiments.running.engines import RayEngine
ray.cloudpickle.register_pickle_by_value(test_engines)
folder, address = sys.argv[1:]
configs = [test_engines.config_of("wait", folder, seed) for seed in range(5)]
list(RayEngine(None, address).run(test_engines.play, configs, lambda config, steps: None))
"""
"""Does runs on a Ray cluster that take for ever."""


def start(program, folder, cluster):
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS, Path(__file__).parent)))
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder), cluster.address],
        env=os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(program):
    """Wait for its end; it must say nothing but a bar that moves and which run failed."""
    out, err = program.communicate(timeout=PATIENCE)
    shown = re.split(r"[\r\n]+", err.decode().strip())
    assert (program.returncode, out) == (1, b""), err.decode()
    assert "10/10 runs: 100%" in shown[-1]
    ours = re.compile(rf"\s*$|\s*\d+/10 runs: |\s*{FAILED}")
    assert [line for line in shown if not ours.match(line)] == []


@pytest.fixture(scope="module")
def ray_folder():
    """Where Ray writes: short, because its sockets' names may have about a hundred characters."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else it leaves a file in the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_gcs_server_port_wait_time_s", str(PATIENCE))
        patch.delenv("RAY_ADDRESS", raising=False)
        import ray

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield Path(folder)
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(ray_folder):
    """Two machines with one CPU each, as processes of this one; Ray takes our word for a GPU."""
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster()
    for gpus in (0, 1):
        cluster.add_node(wait=False, num_gpus=gpus, **size)
    cluster.wait_for_nodes(timeout=PATIENCE)
    yield cluster
    cluster.shutdown()


def processes_of(node):
    """Return the node's own process and all that it has started."""
    import psutil

    (raylet,) = node.all_processes["raylet"]
    raylet = psutil.Process(raylet.process.pid)
    return [raylet, *raylet.children(recursive=True)]


def runs_on(node):
    """Return the titles of the processes in which the node is doing runs now."""
    import psutil

    titles = []
    for process in processes_of(node):
        with suppress(psutil.NoSuchProcess):
            titles += process.cmdline()[:1]
    return [title for title in titles if re.match(r"ray::.* seed \d", title)]


def is_idle(cluster):
    return not any(runs_on(node) for node in cluster.list_all_nodes())


@pytest.mark.slow
def test_ray_gets_the_code_and_bears_runs_that_kill_their_process(cluster, ray_folder, tmp_path):
    what = ["nap", "die", "die once", "raise", "nap"]
    configs = [config_of(name, tmp_path, seed) for seed, name in enumerate(what)]
    results, progress = play_all(RayEngine(address=cluster.address), configs)
    work, die, die_once, error, _ = results
    assert str(ray_folder) in work["code"]
    assert set(work["threads"].values()) == {"1"}
    assert die["error"].startswith("lost in 4 tries: WorkerCrashedError: ")
    assert len(lines(configs[1])) == 4
    assert "error" not in die_once
    assert error["error"] == "RuntimeError: a mistake"
    assert "in play" in error["traceback"]
    assert progress[2].count(0) == 2  # begun again


@pytest.mark.slow
def test_cuda_runs_share_a_gpu(cluster, tmp_path):
    configs = [config_of("work", tmp_path, seed, device="cuda:0") for seed in range(2)]
    results, _ = play_all(RayEngine(address=cluster.address), configs)
    assert [result["gpu"] for result in results] == ["0", "0"]


def test_a_cluster_without_what_is_needed_is_told_of(tmp_path, capsys):
    config = config_of("work", tmp_path, device="cuda")
    RayEngine(address="host:1")._warn_of_missing({"CPU": 4.0, "memory": 1.0}, [config])
    assert capsys.readouterr().err == (
        "the Ray cluster at host:1 has no GPU; the runs wait for one\n"
    )


@pytest.mark.slow
def test_ray_does_no_more_runs_at_a_time_than_jobs(cluster, tmp_path):
    configs = [config_of("nap", tmp_path, seed) for seed in range(3)]
    play_all(RayEngine(jobs=1, address=cluster.address), configs)
    times = [when for config in configs for _, when in lines(config)]
    assert times == sorted(times)


@pytest.mark.slow
def test_ctrl_c_cancels_the_runs(cluster, tmp_path):
    program = start(WAIT, tmp_path, cluster)
    wait_until(lambda: all(map(runs_on, cluster.list_all_nodes())), "runs on both machines")
    program.send_signal(signal.SIGINT)
    _, err = program.communicate(timeout=PATIENCE)
    assert err.decode().splitlines()[-1] == "KeyboardInterrupt"
    wait_until(lambda: is_idle(cluster), "the end of the interrupted program's runs")


@pytest.mark.slow
def test_a_killed_program_takes_its_runs_along_and_goes_on_where_it_was(cluster, tmp_path, alone):
    program = start(GRID, tmp_path, cluster)
    wait_until(lambda: len(finished(tmp_path)) >= 3 or program.poll() is not None, "results")
    program.kill()
    program.communicate()
    assert program.returncode == -signal.SIGKILL
    before = finished(tmp_path)
    assert 3 <= len(before) < 9
    wait_until(lambda: is_idle(cluster), "the end of the killed program's runs")

    finish(start(GRID, tmp_path, cluster))
    assert saved(tmp_path) == alone
    assert before.items() <= finished(tmp_path).items()


@pytest.mark.slow
def test_a_machine_lost_half_way_costs_nothing(cluster, tmp_path, alone):
    (node,) = cluster.worker_nodes
    program = start(GRID, tmp_path, cluster)
    wait_until(
        lambda: (len(finished(tmp_path)) >= 3 and runs_on(node)) or program.poll() is not None,
        "results, and a run on the machine",
    )
    assert len(finished(tmp_path)) < 9
    for process in processes_of(node):
        process.kill()
    finish(program)
    assert saved(tmp_path) == alone


@pytest.mark.slow
def test_without_an_address_ray_is_started_here_and_stopped(ray_folder, tmp_path):
    import psutil

    before = set(psutil.Process().children(recursive=True))
    configs = [config_of("work", tmp_path, seed) for seed in range(3)]
    results, _ = play_all(make_engine("ray", 2), configs)
    assert all(str(ray_folder) in result["code"] for result in results)
    after = set(psutil.Process().children(recursive=True))
    assert not psutil.wait_procs(after - before, timeout=PATIENCE)[1]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "ray://127.0.0.1:{}"])
def test_an_address_without_a_cluster_is_one_line(form, ray_folder, tmp_path, capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = form.format(free.getsockname()[1])
    with pytest.raises(UserError, match=rf"no Ray cluster answers at {address} .*--ray-address"):
        play_all(make_engine("ray", ray_address=address), [config_of("work", tmp_path)])
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_address_may_come_from_the_environment(ray_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "no-host.invalid:1")
    with pytest.raises(UserError, match=r"no Ray cluster answers at no-host\.invalid:1"):
        play_all(make_engine("ray"), [config_of("work", tmp_path)])


def test_a_word_that_is_no_address_is_one_line(ray_folder, tmp_path):
    with pytest.raises(UserError, match="cannot use the Ray cluster at nonsense: ValueError"):
        play_all(make_engine("ray", ray_address="nonsense"), [config_of("work", tmp_path)])


def test_missing_ray_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--engine ray: .*pip install ray brings it"):
        play_all(make_engine("ray"), [config_of("work", tmp_path)])
