"""The warning after the first epoch: settings that cannot work are told, those that can are not."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_classp import CLASSP, CLASSPOptimizer, CLASSPPlugin
from avalanche_classp.stuck import why_stuck


def experience(count=400, labels=None):
    targets = torch.arange(count) % 4
    data = TensorDataset(torch.eye(4)[targets] * 2, targets if labels is None else labels)
    data.targets = data.tensors[1].tolist()
    return nc_benchmark(data, data, 1, task_labels=False).train_stream[0]


def told(experiences=None, **settings):
    """Return what is warned of in two epochs of 50 mini-batches, by default twice."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
    options = {"train_mb_size": 8, "train_epochs": 2, "evaluator": EvaluationPlugin(loggers=[])}
    strategy = CLASSP(model=net, **options, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for part in experiences or [experience()] * 2:
            strategy.train(part)
    found = [str(w.message) for w in caught if str(w.message).startswith("after the first epoch")]
    assert len(found) <= 1
    return found[0] if found else None


@pytest.mark.parametrize("history", ["weights", "gradients", "inputs"])
def test_the_defaults_are_not_complained_of(history):
    assert told(history=history) is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"threshold": 1e6}, "no gradient passes the threshold; lower threshold"),
        ({"epsilon": 1e6, "power": 1.0}, "let almost nothing through; lower epsilon, or raise lr"),
        ({"history": "inputs", "lr": 1e-12}, "let almost nothing through; raise epsilon or lr"),
        ({"lr": 1e-12}, "let almost nothing through; lower epsilon, or raise lr"),
        ({"lr": 1e-5, "apply_decay": False}, "the loss has not fallen"),
    ],
)
def test_settings_that_cannot_work_are_told_once(settings, reason):
    message = told(**settings)
    assert message is not None and reason in message


@pytest.mark.parametrize(
    ("last", "reason"),
    [(2.0, "from 1 to 2); lower lr"), (1.0, "raise lr"), (0.5, None), (0.1, None)],
)
def test_the_loss_is_compared_over_the_epoch(last, reason):
    model = nn.Linear(2, 2)
    strategy = SimpleNamespace(model=model, optimizer=CLASSPOptimizer(model.parameters()))
    losses = [torch.tensor(value) for value in [1.0] * 25 + [last] * 25]
    message = why_stuck(strategy, {}, 50, losses)
    assert message is None if reason is None else reason in message


def test_a_loss_that_is_learnt_already_need_not_fall():
    assert told([experience(labels=torch.zeros(400, dtype=torch.long))] * 2, lr=0.1) is None


def test_few_steps_tell_nothing():
    assert told([experience(300)], threshold=1e6) is None


def test_it_holds_no_losses_after_the_first_epoch():
    net = nn.Linear(4, 4)
    plugin = CLASSPPlugin(lr=0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    strategy = Naive(
        model=net,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        plugins=[plugin],
        evaluator=EvaluationPlugin(loggers=[]),
    )
    strategy.train(experience())
    assert plugin._first_losses is None
