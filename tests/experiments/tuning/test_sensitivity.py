"""One hyper-parameter is varied, the others stay."""

import csv

import pytest

from experiments.cli import main
from experiments.errors import UserError
from experiments.protocol.tuned_settings import searched_setting
from experiments.running.records import Results
from experiments.tuning import sensitivity

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


def test_sensitivity_varies_one_hyper_parameter_and_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "RATES", (0.5, 1e9))
    monkeypatch.setattr(sensitivity, "FACTORS", (1e-30,))
    place = ("split-digits", "domain")
    printed = sensitivity.write_sensitivity(*place, ["naive", "ewc"], 2, tmp_path, jobs=1)
    searched = searched_setting("split-digits", "domain", "ewc").hyper
    with open(tmp_path / "sensitivity.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["key"], row["searched"], row["n"]) for row in rows] == [
        ("naive", "lr", "False", "2"),
        ("naive", "lr", "True", "2"),
        ("naive", "lr", "False", "0"),
        ("ewc", "ewc_lambda", "False", "2"),
        ("ewc", "ewc_lambda", "True", "2"),
        ("ewc", "lr", "False", "2"),
        ("ewc", "lr", "True", "2"),
        ("ewc", "lr", "False", "0"),
    ]
    runs = Results(tmp_path).load()
    assert len(runs) == 2 * 7  # ewc's searched setting ran once
    without_penalty = [
        100 * result["average_accuracy"]
        for result in runs
        if result["config"]["hyper"].get("ewc_lambda", 1) < 1e-20
    ]
    assert len(without_penalty) == 2
    assert float(rows[3]["value"]) == pytest.approx(1e-30 * searched["ewc_lambda"], rel=1e-5)
    assert float(rows[3]["average_accuracy"]) == pytest.approx(sum(without_penalty) / 2, rel=1e-5)
    difference = float(rows[3]["average_accuracy"]) - float(rows[4]["average_accuracy"])
    assert float(rows[3]["difference"]) == pytest.approx(difference, abs=1e-3)
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert "no run ended" in printed
    with pytest.raises(UserError, match="nothing was searched for rwalk on split-digits"):
        sensitivity.write_sensitivity(*place, ["rwalk"], output=tmp_path)


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        ("defaults --trials 0", "a whole number of at least 1"),
        ("sensitivity --seeds 0", "a whole number of at least 1"),
        ("sensitivity --seeds 1000000000", "at most 10000"),
        ("sensitivity --jobs 0", "a whole number of at least 1"),
        ("subset-ranking folder --methods ewc --jobs 0", "a whole number of at least 1"),
    ],
)
def test_the_commands_refuse_a_wrong_number_in_one_line(words, limit, capsys):
    assert main(words.split()) == 2
    *_, option, value = words.split()
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option} must be {limit}, got {value};")
    assert error.count("\n") == 1
