"""Streams whose targets are numbers: against ridge regression's closed form; EWC's traps."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from avalanche.training import EWC
from torch import nn
from torch.testing import assert_close

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "regression.py"
pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


@pytest.fixture(scope="module")
def example():
    """Return the example's names, and what it printed by method."""
    words, sys.argv = sys.argv, ["regression"]
    printed = {}
    try:
        names = runpy.run_path(str(EXAMPLE), {"print": lambda line: printed.update([row(line)])})
    finally:
        sys.argv = words
    return names, printed


def row(line):
    method, number = re.match(r"(.*?)\s+([\d.]+)$", line).groups()
    return method, float(number)


def closed_form(names, train, epsilon):
    """Return ridge regression on all rows; the mean over a mini-batch of 8 counts."""
    x, y = names["x"][train.flatten()], names["y"][train.flatten()]
    x = nn.functional.pad(x, (1, 0), value=1.0)
    regular = x.T @ x + 8 * epsilon * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(regular, x.T @ y).T


@pytest.mark.slow
def test_the_history_of_inputs_is_ridge_regression_to_rounding(example):
    names, _ = example
    for seed, epsilon in enumerate((0.1, 1.0, 10.0)):
        _, model, train = names["run"]("history of inputs", (epsilon,), seed, "validation")
        joined = torch.cat([model.bias[:, None], model.weight], 1)
        wanted = closed_form(names, train, epsilon)
        assert_close(joined.detach(), wanted, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_guides_table_is_what_the_example_prints(example):
    _, printed = example
    text = (ROOT / "docs" / "regression.md").read_text(encoding="utf-8")
    table = {m: float(x) for m, x in re.findall(r"^\| (\S.*?) \|.*\| ([\d.]+) \|$", text, re.M)}
    assert table == pytest.approx(printed, rel=0.02)


def importances(scale, noise):
    """Return EWC's importances of a linear model that fits y = scale · (x + noise) best."""
    torch.manual_seed(0)
    x = torch.randn(64, 1, dtype=torch.float64)
    y = scale * (x + noise * torch.randn_like(x))
    model = nn.Linear(1, 1, bias=False, dtype=x.dtype)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution)
    data = torch.utils.data.TensorDataset(x, y, torch.zeros(64))
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    strategy = EWC(model=model, optimizer=sgd, criterion=nn.MSELoss(), ewc_lambda=1.0)
    plugin = strategy.plugins[0]
    found = plugin.compute_importances(model, nn.MSELoss(), sgd, data, torch.device("cpu"), 8)
    return found["weight"].data.item()


def test_ewc_protects_nothing_that_is_fitted_without_error():
    """Its importances are squared gradients of the loss, which hold the residuals."""
    assert importances(scale=1.0, noise=0.0) < 1e-25
    assert importances(scale=1.0, noise=0.5) > 1e-2


def test_ewcs_importances_depend_on_the_targets_unit():
    """Ten times the targets: its importances grow a hundredfold, as those of a Fisher do not."""
    assert importances(10.0, 0.5) == pytest.approx(100 * importances(1.0, 0.5))
