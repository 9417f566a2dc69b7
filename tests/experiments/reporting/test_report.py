"""Tables and figures, on made-up results; the oracles are scipy, numpy and numbers by hand."""

import base64
import csv
import io
import itertools
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from scipy import stats

from experiments.errors import UserError
from experiments.protocol.methods import style_of
from experiments.reporting import figures, report
from experiments.reporting.figures import Point, place_labels
from experiments.reporting.report import write_report
from experiments.reporting.side_by_side import side_by_side
from experiments.reporting.statistics import mean_interval
from experiments.reporting.tables import (
    ACCURACIES,
    EXTENSIONS,
    csv_table,
    markdown_table,
    plain_table,
    table_rows,
    wrap_label,
)
from experiments.running.records import Results

ALL = [
    *("naive", "adagrad", "adam", "ewc", "ewc-online", "si", "mas", "lwf", "rwalk", "replay"),
    *("joint", "classp"),
]
FIGURES = [
    *("accuracy.png", "forgetting.png", "matrix.png", "memory.png", "time.png", "map.png"),
]
RESULTS_README = Path(__file__).parents[3] / "experiments" / "results" / "README.md"
HALF = stats.t.ppf(0.975, 1) / 2  # of two values: half the interval's width over their distance


def fake_config(method, seed, **fields):
    return {
        "benchmark": "split-digits",
        "scenario": "class",
        "experiences": 5,
        "model": "mlp",
        "method": method,
        "seed": seed,
        "epochs": 1,
        "batch_size": 32,
        "hyper": {"lr": 0.01},
        "device": "cpu",
        "validation": False,
        "train_share": 1.0,
        **fields,
    }


def fake_result(method, seed, accuracy=0.5, config=None, **fields):
    nothing = None if method == "joint" else 0.1
    return {
        "config": fake_config(method, seed, **(config or {})),
        "command": "python -m experiments compare",
        "setting": "searched",
        "average_accuracy": accuracy,
        "forgetting": nothing,
        "backward_transfer": nothing,
        "forward_transfer": nothing,
        "learning_accuracy": nothing,
        "accuracy_matrix": [[accuracy] * 5] * (1 if method == "joint" else 5),
        "seconds_per_experience": 1.0,
        "eval_seconds": [0.5, 0.5],
        "state_bytes": [0, 4_000_000],
        "state_bytes_per_parameter": 4.0,
        "peak_memory_bytes": 2**30,
        "peak_device_bytes": None,
        **fields,
    }


def random_results(methods, experiences, seeds):
    """Return plausible results: what was learnt fades, each method by its own amount."""
    generator = np.random.default_rng(0)
    results = []
    for (place, method), seed in itertools.product(enumerate(methods), range(seeds)):
        matrix = generator.uniform(0.1, 0.3, (experiences, experiences)) + 0.05 * place
        np.fill_diagonal(matrix, generator.uniform(0.9, 1, experiences))
        matrix = matrix[-1:] if method == "joint" else matrix
        results.append(
            fake_result(
                method,
                seed,
                float(matrix[-1].mean()),
                {"experiences": experiences},
                accuracy_matrix=matrix.tolist(),
                seconds_per_experience=generator.uniform(0.5, 3),
                state_bytes_per_parameter=4.0 * (place % 4),
                accumulator_maps=generator.uniform(0, 1, (experiences, 28, 28)).tolist()
                if method == "classp"
                else [],
            )
        )
    return results


# Numbers


def test_intervals_are_students():
    values = [0.3, 0.5, 0.35, 0.6]
    mean, half = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert np.isnan(mean_interval([1.0])[1])


def test_the_table_pairs_seeds_with_classps():
    ours, theirs = [0.9, 0.8, 0.85], [0.7, 0.72, 0.6]
    results = [fake_result("classp", i, a) for i, a in enumerate(ours)]
    results += [fake_result("ewc", i, a) for i, a in enumerate(theirs)]
    best, other = table_rows(results)
    assert (best["method"], best["n"], best["difference"], best["pairs"]) == ("classp", 3, None, 0)
    interval = stats.ttest_rel(theirs, ours).confidence_interval(0.95)
    mean, half = other["difference"]
    assert (mean - half, mean + half) == pytest.approx((100 * interval.low, 100 * interval.high))
    assert other["pairs"] == 3


def test_a_difference_is_over_the_seeds_of_both():
    results = [fake_result("classp", i, a) for i, a in ((0, 0.9), (1, 0.8), (3, 0.1))]
    results += [fake_result("ewc", i, a) for i, a in ((1, 0.7), (2, 0.0), (3, 0.3))]
    row = next(row for row in table_rows(results) if row["method"] == "ewc")
    assert row["difference"] == pytest.approx((5, 30 * HALF))  # of -10 and +20
    assert (row["n"], row["pairs"]) == (3, 2)


