"""The benchmarks run and count rightly; what they measure no test asserts."""

import csv
import re

import numpy as np
import pytest
import torch
from small_data import write_mnist
from torch import nn

from avalanche_classp import CLASSPOptimizer
from experiments import cli
from experiments.speed import directions, growth, long, loop, step
from experiments.speed.measure import in_turn, ratio


def main(words):
    """Run ``python -m experiments speed``."""
    return cli.main(["speed", *words])


def test_contenders_take_turns_and_the_median_call_of_a_turn_counts(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def contender(name, durations):
        def call():
            order.append(name)
            clock[0] += durations[order.count(name) - 1]

        return call

    calls = {"a": contender("a", [1, 9, 2, 5, 5, 5]), "b": contender("b", [3, 3, 7, 1, 1, 1])}
    assert in_turn(calls, rounds=2, calls=3) == {"a": [2, 5], "b": [3, 1]}
    assert order == ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3


def test_ratios_are_paired():
    assert ratio([1.0, 8.0, 9.0], [2.0, 2.0, 3.0]) == "3.00 [0.50 to 4.00]"


def test_step_compares_every_way(monkeypatch, capsys):
    monkeypatch.setattr(step, "MODELS", {"tiny": lambda: nn.Linear(4, 3)})
    main(["step", "--quick"])
    printed = capsys.readouterr().out
    assert "tiny, 0.00 M parameters in 2 tensors, n = 2" in printed
    assert all(f"  {first} / {second}: " in printed for first, second in step.PAIRS)


def test_step_compares_every_way_of_an_accelerator():
    """Parameters on the meta device have no numbers, but every way there is must be made."""
    params = list(nn.Linear(4, 3, device="meta").parameters())
    compared = {name for pair in step.PAIRS_ON_AN_ACCELERATOR for name in pair}
    assert compared == set(step._contenders(params))


def test_a_device_that_is_not_there_is_one_line(capsys):
    assert main(["step", "--quick", "--device", "cuda:99"]) == 2
    assert capsys.readouterr().err.startswith("error: device 'cuda:99' cannot be used here (")


def test_an_interrupted_measurement_does_not_say_that_it_goes_on(monkeypatch, capsys):
    def interrupted(rounds, device):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.speed.step.measure_step", interrupted)
    assert main(["step"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
def test_growth_counts_classps_four_bytes_and_draws(tmp_path, capsys):
    write_mnist(tmp_path)
    main(["growth", "--quick", "--data-root", str(tmp_path), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert printed.count(" and 4.0 bytes a parameter at") == 2
    with open(tmp_path / "out" / "growth.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(growth.METHOD_NAMES)
    sizes = [int(row["state_bytes"]) for row in rows if row["method"] == "ewc"]
    assert sizes[0] < sizes[1] < sizes[2]  # two copies of the model for each experience
    assert (tmp_path / "out" / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["split-mnist", "classp"])
def test_loop_ends_with_the_same_weights(case, tmp_path, capsys):
    write_mnist(tmp_path)
    main([case, "--quick", "--data-root", str(tmp_path)])
    printed = capsys.readouterr().out
    expected = "same weights: True" if case in loop.CASES else "naive / CLASSP"
    assert expected in printed


def test_every_way_of_directions_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(directions, "MODELS", {"mlp-256": (64,)})
    main(["directions", "--quick"])
    printed = capsys.readouterr().out
    for way in directions.WAYS:
        assert re.search(rf"  {way} / sgd: [0-9.]+ \[[0-9.]+ to [0-9.]+\]\n", printed)


@pytest.mark.filterwarnings("ignore")
def test_metrics_are_timed(tmp_path, capsys):
    write_mnist(tmp_path)
    main(["metrics", "--quick", "--data-root", str(tmp_path)])
    printed = capsys.readouterr().out
    shares = [float(line.split("themselves ")[1].split()[0]) for line in printed.splitlines()[-4:]]
    assert all(share > 0 for share in shares)


@pytest.mark.filterwarnings("ignore")
def test_long_streams_keep_four_bytes_a_parameter(capsys):
    main(["long", "--quick"])
    size = 4 * (64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10)
    expected = f"state {size} bytes after the first experience, {size} after the last"
    assert expected in capsys.readouterr().out


def test_saturation_is_where_the_formats_say(capsys):
    """A format with p binary digits counts to 2ᵖ; half-precision weights keep float32 sums."""
    main(["saturation", "--quick"])
    printed = capsys.readouterr().out
    for dtype in ("float32", "bfloat16", "float16"):
        assert f"of {dtype} weights: {2**24}\n" in printed
    assert f"if it were bfloat16 itself: {2**8}\n" in printed
    assert f"if it were float16 itself: {2**11}\n" in printed
    assert "power 1, g = 1: 1.0000 at 1e+03\n" in printed


def test_float32_stops_counting_ones_where_it_must():
    ones = long.DRAWS["g = 1"]
    assert long.walk(ones, 1, 2**24 + 2**23, np.float32, np.float32)[0] == 2**24
    assert long.walk(ones, 1, 2**24 + 2**23, np.float64, np.float64)[0] == 2**24 + 2**23


@pytest.mark.parametrize("draw", long.DRAWS.values())
@pytest.mark.parametrize("power", [1, 2])
def test_walks_are_the_optimizers(power, draw, monkeypatch):
    """Step by step through the optimizer; with parts, so that their seams are crossed."""
    monkeypatch.setattr(long, "_PART", 70)
    for kind in (torch.float32, torch.float64):
        weight = nn.Parameter(torch.full((), long.START, dtype=kind))
        optimizer = CLASSPOptimizer([weight], lr=long.LR, epsilon=long.EPSILON, power=power)
        rng = np.random.default_rng(0)
        for g in np.concatenate([draw(rng, n) for n in (70, 70, 60)]):
            weight.grad = torch.tensor(g, dtype=kind)
            optimizer.step()
        dtype = {torch.float32: np.float32, torch.float64: np.float64}[kind]
        expected = long.walk(draw, power, 200, dtype, dtype)
        accumulator = optimizer.state[weight]["accumulator"].item()
        assert (accumulator, weight.item()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["steps"], "unknown case 'steps'; cases are step,"),
        (["step", "--rounds", "0"], "--rounds must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_arguments_give_one_line(arguments, message, capsys):
    before = torch.get_num_threads()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert torch.get_num_threads() == before
