"""CLASSPPlugin turns Avalanche's Naive strategy into CLASSP training.

    python examples/plugin_on_naive.py

The plugin replaces the strategy's optimizer by a CLASSPOptimizer with the same parameter groups.
Accuracy on all ten digits after five experiences of two. Last lines:

    Naive               17.9 %
    Naive with CLASSP   92.1 %
"""

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import SimpleMLP
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from avalanche_classp import CLASSPPlugin, in_memory

images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() / 8 - 1
benchmark = in_memory(
    nc_benchmark(
        TensorDataset(images[:1200], labels[:1200]),
        TensorDataset(images[1200:], labels[1200:]),
        n_experiences=5,
        task_labels=False,
        fixed_class_order=list(range(10)),
    )
)


def accuracy(lr, plugins):
    torch.manual_seed(0)
    model = SimpleMLP(input_size=64, hidden_size=256, hidden_layers=2, drop_rate=0)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        train_mb_size=32,
        train_epochs=3,
        plugins=plugins,
        evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]),
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    metrics = strategy.eval(benchmark.test_stream)
    return 100 * metrics["Top1_Acc_Stream/eval_phase/test_stream/Task000"]


classp = CLASSPPlugin(history="inputs", lr=1.0)
print(f"Naive               {accuracy(0.1, []):.1f} %")
print(f"Naive with CLASSP   {accuracy(0.1, [classp]):.1f} %")