@pytest.mark.parametrize("key", ["experiences", "model", "scenario"])
def test_there_is_no_difference_to_classp_on_another_stream_or_model(key):
    other = {key: 10 if key == "experiences" else "other"}
    results = [fake_result("classp", 0), fake_result("ewc", 0), fake_result("si", 0, config=other)]
    known = {row["method"]: row["difference"] is not None for row in table_rows(results)}
    assert known == {"classp": False, "ewc": True, "si": False}


@pytest.mark.parametrize(("key", "extension"), EXTENSIONS.items())
def test_with_an_extension_there_is_a_difference_to_it_and_else_no_such_column(key, extension):
    methods = {"naive": 0.5, "classp": 0.75, extension: 0.875}
    results = [
        fake_result(name, seed, accuracy) for name, accuracy in methods.items() for seed in (0, 1)
    ]
    found = {row["method"]: row[key] for row in table_rows(results)}
    assert found == {extension: None, "classp": (-12.5, 0), "naive": (-37.5, 0)}
    assert f"vs {extension}" in markdown_table(table_rows(results))
    assert f",{key}," in csv_table(table_rows(results))
    without = table_rows([r for r in results if r["config"]["method"] != extension])
    assert f"vs {extension}" not in markdown_table(without) and key not in csv_table(without)


def test_with_two_settings_of_classp_there_is_no_difference():
    results = [fake_result("classp", 0), fake_result("ewc", 0)]
    results.append(fake_result("classp", 0, config={"epochs": 2}))
    assert [row["difference"] for row in table_rows(results)] == [None] * 3


def test_different_settings_of_a_method_are_different_rows():
    results = [fake_result("naive", 0, 0.5), fake_result("naive", 1, 0.6)]
    results.append(fake_result("naive", 0, 0.1, {"hyper": {"lr": 0.5}}))
    assert [row["n"] for row in table_rows(results)] == [2, 1]


def test_the_label_says_what_differs():
    results = [fake_result("naive", 0, 0.5), fake_result("classp", 0, 0.4)]
    other = {"hyper": {"lr": 0.5}, "epochs": [2, 1, 1]}
    rows = table_rows([*results, fake_result("naive", 0, 0.1, other)])
    labels = [row["method"] for row in rows]
    assert labels == ["naive, epochs 1, lr 0.01", "classp", "naive, epochs 2/1/1, lr 0.5"]
    assert [row["name"] for row in rows] == ["naive", "classp", "naive"]


@pytest.mark.parametrize("values", [(0.1, 0.10000001), (1, 1.0)])
def test_settings_that_look_alike_are_kept_apart(values):
    rows = table_rows([fake_result("naive", 0, config={"hyper": {"lr": v}}) for v in values])
    assert {row["method"] for row in rows} == {f"naive, lr {v}" for v in values}


def small_case():
    """Two seeds of two methods and one of joint, each number different."""
    classp = [[0.9, 0.1], [0.5, 0.8]], [[0.8, 0.2], [0.4, 0.9]]
    naive = [[0.7, 0.3], [0.2, 0.6]], [[0.9, 0.1], [0.1, 0.9]]
    methods = {"classp": (classp, 4.0), "naive": (naive, 0.0)}
    results = []
    for (method, (matrices, memory)), seed in itertools.product(methods.items(), (0, 1)):
        matrix = matrices[seed]
        results.append(
            fake_result(
                method,
                seed,
                sum(matrix[-1]) / 2,
                accuracy_matrix=matrix,
                forgetting=matrix[0][0] - matrix[1][0],
                backward_transfer=matrix[1][0] - matrix[0][0],
                forward_transfer=matrix[0][1] - 0.15,
                learning_accuracy=(matrix[0][0] + matrix[1][1]) / 2,
                seconds_per_experience=0.25 + seed,
                eval_seconds=[1.0, 2.0, 6.0 + seed],
                state_bytes=[0, memory * 1_000_000],
                state_bytes_per_parameter=memory,
                peak_memory_bytes=(512 + 2 * seed) * 2**20,
            )
        )
    joint = {"accuracy_matrix": [[0.9, 0.95]], "seconds_per_experience": 123.4}
    return [*results, fake_result("joint", 0, 0.925, **joint)]


