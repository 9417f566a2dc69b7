"""suggest_lr: what it chooses, what it prints, and what it leaves alone."""

import copy
import random

import numpy as np
import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.models import IncrementalClassifier
from avalanche.training import EWC
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_classp import CLASSP, suggest_lr

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


def experience(count=60):
    targets = torch.arange(count) % 4
    data = TensorDataset(torch.eye(4)[targets] * 4, targets)
    data.targets = targets.tolist()
    return nc_benchmark(data, data, 2, task_labels=False, shuffle=False).train_stream[0]


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("history", ["weights", "gradients", "inputs"])
def test_the_smallest_that_learns_is_suggested_and_shown(history, capsys):
    torch.manual_seed(0)
    lrs = [10.0, 1e-9, 0.1, 0.3]
    chosen = suggest_lr(
        lambda lr: CLASSP(model=net(), history=history, lr=lr, train_mb_size=8, train_epochs=4),
        experience(),
        lrs=lrs,
    )
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["lr", "accuracy", "loss"]
    shown = {float(line.split()[0]): float(line.split()[1]) for line in lines}
    assert list(shown) == sorted(lrs)
    assert max(shown.values()) == 100 > shown[1e-9]  # no standard error
    assert chosen == min(lr for lr, accuracy in shown.items() if accuracy == 100)
    assert [float(line.split()[0]) for line in lines if "suggested" in line] == [chosen]


def test_model_optimizer_and_random_generators_stay_as_they_are(capsys):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    weights = copy.deepcopy(model.state_dict())
    strategies = []

    def factory(lr):
        optimizer.param_groups[0]["lr"] = lr
        torch.randn(3), np.random.rand(3), random.random()
        options = {"criterion": nn.CrossEntropyLoss(), "train_mb_size": 8, "ewc_lambda": 1.0}
        strategies.append(EWC(model=model, optimizer=optimizer, **options))
        return strategies[-1]

    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert suggest_lr(factory, experience(), lrs=[0.01, 0.1], verbose=False) in (0.01, 0.1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert all(torch.equal(weights[name], p) for name, p in model.state_dict().items())
    assert not optimizer.state and model.training
    assert all(isinstance(s.evaluator, EvaluationPlugin) for s in strategies)
    assert all(s.evaluator in s.plugins and s.clock.train_iterations == 0 for s in strategies)
    assert capsys.readouterr().out == ""


def test_a_head_of_the_users_own_does_not_grow():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), IncrementalClassifier(8, 1))
    suggest_lr(lambda lr: CLASSP(model=model, lr=lr), experience(), lrs=[0.01], verbose=False)
    assert model[-1].classifier.out_features == 1


def test_each_lr_sees_the_same_mini_batches_and_initial_weights():
    seen = []

    def factory(lr):
        seen.append(torch.randn(2).tolist())
        return CLASSP(model=net(), lr=lr)

    suggest_lr(factory, experience(), lrs=[0.1, 0.2], verbose=False)
    assert seen[0] == seen[1]


def test_what_diverges_is_not_suggested(capsys):
    factory = lambda lr: CLASSP(model=net(), lr=lr, apply_decay=False, train_epochs=30)  # noqa: E731
    assert suggest_lr(factory, experience(), lrs=[0.1, 1e30]) == 0.1
    assert "1e+30  diverged" in capsys.readouterr().out
    with pytest.raises(ValueError, match="training diverged with each of"):
        suggest_lr(factory, experience(), lrs=[1e30], verbose=False)


def test_bad_arguments_are_told():
    for lrs in ([], [0.0], [-1.0], [float("nan")]):
        with pytest.raises(ValueError, match="lrs must be numbers greater than 0"):
            suggest_lr(lambda lr: None, experience(), lrs=lrs)
    with pytest.raises(ValueError, match="experience must have some samples of each class"):
        suggest_lr(lambda lr: None, experience(4))
