"""One setting of CLASSP for all benchmarks."""

import csv
import json
import math

import pytest

from experiments.errors import DivergedError, UserError
from experiments.protocol.tuned_settings import searched_setting
from experiments.tuning import defaults

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


def test_the_search_for_defaults_means_over_benchmarks_and_goes_on(tmp_path, monkeypatch):
    """A benchmark with three scenarios counts as much as one with one."""
    seen, lrs = [], []

    def fake_run(config, data_root):
        seen.append((config.benchmark, config.scenario, config.epochs, config.seed))
        lrs.append(config.hyper["lr"])
        if config.scenario == "task":
            raise DivergedError("too fast")
        return {"average_accuracy": config.hyper["lr"] if config.scenario == "class" else 0.75}

    places = {"split-digits": {"train_share": 0.5}, "permuted-mnist": {"experiences": 3}}
    monkeypatch.setattr(defaults, "run", fake_run)
    monkeypatch.setattr(defaults, "require_data", lambda *args: None)
    monkeypatch.setattr(defaults, "PLACES", places)
    for trials in (1, 3):
        printed = defaults.search_defaults(trials, output=tmp_path)
    assert len(seen) == 3 * 4  # the first trial was not done again
    searched = searched_setting("split-digits", "class", "classp").hyper
    assert lrs[0] == 0.01 and lrs[4] == searched["lr"]
    assert seen[:4] == [
        *(("split-digits", scenario, 10, 1000) for scenario in ("class", "domain", "task")),
        ("permuted-mnist", "domain", 1, 1000),
    ]
    with open(tmp_path / "defaults.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    for row in rows:
        lr = json.loads(row["hyper"])["lr"]
        assert float(row["mean_accuracy"]) == pytest.approx(((lr + 0.75 + 0) / 3 + 0.75) / 2)
        assert row["split-digits/task"] == "0.000000"
    best = max(rows, key=lambda row: float(row["mean_accuracy"]))
    assert printed.endswith(best["hyper"])
    monkeypatch.setattr(defaults, "PLACES", {"split-digits": {}})
    with pytest.raises(UserError, match="other benchmarks"):
        defaults.search_defaults(3, output=tmp_path)
    for lr in (-1, math.nan, 1):
        with pytest.raises(UserError, match="outside of what is searched"):
            defaults.search_defaults(1, [(lr, 1e-8, 1.5)], tmp_path / "tried")
    assert not (tmp_path / "tried").exists()
    printed = defaults.search_defaults(1, [(1e-3, 1e-8, 1.5)], tmp_path / "tried")
    tried = json.loads(printed.split(" ", 1)[1])
    assert tried == {"lr": 1e-3, "threshold": 0.0, "epsilon": 1e-8, "power": 1.5}