# For each method: mean, and the distance of its two values.
BY_HAND = {
    "joint": {
        "average_accuracy": (92.5, None),
        "difference": (92.5 - 65, None),
        "seconds_per_experience": (123.4, None),
        "eval_seconds": (0.5, None),
        "state_megabytes": (4, None),
        "state_bytes_per_parameter": (4, None),
        "peak_memory_mib": (1024, None),
    },
    "classp": {
        "average_accuracy": (65, 0),
        "forgetting": (40, 0),
        "backward_transfer": (-40, 0),
        "forward_transfer": (0, 10),
        "learning_accuracy": (85, 0),
        "seconds_per_experience": (0.75, 1),
        "eval_seconds": (19 / 6, 1 / 3),
        "state_megabytes": (4, 0),
        "state_bytes_per_parameter": (4, 0),
        "peak_memory_mib": (513, 2),
    },
    "naive": {
        "average_accuracy": (45, 10),
        "difference": (-20, 10),
        "forgetting": (65, 30),
        "backward_transfer": (-65, 30),
        "forward_transfer": (5, 20),
        "learning_accuracy": (77.5, 25),
        "seconds_per_experience": (0.75, 1),
        "eval_seconds": (19 / 6, 1 / 3),
        "state_megabytes": (0, 0),
        "state_bytes_per_parameter": (0, 0),
        "peak_memory_mib": (513, 2),
    },
}


def test_csv_holds_every_number():
    rows = list(csv.DictReader(csv_table(table_rows(small_case())).splitlines()))
    assert [row["method"] for row in rows] == list(BY_HAND)
    for row in rows:
        expected = BY_HAND[row["method"]]
        keys = [key for key in row if f"{key}_ci95" in row]
        assert set(expected) <= set(keys)
        for key in keys:
            if key not in expected:
                assert row[key] == row[f"{key}_ci95"] == ""
                continue
            mean, distance = expected[key]
            assert float(row[key]) == pytest.approx(mean, rel=1e-5, abs=1e-9)
            if distance is None:
                assert row[f"{key}_ci95"] == ""
            else:
                half = float(row[f"{key}_ci95"])
                assert half == pytest.approx(distance * HALF, rel=1e-5, abs=1e-9)
    assert [row["n"] for row in rows] == ["1", "2", "2"]
    assert [row["pairs"] for row in rows] == ["1", "", "2"]
    assert rows[0]["setting"] == (
        "experiences 5, model mlp, epochs 1, batch_size 32, device cpu, lr 0.01"
    )


def test_markdown_shows_the_numbers():
    table = markdown_table(table_rows(small_case())).splitlines()
    assert table[0] == (
        "| method | family | n | accuracy % | vs classp | forgetting % | backward % | forward % "
        "| learning % | train s/exp | state MB |"
    )
    assert table[2:] == [
        "| joint | stores data | 1 | 92.5 | +27.5 | – | – | – | – | 123 | 4.00 |",
        "| classp | trains the network | 2 | 65.0 ± 0.0 | – | 40.0 ± 0.0 | -40.0 ± 0.0 "
        "| +0.0 ± 63.5 | 85.0 ± 0.0 | 0.750 ± 6.353 | 4.00 |",
        "| naive | trains the network | 2 | 45.0 ± 63.5 | -20.0 ± 63.5 | 65.0 ± 191 | -65.0 ± 191 "
        "| +5.0 ± 127 | 77.5 ± 159 | 0.750 ± 6.353 | 0.000 |",
    ]


def test_the_terminals_table_has_the_numbers_of_markdown():
    rows = table_rows(small_case())
    plain = plain_table(rows).splitlines()[3:]
    markdown = markdown_table(rows).splitlines()[2:]
    for line, of_markdown in zip(plain, markdown, strict=True):
        _, method, _family, *numbers, _ = of_markdown.split("|")
        assert line.split() == " ".join([method, *numbers]).split()


def test_nothing_is_shown_as_minus_zero():
    row = table_rows([fake_result("classp", 0, forward_transfer=-0.0001)])
    assert "| +0.0 |" in markdown_table(row)


def test_the_curve_and_the_matrix_are_means_over_the_seeds():
    rows = {row["method"]: row for row in table_rows(small_case())}
    assert np.allclose(rows["naive"]["curve"], [(80, 20 * HALF), (45, 10 * HALF)])
    assert np.allclose(rows["naive"]["matrix"], [[80, 20], [15, 75]])
    # Joint training is measured once: a level.
    (first, second) = rows["joint"]["curve"]
    assert first[0] == second[0] == 92.5
    assert math.isnan(first[1])
    assert np.allclose(rows["joint"]["matrix"], [[90, 95]])


def test_the_curve_of_many_experiences_is_of_those_so_far():
    results = random_results(["ewc"], experiences=20, seeds=4)
    (row,) = table_rows(results)
    matrices = np.array([result["accuracy_matrix"] for result in results])
    for i in (0, 7, 19):
        accuracies = 100 * matrices[:, i, : i + 1].mean(1)
        low, high = stats.t.interval(0.95, 3, accuracies.mean(), stats.sem(accuracies))
        assert row["curve"][i] == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert row["average_accuracy"] == pytest.approx(row["curve"][-1])


