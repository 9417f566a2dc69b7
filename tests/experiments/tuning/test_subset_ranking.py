"""Whether a part of the training data ranks settings as all of it does."""

import csv
import json

import pandas as pd
import pytest

from experiments.errors import UserError
from experiments.protocol.tuned_settings import make_config
from experiments.running.run import run
from experiments.tuning.search import search
from experiments.tuning.subset_ranking import rank_subset, summary

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


def test_trials_of_a_part_are_run_again_with_all_data(tmp_path):
    words = ["split-digits", "domain", ["naive"], tmp_path, 3, 1, (1,), 32]
    search(*words, train_share=0.2)
    for _ in range(2):
        printed = rank_subset(tmp_path, ["naive"], jobs=1)
        assert printed.startswith("naive: 3 trials, rank correlation")
    with open(tmp_path / "trials.csv", encoding="utf-8") as file:
        trials = list(csv.DictReader(file))
    with open(tmp_path / "subset_ranking.csv", encoding="utf-8") as file:
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
    with pytest.raises(UserError, match="holds no search of ewc"):
        rank_subset(tmp_path, ["ewc"])
    search("split-digits", "domain", ["si"], tmp_path, 1, 1, (1,), 32, train_share=0.2)
    with pytest.raises(UserError, match="no two trials of si"):
        rank_subset(tmp_path, ["si"])
    search("split-digits", "domain", ["adam"], tmp_path / "all", 1, 1, (1,), 32)
    with pytest.raises(UserError, match="with all of the data already"):
        rank_subset(tmp_path / "all", ["adam"])


def test_what_a_choice_by_a_part_costs():
    """Ranks 1 2 3 4 become 1 2 4 3: 1 - 6 · 2 / (4 · 15) = 0.8 (Spearman)."""
    values = ((0.1, 0.2), (0.2, 0.3), (0.3, 0.9), (0.4, 0.8))
    rows = [{"method": "si", "part": part, "whole": whole} for part, whole in values]
    assert summary(pd.DataFrame(rows)) == (
        "si: 4 trials, rank correlation 0.80, the choice costs 10.0 points"
    )
