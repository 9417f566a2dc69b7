"""A stream without boundaries: ten samples at a time, each seen once, and nobody says when.

    python examples/stream_without_boundaries.py

Nothing tells the learner that the classes change after every two digits. The accumulators need no
boundaries; give neither `phases` nor `consolidation` here. Last lines:

    Naive   16.9 %
    CLASSP  81.9 %
"""

import torch
from avalanche.benchmarks import nc_benchmark, split_online_stream
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import SimpleMLP
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from avalanche_classp import CLASSPOptimizer, CLASSPPlugin

images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() / 8 - 1
benchmark = nc_benchmark(
    TensorDataset(images[:1200], labels[:1200]),
    TensorDataset(images[1200:], labels[1200:]),
    n_experiences=5,
    task_labels=False,
    fixed_class_order=list(range(10)),
)


def accuracy(make_optimizer, plugins):
    torch.manual_seed(0)
    model = SimpleMLP(input_size=64, hidden_size=256, hidden_layers=2, drop_rate=0)
    strategy = Naive(
        model=model,
        optimizer=make_optimizer(model.parameters()),
        train_mb_size=10,
        plugins=plugins,
        evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]),
    )
    stream = split_online_stream(
        benchmark.train_stream, experience_size=10, access_task_boundaries=False, seed=0
    )
    for experience in stream:
        strategy.train(experience)
    metrics = strategy.eval(benchmark.test_stream)
    return 100 * metrics["Top1_Acc_Stream/eval_phase/test_stream/Task000"]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def classp(parameters):
    return CLASSPOptimizer(parameters, history="gradients", lr=0.04)


print(f"Naive   {accuracy(sgd, []):.1f} %")
print(f"CLASSP  {accuracy(classp, [CLASSPPlugin()]):.1f} %")