def test_a_single_seed_has_no_interval():
    rows = table_rows([fake_result("classp", 0), fake_result("joint", 0, 0.9)])
    assert "±" not in markdown_table(rows) + plain_table(rows)
    for row in csv.DictReader(csv_table(rows).splitlines()):
        assert not any(value for key, value in row.items() if key.endswith("_ci95"))


@pytest.mark.parametrize("seeds", [1, 2, 10])
def test_twelve_methods_fit_a_terminal(seeds):
    results = random_results(ALL, experiences=20, seeds=seeds)
    for i, result in enumerate(results):  # wide numbers
        result["backward_transfer"] = -0.9 + 0.05 * (i % seeds)
        result["seconds_per_experience"] = 0.25 + 0.01 * (i % seeds)
        result["state_bytes"] = [1_234_500_000]
    lines = plain_table(table_rows(results)).splitlines()
    assert len(lines) == 3 + 12
    assert {line.split()[0] for line in lines[3:]} == set(ALL)
    assert max(map(len, lines)) <= 120
    assert len({len(line) for line in lines[3:]}) == 1


def test_long_labels_go_on_in_further_lines():
    hypers = [{"epsilon": 10.0**-i, "lr": 0.1 * i, "threshold": 1 / i} for i in (1, 2, 3)]
    results = [
        fake_result("classp", seed, 0.5 + 0.1 * seed, {"hyper": hyper})
        for hyper, seed in itertools.product(hypers, (0, 1))
    ]
    rows = table_rows(results)
    lines = plain_table(rows).splitlines()
    assert max(map(len, lines)) <= 120
    shown = " ".join(line[:16].strip() for line in lines[3:])
    for row in rows:
        assert len(row["method"]) > 30
        assert row["method"][:16] in shown
    assert all(f"{key} " in shown for key in hypers[0])


def test_labels_break_behind_commas():
    assert wrap_label("classp, epochs 3, lr 0.01", 20) == ["classp, epochs 3,", "lr 0.01"]
    assert wrap_label("ewc-online", 20) == ["ewc-online"]
    # What is longer than a line is broken at its hyphens.
    assert wrap_label("classp-matrix, lr 1e-05", 12) == ["classp-", "matrix,", "lr 1e-05"]
    assert wrap_label("classp-matrix, lr 1e-05", 14) == ["classp-matrix,", "lr 1e-05"]


# Figures


def drawn(results, monkeypatch):
    """Return the figures themselves in place of their files' contents."""
    monkeypatch.setattr(figures, "_png", lambda figure: figure)
    return figures.draw_figures(table_rows(results), "title")


def test_the_accuracy_figure_shows_the_curves_and_their_bands(monkeypatch):
    results = small_case()
    rows = {row["method"]: row for row in table_rows(results)}
    figure = drawn(results, monkeypatch)["accuracy.png"]
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == list(rows)  # so is the legend: best first
    for method, line in lines.items():
        assert line.get_xdata().tolist() == [1, 2]
        assert line.get_ydata() == pytest.approx([mean for mean, _ in rows[method]["curve"]])
    (band,) = (b for b in axes.collections if to_hex(b.get_facecolor()) == figures_colour("naive"))
    (path,) = band.get_paths()
    corners = {(x, round(float(y), 6)) for x, y in path.vertices}
    ends = {1: (80, 20 * HALF), 2: (45, 10 * HALF)}
    for x, (mean, half) in ends.items():
        assert {y for at, y in corners if at == x} == {round(mean - half, 6), round(mean + half, 6)}
    assert len(figure.legends[0].get_texts()) == 3
    low, high = axes.get_ylim()
    assert low >= -2
    assert high <= 102


def figures_colour(method):
    return style_of(method).colour


def test_the_twelve_methods_look_different_and_the_same_everywhere(monkeypatch):
    drawings = drawn(random_results(ALL, 5, 2), monkeypatch)
    looks = {
        line.get_label(): (line.get_color(), line.get_marker(), line.get_linestyle())
        for line in drawings["accuracy.png"].axes[0].get_lines()
    }
    assert len({colour for colour, _, _ in looks.values()}) == 12
    assert len({marker for _, marker, _ in looks.values()}) == 12
    assert looks["joint"][2] == "--"
    for name in ("memory.png", "time.png"):
        (axes,) = drawings[name].axes
        colours = sorted(container.lines[0].get_color() for container in axes.containers)
        assert colours == sorted(colour for colour, _, _ in looks.values())
    few = drawn(random_results(["lwf", "classp"], 5, 2), monkeypatch)["accuracy.png"].axes[0]
    assert all(looks[line.get_label()][0] == line.get_color() for line in few.get_lines())


