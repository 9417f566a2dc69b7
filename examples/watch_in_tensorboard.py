"""CLASSP's own metrics in TensorBoard and in a CSV file.

    python examples/watch_in_tensorboard.py
    tensorboard --logdir watched

docs/metrics.md says what each curve means. Last lines, the share of weights that are still free:

    after experience 1: 81 % free
    after experience 2: 30 % free
    after experience 3: 13 % free
    after experience 4: 9 % free
    after experience 5: 7 % free
"""

import csv
from pathlib import Path

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import TensorboardLogger
from avalanche.models import SimpleMLP
from avalanche.training.plugins import EvaluationPlugin
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from avalanche_classp import CLASSP, CSVValueLogger, classp_metrics

images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() / 8 - 1
benchmark = nc_benchmark(
    TensorDataset(images[:1200], labels[:1200]),
    TensorDataset(images[1200:], labels[1200:]),
    n_experiences=5,
    task_labels=False,
    fixed_class_order=list(range(10)),
)
folder = Path("watched")
(folder / "values.csv").unlink(missing_ok=True)
tensorboard = TensorboardLogger(folder)
torch.manual_seed(0)
strategy = CLASSP(
    model=SimpleMLP(input_size=64, hidden_size=256, drop_rate=0),
    lr=0.01,
    epsilon=0.01,
    power=1.0,
    train_mb_size=32,
    train_epochs=3,
    evaluator=EvaluationPlugin(
        accuracy_metrics(experience=True, stream=True),
        classp_metrics(epoch=True, experience=True),
        loggers=[tensorboard, CSVValueLogger(folder / "values.csv")],
    ),
)
for experience in benchmark.train_stream:
    strategy.train(experience)
    strategy.eval(benchmark.test_stream)
tensorboard.writer.close()

with (folder / "values.csv").open() as file:
    values = [row for row in csv.DictReader(file) if row["name"].startswith("CLASSP_Free_Exp")]
for number, row in enumerate(values, 1):
    print(f"after experience {number}: {100 * float(row['value']):.0f} % free")
