"""The language model's measurement, in little: texts, levels, search, final runs, going on."""

import math

import pytest
import torch

from avalanche_classp.optim.accumulators import diagonal
from experiments.cli import main
from experiments.language import study, texts, tuning

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


@pytest.fixture
def small(monkeypatch):
    """Make models, texts and runs tiny."""
    generator = torch.Generator().manual_seed(0)

    def text(first):
        parts = torch.randint(first, first + 8, (3, 400), generator=generator).to(torch.uint8)
        return texts.Text(*parts, checksum=f"{first}")

    made = {kind: text(20 * i) for i, kind in enumerate(texts.KINDS)}
    for module in (study, tuning):
        monkeypatch.setattr(module, "load", made.__getitem__)
    for name, value in {"WIDTH": 16, "HIDDEN": 24, "LAYERS": 1, "PRETRAINING_STEPS": 20}.items():
        monkeypatch.setattr(tuning, name, value)
    for name, value in {"EVERY": 2, "MOST_STEPS": 6, "HISTORY_STEPS": 2}.items():
        monkeypatch.setattr(tuning, name, value)
    monkeypatch.setattr(study, "LEVEL_STEPS", 2)


def test_kinds_of_text_are_there_and_their_parts_are_different():
    for kind in ("licences", "headers"):
        text = texts.load(kind)
        parts = [bytes(part.tolist()) for part in (text.train, text.validation, text.test)]
        assert min(map(len, parts)) >= 20_000
        middles = [part[i : i + 200] for part in parts[1:] for i in range(0, len(part), 5000)]
        assert sum(middle in parts[0] for middle in middles) < len(middles) / 4
    assert texts.load("headers").checksum != texts.load("licences").checksum


def test_code_has_neither_comments_nor_documentation(monkeypatch):
    source = b'"""Module."""\nx = "kept"  # gone\n\n\n'
    source += b'def f():\n    """Doc."""\n    # gone\n    return x\n'
    monkeypatch.setattr(texts, "_sources", lambda: iter([("m.py", source)]))
    ((_, code),) = texts._code()
    assert code.split() == ["x", "=", '"kept"', "def", "f():", "return", "x"]
    ((_, documentation),) = texts._docstrings()
    assert documentation == "Module.\n\nDoc."


@pytest.mark.parametrize("method", study.METHODS)
def test_history_is_taken_without_moving_a_weight(method, small, tmp_path):
    model = tuning.with_adapters(tuning.pretrained(tmp_path, print), "down", 0)
    hyper = {"lr": 0.1} if method in ("adamw", "sgd") else {"lr": 0.1, "epsilon": 1.0}
    optimizer = tuning.make_optimizer(tuning.Run(method, "down", hyper, 0), model)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert learning and all(p.eq(0).all() for p in learning)
    if method.startswith("classp"):
        tuning.take_history(optimizer, model, 0)
        assert any(diagonal(optimizer.state[p], p).any() for p in learning)
        assert all(p.eq(0).all() for p in learning)
        assert all(group["lr"] == 0.1 for group in optimizer.param_groups)


def test_forgetting_is_the_mean_rise_since_a_kind_was_learnt():
    losses = [[1.0, 5.0, 5.0], [1.5, 2.0, 5.0], [3.0, 3.0, 2.0]]
    assert tuning.forgetting(losses) == (2.0 + 1.0) / 2


def test_a_kind_is_trained_until_its_level(small, tmp_path):
    run = tuning.Run("adamw", "both", {"lr": 1e-2}, 0, {"code": math.inf, "licences": -math.inf})
    result = tuning.tune(run, tmp_path, print, ("code", "licences"))
    assert result["steps"] == {"code": 0, "licences": 6}
    assert result["reached"] == {"code": True, "licences": False}
    assert len(result["curves"]["licences"]) == 4
    assert [len(row) for row in result["losses"]] == [3, 3, 3]


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_stopped(small, tmp_path, monkeypatch, capsys):
    words = ["language", "--seeds", "1", "--trials", "2", "--output", str(tmp_path)]
    words += ["--methods", "adamw", "classp-inputs"]
    tune, runs = study.tune, []

    def stop_after_three(run, *rest):
        if len(runs) == 3:
            raise KeyboardInterrupt
        runs.append(run)
        return tune(run, *rest)

    monkeypatch.setattr(study, "tune", stop_after_three)
    assert main(words) == 130
    monkeypatch.setattr(study, "tune", lambda *all: runs.append(all[0]) or tune(*all))
    assert main(words) == 0
    done = len(runs)
    assert done == 4 + 2 * 2 + 2  # levels, trials, final runs
    assert main(words) == 0
    assert len(runs) == done
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "AdamW" in table and "history of inputs" in table


def test_damaged_records_are_said_in_one_line(tmp_path, capsys):
    (tmp_path / "records.jsonl.gz").write_bytes(b"nothing")
    assert main(["language", "--output", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "records.jsonl.gz is not a whole records file" in line