def test_classp_lies_on_top_and_is_thickest(monkeypatch):
    lines = drawn(random_results(ALL, 5, 2), monkeypatch)["accuracy.png"].axes[0].get_lines()
    by_order = sorted(lines, key=lambda line: line.get_zorder())
    by_width = sorted(lines, key=lambda line: line.get_linewidth())
    assert by_order[-1] is by_width[-1]
    assert by_order[-1].get_label() == "classp"
    assert by_order[-2].get_zorder() < by_order[-1].get_zorder()


def test_settings_of_one_method_differ_in_their_line(monkeypatch):
    results = [fake_result("naive", 0, 0.5 + lr, {"hyper": {"lr": lr}}) for lr in (0.1, 0.2, 0.3)]
    results += [fake_result("new-1", 0), fake_result("new-2", 0)]
    lines = drawn(results, monkeypatch)["accuracy.png"].axes[0].get_lines()
    assert len({line.get_color() for line in lines}) == 2
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 5


@pytest.mark.parametrize(("experiences", "numbers"), [(2, True), (10, True), (11, False)])
def test_the_matrix_figure_shows_each_methods_matrix(experiences, numbers, monkeypatch):
    results = random_results(["naive", "joint", "classp"], experiences, 2)
    figure = drawn(results, monkeypatch)["matrix.png"]
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    for row in table_rows(results):
        axes = panels[row["method"]]
        (image,) = axes.get_images()
        assert np.allclose(image.get_array(), row["matrix"])
        assert image.get_clim() == (0, 100)
        shown = [text.get_text() for text in axes.texts]
        assert shown == ([f"{x:.0f}" for line in row["matrix"] for x in line] if numbers else [])
        height = 1 if row["method"] == "joint" else experiences
        assert image.get_array().shape == (height, experiences)
    assert [label.get_text() for label in panels["joint"].get_yticklabels()] == ["all"]


@pytest.mark.parametrize(
    ("name", "key", "scale"),
    [
        ("memory.png", "state_bytes_per_parameter", "symlog"),
        ("time.png", "seconds_per_experience", "log"),
    ],
)
def test_the_cost_figures_show_accuracy_with_its_error(name, key, scale, monkeypatch):
    results = small_case()
    (axes,) = drawn(results, monkeypatch)[name].axes
    assert axes.get_xscale() == scale
    for row, container in zip(table_rows(results), axes.containers, strict=True):
        point, _, bars = container.lines
        assert point.get_xydata()[0] == pytest.approx((row[key][0], row["average_accuracy"][0]))
        ends = [bar.get_segments()[0] for bar in bars]
        for axis, (mean, half) in enumerate((row[key], row["average_accuracy"])):
            if half > 0:  # not so for one seed or equal values
                expected = pytest.approx([mean - half, mean + half])
                assert any(end[:, axis] == expected for end in ends)
    low, high = axes.get_xlim()
    assert all(low < row[key][0] < high for row in table_rows(results))
    assert {text.get_text() for text in axes.texts} == {"joint", "classp", "naive"}
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 2


@pytest.mark.parametrize(
    "values", [[0, 0, 0], [4, 4, 4], [0.0001, 4, 12], [0, 3000, 2e6], [0.5, 0.5, 0.9]]
)
def test_the_memory_axis_takes_any_memory(values, monkeypatch):
    results = [
        fake_result(method, 0, state_bytes_per_parameter=value)
        for method, value in zip(("naive", "classp", "ewc"), values, strict=True)
    ]
    (axes,) = drawn(results, monkeypatch)["memory.png"].axes
    low, high = axes.get_xlim()
    assert low < min(values)
    assert max(values) < high
    assert 2 <= len(axes.get_xticks()) <= 11


@pytest.mark.parametrize("values", [[1.4, 1.6], [0.001, 5000], [3, 200]])
def test_the_time_axis_takes_any_time(values, monkeypatch):
    results = [
        fake_result(method, seed, seconds_per_experience=value * (1 + seed))
        for (method, value), seed in itertools.product(
            zip(("naive", "classp"), values, strict=True), (0, 1)
        )
    ]
    (axes,) = drawn(results, monkeypatch)["time.png"].axes
    low, high = axes.get_xlim()
    assert 0 < low < min(values)  # although the intervals reach below 0
    assert 2 * max(values) / 1.5 < high
    assert 1 <= sum(low <= tick <= high for tick in axes.get_xticks()) <= 12


