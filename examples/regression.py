"""Regression: targets are numbers. Patients come in four groups, the slimmest first.

    python examples/regression.py

scikit-learn's diabetes data and a linear model. With half of the squared error, power 1 and
lr · epsilon = 1 the history of inputs is ridge regression on all that was seen. With `search` the
program chooses the values below on validation data. Last lines, the root of the mean squared error
on test data, a mean over five draws of the training data:

    SGD                68.3
    EWC                65.6
    history of inputs  57.3
"""

import sys

import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset, ConstantSequence, DataAttribute
from avalanche.evaluation.metrics import loss_metrics
from avalanche.training import EWC, Naive
from avalanche.training.plugins import EvaluationPlugin
from sklearn.datasets import load_diabetes
from torch.utils.data import TensorDataset

from avalanche_classp import CLASSP

x, y = map(torch.tensor, load_diabetes(return_X_y=True))
x, y = x * len(x) ** 0.5, y[:, None] / 100
groups = x[:, 2].argsort()[:440].view(4, 22, 5)  # by the body mass index
test, rest = groups[:, :, 2], groups[:, :, [0, 1, 3, 4]].flatten(1)
VALUES = {"SGD": (0.1, 5), "EWC": (0.1, 5, 1.0), "history of inputs": (0.1,)}


def half_squared_error(output, target):
    return (output - target).square().sum(1).mean() / 2


def experience(rows):
    data = TensorDataset(x[rows], y[rows])
    tasks = DataAttribute(ConstantSequence(0, len(data)), "targets_task_labels", True)
    return AvalancheDataset([data], data_attributes=[tasks])


def run(method, values, seed, held_out):
    """Return the error, the model, and its training rows."""
    torch.manual_seed(seed)
    train, validation = rest[:, torch.randperm(88)].split([64, 24], 1)
    held_out = test if held_out == "test" else validation
    benchmark = benchmark_from_datasets(
        train=[experience(rows) for rows in train], test=[experience(rows) for rows in held_out]
    )
    model = torch.nn.Linear(10, 1, dtype=x.dtype)
    model.load_state_dict({name: 0 * p for name, p in model.named_parameters()})
    options = {"model": model, "criterion": half_squared_error, "train_mb_size": 8}
    options["evaluator"] = EvaluationPlugin(loss_metrics(experience=True), loggers=[])
    if method == "history of inputs":
        strategy = CLASSP(**options, history="inputs", lr=1 / values[0], epsilon=values[0], power=1)
    else:
        lr, options["train_epochs"], *penalty = values
        options["optimizer"] = torch.optim.SGD(model.parameters(), lr)
        strategy = EWC(**options, ewc_lambda=penalty[0]) if penalty else Naive(**options)
    for some in benchmark.train_stream:
        strategy.train(some)
    losses = strategy.eval(benchmark.test_stream).values()
    return 100 * (2 * sum(losses) / len(losses)) ** 0.5, model, train


if sys.argv[1:] == ["search"]:
    steps = [(lr, epochs) for lr in (0.03, 0.1, 0.3) for epochs in (1, 5, 20)]
    found = min(steps, key=lambda values: run("SGD", values, 1000, "validation")[0])
    tried = {"SGD": steps, "EWC": [(*found, 10.0**k) for k in range(-4, 5)]}
    tried["history of inputs"] = [(10.0**k,) for k in range(-4, 5)]
    for method, values in tried.items():
        print(method, min(values, key=lambda v, m=method: run(m, v, 1000, "validation")[0]))
    sys.exit()
for method, values in VALUES.items():
    errors = [run(method, values, seed, "test")[0] for seed in range(5)]
    print(f"{method:18} {sum(errors) / 5:.1f}")
