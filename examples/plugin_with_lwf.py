"""CLASSPPlugin beside another method: Learning without Forgetting, five experiences of digits.

    python examples/plugin_with_lwf.py

LwF adds a term to the loss, CLASSP decides how far each weight moves; both act at once.
Accuracy on all ten digits after five experiences of two. Last lines:

    LwF               17.6 %
    LwF with CLASSP   83.1 %
"""

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import SimpleMLP
from avalanche.training import LwF
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


def accuracy(plugins):
    torch.manual_seed(0)
    model = SimpleMLP(input_size=64, hidden_size=256, hidden_layers=2, drop_rate=0)
    strategy = LwF(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=torch.nn.CrossEntropyLoss(),
        alpha=1.0,
        temperature=2.0,
        train_mb_size=32,
        train_epochs=3,
        plugins=plugins,
        evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]),
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    metrics = strategy.eval(benchmark.test_stream)
    return 100 * metrics["Top1_Acc_Stream/eval_phase/test_stream/Task000"]


classp = CLASSPPlugin(history="gradients", lr=0.04)
print(f"LwF               {accuracy([]):.1f} %")
print(f"LwF with CLASSP   {accuracy([classp]):.1f} %")