def boxes_of_labels(points):
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(0, 100))
    place_labels(axes, points)
    boxes = {}
    for text in axes.texts:
        boxes[text.get_text()] = Text.get_window_extent(text, canvas.get_renderer())
    spots = [axes.transData.transform((p.x, p.y)) for p in points]
    return boxes, spots, axes.get_window_extent()


@pytest.mark.parametrize("bars", [(0.1, 1.0), (0.0, 0.0)], ids=["bars", "one seed"])
@pytest.mark.parametrize("crowd", ["one above the other", "cloud", "corner"])
def test_labels_do_not_overlap(crowd, bars):
    generator = np.random.default_rng(1)
    place = {
        "one above the other": lambda i: (4, 40 + 2 * i),
        "cloud": lambda i: generator.normal((5, 50), (0.5, 8)),
        "corner": lambda i: (10 - 0.1 * i, 100 - i),
    }[crowd]
    points = [Point(name, *map(float, place(i)), *bars, "k") for i, name in enumerate(ALL)]
    boxes, spots, frame = boxes_of_labels(points)
    assert set(boxes) == set(ALL)
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not one.overlaps(other)
    for box in boxes.values():
        assert frame.contains(box.x0, box.y0)
        assert frame.contains(box.x1, box.y1)
        assert not any(box.padded(5).contains(*spot) for spot in spots)  # a marker's half


def test_a_lonely_label_is_right_beside_its_point():
    boxes, (spot,), _ = boxes_of_labels([Point("ewc", 5, 50, 0, 0, "k")])
    assert 0 < boxes["ewc"].x0 - spot[0] < 15
    assert boxes["ewc"].y0 < spot[1] < boxes["ewc"].y1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("methods", "experiences", "seeds"),
    [(ALL, 20, 1), (ALL[-3:], 10, 2), (ALL[-2:], 2, 5), (ALL[:1], 1, 1)],
)
def test_figures_are_pictures_of_a_sane_size_and_the_same_each_time(methods, experiences, seeds):
    results = random_results(methods, experiences, seeds)
    contents = figures.draw_figures(table_rows(results), "title")
    assert list(figures.CAPTIONS) == FIGURES
    missing = {"map.png", "forgetting.png"} if methods == ALL[:1] else set()
    assert list(contents) == [name for name in FIGURES if name not in missing]
    for content in contents.values():
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == "PNG"
            pixels = np.asarray(image.convert("L"))
        height, width = pixels.shape
        assert 300 < height < 2500
        assert 600 < width < 2500
        assert 0.01 < (pixels < 250).mean() < 0.9  # neither empty nor filled
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert edge.min() == 255  # nothing is cut off
    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 30}):  # a user's own
        assert figures.draw_figures(table_rows(results), "title") == contents


# The whole report


@pytest.fixture
def no_figures(monkeypatch):
    """Save the time to draw them."""
    pictures = {name: name.encode() for name in FIGURES}
    monkeypatch.setattr(report, "draw_figures", lambda rows, title: pictures)


def failure(method, seed):
    return {"config": fake_config(method, seed), "error": "the training diverged"}


def test_the_report_is_the_same_whatever_the_order_of_the_results(tmp_path):
    results = random_results(["naive", "joint", "classp"], 5, 3)
    failures = [failure("ewc", seed) for seed in range(3)]
    texts = {write_report(results, tmp_path / "a", failures)}
    mixed = random.Random(1).sample(results, len(results))
    texts.add(write_report(mixed, tmp_path / "b", failures[::-1]))
    assert len(texts) == 1
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted([*FIGURES, "report.html", "table.csv", "table.md"])
    for name in names:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_the_order_of_the_results_changes_no_digit_and_no_row():
    results = random_results(["naive", "classp"], 5, 9)
    mixed = random.Random(2).sample(results, len(results))
    numbers = [
        [np.hstack([row["average_accuracy"], *row["curve"]]).tolist() for row in table_rows(group)]
        for group in (results, mixed)
    ]
    assert numbers[0] == numbers[1]
    ties = [fake_result("naive", 0), fake_result("ewc", 0)]
    assert table_rows(ties) == table_rows(ties[::-1])


