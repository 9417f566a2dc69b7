"""Whether a part of the training data ranks settings as all of it does."""

import csv
import json

import pandas as pd
import pytest

from experiments.protocol.tuned_settings import make_config
from experiments.running.run import run
from experiments.tuning import subset_ranking as share
from experiments.tuning.search import search

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


def test_trials_of_a_part_are_run_again_with_all_data(tmp_path, capsys):
    words = ["split-digits", "domain", ["naive"], tmp_path, 3, 1, (1,), 32]
    search(*words, train_share=0.2)
    for _ in range(2):
        assert share.main([str(tmp_path), "--methods", "naive", "--jobs", "1"]) == 0
        assert "naive: 3 trials, rank correlation" in capsys.readouterr().out
    with open(tmp_path / "trials.csv", encoding="utf-8") as file:
        trials = list(csv.DictReader(file))
    with open(tmp_path / "share.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, trial in zip(rows, trials, strict=True):
        assert float(row["part"]) == pytest.approx(float(trial["validation_accuracy"]), abs=1e-6)
        config = make_config(
            "split-digits",
            "domain",
            "naive",
            1000,
            json.loads(trial["hyper"]),
            epochs=1,
            validation=True,
        )
        assert float(row["whole"]) == run(config)["average_accuracy"]
    assert share.main([str(tmp_path), "--methods", "ewc"]) == 2
    assert "holds no search of ewc" in capsys.readouterr().err
    search("split-digits", "domain", ["si"], tmp_path, 1, 1, (1,), 32, train_share=0.2)
    assert share.main([str(tmp_path), "--methods", "si"]) == 2
    assert "no two trials of si" in capsys.readouterr().err
    search("split-digits", "domain", ["adam"], tmp_path / "all", 1, 1, (1,), 32)
    assert share.main([str(tmp_path / "all"), "--methods", "adam"]) == 2
    assert "with all of the data already" in capsys.readouterr().err


def test_what_a_choice_by_a_part_costs():
    """Ranks 1 2 3 4 become 1 2 4 3: 1 - 6 · 2 / (4 · 15) = 0.8 (Spearman)."""
    values = ((0.1, 0.2), (0.2, 0.3), (0.3, 0.9), (0.4, 0.8))
    rows = [{"method": "si", "part": part, "whole": whole} for part, whole in values]
    assert share.summary(pd.DataFrame(rows)) == (
        "si: 4 trials, rank correlation 0.80, the choice costs 10.0 points"
    )
