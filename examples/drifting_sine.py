"""A series: the next value of a sine whose frequency drifts from one experience to the next.

    python examples/drifting_sine.py

A small network sees sixteen values and predicts the next. Five frequencies come one after the
other; the error is the root of the mean squared error, in percent of the amplitude, on the first
frequency, right after it was learnt and at the end. Last lines:

    SGD:               1.0 % then 80.2 %
    history of inputs: 1.7 % then 33.8 %
"""

import math

import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset, ConstantSequence, DataAttribute
from avalanche.evaluation.metrics import loss_metrics
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_classp import CLASSP

WINDOW = 16


def experience(frequency, count=512):
    """Return windows of a sine, and the value after each."""
    phases = 2 * math.pi * torch.rand(count, 1)
    values = torch.sin(phases + frequency * torch.arange(WINDOW + 1))
    data = TensorDataset(values[:, :-1], values[:, -1:])
    tasks = DataAttribute(ConstantSequence(0, count), "targets_task_labels", True)
    return AvalancheDataset([data], data_attributes=[tasks])


def half_squared_error(output, target):
    return (output - target).square().sum(1).mean() / 2


def strategy_of(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WINDOW, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 1))
    options = {"model": model, "criterion": half_squared_error, "train_mb_size": 16}
    options |= {"train_epochs": 5, "eval_mb_size": 512}
    options["evaluator"] = EvaluationPlugin(loss_metrics(experience=True), loggers=[])
    if method == "SGD":
        return Naive(**options, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    return CLASSP(**options, history="inputs", lr=0.1, epsilon=30)


torch.manual_seed(1)
frequencies = (0.2, 0.4, 0.6, 0.8, 1.0)
benchmark = benchmark_from_datasets(
    train=[experience(f) for f in frequencies], test=[experience(frequencies[0])]
)
for method in ("SGD", "history of inputs"):
    strategy = strategy_of(method)
    errors = []
    for some in benchmark.train_stream:
        strategy.train(some)
        (loss,) = strategy.eval(benchmark.test_stream).values()
        errors.append(100 * (2 * loss) ** 0.5)
    print(f"{method + ':':18} {errors[0]:.1f} % then {errors[-1]:.1f} %")