def test_the_page_says_what_a_reader_must_know(tmp_path, no_figures):
    results = random_results(["naive", "joint", "classp"], 5, 3)
    text = write_report(results, tmp_path, [failure("ewc", 1)])
    source = "Settings: searched on validation data, for all methods."
    page = (tmp_path / "table.md").read_text(encoding="utf-8")
    rows = table_rows(results)
    title, *lines = (line for line in page.splitlines() if line)
    assert title == "# split-digits, class-incremental"
    assert lines[0] == source
    assert lines[1] == "Made by `python -m experiments compare`."
    assert markdown_table(rows) in page
    assert (
        "| method | family | n | train s/exp | eval s | state MB | state B/param | peak MiB |"
        in page
    )
    assert "**Failed:** ewc, seed 1: the training diverged" in page
    for name in FIGURES:
        assert f"* `{name}`: {figures.CAPTIONS[name]}." in page
    headings = {
        cell.strip() for line in lines if line.startswith("| method") for cell in line.split("|")
    }
    for heading in headings - {"method", ""}:
        assert sum(line.startswith((f"* {heading}: ", f"{heading}: ")) for line in lines) == 1
    assert (
        "All runs: experiences 5, model mlp, epochs 1, batch_size 32, device cpu. Settings:" in page
    )
    assert "same seeds" not in page + text
    assert text.splitlines()[:2] == ["split-digits, class-incremental", source]
    assert plain_table(rows) in text
    assert "FAILED ewc, seed 1: the training diverged" in text


def test_tuned_beside_untuned_is_said(tmp_path, no_figures):
    sources = {"naive": "default", "ewc": "default", "classp": "searched", "mas": "given"}
    text = write_report([fake_result(m, 0, setting=s) for m, s in sources.items()], tmp_path)
    line = (
        "Settings, NOT of the same kind for all methods: searched on validation data: classp; "
        "defaults, not tuned: ewc, naive; given by the user: mas."
    )
    assert line in text
    assert line in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_settings_that_differ_stand_by_their_method(tmp_path, no_figures):
    results = [
        fake_result("classp", 0, 0.9, {"hyper": {"lr": 0.001, "power": 2.0}, "epochs": [4, 1]}),
        fake_result("naive", 0, 0.8, {"model": "cnn"}),
        fake_result("naive", 0, 0.7, {"model": "mlp"}),
    ]
    write_report(results, tmp_path)
    page = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert page.endswith(
        "All runs: experiences 5, batch_size 32, device cpu. Settings:\n\n"
        "* classp: model mlp, epochs 4/1, lr 0.001, power 2\n"
        "* naive, model cnn: model cnn, epochs 1, lr 0.01\n"
        "* naive, model mlp: model mlp, epochs 1, lr 0.01\n"
    )


def test_rows_over_different_seeds_are_named(tmp_path, no_figures):
    results = [
        *(fake_result("classp", seed, 0.9) for seed in range(4)),
        *(fake_result("ewc", seed, 0.5) for seed in (1, 3)),
        fake_result("naive", 2, 0.4),
    ]
    sentence = "Not all rows have the same seeds: ewc 2 of 4; naive 1 of 4."
    assert sentence in write_report(results, tmp_path)
    assert f"**{sentence}" in (tmp_path / "table.md").read_text(encoding="utf-8")
    # As many, but others.
    results = [fake_result("classp", seed, 0.9) for seed in (0, 1)]
    results += [fake_result("ewc", seed, 0.5) for seed in (1, 2)]
    assert "classp 2 of 3; ewc 2 of 3." in write_report(results, tmp_path)


def test_the_accelerators_memory_is_shown_where_there_is_one(tmp_path, no_figures):
    results = [fake_result("classp", 0, peak_device_bytes=3 * 2**20), fake_result("naive", 0)]
    write_report(results, tmp_path)
    page = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| peak MiB | device peak MiB |" in page
    assert "| classp | 1 | 1.00 | 0.500 | 4.00 | 4.0 | 1024 | 3 |" in page
    assert "| naive | 1 | 1.00 | 0.500 | 4.00 | 4.0 | 1024 | – |" in page
    assert "* device peak MiB: " in page
    write_report(results[1:], tmp_path)
    assert "device peak" not in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_forgetting_is_the_table_s_at_the_end():
    """By hand: after each experience, the mean of what the ones before have lost."""
    matrix = [[0.9, 0.1, 0.1], [0.5, 0.8, 0.1], [0.6, 0.2, 0.7]]
    rows = table_rows([fake_result("ewc", 0, accuracy_matrix=matrix)])
    assert [mean for mean, _ in rows[0]["forgetting_curve"]] == pytest.approx([40, (30 + 60) / 2])
    assert table_rows([fake_result("joint", 0)])[0]["forgetting_curve"] == []


def test_result_files_without_maps_are_drawn_without(tmp_path):
    result = fake_result("classp", 0)
    assert "map.png" not in figures.draw_figures(table_rows([result]), "title")
    result["accumulator_maps"] = np.zeros((5, 8, 8)).tolist()  # nothing moved
    assert "map.png" in figures.draw_figures(table_rows([result]), "title")


class Outline(HTMLParser):
    """What a page holds: texts, table cells, and all that could load something."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.cells, self.links, self.tags = [], [], [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "action", "data")]
        if tag == "tr":
            self.cells.append([])

    def handle_data(self, data):
        self.texts.append(data)
        if data.strip() and (self.get_starttag_text() or "").startswith(("<td", "<th ")):
            self.cells[-1].append(data)


def test_the_html_page_gathers_everything_and_needs_nothing_else(tmp_path, no_figures):
    results = random_results(["naive", "joint", "classp"], 5, 3)
    results[0]["command"] = "python -m experiments compare --set '<script>alert(1)</script>'"
    results[0]["environment"] = {"python": "3.11.7", "torch": "2.15.0"}
    write_report(results, tmp_path, [failure("ewc", 1)])
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Outline(source)
    assert not page.tags & {"script", "link", "iframe", "object", "base"}
    pictures = [
        base64.b64decode(link.removeprefix("data:image/png;base64,")) for link in page.links
    ]
    assert pictures == [name.encode() for name in FIGURES]
    assert "url(" not in source and "@import" not in source
    text = "".join(page.texts)
    assert results[0]["command"] in text  # as text, not as a script
    assert "ewc, seed 1: the training diverged" in text
    assert "python 3.11.7, torch 2.15.0" in text
    rows = table_rows(results)
    expected = markdown_table(rows).splitlines()
    shown = [f"| {' | '.join(line)} |" for line in page.cells]
    assert shown[: 1 + len(rows)] == [expected[0], *expected[2:]]
    always = [column for column in ACCURACIES if not column.optional]
    assert all(column.meaning in text for column in always)
    assert '<tr class="ours"><td>classp</td>' in source


def test_every_column_and_figure_is_explained():
    explained = RESULTS_README.read_text(encoding="utf-8")
    header = csv_table(table_rows([fake_result("classp", 0)])).splitlines()[0].split(",")
    for name in [*header, *FIGURES]:
        if not name.endswith("_ci95"):
            assert f"| `{name}` |" in explained


# Several comparisons side by side


def test_side_by_side_has_a_column_for_each_comparison(tmp_path):
    """Accuracies 0.4 to 0.6 with two seeds; by hand."""
    places = {"first": ("classp-matrix", "naive", "joint"), "second": ("naive", "classp-matrix")}
    for place, methods in places.items():
        for method, seed in itertools.product(methods, (0, 1)):
            accuracy = 0.4 + 0.1 * seed + 0.2 * (method != "naive") + 0.1 * (method == "joint")
            Results(tmp_path / place).save(fake_result(method, seed, accuracy))
    half = f"{100 * 0.1 * HALF:.1f}"
    assert side_by_side([tmp_path / place for place in places]) == [
        "| method | family | first | second |\n"
        "| --- | --- | ---: | ---: |\n"
        f"| joint | stores data | 75.0 ± {half} |  |\n"
        f"| classp-matrix | trains the network | 65.0 ± {half} | 65.0 ± {half} |\n"
        f"| naive | trains the network | 45.0 ± {half} | 45.0 ± {half} |",
        "| method | family | first | second |\n"
        "| --- | --- | ---: | ---: |\n"
        "| joint | stores data | +10.0 ± 0.0 |  |\n"
        "| classp-matrix | trains the network | – | – |\n"
        "| naive | trains the network | -20.0 ± 0.0 | -20.0 ± 0.0 |",
    ]


def test_side_by_side_sorts_methods_by_the_folders_that_have_all_of_them(tmp_path):
    accuracies = {"first": {"ewc": 0.5, "mas": 0.6}, "hard": {"mas": 0.1}}
    for place, methods in accuracies.items():
        for method, accuracy in methods.items():
            Results(tmp_path / place).save(fake_result(method, 0, accuracy))
    table, _ = side_by_side([tmp_path / place for place in accuracies])
    assert table.splitlines()[2:] == ["| mas | 60.0 | 10.0 |", "| ewc | 50.0 |  |"]


def test_side_by_side_refuses_what_has_no_one_number(tmp_path):
    with pytest.raises(UserError, match="no finished runs"):
        side_by_side([tmp_path])
    for lr in (0.1, 0.2):
        Results(tmp_path).save(fake_result("ewc", 0, config={"hyper": {"lr": lr}}))
    with pytest.raises(UserError, match="several settings of a method"):
        side_by_side([tmp_path])


@pytest.mark.parametrize("name", ["table.md", "table.csv", "report.html", "accuracy.png"])
def test_a_report_replaces_no_foreign_file(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
        write_report([fake_result("naive", 0)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / name).unlink()
    write_report([fake_result("naive", 0)], tmp_path)
    write_report([fake_result("naive", 1)], tmp_path)  # its own
